"""The quality evaluators as the host runs them: items, oracles, resume, controls, reports."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, SampleRecord, TextRecord
from tenfold.report import render_csv, render_html, render_markdown
from tenfold.testing.context import FakeContext
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation import counterfactual as cf
from tenfold_dabgo.evaluation.relevance import Labels
from tenfold_dabgo.evaluation.retrain import Retrainer, half_subsets
from tenfold_dabgo.evaluation.retraining import Retraining
from tenfold_dabgo.evaluation.tail_patch import Patch, patch_effect
from tenfold_dabgo.evaluation.tail_patching import TailPatch
from tenfold_dabgo.weights import fingerprint

TEXTS = ["abcdefgh", "bcdefghi", "zyxwvuts", "yxwvutsr", "mnopqrst", "nopqrstu", "a", "qqqqqqqq"]


class Rows:
    def __init__(self, kind, rows):
        self.kind, self.rows = kind, rows

    def splits(self):
        return ["all"]

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self.rows)

    def fingerprint(self, split=""):
        return str(len(self.rows))


def data(*texts, module="m0"):
    train = [
        TextRecord(id=f"t{i}", text=t, metadata={"module": f"m{i // 2}"})
        for i, t in enumerate(TEXTS)
    ]
    metadata = {} if module is None else {"module": module}
    queries = [
        SampleRecord(id=f"q{i}", prompt=t[:2], completion=t[2:], metadata=metadata)
        for i, t in enumerate(texts)
    ]
    return {"train": Rows("text", train), "queries": Rows("sample", queries)}


@pytest.fixture(scope="module")
def model(make):
    model = make.gpt2()
    return make.train(model, TokenDataset.from_ids([model.encode(t) for t in TEXTS]), steps=60)


@pytest.fixture(scope="module")
def corpus(model):
    return TokenDataset.from_ids(
        [model.encode(t) for t in TEXTS], ids=[f"t{i}" for i in range(len(TEXTS))]
    )


def evaluate(cls, model, folder, rows, **params):
    """Context, evaluator and results of a run; weights and arrays must come back untouched."""
    before = fingerprint(model)
    ctx, evaluator = FakeContext(folder, seed=1), cls(**params)
    items = evaluator.plan(ctx, rows)
    results = list(evaluator.run(ctx, {"model": model}, items))
    assert fingerprint(model) == before
    for result in results:
        json.dumps(result.values, allow_nan=False)
    return ctx, evaluator, results


def metrics_of(ctx, evaluator, results):
    return {(m.name, m.group): m for m in evaluator.aggregate(ctx, results)}


def rendered(ctx, evaluator, results):
    metrics = evaluator.aggregate(ctx, results)
    blocks = list(evaluator.report(ctx, results, metrics))
    assert render_html("t", blocks, {})
    assert render_csv("t", blocks).startswith("report,")
    return render_markdown("t", blocks)


# --- Tail-patch -----------------------------------------------------------------------------

TAIL = {"methods": ["dabgo", "bm25"], "k": [1, 3], "joint_lr": 1e-3, "random_draws": 2}


def test_every_row_of_a_tail_patch_is_the_librarys_own_effect(model, corpus, tmp_path):
    _, evaluator, results = evaluate(TailPatch, model, tmp_path, data("abcdefgh"), **TAIL)
    values = results[0].values
    from tenfold_dabgo.queries import query_from_record

    query = query_from_record(next(data("abcdefgh")["queries"].load()), model)
    for variant in ("joint", "individual"):
        patch = evaluator.settings.patch(variant)
        for method in ("dabgo", "bm25", "dabgo: opponents"):
            ids = [corpus.ids(corpus.sample_ids.index(name)) for name in values["top"][method]]
            for k in (1, 3):
                expected = patch_effect(model, query, ids[:k], patch)
                found = values["effects"][variant][method][str(k)]
                assert found["d_log_p"] == pytest.approx(expected.d_log_p, rel=1e-4)
                assert found["percent"] == pytest.approx(expected.percent, rel=1e-3)
                assert found["published_percent"] == pytest.approx(abs(found["percent"])) or (
                    variant == "individual"
                )
    assert values["top"]["dabgo"][0] == "t0"


def test_proponents_help_and_opponents_harm_and_the_controls_are_there(make, tmp_path):
    model = make.gpt2()  # barely trained: a text that is known by heart has nothing to gain
    make.train(model, TokenDataset.from_ids([model.encode(t) for t in TEXTS]), steps=10)
    rows = data("abcdefgh", "zyxwvuts", "mnopqrst")
    ctx, evaluator, results = evaluate(TailPatch, model, tmp_path, rows, **TAIL)
    metrics = metrics_of(ctx, evaluator, results)

    def mean(method):
        return metrics["d_log_p", f"method={method},variant=individual,k=1"].value

    assert mean("dabgo") > 0 > mean("dabgo: opponents")
    assert mean("dabgo") > mean("random samples")
    assert mean("dabgo") > mean("random strings")
    assert metrics["d_log_p", "method=dabgo,variant=joint,k=3"].n == 3
    assert ("d_log_p_p", "method=bm25,variant=joint,k=3") in metrics
    shown = rendered(ctx, evaluator, results)
    for text in ("random strings", "Published", "rank", "interval"):
        assert text in shown


def test_relative_changes_come_from_log_space():
    """expm1 of d log P, whatever the size of P itself."""
    from tenfold_dabgo.evaluation.tail_patch import PatchEffect

    effect = PatchEffect.of(-5000.0, [0.5, -0.5])
    assert effect.percent == pytest.approx(50 * (np.expm1(0.5) + np.expm1(-0.5)))
    assert effect.relative_percent == pytest.approx(50 * (np.expm1(0.5) - np.expm1(-0.5)))
    assert effect.d_p == 0.0


# --- Retraining -----------------------------------------------------------------------------

RETRAIN = {
    "methods": ["dabgo", "random"], "train_steps": 4, "train_batch_size": 4, "seeds": 2,
    "random_draws": 2, "subsets": 6, "lds_seeds": 2, "loo_samples": 4, "k": [2],
    "qld_share": 0.2, "measure": ["removal", "qld", "lds", "loo"],
}  # fmt: skip
QUERIES = ("abcdefgh", "zyxwvuts")


@pytest.fixture(scope="module")
def retrained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrained")
    return evaluate(Retraining, model, folder, data(*QUERIES), **RETRAIN)


def test_lds_and_loo_are_those_of_the_harness(model, corpus, retrained):
    """Recomputed from scores and trainings, without the evaluator."""
    from tenfold_dabgo.evaluation.bench import prepare
    from tenfold_dabgo.evaluation.sources import parse_sources

    ctx, evaluator, results = retrained
    rows = data(*QUERIES)
    bench = prepare(
        FakeContext(ctx.root, seed=1), model, rows["train"], list(rows["queries"].load()),
        evaluator.method_settings, parse_sources(["dabgo"]),
    )  # fmt: skip
    queries = list(bench.queries.values())
    scores = np.stack([bench.scorer.scores(q)["dabgo"] for q in queries])
    recipe = evaluator.settings.recipe(7, "equal-epochs")
    assert recipe.same_epochs
    trainer = Retrainer(model, corpus, queries, recipe)
    subsets = half_subsets(len(TEXTS), 6, 0)
    losses = np.stack(
        [
            np.mean([trainer.query_losses(np.flatnonzero(s), 0, order) for order in (0, 1)], 0)
            for s in subsets
        ]
    )
    metrics = metrics_of(*retrained)
    expected = cf.lds(scores, subsets, losses)
    assert metrics["lds", "method=dabgo"].value == pytest.approx(expected.mean())

    removed = [r.values["sample"] for r in results if r.id.startswith("loo/")]
    places = np.asarray([corpus.sample_ids.index(name) for name in removed])
    trainer = Retrainer(model, corpus, queries, evaluator.settings.recipe(7))
    losses = np.stack(
        [
            np.mean(
                [trainer.query_losses(np.delete(np.arange(8), i), 0, o) for o in (0, 1)], axis=0
            )
            for i in places
        ]
    )
    expected = cf.loo(scores, places, losses)
    assert metrics["loo", "method=dabgo"].value == pytest.approx(expected.mean())


def test_removal_takes_each_methods_own_top_k(model, corpus, retrained):
    _, _, results = retrained
    by_id = {r.id: r.values for r in results}
    full = np.stack([[by_id[f"full/{s}"]["losses"][q][0] for q in ("q0", "q1")] for s in (0, 1)])
    metrics = metrics_of(*retrained)
    rises = []
    for place, query in enumerate(("q0", "q1")):
        row = by_id[f"query/{query}"]["removal"]["dabgo"]["2"]
        assert row["removed"] == 2
        rises.append(np.mean(row["losses"]) - full[:, place].mean())
    found = metrics["removal_rise", "method=dabgo,k=2"]
    assert found.value == pytest.approx(np.mean(rises))
    assert metrics["removal_rise", "method=no removal,k=2"].n == 2
    random = metrics["removal_rise", "method=random removal,k=2"].value
    draws = [by_id[f"random/2/{d}"] for d in (0, 1)]
    assert all(d["trained_on"] == 6 for d in draws)
    expected = np.mean([[d["losses"][q] for q in ("q0", "q1")] for d in draws]) - full.mean()
    assert random == pytest.approx(expected)
    assert "qld" in {name for name, _ in metrics}
    assert {"lds_noise_ceiling", "full_seed_spread"} <= {name for name, _ in metrics}


def test_a_stopped_run_goes_on_from_the_trainings_it_has_done(model, tmp_path, retrained):
    """Also in the middle of an item, and with the same numbers."""
    rows, trained = data(*QUERIES), []
    ctx = FakeContext(tmp_path, seed=1)
    evaluator = Retraining(**RETRAIN)
    items = list(evaluator.plan(ctx, rows))
    query = [i for i in items if i.id == "query/q0"]
    whole = {r.id: r.values for r in retrained[2]}

    class Stop(Exception):
        pass

    stopping = FakeContext(tmp_path, seed=1)

    def stop(done):
        if stopping.bars[-1].label.startswith("trainings") and done == 2:
            raise Stop

    stopping.on_advance = stop
    with pytest.raises(Stop):
        list(evaluator.run(stopping, {"model": model}, query))
    kept = len(list((tmp_path / "cache").rglob("retrained/*.json")))
    assert kept == 2
    again = Retraining(**RETRAIN)
    again.plan(ctx, rows)
    original = Retrainer._train

    def counting(self, *args, **kwargs):
        trained.append(1)
        return original(self, *args, **kwargs)

    Retrainer._train = counting
    try:
        results = list(again.run(ctx, {"model": model}, query))
    finally:
        Retrainer._train = original
    assert results[0].values == whole["query/q0"]
    after = len(list((tmp_path / "cache").rglob("retrained/*.json")))
    assert len(trained) == after - 2


def test_items_do_not_depend_on_which_others_ran(model, tmp_path, retrained):
    evaluator, ctx = Retraining(**RETRAIN), FakeContext(tmp_path, seed=1)
    items = list(evaluator.plan(ctx, data(*QUERIES)))
    whole = {r.id: r.values for r in retrained[2]}
    assert [i.id for i in items] == list(whole)
    for item in (items[-1], items[3], items[8]):
        [alone] = evaluator.run(ctx, {"model": model}, [item])
        assert alone.values == whole[item.id]


def test_unfinished_runs_report_what_is_known(retrained, tmp_path):
    ctx, evaluator, results = retrained
    for part in (results[:1], results[:3], results[-1:], []):
        assert "Models are trained" in rendered(ctx, evaluator, part)
    shown = rendered(ctx, evaluator, results)
    for text in ("Without the top k", "no removal", "random removal", "Linear datamodeling",
                 "Query loss difference", "Leave-one-out", "Training sets"):  # fmt: skip
        assert text in shown


def test_retrained_weights_can_be_what_is_attributed(model, tmp_path):
    small = {**RETRAIN, "measure": ["lds"], "subsets": 2, "lds_seeds": 1}
    _, _, given = evaluate(Retraining, model, tmp_path / "a", data(*QUERIES), **small)
    _, _, other = evaluate(
        Retraining, model, tmp_path / "b", data(*QUERIES), **small, attributed="retrained"
    )
    assert given[0].values == other[0].values
    assert given[-1].values["predicted"]["random"] == other[-1].values["predicted"]["random"]
    assert given[-1].values["predicted"]["dabgo"] != other[-1].values["predicted"]["dabgo"]


# --- Labels ---------------------------------------------------------------------------------

LABELS = {"methods": ["dabgo", "dabgo/abs", "bm25"], "k": [1, 2], "null_queries": 3}


def test_labels_find_the_querys_own_module(model, tmp_path):
    ctx, evaluator, results = evaluate(
        Labels, model, tmp_path, data("abcdefgh", "bcdefghi"), **LABELS
    )
    values = results[0].values
    assert values["relevant"] == 2
    assert values["labels"]["dabgo"]["precision"] == {"1": 1.0, "2": 1.0}
    assert values["labels"]["dabgo"]["auprc"] == pytest.approx(1.0)
    assert values["labels"]["chance"]["auprc"] == pytest.approx(2 / 7)
    metrics = metrics_of(ctx, evaluator, results)
    assert metrics["recall", "method=dabgo,k=1"].value == pytest.approx(0.5)
    assert metrics["reciprocal_rank", "method=dabgo"].value == 1.0
    assert metrics["top_k_cardinality", "method=dabgo,k=2"].value == pytest.approx(0.5)
    assert metrics["top_k_cardinality", "method=dabgo,k=2"].n == 2
    assert metrics["randomized_spearman", "method=dabgo"].value < 0.9
    assert ("randomized_spearman", "method=bm25") not in metrics
    shown = rendered(ctx, evaluator, results)
    for text in ("Known sources", "Untrained weights", "random queries", "(z"):
        assert text in shown


def test_z_scores_are_deviations_from_the_nulls_own_mean_and_spread(model, tmp_path):
    from tenfold_dabgo.evaluation.null import NullScores

    null = NullScores({"m": np.array([[1.0, 5.0], [3.0, 5.0]])})
    z = null.z_scores("m", np.array([4.0, 9.0]))
    assert z[0] == pytest.approx((4 - 2) / np.sqrt(2))
    assert np.isnan(z[1])
    assert null.z_scores("other", z) is None


def test_random_queries_are_scored_once_and_found_again(model, tmp_path):
    rows = data("abcdefgh")
    first = evaluate(Labels, model, tmp_path, rows, **LABELS)
    files = list((tmp_path / "run" / "work" / "null").glob("*.npz"))
    assert len(files) == 3
    files[0].write_bytes(b"torn")
    again = evaluate(Labels, model, tmp_path, rows, **LABELS)
    assert [r.values for r in again[2]] == [r.values for r in first[2]]


def test_planted_duplicates_are_relevant_without_a_column(model, tmp_path):
    _, _, results = evaluate(
        Labels, model, tmp_path, data("zyxwvuts", module=None), relevance="duplicate",
        methods=["dabgo"], null_queries=0, randomized=False,
    )  # fmt: skip
    assert results[0].values["relevant"] == 1 + 1  # the text, and the one shifted by one letter
    assert results[0].values["labels"]["dabgo"]["reciprocal_rank"] == 1.0


# --- All of them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "params"),
    [(TailPatch, TAIL), (Labels, LABELS), (Retraining, {**RETRAIN, "measure": ["removal"]})],
)
def test_a_bad_query_fails_alone_and_none_is_refused(model, tmp_path, cls, params):
    _, _, results = evaluate(cls, model, tmp_path, data("abcdefgh", "ab"), **params)
    failed = [r for r in results if r.error is not None]
    assert [r.id.rpartition("/")[2] for r in failed] == ["q1"]
    assert "empty completion" in failed[0].error
    with pytest.raises(ConfigError, match="no queries"):
        cls(**params).plan(FakeContext(tmp_path), data())


def test_recorded_scores_of_an_earlier_run_are_a_method(model, tmp_path):
    from tenfold.store import ItemLine, ItemWriter, RunStore
    from tenfold_dabgo.evaluator import Attribution

    ctx = FakeContext(tmp_path / "old", seed=1)
    evaluator = Attribution(columns=["module"])
    items = evaluator.plan(ctx, data("abcdefgh"))
    [done] = evaluator.run(ctx, {"model": model}, items)
    store = RunStore(ctx.run_dir)
    writer = ItemWriter(store)
    writer.item(ItemLine(0, done.id, "0a", done.values, 0.0))
    writer.close()
    store.write_json("run.json", {"name": "old"})
    store.set_status("ok")
    params = {**LABELS, "methods": ["dabgo", f"run:{store.path}"]}
    _, _, results = evaluate(Labels, model, tmp_path / "new", data("abcdefgh"), **params)
    rows = results[0].values["labels"]
    assert rows[f"run:{store.path}"] == rows["dabgo"]
    assert f"run:{store.path} (z)" not in rows
    _, _, results = evaluate(
        Labels, model, tmp_path / "more", data("abcdefgh", "zyxwvuts"), **params
    )
    assert "has no scores for query 'q1'" in results[1].error


@pytest.mark.parametrize(
    ("cls", "params", "message"),
    [
        (TailPatch, {"methods": ["dabgoo"]}, "did you mean 'dabgo'"),
        (TailPatch, {"methods": []}, "methods is empty"),
        (TailPatch, {"methods": ["bm25", "bm25"]}, "'bm25' twice"),
        (TailPatch, {"methods": ["bm25/ascent"]}, "no variant of bm25"),
        (TailPatch, {"methods": ["run:"]}, "run:<name"),
        (TailPatch, {"k": [0]}, "at least 1"),
        (TailPatch, {"variants": []}, "variants is empty"),
        (TailPatch, {"joint_lr": 0.0}, "lr is 0.0"),
        (Retraining, {"measure": ["lsd"]}, "measure is 'lsd'"),
        (Retraining, {"subset_share": 1.0}, "subset_share is 1.0"),
        (Retraining, {"train_steps": 1, "train_epochs": 1.0}, "one of them"),
        (Retraining, {"subsets": 1}, "2 or more"),
        (Retraining, {"methods": ["run:x"], "attributed": "retrained"}, "other weights"),
        (Labels, {"null_queries": 1}, "2 or more"),
        (Labels, {"relevance": "author"}, "relevance is 'author'"),
        (Labels, {"damping": -1.0}, "damping is -1.0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(cls, params, message):
    with pytest.raises(ConfigError, match=message):
        cls(**params)


def test_what_cannot_be_measured_on_this_corpus_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="units of 'module'"):
        evaluate(Retraining, model, tmp_path, data("abcdefgh"), **{**RETRAIN, "unit": "module",
                 "k": [4]})  # fmt: skip
    with pytest.raises(ConfigError, match="loo_samples is 9"):
        evaluate(Retraining, model, tmp_path, data("abcdefgh"), **{**RETRAIN, "measure": ["loo"],
                 "loo_samples": 9})  # fmt: skip
    missing = {**RETRAIN, "methods": ["dabgo", "run:nowhere"]}
    with pytest.raises(ConfigError, match="no run 'nowhere'"):
        evaluate(Retraining, model, tmp_path / "c", data("abcdefgh"), **missing)
    assert not list((tmp_path / "c").rglob("retrained"))
    with pytest.raises(ConfigError, match="no query has the column 'author'"):
        Labels(column="author").plan(FakeContext(tmp_path), data("abcdefgh"))
    with pytest.raises(ConfigError, match="no query can be scored"):
        evaluate(Retraining, model, tmp_path, data("ab"), **RETRAIN)
    results = [ItemResult("q0", {})]
    assert list(TailPatch().aggregate(FakeContext(tmp_path), results)) == []


def test_patches_of_equal_settings_share_their_individual_changes():
    assert Patch("joint", 1e-5) == TailPatch().settings.patch("joint")
