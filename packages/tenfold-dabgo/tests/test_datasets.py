"""Every corpus format reaches attribution through the host's datasets, as the same samples."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tenfold.builtin.files import TextFiles
from tenfold.builtin.tables import csv_text, jsonl_text, parquet_text
from tenfold.errors import ConfigError
from tenfold.testing import datasets as kit
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.plugin import TOKEN_FILES
from tenfold_dabgo.queries import query_from_record
from tenfold_dabgo.token_files import HfDisk, JsonlTokens, NpyTokens

sys.path.insert(0, str(Path(__file__).parent / "support"))

TEXTS = ["abcdefgh", "hgfedcba", "aabbccdd"]
IDS = ["one", "two", "three"]


def rows(text=True, ids=None):
    """Rows of the three texts, with an author each; as text, or as token ids of `ids`."""
    out = []
    for number, (name, content) in enumerate(zip(IDS, TEXTS, strict=True)):
        row = {"id": name, "author": f"a{number % 2}"}
        out.append(row | ({"text": content} if text else {"input_ids": ids(content)}))
    return out


def write_jsonl(folder, model):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return jsonl_text(path=path)


def write_csv(folder, model):
    path = folder / "corpus.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "author", "text"])
        table.writeheader()
        table.writerows(rows())
    return csv_text(path=path)


def write_parquet(folder, model):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "corpus.parquet")
    return parquet_text(path=folder / "corpus.parquet")


def write_folder(folder, model):
    """The folder's name is the author; the ids are file names."""
    for row in rows():
        path = folder / "texts" / row["author"] / row["id"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"])
    return TextFiles(folder / "texts")


def write_npy(folder, model):
    padded = np.full((3, 10), 47, dtype=np.uint16)
    for row, text in zip(padded, TEXTS, strict=True):
        row[: len(text)] = model.encode(text)
    np.save(folder / "corpus.npy", padded)
    lines = [{k: v for k, v in row.items() if k != "text"} for row in rows()]
    (folder / "columns.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return NpyTokens(folder / "corpus.npy", pad_id=47, columns=folder / "columns.jsonl")


def write_token_jsonl(folder, model):
    """Ids in one row, text in the next: both are allowed."""
    mixed = [rows(text=False, ids=model.encode)[0], *rows()[1:]]
    path = folder / "tokens.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return JsonlTokens(path)


def write_hf_text(folder, model):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows()).save_to_disk(str(folder / "hf"))
    return HfDisk(folder / "hf")


def write_hf_tokens(folder, model):
    datasets = pytest.importorskip("datasets")
    table = []
    for row in rows(text=False, ids=model.encode):
        mask = [1] * len(row["input_ids"]) + [0, 0]
        table.append({**row, "input_ids": [*row["input_ids"], 0, 0], "attention_mask": mask})
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(table)})
    whole.save_to_disk(str(folder / "hf"))
    return HfDisk(folder / "hf")


FORMATS = [write_jsonl, write_csv, write_parquet, write_folder, write_npy, write_token_jsonl,
           write_hf_text, write_hf_tokens]  # fmt: skip


@pytest.fixture
def model(make):
    return make.gpt2()


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_samples_and_columns(model, tmp_path, write):
    data = write(tmp_path, model)
    corpus = TokenDataset.from_records(data.load(), model)
    ids = dict(zip(corpus.sample_ids, range(3), strict=True))
    names = {name.rsplit("/", 1)[-1]: i for name, i in ids.items()}
    assert set(names) == set(IDS)
    for name, text, author in zip(IDS, TEXTS, ("a0", "a1", "a0"), strict=True):
        assert corpus.ids(names[name]).tolist() == model.encode(text)
        assert corpus.column("author")[names[name]] == author
    assert not corpus.has_column("input_ids")


@pytest.mark.parametrize("write", FORMATS)
def test_windows_and_duplicates_work_alike_for_every_format(model, tmp_path, write):
    data = write(tmp_path, model)
    cut = TokenDataset.from_records(data.load(), model, window=4, stride=2, min_tokens=3)
    assert len(cut) == 9
    assert set(cut.lengths.tolist()) == {4}
    assert len({*cut.sample_ids}) == 9
    assert len(cut.deduplicated()) == len({cut.ids(i).tobytes() for i in range(9)})
    again = TokenDataset.from_records(data.load(), model, window=4, stride=2, min_tokens=3)
    assert again.sample_ids == cut.sample_ids
    assert again.content_hash() == cut.content_hash()


@pytest.mark.parametrize("write", [write_npy, write_token_jsonl, write_hf_text, write_hf_tokens])
def test_own_formats_pass_the_hosts_kit(model, tmp_path, write):
    data = write(tmp_path, model)
    kit.splits_are_known(data)
    kit.limits_take_the_first(data)
    kit.order_is_fixed(data)
    kit.shuffles_repeat(data)
    spec = next(s for s in TOKEN_FILES if s.target.endswith(f":{type(data).__name__}"))
    kit.records_have_the_described_kind(data, SimpleNamespace(spec=spec))


def test_changed_content_changes_the_fingerprint(model, tmp_path):
    for write in (write_npy, write_token_jsonl, write_hf_text):
        folder = tmp_path / write.__name__
        folder.mkdir()
        before = write(folder, model).fingerprint()
        assert write(folder, model).fingerprint() == before
        TEXTS[2] = "zz"
        try:
            if write is write_hf_text:
                import shutil

                shutil.rmtree(folder / "hf")
            assert write(folder, model).fingerprint() != before
        finally:
            TEXTS[2] = "aabbccdd"


def test_a_folder_of_arrays_is_one_text_per_row_or_array(model, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5))
    np.save(tmp_path / "b.npy", np.arange(6).reshape(2, 3))
    records = list(NpyTokens(tmp_path).load())
    assert [(r.id, r.metadata["input_ids"]) for r in records] == [
        ("a", [0, 1, 2, 3, 4]), ("b:0", [0, 1, 2]), ("b:1", [3, 4, 5])]  # fmt: skip
    assert [r.id for r in NpyTokens(tmp_path, limit=2).load()] == ["a", "b:0"]
    assert sorted(r.id for r in NpyTokens(tmp_path, shuffle_seed=1).load()) == ["a", "b:0", "b:1"]


def test_only_trailing_padding_is_cut(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]]))
    kept = [r.metadata["input_ids"] for r in NpyTokens(tmp_path, pad_id=0).load()]
    assert kept == [[0, 1, 0, 2], []]


def test_token_records_are_queries_too(model, tmp_path):
    record = next(iter(write_token_jsonl(tmp_path, model).load()))
    query = query_from_record(record, model)
    assert query.completion_ids == tuple(model.encode(TEXTS[0]))
    assert query.metadata == {"author": "a0"}


def bad(folder, content, **settings):
    (folder / "x.jsonl").write_text(content)
    return list(JsonlTokens(folder / "x.jsonl", **settings).load())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a"}', r"x\.jsonl, line 1: has neither 'input_ids' .* nor 'text'"),
        ('\n{"input_ids": [1, "b"]}', r"line 2: 'input_ids' is not a list of whole numbers"),
        ('{"input_ids": "1 2"}', "not a list of whole numbers"),
        ("[1]", "line 1: is a JSON list"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        bad(tmp_path, content)


def test_bad_arrays_and_columns_are_named(model, tmp_path):
    np.save(tmp_path / "f.npy", np.ones(3))
    with pytest.raises(ConfigError, match=r"f\.npy holds float64 with 1 axes"):
        NpyTokens(tmp_path / "f.npy")
    (tmp_path / "g.npy").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"g\.npy is not a \.npy array"):
        NpyTokens(tmp_path / "g.npy")
    write_npy(tmp_path, model)
    (tmp_path / "columns.jsonl").write_text('{"id": "one"}\n')
    with pytest.raises(ConfigError, match="1 lines for 3 texts"):
        NpyTokens(tmp_path / "corpus.npy", columns=tmp_path / "columns.jsonl")
    data = NpyTokens(tmp_path / "corpus.npy")
    (model.vocabulary_size,) = (20,)
    with pytest.raises(ConfigError, match=r"'corpus:0' has token id 47.*20 entries"):
        TokenDataset.from_records(data.load(), model)


def test_folders_without_a_dataset_or_split_are_named(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="is no dataset folder"):
        HfDisk(tmp_path)
    one = datasets.Dataset.from_list(rows())
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="has no split 'trian'; did you mean 'train'"):
        HfDisk(tmp_path / "d", split="trian")
    with pytest.raises(ConfigError, match="it has: train, test"):
        HfDisk(tmp_path / "d")
    assert HfDisk(tmp_path / "d", split="test").count() == 3
