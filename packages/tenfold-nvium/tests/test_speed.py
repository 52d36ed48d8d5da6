"""The time model against closed forms, and the timing harness on a clock that tests turn."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tenfold_nvium.speed as speed
import tenfold_nvium.speed_model as speed_model
from nvium_cases import TEXTS, Texts, tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import Completion
from tenfold.report import render_html
from tenfold.testing.context import FakeContext
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.noise import ScriptedNoise
from tenfold_nvium.policies import ScriptedExit
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.speed_model import WIDTHS, SpeedModel, measure, merged

A, B, FIXED = (3.0, 2.0, 5.0), (0.25, 0.5, 0.125), 1.5


def affine_model(widths=WIDTHS):
    costs = [{w: a + b * w for w in widths} for a, b in zip(A, B, strict=True)]
    return SpeedModel.fit(costs, FIXED)


def test_affine_costs_give_the_closed_form():
    """`T = fixed + sum a_m rho_m + b_m`: deferral saves reading weights, not arithmetic."""
    shares = (0.5, 0.3, 0.2)
    reach = (1.0, 0.5, 0.2)
    wanted = FIXED + sum(a * r + b for a, b, r in zip(A, B, reach, strict=True))
    assert affine_model().of_shares(shares) == pytest.approx(wanted, rel=1e-12)
    assert affine_model().of_shares((0.0, 0.0, 1.0)) == pytest.approx(affine_model().dense)
    # Nobody reaches the upper segments: they cost nothing.
    assert affine_model().of_shares((1.0, 0.0, 0.0)) == pytest.approx(FIXED + A[0] + B[0])


def test_any_costs_give_the_simulated_mean():
    """Curved costs: the expectation over geometric widths equals a long simulated run."""
    costs = [{w: math.sqrt(w) for w in range(1, 65)} for _ in A]
    model, shares = SpeedModel.fit(costs, 0.0), (0.5, 0.3, 0.2)
    draw = np.random.default_rng(0).choice(3, size=200_000, p=shares)
    counts, waiting = [Counter() for _ in A], [0, 0, 0]
    for exit_index in draw:
        for segment in range(3):
            waiting[segment] += 1
            if segment > exit_index:
                break
            counts[segment][waiting[segment]] += 1
            waiting[segment] = 0
            if segment == exit_index:
                for later in range(segment + 1, 3):
                    waiting[later] += 1
                break
    assert model.of_widths(counts, len(draw)) == pytest.approx(model.of_shares(shares), rel=0.01)


def test_costs_between_and_beyond_measured_widths():
    model = affine_model(widths=(1, 4, 8))
    for width in (1, 2, 3, 5, 8, 20):
        assert model.cost(1, width) == pytest.approx(A[1] + B[1] * width)
    assert SpeedModel.fit([{1: 2.0}], 0.0).cost(0, 9) == 2.0
    assert SpeedModel.from_dict(model.to_dict()) == model


def test_of_widths_adds_up_what_ran():
    counts = [Counter({1: 10}), Counter({2: 3, 4: 1}), Counter({10: 1})]
    total = 10 * (A[0] + B[0]) + 3 * (A[1] + 2 * B[1]) + A[1] + 4 * B[1] + A[2] + 10 * B[2]
    assert affine_model().of_widths(counts, 10) == pytest.approx(FIXED + total / 10)


def test_wrong_input_is_one_clear_error():
    with pytest.raises(ConfigError, match="block of 1 token"):
        SpeedModel.fit([{2: 1.0}], 0.0)
    with pytest.raises(ConfigError, match="add up to 1"):
        affine_model().of_shares((0.5, 0.5))
    model = tiny_model()
    with pytest.raises(ConfigError, match="exceed the model's context"):
        measure(model, packed_runner(model), context=250)
    with pytest.raises(ConfigError, match="at least 2"):
        speed.Speed(max_new_tokens=1)


def test_merged_takes_medians():
    parts = [SpeedModel.fit([{1: x, 2: 2 * x}], x) for x in (1.0, 5.0, 2.0)]
    assert merged(parts) == SpeedModel.fit([{1: 2.0, 2: 4.0}], 2.0)


class Clock:
    def __init__(self):
        self.now = 0.0


def test_measuring_recovers_the_cost_of_segments(monkeypatch):
    """A runner that takes `a + b w` seconds on a clock of the test's own."""
    model, clock = tiny_model(), Clock()
    runner = packed_runner(model)
    plain = runner.run

    def slow(segment, x, block, cache):
        clock.now += (segment + 1) + 0.5 * block.width
        return plain(segment, x, block, cache)

    monkeypatch.setattr(runner, "run", slow)
    monkeypatch.setattr(speed_model, "_now", lambda device: clock.now)
    measured = measure(model, runner, context=10, widths=(1, 2, 7), repeats=2)
    for segment in range(4):
        assert measured.costs[segment] == {w: segment + 1 + 0.5 * w for w in (1, 2, 7)}
    assert measured.fixed == 0.0


def test_measuring_leaves_the_model_and_its_text_alone():
    model = tiny_model()
    before = PiggybackDecoder(model).generate([[1, 2]], 12, seeds=[3]).rows[0].tokens
    measured = measure(model, packed_runner(model), context=8, widths=(1, 3), repeats=1)
    assert all(cost > 0 for table in measured.costs for cost in table.values())
    assert measured.fixed > 0
    assert PiggybackDecoder(model).generate([[1, 2]], 12, seeds=[3]).rows[0].tokens == before


def test_traces_count_the_blocks_that_ran():
    model = tiny_model()
    script = [0, 0, 3, 1, 0, 2]
    noise = ScriptedNoise(script, 4, first=2)
    trace = PiggybackDecoder(model, ScriptedExit()).generate([[1, 2, 3]], 6, noise=[noise]).trace
    # The first token comes with the prompt; the others leave at exits 1, 4, 2, 1, 3.
    assert sum(trace.blocks[0].values()) == 5
    assert [sum(c.values()) for c in trace.blocks] == trace.launches == [5, 3, 2, 1]
    assert trace.blocks[1] == Counter({2: 2, 1: 1})
    assert trace.blocks[2] == Counter({2: 1, 3: 1})
    assert trace.blocks[3] == Counter({2: 1})


def fake_model(clock, first, each):
    def generate(prompts, config):
        clock.now += first + each * (config.max_new_tokens - 1)
        return [[Completion("x", list(range(config.max_new_tokens)))] for _ in prompts]

    return SimpleNamespace(generate=generate)


def play(evaluator, models, tmp_path, dataset):
    ctx = FakeContext(tmp_path)
    items = list(evaluator.plan(ctx, {"dataset": dataset}))
    results = list(evaluator.run(ctx, models, items))
    metrics = evaluator.aggregate(ctx, results)
    page = render_html("test", list(evaluator.report(ctx, results, metrics)), {})
    return {m.name + (f"[{m.group}]" if m.group else ""): m for m in metrics}, page


def test_decoding_is_told_apart_from_the_prompt(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    models = {"dense": fake_model(clock, 0.5, 0.25), "quick": fake_model(clock, 2.0, 0.125)}
    metrics, page = play(speed.Speed(max_new_tokens=9), models, tmp_path, Texts(TEXTS[:3]))
    assert metrics["decode_tokens_per_second[dense]"].value == pytest.approx(4.0)
    assert metrics["decode_tokens_per_second[quick]"].value == pytest.approx(8.0)
    assert metrics["first_token[quick]"].value == pytest.approx(2.0)
    assert metrics["tokens_per_second[dense]"].value == pytest.approx(9 / 2.5)
    assert metrics["speedup[quick]"].value == pytest.approx(2.0)
    assert "speedup[dense]" not in metrics
    assert "took turns" in page


def test_an_nvium_is_held_against_its_limit(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    lm = NviumLM(tiny_model(vocab_size=len(tokenizer)), tokenizer)
    metrics, page = play(
        speed.Speed(max_new_tokens=12, rounds=1), {"model": lm}, tmp_path, Texts(TEXTS[:2])
    )
    depth = metrics["mean_depth[model]"].value
    assert metrics["depth_bound[model]"].value == pytest.approx(1 / depth)
    assert metrics["speed_of_limit[model]"].value > 0
    assert "Against the limit" in page
