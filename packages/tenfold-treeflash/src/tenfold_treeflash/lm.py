"""The components: a drafter's checkpoint, and a language model decoded with it.

A `TreeDecoder` is its base in everything but `generate`, and writes what the base writes: the
base's own processors and random numbers decide every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import Delegate
from tenfold.errors import ConfigError
from tenfold.lm.generation import GenerateMixin
from tenfold.lm.model import CausalLM
from tenfold.lm.sampling import GeneratedRow, GenerationControls, GenerationRow
from tenfold.lm.weights import hash_tensors
from tenfold.records import GenerationConfig

from tenfold_treeflash.checkpoints import load_drafter
from tenfold_treeflash.costs import CostModel, cached_costs
from tenfold_treeflash.decoding import DecodingStats, DraftSettings, Round, SpeculativeDecoder
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.planning import Planners
from tenfold_treeflash.target import Target, check_pair

AUTO = "auto"
LARGEST_AUTO = 64


class Drafter:
    """A drafter's weights with the name they have in run files.

    Attributes:
        network: the model.
        source: the folder it came from.
    """

    def __init__(self, network: TreeFlashDraftModel, source: Path | None = None) -> None:
        self.network, self.source = network.eval(), source

    def fingerprint(self) -> str:
        """Content hash of the weights."""
        return hash_tensors(self.network)


def load(checkpoint: str, device: str = "cpu", dtype: str = "float32") -> Drafter:
    """A drafter from a checkpoint folder, published or written by `treeflash:drafter`.

    Raises:
        ConfigError: no such checkpoint, or one that is no drafter.
    """
    folder = Path(checkpoint).expanduser()
    network = load_drafter(folder).to(device=device, dtype=getattr(torch, dtype))
    return Drafter(network, folder)


class TreeDecoder(Delegate, GenerateMixin):
    """A causal language model decoded in trees.

    Args:
        base: the model; what it writes is what this writes.
        drafter: its drafter; None decodes the same loop without one.
        method: `tree`, `marginal` or `chain`.
        tree_size: nodes per round; None, or `auto`: decided round by round (see `planning`), with
            `top_m` and `top_k` as the largest tables.
        top_m, top_k, temperature, shortlist, block_size: see `DraftSettings`.

    Raises:
        ConfigError: a base without weights of its own, or a drafter of another target.
        ComponentError: a base whose attention cannot run trees.
    """

    def __init__(
        self,
        base: Any,
        drafter: Drafter | None,
        method: str = "tree",
        tree_size: int | str | None = None,
        top_m: int = 16,
        top_k: int = 16,
        temperature: float | None = None,
        shortlist: int | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(base)
        _check_base(base)
        self.batch_tokens, self._eos_ids = base.batch_tokens, base._eos_ids
        self.drafter = drafter
        network = None if drafter is None else drafter.network
        self.target = Target(base.module())
        if network is not None:
            network.to(device=self.target.device, dtype=self.target.dtype)
        check_pair(self.target, network)
        self.method = method if network is not None else "none"
        self.costs: CostModel | None = None
        size = _tree_size(tree_size)
        if size is None and network is not None and self.method != "chain":
            tables: dict[str, Any] = {
                "top_m": top_m, "top_k": top_k, "shortlist": shortlist,
                "marginal": self.method == "marginal",
            }  # fmt: skip
            self.costs = cached_costs(
                self.target, network, block_size=block_size, choices=True, **tables
            )
        if size is None:
            size = LARGEST_AUTO
        self.settings = DraftSettings(
            method=self.method, tree_size=size, top_m=top_m, top_k=top_k,
            temperature=temperature, shortlist=shortlist, block_size=block_size,
        )  # fmt: skip
        self.rounds: list[Round] | None = None
        """Rounds are kept here while it is a list."""
        self._decoder = SpeculativeDecoder(
            self.target,
            network,
            self.settings,
            watch=self._watch,
            planners=None if self.costs is None else Planners(self.costs, LARGEST_AUTO),
        )

    def _watch(self, round_: Round) -> None:
        if self.rounds is not None:
            self.rounds.append(round_)

    def _generate_batch(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """Rows side by side, each with its own processors and random numbers."""
        base: Any = self.base
        controls = [base.controls([row], config, len(row.ids)) for row in rows]
        choosers = [_ControlledChoice(own, self.target.device) for own in controls]
        if len(rows) == 1:
            text, stats = self._decoder.decode(rows[0].ids, choosers[0])
            texts, records = [text], [stats]
        else:
            texts, records = self._decoder.decode_batch([row.ids for row in rows], choosers)
        written = []
        for ids, stats, own in zip(texts, records, controls, strict=True):
            [done] = own.collect(torch.tensor([ids]))
            done.stats = _plain(stats)
            written.append(done)
        return written

    def fingerprint(self) -> str:
        """The base's: drafters change how fast it writes, never what."""
        return self.base.fingerprint()


class _ControlledChoice:
    """Choices by the base's own controls: processors, then the arg-max (noise included)."""

    def __init__(self, controls: GenerationControls, device: torch.device) -> None:
        self._controls, self._device = controls, device
        self.greedy = not len(controls.processors)

    def choose(self, ids: list[int], logits: torch.Tensor) -> int:
        """See `Chooser`."""
        text: Any = torch.tensor([ids], device=self._device)
        scores: Any = self._controls.processors(
            text, logits[None].to(copy=True, dtype=torch.float32)
        )
        return int(scores.argmax(-1))

    def ends(self, ids: list[int]) -> bool:
        """See `Chooser`."""
        text: Any = torch.tensor([ids])
        scores: Any = None
        return bool(self._controls.stopping(text, scores).all())


def _plain(stats: DecodingStats) -> dict[str, Any]:
    """What a completion tells of its rounds. Automatic tree sizes follow measured times, so
    these numbers may differ between machines; texts do not."""
    return {"rounds": stats.rounds, "accepted": list(stats.accepted)}


def _check_base(base: Any) -> None:
    """Raises ConfigError for a base that this loop would not decode as the base does itself."""
    if not isinstance(base, GenerateMixin) or not hasattr(base, "module"):
        raise ConfigError(
            f"{type(base).__name__} has no weights here to decode with; the base must be a "
            "local language model such as core:hf or core:tiny-lm"
        )
    kind = type(base)
    plain = all(
        getattr(kind, name) is getattr(CausalLM, name)
        for name in ("_generate_batch", "_generate_rows")
    )
    if not plain:
        raise ConfigError(
            f"{kind.__name__} decodes in a way of its own, which trees would not reproduce; the "
            "base must be a plain language model such as core:hf or core:tiny-lm"
        )


def _tree_size(value: int | str | None) -> int | None:
    """A number, or None for `auto`."""
    if value is None or value == AUTO:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"tree_size is {value!r}; it must be auto or a number") from None


def chain(base: Any, drafter: Drafter, **settings: Any) -> TreeDecoder:
    """A decoder that drafts the single best path."""
    return TreeDecoder(base, drafter, method="chain", **settings)


def marginal(base: Any, drafter: Drafter, **settings: Any) -> TreeDecoder:
    """A decoder that drafts trees of marginals."""
    return TreeDecoder(base, drafter, method="marginal", **settings)


def with_drafter(model: Any, who: str) -> TreeDecoder:
    """The model of an evaluator that measures drafting.

    Raises:
        ConfigError: it drafts nothing.
    """
    if not isinstance(model, TreeDecoder) or model.drafter is None:
        raise ConfigError(
            f"{who} needs a model with a drafter, such as treeflash:tree; this is a "
            f"{type(model).__name__}"
        )
    return model
