"""Completions as item values, and back as sample records.

One item holds one prompt. With one completion its values are those of a `SampleRecord`
(`prompt`, `completion`, `prompt_ids`, `completion_ids`, `finish_reason`, `stats`,
`reference`, `metadata`) and `role`; with several, what differs stands in a list `samples`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tenfold.records import Completion, Message, SampleRecord


def sample_values(
    prompt: str | list[Message],
    completions: Sequence[Completion],
    *,
    prompt_ids: list[int] | None = None,
    reference: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    role: str = "model",
) -> dict[str, Any]:
    """Item values of one prompt's completions."""
    samples = [_completion_values(completion) for completion in completions]
    # Ids of the prompt are of use only together with those of the completion.
    exact = any(completion.token_ids for completion in completions)
    own = samples[0] if len(samples) == 1 else {"samples": samples}
    return {
        "prompt": prompt,
        **own,
        "prompt_ids": prompt_ids if exact else None,
        "reference": reference,
        "metadata": dict(metadata or {}),
        "role": role,
    }


def _completion_values(completion: Completion) -> dict[str, Any]:
    values: dict[str, Any] = {
        "completion": completion.text,
        "completion_ids": list(completion.token_ids) or None,
        "finish_reason": completion.finish_reason,
        "stats": dict(completion.stats),
    }
    if completion.logprobs is not None:
        values["logprobs"] = list(completion.logprobs)
    return values


def sample_records(item_id: str, values: Mapping[str, Any]) -> Iterator[SampleRecord]:
    """The sample records of an item's values; several are `<item>#0`, `<item>#1`, ...

    Raises:
        KeyError: the values hold no prompt or no completion.
    """
    samples = values.get("samples")
    for number, sample in enumerate([values] if samples is None else samples):
        yield SampleRecord(
            id=item_id if samples is None else f"{item_id}#{number}",
            prompt=values["prompt"],
            completion=sample["completion"],
            prompt_ids=values.get("prompt_ids"),
            completion_ids=sample.get("completion_ids"),
            finish_reason=sample.get("finish_reason", ""),
            reference=values.get("reference"),
            stats=sample.get("stats") or {},
            metadata=values.get("metadata") or {},
        )
