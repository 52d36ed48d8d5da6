"""Diagnostics: simulated rounds are those of decoding, and their sums are what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig, ItemResult, SampleRecord, TextRecord
from tenfold.report import render_html
from tenfold.stats import wilson
from tenfold.testing.context import FakeContext
from tenfold_treeflash.diagnostics import BINS, Diagnostics, calibration, histogram
from tenfold_treeflash.lm import Drafter, TreeDecoder, chain, marginal
from tenfold_treeflash.simulation import ENDINGS, simulate, whole_blocks
from training_cases import small_base
from treeflash_cases import drafter_for

SIZES = [1, 3, 9, 20]


@pytest.fixture(scope="module")
def base():
    return small_base()


@pytest.fixture(scope="module")
def drafter(base):
    return Drafter(drafter_for(base.model, dtype=torch.float32))


@pytest.fixture(scope="module")
def sample(base):
    """What the model writes greedily."""
    ids = base.encode("def f1(a, b):\n    return")
    [[done]] = base.generate([ids], GenerationConfig(max_new_tokens=40))
    return SampleRecord(
        id="one", prompt="", completion=done.text, prompt_ids=ids, completion_ids=done.token_ids
    )


class Data:
    def __init__(self, records):
        self.records = records

    def load(self):
        return iter(self.records)


def evaluated(evaluator, model, records, folder):
    ctx = FakeContext(folder)
    items = evaluator.plan(ctx, {"dataset": Data(records)})
    results = list(evaluator.run(ctx, {"model": model}, items))
    metrics = evaluator.aggregate(ctx, results)
    return results, metrics, list(evaluator.report(ctx, results, metrics))


@pytest.mark.parametrize("make", [TreeDecoder, marginal, chain])
def test_simulated_rounds_accept_what_decoding_accepts(base, drafter, sample, tmp_path, make):
    """Each place is decoded for real: a prompt that ends before it begins a round there."""
    model = make(base, drafter, tree_size=20)
    [result], metrics, _ = evaluated(
        Diagnostics(anchors=999, tree_sizes=SIZES), model, [sample], tmp_path
    )
    ids = [*sample.prompt_ids, *sample.completion_ids]
    block = drafter.network.config.block_size
    places = [p for p in whole_blocks(len(ids), block) if p >= len(sample.prompt_ids)]
    rounds = result.values["rounds"]
    assert rounds["count"] == len(places) > 20
    for size in SIZES:
        decoder = make(base, drafter, tree_size=size)
        [*answers] = decoder.generate(
            [ids[:place] for place in places], GenerationConfig(max_new_tokens=block + 3)
        )
        accepted = [answer.stats["accepted"][0] for [answer] in answers]
        assert rounds["tokens"][str(size)] == sum(accepted)
        found = next(
            m for m in metrics
            if (m.name, m.group) == ("block_efficiency", f"tree_size={size}")
        )  # fmt: skip
        assert found.value == pytest.approx(sum(accepted) / len(accepted))
    counted = {int(t): n for t, n in rounds["lengths"].items()}
    assert counted == {t: accepted.count(t) for t in sorted(set(accepted))}


def test_counts_add_up(base, drafter, sample, tmp_path):
    model = TreeDecoder(base, drafter, tree_size=4)
    [result], metrics, _ = evaluated(
        Diagnostics(anchors=999, tree_sizes=SIZES), model, [sample], tmp_path
    )
    rounds = result.values["rounds"]
    assert sum(rounds["endings"].values()) == rounds["count"] == rounds["reached"][0]
    assert set(rounds["endings"]) <= set(ENDINGS)
    assert rounds["passed"][:-1] == rounds["reached"][1:]
    ids = [*sample.prompt_ids, *sample.completion_ids]
    places = [p for p in whole_blocks(len(ids), 6) if p >= len(sample.prompt_ids)]
    settings = replace(model.settings, tree_size=max(SIZES))
    simulated = simulate(model.target, drafter.network, ids, places, settings)
    nodes, predicted, seen = (sum(row[i] for row in rounds["bins"]) for i in range(3))
    assert nodes == sum(len(r.tree) - 1 for r in simulated)
    assert seen == sum(len(r.path()) - 1 for r in simulated)
    assert predicted == pytest.approx(
        sum(r.tree.expected_block_efficiency() - 1 for r in simulated)
    )
    assert sum(m.value for m in metrics if m.name == "ended") == pytest.approx(1)
    assert sum(histogram([result]).values()) == rounds["count"]


def test_prompts_are_left_out(base, drafter, tmp_path):
    text = "def f1(a, b):\n    return a + b + 3\n"
    ids = base.encode(text)
    cut = len(ids) - 9
    own = SampleRecord(id="s", prompt="", completion="", prompt_ids=ids[:cut],
                       completion_ids=ids[cut:])  # fmt: skip
    model = TreeDecoder(base, drafter, tree_size=4)
    results, _, _ = evaluated(
        Diagnostics(anchors=999), model, [own, TextRecord(id="t", text=text)], tmp_path
    )
    counts = [r.values["rounds"]["count"] for r in results]
    assert counts == [9 - 6 + 1, len(whole_blocks(len(ids), 6))]


def test_aggregates_by_hand(tmp_path):
    def result(name, **changes):
        values = {
            "count": 4, "tokens": {"1": 4, "8": 10}, "endings": {"not-in-tree": 3,
            "whole-block": 1}, "lengths": {"1": 1, "3": 3}, "reached": [4, 3], "passed": [3, 3],
            "bins": [[0, 0.0, 0] for _ in range(BINS)],
        } | changes  # fmt: skip
        return ItemResult(name, {"kinds": {}, "rounds": values})

    bins = [[0, 0.0, 0] for _ in range(BINS)]
    bins[2], bins[9] = [10, 2.5, 4], [10, 9.5, 8]
    rows = [result("a", bins=bins), result("b", tokens={"1": 4, "8": 6})]
    metrics = Diagnostics().aggregate(FakeContext(tmp_path), rows)
    found = {(m.name, m.group): m for m in metrics}
    assert found["block_efficiency", "tree_size=1"].value == 1
    assert found["block_efficiency", "tree_size=8"].value == 2
    assert found["acceptance", "depth=1"].value == 6 / 8
    assert found["acceptance", "depth=1"].interval == wilson(6, 8)
    assert found["acceptance", "depth=2"].value == 1
    assert found["ended", "not-in-tree"].value == 6 / 8
    # |.25 - .4| and |.95 - .8|, ten nodes each.
    assert found["calibration_error", ""].value == pytest.approx(0.15)
    assert calibration(rows) == [(10, 0.25, 0.4), (10, 0.95, 0.8)]
    assert histogram(rows) == {1: 2, 3: 6}


def test_the_report_draws_every_measure(base, drafter, sample, tmp_path):
    model = TreeDecoder(base, drafter, tree_size=4)
    _, _, blocks = evaluated(Diagnostics(anchors=20), model, [sample], tmp_path)
    page = render_html("Report", blocks)
    for caption in ("Tokens per round by tree size", "get past a depth", "Why walks ended",
                    "Rounds by their number of tokens", "probability of its path", "tvd",
                    "coverage@16"):  # fmt: skip
        assert caption in page
    short = TextRecord(id="short", text="return a +")
    [result], metrics, blocks = evaluated(Diagnostics(), model, [short], tmp_path)
    assert result.values["rounds"]["count"] == 0
    assert not [m for m in metrics if m.name == "block_efficiency"]


@pytest.mark.parametrize("settings", [{"tree_sizes": []}, {"tree_sizes": [0]}, {"coverage": []}])
def test_empty_lists_are_refused(settings):
    with pytest.raises(ConfigError, match="name numbers of at least 1"):
        Diagnostics(**settings)
