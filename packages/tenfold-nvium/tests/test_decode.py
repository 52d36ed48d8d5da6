"""Decoding: same seed, same text, whatever the scheduler; exact distribution; certificates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold_nvium.decode import PiggybackDecoder, recompute
from tenfold_nvium.noise import PositionNoise, ScriptedNoise
from tenfold_nvium.policies import (
    CertifiedGreedy,
    FixedExit,
    SampleExit,
    ScriptedExit,
    make_policy,
    sigmoid,
)
from tenfold_nvium.sampling import Warp, draw, inverse_draw

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("policy", ["sample", "sample:0.5", "greedy-router", "fixed:2", "full"])
@pytest.mark.parametrize("warp", [Warp(), Warp(0), Warp(0.7, top_k=5, top_p=0.9, min_p=0.02)])
def test_same_noise_gives_the_same_text_for_every_scheduler(model, policy, warp):
    wanted = [
        recompute(model, p, 20, PositionNoise(seed, 4), policy=policy, warp=warp)
        for seed, p in enumerate(PROMPTS)
    ]
    for limit in (None, 1, 2, 7):
        for packed in (True, False):
            decoder = PiggybackDecoder(model, policy, warp=warp, max_deferred=limit, packed=packed)
            batch = decoder.generate(PROMPTS, 20)
            alone = [
                decoder.generate([p], 20, seeds=[seed]).rows[0] for seed, p in enumerate(PROMPTS)
            ]
            for row, one, reference in zip(batch.rows, alone, wanted, strict=True):
                assert row.tokens == one.tokens == reference.tokens
                assert row.exits == one.exits == reference.exits
                assert row.scores == pytest.approx(reference.scores, abs=1e-9)
            if limit is not None:
                assert batch.cache.deferred().max() <= limit


def test_certified_greedy_is_the_argmax_of_the_full_mixture_and_leaves_early():
    early = 0
    for seed in range(6):
        model = tiny_model(seed)
        decoder = PiggybackDecoder(model, "certified", warp=Warp(0))
        full = PiggybackDecoder(model, "full", warp=Warp(0))
        for prompt in PROMPTS:
            got, wanted = decoder.generate([prompt], 25), full.generate([prompt], 25)
            assert got.rows[0].tokens == wanted.rows[0].tokens
            early += sum(k < 3 for k in got.rows[0].exits)
    assert early > 0


def test_certificate_holds_for_enumerated_mixtures(model):
    """At each step the chosen token is the arg-max of the brute-force mixture."""
    prompt = [3, 1, 4]
    text = (
        prompt
        + PiggybackDecoder(model, "certified", warp=Warp(0)).generate([prompt], 30).rows[0].tokens
    )
    with torch.no_grad():
        output = model(torch.tensor([text]), output_exit_logits=True)
    weights = output.exit_log_probs.exp()
    mixed = (weights[..., None] * output.exit_logits.softmax(-1)).sum(-2)
    assert mixed[0, 2:-1].argmax(-1).tolist() == text[3:]


def test_deferred_log_probs_equal_teacher_forcing(model):
    done = PiggybackDecoder(model, max_deferred=9).generate(PROMPTS, 30, log_probs=True)
    for prompt, row in zip(PROMPTS, done.rows, strict=True):
        text = torch.tensor([prompt + row.tokens])
        with torch.no_grad():
            logits = model(text).logits[0, len(prompt) - 1 : -1]
        wanted = logits.gather(-1, text[0, len(prompt) :, None])[:, 0]
        assert row.log_probs == pytest.approx(wanted.tolist(), abs=1e-9)


def test_scripted_exits_are_taken_and_traced(model, tmp_path):
    script = [0, 3, 1, 2, 0, 0, 3]
    decoder = PiggybackDecoder(model, ScriptedExit())
    done = decoder.generate([[1, 2]], 7, noise=[ScriptedNoise(script, 4, first=1)])
    assert done.rows[0].exits == script
    assert done.trace.exit_histogram == {"1": 3, "2": 1, "3": 1, "4": 2}
    assert done.trace.mean_depth == pytest.approx((3 * 1 + 2 + 3 + 2 * 4) / 7 / 4)
    # The prompt's own step is not counted; the fourth token rides nobody, the last one all.
    assert done.trace.launches == [6, 4, 3, 2]
    assert done.trace.tokens[-1].widths == (1, 3, 3, 5)
    done.trace.save(tmp_path / "trace.json", model="tiny")
    saved = json.loads((tmp_path / "trace.json").read_text())
    assert saved["model"] == "tiny"
    assert [token["exit"] for token in saved["tokens"]] == [e + 1 for e in script]


def test_rows_end_at_eos_or_when_told(model):
    free = PiggybackDecoder(model).generate(PROMPTS, 20)
    eos = free.rows[0].tokens[4]
    done = PiggybackDecoder(model).generate(PROMPTS, 20, eos_ids=[eos])
    cut = free.rows[0].tokens.index(eos) + 1
    assert done.rows[0].tokens == free.rows[0].tokens[:cut]
    assert done.rows[0].finish_reason == "eos"
    stopped = PiggybackDecoder(model).generate(
        PROMPTS, 20, stop=lambda row, tokens: "enough" if row == 2 and len(tokens) == 3 else ""
    )
    assert [len(r.tokens) for r in stopped.rows] == [20, 20, 3]
    assert [r.finish_reason for r in stopped.rows] == ["length", "length", "enough"]
    assert stopped.rows[0].tokens == free.rows[0].tokens


def test_each_row_has_its_own_limit(model):
    free = PiggybackDecoder(model).generate(PROMPTS, 20)
    own = PiggybackDecoder(model).generate(PROMPTS, [3, 0, 20])
    assert [len(r.tokens) for r in own.rows] == [3, 0, 20]
    assert own.rows[2].tokens == free.rows[2].tokens


def test_one_new_token_and_eos_at_once(model):
    one = PiggybackDecoder(model).generate(PROMPTS, 1)
    assert [len(r.tokens) for r in one.rows] == [1, 1, 1]
    eos = [r.tokens[0] for r in one.rows]
    done = PiggybackDecoder(model).generate(PROMPTS, 9, eos_ids=eos)
    assert all(r.finish_reason == "eos" and len(r.tokens) == 1 for r in done.rows)


def test_bad_input_is_one_clear_error(model):
    decoder = PiggybackDecoder(model)
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        decoder.generate([[1], []], 3)
    with pytest.raises(ConfigError, match="context is 256"):
        decoder.generate([[1] * 250], 8)
    assert len(decoder.generate([[1] * 249], 8).rows[0].tokens) == 8
    with pytest.raises(ConfigError, match="did you mean 'sample'"):
        make_policy("sampel")
    with pytest.raises(ConfigError, match="'x' is no argument"):
        make_policy("fixed:x")
    with pytest.raises(ConfigError, match="above 0"):
        SampleExit(0.0)
    with pytest.raises(ConfigError, match="max_deferred"):
        PiggybackDecoder(model, max_deferred=0)
    with pytest.raises(ConfigError, match="temperature"):
        Warp(-1)


def test_policies_by_name():
    assert make_policy("fixed:2") == FixedExit(1)
    assert make_policy("sample:0.8") == SampleExit(0.8)
    assert isinstance(make_policy("certified"), CertifiedGreedy)
    assert sigmoid(np.array([-800.0, 0.0, 800.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_noise_depends_on_seed_and_position_alone():
    one, two = PositionNoise(5, 4), PositionNoise(5, 4)
    assert one.at(300) == two.at(300)
    assert two.at(3) == PositionNoise(5, 4).at(3)
    assert one.at(3) != one.at(4)
    assert one.at(3) != PositionNoise(6, 4).at(3)
    gates, token = one.at(0)
    assert len(gates) == 3
    assert 0 <= token < 1


def test_inverse_draw_picks_by_cumulative_probability():
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]]).log()
    numbers = [0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53]
    drawn = inverse_draw(p.expand(6, 5), torch.tensor(numbers, dtype=torch.float64))
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]


def test_warping_equals_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    expected = scores / 0.7
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        expected = warper(None, expected)
    got = Warp(0.7, top_k=20, top_p=0.9, min_p=0.02).log_probs(scores)
    torch.testing.assert_close(got, expected.log_softmax(-1))
    tokens, values = draw(scores, Warp(0), [0.5] * 4)
    assert tokens.tolist() == scores.argmax(-1).tolist()
    assert values.tolist() == pytest.approx(scores.log_softmax(-1).max(-1).values.tolist())


def test_head_scope_truncation_is_not_mixture_truncation():
    """The documented example: why truncation has a scope."""
    heads = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.1, 0.3, 0.6]])
    warp = Warp(top_k=2)
    per_head = warp.log_probs(heads.log()).exp().mean(0)
    mixture = warp.log_probs(heads.mean(0, keepdim=True).log()).exp()[0]
    assert per_head.tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3], abs=1e-6)
    assert mixture.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5], abs=1e-6)
