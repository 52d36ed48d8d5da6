"""What a training run of a causal language model does, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tenfold.errors import ConfigError
from tenfold.seeds import content_hash

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Settings of `fit_causal_lm`.

    `batch_size` counts rows per optimizer step over *all* processes and accumulation steps, so
    that one plan trains the same model on one process and on many.

    Attributes:
        steps: optimizer steps.
        batch_size: rows per optimizer step; a multiple of processes x gradient_accumulation.
        learning_rate: peak learning rate of AdamW.
        warmup_ratio: share of the steps that the learning rate rises over.
        schedule: how it falls after that.
        weight_decay: decoupled decay of matrices (norms and biases have none).
        adam_beta1, adam_beta2: AdamW's averages; 0.95 suits short runs better than 0.999.
        grad_clip: largest gradient norm; 0 turns clipping off.
        context_length: tokens per row (the data is packed by it; kept for the record).
        bf16: compute in bfloat16 (weights stay in fp32).
        gradient_accumulation: parts that a process splits its rows of a step into.
        eval_steps: steps between evaluations on held-out rows; 0 evaluates at the end only.
        save_steps: steps between resumable states; 0 chooses about ten over the run.
        log_steps: steps between logged losses.
        seed: of dropout and of the rows' order.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 1.0
    context_length: int = 256
    bf16: bool = False
    gradient_accumulation: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    log_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for values out of range."""
        checks = (
            (self.steps >= 1, "steps", "at least 1"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.learning_rate > 0, "learning_rate", "above 0"),
            (0 <= self.warmup_ratio < 1, "warmup_ratio", "in [0, 1)"),
            (self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}"),
            (self.weight_decay >= 0, "weight_decay", "0 or more"),
            (self.grad_clip >= 0, "grad_clip", "0 (off) or more"),
            (self.gradient_accumulation >= 1, "gradient_accumulation", "at least 1"),
            (self.log_steps >= 1, "log_steps", "at least 1"),
        )
        for ok, name, right in checks:
            if not ok:
                raise ConfigError(
                    f"training setting {name!r} is {getattr(self, name)!r}; it must be {right}"
                )

    def rows_per_call(self, world_size: int) -> int:
        """Rows of one forward pass on one process.

        Raises:
            ConfigError: the batch cannot be divided evenly.
        """
        parts = world_size * self.gradient_accumulation
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be divided among {world_size} processes x "
                f"{self.gradient_accumulation} accumulation steps; give a multiple of {parts}"
            )
        return self.batch_size // parts

    @property
    def save_interval(self) -> int:
        """Steps between resumable states."""
        return self.save_steps or max(20, -(-self.steps // 10))

    def key(self) -> str:
        """Hash of everything that changes the trained weights."""
        values = asdict(self)
        for name in ("eval_steps", "save_steps", "log_steps"):
            values.pop(name)
        return content_hash(values)
