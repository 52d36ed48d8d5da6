"""Tiny random language models of several architectures, made in memory."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import transformers as hf
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe

torch.set_num_threads(1)

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 3,
    "héllo wörld, 你好 世界",
    "for i in range(10):\n    print(i)\n" * 2,
    '🎉 party { } [ ] : , "quoted" 0123456789 true false null',
]
CONTEXT = 96
KINDS = ("llama", "gpt2", "qwen2", "neox")

_tokenizer = None


def tokenizer():
    """One byte-level BPE tokenizer; a fresh object each time."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = train_bpe(TEXTS, 300)
    copy = hf.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    return copy


def network(kind="llama", seed=0, context=CONTEXT, scale=0.4, **changes):
    """A network with weights large enough that its next tokens are far from uniform."""
    size = len(tokenizer())
    common = {
        "vocab_size": size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
        "initializer_range": scale,
    }  # fmt: skip
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": context,
    }  # fmt: skip
    torch.manual_seed(seed)
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**common, **shape, **changes}))
    elif kind == "qwen2":
        grouped = {"num_key_value_heads": 2, "tie_word_embeddings": True}
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**common, **shape, **grouped, **changes}))
    elif kind == "neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**common, **shape, **changes}))
    elif kind == "gemma2":
        grouped = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**common, **shape, **grouped, **changes}))
    else:
        own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**common, **own, **changes}))
    with torch.no_grad():  # gpt2 and others start some weights at the same place
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def causal_lm(kind="llama", batch_tokens=8192, **changes):
    """The network with its tokenizer as a `CausalLM`."""
    return CausalLM(network(kind, **changes), tokenizer(), batch_tokens=batch_tokens)


def save(folder, kind="llama", **changes):
    """Writes a checkpoint folder."""
    network(kind, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
