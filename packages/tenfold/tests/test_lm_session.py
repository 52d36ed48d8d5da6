"""Sessions: whatever is done to the cache, logits are those of a full recomputation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tenfold.errors import ConfigError
from tenfold.lm.batching import pad_batch
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import CONTEXT, KINDS, causal_lm

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(params=KINDS)
def model(request):
    return causal_lm(request.param)


def full(model, ids):
    """`[V]` logits after `ids`, without any cache."""
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([ids])).logits[0, -1]


def started(model, prompts=PROMPTS):
    batch = pad_batch(prompts, 0, side="left")
    return model.start(batch.input_ids, batch.attention_mask)


def test_padded_prompts_and_steps_equal_recomputation(model):
    session, output = started(model)
    rows = [list(p) for p in PROMPTS]
    assert output.cache_length == 6
    for step in range(4):
        for i, row in enumerate(rows):
            torch.testing.assert_close(output.logits[i, -1], full(model, row), **CLOSE)
        tokens = torch.tensor([[20 + step], [30 + step], [40 + step]])
        output = session.extend(tokens)
        rows = [row + token for row, token in zip(rows, tokens.tolist(), strict=True)]
        assert output.logits.shape == (3, 1, model.vocabulary_size)
        assert output.cache_length == 7 + step


def test_greedy_generation_is_the_argmax_of_steps(model):
    written = model.generate(PROMPTS, GenerationConfig(max_new_tokens=10))
    for prompt, [completion] in zip(PROMPTS, written, strict=True):
        session, output = model.start(torch.tensor([prompt]))
        stepped = []
        while len(stepped) < 10 and stepped[-1:] != [model.eos_id]:
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            stepped.append(int(token))
            output = session.extend(token)
        assert stepped == completion.token_ids


def test_hidden_states_feed_the_head(model):
    _, output = started(model)
    head = model.model.get_output_embeddings()
    torch.testing.assert_close(head(output.hidden), output.logits)


TREE = {20: (), 21: (20,), 22: (20,), 23: (), 24: (20, 21)}
"""A tree of tokens under the prompt: token -> its ancestors."""


def tree_step(session, rows, length):
    """All tree tokens in one step: positions by depth, attention to ancestors and prompt."""
    tokens = list(TREE)
    allowed = torch.zeros(rows, len(tokens), length + len(tokens), dtype=torch.bool)
    allowed[:, :, :length] = True
    for i, token in enumerate(tokens):
        for ancestor in (*TREE[token], token):
            allowed[:, i, length + tokens.index(ancestor)] = True
    depth = torch.tensor([[len(TREE[t]) for t in tokens]])
    lengths = torch.tensor([[len(p)] for p in PROMPTS[:rows]])
    return session.extend(torch.tensor([tokens] * rows), lengths + depth, allowed)


def test_tree_attention_equals_recomputing_every_path(model):
    session, output = started(model)
    output = tree_step(session, 3, output.cache_length)
    for i, prompt in enumerate(PROMPTS):
        for t, (token, ancestors) in enumerate(TREE.items()):
            path = [*prompt, *ancestors, token]
            torch.testing.assert_close(output.logits[i, t], full(model, path), **CLOSE)


def test_keeping_one_path_of_the_tree_continues_it(model):
    session, output = started(model)
    length = output.cache_length
    tree_step(session, 3, length)
    accepted = [20, 21, 24]
    session.keep([*range(length), *(length + list(TREE).index(t) for t in accepted)])
    output = session.extend(torch.tensor([[31], [32], [33]]))
    assert output.cache_length == length + 4
    for i, prompt in enumerate(PROMPTS):
        expected = full(model, [*prompt, *accepted, 31 + i])
        torch.testing.assert_close(output.logits[i, -1], expected, **CLOSE)


def test_truncation_forgets_what_came_later(model):
    session, output = started(model)
    session.extend(torch.tensor([[20, 21], [22, 23], [24, 25]]))
    session.truncate(output.cache_length)
    again = session.extend(torch.tensor([[31], [32], [33]]))
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(again.logits[i, -1], full(model, [*prompt, 31 + i]), **CLOSE)
    session.truncate(0)
    empty = session.extend(torch.tensor([[5, 6]] * 3))
    torch.testing.assert_close(empty.logits[0, -1], full(model, [5, 6]), **CLOSE)


def test_rows_can_be_reordered_repeated_and_dropped(model):
    session, _ = started(model)
    rows = [2, 0, 0, 2]
    session.reorder(rows)
    output = session.extend(torch.tensor([[31], [32], [33], [34]]))
    for i, row in enumerate(rows):
        expected = full(model, [*PROMPTS[row], 31 + i])
        torch.testing.assert_close(output.logits[i, -1], expected, **CLOSE)


def test_forks_go_their_own_ways(model):
    session, _ = started(model)
    fork = session.fork()
    fork.extend(torch.tensor([[40], [41], [42]]))
    fork.reorder([1])
    output = session.extend(torch.tensor([[31], [32], [33]]))
    torch.testing.assert_close(output.logits[0, -1], full(model, [*PROMPTS[0], 31]), **CLOSE)
    other = fork.extend(torch.tensor([[50]]))
    torch.testing.assert_close(other.logits[0, -1], full(model, [*PROMPTS[1], 41, 50]), **CLOSE)


def test_misuse_is_explained():
    model = causal_lm()
    session, _ = started(model)
    cases = (
        (lambda: session.extend(torch.tensor([1])), r"shape \[B, T\]"),
        (lambda: session.extend(torch.tensor([[1]])), "3 rows, the tokens 1"),
        (lambda: session.extend(torch.tensor([[1]] * 3), None, torch.ones(3, 1, 2)), "attention"),
        (lambda: session.extend(torch.tensor([[1]] * 3), torch.full((3, 1), CONTEXT)), "beyond"),
        (lambda: session.truncate(7), "cannot keep 7 of 6"),
        (lambda: session.keep([6]), "index 6 is outside the session's 6 cached"),
        (lambda: session.reorder([3]), "index 3 is outside the session's 3 rows"),
    )
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    assert session.extend(torch.tensor([[1]] * 3)).cache_length == 7


def test_sliding_windows_slide_and_refuse_patterns_beyond_them():
    model = causal_lm("gemma2")
    long = [list(range(5, 30)), [7, 8, 9]]  # longer, and shorter, than the window of 16
    batch = pad_batch(long, 0, side="left")
    session, output = model.start(batch.input_ids, batch.attention_mask)
    for i, prompt in enumerate(long):
        torch.testing.assert_close(output.logits[i, -1], full(model, prompt), **CLOSE)
    output = session.extend(torch.tensor([[31], [32]]))
    torch.testing.assert_close(output.logits[0, -1], full(model, [*long[0], 31]), **CLOSE)
    everything = torch.ones(2, 1, 27, dtype=torch.bool)
    with pytest.raises(ConfigError, match="looks back 16 tokens only"):
        session.extend(torch.tensor([[33], [34]]), None, everything)
