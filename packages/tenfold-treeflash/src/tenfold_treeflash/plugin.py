"""The plugin `treeflash`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

from tenfold_treeflash import describe

_EXTRAS = ("tenfold-treeflash",)
_HEAVY = ("torch", "transformers")
_BASE = ("generate", "grad", "tokenize")

_SEARCH = (
    Param("top_m", "int", 16, "candidates per depth whose followers are computed", minimum=1,
          identity=False),
    Param("top_k", "int", 16, "followers considered per candidate", minimum=1, identity=False),
    Param("temperature", "float", None, "of the drafter's distributions; left out: the published "
          "1, and 0.3 where corrected ones draft greedy texts", minimum=0.0, identity=False),
    Param("shortlist", "int", None, "rank followers among so many tokens per depth only", minimum=1,
          identity=False),
    Param("block_size", "int", None, "slots used, at most the drafter's own", minimum=2,
          identity=False),
)  # fmt: skip

_DEVICE = (
    Param("device", "str", None, "torch device; default: the run's", identity=False),
    Param("dtype", "str", None, "number type; default: the run's",
          choices=("float32", "bfloat16", "float16", "float64")),
)  # fmt: skip


@hookimpl
def tenfold_plugin() -> PluginInfo:
    """Who we are."""
    return PluginInfo(
        name="treeflash",
        summary="Tree speculative decoding with a parallel drafter",
        paper="arXiv:2606.03819",
    )


def _decoder(name: str, target: str, summary: str, *, tree: bool = True) -> ComponentSpec:
    """A decoder; `auto` sizes are for trees."""
    size = Param(
        "tree_size", "int", None,
        "nodes that the model sees per round, the newest token included; left out: by measured cost"
        if tree else "tokens that the model sees per round; left out: the whole block",
        minimum=1, identity=False,
    )  # fmt: skip
    return ComponentSpec(
        name,
        target,
        summary,
        params=(
            Param("base", "component:model", help="the model to decode"),
            Param("drafter", "component:model", help="its drafter (treeflash:drafter)"),
            size,
            *_SEARCH,
        ),
        provides=("generate",),
        requires={"base": _BASE},
        inherits="base",
        modules=_HEAVY,
        extras=_EXTRAS,
    )


@hookimpl
def tenfold_models() -> list[ComponentSpec]:
    """Decoders and drafters."""
    return [
        _decoder(
            "tree",
            "tenfold_treeflash.lm:TreeDecoder",
            "A model decoded with drafted trees: the same text in fewer passes",
        ),
        _decoder(
            "marginal",
            "tenfold_treeflash.lm:marginal",
            "The same with trees of marginals, which no drafted token has a say in",
        ),
        _decoder(
            "chain",
            "tenfold_treeflash.lm:chain",
            "The same with the single best path",
            tree=False,
        ),
        ComponentSpec(
            "drafter",
            "tenfold_treeflash.lm:load",
            "A drafter's checkpoint, published or trained here",
            params=(
                Param("checkpoint", "path", help="folder of a TreeFlash or DFlash drafter"),
                *_DEVICE,
            ),
            trainer="treeflash:drafter",
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
    ]


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    """Prompts to race on."""
    return describe.DATASETS


@hookimpl
def tenfold_trainers() -> list[ComponentSpec]:
    """What trains drafters."""
    return [
        ComponentSpec(
            "drafter",
            "tenfold_treeflash.training:DrafterTrainer",
            "Trains a drafter for a frozen model: marginals first, then what corrects them",
            params=(
                Param("target", "component:model", help="the model to draft for; stays as it is"),
                Param("dataset", "component:dataset",
                      help="what it writes (samples), prompts with references, or texts"),
                Param("init", "path", None, "drafter checkpoint to begin with; its shape counts, "
                      "not layers, block_size, num_features and mask"),
                Param("phase", "str", "both", "dflash: marginals; treeflash: corrections; both in "
                      "turn; joint: both at once",
                      choices=("both", "dflash", "treeflash", "joint")),
                Param("layers", "int", 2, "layers of the drafter", minimum=1),
                Param("block_size", "int", 8, "tokens per block, the newest one included",
                      minimum=2),
                Param("num_features", "int", 5, "layers of the model that the drafter reads",
                      minimum=1),
                Param("ar_approximation", "str", "swiglu", "how drafted tokens are corrected",
                      choices=("swiglu", "linear", "swiglu2")),
                Param("mask", "str", "auto", "token of slots to be drafted: auto, an id, learned"),
                Param("freeze_backbone", "bool", False, "train corrections alone in the second "
                      "phase"),
                Param("steps", "int", 600, "optimizer steps (of the first phase)", minimum=1),
                Param("steps_b", "int", 400, "optimizer steps of phase treeflash", minimum=1),
                Param("batch_size", "int", 16, "rows per step, over all processes", minimum=1),
                Param("learning_rate", "float", 2e-3, "peak learning rate", minimum=0.0),
                Param("learning_rate_b", "float", 1e-3, "the same of phase treeflash",
                      minimum=0.0),
                Param("warmup_ratio", "float", 0.04, "share of the steps that the rate rises over",
                      minimum=0.0, maximum=1.0),
                Param("weight_decay", "float", 0.0, "decay of matrices", minimum=0.0),
                Param("context_length", "int", 256, "tokens per row", minimum=4),
                Param("anchors", "int", 32, "blocks per row", minimum=1),
                Param("marginal_loss", "str", "ce", "marginals against the data, or the model",
                      choices=("ce", "kl")),
                Param("marginal_weight", "float", None, "weight of the marginal term in the loss; "
                      "default: 0.2, in phase joint 0.5", minimum=0.0, maximum=1.0),
                Param("decay", "float", None, "slots that the loss decays over; default: 4 for "
                      "blocks of 8, 7 for 16", minimum=0.0),
                Param("eval_rows", "int", 32, "most held-out rows, 0 for none", minimum=0),
                Param("gradient_accumulation", "int", 1, "parts that a process splits its rows "
                      "into", minimum=1, identity=False),
                Param("save_steps", "int", 0, "steps between resumable states", minimum=0,
                      identity=False),
                Param("bf16", "bool", None, "compute in bfloat16; default: where it is fast"),
                Param("features", "str", "online", "run the model in every step, or store what it "
                      "says of every row once", choices=("online", "stored"), identity=False),
                Param("features_folder", "path", None, "where to store it; default: with the run",
                      identity=False),
                Param("seed", "int", None, "seed of weights and order; default: the run's"),
            ),
            requires={"target": ("grad", "tokenize")},
            data={"dataset": ("sample", "prompt", "text")},
            modules=(*_HEAVY, "accelerate"),
            extras=_EXTRAS,
            version=2,
        ),
    ]  # fmt: skip


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    """What measures them."""
    return [
        ComponentSpec(
            "race",
            "tenfold_treeflash.race:Race",
            "How fast models write the same texts, taking turns; tokens per round; equal or not",
            params=(
                Param("baseline", "str", "plain", "role that speed-ups and texts refer to"),
                Param("max_new_tokens", "int", 64, "tokens per prompt", minimum=2),
                Param("temperatures", "list[float]", (0.0, 1.0), "one race each", minimum=0.0),
                Param("rounds", "int", 3, "timed rounds per prompt", minimum=1),
                Param("max_prompt_tokens", "int", 512, "longer prompts keep their end", minimum=1),
                Param("peers", "list[str]", (), "what transformers can do with the baseline's "
                      "model: prompt-lookup, dflash (needs a role with a drafter)",
                      choices=("prompt-lookup", "dflash")),
                Param("seed", "int", None, "of sampling; default: the run's"),
            ),
            requires={"*": ("generate",)},
            data={"dataset": ("prompt", "text")},
            modules=_HEAVY,
            extras=_EXTRAS,
        ),
        ComponentSpec(
            "diagnostics",
            "tenfold_treeflash.diagnostics:Diagnostics",
            "What drafters foresee of given texts: by depth and tree size, and how well calibrated",
            params=(
                Param("anchors", "int", 16, "blocks per text", minimum=1),
                Param("max_text_tokens", "int", 256, "longer texts are cut", minimum=4),
                Param("coverage", "list[int]", (1, 5, 16), "numbers of best tokens whose share of "
                      "the model's probability is measured", minimum=1),
                Param("tree_sizes", "list[int]", (1, 4, 8, 16, 32, 64), "nodes per simulated round",
                      minimum=1),
                Param("seed", "int", None, "of the blocks; default: the run's"),
            ),
            requires={"model": ("generate", "grad", "tokenize")},
            data={"dataset": ("text", "sample")},
            modules=_HEAVY,
            extras=_EXTRAS,
            version=2,
        ),
        *describe.EVALUATORS,
    ]  # fmt: skip


@hookimpl
def tenfold_commands() -> list[CommandSpec]:
    """`tenfold treeflash ...`."""
    pair = (
        Param("target", "path", positional=True, help="folder of the model"),
        Param("drafter", "path", positional=True, help="folder of its drafter"),
    )
    search = (
        Param("method", "str", "tree", "tree, marginal, chain or none",
              choices=("tree", "marginal", "chain", "none")),
        Param("tree_size", "str", "auto", "nodes per round, or auto"),
        *describe.PLACEMENT,
    )  # fmt: skip
    return [
        CommandSpec(
            "generate",
            "tenfold_treeflash.commands:generate",
            "write a text; tokens per round on stderr",
            (
                *pair,
                Param("prompt", "str", help="text to continue; - reads it from stdin"),
                *search,
                Param("temperature", "float", 0.0, "0 decodes greedily", minimum=0.0),
                Param("seed", "int", 0, "the same seed gives the same text"),
                Param("max_new_tokens", "int", 64, "longest text", minimum=1),
            ),
        ),
        CommandSpec(
            "inspect",
            "tenfold_treeflash.commands:inspect",
            "draw the trees of a text's rounds, with what was accepted",
            (
                *pair,
                Param("prompt", "str", help="text to continue; - reads it from stdin"),
                *search,
                Param("rounds", "int", 3, "rounds to draw", minimum=1),
                Param("seed", "int", 0, "of sampling"),
                Param("temperature", "float", 0.0, "0 decodes greedily", minimum=0.0),
            ),
        ),
        CommandSpec(
            "verify",
            "tenfold_treeflash.commands:verify",
            "check that a pair writes what the model writes alone; exit code 1 where it differs",
            (
                *pair,
                *search,
                Param("num_prompts", "int", 4, "random prompts", minimum=1),
                Param("max_new_tokens", "int", 48, "tokens per prompt", minimum=1),
                Param("seed", "int", 0, "of prompts and texts"),
            ),
        ),
        CommandSpec(
            "calibrate",
            "tenfold_treeflash.commands:calibrate",
            "measure what rounds of each size cost on this machine",
            (*pair, Param("out", "path", None, "JSON file for the result"), *describe.PLACEMENT),
        ),
        CommandSpec(
            "info",
            "tenfold_treeflash.commands:info",
            "describe a drafter, and whether it fits a model",
            (
                Param("drafter", "path", positional=True, help="folder of a drafter"),
                Param("target", "path", None, help="folder of a model"),
                *describe.PLACEMENT,
            ),
        ),
        *describe.COMMANDS,
    ]
