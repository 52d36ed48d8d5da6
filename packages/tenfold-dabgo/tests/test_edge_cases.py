"""Every edge of the method has one clear message: what is wrong, where, what would be right."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.errors import ConfigError, RunFailed
from tenfold.records import SampleRecord, TextRecord
from tenfold.testing.context import FakeContext
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluator import Attribution
from tenfold_dabgo.fisher import FisherDiagonal, identity_fisher
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import fingerprint, select_parameters

sys.path.insert(0, str(Path(__file__).parent / "support"))

TEXTS = ("abcdefgh", "bcdefghi", "zyxwvuts", "mnopqrst", "a", "qqqqqqqq")
LONG = "ab" + "cdefghij" * 5


class Rows:
    def __init__(self, kind, rows):
        self.kind, self.rows = kind, rows

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self.rows)


class Setting(SimpleNamespace):
    """A tiny model, texts, and one query; `attribute` runs the evaluator over them."""

    def __init__(self, model, folder):
        super().__init__(model=model, folder=folder)
        self.texts = [TextRecord(id=f"t{i}", text=t) for i, t in enumerate(TEXTS)]
        self.query = SampleRecord(id="q", prompt="ab", completion="cdefgh")

    @property
    def dataset(self):
        return TokenDataset.from_records(self.texts, self.model)

    def attribute(self, **params):
        """The query's item (errors of one query are in it; others are raised)."""
        ctx = FakeContext(self.folder)
        evaluator = Attribution(**{"top_k": 2, "columns": [], **params})
        data = {"train": Rows("text", self.texts), "queries": Rows("sample", [self.query])}
        (item,) = evaluator.run(ctx, {"model": self.model}, evaluator.plan(ctx, data))
        return item


@pytest.fixture
def setting(make, tmp_path):
    return Setting(make.gpt2(), tmp_path)


# --- Queries, corpus, settings: a table ------------------------------------------------------

IDS = {"prompt_ids": (1, 2), "completion_ids": (3, 99)}


def with_texts(setting, *texts):
    setting.texts = [TextRecord(id=f"t{i}", text=t) for i, t in enumerate(texts)]


def with_twins(setting):
    setting.texts = [*setting.texts, TextRecord(id="t0", text="zz")]


def with_query(**fields):
    def change(setting):
        setting.query = SampleRecord(**{"id": "q", "prompt": "ab", "completion": "cd", **fields})

    return change


def with_foreign_ids(setting):
    setting.model.encode = lambda text: [ord(c) for c in text]


TABLE = {
    "empty completion": (
        with_query(completion=""),
        {},
        r"query 'q' has an empty completion.*core:generated",
    ),
    "prompt covers everything": (
        with_query(prompt="abcdef", completion_ids=()),
        {},
        "nothing to attribute",
    ),
    "one token and no prompt": (
        with_query(prompt="", completion="a"),
        {},
        "one token and no prompt",
    ),
    "query longer than the context": (
        with_query(completion=LONG),
        {},
        r"42 tokens \(prompt 2, completion 40\)|44 tokens \(prompt 2, completion 42\)",
    ),
    "ids outside the vocabulary (query)": (
        with_query(**IDS),
        {},
        r"token id 99, but the model's vocabulary has 48 entries.*another tokenizer",
    ),
    "ids outside the vocabulary (corpus)": (
        with_foreign_ids,
        {},
        r"(query 'q'|training text 't0') has token id 97",
    ),
    "duplicate ids": (with_twins, {}, "two training texts have the id 't0'"),
    "empty corpus": (lambda s: with_texts(s), {}, r"corpus is empty.*filters and limit"),
    "corpus of empty texts": (lambda s: with_texts(s, "", ""), {}, "corpus is empty"),
    "no text has two tokens": (lambda s: with_texts(s, "a", "b"), {}, "no training sample has two"),
    "window longer than the context": (None, {"window": 40}, "window is 40 .* at most 32"),
    "stride without window": (None, {"window": 4, "stride": 5}, "stride is 5"),
    "negative damping": (None, {"damping": -1e-6}, r"damping is -1e-06; it must be 0 or more"),
    "no step size": (None, {"lr": 0.0}, r"lr is 0\.0; it must be more than 0"),
    "negative step size": (None, {"lr": -1e-4}, r"lr is -0\.0001; it must be more than 0"),
    "no steps": (None, {"steps": 0}, "steps is 0; it must be at least 1"),
    "zero Fisher and no damping": (
        None,
        {"params": "re:wpe", "damping": 0.0},
        r"Fisher entries are zero and the damping is 0.*relative:1\.5",
    ),
    "k below one": (None, {"top_k": 0}, "top_k is 0"),
    "no such weights": (None, {"params": "re:zzz"}, "selects none of the model's"),
    "adapter asked for, none there": (None, {"params": "lora"}, "the model has no adapter"),
    "one-sided view of another method": (
        None,
        {"method": "bm25", "view": "ascent"},
        "exists for method dabgo only",
    ),
    "missing Fisher file": (
        None,
        {"fisher": "file", "fisher_path": "nowhere.safetensors"},
        "no Fisher file at nowhere.safetensors",
    ),
    "infinite ascent": (
        None,
        {"lr": 1e12, "damping": 1e-6},
        r"diverged: the query's loss is \w+ at step \d+ of ascent.*smaller lr",
    ),
    "scores below the noise": (
        None,
        {"lr": 1e-30},
        r"all 5 scores are equal \(0\).*noise floor of .* nats/token.*larger lr",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_edges_give_one_clear_message(setting, case):
    change, params, message = TABLE[case]
    if change is not None:
        change(setting)
    try:
        told = setting.attribute(**params).error
    except (ConfigError, RunFailed) as error:
        told = str(error)
    assert told is not None
    assert re.search(message, told, re.DOTALL), told


# --- What is done instead of an error ---------------------------------------------------------


def test_long_queries_are_cut_on_request_and_say_what_was_cut(setting):
    with_query(completion=LONG)(setting)
    notes = setting.attribute(truncate=True).values["query"]["notes"]
    assert notes == ["cut to the model's context of 32: 1 prompt tokens and the last "
                     f"{len(LONG) - 31} completion tokens"]  # fmt: skip


def test_texts_of_one_token_have_no_score_and_are_counted(setting):
    item = setting.attribute(top_k=6)
    assert item.values["summary"]["unscored"] == 1
    assert item.values["summary"]["scored"] == 5
    assert "t4" not in [row["id"] for row in item.values["proponents"]]
    arrays = np.load(setting.folder / "run/artifacts" / item.values["artifact"])
    assert np.isnan(arrays["score"][4])


def test_a_k_beyond_the_corpus_is_clipped_with_a_warning(setting):
    values = setting.attribute(top_k=50).values
    assert len(values["proponents"]) == 5
    assert "top_k is 50, but only 5 training texts have a score" in values["details"]["warnings"]
    assert setting.attribute(top_k=2).values["details"]["warnings"] == []


def test_an_end_token_inside_a_text_counts_although_padding_looks_the_same(make):
    """Masks go by length: id 0 is end, padding, and a real token of the first text."""
    model = make.gpt2()
    rows = [[5, 0, 0, 7, 0], [3, 4, 5, 6, 7, 8, 9, 10], [0, 0]]
    batch = token_batch(TokenDataset.from_ids(rows), range(3), model.pad_id)
    ours = sample_means(model.token_loss(batch), batch)
    for row, value in zip(rows, ours, strict=True):
        ids = torch.tensor([row])
        assert value.item() == pytest.approx(model.model(ids, labels=ids).loss.item(), rel=1e-5)
    dataset = TokenDataset.from_ids(rows)
    result = BidirectionalAttributor(
        model, dataset, estimate_fisher(model, dataset), all_tokens=True
    ).score(Query("q", (5,), (0, 0, 7)))
    assert [len(result.tokens[i]) for i in range(3)] == [5, 8, 2]
    assert np.isfinite(result.tokens[0][1:]).all()


def test_weights_in_half_precision_are_warned_about(setting):
    setting.model.module().to(torch.bfloat16)
    warnings = setting.attribute(fisher="identity").values["details"]["warnings"]
    assert any("the weights are bfloat16" in w and "float32" in w for w in warnings)


def test_a_device_without_half_precision_says_so(setting):
    """What MPS and some CPUs answer to a product in half precision."""
    plain = setting.model.token_loss

    def no_half(batch):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return plain(batch)

    setting.model.token_loss = no_half
    with pytest.raises(ConfigError, match=r"cpu device cannot compute the model in float16"):
        setting.attribute(precision="float16")


# --- Fisher files -----------------------------------------------------------------------------


@pytest.fixture
def fisher(setting):
    """A file that fits."""
    path = setting.folder / "fisher.safetensors"
    estimate_fisher(setting.model, setting.dataset).save(path)
    return path


def changed(path, change):
    """The file again, with its tensors changed; the facts stay."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, facts)


FIRST = "transformer.h.0.attn.c_attn.weight"
FISHER_FILES = {
    "missing weights": (lambda t: t.pop(FIRST), rf"1 missing \({FIRST}\)", False),
    "extra weights": (
        lambda t: t.update(extra=torch.ones(2)),
        "1 weights that the model lacks, such as extra",
        True,
    ),
    "another shape": (lambda t: t.update({FIRST: torch.ones(2, 2)}), r"\(2, 2\) for", False),
    "negative values": (lambda t: t[FIRST].neg_(), "negative or non-finite", False),
    "NaN": (lambda t: t[FIRST].fill_(float("nan")), "negative or non-finite", False),
}


@pytest.mark.parametrize("case", FISHER_FILES)
def test_a_fisher_that_does_not_fit_is_refused(setting, fisher, case):
    """What could be used all the same may be forced; what could not, may not."""
    change, message, can_be_forced = FISHER_FILES[case]
    params = {"fisher": "file", "fisher_path": str(fisher)}
    expected = setting.attribute(**params).values["proponents"]
    changed(fisher, change)
    with pytest.raises(ConfigError, match=message):
        setting.attribute(**params)
    if can_be_forced:
        values = setting.attribute(**params, fisher_force=True).values
        assert values["proponents"] == expected
        assert any("estimated on something else" in w for w in values["details"]["warnings"])
    else:
        with pytest.raises(ConfigError, match=message):
            setting.attribute(**params, fisher_force=True)


@pytest.mark.parametrize("case", ["model", "corpus", "size"])
def test_a_fisher_of_another_model_or_corpus_is_refused_unless_forced(setting, fisher, make, case):
    if case == "model":
        setting.model = make.gpt2(seed=5)
    elif case == "corpus":
        setting.texts[0] = TextRecord(id="t0", text="abcdefgi")
    else:
        setting.texts.pop()
    params = {"fisher": "file", "fisher_path": str(fisher)}
    message = {"model": r"model \w+, now", "corpus": r"corpus \w+, now",
               "size": "corpus of 6 samples, now 5"}[case]  # fmt: skip
    with pytest.raises(ConfigError, match=f"(?s){message}.*fisher_force = true"):
        setting.attribute(**params)
    forced = setting.attribute(**params, fisher_force=True).values
    assert any("estimated on something else" in w for w in forced["details"]["warnings"])


def test_an_all_zero_fisher_needs_damping(setting):
    params = select_parameters(setting.model.module())
    zeros = FisherDiagonal(
        {n: torch.zeros_like(p) for n, p in params.items()}, identity_fisher(params).facts
    )
    for damping in (0.0, "relative:1.5"):  # 1.5 times a mean of 0 is 0
        attributor = BidirectionalAttributor(
            setting.model, setting.dataset, zeros, Perturbation(damping=damping)
        )
        with pytest.raises(ConfigError, match="damping is 0: 1 / F is infinite"):
            attributor.score(Query("q", (3, 4), (5, 6)))


# --- Interruptions ----------------------------------------------------------------------------


def test_a_full_disk_in_mid_pass_is_told_and_the_pass_resumes(setting, monkeypatch):
    params = {"fisher": "identity", "shard_samples": 2}
    expected = Setting(setting.model, setting.folder / "other").attribute(**params)
    plain, written = np.savez, []

    def fills_up(file, **arrays):
        written.append(sorted(arrays))
        if len(written) == 3:
            file.write(b"half of a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file, **arrays)

    monkeypatch.setattr(np, "savez", fills_up)
    before = fingerprint(setting.model)
    item = setting.attribute(**params)
    assert "no space left while writing" in item.error
    assert "--resume" in item.error
    assert fingerprint(setting.model) == before
    left = sorted(p.name for p in setting.folder.rglob("losses-*"))
    assert left == ["losses-000000.npz", "losses-000001.npz"]
    monkeypatch.setattr(np, "savez", plain)
    assert setting.attribute(**params).values == expected.values
    assert not list(setting.folder.rglob("losses-*"))


def test_a_run_whose_corpus_changed_is_not_resumed(tmp_path, monkeypatch):
    """The host compares content hashes before anything is built upon old items."""
    import tiny_checkpoint
    from tenfold.host import Host
    from tenfold.run import Options

    tiny_checkpoint.write(tmp_path)
    (tmp_path / "workspace.toml").write_text("")
    (tmp_path / "run.toml").write_text(
        'schema = "tenfold-run/1"\nname = "edge"\n'
        '[model]\nuse = "core:hf"\ncheckpoint = "model"\n'
        '[datasets.train]\nuse = "core:jsonl"\npath = "corpus.jsonl"\n'
        '[datasets.queries]\nuse = "core:jsonl-prompts"\npath = "queries.jsonl"\n'
        '[evaluator]\nuse = "dabgo:attribution"\nfisher = "identity"\nsteps = 1\ncolumns = []\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    host = Host()
    done = host.run(tmp_path / "run.toml", options=Options(progress=False, limit=1))
    assert done.done == 1
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "abc"}\n')
    with pytest.raises(ConfigError, match="dataset 'train' changed since the run began"):
        host.resume(done.run_dir.name, Options(progress=False))
