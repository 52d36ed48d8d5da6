"""`core:replay`: a model that gives recorded answers, from a file or from an earlier run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.builtin.columns import Columns, Field
from tenfold.builtin.paths import find_files
from tenfold.builtin.row_sources import JsonLines
from tenfold.builtin.run_samples import RunSamples
from tenfold.capabilities import Prompt
from tenfold.errors import ConfigError
from tenfold.records import Completion, GenerationConfig, SampleRecord
from tenfold.seeds import content_hash

_COLUMNS = Columns(
    "sample", (Field("prompt", "prompt", messages=True), Field("completion", "completion"))
)
_COMPARED = 500
"""Longer prompts are compared by their beginnings when the nearest is looked for."""


class Replay:
    """Answers each prompt as it was answered before, whatever the settings are.

    Several recorded answers to one prompt are its samples, in the order of the record.

    Args:
        path: JSON Lines with `prompt` (text or messages) and `completion`; also read are
            `completion_ids`, `logprobs`, `finish_reason` and `stats`.
        run: or a run of core:generate (folder, id or name).
        role: only what this role of the run wrote.

    Raises:
        ConfigError: not exactly one of `path` and `run`, or a bad line.
    """

    def __init__(
        self, path: str | Path | None = None, run: str | None = None, role: str = ""
    ) -> None:
        if (path is None) == (run is None):
            raise ConfigError("core:replay needs either path or run, exactly one of them")
        self.source = str(path or run)
        self._answers: dict[str, list[Completion]] = {}
        recorded = _from_run(str(run), role) if path is None else _from_file(path)
        for prompt, completion in recorded:
            self._answers.setdefault(_key(prompt), []).append(completion)

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """The recorded completions of each prompt.

        Raises:
            ConfigError: a prompt that was not recorded (the nearest is named), or more samples
                than were.
        """
        return [self._answer(prompt, config) for prompt in prompts]

    def fingerprint(self) -> str:
        """Hash of all prompts and answers."""
        rows = [
            [key, [[c.text, c.token_ids, c.finish_reason] for c in answers]]
            for key, answers in sorted(self._answers.items())
        ]
        return content_hash(["replay", rows])

    def _answer(self, prompt: Prompt, config: GenerationConfig) -> list[Completion]:
        key = _key(prompt)
        answers = self._answers.get(key)
        if answers is None:
            raise ConfigError(
                f"{self.source} has no answer to the prompt {_short(key)}{self._nearest(key)}"
            )
        if len(answers) == 1 and config.temperature == 0:
            return answers * config.n
        if len(answers) < config.n:
            raise ConfigError(
                f"{self.source} has {len(answers)} answers to the prompt {_short(key)}, "
                f"not n = {config.n}"
            )
        return answers[: config.n]

    def _nearest(self, key: str) -> str:
        starts: dict[str, str] = {}
        for known in self._answers:
            starts.setdefault(known[:_COMPARED], known)
        found = difflib.get_close_matches(key[:_COMPARED], starts, n=1, cutoff=0.3)
        return f"; the nearest recorded one is {_short(starts[found[0]])}" if found else ""


def _from_run(run: str, role: str) -> Iterator[tuple[Prompt, Completion]]:
    for record in RunSamples(run, role).load():
        ids = list(record.completion_ids or ())
        reason = record.finish_reason or "eos"
        yield record.prompt, Completion(record.completion, ids, None, reason, record.stats)


def _from_file(path: str | Path) -> Iterator[tuple[Prompt, Completion]]:
    source = JsonLines(find_files(path, "**/*.jsonl"))
    for place, row in source.rows():
        record = _COLUMNS.record(row, source.where(place)).record
        assert isinstance(record, SampleRecord)
        more: Mapping[str, Any] = record.metadata
        yield (
            record.prompt,
            Completion(
                record.completion,
                list(more.get("completion_ids") or ()),
                more.get("logprobs"),
                str(more.get("finish_reason") or "eos"),
                more.get("stats") or {},
            ),
        )


def _key(prompt: Prompt) -> str:
    """Text stands for itself; messages and ids for their JSON."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([dict(p) if isinstance(p, Mapping) else p for p in prompt], sort_keys=True)


def _short(text: str) -> str:
    shown = text if len(text) <= 120 else f"{text[:60]} … {text[-50:]}"
    return repr(shown)
