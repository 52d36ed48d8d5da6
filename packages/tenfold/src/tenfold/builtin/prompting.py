"""What everything that generates shares: settings, prompts from records, batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

from tenfold.errors import CapabilityError, ConfigError, nearest
from tenfold.records import GenerationConfig, Message, PromptRecord, Record, TextRecord

T = TypeVar("T")
R = TypeVar("R", bound=Record)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; reads no further than it must."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def generation_config(
    *,
    seed: int,
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    constraint: Mapping[str, Any] | None = None,
    chat: bool = True,
) -> GenerationConfig:
    """Settings as components receive them, as a `GenerationConfig`.

    Raises:
        ConfigError: a value out of range, or an empty stop text.
    """
    if "" in stop:
        raise ConfigError("stop holds an empty text, which would end every completion at once")
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop),
        n=n,
        seed=seed,
        constraint=constraint,
        chat=chat,
    )


@dataclass(frozen=True, slots=True)
class PromptCut:
    """How a text record becomes a prompt: its beginning, or all of it.

    Raises:
        ConfigError: both ways are given.
    """

    chars: int | None = None
    lines: int | None = None

    def __post_init__(self) -> None:
        if self.chars is not None and self.lines is not None:
            raise ConfigError("prompt_chars and prompt_lines are both set; keep one")

    def apply(self, record: Record) -> tuple[str | list[Message], str | None]:
        """Prompt and reference of a prompt or text record.

        The two parts of a text join to it again; without a rest the reference is None.

        Raises:
            ConfigError: a record of another kind.
        """
        if isinstance(record, PromptRecord):
            return record.prompt, record.reference
        if not isinstance(record, TextRecord):
            raise ConfigError(f"record {record.id!r} is a {record.kind} record, not a prompt")
        text = record.text
        if self.lines is not None:
            kept = text.splitlines(keepends=True)[: self.lines]
            prompt = "".join(kept)
        else:
            prompt = text if self.chars is None else text[: self.chars]
        return prompt, text[len(prompt) :] or None


def prompt_token_ids(
    model: Any, prompt: str | Sequence[Message], chat: bool = True
) -> list[int] | None:
    """The ids a model reads for a prompt, None for models without a tokenizer.

    Models with special tokens before a text say so by a method `prompt_ids(prompt, chat)`.
    """
    if callable(own := getattr(model, "prompt_ids", None)):
        return list(own(prompt, chat))
    if not hasattr(model, "encode"):
        return None
    text = prompt if isinstance(prompt, str) else model.render_chat(prompt)
    return list(model.encode(text))


def require_constraint(model: Any, config: GenerationConfig, role: str) -> None:
    """Checks that a model can follow the configured constraint.

    Raises:
        CapabilityError: it cannot, or not this kind.
    """
    if config.constraint is None:
        return
    kinds = getattr(model, "constraint_kinds", frozenset())
    missing = sorted(set(config.constraint) - set(kinds))
    if missing:
        can = ", ".join(sorted(kinds)) or "none"
        raise CapabilityError(
            f"the model {role!r} cannot follow a {missing[0]} constraint (kinds it follows: {can})",
            hint="choose a model with the capability 'constrain', or leave the constraint out",
        )


def require_column(records: Iterable[R], column: str) -> Iterator[R]:
    """The records, after a look at the first one's metadata; an empty `column` asks for nothing.

    Raises:
        ConfigError: the first record has no such column.
    """
    remaining = iter(records)
    first = next(remaining, None)
    if first is None:
        return iter(())
    if column and column not in first.metadata:
        known = ", ".join(first.metadata) or "none"
        raise ConfigError(
            f"group_by names the metadata column {column!r}, which record {first.id!r} does not "
            f"have{nearest(column, first.metadata)} (it has: {known})"
        )
    return chain([first], remaining)


def generating_models(
    models: Mapping[str, Any], roles: Sequence[str], config: GenerationConfig
) -> dict[str, Any]:
    """The models of these roles, each able to generate as configured.

    Raises:
        ConfigError: a role that the run does not fill.
        CapabilityError: a constraint that a model cannot follow.
    """
    for role in roles:
        if role not in models:
            raise ConfigError(
                f"roles names {role!r}, but the run's models are: {', '.join(models)}",
                hint=f"add [models.{role}], or change evaluator.roles",
            )
    chosen = {role: models[role] for role in roles}
    for role, model in chosen.items():
        require_constraint(model, config, role)
    return chosen
