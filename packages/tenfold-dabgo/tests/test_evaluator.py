"""`dabgo:attribution` as the host runs it: items, resume, failures, metrics, report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, PromptRecord, SampleRecord, TextRecord
from tenfold.report import render_html, render_markdown
from tenfold.testing.context import FakeContext
from tenfold_dabgo.evaluation.null import null_queries
from tenfold_dabgo.evaluator import Attribution
from tenfold_dabgo.scores import unpacked_ids
from tenfold_dabgo.settings import METHODS
from tenfold_dabgo.weights import fingerprint


class Rows:
    def __init__(self, kind, rows):
        self.kind, self.rows = kind, rows

    def splits(self):
        return ["all"]

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self.rows)

    def fingerprint(self, split=""):
        return str(len(self.rows))


TEXTS = ["abcdefgh", "bcdefghi", "zyxwvuts", "yxwvutsr", "mnopqrst", "nopqrstu", "a", "qqqqqqqq"]


@pytest.fixture(scope="module")
def model(make):
    model = make.gpt2()
    rows = [model.encode(t) for t in TEXTS]
    from tenfold_dabgo.corpus import TokenDataset

    return make.train(model, TokenDataset.from_ids(rows), steps=60)


def train_set():
    return Rows(
        "text",
        [
            TextRecord(id=f"t{i}", text=t, metadata={"module": f"m{i // 2}", "docstring": t})
            for i, t in enumerate(TEXTS)
        ],
    )


def query_set(*texts):
    return Rows(
        "sample",
        [
            SampleRecord(
                id=f"q{i}",
                prompt=t[:2],
                completion=t[2:],
                metadata={"module": "m0"},
                stats={"exit_histogram": {"2": 3, "10": 1, "1": 2}, "exits": [1, 1, 2, 2, 2, 10]},
            )
            for i, t in enumerate(texts)
        ],
    )


def evaluate(model, tmp_path, queries, **params):
    ctx = FakeContext(tmp_path, seed=1)
    evaluator = Attribution(**{"top_k": 3, "columns": ["module", "author"], **params})
    items = evaluator.plan(ctx, {"train": train_set(), "queries": queries})
    results = list(evaluator.run(ctx, {"model": model}, items))
    return ctx, evaluator, results


def test_an_item_holds_rankings_rollups_and_token_scores(model, tmp_path):
    before = fingerprint(model)
    ctx, _, results = evaluate(model, tmp_path, query_set("abcdefgh", "zyxwvuts"))
    assert fingerprint(model) == before
    assert [r.id for r in results] == ["q0", "q1"]
    values = json.loads(json.dumps(results[0].values, allow_nan=False))
    assert values["proponents"][0]["id"] == "t0"
    assert results[1].values["proponents"][0]["id"] == "t2"
    scores = [row["score"] for row in values["proponents"]]
    assert scores == sorted(scores, reverse=True)
    assert values["opponents"][0]["score"] < scores[-1]
    for row in values["proponents"] + values["opponents"]:
        assert len(row["pieces"]) == len(row["token_scores"]) == row["tokens"]
        assert row["token_scores"][0] is None
        assert np.mean(row["token_scores"][1:]) == pytest.approx(row["score"], abs=1e-5)
        assert row["losses"]["ascent"] - row["losses"]["descent"] == pytest.approx(row["score"])
        assert "docstring" not in row["metadata"]
    assert values["rollups"]["module"][0]["name"] == "m0"
    assert "author" not in values["rollups"]
    assert values["summary"]["scored"] == 7
    assert values["summary"]["unscored"] == 1
    assert values["summary"]["same_module"] > values["summary"]["same_module_chance"]
    arrays = np.load(ctx.artifacts / values["artifact"])
    np.testing.assert_allclose(
        arrays["loss_ascent"] - arrays["loss_descent"], arrays["score"], equal_nan=True
    )
    assert unpacked_ids(arrays) == [f"t{i}" for i in range(8)]


def test_items_are_repeatable_and_do_not_depend_on_each_other(model, tmp_path):
    """Nor on the Fisher coming from the cache; timings stay out of the items."""
    texts = ("abcdefgh", "zyxwvuts", "mnopqrst")
    for number, params in enumerate(({}, {"prefilter": 0.3})):
        whole = evaluate(model, tmp_path / f"{number}a", query_set(*texts), **params)[2]
        again = evaluate(model, tmp_path / f"{number}a", query_set(*texts), **params)[2]
        assert [r.values for r in whole] == [r.values for r in again]
        ctx, evaluator, _ = evaluate(
            model, tmp_path / f"{number}b", query_set("abcdefgh"), **params
        )
        items = list(evaluator.plan(ctx, {"train": train_set(), "queries": query_set(*texts)}))
        alone = list(evaluator.run(ctx, {"model": model}, items[2:]))
        assert alone[0].values == whole[2].values


def test_the_fisher_is_estimated_once_per_model_corpus_and_setting(model, tmp_path):
    ctx, *_ = evaluate(model, tmp_path, query_set("abcdefgh"))
    assert "Fisher" in [bar.label for bar in ctx.bars]
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 1
    ctx, *_ = evaluate(model, tmp_path, query_set("zyxwvuts"))
    assert "Fisher" not in [bar.label for bar in ctx.bars]
    ctx, *_ = evaluate(model, tmp_path, query_set("zyxwvuts"), fisher="sample_sum")
    assert "Fisher" in [bar.label for bar in ctx.bars]
    files[0].write_bytes(b"damaged")
    ctx, *_ = evaluate(model, tmp_path, query_set("abcdefgh"))
    assert "Fisher" in [bar.label for bar in ctx.bars]


def test_a_query_that_cannot_be_attributed_fails_alone(model, tmp_path):
    queries = query_set("abcdefgh", "ab", "zyxwvuts")
    _, _, results = evaluate(model, tmp_path, queries)
    assert [r.error is None for r in results] == [True, False, True]
    assert "empty completion" in results[1].error


def test_no_queries_and_no_training_texts_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="no queries"):
        evaluate(model, tmp_path, query_set())
    ctx, evaluator = FakeContext(tmp_path), Attribution()
    items = evaluator.plan(ctx, {"train": Rows("text", []), "queries": query_set("abcdefgh")})
    with pytest.raises(ConfigError, match="corpus is empty"):
        list(evaluator.run(ctx, {"model": model}, items))


def test_prompts_without_text_explain_what_to_do(model, tmp_path):
    queries = Rows("prompt", [PromptRecord(id="p", prompt="ab")])
    _, _, results = evaluate(model, tmp_path, queries)
    assert "core:generated" in results[0].error


@pytest.mark.parametrize(
    "method",
    [name for name in METHODS if name not in ("dabgo", "embeddings", "bergson", "kronfluence")],
)
def test_every_method_fills_the_same_items_and_report(model, tmp_path, method):
    ctx, evaluator, results = evaluate(model, tmp_path, query_set("abcdefgh"), method=method)
    assert results[0].values["method"] == method
    json.dumps(results[0].values, allow_nan=False)
    metrics = evaluator.aggregate(ctx, results)
    assert render_html("t", list(evaluator.report(ctx, results, metrics)), {})


def test_compared_methods_report_their_agreement(model, tmp_path):
    ctx, evaluator, results = evaluate(
        model, tmp_path, query_set("abcdefgh", "zyxwvuts"), compare=["gradient-dot", "random"]
    )
    metrics = {(m.name, m.group): m for m in evaluator.aggregate(ctx, results)}
    dot = metrics["spearman", "method=gradient-dot"]
    assert dot.n == 2
    assert dot.value > metrics["spearman", "method=random"].value


def test_paper_preset_ranks_by_absolute_value_with_the_published_constants(model, tmp_path):
    _, _, results = evaluate(model, tmp_path, query_set("abcdefgh"), preset="paper")
    values = results[0].values
    assert values["view"] == "abs"
    assert values["details"]["lr"] == 1e-4
    assert values["details"]["damping"] == 1e-6
    assert len(values["details"]["trace"]["ascent"]) == 11
    top = values["proponents"][0]
    assert top["score"] == pytest.approx(abs(top["signed"]))
    _, _, results = evaluate(model, tmp_path, query_set("abcdefgh"), preset="paper", view="signed")
    assert results[0].values["view"] == "signed"


def test_one_sided_views_compute_base_losses(model, tmp_path):
    _, _, results = evaluate(model, tmp_path, query_set("abcdefgh"), view="ascent")
    row = results[0].values["proponents"][0]
    assert row["score"] == pytest.approx(row["losses"]["ascent"] - row["losses"]["base"])


def test_small_groups_can_be_left_out(model, tmp_path):
    _, _, results = evaluate(model, tmp_path, query_set("abcdefgh"), min_group=2)
    assert {g["name"] for g in results[0].values["rollups"]["module"]} == {"m0", "m1", "m2"}
    _, _, results = evaluate(model, tmp_path, query_set("abcdefgh"))
    assert {g["n"] for g in results[0].values["rollups"]["module"]} == {1, 2}


def test_metrics_carry_intervals_and_counts(model, tmp_path):
    ctx, evaluator, results = evaluate(model, tmp_path, query_set("abcdefgh", "zyxwvuts"))
    metrics = {m.name: m for m in evaluator.aggregate(ctx, results)}
    assert metrics["ascent_rise"].value > 0
    assert metrics["descent_fall"].value > 0
    assert metrics["descent_fall"].n == 2
    low, high = metrics["top_score"].interval
    assert low <= metrics["top_score"].value <= high
    assert metrics["same_module"].value > metrics["same_module_chance"].value


def test_report_shows_texts_heat_maps_rollups_exits_and_traces(model, tmp_path):
    ctx, evaluator, results = evaluate(model, tmp_path, query_set("abcdefgh"))
    metrics = evaluator.aggregate(ctx, results)
    blocks = list(evaluator.report(ctx, results, metrics))
    kinds = {type(block).__name__ for block in blocks}
    assert {"Heading", "Badges", "TokenHeat", "Columns", "Details", "Table"} <= kinds
    markdown = render_markdown("Attribution", blocks)
    for text in ("Most influential training texts", "Most opposed", "By module", "t0", "Exits"):
        assert text in markdown
    html = render_html("Attribution", blocks, {})
    assert "loss after ascent" in html
    assert "unlearns (ascent)" in html
    assert html.index(">1<") < html.index(">2<") < html.index(">10<")


def test_report_escapes_what_models_and_data_wrote(tmp_path):
    values = {
        "query": {"id": "<x-q>", "prompt": "<x-s>", "completion": "<x-b>", "completion_pieces": []},
        "method": "bm25", "view": "signed", "unit": "BM25", "how": "mean",
        "proponents": [{"rank": 1, "id": "<x-i>", "score": 1.0, "tokens": 1, "pieces": ["<img>"]}],
        "opponents": [], "rollups": {"module": []}, "points": [],
        "histogram": {"edges": [], "counts": []}, "details": {}, "compare": {},
        "summary": {"scored": 1.0}, "artifact": "x",
    }  # fmt: skip
    blocks = Attribution().report(FakeContext(tmp_path), [ItemResult("q", values)], [])
    html = render_html("t", list(blocks), {})
    for tag in ("<img>", "<x-b>", "<x-q>", "<x-i>", "<x-s>"):
        assert tag not in html


def test_report_of_failed_runs_says_so(tmp_path):
    blocks = list(Attribution().report(FakeContext(tmp_path), [ItemResult("q", error="x")], []))
    assert "No query was attributed" in blocks[0].text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "bm52"}, "did you mean 'bm25'"),
        ({"preset": "best"}, "known: recommended, paper"),
        ({"view": "raw"}, "known: signed"),
        ({"view": "ascent", "method": "bm25"}, "exists for method dabgo only, not bm25"),
        ({"null_queries": 1, "export": ["csv"]}, "a spread needs 2 or more"),
        ({"null_queries": 4}, "no table is exported"),
        ({"top_k": 0}, "top_k is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"min_group": 0}, "min_group is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"fisher": "diag"}, "fisher is 'diag'"),
        ({"fisher": "file"}, "a path goes with"),
        ({"fisher_path": "x"}, "a path goes with"),
        ({"how": "median"}, "reduction is 'median'"),
        ({"compare": ["x"]}, "compare is 'x'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(params, message):
    with pytest.raises(ConfigError, match=message):
        Attribution(**params)


def test_a_text_longer_than_the_context_is_refused_or_cut(model, tmp_path):
    long = query_set("ab" + "cdefghij" * 5)
    _, _, results = evaluate(model, tmp_path, long)
    assert "truncate = true" in results[0].error
    _, _, results = evaluate(model, tmp_path, long, truncate=True)
    assert "cut to the model's context" in results[0].values["query"]["notes"][0]


def test_rankings_are_exported_where_asked_and_the_report_names_them(model, tmp_path):
    forms = ["jsonl", "csv", "parquet", "markdown", "latex"]
    ctx, evaluator, results = evaluate(model, tmp_path, query_set("abcdefgh"), export=forms)
    paths = results[0].values["exports"]
    assert list(paths) == forms
    for path in paths.values():
        assert (ctx.artifacts / path).stat().st_size > 100
    first, *rows = (ctx.artifacts / paths["jsonl"]).read_text().splitlines()
    assert json.loads(first)["settings"]["steps"] == 10
    ranked = [json.loads(row) for row in rows]
    assert len(ranked) == 7
    assert [r["sample_id"] for r in ranked[:3]] == [
        r["id"] for r in results[0].values["proponents"]
    ]
    markdown = render_markdown("t", list(evaluator.report(ctx, results, [])))
    assert all(path in markdown for path in paths.values())
    _, _, plain = evaluate(model, tmp_path, query_set("abcdefgh"), method="bm25", export=forms)
    assert "latex" not in plain[0].values["exports"]


def test_exported_tables_say_how_far_a_score_stands_from_random_queries(model, tmp_path):
    """z from the file = (s - mean) / std of the null, scored anew from the null's own seed."""
    ctx, evaluator, results = evaluate(
        model, tmp_path, query_set("abcdefgh"), export=["jsonl"], null_queries=5
    )
    path = ctx.artifacts / results[0].values["exports"]["jsonl"]
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    prepared = evaluator._prepared[1]
    asked = null_queries(prepared.dataset, "corpus", 5, 8, model.vocabulary_size, 0)
    null = np.stack([result.values for result in prepared.main.attribute(asked)])
    index = {name: i for i, name in enumerate(prepared.dataset.sample_ids)}
    for row in rows:
        own = null[:, index[row["sample_id"]]]
        expected = (row["signed"] - own.mean()) / own.std(ddof=1)
        assert row["z"] == pytest.approx(expected, rel=1e-6)
    assert len(rows) == 7
