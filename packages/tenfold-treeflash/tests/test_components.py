"""The decoder is its base, only faster; its evaluators measure what they say."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tenfold.capabilities import supports
from tenfold.cli import main
from tenfold.errors import ConfigError
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import GenerationConfig, PromptRecord, TextRecord
from tenfold.testing.context import FakeContext
from tenfold_treeflash.checkpoints import save_drafter
from tenfold_treeflash.costs import CostModel, cached_costs, calibrate
from tenfold_treeflash.diagnostics import Diagnostics
from tenfold_treeflash.drawing import tree_svg, tree_text
from tenfold_treeflash.lm import Drafter, TreeDecoder, chain, load, marginal
from tenfold_treeflash.race import Race
from tenfold_treeflash.tree import DraftTree
from treeflash_cases import drafter_for, llama

TEXTS = [f"def f{i % 7}(a, b):\n    return a + b + {i % 5}\n" for i in range(60)]
ANSWER = {
    "type": "object",
    "properties": {
        "note": {"type": "string", "minLength": 3, "maxLength": 12},
        "value": {"type": "integer", "minimum": 0, "maximum": 50},
    },
    "required": ["note", "value"],
    "additionalProperties": False,
}
PROMPTS = ["def f1(", "return a", "    return a + b + 3\ndef", "x"]


@pytest.fixture(scope="module")
def base():
    tokenizer = train_bpe(TEXTS, 280)
    model = llama(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0)
    return CausalLM(model, tokenizer)


@pytest.fixture(scope="module")
def drafter(base):
    return Drafter(drafter_for(base.model, dtype=torch.float32))


@pytest.fixture(params=["tree", "marginal", "chain"])
def decoder(request, base, drafter):
    make = {"tree": TreeDecoder, "marginal": marginal, "chain": chain}[request.param]
    return make(base, drafter, tree_size=9)


def test_it_keeps_what_its_base_can_do(base, decoder):
    wanted = ("generate", "score", "loss", "grad", "hidden", "tokenize", "step", "constrain")
    assert all(supports(decoder, capability) for capability in wanted)
    assert decoder.fingerprint() == base.fingerprint()


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(max_new_tokens=24),
        GenerationConfig(max_new_tokens=24, temperature=1.0, seed=3),
        GenerationConfig(max_new_tokens=24, temperature=0.7, top_k=9, top_p=0.9, seed=5, n=2),
        GenerationConfig(max_new_tokens=24, temperature=1.3, seed=3, logprobs=1),
        GenerationConfig(max_new_tokens=24, stop=("a", "\n"), temperature=1.0, seed=1),
        GenerationConfig(max_new_tokens=40, constraint={"choice": ["yes, of course", "no"]}),
        GenerationConfig(max_new_tokens=45, constraint={"json_schema": ANSWER}),
        GenerationConfig(
            max_new_tokens=45, temperature=1.2, seed=3, constraint={"json_schema": ANSWER}
        ),
    ],
)
def test_it_writes_what_its_base_writes(base, decoder, config):
    ours, plain = decoder.generate(PROMPTS, config), base.generate(PROMPTS, config)
    for mine, theirs in zip(
        itertools.chain.from_iterable(ours), itertools.chain.from_iterable(plain), strict=True
    ):
        assert mine.token_ids == theirs.token_ids
        assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
        if theirs.logprobs is not None:
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert sum(mine.stats["accepted"]) == len(mine.token_ids) - 1


def test_the_decoder_refuses_what_it_cannot_decode(base, drafter):
    other = CausalLM(llama(dtype=torch.float32, layers=5, vocab_size=278), base.tokenizer)
    with pytest.raises(ConfigError, match="num_target_layers = 4"):
        TreeDecoder(other, drafter)
    with pytest.raises(ConfigError, match="tree_size is 'many'"):
        TreeDecoder(base, drafter, tree_size="many")
    with pytest.raises(ConfigError, match="local language model"):
        TreeDecoder(object(), drafter)

    class OfItsOwn(CausalLM):
        def _generate_rows(self, rows, config):
            return super()._generate_rows(rows, config)

    with pytest.raises(ConfigError, match="OfItsOwn decodes in a way of its own"):
        TreeDecoder(OfItsOwn(base.model, base.tokenizer), drafter)
    with pytest.raises(ConfigError, match="block_size is 60"):
        TreeDecoder(base, drafter, tree_size=4, block_size=60)


def test_half_precision_draws_as_its_base(base):
    """Without a drafter passes are the base's, so every difference would be the choice's."""
    half = CausalLM(
        llama(dtype=torch.bfloat16, vocab_size=len(base.tokenizer), eos_token_id=0), base.tokenizer
    )
    decoder = TreeDecoder(half, None)
    for seed in range(4):
        config = GenerationConfig(max_new_tokens=16, temperature=1.0, seed=seed)
        [[ours]], [[plain]] = (m.generate(["def f1("], config) for m in (decoder, half))
        assert ours.token_ids == plain.token_ids


def test_a_drafter_takes_its_targets_number_type(base, drafter):
    half = CausalLM(
        llama(dtype=torch.bfloat16, vocab_size=len(base.tokenizer), eos_token_id=0), base.tokenizer
    )
    other = Drafter(drafter_for(half.model, dtype=torch.float32))
    [[done]] = TreeDecoder(half, other).generate(["return"], GenerationConfig(max_new_tokens=8))
    assert done.token_ids


def test_short_positions_can_be_measured(base):
    short = CausalLM(
        llama(dtype=torch.float32, vocab_size=len(base.tokenizer), max_position_embeddings=20,
              eos_token_id=0), base.tokenizer,
    )  # fmt: skip
    other = Drafter(drafter_for(short.model, dtype=torch.float32))
    assert calibrate(TreeDecoder(short, other, tree_size=2).target, other.network, repeats=1)


# --- Automatic size -------------------------------------------------------------------------------


def test_the_best_size_is_that_of_all_sizes():
    costs = CostModel(0.5, {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.6, 16: 5.0})
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        steps = torch.rand(15, generator=generator) * 0.4
        log_probs = [0.0, *(-steps.cumsum(0)).tolist()]
        rates = [
            sum(math.exp(p) for p in log_probs[:n]) / costs.cost(n)
            for n in range(1, len(log_probs) + 1)
        ]
        assert costs.best(log_probs) == 1 + rates.index(max(rates))
    assert costs.cost(3) == pytest.approx(0.5 + 1.25)


def test_costs_are_measured_once_and_kept(base, drafter, tmp_path):
    pair = TreeDecoder(base, drafter, tree_size=4).target
    model = calibrate(pair, drafter.network, sizes=(2, 4), repeats=2)
    assert model.sizes == [1, 2, 4]
    assert model.draft > 0
    model.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == model
    first = cached_costs(pair, drafter.network, tmp_path / "cache")
    assert cached_costs(pair, drafter.network, tmp_path / "cache") == first
    (tmp_path / "costs.json").write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match="cannot read the cost model"):
        CostModel.load(tmp_path / "costs.json")


def test_automatic_sizes_change_no_text(base, drafter, monkeypatch):
    costs = CostModel(0.1, {1: 1.0, 64: 1.2})
    monkeypatch.setattr("tenfold_treeflash.lm.cached_costs", lambda *_, **__: costs)
    decoder = TreeDecoder(base, drafter)
    decoder.rounds = []
    config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=2)
    ours = decoder.generate(PROMPTS, config)
    assert [[c.token_ids for c in row] for row in ours] == [
        [c.token_ids for c in row] for row in base.generate(PROMPTS, config)
    ]
    for round_ in decoder.rounds:
        assert costs.best(round_.tree.log_probs) == len(round_.tree)


# --- Evaluators -----------------------------------------------------------------------------------


class Records:
    def __init__(self, records):
        self.records = records

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self.records)


def evaluate(evaluator, models, records, root):
    ctx = FakeContext(root)
    items = evaluator.plan(ctx, {"dataset": Records(records)})
    results = list(evaluator.run(ctx, models, items))
    metrics = list(evaluator.aggregate(ctx, results))
    assert list(evaluator.report(ctx, results, metrics))
    return results, metrics


def test_the_race_compares_texts_and_rounds(base, drafter, tmp_path):
    models = {"plain": base, "tree": TreeDecoder(base, drafter, tree_size=6)}
    records = [PromptRecord(id=str(i), prompt=p) for i, p in enumerate(PROMPTS[:2])]
    race = Race(max_new_tokens=8, rounds=1, peers=["prompt-lookup", "dflash"])
    results, metrics = evaluate(race, models, records, tmp_path)
    assert [r.id for r in results] == ["0@0", "0@1", "1@0", "1@1"]
    named = {(m.name, m.group): m for m in metrics}
    assert named["equal_texts", "tree T=0"].value == 1
    for peer in ("prompt lookup", "DFlash"):
        assert named["equal_texts", f"transformers, {peer} T=0"].value == 1
    rows = [r.values["contenders"]["tree"] for r in results if r.values["temperature"] == 0]
    accepted = [n for row in rows for n in row["accepted"]]
    assert named["block_efficiency", "tree T=0"].value == pytest.approx(
        sum(accepted) / len(accepted)
    )
    assert ("speedup", "plain T=0") not in named
    with pytest.raises(ConfigError, match="baseline is 'slow'"):
        evaluate(Race(baseline="slow"), models, records, tmp_path)


def test_diagnostics_are_distances_between_real_distributions(base, drafter, tmp_path):
    model = TreeDecoder(base, drafter, tree_size=4)
    records = [TextRecord(id=str(i), text=text) for i, text in enumerate(TEXTS[:2])]
    results, metrics = evaluate(Diagnostics(anchors=4, coverage=[1, 280]), {"model": model},
                                records, tmp_path)  # fmt: skip
    for result in results:
        for measures in result.values["kinds"].values():
            assert all(value == pytest.approx(1, abs=1e-5) for value in measures["coverage@280"])
            for tvd, kl in zip(measures["tvd"], measures["kl"], strict=True):
                assert 0 < tvd < 1
                assert kl >= 2 * tvd**2 - 0.05  # Pinsker, of means
    by_kind = {m.group.split()[0] for m in metrics if m.name == "tvd"}
    assert by_kind == {"marginal", "corrected"}
    with pytest.raises(ConfigError, match="needs a model with a drafter"):
        evaluate(Diagnostics(), {"model": base}, records, tmp_path)


# --- Drawings and commands ------------------------------------------------------------------------


def test_drawings_show_every_node_and_escape_text():
    tree = DraftTree([1, 2, 3, 4], [-1, 0, 0, 1], [0, 1, 1, 2], [0.0, -0.5, -1.0, -1.5])
    text = tree_text(tree, [0, 1], lambda t: f"<{t}>")
    assert text.splitlines() == [
        "* '<1>'", "* ├─ '<2>'  0.607", "  │  └─ '<4>'  0.223", "  └─ '<3>'  0.368",
    ]  # fmt: skip
    drawing = tree_svg(tree, [0, 1], lambda t: f"<{t}>")
    assert drawing.count("<circle") == 4
    assert drawing.count("<line") == 3
    assert "&lt;2&gt;" in drawing
    assert "<2>" not in drawing


@pytest.fixture(scope="module")
def folders(base, drafter, tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base.model.save_pretrained(root / "target")
    base.tokenizer.save_pretrained(root / "target")
    save_drafter(drafter.network, root / "drafter")
    return str(root / "target"), str(root / "drafter")


def run(capsys, *arguments):
    code = main(["treeflash", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_commands(folders, base, capsys, tmp_path):
    code, out = run(capsys, "generate", *folders, "--prompt", "def f1(", "--tree-size", 6,
                    "--max-new-tokens", 12, "--json")  # fmt: skip
    assert code == 0
    [[plain]] = base.generate(["def f1("], GenerationConfig(max_new_tokens=12))
    assert json.loads(out)["token_ids"] == plain.token_ids
    code, out = run(capsys, "inspect", *folders, "--prompt", "def f1(", "--tree-size", 6,
                    "--rounds", 2)  # fmt: skip
    assert code == 0
    assert out.startswith("round 1: 6 nodes")
    code, out = run(capsys, "verify", *folders, "--tree-size", 6, "--num-prompts", 2,
                    "--max-new-tokens", 8, "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["ok"] is True
    code, out = run(capsys, "info", folders[1], "--target", folders[0], "--json")
    facts = json.loads(out)
    assert facts["fits the model"] == "yes"
    assert facts["block_size"] == 6
    code, out = run(capsys, "calibrate", *folders, "--out", tmp_path / "c.json")
    assert code == 0
    assert CostModel.load(tmp_path / "c.json").sizes[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["generate", "{none}", "{drafter}", "--prompt", "a"], 2),
        (["generate", "{target}", "{none}", "--prompt", "a"], 2),
        (["info", "{target}"], 2),
    ],
)
def test_bad_folders_are_one_clear_error(folders, tmp_path, capsys, arguments, code):
    names = {"none": tmp_path / "none", "target": folders[0], "drafter": folders[1]}
    assert main(["treeflash", *(a.format(**names) for a in arguments)]) == code
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3


def test_a_checkpoint_loads_in_another_type(folders):
    assert next(load(folders[1], dtype="float64").network.parameters()).dtype == torch.float64
