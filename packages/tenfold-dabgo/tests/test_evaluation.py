"""Quality metrics: definitions, closed forms, and the retraining harness's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation import counterfactual, labels
from tenfold_dabgo.evaluation.retrain import (
    Recipe,
    Retrainer,
    batches_of,
    fresh_weights,
    half_subsets,
)
from tenfold_dabgo.evaluation.tail_patch import (
    Patch,
    log_probability,
    patch_effect,
    random_strings,
    relative_change,
)
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import fingerprint

QUERY = Query("q", (3, 4), (5, 6, 7))


# --- Counterfactual metrics -----------------------------------------------------------------


def test_lds_is_one_for_an_additive_world_and_minus_one_for_its_opposite():
    generator = np.random.default_rng(0)
    effects = generator.normal(size=(2, 30))
    subsets = half_subsets(30, 40, seed=1)
    losses = -(subsets @ effects.T)
    np.testing.assert_allclose(counterfactual.lds(effects, subsets, losses), 1.0)
    np.testing.assert_allclose(counterfactual.lds(-effects, subsets, losses), -1.0)
    unrelated = counterfactual.lds(generator.normal(size=(2, 30)), subsets, losses)
    assert np.abs(unrelated).max() < 0.6


def test_lds_equals_dattri():
    metrics = pytest.importorskip("dattri.metric")
    generator = np.random.default_rng(0)
    scores, subsets = generator.normal(size=(3, 20)), half_subsets(20, 15, 0)
    losses = generator.normal(size=(15, 3))
    members = torch.stack([torch.from_numpy(np.flatnonzero(s)) for s in subsets])
    expected = metrics.lds(torch.from_numpy(scores.T), (-torch.from_numpy(losses), members))[0]
    np.testing.assert_allclose(counterfactual.lds(scores, subsets, losses), expected, atol=1e-6)


def test_samples_without_a_score_count_as_zero():
    scores = np.array([[1.0, np.nan, -1.0]])
    subsets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    losses = np.array([[0.0], [1.0], [2.0]])
    assert counterfactual.lds(scores, subsets, losses)[0] == pytest.approx(1.0)


def test_half_subsets_have_the_asked_size_and_are_fixed_by_the_seed():
    subsets = half_subsets(21, 5, seed=3)
    assert subsets.sum(axis=1).tolist() == [10] * 5
    np.testing.assert_array_equal(subsets, half_subsets(21, 5, seed=3))
    assert (subsets[0] != subsets[1]).any()


def test_loo_removal_and_ceiling_definitions():
    scores = np.array([[0.3, 0.1, 0.9]])
    losses = np.array([[2.0], [1.0], [3.0]])
    assert counterfactual.loo(scores, np.array([0, 1, 2]), losses)[0] == pytest.approx(1.0)
    effect = counterfactual.removal_effect(np.array([[2.0], [4.0]]), np.array([[1.0], [2.0]]))
    assert effect.tolist() == [1.5]
    assert counterfactual.noise_ceiling(losses, losses)[0] == pytest.approx(1.0)
    values = np.array([0.5, np.nan, 0.5, 0.9])
    assert counterfactual.removed_samples(values, 3).tolist() == [3, 0, 2]


def test_wilcoxon_is_exact_for_few_pairs_and_close_to_normal_for_many():
    zeros = np.zeros(5)
    assert counterfactual.wilcoxon_signed_rank(np.arange(1.0, 6.0), zeros) == pytest.approx(2 / 32)
    assert counterfactual.wilcoxon_signed_rank(zeros, zeros) == 1.0
    generator = np.random.default_rng(0)
    x = generator.normal(0.6, 1, 16)
    small = counterfactual.wilcoxon_signed_rank(x, np.zeros(16))
    large = counterfactual.wilcoxon_signed_rank(np.r_[x, 1e-9], np.zeros(17))
    assert small == pytest.approx(large, abs=0.02)


def test_estimates_carry_error_interval_and_count():
    e = counterfactual.estimate(np.array([1.0, 2.0, 3.0, np.nan]))
    assert (e.value, e.n) == (2.0, 3)
    assert e.error == pytest.approx(1 / math.sqrt(3))
    assert e.interval is not None
    assert e.interval[0] <= 2.0 <= e.interval[1]
    assert math.isnan(counterfactual.estimate(np.array([np.nan])).value)


# --- Retraining -----------------------------------------------------------------------------


def test_every_training_set_gets_the_same_number_of_full_batches():
    for size in (3, 8, 20):
        batches = list(batches_of(np.arange(size), Recipe(steps=7, batch_size=8), seed=0))
        assert len(batches) == 7
        assert all(len(b) == min(size, 8) or size < 8 for b in batches)
    epochs = np.concatenate(list(batches_of(np.arange(8), Recipe(steps=2, batch_size=4), 0)))
    assert sorted(epochs.tolist()) == list(range(8))


def test_steps_are_equal_or_in_proportion_to_the_set():
    assert Recipe(steps=120).for_share(0.5).steps == 120
    assert Recipe(steps=120, same_epochs=True).for_share(0.5).steps == 60
    assert Recipe(steps=120, same_epochs=True).for_share(0.0).steps == 1


def test_cosine_schedule_with_warmup():
    recipe = Recipe(steps=10, warmup_ratio=0.2, lr=1.0)
    assert recipe.rate(0) == 0.5
    assert recipe.rate(2) == 1.0
    assert recipe.rate(9) < 0.05
    with pytest.raises(ConfigError, match="above 0"):
        Recipe(steps=0)


def test_initialization_and_order_have_seeds_of_their_own(make):
    model, dataset = make.gpt2(), make.corpus(12)
    before = fingerprint(model)
    trainer = Retrainer(model, dataset, [QUERY], Recipe(steps=5, batch_size=4))
    everything = np.arange(12)
    base = trainer.query_losses(everything)
    assert trainer.query_losses(everything) == base
    assert trainer.query_losses(everything, init_seed=1) != base
    assert trainer.query_losses(everything, order_seed=1) != base
    assert fingerprint(model) == before
    a, b = fresh_weights(model, 3), fresh_weights(model, 3)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_retraining_learns_what_it_is_given(make):
    model, dataset = make.gpt2(), make.corpus(12)
    query = Query("copy", (), tuple(dataset.ids(4).tolist()))
    trainer = Retrainer(model, dataset, [query], Recipe(steps=60, batch_size=8, lr=5e-3))
    everything = np.arange(12)
    with_it = trainer.query_losses(everything)[0]
    without = trainer.query_losses(np.delete(everything, 4))[0]
    assert without > with_it + 0.5


def test_outcomes_are_kept_and_reused(make, tmp_path):
    model, dataset = make.gpt2(), make.corpus(6)
    trainer = Retrainer(model, dataset, [QUERY], Recipe(steps=3, batch_size=4), tmp_path)
    first = trainer.query_losses(np.arange(5))
    model.token_loss = None
    np.testing.assert_array_equal(trainer.query_losses(np.arange(5)), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_retraining_needs_samples_and_a_configuration(make):
    model = make.gpt2()
    dataset = TokenDataset.from_ids([[1, 2], [3]])
    with pytest.raises(ConfigError, match="no training sample is left"):
        Retrainer(model, dataset, [QUERY]).train(np.array([1]))
    model.model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="transformers model"):
        fresh_weights(model, 0)


# --- Tail-patch -----------------------------------------------------------------------------


def test_joint_and_individual_agree_for_one_sample_without_clipping(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(3)
    effects = [
        patch_effect(model, QUERY, [dataset.ids(0)], Patch(variant=v, lr=1e-3, clip=0.0))
        for v in ("joint", "individual")
    ]
    assert effects[0] == effects[1]


def test_individual_patches_are_means_of_separate_steps(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(3)
    patch = Patch("individual", lr=1e-3, clip=0.0)
    single = [patch_effect(model, QUERY, [dataset.ids(i)], patch) for i in range(3)]
    together = patch_effect(model, QUERY, [dataset.ids(i) for i in range(3)], patch)
    assert together.d_log_p == pytest.approx(np.mean([e.d_log_p for e in single]))
    assert together.d_p == pytest.approx(np.mean([e.d_p for e in single]))


def test_sgd_patch_changes_the_loss_by_the_gradient_product(make):
    """d log P = lr n <g_i, g_x> to first order, n scored tokens."""
    from tenfold_dabgo.baselines.gradient import GradientAttributor

    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(3)
    dot = next(iter(GradientAttributor(model, dataset).attribute([QUERY]))).values[1]
    patch = Patch(lr=1e-6, clip=0.0, weight_decay=0.0, optimizer="sgd")
    effect = patch_effect(model, QUERY, [dataset.ids(1)], patch)
    assert effect.d_log_p == pytest.approx(1e-6 * 3 * dot, rel=1e-3)
    assert effect.relative_percent == pytest.approx(100 * abs(math.expm1(effect.d_log_p)))


def test_log_probability_never_underflows(make):
    model = make.gpt2(dtype=torch.float64)
    before = fingerprint(model)
    plain = model.token_loss
    model.token_loss = lambda batch: plain(batch) * 1e3
    assert log_probability(model, QUERY) < -5000
    effect = patch_effect(model, QUERY, [[1, 2, 3]], Patch(lr=1e-3))
    assert math.isfinite(effect.d_log_p)
    del model.token_loss
    assert fingerprint(model) == before
    assert relative_change(0.0) == 0.0
    assert relative_change(1e4) == math.inf


def test_random_strings_are_a_fixed_control():
    a, b = (random_strings(3, 5, 48, 0, "q") for _ in range(2))
    assert [x.tolist() for x in a] == [x.tolist() for x in b]
    assert all(len(x) == 5 for x in a)
    assert max(int(x.max()) for x in a) < 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"variant": "both"}, "known: joint"), ({"lr": 0.0}, "more than 0"),
     ({"optimizer": "lion"}, "known: adamw")],
)  # fmt: skip
def test_bad_patches_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        Patch(**settings)
    with pytest.raises(ConfigError, match="at least one sample"):
        patch_effect(make.gpt2(), QUERY, [], Patch())


# --- Labels ---------------------------------------------------------------------------------

SCORES = np.array([0.9, np.nan, 0.1, 0.8, 0.5])
RELEVANT = np.array([False, True, False, True, True])


def test_label_metrics_on_a_small_ranking():
    """Order: 0, 3, 4, 2; relevant: 3 and 4 (1 has no score)."""
    assert labels.precision_at_k(SCORES, RELEVANT, 2) == 0.5
    assert labels.recall_at_k(SCORES, RELEVANT, 2) == 0.5
    assert labels.reciprocal_rank(SCORES, RELEVANT) == 0.5
    assert labels.average_precision(SCORES, RELEVANT) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert labels.precision_at_k(SCORES, RELEVANT, 99) == 0.5


def test_label_metrics_without_relevant_samples():
    none = np.zeros(5, dtype=bool)
    assert labels.reciprocal_rank(SCORES, none) == 0.0
    assert math.isnan(labels.recall_at_k(SCORES, none, 2))
    assert math.isnan(labels.average_precision(SCORES, none))


def test_cardinality_tells_whether_all_queries_get_the_same_samples():
    assert labels.top_k_cardinality([SCORES, SCORES], 2) == 0.5
    assert labels.top_k_cardinality([SCORES, -SCORES], 2) == 1.0
