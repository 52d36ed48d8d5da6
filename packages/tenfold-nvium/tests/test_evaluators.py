"""Evaluators: the exactness check passes here and fails on a broken decoder; profiles add up."""

from __future__ import annotations

import pytest
from nvium_cases import TEXTS, Texts, tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import PromptRecord
from tenfold.report import render_html
from tenfold.testing.context import FakeContext
from tenfold_nvium.exactness import Exactness
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
