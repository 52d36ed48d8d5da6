"""The built-in evaluators over a real language model, made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from tenfold.builtin.generate import Generate
from tenfold.builtin.generated import Generated
from tenfold.builtin.perplexity import Perplexity
from tenfold.lm.batching import pad_batch
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import PromptRecord, TextRecord
from tenfold.testing.context import FakeContext

sys.path.insert(0, str(Path(__file__).parent / "support"))
from builtin_fakes import Records

TEXTS = ["def f(x):\n    return x\n", "naïve café", "for i in range(10):\n    print(i)\n" * 12, "a"]
CONTEXT = 48


@pytest.fixture(scope="module")
def model():
    tokenizer = train_bpe(TEXTS, 300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return CausalLM(transformers.LlamaForCausalLM(config), tokenizer)


def run(evaluator, model, dataset, tmp_path):
    ctx = FakeContext(tmp_path, seed=5)
    items = evaluator.plan(ctx, {"dataset": dataset})
    return {r.id: r.values for r in evaluator.run(ctx, {"model": model}, items)}


def test_perplexity_is_the_models_own_loss(model, tmp_path):
    records = Records("text", [TextRecord(id=str(i), text=t) for i, t in enumerate(TEXTS)])
    values = run(Perplexity(), model, records, tmp_path)
    for i, text in enumerate(TEXTS):
        ids = model.encode(text)
        if len(ids) > CONTEXT:
            assert values[str(i)]["windows"] > 1
            assert values[str(i)]["tokens"] == len(ids) - 1
            continue
        with torch.no_grad():
            loss = model.token_loss(pad_batch([ids], model.pad_id)).sum().item()
        assert values[str(i)]["nats"] == pytest.approx(loss, abs=1e-4)
    assert any(len(model.encode(text)) > CONTEXT for text in TEXTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_items_do_not_depend_on_batch_size(model, tmp_path, temperature):
    prompts = Records(
        "prompt", [PromptRecord(id=str(i), prompt=t[:20]) for i, t in enumerate(TEXTS)]
    )

    def items(size):
        settings = {"n": 2, "temperature": temperature, "max_new_tokens": 8, "batch_size": size}
        return run(Generate(**settings), model, prompts, tmp_path)

    assert items(1) == items(3) == items(4)
    for values in items(2).values():
        for sample in values["samples"]:
            assert model.decode(sample["completion_ids"]) == sample["completion"]
        assert model.decode(values["prompt_ids"]) == values["prompt"]
    data = Generated(model, prompts, n=2, temperature=temperature, max_new_tokens=8, seed=5)
    written = [[s["completion"] for s in v["samples"]] for v in items(2).values()]
    assert [r.completion for r in data.load()] == [text for row in written for text in row]
