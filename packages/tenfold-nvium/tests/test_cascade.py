"""Deferred and piggybacked execution equals full recomputation, whatever the exits."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvium_cases import tiny_model
from tenfold.errors import RunFailed
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import cascade, embed, flush
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.policies import ScriptedExit

EXACT = {"rtol": 0, "atol": 1e-12}


def forced(target: int, exits: int) -> list[float]:
    return [0.0 if k == target else 1.0 for k in range(exits - 1)]


def check_invariant(cache: NviumCache) -> None:
    for row in range(cache.rows):
        ends = [cache.lengths[row], *(column[row] for column in cache.frontier)]
        assert ends == sorted(ends, reverse=True)
        for m, (before, after) in enumerate(itertools.pairwise(ends)):
            assert cache.waiting_states(m, row).shape[0] == before - after


def feed(model, cache, rows, tokens) -> None:
    """The next token of each row waits for the first segment."""
    embed(model, cache, np.asarray(rows), [[int(t)] for t in tokens])


def play(model, tokens, script, packed=False, flush_after=()):
    """Feeds `tokens [B, T]` one by one, leaving at `script[row][t]`; checks every step against
    one full forward pass. Returns the cache."""
    rows, length = tokens.shape
    with torch.no_grad():
        full = model(tokens, output_exit_logits=True)
    cache, runner, everyone = (
        NviumCache(model.config, rows),
        SegmentRunner(model, packed=packed),
        np.arange(rows),
    )
    for t in range(length):
        feed(model, cache, everyone, tokens[:, t])
        gates = np.array([forced(script[row][t], model.num_exits) for row in range(rows)])
        choice = cascade(model, runner, cache, everyone, ScriptedExit(), gates)
        if t % 3 == 0 and rows < 10:
            check_invariant(cache)
        for row in range(rows):
            k = script[row][t]
            assert choice.exits[row] == k
            torch.testing.assert_close(choice.scores[row], full.exit_logits[row, t, k], **EXACT)
            assert np.isnan(choice.log_odds[row, k + 1 :]).all()
            visited = full.gate_log_odds[row, t, : k + 1].double().numpy()
            np.testing.assert_allclose(choice.log_odds[row, : k + 1], visited, rtol=0, atol=1e-12)
        if t in flush_after:
            flush(runner, cache, range(rows))
    return cache


def reference_cache(model, tokens) -> NviumCache:
    cache = NviumCache(model.config)
    model(tokens, past_key_values=cache)
    return cache


def assert_prefix_equal(cache: NviumCache, reference: NviumCache) -> None:
    for i, (layer, wanted) in enumerate(zip(cache.stores, reference.stores, strict=True)):
        ends = torch.from_numpy(cache.frontier[cache.config.segment_of(i)])
        if not layer.is_initialized:
            assert not ends.any()
            continue
        length = int(ends.max())
        seen = torch.arange(length) < ends[:, None]
        mine, theirs = (x.pair[:, : cache.rows, :, :length].movedim(1, 0) for x in (layer, wanted))
        mask = seen[:, None, None, :, None]
        torch.testing.assert_close(mine * mask, theirs * mask, **EXACT)


@pytest.mark.parametrize(
    ("use_packed", "count"),
    [(False, 256), (True, 512), pytest.param(True, 4096, marks=pytest.mark.slow)],
)
def test_every_exit_script_of_length_six_equals_full_recomputation(use_packed, count):
    """Scripts (all 4^6 in the slow run) as rows of a few batches: logits, gates, and keys and
    values, before a flush on each segment's prefix and after it everywhere."""
    model = tiny_model(exit_layers=[1, 2, 3])
    scripts = list(itertools.product(range(4), repeat=6))
    random.Random(0).shuffle(scripts)
    tokens = torch.randint(23, (1, 6), generator=torch.Generator().manual_seed(1))
    reference = reference_cache(model, tokens.expand(256, 6))
    for start in range(0, count, 256):
        block = scripts[start : start + 256]
        cache = play(model, tokens.expand(len(block), 6), block, use_packed)
        assert_prefix_equal(cache, reference)
        flush(SegmentRunner(model, packed=use_packed), cache, range(len(block)))
        assert cache.is_complete
        assert_prefix_equal(cache, reference)


@st.composite
def shapes(draw):
    layers = draw(st.integers(2, 7))
    exits = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=4)))
    groups = draw(st.sampled_from([1, 2]))
    return {
        "num_hidden_layers": layers,
        "exit_layers": exits,
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2])),
        "head_dim": draw(st.sampled_from([4, 8])),
        "base_model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3", "mistral"])),
        "adapter_size": draw(st.sampled_from([0, 12])),
        "final_adapter": draw(st.booleans()),
        "exit_head_tying": draw(st.sampled_from(["lm_head", "embeddings", "none"])),
    }


@settings(max_examples=25, deadline=None)
@given(shapes(), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_any_model_shape_and_any_script_equals_full_recomputation(
    shape, rows, length, use_packed, seed
):
    model = tiny_model(seed % 7, **shape)
    rng = random.Random(seed)
    tokens = torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(seed))
    script = [[rng.randrange(model.num_exits) for _ in range(length)] for _ in range(rows)]
    flush_after = {t for t in range(length) if rng.random() < 0.2}
    cache = play(model, tokens, script, use_packed, flush_after)
    assert_prefix_equal(cache, reference_cache(model, tokens))
    cache.flush(model)
    assert_prefix_equal(cache, reference_cache(model, tokens))


def test_segment_launches_are_the_sum_of_exit_depths_and_flushed_work_is_complete(monkeypatch):
    """One launch per visited segment; after a flush each token has passed each segment once."""
    import tenfold_nvium.cascade as module

    model, ran = tiny_model(), []
    original = module.run_segment

    def counting(runner, cache, segment, rows, observer=None):
        hidden, block = original(runner, cache, segment, rows, observer)
        ran.append(block.size)
        return hidden, block

    monkeypatch.setattr(module, "run_segment", counting)
    rng = random.Random(5)
    script = [[rng.randrange(4) for _ in range(40)]]
    tokens = torch.randint(23, (1, 40), generator=torch.Generator().manual_seed(2))
    cache = play(model, tokens, script)
    assert len(ran) == sum(k + 1 for k in script[0])
    cache.flush(model)
    assert sum(ran) == 4 * 40


def test_rows_advance_independently():
    """Rows take steps at different times; each still equals its own full recomputation."""
    model, rng = tiny_model(), random.Random(3)
    tokens = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(tokens, output_exit_logits=True).exit_logits
    cache, runner, at = NviumCache(model.config, 3), SegmentRunner(model), [0, 0, 0]
    while min(at) < 12:
        rows = [r for r in range(3) if at[r] < 12 and rng.random() < 0.6]
        if not rows:
            continue
        exits = [rng.randrange(4) for _ in rows]
        feed(model, cache, rows, [tokens[r, at[r]] for r in rows])
        gates = np.array([forced(k, 4) for k in exits])
        choice = cascade(model, runner, cache, np.array(rows), ScriptedExit(), gates)
        for i, r in enumerate(rows):
            torch.testing.assert_close(choice.scores[i], full[r, at[r], exits[i]], **EXACT)
            at[r] += 1
        check_invariant(cache)


def test_a_router_that_gives_nan_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.exits[1].router.head.weight.fill_(torch.nan)
    cache, row = NviumCache(model.config, 1), np.array([0])
    feed(model, cache, row, [1])
    with pytest.raises(RunFailed, match="router of exit 2 gave NaN"):
        cascade(model, SegmentRunner(model), cache, row, ScriptedExit(), np.array([forced(3, 4)]))


def test_exit_one_for_five_hundred_tokens_stays_exact():
    """The longest queue there is: everything deferred, completed in one block at the end."""
    model = tiny_model(max_position_embeddings=1024)
    tokens = torch.randint(23, (1, 500), generator=torch.Generator().manual_seed(4))
    cache, runner, row = NviumCache(model.config, 1), SegmentRunner(model), np.array([0])
    for t in range(500):
        feed(model, cache, row, tokens[:, t])
        cascade(model, runner, cache, row, ScriptedExit(), np.array([forced(0, 4)]))
    assert cache.deferred().tolist() == [500]
    cache.flush(model)
    assert_prefix_equal(cache, reference_cache(model, tokens))
