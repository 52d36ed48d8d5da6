"""Tables and text files as data: every record once, in order, with errors that say where."""

from __future__ import annotations

import csv
import io
import json
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tenfold.builtin import tables
from tenfold.builtin.files import TextFiles
from tenfold.errors import ConfigError
from tenfold.records import PreferenceRecord, PromptRecord, TextRecord


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write(form, path, rows):
    """Rows as a file of any of the three formats."""
    path = path.with_suffix(f".{form}")
    if form == "jsonl":
        return jsonl(path, rows)
    if form == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


FORMS = ["jsonl", "csv", "parquet"]
ROWS = [{"id": f"r{i}", "text": f"text {i}, with\nlines “{i}”", "n": str(i)} for i in range(40)]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_records(tmp_path, form):
    data = tables.make_table(form, "text", path=write(form, tmp_path / "t", ROWS))
    assert list(data.load()) == [
        TextRecord(id=r["id"], text=r["text"], metadata={"n": r["n"]}) for r in ROWS
    ]
    assert data.kind == "text"
    assert data.splits() == ("train",)


@pytest.mark.parametrize("form", FORMS)
def test_shuffle_is_a_repeatable_permutation(tmp_path, form):
    path = write(form, tmp_path / "t", ROWS)
    data = tables.make_table(form, "text", path=path)
    plain, first = list(data.load()), list(data.load(shuffle_seed=1))
    assert first == list(tables.make_table(form, "text", path=path).load(shuffle_seed=1))
    assert first != plain
    assert sorted(first, key=lambda r: int(r.id[1:])) == plain
    assert first != list(data.load(shuffle_seed=2))
    own = tables.make_table(form, "text", path=path, shuffle_seed=1, limit=6)
    assert list(own.load()) == first[:6]
    assert list(own.load(limit=2)) == first[:2]


@pytest.mark.parametrize("form", FORMS)
def test_splits_are_disjoint_whole_and_stable(tmp_path, form):
    path = write(form, tmp_path / "t", ROWS)
    data = tables.make_table(form, "text", path=path, validation=0.3, test=0.2)
    parts = {s: [r.id for r in data.load(s)] for s in data.splits()}
    together = [*parts["train"], *parts["validation"], *parts["test"]]
    assert sorted(together) == sorted(parts["all"]) == sorted(r["id"] for r in ROWS)
    assert all(parts.values())
    fewer = write(form, tmp_path / "fewer", ROWS[::2])
    half = tables.make_table(form, "text", path=fewer, validation=0.3, test=0.2)
    assert {r.id for r in half.load("test")} <= set(parts["test"])


def test_prompts_and_preferences(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = jsonl(tmp_path / "p.jsonl", [
        {"id": 7, "q": "1+1?", "a": "2", "topic": "sums"},
        {"q": chat, "metadata": {"level": 3}},
    ])  # fmt: skip
    records = list(tables.jsonl_prompt(path=path, prompt_column="q", reference_column="a").load())
    assert records[0] == PromptRecord(
        id="7", prompt="1+1?", reference="2", metadata={"topic": "sums"}
    )
    assert (records[1].prompt, records[1].reference) == (chat, None)
    assert records[1].metadata == {"level": 3}
    pairs = jsonl(
        tmp_path / "c.jsonl", [{"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}]
    )
    [pair] = tables.jsonl_preference(path=pairs).load()
    assert pair == PreferenceRecord(id="a", prompt="p", chosen="c", rejected="r")


def test_missing_ids_come_from_the_content_and_repeats_are_numbered(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "a"}])
    ids = [r.id for r in tables.jsonl_text(path=path).load()]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert ids[1] != ids[0]
    other = jsonl(tmp_path / "u.jsonl", [{"text": "b"}])
    assert [r.id for r in tables.jsonl_text(path=other).load()] == [ids[1]]


def test_doubled_ids_name_both_lines(tmp_path):
    path = jsonl(
        tmp_path / "t.jsonl", [{"id": "x", "text": "a"}, {"text": "y"}, {"id": "x", "text": "b"}]
    )
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 3: the id 'x' .*t\.jsonl, line 1"):
        next(iter(tables.jsonl_text(path=path).load()))


BAD_LINES = [
    ('{"text": "a"', r"line 2: not valid JSON: .*; write one object per line"),
    ('["a"]', r"line 2: is a JSON list, not an object"),
    ('{"txt": "a"}', r"line 2: the column 'text' is missing; did you mean 'txt'\?"),
    ('{"text": null}', r"line 2: the column 'text' is empty"),
    ('{"text": 3}', r"line 2: the column 'text' holds int 3; it must be a string"),
    ('{"text": "a", "id": [1]}', r"line 2: the id column 'id' holds list \[1\]"),
    ("\udcff", r"line 2: byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_one_error_before_any_record(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    text = '{"text": "good"}\n' + line + "\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    data = tables.jsonl_text(path=path)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, {message}"):
        data.load()
    with pytest.raises(ConfigError, match=message):
        data.fingerprint()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "list of messages"),
        ([{"role": "user"}], 'list of messages {"role": ..., "content": ...}'),
        (4, "holds int 4"),
    ],
)
def test_prompts_are_text_or_messages(tmp_path, value, message):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": value}])
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace(".", r"\.")):
        tables.jsonl_prompt(path=path).load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no header"),
        ("a,a\n1,2\n", "line 1: the column 'a' is there twice"),
        ("id,text\n1,x\n2\n", r"line 3: has 1 cells, but the header names 2 columns \(id, text\)"),
        ('id,text\n1,"open\n', "line 2: not valid CSV: .*; quote cells"),
        ("id,text\n1,\n", "line 2: the column 'text' is empty"),
        ("id,text\n1,x\n\n2,\xff\n", r"line 4: byte 0xff is not utf-8\n  hint: set encoding"),
        ("id,text\n", "there is no row in"),
    ],
)
def test_bad_csv_says_where_and_what(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        tables.csv_text(path=path).load()


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.lists(CELLS, min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_csv_cells_survive_quotes_and_line_breaks(tmp_path, cells, ending):
    text = io.StringIO()
    # A bare carriage return must be quoted; the writer only does so when told.
    quoting = csv.QUOTE_ALL if "\r" in "".join(cells) else csv.QUOTE_MINIMAL
    writer = csv.writer(text, lineterminator=ending, quoting=quoting)
    writer.writerow(["id", "text"])
    writer.writerows([i, cell] for i, cell in enumerate(cells))
    path = tmp_path / "t.csv"
    path.write_bytes(text.getvalue().encode())
    data = tables.csv_text(path=path)
    assert [r.text for r in data.load()] == cells
    assert {r.id: r.text for r in data.load(shuffle_seed=3)} == {
        str(i): cell for i, cell in enumerate(cells)
    }


def test_a_folder_or_glob_reads_its_files_in_order(tmp_path):
    (tmp_path / "data/.hidden").mkdir(parents=True)
    jsonl(tmp_path / "data/b.jsonl", [{"id": "2", "text": "b"}])
    jsonl(tmp_path / "data/a.jsonl", [{"id": "1", "text": "a"}])
    jsonl(tmp_path / "data/.hidden/c.jsonl", [{"id": "3", "text": "c"}])
    (tmp_path / "data/notes.txt").write_text("no")
    assert [r.id for r in tables.jsonl_text(path=tmp_path / "data").load()] == ["1", "2"]
    assert [r.id for r in tables.jsonl_text(path=f"{tmp_path}/da*/b*.jsonl").load()] == ["2"]


def test_nothing_at_the_path_names_the_nearest(tmp_path):
    jsonl(tmp_path / "prompts.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match=r"no such file .*did you mean 'prompts\.jsonl'"):
        tables.jsonl_text(path=tmp_path / "prompt.jsonl")
    with pytest.raises(ConfigError, match=r"no file below .* matches '\*\*/\*\.csv'"):
        tables.csv_text(path=tmp_path)
    with pytest.raises(ConfigError, match="as Parquet"):
        tables.parquet_text(path=tmp_path / "prompts.jsonl").load()


def test_fingerprint_follows_content_and_settings(tmp_path):
    path = write("jsonl", tmp_path / "t", ROWS)
    first = tables.jsonl_text(path=path).fingerprint()
    moved = jsonl(tmp_path / "elsewhere.jsonl", ROWS)
    assert tables.jsonl_text(path=moved).fingerprint() == first
    assert tables.jsonl_text(path=path, limit=3).fingerprint() != first
    assert tables.jsonl_text(path=path, text_column="n").fingerprint() != first
    data = tables.jsonl_text(path=path)
    data.fingerprint()
    jsonl(path, ROWS[:-1])
    assert data.fingerprint() != first
    assert len(list(data.load())) == len(ROWS) - 1


def test_a_large_file_is_never_held(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"id": str(i), "text": "x" * 5000}) + "\n")
    data = tables.jsonl_text(path=path)
    tracemalloc.start()
    assert sum(1 for _ in data.load(shuffle_seed=1)) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 8


# --- text files -----------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path):
    for name, text in {
        "austen/emma.txt": "Emma\n\nWoodhouse,\nhandsome.\n\n\nClever.",
        "austen/later/persuasion.txt": "Sir Walter\r\n\r\nElliot\r\n",
        "melville/moby.txt": "Call me Ishmael.\n",
        "readme.txt": "\ufeffAbout.\n",
        ".secret/x.txt": "hidden",
    }.items():
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "books"


def test_text_units(books):
    files = {r.id: r for r in TextFiles(books).load()}
    assert list(files) == [
        "austen/emma.txt", "austen/later/persuasion.txt", "melville/moby.txt", "readme.txt",
    ]  # fmt: skip
    assert files["readme.txt"].text == "About.\n"
    assert files["austen/later/persuasion.txt"].text == "Sir Walter\n\nElliot\n"
    paragraphs = {r.id: r.text for r in TextFiles(books / "austen", unit="paragraph").load()}
    assert paragraphs == {
        "emma.txt:1": "Emma",
        "emma.txt:3": "Woodhouse,\nhandsome.",
        "emma.txt:7": "Clever.",
        "later/persuasion.txt:1": "Sir Walter",
        "later/persuasion.txt:3": "Elliot",
    }
    lines = {r.id: r.text for r in TextFiles(books / "austen/emma.txt", unit="line").load()}
    assert lines == {
        "emma.txt:1": "Emma", "emma.txt:3": "Woodhouse,", "emma.txt:4": "handsome.",
        "emma.txt:7": "Clever.",
    }  # fmt: skip


def test_author_is_the_folder(books):
    authors = {r.id: r.metadata["author"] for r in TextFiles(books).load()}
    assert authors == {
        "austen/emma.txt": "austen",
        "austen/later/persuasion.txt": "austen",
        "melville/moby.txt": "melville",
        "readme.txt": "books",
    }


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_text_shuffle_and_lengths(books, unit):
    data = TextFiles(books, unit=unit)
    plain = list(data.load())
    seeds = [list(data.load(shuffle_seed=s)) for s in range(4)]
    assert all(sorted(s, key=lambda r: r.id) == sorted(plain, key=lambda r: r.id) for s in seeds)
    assert any(s != plain for s in seeds)
    assert seeds[1] == list(data.load(shuffle_seed=1))
    short = TextFiles(books, unit=unit, max_chars=8)
    assert [r.id for r in short.load()] == [r.id for r in plain if len(r.text) <= 8]


def test_text_splits_share_no_file(tmp_path):
    for i in range(60):
        (tmp_path / f"f{i}.txt").write_text("one\ntwo\n")
    data = TextFiles(tmp_path, unit="line", validation=0.3, test=0.2)
    files = {s: {r.metadata["file"] for r in data.load(s)} for s in data.splits()}
    assert len(files["train"]) + len(files["validation"]) + len(files["test"]) == 60
    assert all(files.values())
    assert len({data.fingerprint(s) for s in data.splits()}) == 4
    one = tmp_path / "one.txt"
    one.write_text("".join(f"line {i}\n" for i in range(60)))
    single = TextFiles(one, unit="line", test=0.5)
    sizes = {s: sum(1 for _ in single.load(s)) for s in single.splits()}
    assert sizes["train"] + sizes["test"] == sizes["all"] == 60
    assert min(sizes.values()) > 10


def test_undecodable_text_names_line_and_byte(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes(b"fine\nna\xefve\n")
    for unit in ("file", "line", "paragraph"):
        with pytest.raises(ConfigError, match=r"old\.txt, line 2: byte 0xef is not utf-8"):
            list(TextFiles(path, unit=unit).load())
    assert [r.text for r in TextFiles(path, encoding="latin-1").load()] == ["fine\nnaïve\n"]


def test_text_fingerprint_follows_names_and_content(books):
    first = TextFiles(books).fingerprint()
    assert first == TextFiles(books).fingerprint()
    assert first != TextFiles(books, unit="line").fingerprint()
    (books / "readme.txt").write_text("Changed.")
    second = TextFiles(books).fingerprint()
    assert second != first
    (books / "readme.txt").rename(books / "about.txt")
    assert TextFiles(books).fingerprint() != second


def test_random_tables_round_trip(tmp_path):
    draw = random.Random(4)
    rows = [
        {"id": str(i), "text": "".join(draw.choices("ab\n\"',é😀 ", k=draw.randint(1, 30))) + "."}
        for i in range(50)
    ]
    for form in FORMS:
        path = write(form, tmp_path / "r", rows)
        got = [
            {"id": r.id, "text": r.text} for r in tables.make_table(form, "text", path=path).load()
        ]
        assert got == rows
