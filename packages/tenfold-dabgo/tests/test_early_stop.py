"""Early stopping against the full pass: the same top groups, as often as it promises."""

from __future__ import annotations

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.early_stop import FIRST, TopGroups, student_quantile
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.queries import Query
from tenfold_dabgo.settings import AttributionSettings


def stopped(scores, labels, k, delta, seed=0, usable=None):
    """The groups' means as found, and the chooser."""
    usable = np.ones(len(scores), dtype=bool) if usable is None else usable
    groups = TopGroups(labels, usable, k, delta, seed)
    seen = np.full(len(scores), np.nan)
    while len(chosen := groups.next()):
        assert np.isnan(seen[chosen]).all()  # nothing is scored twice
        seen[chosen] = scores[chosen]
        groups.judge(seen)
    return seen, groups


def top(scores, labels, k):
    """The k groups with the largest means of the scored samples."""
    labels = np.asarray(labels)
    means = {g: np.nanmean(scores[labels == g]) for g in set(labels)}
    return set(sorted(means, key=lambda g: -means[g])[:k])


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    # Tables of Student's t.
    [(0.975, 7, 2.3646), (0.995, 7, 3.4995), (0.975, 30, 2.0423), (0.9995, 10, 4.5869),
     (0.9995, 60, 3.4602), (0.999, 1000, 3.0984)],
)  # fmt: skip
def test_quantiles_of_student(level, freedom, expected):
    assert student_quantile(level, freedom) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy"])
def test_the_set_is_wrong_no_more_often_than_promised(shape):
    """The oracle is the full pass over the same population, 200 times."""
    delta, wrong, share = 0.1, 0, []
    for trial in range(200):
        generator = np.random.default_rng(trial)
        sizes = generator.integers(5, 160, size=12)
        labels = np.repeat([f"g{i}" for i in range(12)], sizes)
        centers = np.repeat(generator.normal(0, 0.5, size=12), sizes)
        noise = {
            "normal": lambda n, g=generator: g.normal(size=n),
            "skewed": lambda n, g=generator: g.exponential(size=n) - 1,
            "heavy": lambda n, g=generator: g.standard_t(4, size=n),
        }[shape](len(labels))
        scores = centers + noise
        seen, groups = stopped(scores, labels, 3, delta, seed=trial)
        wrong += top(seen, labels, 3) != top(scores, labels, 3)
        share.append(groups.report("g").scored / len(scores))
    assert wrong / 200 <= delta
    assert np.mean(share) < 0.95  # and it saves something on such noisy groups


def test_clear_groups_are_settled_in_the_first_round():
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c", "d"], 500)
    scores = np.repeat([3.0, 2.0, 0.0, -1.0], 500) + generator.normal(0, 0.1, size=2000)
    seen, groups = stopped(scores, labels, 2, 0.01)
    assert top(seen, labels, 2) == {"a", "b"}
    report = groups.report("letter")
    assert (report.scored, report.of, report.rounds) == (4 * FIRST, 2000, 2)
    assert report.dropped == 4


def test_equal_groups_are_scored_completely_and_the_result_is_exact():
    labels = np.repeat(["a", "b", "c"], 50)
    scores = np.tile(np.linspace(-1, 1, 50), 3)
    seen, groups = stopped(scores, labels, 1, 0.05)
    np.testing.assert_array_equal(seen, scores)
    assert groups.report("x").dropped == 0


def test_small_groups_are_scored_completely_at_once():
    labels = np.repeat([f"g{i}" for i in range(6)], FIRST)
    scores = np.random.default_rng(0).normal(size=len(labels))
    seen, groups = stopped(scores, labels, 2, 0.05)
    np.testing.assert_array_equal(seen, scores)
    assert groups.rounds == 1


def test_unusable_samples_never_come_up_and_k_may_exceed_the_groups():
    labels = ["a"] * 20 + ["b"] * 20 + ["c"] * 2
    usable = np.array([i % 2 == 0 for i in range(42)])
    usable[40:] = False
    seen, groups = stopped(np.arange(42.0), labels, 9, 0.05, usable=usable)
    assert np.isfinite(seen).sum() == 2 * FIRST
    assert np.isnan(seen[~usable]).all()
    assert groups.names == ["a", "b"]


@pytest.mark.parametrize(("k", "delta"), [(0, 0.1), (1, 0.0), (1, 1.0), (1, -2.0)])
def test_bad_numbers_are_refused(k, delta):
    with pytest.raises(ConfigError):
        TopGroups(["a"], np.array([True]), k, delta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stop": 1.0}, "a probability between 0 and 1"),
        ({"early_stop": 0.1, "prefilter": 0.5}, "does not go with prefilter"),
        ({"early_stop": 0.1, "method": "bm25"}, "method = 'bm25'"),
        ({"early_stop": 0.1, "preset": "paper"}, "view = 'abs'"),
        ({"early_stop": 0.1, "how": "max"}, "how = 'max'"),
        ({"early_stop": 0.1, "window": 8, "stride": 4}, "stride = 4 below the window"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AttributionSettings(**settings)
    assert AttributionSettings().early_stop is None  # off by default


# --- In the method ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(make):
    """Four groups of 40 texts: one repeats the query's letters, the others do not."""
    generator = np.random.default_rng(0)
    rows, columns = [], []
    for i in range(160):
        group = i % 4
        low = 2 + 11 * group
        rows.append(generator.integers(low, low + 8, size=12).tolist())
        columns.append({"author": f"a{group}", "lot": f"l{i // 4 % 4}"})
    dataset = TokenDataset.from_ids(rows, metadata=columns)
    model = make.train(make.gpt2(), dataset, steps=40)
    return model, dataset, estimate_fisher(model, dataset)


QUERY = Query("q", (3, 4), (5, 6, 7, 8))


def test_the_top_group_is_found_with_a_part_of_the_pass(setting, tmp_path):
    model, dataset, fisher = setting
    whole = BidirectionalAttributor(model, dataset, fisher, token_top=1).score(QUERY)
    attributor = BidirectionalAttributor(
        model, dataset, fisher, token_top=1, early_stop=0.05, early_stop_by="author",
        work_dir=tmp_path,
    )  # fmt: skip
    result = attributor.score(QUERY)
    labels = dataset.column("author")
    assert top(result.values, labels, 1) == top(whole.values, labels, 1) == {"a0"}
    facts = result.details["early_stop"]
    assert facts["scored"] == result.scored.sum() < 160
    assert facts["of"] == 160
    scored = result.scored
    np.testing.assert_allclose(result.values[scored], whole.values[scored], atol=1e-6)
    assert all(scored[row.index] for row in result.topk(10))
    assert not list(tmp_path.rglob("*.npz"))


def test_an_interrupted_round_resumes_with_the_same_samples(setting, tmp_path):
    model, dataset, fisher = setting
    # Lots are arbitrary, so that telling them apart takes all rounds.
    options = {"token_top": 2, "early_stop": 1e-3, "early_stop_by": "lot", "shard_samples": 20}
    expected = BidirectionalAttributor(model, dataset, fisher, **options).score(QUERY)
    assert expected.details["early_stop"]["rounds"] > 2
    attributor = BidirectionalAttributor(model, dataset, fisher, work_dir=tmp_path, **options)
    plain = model.token_loss

    def dies(batch):
        if list(tmp_path.rglob("*-round-2/*.npz")):
            raise KeyboardInterrupt
        return plain(batch)

    model.token_loss = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            attributor.score(QUERY)
    finally:
        del model.token_loss
    assert list(tmp_path.rglob("*-round-1/*.npz"))
    again = attributor.score(QUERY)
    np.testing.assert_array_equal(again.values, expected.values)
    assert again.details["early_stop"] == expected.details["early_stop"]
    assert not list(tmp_path.rglob("*.npz"))
