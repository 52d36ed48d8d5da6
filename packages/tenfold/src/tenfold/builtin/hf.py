"""`core:hf` and `core:tiny-lm`: a causal language model from a checkpoint folder or the hub."""

from __future__ import annotations

from pathlib import Path

from tenfold.lm.loading import checkpoint_source, load_pretrained, usable_device, with_adapter
from tenfold.lm.model import CausalLM


def load(
    checkpoint: str,
    dtype: str | None = None,
    device: str | None = None,
    adapter: str | None = None,
    merge_adapter: bool = True,
    revision: str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    offline: bool | None = True,
    batch_tokens: int = 8192,
) -> CausalLM:
    """The model of a checkpoint, with its tokenizer, ready for every capability.

    Only safetensors weights are read: nothing is unpickled.

    Args:
        checkpoint: folder, or a hub repository `owner/name` when `offline` is False.
        dtype: type of the weights; float32 by default.
        device: torch device; `cpu` by default.
        adapter: PEFT adapter folder.
        merge_adapter: merge the adapter into the weights; otherwise its layers stay apart.
        revision: hub revision.
        attention: attention implementation of transformers.
        trust_remote_code: run code that comes with the checkpoint.
        offline: never ask the hub.
        batch_tokens: most tokens in a batch.

    Raises:
        ConfigError: no such checkpoint or device, or an incomplete checkpoint.
        ComponentError: transformers cannot load it.
    """
    offline = offline is None or offline
    target = usable_device(device or "cpu")
    source, local = checkpoint_source(checkpoint, offline=offline)
    model, tokenizer = load_pretrained(
        source,
        dtype=dtype or "float32",
        attention=attention,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_only=local or offline,
    )
    if adapter:
        model = with_adapter(model, adapter, merge=merge_adapter)
    return CausalLM(
        model,
        tokenizer,
        device=target,
        batch_tokens=batch_tokens,
        source=Path(source) if local and not adapter else None,
    )
