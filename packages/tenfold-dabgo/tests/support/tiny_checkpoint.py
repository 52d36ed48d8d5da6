"""A tiny GPT-2 with a character tokenizer, and a small corpus, as files."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LETTERS = string.ascii_lowercase
TEXTS = [LETTERS[i % 20 : i % 20 + 6] + LETTERS[3 * i % 20 : 3 * i % 20 + i % 7] for i in range(40)]
QUERIES = [{"id": "qa", "prompt": "ab", "reference": "cdefg"},
           {"id": "qb", "prompt": "no", "reference": "pqrst"},
           {"id": "qc", "prompt": "ij", "reference": "klmno"}]  # fmt: skip


def tokenizer():
    """One token per character; unknown ones are `?`."""
    vocabulary = {c: i for i, c in enumerate(f"?{LETTERS}. \n")}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?", eos_token="?")


def model(seed=0, context=32):
    """Two layers, no dropout."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": context}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=30, **sizes, **dropout, **ids)
    return GPT2LMHeadModel(config).eval()


def llama(seed=0):
    """The same size with a head of its own, rotary positions and no biases."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(folder, seed=0):
    """`model/`, `corpus.jsonl` and `queries.jsonl` in the folder."""
    folder = Path(folder)
    model(seed).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"id": f"t{i}", "text": t, "author": f"a{i % 4}"} for i, t in enumerate(TEXTS)]
    write_rows(folder / "corpus.jsonl", rows)
    write_rows(folder / "queries.jsonl", QUERIES)
    return folder


def write_rows(path, rows):
    """JSON Lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
