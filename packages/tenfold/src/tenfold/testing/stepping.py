"""Laws of `step`: control over the cache never changes what the model computes.

Shapes: `B` rows, `T` new positions, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

from tenfold.records import GenerationConfig
from tenfold.testing.findings import NotApplicableError, require
from tenfold.testing.models import PROMPTS

TOLERANCE = 1e-3
"""Largest difference of logits in float32 between two ways through the cache."""
STEPS = 6


def greedy_text_is_the_argmax_of_steps(model: Any) -> None:
    """Greedy `generate` writes the arg-max of `step`, token for token."""
    if not hasattr(model, "generate"):
        raise NotApplicableError("needs the capability 'generate' to compare with")
    config = GenerationConfig(max_new_tokens=STEPS, chat=False)
    for text in PROMPTS[:3]:
        ids = model.encode(text)
        [[completion]] = model.generate([ids], config)
        stepped = _greedy(model, ids, STEPS)
        written = list(completion.token_ids)
        # `generate` ends with the end-of-text token, and may leave it out of `token_ids`.
        if model.eos_id in stepped:
            stepped = stepped[: stepped.index(model.eos_id)]
            written = [token for token in written if token != model.eos_id]
        require(written == stepped, f"{text!r}: generate {written}, step {stepped}")


def forks_are_independent(model: Any) -> None:
    """What a fork reads does not change the session it came from."""
    session, output = _start(model, PROMPTS[0])
    token = _next(output)
    expected = session.fork().extend(token).logits
    other = session.fork()
    other.extend((token + 1) % output.logits.shape[-1])
    _close(session.extend(token).logits, expected, "a fork disturbed its origin")


def truncation_forgets(model: Any) -> None:
    """After `truncate`, the session goes on as if the later tokens had never come."""
    session, output = _start(model, PROMPTS[0])
    length = output.cache_length
    token = _next(output)
    expected = session.fork().extend(token).logits
    step = session.extend((token + 1) % output.logits.shape[-1])
    require(step.cache_length == length + 1, f"cache length {step.cache_length}, not {length + 1}")
    session.truncate(length)
    _close(session.extend(token).logits, expected, "truncate left something behind")


def rows_can_be_reordered(model: Any) -> None:
    """`reorder` moves whole rows, with repeats."""
    import torch

    ids = model.encode(PROMPTS[0])
    other = [(i + 1) % model.vocabulary_size for i in ids]
    session, output = model.start(torch.tensor([ids, other]))
    token = output.logits[:, -1:].argmax(-1)
    expected = session.fork().extend(token).logits
    session.reorder([1, 0, 1])
    found = session.extend(token[[1, 0, 1]]).logits
    _close(found, expected[[1, 0, 1]], "reordered rows differ")


def left_padding_changes_nothing(model: Any) -> None:
    """A left-padded row steps like the row alone."""
    from tenfold.lm.batching import pad_batch

    rows = [model.encode(text) for text in PROMPTS[:3]]
    batch = pad_batch(rows, model.pad_id, side="left")
    _, together = model.start(batch.input_ids, batch.attention_mask)
    for i, text in enumerate(PROMPTS[:3]):
        _, alone = _start(model, text)
        _close(together.logits[i, -1], alone.logits[0, -1], f"row {i} depends on its padding")


def _greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    import torch

    session, output = model.start(torch.tensor([ids]))
    tokens: list[int] = []
    while len(tokens) < steps:
        token = _next(output)
        tokens.append(int(token))
        output = session.extend(token)
    return tokens


def _start(model: Any, text: str) -> Any:
    import torch

    return model.start(torch.tensor([model.encode(text)]))


def _next(output: Any) -> Any:
    """The arg-max of the last position, `[B, 1]`."""
    return output.logits[:, -1:].argmax(-1)


def _close(found: Any, expected: Any, what: str) -> None:
    worst = float((found - expected).abs().max())
    require(worst < TOLERANCE, f"{what} (logits differ by {worst:.2g})")


STEP_LAWS = (
    greedy_text_is_the_argmax_of_steps,
    forks_are_independent,
    truncation_forgets,
    rows_can_be_reordered,
    left_padding_changes_nothing,
)
