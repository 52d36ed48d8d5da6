"""The corpus: windows cover every token, ids are stable, mistakes are named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold_dabgo.batches import length_buckets, token_batch
from tenfold_dabgo.corpus import TokenDataset


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.integers(2, 12),
    data=st.data(),
)
def test_windows_cover_every_token_and_never_exceed_the_length(lengths, window, data):
    stride = data.draw(st.integers(1, window))
    rows = [list(range(n)) for n in lengths]
    dataset = TokenDataset.from_ids(rows, window=window, stride=stride, min_tokens=1)
    assert dataset.lengths.max() <= window
    for d, document in enumerate(dataset.documents):
        mine = np.flatnonzero(dataset.document_of == d)
        covered = {t for i in mine for t in dataset.ids(int(i)).tolist()}
        assert covered == set(range(document.n_tokens))
        starts = [int(dataset.spans[i][0]) for i in mine]
        assert all(b - a == stride for a, b in itertools.pairwise(starts))
    assert len(set(dataset.sample_ids)) == len(dataset)


def test_short_windows_are_dropped_but_never_a_whole_document():
    dataset = TokenDataset.from_ids([list(range(9)), [1]], window=4, min_tokens=3)
    assert dataset.sample_ids == ["0#0", "0#1", "1"]
    assert dataset.dropped == 1
    assert dataset.scorable.tolist() == [True, True, False]


def test_metadata_columns_reach_every_window():
    dataset = TokenDataset.from_ids(
        [list(range(6)), [1, 2]], ids=["a", "b"], metadata=[{"module": "x"}, {}], window=3
    )
    assert dataset.column("module") == ["x", "x", None]
    assert dataset.column("document") == ["a", "a", "b"]
    assert dataset.column("sample") == ["a#0", "a#1", "b"]
    assert dataset.has_column("module")
    assert not dataset.has_column("author")
    with pytest.raises(ConfigError, match=r"no column 'author'.*module"):
        dataset.column("author")


def test_content_hash_follows_tokens_windows_and_ids_but_not_metadata():
    rows = [[1, 2, 3, 4], [5, 6]]
    reference = TokenDataset.from_ids(rows).content_hash()
    assert TokenDataset.from_ids(rows, metadata=[{"a": 1}, {}]).content_hash() == reference
    for changed in (
        TokenDataset.from_ids([[1, 2, 3, 5], [5, 6]]),
        TokenDataset.from_ids(rows, window=2),
        TokenDataset.from_ids(rows, ids=["x", "y"]),
        TokenDataset.from_ids(rows).subset([1, 0]),
    ):
        assert changed.content_hash() != reference


def test_deduplication_keeps_the_first_of_equal_samples():
    dataset = TokenDataset.from_ids([[1, 2], [3, 4], [1, 2]])
    assert dataset.deduplicated().sample_ids == ["0", "1"]


def test_records_are_tokenized_by_the_model(make):
    model = make.gpt2()
    records = [TextRecord(id="a", text="hello", metadata={"module": "m"})]
    dataset = TokenDataset.from_records(records, model)
    assert dataset.ids(0).tolist() == model.encode("hello")
    with pytest.raises(ConfigError, match="window is 99 tokens, but the model reads at most 32"):
        TokenDataset.from_records(records, model, window=99)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenDataset.from_ids([]), "corpus is empty"),
        (lambda: TokenDataset.from_ids([[], []]), "corpus is empty"),
        (lambda: TokenDataset.from_ids([[1, 2], [3]], ids=["a", "a"]), "the id 'a'"),
        (
            lambda: TokenDataset.from_ids([[1, 2], [3, 99]], ids=["a", "b"], vocabulary_size=50),
            r"'b' has token id 99.*50 entries",
        ),
        (lambda: TokenDataset.from_ids([[1, -1]], vocabulary_size=5), "token id -1"),
        (lambda: TokenDataset.from_ids([[1, 2]], window=1), "at least 2"),
        (lambda: TokenDataset.from_ids([[1, 2]], window=4, stride=5), "between 1 and the window"),
        (lambda: TokenDataset.from_ids([[1, 2]], stride=2), "window length"),
        (lambda: TokenDataset.from_ids([[1, 2]], min_tokens=0), "min_tokens is 0"),
        (lambda: TokenDataset.from_ids([[1, 2]], ids=[]), "1 training texts but 0 ids"),
    ],
)
def test_bad_corpora_are_one_clear_message(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), budget=st.integers(1, 100))
def test_buckets_hold_every_scorable_sample_once_within_the_budget(lengths, budget):
    dataset = TokenDataset.from_ids([[1] * n for n in lengths])
    buckets = length_buckets(dataset, np.arange(len(dataset)), budget)
    seen = sorted(int(i) for bucket in buckets for i in bucket)
    assert seen == [i for i, n in enumerate(lengths) if n >= 2]
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * dataset.lengths[bucket].max() <= budget


def test_batches_are_padded_on_the_right_with_masks_from_lengths():
    dataset = TokenDataset.from_ids([[7, 0, 0], [5, 6]])
    batch = token_batch(dataset, [0, 1], pad_id=0)
    assert batch.input_ids.tolist() == [[7, 0, 0], [5, 6, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
