"""Rankings as files that explain themselves, and merged results."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo import exports, latex
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.exports import FORMATS, export, ranking_rows
from tenfold_dabgo.scores import AttributionResult, spearman

SETTINGS = {"steps": 10, "params": "all"}


@pytest.fixture
def model(make):
    return make.gpt2()


@pytest.fixture
def result():
    columns = [{"author": f"a|{i % 2}", "note": "x" * 5, "parts": [1]} for i in range(5)]
    dataset = TokenDataset.from_ids(
        [[1, 2, 3], [4, 5, 6, 7], [8, 9], [3], [5, 5, 5]], metadata=columns
    )
    ascent = np.array([2.0, 3.0, 2.5, np.nan, 1.0])
    descent = np.array([1.5, 3.5, 1.0, np.nan, 1.0])
    return AttributionResult(
        "q1",
        "dabgo",
        dataset,
        ascent - descent,
        {"ascent": ascent, "descent": descent},
        tokens={2: np.array([np.nan, 1.5]), 1: np.array([np.nan, -1.0, 0.0, -0.5])},
        details={"step_size": 0.1, "damping": 0.2},
    )


def parsed(path, form):
    """(header, rows) of a table file."""
    if form == "jsonl":
        first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
        return first, rest
    if form == "csv":
        with path.open(newline="") as file:
            first = json.loads(file.readline().removeprefix("# "))
            return first, list(csv.DictReader(file))
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    return json.loads(table.schema.metadata[b"tenfold-dabgo"]), table.to_pylist()


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_tables_hold_a_header_and_every_scored_sample(result, model, tmp_path, form):
    path = getattr(result, f"to_{form}")(tmp_path / "x", model=model, settings=SETTINGS)
    head, rows = parsed(path, form)
    assert head["unit"] == "nats/token"
    assert "positive: learning the query lowers" in head["sign"]
    assert (head["view"], head["method"], head["query"]) == ("signed", "dabgo", "q1")
    assert (head["samples"], head["scored"], head["settings"]) == (5, 4, SETTINGS)
    assert [row["sample_id"] for row in rows] == ["2", "0", "4", "1"]
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        i = int(row["sample_id"])
        # Every digit survives: the file gives back the very numbers.
        assert float(row["score"]) == result.values[i]
        assert float(row["loss_asc"]) == result.losses["ascent"][i]
        assert float(row["loss_desc"]) == result.losses["descent"][i]
        assert row["direction"] == ("opponent" if result.values[i] < 0 else "proponent")
        assert row["text_preview"] == model.decode(result.dataset.ids(i).tolist())
    if form == "csv":
        assert rows[0]["metadata.author"] == "a|0"
    else:
        metadata = rows[0]["metadata"]
        metadata = json.loads(metadata) if form == "parquet" else metadata
        assert metadata == {"author": "a|0", "note": "xxxxx"}


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_are_written_in_blocks(result, model, tmp_path, form, monkeypatch):
    """Nothing depends on the size of a block, except where later rows' own columns stand."""
    whole = parsed(export(result, form, tmp_path / "a", model=model), form)
    monkeypatch.setattr(exports, "BLOCK", 1)
    blocks = parsed(export(result, form, tmp_path / "b", model=model), form)
    assert blocks == whole
    result.dataset.documents[1].metadata["late"] = "x,y"  # the last row's document
    _, rows = parsed(export(result, form, tmp_path / "c", model=model), form)
    assert json.loads(rows[-1]["metadata"])["late"] == "x,y"
    empty = AttributionResult("q1", "dabgo", result.dataset, np.full(5, np.nan))
    head, rows = parsed(export(empty, form, tmp_path / "d"), form)
    assert (head["scored"], rows) == (0, [])


def test_a_view_ranks_and_its_sign_is_explained(result, tmp_path):
    head, rows = parsed(result.to_jsonl(tmp_path / "x", view="abs"), "jsonl")
    assert [row["sample_id"] for row in rows[:1]] == ["2"]
    assert sorted(row["sample_id"] for row in rows[1:3]) == ["0", "1"]
    assert [row["score"] for row in rows] == [1.5, 0.5, 0.5, 0.0]
    assert {r["sample_id"]: r["signed"] for r in rows}["1"] == -0.5
    assert head["view"] == "abs"
    assert "signed score" in head["sign"]


def test_z_scores_stand_against_a_null_of_other_queries(result):
    generator = np.random.default_rng(0)
    null = generator.normal(size=(50, 5))
    rows = list(ranking_rows(result, null=null))
    for row in rows:
        i = int(row["sample_id"])
        expected = (result.values[i] - null[:, i].mean()) / null[:, i].std(ddof=1)
        assert row["z"] == pytest.approx(expected, rel=1e-12)
    constant = list(ranking_rows(result, null=np.ones((3, 5))))
    assert all(row["z"] is None for row in constant)


def test_rows_after_a_prefilter_put_exact_scores_first(result):
    result.exact = np.array([True, True, False, False, True])
    rows = list(ranking_rows(result))
    assert [row["sample_id"] for row in rows] == ["0", "4", "1", "2"]
    assert [row["sample_id"] for row in rows if row["exact"]] == [
        r.sample_id for r in result.topk(5)
    ]


def test_markdown_shows_both_ends_and_escapes_texts(result, model, tmp_path):
    result.query_id = "a|b<img>"
    text = result.to_markdown(tmp_path / "x", model=model, top=2, settings=SETTINGS).read_text()
    assert "- **unit**: nats/token" in text
    assert r"a\|b\<img\>" in text
    assert re.search(r"\| 1 \| 2 \| \+1\.5 \|", text)
    assert re.search(r"\| 1 \| 1 \| -0\.5 \|", text)


def test_an_unknown_format_is_refused_and_nothing_is_written(result, tmp_path):
    with pytest.raises(ConfigError, match="known: jsonl, csv, parquet, markdown, latex"):
        export(result, "xlsx", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_failing_export_leaves_the_old_file(result, tmp_path):
    path = result.to_jsonl(tmp_path / "x")
    before = path.read_text()
    with pytest.raises(ConfigError, match="base losses"):
        result.to_jsonl(path, view="ascent")
    result.losses["ascent"] = result.losses["ascent"][:1]
    with pytest.raises(IndexError):
        result.to_jsonl(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- LaTeX --------------------------------------------------------------------------------

NASTY = ["\\a{b}$%&#_^~", " <x>|\"'`", "\n\n", "é€\u4e2d", "--?`", "end\t."]


def source(pieces=NASTY, scores=(np.nan, 1.0, -0.5, 0.25, 0.0, -1.0)):
    return latex.document(pieces, np.array(scores), "A_caption & more", {"sign": "plus\nminus"})


def test_shades_follow_sign_and_size():
    assert latex.shade_levels(np.array([np.nan, 2.0, -1.0, 0.0])) == [
        0,
        latex.SHADES,
        -round(latex.SHADES / 2),
        0,
    ]
    assert latex.shade_levels(np.array([3.0, 2.0, -1.0]), top=1) == [latex.SHADES, 0, 0]
    assert latex.shade_levels(np.zeros(2)) == [0, 0]


def test_latex_shades_the_tokens_of_the_best_text(result, model, tmp_path):
    text = result.to_latex(tmp_path / "x.tex", model=model, settings=SETTINGS).read_text()
    assert "% sample: 2\n" in text
    assert "% unit: nats/token\n" in text
    assert '% settings: {"steps": 10' in text
    assert text.count(f"\\shaded{{pro{latex.SHADES}}}") == 2  # the token, and the legend
    other = result.to_latex(tmp_path / "y.tex", "1", model=model).read_text()
    pieces = model.decode([4, 5, 6, 7])
    assert f"{pieces[0]}\\hspace{{0pt}}\\shaded{{opp{latex.SHADES}}}{{{pieces[1]}}}" in other


@pytest.mark.parametrize(
    ("sample", "message"), [("9", "no training text '9'"), ("0", "no token scores")]
)
def test_latex_of_a_text_without_token_scores_is_refused(result, model, tmp_path, sample, message):
    with pytest.raises(ConfigError, match=message):
        result.to_latex(tmp_path / "x", sample, model=model)
    with pytest.raises(ConfigError, match="needs the model"):
        result.to_latex(tmp_path / "x", "1")
    result.tokens = {}
    with pytest.raises(ConfigError, match="nothing to highlight"):
        result.to_latex(tmp_path / "x", model=model)
    assert not list(tmp_path.iterdir())


def test_latex_source_is_balanced_and_escapes_everything():
    text = source()
    body = text[text.index("\\noindent\n") : text.index("\\end{document}")]
    bare = re.sub(r"\\[a-zA-Z]+|\\.", "", body)
    assert bare.count("{") == bare.count("}")
    assert not set("$&#^%\\<>\"`'") & set(bare)
    assert "[U+4E2D]" in text
    assert "% sign: plus minus\n" in text  # a comment cannot spill into the document


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    (tmp_path / "x.tex").write_text(source(), encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "x.pdf").stat().st_size > 1000


# --- Merging ------------------------------------------------------------------------------


def part(result, keep):
    """The result with scores for some samples only."""
    hide = np.ones(len(result.values), dtype=bool)
    hide[keep] = False
    cut = {name: np.where(hide, np.nan, v) for name, v in result.losses.items()}
    tokens = {i: v for i, v in result.tokens.items() if i in keep}
    values = np.where(hide, np.nan, result.values)
    return AttributionResult("q1", "dabgo", result.dataset, values, cut, tokens=tokens,
                             details=dict(result.details))  # fmt: skip


def test_parts_of_one_corpus_merge_to_the_whole(result):
    merged = part(result, [0, 2]).merge(part(result, [1, 3, 4]))
    np.testing.assert_array_equal(merged.values, result.values)
    np.testing.assert_array_equal(merged.losses["ascent"], result.losses["ascent"])
    assert merged.tokens.keys() == result.tokens.keys()
    assert merged.topk(4) == result.topk(4)
    again = part(result, [0, 2]).merge(part(result, [2, 4]))  # equal scores do not clash
    assert again.scored.tolist() == [True, False, True, False, True]


def test_results_of_two_prefilters_merge_and_exact_scores_win(result):
    """Each scored some samples exactly and guessed the others; a guess is no contradiction."""
    parts = []
    for keep in ([0, 1], [1, 2]):
        half = part(result, keep)
        half.exact = half.scored
        rough = np.where(result.scored, result.values + 0.01, np.nan)
        half.values = np.where(half.exact, half.values, rough)
        parts.append(half)
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert merged.exact.tolist() == [True, True, True, False, False]
        np.testing.assert_array_equal(merged.values[:3], result.values[:3])
        np.testing.assert_array_equal(merged.losses["ascent"][:3], result.losses["ascent"][:3])
        assert merged.values[4] == result.values[4] + 0.01
        assert np.isnan(merged.values[3])
    parts[1].values = np.where(parts[1].exact, parts[1].values + 1, parts[1].values)
    with pytest.raises(ConfigError, match="cannot be merged: sample '1'"):
        parts[0].merge(parts[1])


def test_two_corpora_merge_into_one_ranking(result):
    other_data = TokenDataset.from_ids([[7, 8], [1, 2, 3, 4]], ids=["x", "y"])
    other = AttributionResult(
        "q1", "dabgo", other_data, np.array([9.0, -9.0]),
        {"ascent": np.ones(2), "descent": np.zeros(2)},
        tokens={1: np.zeros(4)}, details=dict(result.details),
    )  # fmt: skip
    merged = result.merge(other)
    assert [r.sample_id for r in merged.topk(2)] == ["x", "2"]
    assert merged.topk(1, "opponents")[0].sample_id == "y"
    assert merged.dataset.ids(6).tolist() == [1, 2, 3, 4]
    assert merged.tokens[6].tolist() == [0, 0, 0, 0]
    assert merged.dataset.column("document")[-1] == "y"
    again = AttributionResult(
        "q1", "dabgo", result.dataset.subset([0]), result.values[:1], details=dict(result.details)
    )
    with pytest.raises(ConfigError, match=r"text with the id '0'"):
        result.merge(again)


def test_results_that_mean_different_things_do_not_merge(result):
    for change, message in (
        ({"query_id": "q2"}, "query q1 and q2"),
        ({"method": "bm25"}, "method dabgo and bm25"),
        ({"details": {"step_size": 0.3, "damping": 0.2}}, r"step_size 0\.1 and 0\.3"),
    ):
        other = part(result, [0])
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(ConfigError, match=message):
            result.merge(other)
    other = part(result, [0])
    other.values = other.values + 1
    with pytest.raises(ConfigError, match=r"sample '0' scores 0\.5 in one and 1\.5 in the other"):
        result.merge(other)


def test_comparison_survives_an_export(result, tmp_path):
    """What a reader of the files finds is what `compare` says."""
    other = part(result, [0, 1, 2, 4])
    other.values = np.array([0.1, 0.9, 0.3, np.nan, -1.0])
    rows = [parsed(r.to_jsonl(tmp_path / "x"), "jsonl")[1] for r in (result, other)]
    a, b = ({row["sample_id"]: row["score"] for row in part} for part in rows)
    names = sorted(a)
    again = spearman(np.array([a[n] for n in names]), np.array([b[n] for n in names]))
    assert result.compare(other)["spearman"] == pytest.approx(again)
    assert set(FORMATS) == {"jsonl", "csv", "parquet", "markdown", "latex"}
