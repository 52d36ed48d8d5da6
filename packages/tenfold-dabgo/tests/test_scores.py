"""Scores, rankings, roll-ups and grains on hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.granularity import document_scores, document_tokens, spans, vocabulary_scores
from tenfold_dabgo.rollup import aggregate, merge_windows
from tenfold_dabgo.scores import AttributionResult, packed_ids, spearman, unpacked_ids


def result(values, dataset=None, **extra):
    values = np.asarray(values, dtype=float)
    if dataset is None:
        columns = [{"module": f"m{i % 2}"} for i in range(len(values))]
        dataset = TokenDataset.from_ids([[1, 2, 3]] * len(values), metadata=columns)
    return AttributionResult("q", "dabgo", dataset, values, **extra)


def test_proponents_and_opponents_are_the_two_ends():
    r = result([0.1, -0.5, 0.9, np.nan, 0.2])
    assert [(x.rank, x.sample_id) for x in r.topk(2)] == [(1, "2"), (2, "4")]
    assert [x.sample_id for x in r.topk(2, "opponents")] == ["1", "0"]
    assert [x.sample_id for x in r.topk(2, view="abs")] == ["2", "1"]


def test_ties_go_to_the_earlier_sample_and_nan_never_ranks():
    r = result([1.0, np.nan, 1.0, 1.0])
    assert [x.index for x in r.topk(10)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "k is 0"), ((1, "best"), "direction"), ((1, "proponents", "raw"), "view is 'raw'")],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        result([1.0]).topk(*arguments)


def test_comparison_is_spearman_and_overlap():
    a, b = result([1, 2, 3, 4]), result([1, 2, 3, 4])
    assert a.compare(b, k=2) == {"spearman": pytest.approx(1.0), "overlap@2": 1.0}
    c = result([4, 3, 2, 1])
    assert a.compare(c, k=2) == {"spearman": pytest.approx(-1.0), "overlap@2": 0.0}
    with pytest.raises(ConfigError, match="different corpora"):
        a.compare(result([1, 2]))


def test_spearman_gives_ties_their_mean_rank():
    assert spearman(np.array([1, 2, 2, 3]), np.array([10, 20, 20, 30])) == pytest.approx(1.0)
    x, y = np.array([1.0, 2, 2, 4, 5]), np.array([2.0, 1, 3, 3, 5])
    ranks_x, ranks_y = [1, 2.5, 2.5, 4, 5], [2, 1, 3.5, 3.5, 5]
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks_x, ranks_y)[0, 1])
    assert np.isnan(spearman(np.array([1.0]), np.array([1.0])))
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_reductions_of_a_group():
    r = result([1.0, -2.0, 3.0, 4.0, np.nan, 0.5])  # m0: 1, 3, nan; m1: -2, 4, 0.5
    value = {
        how: {g.name: g.value for g in aggregate(r, "module", how)}
        for how in ("sum", "mean", "max", "share", "topk_mean:2")
    }
    assert value["sum"] == {"m0": 4.0, "m1": 2.5}
    assert value["mean"] == {"m0": 2.0, "m1": pytest.approx(2.5 / 3)}
    assert value["max"] == {"m0": 3.0, "m1": 4.0}
    assert value["share"] == {"m0": pytest.approx(4 / 8.5), "m1": pytest.approx(4.5 / 8.5)}
    assert value["topk_mean:2"] == {"m0": 2.0, "m1": 2.25}
    groups = aggregate(r, "module", "mean")
    assert [(g.name, g.n, g.best) for g in groups] == [("m0", 2, "2"), ("m1", 3, "3")]
    with pytest.raises(ConfigError, match="reduction is 'median'"):
        aggregate(r, "module", "median")


def test_intervals_cover_the_mean_about_95_percent_of_the_time():
    generator = np.random.default_rng(0)
    dataset = TokenDataset.from_ids([[1, 2]] * 40, metadata=[{"g": "x"}] * 40)
    hits = 0
    for _ in range(200):
        group = aggregate(result(generator.normal(1.0, 1.0, 40), dataset), "g", "mean")[0]
        assert group.interval is not None
        hits += group.interval[0] <= 1.0 <= group.interval[1]
    assert 0.88 <= hits / 200 <= 0.99


def test_a_group_of_one_has_no_interval():
    assert aggregate(result([1.0]), "sample", "mean")[0].interval is None


def overlapping():
    """One document of 6 tokens in windows [0, 4) and [2, 6), and one of 2 tokens."""
    return TokenDataset.from_ids(
        [list(range(6)), [7, 8]],
        ids=["a", "b"],
        metadata=[{"m": "x"}, {"m": "y"}],
        window=4,
        stride=2,
    )


def test_tokens_in_two_windows_count_once():
    dataset = overlapping()
    tokens = {
        0: np.array([np.nan, 1.0, 2.0, 3.0]),
        1: np.array([np.nan, 5.0, 6.0, 7.0]),
        2: np.array([np.nan, 9.0]),
    }
    merged = document_tokens(dataset, tokens)
    np.testing.assert_array_equal(merged[0], [np.nan, 1, 2, 4, 6, 7])
    assert document_scores(dataset, tokens) == {0: 4.0, 1: 9.0}


def test_documents_are_merged_from_sample_scores_when_tokens_are_not_known():
    dataset = overlapping()
    r = result([1.0, 3.0, 5.0], dataset)
    # Window 1 scores tokens 1-3, window 2 tokens 3-5: (1 + 1 + 2 + 3 + 3) / 5.
    assert merge_windows(r) == {0: 2.0, 1: 5.0}
    groups = {g.name: g.value for g in aggregate(r, "m", "sum")}
    assert groups == {"x": 2.0, "y": 5.0}
    groups = {g.name: g.value for g in aggregate(r, "m", "sum", dedupe_overlap=False)}
    assert groups == {"x": 4.0, "y": 5.0}


def test_spans_follow_sentences_lines_and_paragraphs():
    pieces = ["A b", ". ", "C", " d!", "\n", "e", "\n\n", "f"]
    scores = np.array([np.nan, 1, 2, 3, 4, 5, 6, 7.0])
    sentences = spans(pieces, scores)
    assert [s.text for s in sentences] == ["A b. ", "C d!\n", "e\n\n", "f"]
    assert [s.score for s in sentences] == [1.0, 3.0, 5.5, 7.0]
    assert [s.text for s in spans(pieces, scores, "line")] == ["A b. C d!\n", "e\n\n", "f"]
    assert [s.text for s in spans(pieces, scores, "paragraph")] == ["A b. C d!\ne\n\n", "f"]
    assert "".join(s.text for s in sentences) == "".join(pieces)
    with pytest.raises(ConfigError, match="unit is 'word'"):
        spans(pieces, scores, "word")


def test_vocabulary_scores_are_means_over_the_corpus():
    dataset = TokenDataset.from_ids([[1, 2, 3], [9, 2, 3]])
    tokens = {0: np.array([np.nan, 1.0, 2.0]), 1: np.array([np.nan, 3.0, 4.0])}
    assert vocabulary_scores(dataset, tokens) == [(3, 3.0, 2), (2, 2.0, 2)]


def test_z_scores_compare_with_unrelated_queries():
    r = result([3.0, 0.0])
    null = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    assert r.z_scores(null)[0] == pytest.approx(2.0)
    assert np.isnan(r.z_scores(null)[1])


def test_ids_in_files_take_their_own_length_and_come_back():
    ids = ["a", "", "é" * 3, "x" * 1000, "\ud800"]
    packed = packed_ids(ids)
    assert unpacked_ids(packed) == ids
    assert packed["sample_id_bytes"].nbytes == 1 + 6 + 1000 + 3
    assert unpacked_ids(packed_ids([])) == []
