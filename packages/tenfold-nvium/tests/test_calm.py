"""CALM: leaves at the trained depths, propagates states, equals the slow way and the dense one."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import (
    SlowCalm,
    dense_of,
    slow_calm,
    slow_greedy,
    tiny_calm,
    tiny_layerskip,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tenfold.errors import ConfigError
from tenfold_nvium.baselines.calm import CalmDecoder
from tenfold_nvium.baselines.confidence import saturation, top_confidence
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.sampling import Warp

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
SHARP = Warp(0.7, top_k=9, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return tiny_calm()


@pytest.mark.parametrize("measure", ["max_prob", "margin", "saturation"])
@pytest.mark.parametrize("warp", [Warp(), Warp(0), SHARP])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_slow_way_alone_and_in_a_batch(model, measure, warp, packed):
    threshold = {"max_prob": 0.5, "margin": 0.3, "saturation": 0.45}[measure]
    decoder = CalmDecoder(model, threshold, measure=measure, warp=warp, packed=packed)
    together = decoder.generate(PROMPTS, 25, log_probs=True)
    seen = set()
    for seed, prompt in enumerate(PROMPTS):
        alone = decoder.generate([prompt], 25, seeds=[seed], log_probs=True).rows[0]
        tokens, exits, log_probs = slow_calm(model, prompt, 25, seed, threshold, measure, warp)
        for row in (alone, together.rows[seed]):
            assert row.tokens == tokens
            assert row.exits == exits
            assert row.log_probs == pytest.approx(log_probs, abs=1e-11)
        seen |= set(exits)
    assert seen == {0, 1, 2}


@settings(max_examples=20, deadline=None)
@given(
    base=st.sampled_from(["llama", "qwen2", "qwen3", "mistral"]),
    exits=st.sampled_from([[1], [2], [1, 2], [1, 2, 3], [3]]),
    groups=st.sampled_from([1, 2]),
    norms=st.sampled_from(["own", "shared"]),
    threshold=st.sampled_from([0.0, 0.08, 0.3]),
    seed=st.integers(0, 5),
)
def test_any_shape_equals_the_slow_way(base, exits, groups, norms, threshold, seed):
    model = tiny_calm(
        seed, base_model_type=base, exit_layers=exits, num_key_value_heads=groups, exit_norms=norms
    )
    decoder = CalmDecoder(model, threshold)
    row = decoder.generate([[3, 1, 4]], 12, seeds=[seed], log_probs=True).rows[0]
    tokens, left, log_probs = slow_calm(model, [3, 1, 4], 12, seed, threshold)
    assert (row.tokens, row.exits) == (tokens, left)
    assert row.log_probs == pytest.approx(log_probs, abs=1e-11)


def test_propagated_keys_and_values_are_each_layers_own_projections(model):
    """The cache itself, against the slow decoder's lists, up to what has been filled."""
    import numpy as np
    from tenfold_nvium.baselines.calm import CalmTrace
    from tenfold_nvium.cache import NviumCache

    decoder, slow = CalmDecoder(model, 0.3), SlowCalm(model, 0.3, "margin")
    cache, trace = NviumCache(model.config, 1), CalmTrace(model.config.depths)
    tokens = torch.randint(23, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    for n, token in enumerate(tokens):
        step = decoder._step(cache, np.array([0]), [[token]], n == 0, trace)
        k, logits = slow.read(token, n == 0)
        assert step.exits[0] == k
        torch.testing.assert_close(step.scores[0], logits, rtol=0, atol=1e-12)
    assert trace.filled[1] > 0
    assert trace.filled[2] > 0
    assert trace.fills[2] <= trace.filled[2]
    for i, store in enumerate(cache.stores):
        length = int(cache.frontier[model.config.segment_of(i), 0])
        for half, states in enumerate((slow.keys[i], slow.values[i])):
            wanted = torch.stack(states[:length]).transpose(0, 1)
            got = store.pair[half, 0, :, :length]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("warp", [Warp(), Warp(0), SHARP])
@pytest.mark.parametrize("measure", ["margin", "saturation"])
@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_a_threshold_of_one_is_the_dense_model(model, warp, measure, threshold):
    """Token for token under the same seeds, scores to 1e-12."""
    calm = CalmDecoder(model, threshold, measure=measure, warp=warp)
    dense = PiggybackDecoder(dense_of(model), "full", warp=warp)
    got, wanted = calm.generate(PROMPTS, 30), dense.generate(PROMPTS, 30)
    for row, other in zip(got.rows, wanted.rows, strict=True):
        assert row.tokens == other.tokens
        assert row.scores == pytest.approx(other.scores, abs=1e-12)
        assert set(row.exits) == {2}
    if warp.temperature == 0:
        assert got.rows[0].tokens == slow_greedy(model, PROMPTS[0], 30)
    assert got.trace.launches == [29, 29, 29]
    assert got.trace.filled == [0, 0, 0]


def test_below_one_the_text_is_another(model):
    """Negative control: the equality above is not a matter of course."""
    calm, dense = CalmDecoder(model, 0.3), PiggybackDecoder(dense_of(model), "full")
    assert calm.generate(PROMPTS, 30).rows[2].tokens != dense.generate(PROMPTS, 30).rows[2].tokens


def test_leaves_at_exactly_the_trained_depths():
    """Threshold 0 leaves at the first exit: its head reads the stream that leaves layer 1, the
    one that `forward` computes the loss from."""
    model = tiny_calm(exit_layers=[1, 3])
    done = CalmDecoder(model, 0.0).generate([[1, 2, 3]], 12, log_probs=True)
    assert done.rows[0].exits == [2] + [0] * 11
    assert done.trace.launches == [11, 0, 0]
    states = model.layer_states(torch.tensor([[1, 2, 3, done.rows[0].tokens[0]]]))
    first = model.lm_head(model.exit_norms[0](states[1][0, -1])).log_softmax(-1).detach()
    assert done.rows[0].log_probs[1] == pytest.approx(
        float(first[done.rows[0].tokens[1]]), abs=1e-12
    )
    heads = model(torch.tensor([[1, 2, 3]]), output_exit_logits=True).exit_logits[0, -1]
    states = model.layer_states(torch.tensor([[1, 2, 3]]))
    for k, depth in enumerate((1, 3, 4)):
        norm = model.exit_norms[k] if k < 2 else model.model.norm
        torch.testing.assert_close(heads[k], model.lm_head(norm(states[depth][0, -1])))


def test_half_precision_and_a_pattern_of_exits():
    """bf16: a threshold of 1 is the dense decoder bit for bit; a chosen pattern is followed."""
    model = tiny_calm(dtype=torch.bfloat16)
    got = CalmDecoder(model, 1.0).generate(PROMPTS, 20)
    wanted = PiggybackDecoder(dense_of(model), "full").generate(PROMPTS, 20)
    assert [r.tokens for r in got.rows] == [r.tokens for r in wanted.rows]
    pattern = [0, 2, 1, 1, 0, 0, 2, 0, 1, 2, 0]

    class Patterned(CalmDecoder):
        at = 0

        def confidence(self, k, states, before):
            leaves = pattern[self.at] == k
            self.at += leaves or k == 1
            return torch.full((len(states),), float(leaves)), None

    done = Patterned(model, 0.5).generate(PROMPTS[:1], 12)
    assert done.rows[0].exits == [2, *pattern]
    text = [*PROMPTS[0], *done.rows[0].tokens]
    slow = tiny_calm()
    slow.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    reader = SlowCalm(slow, 0.5, "margin")
    for token in text[:3]:
        reader.read(token, deep=True)
    answers = []
    reader._confidence = lambda *_: answers.pop(0)
    for n, k in enumerate(pattern):
        answers[:] = [k == 0, k == 1]
        left, logits = reader.read(text[3 + n], deep=False)
        assert left == k
        assert done.rows[0].scores[n + 1] == pytest.approx(
            float(logits.log_softmax(-1)[text[4 + n]]), abs=0.35
        )


def test_forced_text_is_scored_as_it_would_be_written(model):
    decoder = CalmDecoder(model, 0.3)
    text = torch.randint(23, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    values, exits = decoder.log_probs([7, 3], text)
    _, wanted_exits, wanted = slow_calm(model, [7, 3], 20, threshold=0.3, forced=text)
    assert exits == wanted_exits
    assert values == pytest.approx(wanted, abs=1e-11)
    assert len(set(exits)) > 1


def test_rows_end_by_themselves(model):
    decoder = CalmDecoder(model, 0.3)
    free = decoder.generate(PROMPTS, 20)
    eos = free.rows[0].tokens[7]
    done = decoder.generate(PROMPTS, [20, 3, 0], eos_ids=[eos])
    first = free.rows[0].tokens
    assert done.rows[0].tokens == first[: first.index(eos) + 1]
    assert done.rows[0].finish_reason == "eos"
    assert len(done.rows[1].tokens) <= 3
    assert done.rows[2].tokens == []
    stopped = decoder.generate(PROMPTS[:1], 20, stop=lambda r, t: "stop" if len(t) == 4 else "")
    assert stopped.rows[0].tokens == first[:4]
    assert stopped.rows[0].finish_reason == "stop"


def test_measures():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    assert top_confidence(logits, "max_prob").tolist() == pytest.approx([0.6, 0.8])
    assert top_confidence(logits, "margin").tolist() == pytest.approx([0.3, 0.7])
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert saturation(a, b).tolist() == pytest.approx([0.96])


def test_trace_tells_what_was_skipped(model):
    done = CalmDecoder(model, 0.3).generate(PROMPTS[:1], 40)
    summary = done.trace.summary()
    assert summary["approximate"] is True
    assert summary["tokens"] == 40
    exits = done.rows[0].exits[1:]
    assert summary["launches"] == [39, sum(k > 0 for k in exits), sum(k > 1 for k in exits)]
    assert done.trace.mean_depth < 1


def test_bad_settings_are_one_clear_error(model):
    with pytest.raises(ConfigError, match="did you mean 'margin'"):
        CalmDecoder(model, measure="margins")
    with pytest.raises(ConfigError, match="threshold is -1"):
        CalmDecoder(model, -1)
    with pytest.raises(ConfigError, match="threshold is nan"):
        CalmDecoder(model, float("nan"))
    with pytest.raises(ConfigError, match="this is a LayerSkipForCausalLM"):
        CalmDecoder(tiny_layerskip())
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        CalmDecoder(model).generate([[1], []], 3)
    with pytest.raises(ConfigError, match="context is 256"):
        CalmDecoder(model).generate([[1] * 250], 8)
    assert len(CalmDecoder(model).generate([[1] * 249], 8).rows[0].tokens) == 8
