"""LayerSkip: greedy text is the dense arg-max, no token is one too many, and the work is what a
draft and a check cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baseline_cases import dense_of, slow_greedy, tiny_calm, tiny_layerskip
from hypothesis import given, settings
from hypothesis import strategies as st
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold_nvium.baselines.layerskip import LayerSkipDecoder, split_at
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.sampling import Warp

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def model():
    """Early layers agree with the whole often enough that drafts are kept and refused."""
    return tiny_layerskip(scale=0.15)


# --- Greedy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_greedy_text_is_the_dense_argmax(model, length, depth, packed):
    decoder = LayerSkipDecoder(model, depth, length, warp=Warp(0), packed=packed)
    done = decoder.generate(PROMPTS, 30, log_probs=True)
    dense = PiggybackDecoder(dense_of(model), "full", warp=Warp(0)).generate(PROMPTS, 30)
    for row, other, prompt in zip(done.rows, dense.rows, PROMPTS, strict=True):
        assert row.tokens == other.tokens == slow_greedy(model, prompt, 30)
        assert row.scores == pytest.approx(other.scores, abs=1e-11)
        assert row.log_probs == pytest.approx(other.scores, abs=1e-11)
    assert 0 < done.trace.kept < done.trace.drafted


@settings(max_examples=20, deadline=None)
@given(
    base=st.sampled_from(["llama", "qwen2", "qwen3", "mistral"]),
    groups=st.sampled_from([1, 2]),
    depth=st.integers(1, 3),
    length=st.integers(1, 6),
    count=st.integers(1, 14),
    seed=st.integers(0, 9),
)
def test_greedy_holds_for_any_shape_depth_and_limit(base, groups, depth, length, count, seed):
    model = tiny_layerskip(seed, base_model_type=base, num_key_value_heads=groups, scale=0.2)
    decoder = LayerSkipDecoder(model, depth, length, warp=Warp(0))
    row = decoder.generate([[3, 1, 4]], count).rows[0]
    assert row.tokens == slow_greedy(model, [3, 1, 4], count)


def test_any_dense_model_can_be_decoded(model):
    dense = dense_of(model)
    for depth in (1, 2, 3):
        done = LayerSkipDecoder(dense, depth, 4, warp=Warp(0)).generate(PROMPTS[:1], 20)
        assert done.rows[0].tokens == slow_greedy(model, PROMPTS[0], 20)


def test_a_perfect_draft_is_kept_whole_and_a_hopeless_one_never():
    """Later layers that add nothing: every draft stands. Greedy arg-max refused by a head that
    the early state cannot know: one token per check, and still the right text."""
    model = tiny_layerskip()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    done = LayerSkipDecoder(model, 1, 4, warp=Warp(0)).generate(PROMPTS[:1], 21)
    assert done.trace.acceptance == 1
    assert done.trace.tokens_per_check == 5
    assert done.trace.launches == [20, 4]
    sampled = LayerSkipDecoder(model, 1, 4).generate(PROMPTS[:1], 21)
    assert sampled.trace.acceptance == 1
    with torch.no_grad():
        last = model.model.layers[-1].mlp
        # Pushes every residual stream far to one token's side, which no early layer does.
        last.down_proj.weight.copy_(torch.randn(16, 24, generator=torch.Generator().manual_seed(9)))
        last.down_proj.weight.mul_(300)
    bad = LayerSkipDecoder(model, 1, 4, warp=Warp(0)).generate(PROMPTS[:1], 21)
    assert bad.rows[0].tokens == slow_greedy(model, PROMPTS[0], 21)
    assert bad.trace.acceptance < 0.5


# --- Ends ---------------------------------------------------------------------------------------


def test_never_one_token_too_many(model):
    """Every limit, every place of an end token inside a draft."""
    for warp, length in ((Warp(0), 1), (Warp(0), 4), (Warp(), 9)):
        decoder = LayerSkipDecoder(model, 1, length, warp=warp)
        whole = decoder.generate(PROMPTS[:1], 24).rows[0].tokens
        for limit in range(25):
            row = decoder.generate(PROMPTS[:1], limit).rows[0]
            assert len(row.tokens) == limit
            assert row.finish_reason == "length"
            if warp.temperature == 0:
                assert row.tokens == whole[:limit]
        for eos in set(whole):
            row = decoder.generate(PROMPTS[:1], 24, eos_ids=[eos]).rows[0]
            assert row.tokens == whole[: whole.index(eos) + 1]
            assert row.finish_reason == "eos"


def test_stops_and_context(model):
    decoder = LayerSkipDecoder(model, 1, 5, warp=Warp(0))
    whole = decoder.generate(PROMPTS, 20)
    done = decoder.generate(PROMPTS, 20, stop=lambda r, t: "stop" if len(t) == r + 3 else "")
    for r, (row, other) in enumerate(zip(done.rows, whole.rows, strict=True)):
        assert row.tokens == other.tokens[: r + 3]
        assert row.finish_reason == "stop"
    full = decoder.generate([[1] * 249], 8).rows[0]
    assert len(full.tokens) == 8
    with pytest.raises(ConfigError, match="context is 256"):
        decoder.generate([[1] * 250], 8)
    assert decoder.generate([[1, 2]], 0).rows[0].tokens == []


# --- Sampling -----------------------------------------------------------------------------------


def test_text_is_a_function_of_the_seed_alone(model):
    decoder = LayerSkipDecoder(model, 1, 4)
    together = decoder.generate(PROMPTS, 20)
    for seed, prompt in enumerate(PROMPTS):
        alone = decoder.generate([prompt], 20, seeds=[seed]).rows[0]
        assert alone.tokens == together.rows[seed].tokens
    other = decoder.generate(PROMPTS[:1], 20, seeds=[99]).rows[0]
    assert other.tokens != together.rows[0].tokens


def test_scores_are_the_dense_models(model):
    warp = Warp(0.8, top_k=7, top_p=0.9)
    row = LayerSkipDecoder(model, 1, 3, warp=warp).generate([[1, 2]], 25, log_probs=True).rows[0]
    text = torch.tensor([[1, 2, *row.tokens]])
    logits = model(text).logits[0, 1:-1].detach()
    chosen = torch.tensor(row.tokens)[:, None]
    for got, wanted in (
        (row.scores, warp.log_probs(logits)),
        (row.log_probs, Warp().log_probs(logits)),
    ):
        assert got == pytest.approx(wanted.gather(-1, chosen)[:, 0].tolist(), abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_dense_scores(dtype):
    model = tiny_layerskip(scale=0.15, dtype=dtype)
    row = LayerSkipDecoder(model, 1, 4).generate([[1, 2]], 30, log_probs=True).rows[0]
    text = torch.tensor([[1, 2, *row.tokens]])
    wanted = model(text).logits[0, 1:-1].detach().float().log_softmax(-1)
    wanted = wanted.gather(-1, torch.tensor(row.tokens)[:, None])[:, 0].tolist()
    for values in (row.scores, row.log_probs):
        assert values == pytest.approx(wanted, abs=1e-4 if dtype == torch.float32 else 0.1)


# --- Work ---------------------------------------------------------------------------------------


def test_checks_reuse_what_drafting_computed(model, monkeypatch):
    """First layers run once per read token and never again; each check is one pass of the upper
    layers over the draft; no cache is copied."""
    import tenfold_nvium.baselines.layerskip as module

    ran, original = [], module.run_segment

    def counting(runner, cache, segment, rows, observer=None):
        states, block = original(runner, cache, segment, rows, observer)
        ran.append((segment, int(block.starts[0]), block.size))
        return states, block

    monkeypatch.setattr(module, "run_segment", counting)
    for name in ("fork", "state_dict", "_select"):
        monkeypatch.setattr(NviumCache, name, None)
    done = LayerSkipDecoder(model, 1, 4, warp=Warp(0)).generate(PROMPTS[:1], 30)
    trace = done.trace
    assert ran[:2] == [(0, 0, 3), (1, 0, 3)]
    assert trace.launches[1] == trace.checks == sum(s == 1 for s, _, _ in ran) - 1
    assert trace.launches[0] == sum(s == 0 for s, _, _ in ran) - 1
    assert all(size == 1 for s, _, size in ran[2:] if s == 0)
    # Between two checks the first layers read as many positions as the check takes.
    reads = 0
    for segment, _, size in ran[2:]:
        reads = reads + 1 if segment == 0 else 0 * (reads == size or pytest.fail("recomputed"))
    assert trace.drafted == trace.launches[0] - trace.checks
    assert trace.tokens_per_check == pytest.approx(29 / trace.checks)
    assert trace.summary()["acceptance"] == trace.kept / trace.drafted


def test_the_cache_after_rejections_is_the_dense_one(model):
    """Keys and values of what was kept equal one full pass."""
    from tenfold_nvium.baselines.layerskip import SpeculativeTrace, _Text
    from tenfold_nvium.baselines.loop import Writer
    from tenfold_nvium.noise import PositionNoise

    decoder = LayerSkipDecoder(model, 1, 4)
    writer = Writer([25], (), None, SpeculativeTrace([1, 4]))
    text = _Text(decoder, writer, 0, PositionNoise(0, 3), False)
    with torch.inference_mode():
        text.write([3, 1, 4])
    cache, tokens = text._cache, [3, 1, 4, *writer.rows[0].tokens][:-1]
    assert cache.is_complete
    assert cache.lengths.tolist() == [len(tokens)]
    view = split_at(dense_of(model), 1)
    reference = PiggybackDecoder(dense_of(model), "full").generate([tokens], 1).cache
    for mine, theirs in zip(cache.stores, reference.stores, strict=True):
        part = (slice(None), slice(None), slice(None), slice(len(tokens)))
        torch.testing.assert_close(mine.pair[part], theirs.pair[part], rtol=0, atol=1e-11)
    assert view.config.exit_layers == [1]
    assert decoder.model.config.exit_layers == [1, 3]
    assert np.array_equal(cache.frontier[0], cache.frontier[1])


def test_bad_settings_are_one_clear_error(model):
    with pytest.raises(ConfigError, match=r"exit_layer is 4; .* in 1\.\.3"):
        LayerSkipDecoder(model, 4)
    with pytest.raises(ConfigError, match="draft_length is 0"):
        LayerSkipDecoder(model, 1, 0)
    with pytest.raises(ConfigError, match="mixture of 4 exits"):
        LayerSkipDecoder(tiny_model(), 1)
    with pytest.raises(ConfigError, match="this is a CalmForCausalLM"):
        LayerSkipDecoder(tiny_calm(), 1)
    with pytest.raises(ConfigError, match="a dense model has no trained one"):
        LayerSkipDecoder(dense_of(model))
    assert LayerSkipDecoder(model).exit_layer == 1
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        LayerSkipDecoder(model).generate([[]], 3)
