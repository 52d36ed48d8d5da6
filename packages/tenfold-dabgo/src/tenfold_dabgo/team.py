"""The processes that share one corpus: who takes which batches, and how results are joined.

Every process holds the model and walks through the same queries in the same order; of each
pass over the corpus it takes every `size`-th batch. Batches are those of a single process, so
that losses are bit-identical whatever the number of processes; sums (the Fisher) are equal up
to the order of additions. A single process is a team of one, for which nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from tenfold.capabilities import Context
from tenfold.errors import ComponentError, TenfoldError
from tenfold.lm.quiet import quiet
from tenfold.scale import process
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place: `rank` of `size` processes that work on one corpus together.

    `sharded`: weights are spread over them (see `zero3`), so all have to take the same number
    of batches, and sums over weights are sums over processes.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def join(cls, ctx: Context) -> Team:
        """The team of the run's processes; joins them into a process group at the first call."""
        if ctx.world_size == 1 or process.asked_world_size() == 1:
            return cls()
        with quiet():  # DeepSpeed prints what it builds, and stdout is for results
            process.init_process_group(ctx.device)
        return cls(process.rank(), process.obtained_world_size())

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.size == 1

    def mine(self, things: Sequence[T]) -> Sequence[T]:
        """This process's part: every `size`-th thing, so that sorted batches spread evenly.

        Where everyone has to do equally many, some things are done twice.
        """
        if self.sharded and things:
            things = [*things, *[things[0]] * (-len(things) % self.size)]
        return things[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        return [value] if self.alone else process.gather_objects(value)

    def first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first process, everywhere; so is what it raises."""
        if self.alone:
            return action()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome = (None, error)
        value, raised = process.from_rank_zero(outcome)
        if raised is not None:
            raise raised
        return value

    def join_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Everybody's rows one after the other, column by column."""
        if self.alone:
            return dict(rows)
        parts = self.gather(dict(rows))
        return {name: np.concatenate([part[name] for part in parts]) for name in rows}

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Adds up everybody's tensors, in place."""
        if not self.alone:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_numbers(self, *values: float) -> tuple[float, ...]:
        """Sums over the processes of a few numbers."""
        return tuple(sum(column) for column in zip(*self.gather(values), strict=True))

    def rounds(self, blocks: Iterator[list[T]]) -> Iterator[list[T]]:
        """This process's blocks, and empty ones until everybody's have run out.

        Whoever has nothing left still takes part in the others' passes.
        """
        while True:
            block = next(blocks, [])
            if not any(self.gather(bool(block))):
                return
            yield block


ALONE = Team()


def explain_failure(error: Exception, rank: int) -> ComponentError:
    """What ends a run of several processes when one of them fails in shared work.

    The others wait for it in an exchange, so that no item can be blamed and passed over.
    """
    hint = "what is finished is kept: continue with `tenfold run --resume`"
    if isinstance(error, TenfoldError):
        return ComponentError(str(error.args[0]), hint=error.hint or hint)
    return ComponentError(f"process {rank} failed: {type(error).__name__}: {error}", hint=hint)
