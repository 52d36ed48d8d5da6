"""The plugin `nvium`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import ComponentSpec, Param, PluginInfo, hookimpl

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

_PENALTY = (
    _preset("compute_penalty", "float", "weight of the expected depth in the loss", 0.0),
    Param(
        "router_warmup_ratio", "float", 0.05, "share of the steps with the router warm-up term",
        minimum=0.0, maximum=1.0,
    ),
    Param(
        "controller", "path", None,
        "baseline.json of a dense run: the penalty then follows the loss against it",
    ),
)  # fmt: skip

_RUN = (
    Param(
        "tokenizer", "path", None,
        "folder of a tokenizer to use instead of learning one, such as a checkpoint",
    ),
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
                Param("dense", "bool", False, "train the dense twin instead"), *_RUN,
            ),
            data=data,
            modules=modules,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "pretrain-dense",
            "tenfold_nvium.trainers:DensePretrainer",
            "Train the parameter-matched dense twin of an N-vium; writes baseline.json",
            params=(_DATASET, *_SHAPE, *_RUN),
            data=data,
            modules=modules,
            extras=_EXTRAS,
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
