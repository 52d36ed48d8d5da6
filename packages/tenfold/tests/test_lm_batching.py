"""Padding, scored positions and length buckets."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.batching import length_buckets, pad_batch, position_ids, scored_positions

rows = st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=6)


@given(rows, st.sampled_from(["left", "right"]))
def test_masks_come_from_lengths_and_tokens_survive(sequences, side):
    batch = pad_batch(sequences, 0, side=side)
    width = max(map(len, sequences), default=0)
    assert batch.input_ids.shape == (len(sequences), width)
    for row, mask, sequence in zip(batch.input_ids, batch.attention_mask, sequences, strict=True):
        assert row[mask.bool()].tolist() == sequence
        edge = mask[: len(sequence)] if side == "right" else mask[width - len(sequence) :]
        assert edge.all()


@given(rows, st.sampled_from(["left", "right"]))
def test_default_scores_every_token_that_follows_one(sequences, side):
    batch = pad_batch(sequences, 0, side=side)
    scored = scored_positions(batch)
    assert scored.sum(1).tolist() == [max(0, len(s) - 1) for s in sequences]
    without = TokenBatch(batch.input_ids, batch.attention_mask, None)
    assert torch.equal(scored, scored_positions(without))


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_starts_where_it_is_told(side):
    batch = pad_batch([[1, 2, 3, 4], [5, 6]], 0, side=side, loss_from=[2, 0])
    scored = [batch.input_ids[i][scored_positions(batch)[i]].tolist() for i in range(2)]
    assert scored == [[3, 4], [6]]  # position 0 can never be scored


def test_positions_count_real_tokens():
    batch = pad_batch([[1, 2, 3], [4]], 0, side="left")
    assert position_ids(batch.attention_mask).tolist() == [[0, 1, 2], [0, 0, 0]]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 64))
def test_buckets_hold_every_row_once_within_the_budget(lengths, budget):
    buckets = length_buckets(lengths, budget)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or max(lengths[i] for i in bucket) * len(bucket) <= budget


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pad_batch([[1]], 0, side="top"), "padding side is 'top'"),
        (lambda: pad_batch([[1]], 0, loss_from=[1, 2]), "2 loss_from values for 1 sequences"),
        (lambda: length_buckets([1], 0), "token budget is 0"),
    ],
)
def test_wrong_arguments_are_explained(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
