"""Small random targets and drafters, and a tokenizer of letters."""

from __future__ import annotations

import string

import torch
from tenfold_treeflash.configuration import for_target
from tenfold_treeflash.decoding import DraftSettings
from tenfold_treeflash.generation import generate
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 23


def llama(seed=0, layers=4, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype).eval()


def drafter_for(target, seed=1, shake=0.3, dtype=torch.float64, **changes):
    """A random drafter whose approximator does something."""
    torch.manual_seed(seed)
    settings = {"num_hidden_layers": 2, "block_size": 6, "num_features": 3, "mask_token_id": 1}
    config = for_target(target.config, **(settings | changes))
    config.initializer_range = 0.3
    drafter = TreeFlashDraftModel(config).to(dtype).eval()
    if drafter.ar_approximation is not None and shake:
        torch.nn.init.normal_(drafter.ar_approximation.d.weight, std=shake)
    return drafter


def prompt(length=9, seed=0, rows=1, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    # Tokens 0 and 1 are padding in places, and hidden there; the last token must be read.
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    ids[:, -1].clamp_(min=2)
    return ids


def letters():
    """A tokenizer whose token i is the i-th letter."""
    vocabulary = {letter: i for i, letter in enumerate(string.ascii_lowercase[:VOCABULARY])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def drafted(target, ids, drafter, *, draft=None, seed=None, **settings):
    """Our `generate`, after seeding torch."""
    if seed is not None:
        torch.manual_seed(seed)
    return generate(
        target, ids, drafter=drafter, settings=DraftSettings(**(draft or {})), checked=True,
        **settings,
    )  # fmt: skip


def plain(target, ids, *, seed=None, **settings):
    """transformers' `generate`, after seeding torch."""
    if seed is not None:
        torch.manual_seed(seed)
    return target.generate(ids, **settings)
