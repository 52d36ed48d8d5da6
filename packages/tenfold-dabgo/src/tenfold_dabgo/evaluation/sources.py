"""Scores of several methods for the same queries and corpus, each method by name.

    dabgo              a method of `settings.METHODS`, with the run's settings
    dabgo/abs          one of its views: signed, abs, ascent, descent
    dabgo/paper        with another preset, ranked as that preset does
    bm25/characters    BM25 over characters, for texts that are no words
    run:NAME           what an earlier run of dabgo:attribution recorded

Scores are `[N]` per query, larger means more influential, NaN where a sample has none.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.errors import ConfigError, RunFailed, nearest
from tenfold.seeds import content_hash

from tenfold_dabgo.attributor import Attributor, Progress, no_progress
from tenfold_dabgo.baselines.bm25 import Bm25Attributor
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.methods import make_attributor
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult, unpacked_ids
from tenfold_dabgo.settings import METHODS, PRESETS, AttributionSettings
from tenfold_dabgo.views import VIEWS

RUN_PREFIX = "run:"
CHARACTERS = "characters"
MODEL_FREE = ("bm25", "random")
"""Methods whose scores do not depend on the model's weights."""


@dataclass(frozen=True, slots=True)
class Source:
    """One method name, taken apart: `label` is the name as given; `view` and `preset` are empty
    where the run's own count; `run` is set for recorded scores."""

    label: str
    method: str = ""
    view: str = ""
    preset: str = ""
    run: str = ""
    characters: bool = False

    @property
    def engine(self) -> tuple[str, str, bool]:
        """Sources with equal engines share one attributor."""
        return self.method, self.preset, self.characters

    @property
    def uses_model(self) -> bool:
        """Whether other weights would give other scores."""
        return not self.run and self.method not in MODEL_FREE


def parse_source(name: str) -> Source:
    """A method's name.

    Raises:
        ConfigError: unknown method or variant.
    """
    if name.startswith(RUN_PREFIX):
        if not name[len(RUN_PREFIX) :]:
            raise ConfigError(f"methods holds {name!r}; write run:<name or folder of a run>")
        return Source(name, run=name[len(RUN_PREFIX) :])
    method, slash, variant = name.partition("/")
    if method not in METHODS:
        raise ConfigError(
            f"methods holds {name!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}, "
            "and run:<name> for the scores of an earlier dabgo:attribution run"
        )
    if not slash:
        return Source(name, method)
    if method == "bm25" and variant == CHARACTERS:
        return Source(name, method, characters=True)
    if method == "dabgo" and variant in PRESETS:
        return Source(name, method, preset=variant)
    if variant in (VIEWS if method == "dabgo" else VIEWS[:2]):
        return Source(name, method, view=variant)
    raise ConfigError(
        f"methods holds {name!r}: {variant!r} is no variant of {method} (dabgo has "
        f"{', '.join((*VIEWS, *PRESETS))}; bm25 has {CHARACTERS}; all have signed and abs)"
    )


def parse_sources(names: Sequence[str]) -> list[Source]:
    """Several names, checked.

    Raises:
        ConfigError: none, one twice, or an unknown one.
    """
    if not names:
        raise ConfigError("methods is empty: name at least one, for instance dabgo")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(f"methods holds {twice[0]!r} twice")
    return [parse_source(name) for name in names]


@dataclass
class Scorer:
    """Scores queries with several methods; each method is built on first use and kept.

    Attributes:
        model: offers `grad` and `tokenize`.
        dataset: the corpus.
        settings: of the methods.
        sources: what to score with.
        cache: folder of the Fisher cache.
        work: folder for what an interrupted pass leaves; None keeps nothing.
        model_hash: the model's fingerprint.
        progress: progress bars.
    """

    model: Any
    dataset: TokenDataset
    settings: AttributionSettings
    sources: Sequence[Source]
    cache: Path
    work: Path | None = None
    model_hash: str = ""
    progress: Progress = no_progress
    _engines: dict[tuple[str, str, bool], Attributor] = field(default_factory=dict, init=False)
    _runs: dict[str, RecordedScores] = field(default_factory=dict, init=False)

    def scores(self, query: Query) -> dict[str, np.ndarray]:
        """Label → `[N]` scores of one query.

        Queries are scored one at a time, so that scores never depend on their neighbours.

        Raises:
            RunFailed: a method fails on this query, or a recorded run lacks it.
        """
        results: dict[tuple[str, str, bool], AttributionResult] = {}
        out = {}
        for source in self.sources:
            if source.run:
                out[source.label] = self._run(source.run).scores(query.id)
                continue
            if source.engine not in results:
                engine = self.engine(source)
                results[source.engine] = next(iter(engine.attribute([query])))
            out[source.label] = results[source.engine].scores(self._view(source))
        return out

    def prepare(self) -> None:
        """Builds all methods and opens all runs, so that errors come early."""
        for source in self.sources:
            if source.run:
                self._run(source.run)
            else:
                self.engine(source)

    def _run(self, name: str) -> RecordedScores:
        if name not in self._runs:
            self._runs[name] = RecordedScores.open(name, self.dataset)
        return self._runs[name]

    def _settings(self, source: Source) -> AttributionSettings:
        one_sided = {s.view for s in self.sources if s.engine == source.engine}
        needed = self.settings.base_losses or bool(one_sided & {"ascent", "descent"})
        settings = replace(self.settings, view=None, base_losses=needed, method=source.method)
        return replace(settings, preset=source.preset) if source.preset else settings

    def _view(self, source: Source) -> str:
        if source.view:
            return source.view
        return self._settings(source).resolved_view if source.method == "dabgo" else "signed"

    def engine(self, source: Source) -> Attributor:
        """The method behind a name.

        Raises:
            ConfigError: the name stands for recorded scores.
        """
        if source.run:
            raise ConfigError(f"{source.label} is a record of scores, no method to ask")
        if source.engine not in self._engines:
            if source.characters:
                self._engines[source.engine] = Bm25Attributor(self.model, self.dataset, split=list)
            else:
                self._engines[source.engine] = make_attributor(
                    source.method,
                    self.model,
                    self.dataset,
                    self._settings(source),
                    cache=self.cache,
                    work=self.work and self.work / content_hash(source.engine),
                    model_hash=self.model_hash,
                    progress=self.progress,
                )
        return self._engines[source.engine]


@dataclass(frozen=True)
class RecordedScores:
    """The scores that a run of `dabgo:attribution` left beside its items.

    Attributes:
        run: its name.
        files: query id → score file.
        dataset: the corpus they must belong to.
    """

    run: str
    files: Mapping[str, Path]
    dataset: TokenDataset

    @classmethod
    def open(cls, name: str, dataset: TokenDataset) -> RecordedScores:
        """A run by folder, id or name (then the newest that finished).

        Raises:
            ConfigError: there is none, or it recorded no scores.
        """
        files = score_files(name)
        return cls(name, files, dataset)

    def scores(self, query_id: str) -> np.ndarray:
        """`[N]` signed scores of one query.

        Raises:
            RunFailed: the run lacks the query, or scored another corpus.
        """
        if query_id not in self.files:
            raise RunFailed(
                f"run {self.run} has no scores for query {query_id!r}"
                f"{nearest(query_id, self.files)}"
            )
        ids, values = read_scores(self.files[query_id])
        if ids != self.dataset.sample_ids:
            raise RunFailed(
                f"run {self.run} scored another corpus ({len(ids)} samples, here "
                f"{len(self.dataset)}): its sample ids differ"
            )
        return values


def score_files(name: str) -> dict[str, Path]:
    """Query id → score file of a run of `dabgo:attribution`, by folder, id or name (then the
    newest that finished).

    Raises:
        ConfigError: there is none, or it recorded no scores.
    """
    from tenfold.builtin.run_samples import finished_run

    store = finished_run(name)
    files = {
        line.id: store.path / "artifacts" / str(line.values["artifact"])
        for line in store.ordered_lines()
        if "artifact" in line.values
    }
    if not files:
        raise ConfigError(
            f"run {store.path} recorded no scores", hint="name a run of dabgo:attribution"
        )
    return files


def read_scores(path: Path) -> tuple[list[str], np.ndarray]:
    """Sample ids and signed scores `[N]` of one query.

    Raises:
        RunFailed: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return unpacked_ids(arrays), arrays["score"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunFailed(f"cannot read the scores in {path}: {error}") from error
