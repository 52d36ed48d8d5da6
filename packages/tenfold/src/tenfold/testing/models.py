"""Laws of models whose outputs are text: `generate`, `tokenize`, `constrain`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tenfold.capabilities import CAPABILITIES, supports
from tenfold.errors import TenfoldError
from tenfold.records import Completion, GenerationConfig
from tenfold.testing.findings import NotApplicableError, WeaknessError, require

PROMPTS = (
    "def add(a, b):",
    "The quick brown fox",
    "x = [1, 2, 3]\nfor i in x:\n    print(",
    "naïve café, 日本語のテキスト",
    "שלום 👩‍👩‍👧 e\u0301",
)
"""Prompts of different lengths and scripts."""

GREEDY = GenerationConfig(max_new_tokens=8, chat=False)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.9, top_p=0.95, n=2, seed=7, chat=False)


def has_its_members(model: Any, provides: Sequence[str]) -> None:
    """The object has every member of every capability it claims."""
    for name in provides:
        missing = [m for m in CAPABILITIES[name].members if not hasattr(model, m)]
        require(supports(model, name), f"{name}: no {', '.join(missing)}")


def generates_nothing_from_nothing(model: Any) -> None:
    """An empty batch gives an empty list."""
    answer = model.generate([], GREEDY)
    require(answer == [], f"an empty batch gave {answer!r}")


def generates_n_per_prompt(model: Any) -> None:
    """One list per prompt, `n` completions each, within `max_new_tokens`."""
    for config in (GREEDY, SAMPLED):
        rows = _generate(model, PROMPTS, config)
        require(len(rows) == len(PROMPTS), f"{len(rows)} lists for {len(PROMPTS)} prompts")
        for row in rows:
            require(len(row) == config.n, f"{len(row)} completions with n={config.n}")
            for completion in row:
                require(isinstance(completion, Completion), f"gave {type(completion).__name__}")
                count = len(completion.token_ids)
                require(count <= config.max_new_tokens, f"{count} tokens, beyond the limit")


def generation_ignores_batch_neighbours(model: Any) -> None:
    """The same prompt gives the same completions alone, in a batch and in another order."""
    for config in (GREEDY, SAMPLED):
        together = _texts(_generate(model, PROMPTS, config))
        backwards = _texts(_generate(model, PROMPTS[::-1], config))[::-1]
        alone = [_texts(_generate(model, [prompt], config))[0] for prompt in PROMPTS]
        for prompt, first, second, third in zip(PROMPTS, together, backwards, alone, strict=True):
            how = "greedy" if config is GREEDY else "sampled"
            require(first == second, f"{how}: batch order changes {prompt!r}: {first} / {second}")
            require(first == third, f"{how}: alone {prompt!r} gives {third}, in a batch {first}")


def generation_repeats_under_a_seed(model: Any) -> None:
    """Equal calls give equal completions, with a seed and without one."""
    unseeded = GenerationConfig(max_new_tokens=8, temperature=0.9, chat=False)
    for config in (GREEDY, SAMPLED, unseeded):
        first = _texts(_generate(model, PROMPTS[:2], config))
        second = _texts(_generate(model, PROMPTS[:2], config))
        require(first == second, f"seed {config.seed}: {first} and then {second}")


def _generate(
    model: Any, prompts: Sequence[str], config: GenerationConfig
) -> list[list[Completion]]:
    """Completions; a model may refuse prompts or sampling, with a clear error."""
    try:
        return model.generate(list(prompts), config)
    except TenfoldError as error:
        what = "sampling" if config.temperature else "these prompts"
        raise NotApplicableError(f"refuses {what}: {error}") from error


def _texts(rows: list[list[Completion]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(c.text, tuple(c.token_ids)) for c in row] for row in rows]


def tokens_read_back(model: Any) -> None:
    """`decode(encode(text))` is the text: exactly for ASCII, else a warning."""
    require(model.decode(model.encode(PROMPTS[0])) == PROMPTS[0], "ASCII text does not read back")
    require(list(model.encode("")) == [], f"an empty text has tokens {model.encode('')}")
    require(model.decode([]) == "", "no tokens decode to some text")
    for text in PROMPTS:
        back = model.decode(model.encode(text))
        if back != text:
            raise WeaknessError(f"{text!r} reads back as {back!r}")


def vocabulary_is_sound(model: Any) -> None:
    """Ids are below the vocabulary's size, and its hash is stable."""
    size = model.vocabulary_size
    ids = [i for text in PROMPTS for i in model.encode(text)]
    special = [i for i in (model.pad_id, model.eos_id) if i is not None]
    worst = max([*ids, *special], default=0)
    require(0 <= worst < size, f"id {worst} with a vocabulary of {size}")
    require(model.vocabulary_hash == model.vocabulary_hash, "the vocabulary hash changes")
    require(model.context_length >= 1, f"context length {model.context_length}")


def chat_is_rendered(model: Any) -> None:
    """Messages become text that holds what was said."""
    said = "What is the answer?"
    text = model.render_chat([{"role": "user", "content": said}])
    require(said in text, f"the rendered chat lost the message: {text!r}")


def constraints_hold(model: Any) -> None:
    """Finished completions satisfy the constraint, for each kind the model claims."""
    kinds = model.constraint_kinds
    require(bool(kinds), "claims no kind of constraint")
    unknown = set(kinds) - {"json_schema", "regex", "choice"}
    require(not unknown, f"unknown kinds {sorted(unknown)}")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    checks = {
        "choice": (["left", "right"], lambda text: text in ("left", "right")),
        "regex": ("[0-9]{3}", lambda text: re.fullmatch("[0-9]{3}", text)),
        "json_schema": (schema, lambda text: set(json.loads(text)) == {"n"}),
    }
    for kind in sorted(kinds):
        value, holds = checks[kind]
        config = GenerationConfig(max_new_tokens=48, constraint={kind: value}, chat=False)
        for row in model.generate(list(PROMPTS[:2]), config):
            finished = row[0].finish_reason != "length"
            require(not finished or bool(holds(row[0].text)), f"{kind}: wrote {row[0].text!r}")


GENERATE_LAWS = (
    generates_nothing_from_nothing,
    generates_n_per_prompt,
    generation_ignores_batch_neighbours,
    generation_repeats_under_a_seed,
)
TOKENIZE_LAWS = (tokens_read_back, vocabulary_is_sound, chat_is_rendered)
CONSTRAIN_LAWS = (constraints_hold,)
