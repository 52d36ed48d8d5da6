"""`treeflash:drafter`: trains a drafter for a frozen target.

Phase A (`dflash`) teaches the backbone marginals, phase B (`treeflash`) the approximator and,
gently, the backbone; `both` runs one after the other. Rows are packed texts, prompts with
references, or what the target itself wrote (samples): the last is what drafts best, since a
drafter has to foresee the target and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import Context, Dataset, Delegate
from tenfold.errors import ConfigError
from tenfold.lm.packing import PackedRows, pack_tokens
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.precision import native_bf16
from tenfold.lm.prompts import continuation_ids, prompt_ids
from tenfold.lm.training import fit_causal_lm
from tenfold.records import Checkpoint, Metric
from tenfold.scale import process
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tenfold_treeflash.checkpoints import load_drafter, read_config
from tenfold_treeflash.configuration import TreeFlashConfig, for_target
from tenfold_treeflash.features import FeatureStore, store_features
from tenfold_treeflash.mask_token import find_mask_token
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.objective import DraftObjective, ObjectiveSettings
from tenfold_treeflash.rows import TokenRows
from tenfold_treeflash.target import Target
from tenfold_treeflash.training_rows import LOSS_MASK

PHASES = ("both", "dflash", "treeflash", "joint")
FEATURES = ("online", "stored")


class NumberedRows(TorchDataset):
    """Rows that know their number (`row`, int64), which their anchors depend on."""

    def __init__(self, rows: PackedRows | TokenRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self._rows[index], "row": torch.tensor(index)}

    def fingerprint(self) -> str:
        """Content hash of the rows."""
        return self._rows.fingerprint()


class StepCallback(TrainerCallback):
    """Tells the objective which step is about to run."""

    def __init__(self, objective: DraftObjective) -> None:
        self._objective = objective

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the step."""
        self._objective.step = state.global_step


class _PhaseContext(Delegate):
    """The host's context with a folder of its own for one phase."""

    def __init__(self, ctx: Context, name: str) -> None:
        super().__init__(ctx)
        self.work_dir = Path(ctx.work_dir) / name
        self.work_dir.mkdir(parents=True, exist_ok=True)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients for a model's weights while the block runs."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


class DrafterTrainer:
    """Trains a drafter; parameters are described by the plugin.

    Raises:
        ConfigError: settings out of range.
    """

    def __init__(
        self,
        target: Any,
        dataset: Dataset,
        init: str | None = None,
        phase: str = "both",
        layers: int = 2,
        block_size: int = 8,
        num_features: int = 5,
        ar_approximation: str = "swiglu",
        mask: str = "auto",
        freeze_backbone: bool = False,
        steps: int = 600,
        steps_b: int = 400,
        batch_size: int = 16,
        learning_rate: float = 2e-3,
        learning_rate_b: float = 1e-3,
        warmup_ratio: float = 0.04,
        weight_decay: float = 0.0,
        context_length: int = 256,
        anchors: int = 32,
        marginal_loss: str = "ce",
        marginal_weight: float | None = None,
        decay: float | None = None,
        eval_rows: int = 32,
        gradient_accumulation: int = 1,
        save_steps: int = 0,
        bf16: bool | None = None,
        features: str = "online",
        features_folder: str | None = None,
        seed: int | None = None,
    ) -> None:
        if phase not in PHASES:
            raise ConfigError(f"phase is {phase!r}; known: {', '.join(PHASES)}")
        if phase == "treeflash" and init is None:
            raise ConfigError(
                "phase treeflash starts from a trained backbone: give init (a checkpoint folder), "
                "or use phase both"
            )
        if features not in FEATURES:
            raise ConfigError(f"features is {features!r}; known: {', '.join(FEATURES)}")
        if features_folder is not None and features == "online":
            raise ConfigError("features_folder is given, but features = 'online' stores none")
        if context_length < 4:
            raise ConfigError(f"context_length is {context_length}; it must be at least 4")
        self.base, self.dataset, self.init, self.phase = target, dataset, init, phase
        self.shape: dict[str, Any] = {
            "num_hidden_layers": layers, "block_size": block_size, "num_features": num_features,
            "ar_approximation": ar_approximation,
        }  # fmt: skip
        self.mask, self.freeze_backbone = mask, freeze_backbone
        self.steps, self.rates = (steps, steps_b), (learning_rate, learning_rate_b)
        self.batch_size, self.warmup_ratio = batch_size, warmup_ratio
        self.weight_decay, self.context_length = weight_decay, context_length
        self.anchors, self.decay = anchors, decay
        self.marginal_loss, self.marginal_weight = marginal_loss, marginal_weight
        self.eval_rows, self.gradient_accumulation = eval_rows, gradient_accumulation
        self.save_steps, self.bf16, self.seed = save_steps, bf16, seed
        self.features = features
        self.features_folder = None if features_folder is None else Path(features_folder)
        for name in self._phases():
            self._settings(name, 0)

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"` (or of its last phase); resumes.

        Raises:
            ConfigError: no usable rows, or a drafter that does not fit the target.
        """
        seed = ctx.seed if self.seed is None else self.seed
        target = Target(self.base.module())
        with _frozen(target.model):
            return self._fit(ctx, target, seed)

    def _fit(self, ctx: Context, target: Target, seed: int) -> Checkpoint:
        with ctx.progress("preparing rows", None, "") as bar:
            rows, held_out = self._rows(seed)
            bar.advance(len(rows))
        skipped = getattr(rows, "skipped", 0)
        if skipped:
            ctx.log("rows without two supervised tokens in a row are left out", skipped=skipped)
        drafter = self._drafter(target, seed)
        target.check_drafter(drafter.config)
        stores = self._stores(ctx, target, drafter.config.target_layer_ids, (rows, held_out))
        metrics: list[Metric] = []
        checkpoint: Checkpoint | None = None
        phases = self._phases()
        for number, phase in enumerate(phases):
            last = number + 1 == len(phases)
            own: Any = ctx if last else _PhaseContext(ctx, f"phase-{phase}")
            objective = DraftObjective(target, self._settings(phase, seed), stores)
            checkpoint = self._train(own, phase, number, drafter, objective, rows, held_out, seed)
            if not last:
                # Read back, so that a resumed training begins with the very same object.
                drafter = load_drafter(checkpoint.path).to(target.device)
            metrics += [
                Metric(f"{phase}-{m.name}", m.value, m.n, higher_is_better=False, unit=m.unit)
                for m in checkpoint.metrics
                if m.name.endswith("loss")
            ]
        assert checkpoint is not None
        size = sum(p.numel() for p in drafter.parameters())
        metrics += [
            Metric("parameters", float(size), 1),
            Metric("rows", float(len(rows)), 1),
            Metric("skipped_rows", float(skipped), 1),
        ]
        return Checkpoint(checkpoint.path, metrics)

    def _train(
        self,
        ctx: Any,
        phase: str,
        number: int,
        drafter: TreeFlashDraftModel,
        objective: DraftObjective,
        rows: Any,
        held_out: Any,
        seed: int,
    ) -> Checkpoint:
        backbone = not (self.freeze_backbone and phase == "treeflash")
        for name, parameter in drafter.named_parameters():
            own = name.startswith("ar_approximation.")
            parameter.requires_grad_(phase != "dflash" if own else backbone)
        index = min(number, 1) if self.phase == "both" else int(phase == "treeflash")
        plan = TrainingPlan(
            steps=self.steps[index],
            batch_size=self.batch_size,
            learning_rate=self.rates[index],
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            adam_beta2=0.999,
            context_length=self.context_length,
            bf16=native_bf16(ctx.device) if self.bf16 is None else self.bf16,
            gradient_accumulation=self.gradient_accumulation,
            save_steps=self.save_steps,
            seed=seed,
        )
        return fit_causal_lm(
            ctx, drafter, None, NumberedRows(rows), plan, compute_loss=objective,
            callbacks=[StepCallback(objective)],
            eval_dataset=None if held_out is None else NumberedRows(held_out),
        )  # fmt: skip

    def _stores(
        self, ctx: Context, target: Target, layers: list[int], parts: tuple[Any, Any]
    ) -> tuple[FeatureStore | None, FeatureStore | None]:
        """Stored features of training and held-out rows, where they are wanted."""
        if self.features == "online":
            return None, None
        if ctx.world_size > 1:
            process.init_process_group(ctx.device)
        folder = self.features_folder or Path(ctx.work_dir) / "features"
        stores: list[FeatureStore | None] = []
        total = sum(len(part) for part in parts if part is not None)
        with ctx.progress("storing features", total, "rows") as bar:
            for name, part in zip(("train", "held-out"), parts, strict=True):
                stores.append(
                    None
                    if part is None
                    else store_features(target, part, layers, folder / name, advance=bar.advance)
                )
        return stores[0], stores[1]

    def _phases(self) -> list[str]:
        return ["dflash", "treeflash"] if self.phase == "both" else [self.phase]

    def _settings(self, phase: str, seed: int) -> ObjectiveSettings:
        return ObjectiveSettings(
            phase=phase, anchors=self.anchors, marginal_weight=self._lambda(phase),
            marginal_loss=self.marginal_loss, decay=self.decay, seed=seed,
        )  # fmt: skip

    def _lambda(self, phase: str) -> float | None:
        if self.freeze_backbone and phase == "treeflash":
            return 0.0
        return self.marginal_weight

    def _drafter(self, target: Target, seed: int) -> TreeFlashDraftModel:
        if self.init is not None:
            kind = read_config(self.init).ar_approximation
            new = None if kind is not None else str(self.shape["ar_approximation"])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                drafter = load_drafter(self.init, dtype="float32", ar_approximation=new)
            return drafter.to(target.device)
        config: TreeFlashConfig = for_target(
            target.model.config,
            mask_token_id=find_mask_token(target, self.base, self.mask),
            **self.shape,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TreeFlashDraftModel(config).to(target.device)

    def _rows(self, seed: int) -> tuple[Any, Any]:
        make = self._make_rows
        rows = make(self.dataset.load())
        if self.eval_rows <= 0:
            return rows, None
        if "validation" in self.dataset.splits():
            held = make(self.dataset.load("validation", self.eval_rows))
            return rows, held
        count = min(self.eval_rows, len(rows) // 10)
        return rows.split(count, seed) if count else (rows, None)

    def _make_rows(self, records: Iterable[Any]) -> PackedRows | TokenRows:
        if self.dataset.kind == "text":
            texts = (record.text for record in records)
            return pack_tokens(texts, self.base.tokenizer, self.context_length)
        rows = TokenRows()
        for record in records:
            rows.add(*self._supervised(record))
        if not len(rows):
            raise ConfigError(
                f"none of {rows.skipped} records has two supervised tokens in a row (and a token "
                "before them); the dataset needs prompts with references, samples, or texts"
            )
        return rows

    def _supervised(self, record: Any) -> tuple[list[int], list[bool]]:
        """Ids and which of them count, cut at the end."""
        mask = record.metadata.get(LOSS_MASK)
        before = getattr(record, "prompt_ids", None)
        after = getattr(record, "completion_ids", None)
        if mask is not None and after is not None:
            ids = continuation_ids(self.base, after)[: self.context_length]
            return ids, [bool(m) for m in mask[: len(ids)]]
        if before is None:
            before = prompt_ids(self.base, record.prompt)
        if after is None:
            text = getattr(record, "completion", None)
            if text is None:
                text = getattr(record, "reference", None)
            if text is None:
                raise ConfigError(
                    f"record {record.id!r} has neither a completion nor a reference to learn from"
                )
            after = continuation_ids(self.base, text)
        before = list(before)[-(self.context_length // 2) :]
        ids = [*before, *after][: self.context_length]
        return ids, [i >= len(before) for i in range(len(ids))]
