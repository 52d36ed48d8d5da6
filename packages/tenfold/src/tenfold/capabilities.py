"""What models can do, as named protocols; and the protocols of the other component kinds.

Models are plain objects. A model *provides* capabilities by name in its description; the host
plans with those names and checks the methods after building (`supports`). Shapes: `B` batch,
`T` time, `V` vocabulary, `H` hidden, `K` exits. Log-probabilities and losses are in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tenfold.records import (
    AudioRecord,
    Checkpoint,
    Completion,
    GenerationConfig,
    GraphRecord,
    ItemResult,
    Message,
    Metrics,
    Record,
    TokenScores,
    WorkItem,
    WorkItems,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Prompt = str | Sequence[Message] | Sequence[int]
"""A prompt: text, chat messages, or token ids."""


# --- Tensors that travel between host, models and evaluators -------------------------------


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A padded batch of token sequences.

    Attributes:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 1 for real tokens, 0 for padding (either side).
        loss_mask: `[B, T]`, 1 where a token is *scored*; None scores every real token that
            has a real token before it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Residual-stream states; layer 0 is the embedding, layer `i` the output of block `i`."""

    layers: tuple[int, ...]
    states: tuple[Tensor, ...]
    """One `[B, T, H]` tensor per requested layer."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of extending a session: `logits [B, T, V]` for the new positions, `hidden
    [B, T, H]` (last layer, before the head), and the cache length per row after the step."""

    logits: Tensor
    hidden: Tensor | None
    cache_length: int


@dataclass(frozen=True, slots=True)
class ExitScores:
    """Per-exit view of a batch's target tokens.

    `log_weights [B, T, K]` are log mixture weights and `log_probs [B, T, K]` each exit's
    log-probability of the target token, aligned like `token_loss` (entry t speaks of token t);
    `depths` are the exits' normalised depths in (0, 1].
    """

    log_weights: Tensor
    log_probs: Tensor
    depths: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainStats:
    """Outcome of one training step."""

    loss: float
    values: Mapping[str, float] = field(default_factory=dict)


# --- Capabilities --------------------------------------------------------------------------


@runtime_checkable
class Generates(Protocol):
    """`generate`: text from prompts."""

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """For each prompt its `config.n` completions.

        A function of (weights, prompt, config, seed), never of batch neighbours.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """`score`: log-probabilities of given continuations."""

    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[TokenScores]:
        """For each (context, continuation) the continuation's token log-probabilities."""
        ...


@runtime_checkable
class TokenLoss(Protocol):
    """`loss`: differentiable per-token negative log-likelihood."""

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """`[B, T]` nats; entry t is `-log p(x_t | x_<t)`, 0 where not scored."""
        ...


@runtime_checkable
class Grad(TokenLoss, Protocol):
    """`grad`: access to the weights, with bit-exact restore."""

    def module(self) -> torch.nn.Module:
        """The module that `token_loss` differentiates through."""
        ...

    def snapshot(self) -> Any:
        """A token holding a copy of the weights."""
        ...

    def restore(self, token: Any) -> None:
        """Puts the weights of `token` back, bit for bit, in place."""
        ...


@runtime_checkable
class Hidden(Protocol):
    """`hidden`: residual-stream states."""

    def hidden_states(self, batch: TokenBatch, layers: Sequence[int]) -> HiddenStates:
        """States of the given layers (negative numbers count from the end)."""
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """`tokenize`: the model's own tokenizer."""

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id."""
        ...

    @property
    def pad_id(self) -> int:
        """Padding id (may equal `eos_id`: mask by length, never by id)."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the model's output, V."""
        ...

    @property
    def vocabulary_hash(self) -> str:
        """Content hash of the vocabulary; equal hashes mean equal ids."""
        ...

    @property
    def context_length(self) -> int:
        """Longest sequence the model accepts, in tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Messages as the model's chat template writes them, ready for an answer; without a
        template, `role: content` lines."""
        ...


class Session(Protocol):
    """A running forward computation with its cache; `B` rows advance together."""

    def extend(
        self, tokens: Tensor, positions: Tensor | None = None, attention: Tensor | None = None
    ) -> StepOutput:
        """Runs `tokens [B, T]`. `positions [B, T]` default to the next ones; `attention
        [B, T, cache + T]` (bool, True = may look) defaults to causal."""
        ...

    def truncate(self, length: int) -> None:
        """Keeps the first `length` cached positions."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Replaces the batch by these rows (repeats and omissions allowed)."""
        ...

    def fork(self) -> Session:
        """An independent copy."""
        ...

    def keep(self, indices: Sequence[int]) -> None:
        """Keeps only these cached positions, in this order (tree decoding)."""
        ...


@runtime_checkable
class Steps(Protocol):
    """`step`: token-by-token control over the cache."""

    def start(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Session, StepOutput]:
        """Runs a (left-padded) prompt `[B, T]`; the session and the prompt's output."""
        ...


@runtime_checkable
class Exits(Protocol):
    """`exits`: mixtures of prediction heads at several depths."""

    def exit_scores(self, batch: TokenBatch) -> ExitScores:
        """Mixture weights and per-exit log-probabilities of the target tokens."""
        ...


@runtime_checkable
class Constrains(Protocol):
    """`constrain`: `generate` honours `GenerationConfig.constraint`."""

    @property
    def constraint_kinds(self) -> frozenset[str]:
        """Subset of `{"json_schema", "regex", "choice"}`."""
        ...


@runtime_checkable
class Transcribes(Protocol):
    """`transcribe`: speech to text with time stamps."""

    def transcribe(self, records: Sequence[AudioRecord]) -> list[Completion]:
        """One completion per record; `stats["words"]` is `[[word, start_s, end_s], ...]`."""
        ...


@runtime_checkable
class GraphForward(Protocol):
    """`graph`: outputs for a batch of graphs."""

    def graph_outputs(self, records: Sequence[GraphRecord]) -> list[Mapping[str, Any]]:
        """Per graph a mapping with any of `node`, `edge`, `graph` outputs."""
        ...


@runtime_checkable
class Trains(Protocol):
    """`train`: one optimiser step at a time."""

    def step(self, batch: Any) -> TrainStats:
        """Forward, backward, update."""
        ...


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability's name, what it means, and the members an object needs for it."""

    name: str
    meaning: str
    members: tuple[str, ...]


CAPABILITIES: dict[str, Capability] = {
    c.name: c
    for c in (
        Capability("generate", "text from prompts", ("generate",)),
        Capability("score", "log-probabilities of given continuations", ("score",)),
        Capability("loss", "differentiable per-token loss", ("token_loss",)),
        Capability(
            "grad", "weights, snapshot, restore", ("token_loss", "module", "snapshot", "restore")
        ),
        Capability("hidden", "residual-stream states", ("hidden_states",)),
        Capability(
            "tokenize",
            "the model's tokenizer",
            (
                "encode",
                "decode",
                "render_chat",
                "eos_id",
                "pad_id",
                "vocabulary_size",
                "vocabulary_hash",
                "context_length",
            ),
        ),
        Capability("step", "token-by-token control over the cache", ("start",)),
        Capability("exits", "mixture of prediction heads", ("exit_scores",)),
        Capability("constrain", "constrained generation", ("generate", "constraint_kinds")),
        Capability("transcribe", "speech to text", ("transcribe",)),
        Capability("graph", "outputs for graphs", ("graph_outputs",)),
        Capability("train", "one optimiser step at a time", ("step",)),
    )
}

IMPLIED: dict[str, tuple[str, ...]] = {"grad": ("loss",), "constrain": ("generate",)}
"""Capabilities that come with another one."""


def supports(model: object, capability: str) -> bool:
    """Whether an object has every member of a capability.

    `hasattr` rather than `isinstance`: since Python 3.12 the latter does not see attributes
    that a decoder delegates to its base.
    """
    return all(hasattr(model, member) for member in CAPABILITIES[capability].members)


class Delegate:
    """Base class of decoders and adapters: what it does not define comes from `base`."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        # Private and dunder names never delegate: copying and pickling probe for them before
        # `base` exists.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


# --- The other component kinds --------------------------------------------------------------


@runtime_checkable
class Dataset(Protocol):
    """A dataset of records of one kind."""

    kind: str

    def splits(self) -> Sequence[str]:
        """Names of the splits; the first is the default."""
        ...

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterable[Record]:
        """Records in a fixed order, or shuffled by `shuffle_seed`; at most `limit`."""
        ...

    def fingerprint(self, split: str = "") -> str:
        """Content hash: equal fingerprints mean equal records in equal order."""
        ...


class ProgressBar(Protocol):
    """A running progress bar."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """`n` more units are done; `fields` are shown beside the bar (loss=2.31)."""
        ...


class Context(Protocol):
    """What the host hands to evaluators and trainers."""

    seed: int
    device: str
    """Resolved: `cpu`, `cuda` or `mps`."""
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    rank: int
    world_size: int
    run_dir: Path
    work_dir: Path
    """Folder that survives an interruption; trainers keep resumable state here."""
    cache_dir: Path
    """Folder shared by all runs, for content-addressed entries; safe to delete."""

    @property
    def artifacts(self) -> Path:
        """Folder for files of this run; written by rank 0, atomically (`tenfold.files`)."""
        ...

    def derive(self, *labels: object) -> int:
        """A seed derived from the run's seed and labels (use item ids, never positions)."""
        ...

    def progress(
        self, label: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[ProgressBar]:
        """A progress bar for a part of the work."""
        ...

    def log(self, event: str, **fields: object) -> None:
        """A line in `events.jsonl`."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Work split into plan, run and aggregate, which gives every evaluator resume, sharding,
    partial results, re-scoring and progress for free. An optional `report(ctx, results,
    metrics)` returns `tenfold.report` blocks for the run's report."""

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Items with stable ids, in a fixed order."""
        ...

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Results for the items, in any order. `items` is already this process's share;
        items that a resumed run has are left out."""
        ...

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Metrics of successful results, which come in plan order, streamed from disk."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """Produces a checkpoint."""

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves under `ctx.work_dir / "checkpoint"`; resumes from what an
        interrupted call left in `ctx.work_dir`. `model` is the run's `model` role or None;
        `data` holds its datasets by role."""
        ...
