"""Continued training: what moves, what stays, and that no split of the work changes it."""

from __future__ import annotations

import json

import pytest
import torch
from nvium_cases import TEXTS, Texts
from tenfold.errors import ConfigError
from tenfold.lm.packing import pack_tokens
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.tokenizer import train_bpe
from tenfold.lm.trainer import Collator
from tenfold.lm.training import fit_causal_lm
from tenfold.records import PromptRecord
from tenfold.seeds import content_hash
from tenfold.testing.context import FakeContext
from tenfold_nvium.convert import convert, convert_folder
from tenfold_nvium.finetune import Finetuner, freeze, last_head_loss
from tenfold_nvium.lm import load
from tenfold_nvium.rows import AnswerRows, Vocabulary, answer_row, spread
from tenfold_nvium.training import NviumLoss, PhaseCallback
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 48


class Answers:
    """Questions of different lengths with reference answers."""

    kind = "prompt"

    def __init__(self, references=True) -> None:
        self._records = [
            PromptRecord(
                id=str(i), prompt=f"def f{i}(" + "x, " * (i % 5) + "):",
                reference=f" return {i}" + " + x" * (i % 7) if references else None,
            )
            for i in range(60)
        ]  # fmt: skip

    def splits(self):
        return ["train"]

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self._records[:limit])

    def fingerprint(self, split=""):
        return content_hash([r.prompt for r in self._records])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama that has learned something of the toy texts."""
    tokenizer = train_bpe(TEXTS, 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    ctx = FakeContext(tmp_path_factory.mktemp("base"))
    rows = pack_tokens(TEXTS, tokenizer, LENGTH)
    plan = TrainingPlan(steps=60, batch_size=8, learning_rate=5e-3, context_length=LENGTH)
    return fit_causal_lm(ctx, model, tokenizer, rows, plan).path


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "nvium"
    convert_folder(base, folder, exit_layers=[1, 2], gate_init=-4.0, compute_penalty=0.02)
    return folder


def train(folder, root, dataset=None, ctx=None, **settings):
    defaults = {"steps": 40, "context_length": LENGTH, "eval_steps": 10, "bf16": False}
    trainer = Finetuner(dataset or Texts(), str(folder), **(defaults | settings))
    return trainer.fit(ctx or FakeContext(root), None, {}).path


def log_of(path):
    return json.loads((path / "training.json").read_text())["log"]


def losses(path):
    return [row["eval_loss"] for row in log_of(path) if "eval_loss" in row]


def states(*paths):
    return [load(str(path)).model.state_dict() for path in paths]


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_exits_learn_and_open_over_a_frozen_backbone(base, converted, tmp_path):
    done = train(converted, tmp_path, steps=60, learning_rate=3e-3, compute_penalty=0.05)
    measured = losses(done)
    assert measured[-1] < measured[0]
    rows = [row for row in log_of(done) if "exit-share-1" in row]
    early = [1 - row["exit-share-3"] for row in rows]
    assert early[0] < 0.15
    assert early[-1] > 0.4
    assert rows[-1]["expected-depth"] < rows[0]["expected-depth"] - 0.1
    assert rows[-1]["exit-loss-2"] < rows[0]["exit-loss-2"]
    before, after = states(converted, done)
    backbone = {n for n in before if n.startswith(("model.", "lm_head."))}
    moved = changed(before, after)
    assert not moved & backbone
    assert moved == set(before) - backbone
    # The base itself still speaks through the last exit.
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(base)(tokens).logits
        got = load(str(done)).model(tokens, output_exit_logits=True).exit_logits[:, :, -1]
    assert torch.equal(got, wanted)
    assert load(str(done)).model.config.compute_penalty == 0.05


def test_routers_alone(converted, tmp_path):
    done = train(converted, tmp_path, train_parts="routers", steps=10)
    before, after = states(converted, done)
    moved = changed(before, after)
    assert moved
    assert all(".router." in name for name in moved)


def test_all_moves_all_and_final_only_leaves_the_exits(converted, tmp_path):
    whole = train(converted, tmp_path / "a", train_parts="all", steps=6, learning_rate=1e-3)
    last = train(converted, tmp_path / "b", train_parts="all", loss="final_only", steps=6,
                 learning_rate=1e-3)  # fmt: skip
    before, after, tuned = states(converted, whole, last)
    assert changed(before, after) == set(before)
    assert {n for n in before if not n.startswith("exits.")} == changed(before, tuned)


def test_a_base_is_converted_on_the_fly(base, converted, tmp_path):
    """The same as converting first."""
    settings = {"steps": 4, "compute_penalty": 0.02}
    direct = train(base, tmp_path / "a", exits=[1, 2], **settings)
    second = train(converted, tmp_path / "b", **settings)
    a, b = states(direct, second)
    assert not changed(a, b)


def test_resumed_training_equals_an_uninterrupted_one(converted, tmp_path):
    settings = {
        "steps": 20, "eval_steps": 5, "save_steps": 5, "hold_base_loss": True, "train_parts": "all",
        "learning_rate": 1e-3, "compute_penalty": 0.3, "dataset": Answers(),
        "gradient_checkpointing": True,
    }  # fmt: skip
    whole = train(converted, tmp_path / "whole", **settings)

    def interrupt(done: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(converted, None, ctx=FakeContext(tmp_path / "cut", on_advance=interrupt), **settings)
    cut = train(converted, tmp_path / "cut", **settings)
    a, b = states(whole, cut)
    assert not changed(a, b)
    betas = [[row["compute-penalty"] for row in log_of(p) if "compute-penalty" in row]
             for p in (whole, cut)]  # fmt: skip
    assert betas[0] == betas[1]
    assert betas[0][-1] != 0.3


@pytest.mark.parametrize("mode", ["exits", "all"])
def test_accumulation_over_unequal_answers_equals_one_batch(converted, tmp_path, mode):
    """Four parts of two rows with different numbers of scored tokens against eight rows."""
    settings = {"dataset": Answers(), "train_parts": mode, "steps": 6, "learning_rate": 1e-3,
                "batch_size": 8, "head_loss": 0.5, "eval_rows": 0}  # fmt: skip
    one = train(converted, tmp_path / "one", **settings)
    four = train(converted, tmp_path / "four", gradient_accumulation=4, **settings)
    a, b = states(one, four)
    # Adam divides by the root of tiny second moments, so rounding shows; a wrong weight of a
    # part would move parameters by about the learning rate, 1e-3.
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert worst < 5e-5
    values = [[row["loss"] for row in log_of(path) if "loss" in row] for path in (one, four)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_gradients_of_the_loss_are_those_of_its_parts(base):
    """`full` + head loss against a sum written out by hand, in fp64."""
    network = convert(base, exit_layers=[1, 2], gate_init=-1.0, compute_penalty=0.2).double()
    network.train()
    tokens = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :6] = -100
    phase = PhaseCallback(network, 0, 1)
    loss, _ = NviumLoss(phase, "full", 0.7)(network, {"input_ids": tokens, "labels": labels})
    output = network(tokens, return_logits=True, output_exit_logits=True)
    scored = labels[:, 1:] != -100
    targets = labels[:, 1:].clamp(min=0)

    def mean(values):
        return values[scored].mean()

    heads = output.exit_logits[:, :-1].log_softmax(-1)
    ce = -heads.gather(-1, targets[..., None, None].expand(-1, -1, 3, 1))[..., 0]
    nll = -output.logits[:, :-1].gather(-1, targets[..., None])[..., 0]
    depth = (output.exit_log_probs[:, :-1].exp() * torch.tensor([1 / 3, 2 / 3, 1.0])).sum(-1)
    wanted = mean(nll) + 0.2 * mean(depth) + 0.7 * (mean(ce[..., 0]) + mean(ce[..., 1])) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)
    names = [n for n, _ in network.named_parameters()]
    got = torch.autograd.grad(loss, list(network.parameters()))
    expected = torch.autograd.grad(wanted, list(network.parameters()))
    for name, x, y in zip(names, got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9, msg=name)
    batch = {"input_ids": tokens, "labels": labels}
    mix, _ = NviumLoss(phase, "mix_only")(network, batch)
    last, _ = NviumLoss(phase, "final_only")(network, batch)
    assert mix.item() == pytest.approx(mean(nll).item(), rel=1e-9)
    assert last.item() == pytest.approx(mean(ce[..., 2]).item(), rel=1e-9)
    network.eval()
    assert NviumLoss(phase)(network, batch).item() == pytest.approx(mean(nll).item(), rel=1e-9)


def test_the_bases_own_loss_is_that_of_the_base(base):
    network = convert(base, exit_layers=[1, 2], gate_init=-4.0)
    tokenizer = load_tokenizer(base)
    vocabulary = Vocabulary(tokenizer)
    rows = AnswerRows([answer_row(vocabulary, r.prompt, r.reference, 40) for r in Answers().load()])
    plan = TrainingPlan(steps=1, batch_size=7)
    got = last_head_loss(network, rows, "cpu", plan)
    batch = Collator(0)([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(base)(**batch).loss
    assert got == pytest.approx(float(wanted), rel=1e-5)


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_answers_alone_are_scored(base):
    vocabulary = Vocabulary(load_tokenizer(base))
    ids, prompt = answer_row(vocabulary, "def f(x):", " return x", 100)
    assert vocabulary.decode(ids[:prompt]) == "def f(x):"
    assert vocabulary.decode(ids[prompt:]) == " return x"
    assert ids[-1] == vocabulary.eos_id
    row = AnswerRows([(ids, prompt)])[0]
    assert row["labels"][:prompt].eq(-100).all()
    assert torch.equal(row["labels"][prompt:], row["input_ids"][prompt:])
    # Too long: the prompt's beginning goes first, then the answer's end.
    answer = ids[prompt:]
    short, kept = answer_row(vocabulary, "def f(x):", " return x", len(answer) + 2)
    assert (short[kept:], kept) == (answer, 2)
    assert short[:2] == ids[prompt - 2 : prompt]
    tiny, kept = answer_row(vocabulary, "def f(x):", " return x", 3)
    assert (tiny, kept) == ([ids[prompt - 1], *answer[:2]], 1)


def test_rows_split_and_spread_without_loss():
    rows = AnswerRows([([i, i + 1], 1) for i in range(20)])
    kept, held = rows.split(5, seed=1)
    firsts = [[int(part[i]["input_ids"][0]) for i in range(len(part))] for part in (kept, held)]
    assert sorted(firsts[0] + firsts[1]) == list(range(20))
    assert firsts[0] == sorted(firsts[0])
    assert len(held) == 5
    assert rows.fingerprint() != kept.fingerprint()
    chosen = spread(rows, 3)
    assert [int(chosen[i]["input_ids"][0]) for i in range(3)] == [0, 9, 19]


def test_freezing_covers_every_parameter(base):
    network = convert(base, exit_layers=[1], final_adapter=True)
    trained = {}
    for mode in ("exits", "routers", "all"):
        freeze(network, mode)
        trained[mode] = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained["all"] == {n for n, _ in network.named_parameters()}
    assert trained["routers"] < trained["exits"] < trained["all"]
    assert "final_adapter.up.weight" in trained["exits"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_parts": "exit"}, "did you mean 'exits'"),
        ({"loss": "mix"}, "one of full, mix_only, final_only"),
        ({"loss": "final_only"}, "freezes"),
        ({"controller": "x.json", "hold_base_loss": True}, "give one"),
        ({"loss": "mix_only", "hold_base_loss": True}, "no compute penalty to control"),
        ({"hold_base_loss": True, "eval_rows": 0}, "eval_rows must be above 0"),
        ({"controller": "nowhere.json"}, "cannot read the baseline"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, words):
    with pytest.raises(ConfigError, match=words):
        Finetuner(Texts(), "anything", **settings)


def test_checkpoints_that_do_not_fit_are_one_clear_error(base, converted, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        train(tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match="with its own exits"):
        train(converted, tmp_path, exits=[1])
    with pytest.raises(ConfigError, match="beyond the model's context"):
        train(converted, tmp_path, context_length=65)
    with pytest.raises(ConfigError, match="without a reference"):
        train(converted, tmp_path, Answers(references=False))
    with pytest.raises(ConfigError, match="no held-out rows"):
        train(converted, tmp_path, Texts(TEXTS[:4]), hold_base_loss=True)
    convert_folder(base, tmp_path / "closed", exit_layers=[1])
    with pytest.raises(ConfigError, match=r"gates of .* are closed"):
        train(tmp_path / "closed", tmp_path)
    train(tmp_path / "closed", tmp_path / "opened", gate_init=-4.0, steps=1)
    convert_folder(base, tmp_path / "dense", exit_layers=[])
    with pytest.raises(ConfigError, match="one exit and no routers"):
        train(tmp_path / "dense", tmp_path)
