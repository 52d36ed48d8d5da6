"""`transformers.Trainer` as a training plan needs it.

Three things differ from the ordinary one: rows come in an order that is a function of the seed
alone, a step's loss is the mean over all scored tokens of the step (whatever the number of
processes and accumulation steps), and a loss function may report values of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler, default_collate
from transformers import Trainer

from tenfold.lm.packing import IGNORED
from tenfold.scale import process

Loss = Tensor | tuple[Tensor, Mapping[str, float]]
ComputeLoss = Callable[[Any, Mapping[str, Tensor]], Loss]
"""`(model, batch) -> loss`: the mean over the batch's scored tokens, with gradients; optionally
with named values to be logged. The trainer weighs batches by their scored tokens."""


class RowStream(Dataset):
    """`total` rows of a dataset: one random permutation after another.

    Item `i` is a function of (seed, i), so order depends neither on the number of processes
    nor on where a run was interrupted, and no row comes twice before all came once.
    """

    def __init__(self, rows: Any, total: int, seed: int) -> None:
        self._rows = rows
        self._total = total
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Any:
        epoch, offset = divmod(index, len(self._rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = torch.randperm(len(self._rows), generator=generator).tolist()
            self._epoch = epoch
        return self._rows[self._order[offset]]


class Collator:
    """Rows as a batch: stacked when equally long, else right-padded with a mask.

    Rows are mappings with `input_ids` and, optionally, `labels` (`IGNORED` = not scored) and
    further tensors of equal shape.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch; `labels` default to the tokens themselves."""
        ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"])).long() for row in rows]
        rest = [{k: v for k, v in r.items() if k not in ("input_ids", "labels")} for r in rows]
        batch: dict[str, Tensor] = default_collate(rest) if rest[0] else {}
        batch["input_ids"] = _padded(ids, self._pad_id)
        batch["labels"] = _padded(labels, IGNORED)
        if len({len(row) for row in ids}) > 1:
            batch["attention_mask"] = _padded([torch.ones_like(row) for row in ids], 0)
        return batch


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def scored_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Number of tokens of a batch that have a loss (models shift labels by one)."""
    return batch["labels"][..., 1:].ne(IGNORED).sum()


def model_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss."""
    return model(**batch).loss


class PlanTrainer(Trainer):
    """See the module's text; `loss_function` follows `ComputeLoss`."""

    def __init__(self, *, loss_function: ComputeLoss | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Losses come scaled; both names exist so that every transformers version sees it.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_function = loss_function or model_loss
        self._reported: dict[str, list[float]] = {}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step, and their scored tokens over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        count = torch.stack([scored_tokens(b).to(device) for b in batches]).sum()
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's mean loss; in training, its share of the step's mean.

        Gradients are averaged over processes afterwards, hence the factor `world_size`.
        """
        count = scored_tokens(inputs)
        # A part without a scored token has no mean: any labels do, with a share of 0.
        labels = torch.where(count > 0, inputs["labels"], inputs["input_ids"])
        result = self._loss_function(model, {**inputs, "labels": labels})
        loss, values = result if isinstance(result, tuple) else (result, {})
        network: Any = self.model
        # Not the wrapper's own flag: DeepSpeed's engine says it trains while its module does not.
        if network.training:
            for name, value in values.items():
                self._reported.setdefault(name, []).append(float(value))
            if num_items_in_batch is not None:
                loss = loss * (count / num_items_in_batch) * self.args.world_size
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss per scored token of the held-out rows, the same on any number of processes.

        transformers' own loop repeats rows to fill the last batches, and takes means of means.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model_wrapped
        model.eval()  # returns nothing for DeepSpeed's engine
        total = scored = 0.0
        for batch, share in self._evaluation_batches(rows):
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            count = float(scored_tokens(batch)) * share
            total, scored = total + float(loss) * count, scored + count
        sums = process.gather_objects((total, scored))
        metrics = {f"{metric_key_prefix}_loss": sum(t for t, _ in sums) / sum(n for _, n in sums)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluation_batches(self, rows: Any) -> Iterator[tuple[dict[str, Any], int]]:
        """This process's batches, equally many on each; those beyond the rows count 0."""
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        for first in range(0, len(rows), size * world):
            start = first + size * self.args.process_index
            chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
            collate: Any = self.data_collator
            yield collate(chosen or [rows[0]]), int(bool(chosen))

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Adds the means of reported values to training logs."""
        if "loss" in logs:
            means = {name: sum(v) / len(v) for name, v in self._reported.items() if v}
            logs = {**logs, **means}
            self._reported = {}
        super().log(logs, *arguments, **keywords)
