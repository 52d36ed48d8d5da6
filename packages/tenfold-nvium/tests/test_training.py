"""Training's loss and logged values; accumulation with unequal numbers of scored tokens."""

from __future__ import annotations

import json

import pytest
import torch
from nvium_cases import TEXTS, tiny_config, tiny_model
from safetensors.torch import load_file
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.tokenizer import train_bpe
from tenfold.lm.training import fit_causal_lm
from tenfold.testing.context import FakeContext
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.training import NviumLoss, PhaseCallback


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(23, (3, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4], labels[2, 5:] = -100, -100
    return {"input_ids": ids, "labels": labels}


class Engine:
    """A wrapper as DeepSpeed's: its own flag says it trains, whatever its module does."""

    training = True

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("phase", ["main", "warmup"])
def test_evaluation_is_the_plain_mixture_loss_under_any_wrapper(phase):
    model = tiny_model()
    model.loss_phase, model.compute_penalty = phase, 0.7
    loss = NviumLoss(PhaseCallback(model, 1, 10))
    wanted = model(**batch()).mixture_loss
    for wrapped in (model, Engine(model)):
        model.eval()
        torch.testing.assert_close(loss(wrapped, batch()), wanted)
        model.train()
        value, logged = loss(wrapped, batch())
        assert value > wanted
        assert logged["mixture-loss"] == pytest.approx(float(wanted))


def test_logged_gates_are_means_over_scored_positions():
    model = tiny_model().train()
    _, logged = NviumLoss(PhaseCallback(model, 0, 10))(model, batch())
    with torch.no_grad():
        gates = model(batch()["input_ids"]).gate_log_odds[:, :-1].sigmoid()
    gates = gates[batch()["labels"][:, 1:] != -100]
    entropy = -(gates * gates.log() + (1 - gates) * (1 - gates).log())
    for k in range(3):
        assert logged[f"gate-mean-{k + 1}"] == pytest.approx(float(gates[:, k].mean()))
        assert logged[f"gate-entropy-{k + 1}"] == pytest.approx(float(entropy[:, k].mean()))


class Rows:
    """Rows whose numbers of scored tokens differ widely; one row has a single one."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(vocabulary, (24, 12), generator=generator)
        self.first = [1 + 10 * (i % 3 == 0) + 3 * (i % 5 == 0) for i in range(24)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: min(self.first[index], 11)] = -100
        return {"input_ids": self.ids[index], "labels": labels}

    def fingerprint(self):
        return "rows"


def test_accumulation_with_unequal_scored_tokens_equals_one_batch(tmp_path):
    """Four micro-batches of 2 are one batch of 8, in both phases and with the penalty on."""
    tokenizer = train_bpe(TEXTS, 300)
    logs, states = [], []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = NviumForCausalLM(tiny_config(vocab_size=len(tokenizer), compute_penalty=0.5))
        plan = TrainingPlan(
            steps=6, batch_size=8, context_length=12, learning_rate=3e-3, log_steps=1,
            gradient_accumulation=parts,
        )  # fmt: skip
        phase = PhaseCallback(model, 2, 1)
        done = fit_causal_lm(
            FakeContext(tmp_path / str(parts)), model, tokenizer, Rows(len(tokenizer)), plan,
            compute_loss=NviumLoss(phase), callbacks=[phase],
        )  # fmt: skip
        states.append(load_file(done.path / "model.safetensors"))
        logs.append(phase_losses(done.path))
    assert len(logs[0]) == 6
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-4)


def phase_losses(folder):
    record = json.loads((folder / "training.json").read_text())
    return [row["loss"] for row in record["log"] if "loss" in row]
