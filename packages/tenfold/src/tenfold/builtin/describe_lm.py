"""Descriptions of the built-in language models and their trainer. Plain data."""

from __future__ import annotations

from tenfold.spec import ComponentSpec, Param

__all__ = ["MODELS", "TRAINERS"]

_HEAVY = ("torch", "transformers")
_EXTRAS = ("tenfold[hf]",)
_CAPABILITIES = ("generate", "score", "grad", "hidden", "tokenize", "step", "constrain")

_DTYPE = Param(
    "dtype", "str", None, "weights' type; left out: the workspace's default",
    choices=("float32", "bfloat16", "float16", "float64"),
)  # fmt: skip
_DEVICE = Param("device", "str", None, "left out: the run's device", identity=False)
_BATCH = Param(
    "batch_tokens", "int", 8192, "most tokens in a batch, padding included", minimum=1,
    identity=False,
)  # fmt: skip

MODELS: list[ComponentSpec] = [
    ComponentSpec(
        name="hf",
        target="tenfold.builtin.hf:load",
        summary="any Hugging Face causal language model, from a folder or (online) the hub",
        params=(
            Param("checkpoint", "path", help="checkpoint folder, or a hub repository when online"),
            _DTYPE,
            _DEVICE,
            Param("adapter", "path", None, "PEFT adapter folder to put on top (needs peft)"),
            Param("merge_adapter", "bool", True,
                  "merge the adapter into the weights; otherwise its layers stay apart"),
            Param("revision", "str", None, "hub revision: branch, tag or commit"),
            Param("attention", "str", "sdpa", "attention implementation",
                  choices=("sdpa", "eager", "flash_attention_2")),
            Param("trust_remote_code", "bool", False,
                  "run code that the checkpoint brings; only for sources you trust"),
            Param("offline", "bool", None, "never ask the hub; left out: the workspace's setting",
                  identity=False),
            _BATCH,
        ),
        provides=_CAPABILITIES,
        modules=_HEAVY,
        extras=_EXTRAS,
        tags=("language-model", "huggingface"),
    ),
    ComponentSpec(
        name="tiny-lm",
        target="tenfold.builtin.hf:load",
        summary="a small Llama-type model trained from scratch on a text dataset (see core:lm)",
        params=(
            Param("checkpoint", "path", help="a trained folder; left out: it is trained"),
            _DTYPE,
            _DEVICE,
            _BATCH,
        ),
        provides=_CAPABILITIES,
        trainer="core:lm",
        modules=(*_HEAVY, "accelerate"),
        extras=_EXTRAS,
        tags=("language-model", "offline", "testing"),
    ),
]  # fmt: skip

TRAINERS: list[ComponentSpec] = [
    ComponentSpec(
        name="lm",
        target="tenfold.builtin.train_lm:LanguageModelTrainer",
        summary="trains a causal language model: from scratch, or from a checkpoint or model role",
        params=(
            Param("dataset", "component:dataset", "core:python-stdlib", "texts to learn from"),
            Param("init", "path", None, "checkpoint to start from; left out: from scratch"),
            Param("vocab_size", "int", 2048, "tokens of the byte-level BPE (from scratch)",
                  minimum=257),
            Param("hidden_size", "int", 128, "width (from scratch)", minimum=8),
            Param("layers", "int", 4, "blocks (from scratch)", minimum=1),
            Param("heads", "int", 4, "attention heads (from scratch)", minimum=1),
            Param("context_length", "int", 128, "tokens per training row", minimum=2),
            Param("steps", "int", 300, "optimizer steps", minimum=1),
            Param("batch_size", "int", 16, "rows per step, over all processes", minimum=1),
            Param("learning_rate", "float", 2e-3, "peak learning rate", minimum=1e-12),
            Param("warmup_ratio", "float", 0.05, "share of the steps with a rising rate",
                  minimum=0.0, maximum=0.99),
            Param("schedule", "str", "cosine", "how the rate falls",
                  choices=("cosine", "linear", "constant_with_warmup")),
            Param("weight_decay", "float", 0.1, "decay of matrices", minimum=0.0),
            Param("grad_clip", "float", 1.0, "largest gradient norm; 0: no limit", minimum=0.0),
            Param("gradient_accumulation", "int", 1, "parts of a step", minimum=1, identity=False),
            Param("bf16", "bool", False, "compute in bfloat16 over fp32 weights"),
            Param("gradient_checkpointing", "bool", False, "less memory, more time",
                  identity=False),
            Param("eval_rows", "int", 32, "held-out rows; 0: evaluate nothing", minimum=0),
            Param("eval_steps", "int", 0, "steps between evaluations; 0: at the end", minimum=0,
                  identity=False),
            Param("save_steps", "int", 0, "steps between resumable states; 0: about ten",
                  minimum=0, identity=False),
            Param("seed", "int", None, "left out: the run's seed"),
        ),
        requires={"model?": ("grad", "tokenize")},
        modules=(*_HEAVY, "accelerate"),
        extras=_EXTRAS,
        tags=("language-model",),
    ),
]  # fmt: skip
