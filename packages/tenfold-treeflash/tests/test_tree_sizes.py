"""Every tree size on the same prompts: counts are exact, times add up."""

from __future__ import annotations

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig, ItemResult, PromptRecord
from tenfold.report import render_html
from tenfold.testing.context import FakeContext
from tenfold_treeflash.lm import Drafter, TreeDecoder
from tenfold_treeflash.tree_sizes import STAGES, TreeSizes
from training_cases import small_base
from treeflash_cases import drafter_for

PROMPTS = ["def f1(", "return a"]


class Data:
    def load(self):
        return iter(PromptRecord(id=str(i), prompt=p) for i, p in enumerate(PROMPTS))


@pytest.fixture(scope="module")
def model():
    base = small_base()
    return TreeDecoder(base, Drafter(drafter_for(base.model, dtype=torch.float32)), tree_size=4)


def evaluated(evaluator, model, folder):
    ctx = FakeContext(folder)
    items = evaluator.plan(ctx, {"dataset": Data()})
    results = list(evaluator.run(ctx, {"model": model}, items))
    return results, evaluator.aggregate(ctx, results), list(
        evaluator.report(ctx, results, evaluator.aggregate(ctx, results))
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_are_those_of_decoding_with_that_size(model, tmp_path, temperature):
    evaluator = TreeSizes([1, 6], max_new_tokens=12, rounds=2, temperature=temperature, seed=3)
    results, metrics, _ = evaluated(evaluator, model, tmp_path)
    found = {(m.name, m.group): m.value for m in metrics}
    assert found["block_efficiency", "tree_size=1"] == 1
    for result, prompt in zip(results, PROMPTS, strict=True):
        sizes = result.values["sizes"]
        if temperature == 0:
            decoder = TreeDecoder(model.base, model.drafter, tree_size=6)
            [[plain]] = decoder.generate([prompt], GenerationConfig(max_new_tokens=12))
            assert sizes["6"]["accepted"] == plain.stats["accepted"]
        # Sizes write the same text from the same seed.
        assert sizes["1"]["tokens"] == sizes["6"]["tokens"] == 1 + sum(sizes["6"]["accepted"])
        for row in sizes.values():
            assert len(row["decode_s"]) == len(row["stages"]) == 2
            for seconds, stages in zip(row["decode_s"], row["stages"], strict=True):
                assert set(stages) == set(STAGES)
                assert 0 < stages["verify"] < seconds


def test_aggregates_by_hand(tmp_path):
    def row(seconds, accepted):
        stages = dict.fromkeys(STAGES, 0.0) | {"verify": seconds / 2}
        return {"decode_s": [seconds, 9.0, 0.0], "stages": [stages] * 3, "accepted": accepted,
                "tokens": 1 + sum(accepted)}  # fmt: skip

    rows = [ItemResult("a", {"sizes": {"8": row(2.0, [3, 1])}}),
            ItemResult("b", {"sizes": {"8": row(3.0, [2])}})]  # fmt: skip
    metrics = TreeSizes().aggregate(FakeContext(tmp_path), rows)
    found = {m.name: m.value for m in metrics}
    assert found["decode_tokens_per_second"] == pytest.approx(6 / 5)
    assert found["block_efficiency"] == 2
    assert found["verify_ms"] == pytest.approx(1000 * 2.5 / 3)


def test_the_report_draws_speed_efficiency_and_stages(model, tmp_path):
    _, _, blocks = evaluated(TreeSizes([1, 6], max_new_tokens=6, rounds=1), model, tmp_path)
    page = render_html("Report", blocks)
    for caption in ("Decoding after the first token", "Tokens per round", "stage upon stage"):
        assert caption in page


def test_bad_settings_and_models_are_refused(model, tmp_path):
    for settings, message in (
        ({"tree_sizes": []}, "name numbers of at least 1"),
        ({"max_new_tokens": 1}, "needs at least 2"),
        ({"temperature": float("nan")}, "must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            TreeSizes(**settings)
    with pytest.raises(ConfigError, match="needs a model with a drafter"):
        evaluated(TreeSizes(), model.base, tmp_path)
