"""Records that travel between components: frozen, JSON-able, each with a stable `id`.

Also the small result types of the evaluator and trainer contracts. Nothing here imports a
heavy library; tensors appear only in `tenfold.capabilities`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tenfold.errors import ConfigError, nearest

R = TypeVar("R", bound="Record")
Json = Any
"""A JSON value: None, bool, int, float, str, list or dict with string keys."""

Message = Mapping[str, str]
"""A chat message: `{"role": "user", "content": "..."}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Base of all records. `metadata` holds free JSON-able columns (author, module, ...)."""

    kind: ClassVar[str] = ""

    id: str
    metadata: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """A plain dictionary, with nested records and tuples turned into JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[R], row: Mapping[str, Json]) -> R:
        """The record of a dictionary; unknown keys go to `metadata`.

        Raises:
            ConfigError: a required field is missing.
        """
        names = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: v for k, v in row.items() if k in names}
        extra = {k: v for k, v in row.items() if k not in names}
        if extra:
            values["metadata"] = {**values.get("metadata", {}), **extra}
        for name, spec in names.items():
            missing = spec.default is dataclasses.MISSING and (
                spec.default_factory is dataclasses.MISSING
            )
            if missing and name not in values:
                raise ConfigError(
                    f"{cls.kind} record {row.get('id', '?')!r} has no field {name!r}"
                    f"{nearest(name, extra)} (it has: {', '.join(sorted(row)) or 'nothing'})"
                )
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord(Record):
    """A prompt (plain text, or a list of chat messages) with an optional reference answer."""

    kind: ClassVar[str] = "prompt"

    prompt: str | list[Message]
    reference: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord(Record):
    """A piece of text, such as a training sample."""

    kind: ClassVar[str] = "text"

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord(Record):
    """What a model wrote: prompt and completion, with the exact token ids when known.

    Ids are kept because re-encoding joined text can move token boundaries. `stats` is the
    `Completion.stats` of the generation (exit histogram, accepted lengths, ...).
    """

    kind: ClassVar[str] = "sample"

    prompt: str | list[Message]
    completion: str
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    finish_reason: str = ""
    reference: str | None = None
    stats: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecord(Record):
    """A prompt with a preferred and a rejected answer."""

    kind: ClassVar[str] = "preference"

    prompt: str | list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord(Record):
    """A graph: `nodes` and `edges` with optional attributes per node and edge."""

    kind: ClassVar[str] = "graph"

    nodes: list[int]
    edges: list[tuple[int, int]]
    directed: bool = False
    node_attributes: Mapping[str, list[Json]] = field(default_factory=dict)
    edge_attributes: Mapping[str, list[Json]] = field(default_factory=dict)
    target: Json = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTaskRecord(Record):
    """A few-shot graph task: demonstration pairs, a test input, and its answer."""

    kind: ClassVar[str] = "graph-task"

    demonstrations: list[tuple[Mapping[str, Json], Mapping[str, Json]]]
    query: Mapping[str, Json]
    answer: Mapping[str, Json] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRecord(Record):
    """Speech: a file and a span in seconds, with its transcript when known."""

    kind: ClassVar[str] = "audio"

    path: str
    sample_rate: int
    start: float = 0.0
    duration: float | None = None
    transcript: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GameRecord(Record):
    """Settings of one game to be played."""

    kind: ClassVar[str] = "game"

    settings: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord(Record):
    """A problem and the reasoning trace that a model wrote for it."""

    kind: ClassVar[str] = "trace"

    problem: str
    trace: str
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRecord(Record):
    """A respondent's profile, a question with its options, and the answer given."""

    kind: ClassVar[str] = "survey"

    profile: Mapping[str, Json]
    question: str
    options: list[str]
    answer: str | None = None


RECORD_KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        PromptRecord,
        TextRecord,
        SampleRecord,
        PreferenceRecord,
        GraphRecord,
        GraphTaskRecord,
        AudioRecord,
        GameRecord,
        TraceRecord,
        SurveyRecord,
    )
}
"""Record kind → class; a dataset's `provides` names one of these."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How to generate. Temperature 0 is greedy.

    `seed=None` lets the model derive a seed from the prompt, so that equal calls still give
    equal text. `seeds`, one per prompt, takes its place where prompts of one call must be drawn
    independently even if they are equal. `logprobs=k` asks for the chosen token's
    log-probability (k = 1). `constraint` is `{"json_schema": {...}}`, `{"regex": "..."}` or
    `{"choice": [...]}`; only models with the `constrain` capability accept one. `chat=True`
    applies the chat template to message lists (and, where a template exists, leaves plain
    strings as they are).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    logprobs: int = 0
    constraint: Mapping[str, Json] | None = None
    chat: bool = True
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values out of range."""
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens),
            (self.temperature >= 0, "temperature", "0 (greedy) or more", self.temperature),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p),
            (self.top_k is None or self.top_k >= 1, "top_k", "None or at least 1", self.top_k),
            (self.n >= 1, "n", "at least 1", self.n),
        )
        for ok, name, right, value in checks:
            if not ok:
                raise ConfigError(f"generation setting {name!r} is {value!r}; it must be {right}")


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated text. `finish_reason` is `stop`, `eos`, `length` or `error`.

    `token_ids` are the generated tokens (without the prompt); `stats` carries what a decoder
    knows, e.g. `exit_histogram` or `accepted_lengths`, as JSON values.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish_reason: str = "stop"
    stats: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities (nats) of a given continuation's tokens."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return float(sum(self.logprobs))


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One unit of an evaluator's work. `id` is stable across processes and runs; `payload`
    stays in memory and is never written."""

    id: str
    payload: Any = None


@dataclass(frozen=True, slots=True)
class WorkItems:
    """A plan's items: `items` may be a lazy iterable, `total` its length when known."""

    items: Iterable[WorkItem]
    total: int | None = None

    def __iter__(self) -> Iterator[WorkItem]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The result of one item: JSON-able `values`. A set `error` counts the item as failed."""

    id: str
    values: Mapping[str, Json] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One aggregated number. `n` is how many observations it rests on; `interval` is a 95 %
    interval when one is known; `group` names a subset (`language=de`)."""

    name: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    higher_is_better: bool | None = None
    unit: str = ""
    group: str = ""


Metrics = list[Metric]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a trainer produced: a folder with safetensors weights, and its final metrics."""

    path: Path
    metrics: Metrics = field(default_factory=list)
