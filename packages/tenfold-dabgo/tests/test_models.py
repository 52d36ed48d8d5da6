"""The toolkit's own language model, with its masked and chunked head, needs no special code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.lm import model as toolkit
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import SampleRecord, TextRecord
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.batches import sample_means, single_row, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.queries import query_from_record
from tenfold_dabgo.weights import borrowed
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" + "# note\n" * (i % 3) for i in range(12)]


@pytest.fixture(scope="module")
def model():
    tokenizer = train_bpe(TEXTS, 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return toolkit.CausalLM(LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="module")
def dataset(model):
    records = [TextRecord(id=f"t{i}", text=t) for i, t in enumerate(TEXTS)]
    return TokenDataset.from_records(records, model)


@pytest.mark.parametrize("chunk", [1024, 7])
def test_gradients_are_captured_through_the_masked_and_chunked_head(
    model, dataset, chunk, monkeypatch
):
    monkeypatch.setattr(toolkit, "CHUNK_TOKENS", chunk)
    batch = token_batch(dataset, range(5), model.pad_id)
    got = {}
    with borrowed(model) as params:
        gradients = PerSampleGradients(model, params)
        gradients.run(batch, lambda n, first, g: got.setdefault(n, []).append(g.clone()))
        assert gradients.route == "capture", gradients.reason
        for row in range(5):
            single = single_row(batch, row)
            loss = sample_means(model.token_loss(single), single)[0]
            values = torch.autograd.grad(loss, list(params.values()))
            for name, value in zip(params, values, strict=True):
                mine = torch.cat(got[name])[row]
                torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-6)


def test_generated_text_is_attributed_with_prefilter_and_kl(model, dataset):
    before = model.fingerprint()
    fisher = estimate_fisher(model, dataset)
    record = SampleRecord(id="q", prompt="def f3(x):", completion="\n    return x + 3\n")
    query = query_from_record(record, model)
    for prefilter in (None, 0.5):
        attributor = BidirectionalAttributor(model, dataset, fisher, prefilter=prefilter)
        result = next(iter(attributor.attribute([query])))
        assert np.isfinite(result.values).all()
        assert result.details["trace"]["ascent"][-1]["kl"] > 0
    assert model.fingerprint() == before


@pytest.mark.parametrize("tying", ["lm_head", "embeddings", "none"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_gradients_of_a_mixture_of_exits_are_captured_exactly(tying, chunk):
    """N-vium: four heads on one weight, routers and adapters; fp64, not a line of special code.

    The lengths make four passes over the scored tokens look like three over the whole batch.
    """
    nvium = pytest.importorskip("tenfold_nvium.modeling")
    from tenfold_nvium.configuration import NviumConfig
    from tenfold_nvium.lm import NviumLM

    tokenizer = train_bpe(TEXTS, 300)
    config = NviumConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, exit_layers=[1, 2, 3], exit_head_tying=tying,
        max_position_embeddings=64, loss_chunk_tokens=chunk, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    network = nvium.NviumForCausalLM(config).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    model = NviumLM(network, tokenizer)
    rows = [[3 + (i * j) % 200 for j in range(1, n + 1)] for i, n in enumerate((8, 6), start=1)]
    batch = token_batch(TokenDataset.from_ids(rows), range(2), model.pad_id)
    with borrowed(model) as params:
        got = {n: torch.zeros((2, *p.shape), dtype=p.dtype) for n, p in params.items()}

        def consume(name, first, g):
            got[name][first : first + len(g)] += g

        gradients = PerSampleGradients(model, params)
        gradients.run(batch, consume)
        assert gradients.route == "capture", gradients.reason
        for row in range(2):
            single = single_row(batch, row)
            loss = sample_means(model.token_loss(single), single)[0]
            values = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for name, value in zip(params, values, strict=True):
                expected = torch.zeros_like(got[name][row]) if value is None else value
                torch.testing.assert_close(got[name][row], expected, rtol=1e-8, atol=1e-11)
