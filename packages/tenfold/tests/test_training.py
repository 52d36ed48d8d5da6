"""Training: resumed equals uninterrupted, accumulation counts tokens, failures are explained."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from tenfold.builtin.hf import load
from tenfold.builtin.train_lm import LanguageModelTrainer
from tenfold.errors import ConfigError, RunFailed
from tenfold.lm.training import TrainingPlan, fit_causal_lm
from tenfold.records import PromptRecord, TextRecord
from tenfold.testing.context import FakeContext
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent / "support"))
from builtin_fakes import Records
from lm_models import TEXTS, network, tokenizer
from train_worker import train


def weights(folder):
    return load_file(Path(folder) / "run/work/checkpoint/model.safetensors")


def log(folder):
    record = json.loads((Path(folder) / "run/work/checkpoint/training.json").read_text())
    return record["log"]


def assert_same(one, other):
    assert log(one) == log(other)
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[n]) for n, tensor in weights(one).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    ctx, checkpoint = train(folder)
    return folder, ctx, checkpoint


class At(TrainerCallback):
    """Does something once, after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def crash():
    raise OSError("the machine went away")


def test_training_lowers_the_loss_and_leaves_a_checkpoint(whole):
    folder, ctx, checkpoint = whole
    losses = [row["loss"] for row in log(folder) if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    metrics = {m.name: m.value for m in checkpoint.metrics}
    assert metrics["train-loss"] == losses[-1]
    assert metrics["eval-loss"] == log(folder)[-1]["eval_loss"]
    assert [p.name for p in ctx.work_dir.iterdir()] == ["checkpoint"]
    assert load(str(checkpoint.path)).score([("def", " add")])
    [bar] = ctx.bars
    assert (bar.label, bar.total, bar.done) == ("training", 8, 8)
    assert any("loss" in fields for fields in bar.fields)
    assert [f["step"] for e, f in ctx.events if "loss" in f] == list(range(1, 9))
    assert not any("runtime" in key for row in log(folder) for key in row)
    # Training goes without a key-value cache; whoever loads the checkpoint wants one.
    assert json.loads((checkpoint.path / "config.json").read_text())["use_cache"]


def test_equal_trainings_are_equal(whole, tmp_path):
    train(tmp_path)
    assert_same(whole[0], tmp_path)


@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_crashed_training_goes_on_to_the_same_weights(whole, tmp_path, step):
    with pytest.raises(OSError, match="went away"):
        train(tmp_path, callbacks=[At(step, crash)])
    ctx, _ = train(tmp_path)
    assert ctx.bars[0].fields[0] == {}
    assert_same(whole[0], tmp_path)


def test_ctrl_c_saves_the_very_step_it_came_in(whole, tmp_path):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(5, interrupt)])
    assert signal.getsignal(signal.SIGINT) is before
    state = tmp_path / "run/work/trainer/checkpoint-5"
    assert json.loads((state / "complete.json").read_text()) == {"step": 5}
    ctx, _ = train(tmp_path)
    assert ctx.bars[0].done == 8
    assert [f["step"] for e, f in ctx.events if "loss" in f] == [6, 7, 8]
    assert_same(whole[0], tmp_path)


def test_an_interruption_through_the_host_saves_too(whole, tmp_path):
    def on_advance(done):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_advance)
    assert (tmp_path / "run/work/trainer/checkpoint-4/complete.json").is_file()
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_an_interruption_in_the_last_step_loses_nothing(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(8, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    ctx, checkpoint = train(tmp_path)
    assert ctx.bars == []  # nothing was left to do
    assert checkpoint.metrics == whole[2].metrics
    assert_same(whole[0], tmp_path)


def test_a_half_written_state_is_passed_over(whole, tmp_path):
    with pytest.raises(OSError, match="went away"):
        train(tmp_path, callbacks=[At(7, crash)])
    states = tmp_path / "run/work/trainer"
    (states / "checkpoint-6/complete.json").unlink()
    (states / "checkpoint-6/model.safetensors").write_bytes(b"torn")
    ctx, _ = train(tmp_path)
    assert next(f["step"] for e, f in ctx.events if "loss" in f) == 4
    assert_same(whole[0], tmp_path)


def test_the_state_of_another_training_is_not_used(tmp_path):
    with pytest.raises(OSError, match="went away"):
        train(tmp_path, callbacks=[At(4, crash)])
    with pytest.raises(ConfigError, match="state of another training: plan changed"):
        train(tmp_path, learning_rate=1.0)
    train(tmp_path, save_steps=2, log_steps=4)  # these change no weights


def test_accumulation_gives_the_weights_of_one_large_batch(whole, tmp_path):
    train(tmp_path / "one", dropout=0.0)
    train(tmp_path / "four", dropout=0.0, gradient_accumulation=4)
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], rtol=0, atol=2e-5)
    pairs = zip(log(tmp_path / "one"), log(tmp_path / "four"), strict=True)
    assert all(a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5) for a, b in pairs)


class Ragged(torch.utils.data.Dataset):
    """Rows of very different lengths, some positions unscored."""

    rows = ([5, 6], [7] * 12, [8, 9, 10], [11, 12, 13, 14, 15, 16, 17])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids = torch.tensor(self.rows[index])
        labels = ids.clone()
        labels[1::4] = -100
        return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_is_the_mean_over_its_tokens(tmp_path, parts):
    """Not the mean of the parts' means: these have different numbers of tokens."""
    plan = TrainingPlan(
        steps=1, batch_size=4, log_steps=1, gradient_accumulation=parts, warmup_ratio=0.0
    )
    model = network(scale=0.5)
    losses = []
    for row in (Ragged()[i] for i in range(4)):
        with torch.no_grad():
            logs = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                losses.append(-logs[t, label].item())
    fit_causal_lm(FakeContext(tmp_path), model, tokenizer(), Ragged(), plan)
    assert log(tmp_path)[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_loss_function_of_ones_own_is_used_and_its_values_logged(tmp_path):
    def compute_loss(model, batch):
        loss = model(**batch).loss
        return 2 * loss, {"double": 2 * loss.item()}

    train(tmp_path, compute_loss=compute_loss, log_steps=2, steps=4, dropout=0.0)
    rows = [row for row in log(tmp_path) if "loss" in row]
    assert [row["double"] for row in rows] == pytest.approx([row["loss"] for row in rows], abs=1e-4)


def test_the_held_out_loss_is_per_token_whatever_the_batches(tmp_path):
    plan = {"steps": 1, "batch_size": 4, "log_steps": 1, "learning_rate": 1e-9}
    means = []
    for parts in (1, 2, 4):
        checkpoint = fit_causal_lm(
            FakeContext(tmp_path / str(parts)), network(scale=0.5), tokenizer(), Ragged(),
            TrainingPlan(**plan, gradient_accumulation=parts), eval_dataset=Ragged(),
        )  # fmt: skip
        means.append({m.name: m.value for m in checkpoint.metrics})
    for values in means:
        assert values["eval-loss"] == pytest.approx(means[0]["train-loss"], abs=1e-5)


def test_rows_come_once_before_any_comes_twice():
    from tenfold.lm.trainer import RowStream

    rows = list(range(7))
    stream = [RowStream(rows, 30, seed=3)[i] for i in range(30)]
    assert all(sorted(stream[i : i + 7]) == rows for i in (0, 7, 14, 21))
    assert stream[:7] != stream[7:14]
    again = RowStream(rows, 30, seed=3)
    assert [again[i] for i in reversed(range(30))] == stream[::-1]
    assert [RowStream(rows, 30, seed=4)[i] for i in range(30)] != stream


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    def compute_loss(model, batch):
        return model(**batch).loss * (math.nan if model.training else 1.0)

    with pytest.raises(RunFailed, match="loss is nan at step 1"):
        train(tmp_path, compute_loss=compute_loss)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise RuntimeError("[enforce fail] . unexpected: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailed, match="no space left while writing"):
        train(tmp_path)


def test_fewer_processes_than_asked_for_is_an_error(tmp_path):
    ctx = FakeContext(tmp_path, world_size=2)
    plan = TrainingPlan(steps=1, batch_size=4)
    with pytest.raises(RunFailed, match="asked for 2 processes, but 1 train together"):
        fit_causal_lm(ctx, network(), tokenizer(), Ragged(), plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "gradient_accumulation": 4}, "6 cannot be divided .* multiple of 4"),
        ({"steps": 0}, "'steps' is 0"),
        ({"schedule": "up"}, "'schedule' is 'up'; it must be one of cosine"),
        ({"warmup_ratio": 1.0}, r"'warmup_ratio' is 1\.0"),
    ],
)
def test_settings_out_of_range_are_explained(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, **changes)


def records(texts=TEXTS, times=12):
    rows = [TextRecord(id=f"{i}-{k}", text=t) for k in range(times) for i, t in enumerate(texts)]
    return Records("text", rows)


SMALL = {
    "vocab_size": 280, "hidden_size": 16, "layers": 1, "heads": 2, "context_length": 16,
    "steps": 4, "batch_size": 4,
}  # fmt: skip


def test_core_lm_trains_from_scratch_and_goes_on_from_there(tmp_path):
    checkpoint = LanguageModelTrainer(records(), **SMALL).fit(FakeContext(tmp_path / "a"), None, {})
    model = load(str(checkpoint.path))
    assert model.vocabulary_size == 280
    assert {m.name for m in checkpoint.metrics} == {
        "train-loss", "eval-loss", "steps", "parameters",
    }  # fmt: skip
    [again] = [
        m.value
        for m in LanguageModelTrainer(records(), init=str(checkpoint.path), **SMALL)
        .fit(FakeContext(tmp_path / "b"), None, {})
        .metrics
        if m.name == "eval-loss"
    ]
    tuned = LanguageModelTrainer(records(), **SMALL).fit(FakeContext(tmp_path / "c"), model, {})
    losses = {m.name: m.value for m in tuned.metrics}
    assert losses["eval-loss"] == again
    assert again < next(m.value for m in checkpoint.metrics if m.name == "eval-loss")


def test_core_lm_gives_equal_models_for_equal_seeds(tmp_path):
    def tensors(name, **settings):
        ctx = FakeContext(tmp_path / name, seed=settings.pop("run_seed", 0))
        LanguageModelTrainer(records(), **SMALL, **settings).fit(ctx, None, {})
        return torch.cat([t.flatten() for t in weights(tmp_path / name).values()])

    first = tensors("a", seed=1)
    assert torch.equal(first, tensors("b", seed=1, run_seed=9))
    assert torch.equal(first, tensors("c", run_seed=1))
    assert not torch.equal(first, tensors("d", seed=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 18, "heads": 4}, "18 cannot be divided into 4 heads"),
        ({"context_length": 4096}, "less than one row of 4096"),
        ({"vocab_size": 100}, "at least 257"),
    ],
)
def test_core_lm_explains_what_does_not_fit(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        LanguageModelTrainer(records(), **{**SMALL, **settings}).fit(
            FakeContext(tmp_path), None, {}
        )


def test_core_lm_wants_texts(tmp_path):
    prompts = Records("prompt", [PromptRecord(id="a", prompt="b")])
    with pytest.raises(ConfigError, match="learns from text records, not prompt records"):
        LanguageModelTrainer(prompts, **SMALL).fit(FakeContext(tmp_path), None, {})
