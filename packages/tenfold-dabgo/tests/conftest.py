"""Tiny models with every capability that attribution asks for, and small corpora."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tenfold.capabilities import StepOutput, TokenBatch
from tenfold.lm.batching import scored_positions
from tenfold_dabgo.corpus import TokenDataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)  # threads that wait for each other make a busy machine crawl
VOCABULARY = 48


class TinyLM:
    """A causal language model over characters: `grad`, `tokenize`, and `start` for logits."""

    eos_id = 0
    pad_id = 0
    vocabulary_hash = "tiny"

    def __init__(self, model, context_length: int = 32) -> None:
        self.model = model
        self.context_length = context_length
        self.vocabulary_size = model.config.vocab_size

    def logits(self, ids, mask):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    def token_loss(self, batch: TokenBatch) -> torch.Tensor:
        logits = self.logits(batch.input_ids, batch.attention_mask)
        nll = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            batch.input_ids[:, 1:].reshape(-1),
            reduction="none",
        ).reshape(len(logits), -1)
        return F.pad(nll, (1, 0)) * scored_positions(batch)

    def module(self):
        return self.model

    def snapshot(self):
        return {n: t.clone() for n, t in self.model.state_dict().items()}

    def restore(self, token):
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(token[name])

    def start(self, tokens, mask=None):
        mask = torch.ones_like(tokens) if mask is None else mask
        return None, StepOutput(self.logits(tokens, mask), None, tokens.shape[1])

    def encode(self, text):
        return [ord(c) % self.vocabulary_size for c in text]

    def decode(self, ids):
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def render_chat(self, messages):
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


def gpt2(seed=0, dtype=torch.float32, layers=2, width=16, heads=2, vocabulary=VOCABULARY):
    """GPT-2 type: tied head, Conv1D, LayerNorm, biases, learned positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return TinyLM(GPT2LMHeadModel(config).to(dtype).eval())


def llama(seed=0, dtype=torch.float32, tied=False):
    """Llama type: untied head, RMSNorm, grouped attention, rotary positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return TinyLM(LlamaForCausalLM(config).to(dtype).eval())


def corpus(n=12, seed=0, low=5, high=20, vocabulary=VOCABULARY):
    """Random documents of different lengths, with a `module` and a `package` column."""
    generator = np.random.default_rng(seed)
    rows = [
        generator.integers(0, vocabulary, size=generator.integers(low, high + 1)).tolist()
        for _ in range(n)
    ]
    columns = [{"module": f"m{i % 4}", "package": f"p{i % 2}"} for i in range(n)]
    return TokenDataset.from_ids(rows, metadata=columns)


def train(model, dataset, steps=60, lr=5e-3, seed=0):
    """A short AdamW training on random batches of the corpus."""
    from tenfold_dabgo.batches import sample_means, token_batch

    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.module().parameters(), lr=lr)
    for _ in range(steps):
        rows = generator.choice(len(dataset), size=min(16, len(dataset)), replace=False)
        batch = token_batch(dataset, rows, 0)
        optimizer.zero_grad()
        sample_means(model.token_loss(batch), batch).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.fixture(scope="session")
def make():
    """Factories: `make.gpt2(...)`, `make.llama(...)`, `make.corpus(...)`, `make.train(...)`."""
    return SimpleNamespace(gpt2=gpt2, llama=llama, corpus=corpus, train=train, TinyLM=TinyLM)


@pytest.fixture(params=["gpt2", "llama"])
def model64(request):
    """Both architectures in double precision."""
    return {"gpt2": gpt2, "llama": llama}[request.param](dtype=torch.float64)
