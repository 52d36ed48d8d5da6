"""DABGO end to end on tiny models: laws of scores, restoration, prefilter, noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError, RunFailed
from tenfold_dabgo import attributor as attributor_module
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import spearman
from tenfold_dabgo.weights import fingerprint

QUERY = Query("q", (3, 4), (5, 6, 7, 8))


@pytest.fixture(scope="module")
def setting(make):
    model, dataset = make.gpt2(), make.corpus(40)
    make.train(model, dataset, steps=40)
    return model, dataset, estimate_fisher(model, dataset)


def attribute(setting, query=QUERY, perturbation=None, **options):
    model, dataset, fisher = setting
    attributor = BidirectionalAttributor(
        model, dataset, fisher, perturbation or Perturbation(), **options
    )
    return next(iter(attributor.attribute([query])))


def test_weights_and_flags_are_bit_identical_afterwards(setting):
    model = setting[0]
    before = {n: t.clone() for n, t in model.module().state_dict().items()}
    model.module().train()
    attribute(setting, token_top=3, base_losses=True, prefilter=0.2)
    for name, value in model.module().state_dict().items():
        assert torch.equal(value, before[name])
    assert model.module().training
    assert all(p.requires_grad and p.grad is None for p in model.module().parameters())
    model.module().eval()


def test_weights_are_restored_after_an_error(setting):
    model = setting[0]
    before = fingerprint(model)
    with pytest.raises(RunFailed, match="diverged"):
        attribute(setting, perturbation=Perturbation(lr=1e9, damping=1e-6, steps=20))
    assert fingerprint(model) == before


def test_no_steps_and_no_step_size_give_no_scores(setting):
    """K = 0: every score is 0, which is reported as below the noise floor."""
    with pytest.raises(RunFailed, match="noise floor"):
        attribute(setting, perturbation=Perturbation(steps=0, lr=0.1))
    with pytest.raises(RunFailed, match=r"scores are equal \(0\).*noise floor"):
        attribute(setting, perturbation=Perturbation(lr=1e-30))


def test_two_runs_are_bit_equal(setting):
    a, b = attribute(setting, token_top=3), attribute(setting, token_top=3)
    np.testing.assert_array_equal(a.values, b.values)
    assert a.details["trace"] == b.details["trace"]


def test_scores_do_not_depend_on_batch_sizes(setting):
    reference = attribute(setting).values
    for budget in (1, 64):
        assert spearman(attribute(setting, token_budget=budget).values, reference) > 0.999


def test_mean_of_token_scores_is_the_sample_score(setting):
    result = attribute(setting, all_tokens=True)
    assert len(result.tokens) == len(setting[1])
    for i, values in result.tokens.items():
        assert np.nanmean(values) == pytest.approx(result.values[i], abs=1e-6)


def test_views_are_computed_from_the_same_losses(setting):
    result = attribute(setting, base_losses=True)
    np.testing.assert_allclose(
        result.scores("ascent") + result.scores("descent"), result.scores("signed"), atol=1e-12
    )
    np.testing.assert_array_equal(result.scores("abs"), np.abs(result.values))
    with pytest.raises(ConfigError, match="base losses"):
        attribute(setting).scores("ascent")


def test_a_copy_of_the_query_in_the_corpus_is_its_top_proponent(setting):
    """Signs: learning the text lowers the loss of its copy, so it is a proponent."""
    _model, dataset, _ = setting
    query = Query("copy", (), tuple(dataset.ids(7).tolist()))
    result = attribute(setting, query)
    top = result.topk(1)[0]
    assert top.sample_id == "7"
    assert top.score > 0
    assert result.topk(1, "opponents")[0].score < 0
    trace = result.details["trace"]
    assert trace["ascent"][-1]["loss"] > trace["ascent"][0]["loss"] > trace["descent"][-1]["loss"]
    assert trace["ascent"][0]["kl"] == 0.0
    assert trace["ascent"][-1]["kl"] > 0
    assert trace["descent"][-1]["distance"] > 0


def test_only_selected_weights_move(setting):
    model, dataset, fisher = setting
    attributor = BidirectionalAttributor(model, dataset, fisher, Perturbation(params="mlp"))
    moved = attributor.perturb(QUERY)
    assert moved.ascent
    assert all("mlp" in name for name in moved.ascent)


def test_prefilter_rescores_both_ends_exactly_and_estimates_its_recall(setting):
    exact = attribute(setting)
    result = attribute(setting, prefilter=0.25, token_top=3)
    assert result.exact is not None
    chosen = result.exact
    np.testing.assert_allclose(result.values[chosen], exact.values[chosen], atol=1e-5)
    assert {r.index for r in result.topk(3)} == {r.index for r in exact.topk(3)}
    facts = result.details["prefilter"]
    assert facts["correlation"] > 0.9
    assert 0 < facts["recall"] <= 1
    assert np.isfinite(result.values).all()
    assert all(result.exact[r.index] for r in result.topk(5))


def test_prefiltered_results_do_not_depend_on_the_other_queries(setting):
    model, dataset, fisher = setting
    others = [Query(str(i), (i,), (i + 1, i + 2)) for i in range(3)]
    attributor = BidirectionalAttributor(model, dataset, fisher, prefilter=0.1)
    together = list(attributor.attribute([*others, QUERY]))[-1]
    alone = next(iter(attributor.attribute([QUERY])))
    np.testing.assert_array_equal(together.values, alone.values)
    with pytest.raises(ConfigError, match="share of the corpus"):
        attribute(setting, prefilter=1.5)


def test_a_killed_attribution_resumes_with_identical_losses(setting, tmp_path):
    """Finished shards are reused; what comes out equals an uninterrupted run bit for bit."""
    model, options = setting[0], {"shard_samples": 8, "token_budget": 30}
    reference = attribute(setting, **options)
    plain, calls = model.token_loss, []

    def dies(batch):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return plain(batch)

    model.token_loss = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            attribute(setting, work_dir=tmp_path, **options)
        finished = len(list(tmp_path.rglob("*.npz")))
        assert 0 < finished < 5
        calls[:] = []
        model.token_loss = lambda batch: calls.append(1) or plain(batch)
        again = attribute(setting, work_dir=tmp_path, **options)
        resumed = len(calls)
        calls[:] = []
        attribute(setting, work_dir=tmp_path, **options)
    finally:
        del model.token_loss
    np.testing.assert_array_equal(again.values, reference.values)
    assert resumed < len(calls)
    assert not list(tmp_path.rglob("*.npz"))


def test_noise_is_reported_and_small_steps_are_warned_about(setting):
    healthy = attribute(setting)
    assert healthy.details["noise"]["ratio"] > 100
    assert healthy.details["warnings"] == []
    tiny = attribute(setting, perturbation=Perturbation(lr="auto:1e-6"))
    assert any("rounding noise" in w for w in tiny.details["warnings"])


def test_low_precision_is_used_only_when_it_ranks_alike(setting):
    gentle = attribute(setting, perturbation=Perturbation(lr="auto:1e-4"), precision="bfloat16")
    assert gentle.details["precision"] == "float32"
    assert any("ranks a probe differently" in w for w in gentle.details["warnings"])


def test_the_noise_of_a_lower_precision_is_measured_against_single(setting, monkeypatch):
    """The floor is no smaller than half of the real error of the scores."""
    monkeypatch.setattr(attributor_module, "low_precision_agrees", lambda *_: (True, 1.0))
    exact, low = (attribute(setting, precision=p) for p in ("float32", "bfloat16"))
    assert low.details["precision"] == "bfloat16"
    error = np.sqrt(np.nanmean((low.values - exact.values) ** 2))
    assert error / 2 < low.details["noise"]["floor"] < 4 * error
    assert low.details["noise"]["floor"] > 100 * exact.details["noise"]["floor"]


def test_other_rules_attribute_too(setting):
    reference = attribute(setting)
    for settings in (
        Perturbation(method="ewc_adamw", lr=1e-3),
        Perturbation(method="sgd"),
        Perturbation(method="sign_sgd"),
        Perturbation.paper(),
    ):
        result = attribute(setting, perturbation=settings)
        assert spearman(result.values, reference.values) > 0.2
