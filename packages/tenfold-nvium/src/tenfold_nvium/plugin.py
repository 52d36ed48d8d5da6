"""The plugin `nvium`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

from tenfold_nvium.baselines import components as baselines

_EXTRAS = ("tenfold-nvium",)
_HEAVY = ("torch", "transformers")
_CAPABILITIES = (
    "generate", "score", "loss", "grad", "hidden", "tokenize", "step", "exits", "constrain",
)  # fmt: skip

_LOADING = (
    Param("checkpoint", "path", help="folder of a trained or converted model"),
    Param(
        "policy", "str", "auto",
        "where tokens leave: auto, sample, sample:<temperature>, certified, full, "
        "greedy-router, fixed:<exit>; auto samples exits, and is certified when greedy",
    ),
    Param(
        "max_deferred", "int", None, "most positions a text may defer; never changes the text",
        minimum=1, identity=False,
    ),
    Param(
        "warp_scope", "str", "head",
        "where temperature, top-k and top-p apply: the chosen head (fast) or the whole mixture",
        choices=("head", "mixture"),
    ),
    Param(
        "decode_rows", "int", 1, "texts decoded together; one saves most layers per text",
        minimum=1, identity=False,
    ),
    Param(
        "batch_tokens", "int", 8192, "most tokens in a batch when scoring",
        minimum=1, identity=False,
    ),
    Param("device", "str", None, "torch device; default: the run's", identity=False),
    Param(
        "dtype", "str", None, "number type; default: the run's",
        choices=("float32", "bfloat16", "float16", "float64"),
    ),
)  # fmt: skip


def _preset(name: str, type_: str, help_: str, minimum: float | None = None) -> Param:
    """A parameter whose default is the preset's value."""
    return Param(name, type_, None, f"{help_}; default: the preset's", minimum=minimum)


_SHAPE = (
    Param(
        "preset", "str", "quickstart",
        "named shape and settings: tiny, quickstart, small, narrow, a cell of the paper's grid "
        "such as h768-l24, or ablation-beta, ablation-heads, ablation-position",
    ),
    _preset("layers", "int", "decoder layers", 1),
    _preset("hidden_size", "int", "width of the residual stream", 2),
    _preset("heads", "int", "attention heads", 1),
    _preset("intermediate_size", "int", "width of the MLP", 1),
    _preset("exits", "list[int]", "depths of the early exits, in layers", 1),
    _preset("adapter_size", "int", "inner width of the exits' adapters, 0 for none", 0),
    _preset("vocab_size", "int", "tokens of the vocabulary learned from the text", 257),
    _preset("context_length", "int", "tokens per training row", 2),
    _preset("steps", "int", "optimizer steps", 1),
    _preset("batch_size", "int", "rows per optimizer step, over all processes", 1),
    _preset("learning_rate", "float", "peak learning rate", 0.0),
    _preset("warmup_ratio", "float", "share of the steps that the rate rises over", 0.0),
    _preset("weight_decay", "float", "decay of matrices", 0.0),
)  # fmt: skip

_CONTROLLER = (
    Param(
        "controller", "path", None,
        "baseline.json of a dense run: the penalty then follows the loss against it",
    ),
    Param(
        "controller_gain", "float", 1.0,
        "factor of the controller's gains; small models in short runs need about 0.01",
        minimum=0.0,
    ),
)  # fmt: skip

_PENALTY = (
    _preset("compute_penalty", "float", "weight of the expected depth in the loss", 0.0),
    Param(
        "router_warmup_ratio", "float", 0.05, "share of the steps with the router warm-up term",
        minimum=0.0, maximum=1.0,
    ),
    *_CONTROLLER,
)  # fmt: skip

_TOKENIZER = Param(
    "tokenizer", "path", None,
    "folder of a tokenizer to use instead of learning one, such as a checkpoint",
)  # fmt: skip

_RUN = (
    Param("bf16", "bool", None, "compute in bfloat16; default: where the hardware does"),
    Param(
        "gradient_accumulation", "int", 1, "parts that a process splits its rows into",
        minimum=1, identity=False,
    ),
    Param(
        "gradient_checkpointing", "bool", False, "recompute layers in the backward pass",
        identity=False,
    ),
    Param("eval_rows", "int", 64, "most held-out rows per evaluation, 0 for none", minimum=0),
    Param(
        "eval_steps", "int", None,
        "steps between evaluations; default: 20 over a run that needs them, else at the end",
        minimum=1,
    ),
    Param("save_steps", "int", 0, "steps between resumable states", minimum=0, identity=False),
    Param("seed", "int", None, "seed of weights and order; default: the run's"),
    Param("device", "str", None, "torch device; default: the run's", identity=False),
    Param("dtype", "str", None, "weights are trained in fp32", identity=False),
)  # fmt: skip

_DATASET = Param("dataset", "component:dataset", help="texts to train on")

_FINETUNING = (
    Param("dataset", "component:dataset", help="texts, or prompts with reference answers"),
    Param("checkpoint", "path", help="folder of an N-vium, or of a dense base to convert"),
    Param("exits", "list[int]", None, "depths of a converted base's early exits", minimum=1),
    Param("num_exits", "int", None, "number of its heads instead; default: 4", minimum=1),
    Param(
        "gate_init", "float", None,
        "log-odds that routers start with; default: -4 for a base, an N-vium keeps its own",
    ),
    Param(
        "train_parts", "str", "exits",
        "what learns: the exits over a frozen backbone, the routers alone, or all",
        choices=("exits", "routers", "all"),
    ),
    Param(
        "loss", "str", "full",
        "mixture and compute penalty, the mixture alone, or the last head alone",
        choices=("full", "mix_only", "final_only"),
    ),
    Param(
        "head_loss", "float", None,
        "weight of the early heads' cross-entropy; default: 1 for exits, else 0", minimum=0.0,
    ),
    Param("steps", "int", 300, "optimizer steps", minimum=1),
    Param("batch_size", "int", 8, "rows per optimizer step, over all processes", minimum=1),
    Param(
        "context_length", "int", None, "tokens per row; default: the model's context, 512 at most",
        minimum=2,
    ),
    Param(
        "learning_rate", "float", None,
        "peak learning rate; default: 1e-3, or 1e-5 when all learns", minimum=0.0,
    ),
    Param("warmup_ratio", "float", 0.05, "share of the steps that the rate rises over",
          minimum=0.0, maximum=1.0),
    Param("weight_decay", "float", 0.01, "decay of matrices", minimum=0.0),
    Param(
        "compute_penalty", "float", None,
        "weight of the expected depth in the loss; default: the checkpoint's", minimum=0.0,
    ),
    Param(
        "router_warmup_ratio", "float", 0.0, "share of the steps with the router warm-up term",
        minimum=0.0, maximum=1.0,
    ),
    *_CONTROLLER,
    Param(
        "hold_base_loss", "bool", False,
        "the penalty follows the last head's validation loss before training",
    ),
)  # fmt: skip


@hookimpl
def tenfold_plugin() -> PluginInfo:
    return PluginInfo(
        "nvium",
        "Mixture-of-exits transformers with exact accelerated generation",
        paper="arXiv:2605.13190",
    )


@hookimpl
def tenfold_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            "causal-lm",
            "tenfold_nvium.lm:load",
            "N-vium: a learned mixture of exits, decoded exactly with deferred layers",
            params=_LOADING,
            provides=_CAPABILITIES,
            trainer="nvium:pretrain",
            modules=_HEAVY,
            extras=_EXTRAS,
            tags=("language model", "early exit"),
        ),
        ComponentSpec(
            "dense",
            "tenfold_nvium.lm:load_dense",
            "Dense twin of an N-vium: one exit, as many parameters, the same decoder",
            params=_LOADING,
            provides=_CAPABILITIES,
            trainer="nvium:pretrain-dense",
            modules=_HEAVY,
            extras=_EXTRAS,
            tags=("language model", "baseline"),
        ),
        *baselines.models(_LOADING, modules=_HEAVY, extras=_EXTRAS),
    ]


_SELECTION = (
    Param("limit", "int", None, "at most this many records", minimum=1),
    Param("shuffle_seed", "int", None, "shuffle by this seed, before `limit`"),
)


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            "spec-bench",
            "tenfold_nvium.spec_bench:SpecBench",
            "Prompts of a file in Spec-Bench's format: the first turn of each question",
            params=(
                Param("path", "path", help="JSON Lines with question_id, category and turns"),
                Param("categories", "list[str]", (), "only these categories; empty means all"),
                *_SELECTION,
            ),
            provides=("prompt",),
            tags=("prompts", "speed", "files"),
        ),
        ComponentSpec(
            "mixed-difficulty",
            "tenfold_nvium.mixed_difficulty:MixedDifficulty",
            "Texts with an easy, an impossible and a repeated part, to see depth adapt",
            params=(
                Param("count", "int", 2000, "texts in the split train", minimum=1),
                Param("length", "int", 96, "characters per text", minimum=4),
                Param(
                    "bigram",
                    "float",
                    0.5,
                    "share of a text with likely next characters",
                    minimum=0.0,
                    maximum=1.0,
                ),
                Param(
                    "noise",
                    "float",
                    0.1,
                    "probability of another character there",
                    minimum=0.0,
                    maximum=1.0,
                ),
                Param("min_period", "int", 12, "shortest random string", minimum=1),
                Param("max_period", "int", 12, "longest random string", minimum=1),
                Param(
                    "split",
                    "str",
                    "train",
                    "the split that is read where none is named",
                    choices=("train", "validation", "test"),
                ),
                Param("seed", "int", 0, "seed of the table and the texts"),
                *_SELECTION,
            ),
            provides=("text",),
            tags=("synthetic", "testing"),
        ),
    ]


@hookimpl
def tenfold_trainers() -> list[ComponentSpec]:
    data = {"dataset": ("text",)}
    modules = (*_HEAVY, "accelerate")
    return [
        ComponentSpec(
            "pretrain",
            "tenfold_nvium.trainers:Pretrainer",
            "Train an N-vium from scratch on text",
            params=(
                _DATASET, *_SHAPE, *_PENALTY,
                Param("dense", "bool", False, "train the dense twin instead"), _TOKENIZER, *_RUN,
            ),
            data=data,
            modules=modules,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "pretrain-dense",
            "tenfold_nvium.trainers:DensePretrainer",
            "Train the parameter-matched dense twin of an N-vium; writes baseline.json",
            params=(_DATASET, *_SHAPE, _TOKENIZER, *_RUN),
            data=data,
            modules=modules,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "finetune",
            "tenfold_nvium.finetune:Finetuner",
            "Continue an N-vium, or give a dense checkpoint exits and train them",
            params=(*_FINETUNING, *_RUN),
            data={"dataset": ("text", "prompt")},
            modules=modules,
            extras=_EXTRAS,
        ),
        *baselines.trainers(
            _DATASET, _SHAPE, _RUN, data=data, modules=modules, extras=_EXTRAS
        ),
    ]  # fmt: skip


_SAMPLING = (
    Param("max_new_tokens", "int", 48, "tokens to generate per prompt", minimum=0),
    Param("temperature", "float", 1.0, "0 decodes greedily, 1 samples the mixture", minimum=0.0),
    Param("top_k", "int", None, "keep so many tokens", minimum=1),
    Param("top_p", "float", 1.0, "keep this much probability", minimum=0.0, maximum=1.0),
)

_OFFSETS = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    data = {"dataset": ("prompt", "text")}
    return [
        ComponentSpec(
            "profile",
            "tenfold_nvium.profile:Profile",
            "Where tokens leave, how good each head is, what waits; text shaded by depth",
            version=2,
            params=(
                *_SAMPLING,
                Param("max_text_tokens", "int", 256, "longest text that is scored", minimum=2),
            ),
            requires={"model": ("exits", "generate", "tokenize")},
            data=data,
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "speed",
            "tenfold_nvium.speed:Speed",
            "How fast models decode the same prompts, taking turns; measured against the limit",
            params=(
                Param("baseline", "str", "dense", "role that speed-ups refer to"),
                Param("max_new_tokens", "int", 64, "tokens per prompt", minimum=2),
                *_SAMPLING[1:],
                Param("max_prompt_tokens", "int", 896, "longer prompts keep their end", minimum=1),
                Param("rounds", "int", 3, "timed rounds per prompt", minimum=1),
                Param("seed", "int", None, "of sampling; default: the run's"),
            ),
            requires={"*": ("generate",)},
            data=data,
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "tradeoff",
            "tenfold_nvium.tradeoff:Tradeoff",
            "Perplexity against depth and speed: shifted routers, fixed exits, a dense twin",
            params=(
                Param(
                    "offsets",
                    "list[float]",
                    _OFFSETS,
                    "numbers added to the routers' log-odds; 0 is always among them",
                ),
                Param("max_text_tokens", "int", 256, "longest text that is scored", minimum=1),
                Param("time_runs", "int", 3, "timed passes, 0 measures no speed", minimum=0),
                Param("time_prompts", "int", 4, "prompts per pass", minimum=1),
                Param("time_tokens", "int", 48, "new tokens per prompt", minimum=2),
                Param("max_prompt_tokens", "int", 32, "longer prompts keep their end", minimum=1),
            ),
            requires={
                "model": ("exits", "generate", "tokenize"),
                "dense?": ("exits", "generate", "tokenize"),
            },
            data=data,
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "exactness",
            "tenfold_nvium.exactness:Exactness",
            "Checks that piggybacked decoding equals full recomputation on a checkpoint",
            params=(
                Param("max_new_tokens", "int", 32, "tokens per prompt", minimum=1),
                Param("max_prompt_tokens", "int", 32, "longer prompts keep their end", minimum=1),
                Param("policy", "str", "sample", "exit policy to check"),
                Param("float64", "bool", True, "check a copy of the model in fp64"),
                Param("max_deferred", "int", None, "most positions to defer", minimum=1),
            ),
            requires={"model": ("exits", "generate", "tokenize")},
            data=data,
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
    ]


_POLICY = "auto, sample, sample:<temperature>, certified, full, greedy-router, fixed:<exit>"
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CHECKPOINT = Param("checkpoint", "path", positional=True, help="folder of an N-vium")
_DTYPE = Param("dtype", "str", None, "number type; default: the checkpoint's", choices=_DTYPES)
_MAX_DEFERRED = Param("max_deferred", "int", None, "most positions to defer", minimum=1)


@hookimpl
def tenfold_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            "convert",
            "tenfold_nvium.commands:convert",
            "give a dense Llama, Mistral, Qwen2 or Qwen3 checkpoint exits",
            (
                Param("base", "path", positional=True, help="folder of the dense checkpoint"),
                Param("out", "path", positional=True, help="new folder; nothing is overwritten"),
                Param("exits", "list[int]", None, "depths of the early exits, in layers"),
                Param("num_exits", "int", None, "number of heads instead; default: 4", minimum=1),
                Param(
                    "gate_init", "str", "closed",
                    "closed (the base exactly, for use), or log-odds such as -4 (for training)",
                ),
                Param(
                    "head_init", "str", "copy_final_norm", "how the exits' norms start",
                    choices=("copy_final_norm", "ones"),
                ),
                Param(
                    "tying", "str", "lm_head", "what the early heads share",
                    choices=("lm_head", "embeddings", "none"),
                ),
                Param("adapter_size", "int", None, "inner width of adapters, 0 for none; "
                      "default: the hidden size", minimum=0),
                Param("final_adapter", "bool", False, "an adapter at the last exit, too"),
                Param("compute_penalty", "float", 0.15, "penalty of later training", minimum=0.0),
                Param("seed", "int", 0, "seed of routers and adapters"),
                _DTYPE,
            ),
        ),
        CommandSpec(
            "export",
            "tenfold_nvium.commands:export",
            "write a folder that transformers loads without this package",
            (
                _CHECKPOINT,
                Param("out", "path", positional=True, help="new folder; nothing is overwritten"),
            ),
        ),
        CommandSpec(
            "info",
            "tenfold_nvium.commands:info",
            "count parameters, work and the speed bound of a checkpoint or preset",
            (
                Param("checkpoint", "path", None, positional=True, help="folder of an N-vium"),
                Param("preset", "str", None, "named shape instead, such as h768-l24"),
            ),
        ),
        CommandSpec(
            "generate",
            "tenfold_nvium.commands:generate",
            "write a text, coloured by the exit of each token",
            (
                _CHECKPOINT,
                Param("prompt", "str", help="text to continue; - reads it from stdin"),
                Param("policy", "str", "auto", f"where tokens leave: {_POLICY}"),
                Param("temperature", "float", 1.0, "0 decodes greedily", minimum=0.0),
                Param("top_k", "int", None, "keep so many tokens", minimum=1),
                Param("top_p", "float", 1.0, "keep this much probability", minimum=0.0,
                      maximum=1.0),
                Param("warp_scope", "str", "head",
                      "where temperature, top-k and top-p apply: the chosen head or the mixture",
                      choices=("head", "mixture")),
                Param("seed", "int", 0, "the same seed gives the same text"),
                Param("max_new_tokens", "int", 64, "longest text", minimum=1),
                _MAX_DEFERRED,
                Param("trace", "path", None, "JSON file for the decode trace"),
                Param("device", "str", "cpu", "torch device"),
                _DTYPE,
            ),
        ),
        CommandSpec(
            "verify",
            "tenfold_nvium.commands:verify",
            "check that decoding is exact on a checkpoint; exit code 1 where it differs",
            (
                _CHECKPOINT,
                Param("prompt", "str", None, "a prompt to check besides random ones"),
                Param("num_prompts", "int", 4, "random prompts", minimum=0),
                Param("max_new_tokens", "int", 32, "tokens per prompt", minimum=1),
                Param("policy", "str", "sample", f"exit policy to check: {_POLICY[6:]}"),
                _MAX_DEFERRED,
                Param("float64", "bool", True, "check a copy in fp64, the rigorous way"),
                Param("tolerance", "float", None, "largest difference; default: 1e-8 in fp64, "
                      "else 1e-3", minimum=0.0),
                Param("draws", "int", 4000, "sampled texts for the chi-square test of small "
                      "vocabularies, 0 for none", minimum=0),
                Param("seed", "int", 0, "seed of prompts and texts"),
                _DTYPE,
            ),
        ),
    ]  # fmt: skip
