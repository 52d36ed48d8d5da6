"""The synthetic corpus: topics are distinguishable, texts are repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo.topics import SyntheticTopics, topic_corpus, topic_tables


def test_tables_are_probabilities_with_a_shared_part():
    tables = topic_tables(20, 3, np.random.default_rng(0))
    np.testing.assert_allclose(tables.sum(axis=-1), 1.0)
    shared = np.minimum(np.minimum(tables[0], tables[1]), tables[2])
    assert 0.3 < shared.sum(axis=-1).mean() < 0.6


def test_texts_of_a_topic_follow_its_own_table():
    corpus = topic_corpus(160, length=32, topics=4)
    tables = topic_tables(96, 4, np.random.default_rng(0))
    likelihood = np.zeros((160, 4))
    for t in range(1, 32):
        steps = tables[:, corpus.ids[:, t - 1], corpus.ids[:, t]]
        likelihood += np.log(steps + 1e-12).T
    assert (likelihood.argmax(axis=1) == corpus.topics).mean() > 0.99


def test_records_are_printable_repeatable_and_labelled():
    data = SyntheticTopics(n=40, held_out=8)
    records = list(data.load())
    assert len(records) == 32
    assert len(list(data.load("test"))) == 8
    assert [r.text for r in records] == [r.text for r in SyntheticTopics(n=40, held_out=8).load()]
    assert all(len(r.text) == 32 and r.text.replace("\n", "").isprintable() for r in records)
    assert {r.metadata["topic"] for r in records} == {f"topic-{i}" for i in range(8)}
    assert len(list(data.load(limit=5))) == 5
    shuffled = [r.id for r in data.load(shuffle_seed=1)]
    assert sorted(shuffled) == [r.id for r in records]
    assert shuffled != sorted(shuffled)


def test_fingerprints_follow_content():
    prints = {
        SyntheticTopics(**s).fingerprint() for s in ({}, {"seed": 1}, {"n": 300}, {"topics": 4})
    }
    assert len(prints) == 4
    assert SyntheticTopics().fingerprint("test") != SyntheticTopics().fingerprint("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"vocabulary": 97}, "between 2 and 96"), ({"held_out": 208}, "less than n"),
     ({"split": "dev"}, "known: train, test"), ({"held_out": 0, "split": "test"}, "known: train")],
)  # fmt: skip
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticTopics(**settings)
