"""Small dense bases of every supported architecture, each with what is special about it."""

from __future__ import annotations

import torch
import transformers
from nvium_cases import TEXTS, shake
from tenfold.lm.tokenizer import train_bpe

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    # Biases everywhere, scaled angles.
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    # A window as long as the context hides nothing.
    "mistral": ("Mistral", {"sliding_window": 256}),
    # Query, key and value biases; tied embeddings; a window that is switched off.
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 8}),
    # Norms of queries and keys; heads of their own size.
    "qwen3": ("Qwen3", {"head_dim": 24, "rope_parameters": {"rope_theta": 5e5,
                        "rope_type": "yarn", "factor": 2.0,
                        "original_max_position_embeddings": 128}}),
}  # fmt: skip


def base_config(kind: str, **changes):
    name, special = KINDS[kind]
    return getattr(transformers, f"{name}Config")(**(SHAPE | special | changes))


def base_model(kind: str, seed: int = 3, **changes):
    config = base_config(kind, **changes)
    model = getattr(transformers, f"{KINDS[kind][0]}ForCausalLM")(config).eval()
    shake(model, seed)
    model.tie_weights()
    return model


def base_folder(folder, kind: str = "llama", dtype=torch.float32, **changes):
    """A saved base with a tokenizer of the toy texts, an end-of-text list and settings."""
    tokenizer = train_bpe(TEXTS, 300)
    eos = [tokenizer.eos_token_id, 7]
    model = base_model(
        kind, vocab_size=len(tokenizer), eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id, **changes,
    ).to(dtype)  # fmt: skip
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model
