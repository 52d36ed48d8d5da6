"""The trade-off curve: every point equals a model that was really changed."""

from __future__ import annotations

import copy
import csv
import math

import numpy as np
import pytest
import torch
from nvium_cases import TEXTS, Texts, tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import ItemResult, PromptRecord
from tenfold.report import render_html, render_markdown
from tenfold.testing.context import FakeContext
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exits import EXIT
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.policies import FixedExit, SampleExit, make_policy
from tenfold_nvium.tradeoff import Tradeoff
from tenfold_nvium.tradeoff_curve import Curve, resampled_losses

OFFSETS = [-3.0, -0.5, 1.25, 6.0]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def lm(tokenizer) -> NviumLM:
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=0, router_temperature=0.7)
    return NviumLM(model, tokenizer)


@pytest.fixture(scope="module")
def dense(tokenizer) -> NviumLM:
    model = tiny_model(3, vocab_size=len(tokenizer), eos_token_id=0, exit_layers=[])
    return NviumLM(model, tokenizer)


def shifted(lm: NviumLM, offset: float) -> NviumLM:
    """The same model with its routers' biases really changed."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        for exit_ in model.exits:
            exit_.router.head.bias[EXIT] += offset * model.config.router_temperature
    return NviumLM(model, lm.tokenizer)


def play(evaluator, lm, tmp_path, dataset, dense=None):
    ctx = FakeContext(tmp_path)
    models = {"model": lm} | ({"dense": dense} if dense else {})
    results = list(evaluator.run(ctx, models, evaluator.plan(ctx, {"dataset": dataset})))
    metrics = {(m.name, m.group): m for m in evaluator.aggregate(ctx, results)}
    blocks = list(evaluator.report(ctx, results, list(metrics.values())))
    return results, metrics, blocks


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_shifted_point_is_the_model_with_changed_router_biases(lm, tmp_path, offset):
    texts = TEXTS[::7]
    evaluator = Tradeoff(offsets=OFFSETS, time_runs=0)
    _, metrics, _ = play(evaluator, lm, tmp_path, Texts(texts))
    changed, name = shifted(lm, offset), f"offset={offset:+g}"
    scores = changed.score([("", text) for text in texts])
    tokens = sum(len(s.logprobs) for s in scores)
    loss = -sum(sum(s.logprobs) for s in scores) / tokens
    assert metrics["nats_per_token", name].value == pytest.approx(loss, rel=1e-9)
    assert metrics["perplexity", name].value == pytest.approx(math.exp(loss), rel=1e-9)
    ids = [[0, *changed.encode(text)] for text in texts]
    depth = sum(
        float(changed.model(torch.tensor([i]), labels=torch.tensor([i])).expected_depth)
        * (len(i) - 1)
        for i in ids
    )
    assert metrics["expected_depth", name].value == pytest.approx(depth / tokens, rel=1e-9)
    assert metrics["bound", name].value == pytest.approx(tokens / depth, rel=1e-9)
    # Decoding with the offset writes what the changed model writes.
    mine = PiggybackDecoder(lm.model, SampleExit(offset=offset)).generate([ids[0][:5]], 20)
    theirs = PiggybackDecoder(changed.model, SampleExit()).generate([ids[0][:5]], 20)
    assert mine.rows[0].tokens == theirs.rows[0].tokens
    assert mine.rows[0].exits == theirs.rows[0].exits


def test_fixed_exits_oracle_and_dense_are_their_own_models(lm, dense, tmp_path):
    texts = TEXTS[:8]
    _, metrics, _ = play(Tradeoff(time_runs=0), lm, tmp_path, Texts(texts), dense)
    heads, twin, tokens = torch.zeros(4).double(), 0.0, 0
    best, depth = 0.0, 0.0
    for text in texts:
        ids = torch.tensor([[0, *lm.encode(text)]])
        with torch.no_grad():
            logits = lm.model(ids, output_exit_logits=True).exit_logits[0, :-1]
            own = dense.model(ids).logits[0, :-1]
        target = ids[0, 1:]
        probs = logits.log_softmax(-1).gather(-1, target[:, None, None].expand(-1, 4, 1))[..., 0]
        heads -= probs.sum(0)
        best -= float(probs.max(-1).values.sum())
        depth += float((probs.argmax(-1) + 1).sum()) / 4
        twin -= float(own.gather(-1, target[:, None]).sum())
        tokens += len(target)
    for k in range(4):
        name = f"exit={k + 1}"
        assert metrics["nats_per_token", name].value == pytest.approx(float(heads[k]) / tokens)
        assert metrics["expected_depth", name].value == pytest.approx((k + 1) / 4)
    assert metrics["nats_per_token", "oracle"].value == pytest.approx(best / tokens)
    assert metrics["expected_depth", "oracle"].value == pytest.approx(depth / tokens)
    assert metrics["nats_per_token", "dense"].value == pytest.approx(twin / tokens)
    trained = metrics["nats_per_token", ""].value
    assert trained == metrics["nats_per_token", "offset=0"].value
    assert metrics["gap_to_dense", ""].value == pytest.approx(trained - twin / tokens)
    low, high = metrics["gap_to_dense", ""].interval
    assert low < metrics["gap_to_dense", ""].value < high
    others = [m.value for (name, group), m in metrics.items() if name == "nats_per_token" and group]
    assert min(others) == metrics["nats_per_token", "oracle"].value
    assert sum(metrics["share", f"exit={k}"].value for k in range(1, 5)) == pytest.approx(1)


def test_depth_falls_as_the_offset_rises_and_ends_at_fixed_exits(lm, tmp_path):
    evaluator = Tradeoff(offsets=[-200, *OFFSETS, 200], time_runs=0)
    _, metrics, _ = play(evaluator, lm, tmp_path, Texts(TEXTS[:5]))
    names = ["offset=-200", *(f"offset={x:+g}" for x in OFFSETS), "offset=+200"]
    depths = [metrics["expected_depth", name].value for name in names]
    assert depths == sorted(depths, reverse=True)
    for name, exit_ in (("offset=-200", "exit=4"), ("offset=+200", "exit=1")):
        for what in ("nats_per_token", "expected_depth"):
            wanted = metrics[what, exit_].value
            assert metrics[what, name].value == pytest.approx(wanted, rel=1e-9)


def test_every_point_is_timed_on_equal_work(lm, dense, tmp_path):
    evaluator = Tradeoff(offsets=[2.0], time_runs=2, time_prompts=2, time_tokens=9)
    results, metrics, blocks = play(evaluator, lm, tmp_path, Texts(TEXTS[:3]), dense)
    assert [r.id for r in results] == ["text/0", "text/1", "text/2", "time/0", "time/1"]
    times = results[-1].values["times"]
    assert list(times) == ["offset=0", "offset=+2", *(f"exit={k}" for k in range(1, 5)), "dense"]
    assert {values["tokens"] for values in times.values()} == {16}
    assert all(values["seconds"] > 0 for values in times.values())
    assert [times[f"exit={k}"]["depth"] for k in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]
    assert times["dense"]["depth"] == 1.0
    # Decoding is deterministic, only its time is not.
    assert times["offset=+2"]["depth"] == results[-2].values["times"]["offset=+2"]["depth"]
    assert metrics["speedup", "dense"].value == 1.0
    rates = [r.values["times"] for r in results[-2:]]
    ratio = [
        (r["exit=1"]["tokens"] / r["exit=1"]["seconds"])
        / (r["dense"]["tokens"] / r["dense"]["seconds"])
        for r in rates
    ]
    assert metrics["speedup", "exit=1"].value == pytest.approx(sum(ratio) / 2)
    page = render_html("t", blocks, {})
    assert "Speed" in page
    assert "relative to the dense twin" in page


def test_report_and_csv_hold_every_point(lm, tmp_path):
    evaluator = Tradeoff(offsets=[1.0], time_runs=0)
    _, metrics, blocks = play(evaluator, lm, tmp_path, Texts(TEXTS[:4]))
    rows = list(csv.DictReader((tmp_path / "run/artifacts/tradeoff.csv").open()))
    names = ["offset=0", "offset=+1", *(f"exit={k}" for k in range(1, 5)), "oracle"]
    assert [row["point"] for row in rows] == names
    for row in rows:
        for column, name in (("perplexity", "perplexity"), ("depth", "expected_depth")):
            assert float(row[column]) == metrics[name, row["point"]].value
    text = render_markdown("t", blocks)
    assert "shifted routers" in text
    assert "oracle" in text
    assert "tokens/s" not in text  # nothing was timed
    assert text.count("| offset=+1 |") == 2
    assert not any(getattr(block, "text", "") == "Speed" for block in blocks)


def test_prompts_are_scored_by_their_reference_and_cut_texts_are_counted(lm, tmp_path):
    class Prompts(Texts):
        def load(self, split="", limit=None, shuffle_seed=None):
            yield PromptRecord(id="a", prompt="def add_1(a, b):", reference="\n    return a")
            yield PromptRecord(id="b", prompt=[{"role": "user", "content": "hi"}])

    results, metrics, _ = play(Tradeoff(time_runs=0), lm, tmp_path, Prompts())
    (scores,) = lm.score([("def add_1(a, b):", "\n    return a")])
    assert results[0].values["tokens"] == len(scores.token_ids)
    assert metrics["nats_per_token", ""].value == pytest.approx(
        -scores.total / len(scores.token_ids)
    )
    assert results[1].values["tokens"] == 0
    _, metrics, _ = play(Tradeoff(time_runs=0, max_text_tokens=5), lm, tmp_path, Texts(TEXTS[:3]))
    assert metrics["tokens", ""].value == 15
    assert metrics["texts_cut", ""].value == 3


def test_no_text_gives_no_numbers(lm, tmp_path):
    _, metrics, blocks = play(Tradeoff(), lm, tmp_path, Texts([]))
    assert not metrics
    assert blocks


def point(nats, depth):
    return {"nats": nats, "depth": depth, "shares": [depth]}


def test_curve_numbers_of_known_points():
    """Two texts of 10 tokens; the dense loss lies halfway between two offsets."""
    values = {
        "tokens": 10, "cut": False,
        "points": {"offset=0": point(20.0, 8.0), "offset=+1": point(30.0, 4.0),
                   "exit=1": point(35.0, 5.0), "oracle": point(5.0, 3.0),
                   "dense": point(25.0, 10.0)},
    }  # fmt: skip
    curve = Curve.of([ItemResult("text/a", values), ItemResult("text/b", values)], 0)
    assert curve.reference == "dense"
    assert curve.depth_at(2.5) == pytest.approx(0.6)
    assert curve.depth_at(1.9) is None
    assert curve.depth_at(9.0) == pytest.approx(0.4)
    assert {p.name for p in curve.points if p.pareto} == {"offset=0", "offset=+1"}
    assert curve.point("offset=0").gap == pytest.approx(-0.5)
    assert curve.point("offset=0").interval == pytest.approx((2.0, 2.0))
    assert curve.point("offset=+1").perplexity == pytest.approx(math.exp(3.0))


def test_resampling_is_the_bootstrap_of_the_ratio():
    """Its spread is that of the delta method on many texts, and it is paired over points."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 50, 400).astype(float)
    nats = tokens * rng.normal(2.0, 0.3, 400)
    drawn = resampled_losses(np.stack([nats, nats + tokens]), tokens, 3)
    ratio = nats.sum() / tokens.sum()
    deviation = np.sqrt(((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert drawn[:, 0].mean() == pytest.approx(ratio, abs=0.2 * deviation)
    assert drawn[:, 0].std() == pytest.approx(deviation, rel=0.15)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 1.0, rtol=1e-12)


def test_what_does_not_go_together_is_one_clear_error(lm, dense, tmp_path):
    with pytest.raises(ConfigError, match="offsets holds inf"):
        Tradeoff(offsets=[math.inf])
    with pytest.raises(ConfigError, match="time_tokens is 1"):
        Tradeoff(time_tokens=1)
    with pytest.raises(ConfigError, match="dense twin with one exit"):
        play(Tradeoff(), lm, tmp_path, Texts(TEXTS[:1]), lm)
    other = train_bpe(TEXTS, 290)
    stranger = NviumLM(tiny_model(vocab_size=len(other), eos_token_id=0, exit_layers=[]), other)
    with pytest.raises(ConfigError, match="another vocabulary"):
        play(Tradeoff(), lm, tmp_path, Texts(TEXTS[:1]), stranger)
    with pytest.raises(ConfigError, match="router offset is inf"):
        SampleExit(offset=math.inf)


def test_policies_with_an_offset_by_name():
    assert make_policy("sample:1:-0.5") == SampleExit(1.0, -0.5)
    assert make_policy("sample:0.8") == SampleExit(0.8)
    assert make_policy("fixed:2") == FixedExit(1)
    with pytest.raises(ConfigError, match="no argument for 'sample'"):
        make_policy("sample:1:up")
    odds, uniforms = np.array([0.0, 0.0]), np.array([0.6, 0.8])
    assert SampleExit(offset=1.0).leaves(0, odds, uniforms).tolist() == [True, False]
    assert SampleExit(2.0, 1.0).leaves(0, odds, uniforms).tolist() == [True, False]
    assert SampleExit().leaves(0, odds, uniforms).tolist() == [False, False]
