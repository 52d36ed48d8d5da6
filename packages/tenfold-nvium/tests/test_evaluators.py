"""Evaluators: the exactness check passes here and fails on a broken decoder; profiles add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvium_cases import TEXTS, Texts, tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import PromptRecord
from tenfold.report import render_html
from tenfold.testing.context import FakeContext
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exactness import Exactness
from tenfold_nvium.histograms import Histograms, queue_lengths
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.profile import Profile
from tenfold_nvium.tokens import token_class


@pytest.fixture(scope="module")
def lm() -> NviumLM:
    tokenizer = train_bpe(TEXTS, 300)
    return NviumLM(tiny_model(vocab_size=len(tokenizer), eos_token_id=0), tokenizer)


def play(evaluator, model, tmp_path, dataset):
    ctx = FakeContext(tmp_path)
    items = list(evaluator.plan(ctx, {"dataset": dataset}))
    results = list(evaluator.run(ctx, {"model": model}, items))
    metrics = evaluator.aggregate(ctx, results)
    page = render_html("test", list(evaluator.report(ctx, results, metrics)), {})
    return results, {m.name + (f"[{m.group}]" if m.group else ""): m for m in metrics}, page


@pytest.mark.parametrize("policy", ["sample", "greedy-router", "fixed:1"])
def test_exactness_holds_to_rounding(lm, tmp_path, policy):
    evaluator = Exactness(max_new_tokens=20, policy=policy, max_deferred=7)
    results, metrics, page = play(evaluator, lm, tmp_path, Texts(TEXTS[:5]))
    assert len(results) == 5
    assert metrics["equal_texts"].value == 1.0
    assert metrics["cache_difference"].value < 1e-11
    assert metrics["logprob_difference"].value < 1e-11
    assert metrics["mean_depth"].value < 1.0
    assert "full recomputation" in page


def test_exactness_catches_a_decoder_that_drops_deferred_work(lm, tmp_path, monkeypatch):
    """Negative control: skipped layers that never run leave wrong keys behind."""
    import tenfold_nvium.cache as module

    original = module.NviumCache.take

    def forgetful(self, segment, rows):
        states, block = original(self, segment, rows)
        return (states * 0 if segment and block.size > 1 else states), block

    monkeypatch.setattr(module.NviumCache, "take", forgetful)
    _, metrics, _ = play(Exactness(max_new_tokens=20), lm, tmp_path, Texts(TEXTS[:3]))
    assert metrics["cache_difference"].value > 1e-3
    assert metrics["logprob_difference"].value > 1e-3


def test_profile_adds_up(lm, tmp_path):
    results, metrics, page = play(Profile(max_new_tokens=15), lm, tmp_path, Texts(TEXTS[:6]))
    shares = [metrics[f"generated_share[exit={k}]"].value for k in range(1, 5)]
    assert sum(shares) == pytest.approx(1.0)
    assert metrics["generated_depth"].value == pytest.approx(
        sum(s * (k + 1) / 4 for k, s in enumerate(shares))
    )
    weights = [metrics[f"share[exit={k}]"].value for k in range(1, 5)]
    assert sum(weights) == pytest.approx(1.0)
    tokens = metrics["expected_depth"].n
    by_class = [m for name, m in metrics.items() if name.startswith("expected_depth[class=")]
    assert sum(m.n for m in by_class) == tokens
    assert sum(m.value * m.n for m in by_class) / tokens == pytest.approx(
        metrics["expected_depth"].value
    )
    nats = -sum(sum(s.logprobs) for s in lm.score([("", t) for t in TEXTS[:6]]))
    assert metrics["loss"].value * tokens == pytest.approx(nats, rel=1e-6)
    assert "deep" in page
    assert "".join(results[0].values["scored"]["pieces"]) == TEXTS[0]


def test_profile_scores_a_prompts_reference(lm, tmp_path):
    class Prompts(Texts):
        def load(self, split="", limit=None, shuffle_seed=None):
            yield PromptRecord(id="a", prompt="def add_1(a, b):", reference="\n    return a")

    results, metrics, _ = play(Profile(max_new_tokens=0), lm, tmp_path, Prompts())
    assert "generated" not in results[0].values
    (scores,) = lm.score([("def add_1(a, b):", "\n    return a")])
    assert metrics["loss"].value == pytest.approx(-scores.total / len(scores.token_ids))


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="looks inside an N-vium"):
        play(Profile(), object(), tmp_path, Texts(TEXTS[:1]))


def test_token_classes():
    pieces = ["\n    ", " return", "len", " foo_bar", "12", "):", " +", "x1y", "\x00"]
    assert [token_class(p) for p in pieces] == [
        "blank", "keyword", "builtin", "name", "number", "punctuation", "punctuation", "name",
        "other",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", [[1, 2, 3], [4]])
@pytest.mark.parametrize("limit", [None, 3])
def test_queues_follow_from_exits_as_the_decoder_traces_them(lm, limit, prompt):
    decoder = PiggybackDecoder(lm.model, max_deferred=limit)
    waiting, flushes = [], 0
    for seed in range(3):
        done = decoder.generate([prompt], 30, seeds=[seed])
        exits = [k + 1 for k in done.rows[0].exits]
        steps = list(queue_lengths(exits, 4, limit, deep_start=len(prompt) > 1))
        assert [tuple(w) for _, w in steps] == [t.widths for t in done.trace.tokens[1:]]
        assert steps[-1][0] == done.cache.deferred()[0]
        waiting += [n for n, _ in steps]
        flushes += done.trace.flushes
    assert max(waiting) > 1
    assert bool(flushes) == (limit is not None)
    assert limit is None or max(waiting) <= limit


def test_profile_counts_gates_and_the_gain_of_depth(lm, tmp_path):
    texts = [*TEXTS[:3], TEXTS[0] * 3]
    results, _, page = play(Profile(max_new_tokens=12), lm, tmp_path, Texts(texts))
    gates, gains = np.zeros((3, 10)), {}
    for text in texts:
        ids = torch.tensor([[0, *lm.encode(text)]])
        with torch.no_grad():
            output = lm.model(ids, output_exit_logits=True)
        g = output.gate_log_odds[0, :-1].sigmoid().numpy()
        gates += [np.histogram(g[:, k], bins=10, range=(0, 1))[0] for k in range(3)]
        logs = output.exit_logits[0, :-1].log_softmax(-1)
        for i, target in enumerate(ids[0, 1:]):
            place = sum(i + 2 > edge for edge in (8, 16, 32, 64, 128, 256, 512, 1024))
            gains.setdefault(place, []).append((logs[i, 3] - logs[i, :3])[:, target].numpy())
    sums = Histograms()
    for result in results:
        sums.add(result.values)
    np.testing.assert_array_equal(sums.gates, gates)
    assert len(gains) > 3
    for place, line in enumerate(sums.gain):
        assert line[0] == len(gains.get(place, ()))
        if line[0]:
            np.testing.assert_allclose(line[1:], np.sum(gains[place], axis=0), rtol=1e-9)
    assert sum(sums.queue) == 4 * 11
    tokens = sum(r.values["scored"]["tokens"] for r in results)
    lines = np.array(list(sums.classes.values()))
    assert lines[:, 0].sum() == tokens
    np.testing.assert_allclose(lines[:, 1:].sum(1), lines[:, 0])
    shares = np.sum([r.values["scored"]["shares"] for r in results], axis=0)
    np.testing.assert_allclose(lines[:, 1:].sum(0), shares)
    words = [
        (p, w)
        for r in results
        for p, w in zip(r.values["scored"]["pieces"], r.values["scored"]["depth"], strict=True)
    ]
    depth = sum(w for piece, w in words if token_class(piece) == "keyword")
    assert np.array(sums.classes["keyword"])[1:] @ [0.25, 0.5, 0.75, 1] == pytest.approx(depth)
    for words in ("Deferred work while generating", "What the routers answer", "depth gains"):
        assert words in page
