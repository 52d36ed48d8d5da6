"""`treeflash:benchmark`: prompts of the five benchmarks that block efficiencies are reported on.

Rows come from your own copy (JSON Lines, Parquet, or a folder of `Dataset.save_to_disk`), or from
the cache of Hugging Face `datasets`. Nothing is shipped. The choice of samples is that of the
published benchmark: `Random(42).sample` over all row numbers, sorted.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.builtin.paths import FileSet, find_files
from tenfold.builtin.row_sources import JsonLines
from tenfold.builtin.selection import Selection, shuffle
from tenfold.errors import ComponentError, ConfigError, nearest
from tenfold.records import GenerationConfig, Message, PromptRecord
from tenfold.seeds import content_hash

VERSION = 1
Row = Mapping[str, Any]

_REASON = "\n\nReason step by step, and put the final answer in \\boxed{}."
_SOLVE = "Complete this function so that it passes its tests.\n\n"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark lies, and how its rows are read.

    Attributes:
        source: repository, configuration and split in Hugging Face `datasets`.
        ids: columns that may hold the id, the first there is counts; without one, the row number.
        questions: columns that may hold the question, or its turns.
        references: columns that may hold a solution.
        ask: from the question to what the user says.
    """

    source: tuple[str, str | None, str]
    ids: tuple[str, ...]
    questions: tuple[str, ...]
    references: tuple[str, ...]
    ask: Callable[[str], str]


def _reason(question: str) -> str:
    return question + _REASON


def _solve(prompt: str) -> str:
    return f"{_SOLVE}```python\n{prompt}\n```"


def _as_is(text: str) -> str:
    return text


BENCHMARKS = {
    "gsm8k": Benchmark(
        ("openai/gsm8k", "main", "test"), (), ("question",), ("answer",), _reason
    ),
    "math500": Benchmark(
        ("HuggingFaceH4/MATH-500", None, "test"), ("unique_id",), ("problem",),
        ("solution", "answer"), _reason,
    ),
    "humaneval": Benchmark(
        ("openai/openai_humaneval", None, "test"), ("task_id",), ("prompt",),
        ("canonical_solution",), _solve,
    ),
    "mbpp": Benchmark(
        ("google-research-datasets/mbpp", "sanitized", "test"), ("task_id",), ("prompt", "text"),
        ("code",), _as_is,
    ),
    "mt-bench": Benchmark(
        ("HuggingFaceH4/mt_bench_prompts", None, "train"), ("prompt_id", "question_id"),
        ("turns", "prompt"), (), _as_is,
    ),
}  # fmt: skip


class BenchmarkPrompts:
    """Prompt records of one benchmark, in the order of its rows; prompts are chat messages.

    Args:
        name: one of `BENCHMARKS`.
        path: JSON Lines or Parquet file, or a folder of `save_to_disk`; None reads what
            `datasets` has in its cache (or fetches it, when `offline` is False).
        n_samples: how many rows; None takes all.
        sample_seed: of the choice.
        suffix: put behind every question, such as ` /no_think`.
        model: answers first turns, so that the second ones can be asked too (MT-Bench); None
            asks first turns only, the others stand in the metadata `turns`.
        answer_tokens: most tokens of such an answer (written greedily).
        offline: never ask the hub.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: an unknown name, no such file, or a row without a question.
        ComponentError: a library that reads the format is not installed.
    """

    kind = "prompt"

    def __init__(
        self,
        name: str,
        path: str | None = None,
        n_samples: int | None = 64,
        sample_seed: int = 42,
        suffix: str = "",
        model: Any = None,
        answer_tokens: int = 2048,
        offline: bool | None = True,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if name not in BENCHMARKS:
            raise ConfigError(
                f"no benchmark {name!r}{nearest(name, BENCHMARKS)} (known: {', '.join(BENCHMARKS)})"
            )
        self.name, self.benchmark = name, BENCHMARKS[name]
        self.path = None if path is None else Path(path).expanduser()
        self.n_samples, self.sample_seed, self.suffix = n_samples, sample_seed, suffix
        self.model, self.answer_tokens = model, answer_tokens
        self.offline = offline is None or offline
        self._selection = Selection(limit, shuffle_seed)
        if self.path is not None and not self.path.exists():
            raise ConfigError(
                f"{self.path} does not exist; give a JSON Lines or Parquet file of {name}, or a "
                "folder that `Dataset.save_to_disk` wrote"
            )

    def splits(self) -> Sequence[str]:
        """One."""
        return ("test",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[PromptRecord]:
        """Records by row, or shuffled; with a model, every second turn behind its first.

        Raises:
            ConfigError: no such split, or a row without a question.
        """
        if split not in ("", *self.splits()):
            raise ConfigError(f"no split {split!r} (splits: test)")
        records = list(self._records)
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffle(records, seed)
        turns = (turn for record in records for turn in self._turns(record))
        return islice(turns, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the chosen prompts and of what answers first turns."""
        rows = [record.to_json() for record in self._records]
        own = getattr(self.model, "fingerprint", None)
        writer = own() if callable(own) else type(self.model).__qualname__
        answers = [] if self.model is None else [writer, self.answer_tokens]
        selection = [self._selection.limit, self._selection.shuffle_seed]
        return content_hash(["benchmark", VERSION, self.name, rows, answers, selection])

    @cached_property
    def _records(self) -> list[PromptRecord]:
        """The chosen rows' first turns."""
        rows = self._rows()
        if not rows:
            raise ConfigError(f"{self.path or self.benchmark.source[0]} holds no row")
        return [self._record(rows[i], i) for i in sample(len(rows), self.n_samples,
                                                         self.sample_seed)]  # fmt: skip

    def _record(self, row: Row, number: int) -> PromptRecord:
        benchmark = self.benchmark
        where = f"{self.name}, row {number + 1}"
        question = _first(row, benchmark.questions)
        turns = [question] if isinstance(question, str) else question
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise ConfigError(
                f"{where}: needs a text in the column {' or '.join(benchmark.questions)} "
                f"(columns here: {', '.join(row) or 'none'}); is it a file of {self.name}?"
            )
        said = [benchmark.ask(turn) + self.suffix for turn in turns]
        own = _first(row, benchmark.ids)
        reference = _first(row, benchmark.references)
        return PromptRecord(
            id=f"{self.name}:{number if own is None else own}",
            prompt=[{"role": "user", "content": said[0]}],
            reference=reference if isinstance(reference, str) else None,
            metadata={"benchmark": self.name, "row": number, "turns": said},
        )

    def _turns(self, record: PromptRecord) -> Iterator[PromptRecord]:
        """A record, and with a model its later turns."""
        yield record
        if self.model is None:
            return
        said: list[Message] = [dict(m) for m in record.prompt if isinstance(m, Mapping)]
        config = GenerationConfig(max_new_tokens=self.answer_tokens, seed=0)
        for number, turn in enumerate(record.metadata["turns"][1:], start=2):
            [[answer]] = self.model.generate([said], config)
            said = [*said, {"role": "assistant", "content": answer.text},
                    {"role": "user", "content": turn}]  # fmt: skip
            yield PromptRecord(
                id=f"{record.id}#{number}", prompt=list(said), reference=None,
                metadata=record.metadata,
            )  # fmt: skip

    def _rows(self) -> Sequence[Row]:
        if self.path is None:
            return _from_hub(self.benchmark.source, offline=self.offline, name=self.name)
        if self.path.is_dir() and (self.path / "dataset_info.json").is_file():
            return _datasets().load_from_disk(str(self.path))
        files = find_files(self.path, "**/*.jsonl")
        if all(path.suffix == ".parquet" for path in files.paths):
            return _parquet(files)
        return [row for _, row in JsonLines(files).rows()]


def sample(count: int, wanted: int | None, seed: int) -> list[int]:
    """The published choice: `wanted` of `count` row numbers, ascending; all where there are not
    more."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))


def _first(row: Row, columns: Sequence[str]) -> Any:
    return next((row[name] for name in columns if row.get(name) is not None), None)


def _parquet(files: FileSet) -> list[Row]:
    try:
        module: Any = importlib.import_module("tenfold.builtin.parquet")
    except ImportError as error:
        raise ComponentError(
            "Parquet files need the module 'pyarrow', which is not installed",
            hint='pip install "tenfold[parquet]"',
        ) from error
    return [row for _, row in module.Parquet(files).rows()]


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ComponentError(
            "the module 'datasets' is not installed",
            hint='pip install "tenfold-treeflash[datasets]", or set path to a JSON Lines file',
        ) from error


def _from_hub(source: tuple[str, str | None, str], *, offline: bool, name: str) -> Any:
    """Rows through Hugging Face `datasets`."""
    repository, configuration, split = source
    library = _datasets()
    if offline:
        # Read at import time, so setting the environment variable now would be too late.
        library.config.HF_HUB_OFFLINE = True
    try:
        return library.load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"cannot read {repository} by `datasets`: {str(error).splitlines()[0]}",
            hint=f"set path to your own copy of {name}"
            + ("; or offline = false to fetch it" if offline else ""),
        ) from error
