"""Descriptions that would crowd the plugin's own module: plain data, nothing heavy."""

from __future__ import annotations

from tenfold import CommandSpec, ComponentSpec, Param

_SELECTION = (
    Param("limit", "int", None, "at most this many records", minimum=1),
    Param("shuffle_seed", "int", None, "shuffle by this seed, before `limit`"),
)
_LINES = Param("path", "path", help="JSON Lines of messages, of prompt and response, or of "
               "input_ids and loss_mask")  # fmt: skip

DATASETS = [
    ComponentSpec(
        "benchmark",
        "tenfold_treeflash.benchmark_prompts:BenchmarkPrompts",
        "Prompts of GSM8K, MATH-500, HumanEval, MBPP or MT-Bench, the published choice of samples",
        params=(
            Param("name", "str", help="which one",
                  choices=("gsm8k", "math500", "humaneval", "mbpp", "mt-bench")),
            Param("path", "path", None, "your copy: JSON Lines, Parquet or a folder of "
                  "save_to_disk; left out: the cache of Hugging Face datasets"),
            Param("n_samples", "int", 64, "rows that are chosen, by sample_seed", minimum=1),
            Param("sample_seed", "int", 42, "of the choice"),
            Param("suffix", "str", "", "put behind every question, such as ' /no_think'"),
            Param("model", "component:model", None, "answers first turns, so that second ones are "
                  "asked too (mt-bench)"),
            Param("answer_tokens", "int", 2048, "most tokens of such an answer", minimum=1),
            Param("offline", "bool", None, "never ask the hub; left out: the workspace's setting",
                  identity=False),
            *_SELECTION,
        ),
        provides=("prompt",),
        requires={"model": ("generate",)},
        extras=("tenfold-treeflash[datasets]",),
        tags=("prompts", "benchmark"),
    ),
    ComponentSpec(
        "rows",
        "tenfold_treeflash.training_rows:TrainingRows",
        "Training data of drafters: conversations, prompts with responses, or tokens with a mask",
        params=(
            _LINES,
            Param("validation", "float", 0.0, "share of records in the split `validation`",
                  minimum=0.0, maximum=1.0),
            *_SELECTION,
        ),
        provides=("sample",),
        tags=("training", "files"),
    ),
    ComponentSpec(
        "row-prompts",
        "tenfold_treeflash.training_rows:row_prompts",
        "The prompts of such data, to be answered anew by the model that a drafter is for",
        params=(
            _LINES,
            Param("suffix", "str", "", "put behind every newest message, such as ' /no_think'"),
            *_SELECTION,
        ),
        provides=("prompt",),
        tags=("prompts", "files"),
    ),
]  # fmt: skip

EVALUATORS = [
    ComponentSpec(
        "tree-sizes",
        "tenfold_treeflash.tree_sizes:TreeSizes",
        "One decoder with every tree size, taking turns: speed, tokens per round, time by stage",
        params=(
            Param("tree_sizes", "list[int]", (1, 2, 4, 8, 16, 32, 64), "nodes per round",
                  minimum=1),
            Param("max_new_tokens", "int", 64, "tokens per prompt", minimum=2),
            Param("temperature", "float", 0.0, "0 decodes greedily", minimum=0.0),
            Param("rounds", "int", 2, "timed turns per prompt, after an untimed one", minimum=1),
            Param("max_prompt_tokens", "int", 512, "longer prompts keep their end", minimum=1),
            Param("seed", "int", None, "of sampling; default: the run's"),
        ),
        requires={"model": ("generate", "grad", "tokenize")},
        data={"dataset": ("prompt", "text")},
        modules=("torch", "transformers"),
        extras=("tenfold-treeflash",),
    ),
]  # fmt: skip

PLACEMENT = (
    Param("device", "str", None, "torch device; default: cpu, or the run's"),
    Param("dtype", "str", None, "number type of the weights",
          choices=("float32", "bfloat16", "float16", "float64")),
)  # fmt: skip
"""Where a command computes, and in what."""

_SET = Param("set", "list[str]", (), "further settings of the run file, as dataset.KEY=VALUE")
_SEED = Param("seed", "int", 0, "the run's seed")
_TARGET = Param("target", "path", positional=True, help="folder of the model")

COMMANDS = [
    CommandSpec(
        "build-data",
        "tenfold_treeflash.training_commands:build_data",
        "let a model answer prompts: the data that its drafter learns from; resumable",
        (
            _TARGET,
            Param("out", "path", positional=True, help="JSON Lines file to write"),
            Param("prompts", "str", "core:python-prompts", "JSON Lines (see treeflash:rows), or a "
                  "data set's id"),
            Param("n", "int", 1, "answers per prompt", minimum=1),
            Param("max_new_tokens", "int", 512, "longest answer", minimum=1),
            Param("temperature", "float", 1.0, "0 decodes greedily", minimum=0.0),
            Param("top_p", "float", 1.0, "keep this much probability", minimum=0.0, maximum=1.0),
            Param("top_k", "int", None, "keep so many tokens", minimum=1),
            Param("suffix", "str", "", "put behind every prompt of a file, such as ' /no_think'"),
            Param("limit", "int", None, "at most so many prompts", minimum=1),
            Param("batch_size", "int", 8, "prompts at once", minimum=1),
            _SEED,
            *PLACEMENT,
            _SET,
        ),
    ),
    CommandSpec(
        "train",
        "tenfold_treeflash.training_commands:train",
        "train a drafter for a model; resumable",
        (
            _TARGET,
            Param("data", "str", positional=True, help="JSON Lines (see treeflash:rows), or a data "
                  "set's id"),
            Param("out", "path", positional=True, help="folder for the drafter"),
            Param("phase", "str", "both", "dflash: marginals; treeflash: corrections; both; joint",
                  choices=("both", "dflash", "treeflash", "joint")),
            Param("init", "path", None, "drafter to begin with"),
            Param("layers", "int", None, "layers of the drafter", minimum=1),
            Param("block_size", "int", None, "tokens per block", minimum=2),
            Param("steps", "int", None, "steps (of the first phase)", minimum=1),
            Param("steps_b", "int", None, "steps of phase treeflash", minimum=1),
            Param("batch_size", "int", None, "rows per step", minimum=1),
            Param("context_length", "int", None, "tokens per row", minimum=4),
            Param("features", "str", "online", "run the model in every step, or store its states",
                  choices=("online", "stored")),
            Param("processes", "int", 1, "processes that train together", minimum=1),
            Param("launcher", "str", "auto", "what starts them",
                  choices=("auto", "none", "torchrun", "accelerate", "deepspeed")),
            _SEED,
            *PLACEMENT,
            _SET,
        ),
    ),
    CommandSpec(
        "evaluate",
        "tenfold_treeflash.training_commands:evaluate",
        "measure a drafter by depth and tree size on given texts, without generating",
        (
            _TARGET,
            Param("drafter", "path", positional=True, help="folder of its drafter"),
            Param("data", "str", "core:python-stdlib", "texts: JSON Lines (see treeflash:rows), or "
                  "a data set's id"),
            Param("method", "str", "tree", "what is drafted",
                  choices=("tree", "marginal", "chain")),
            Param("tree_sizes", "list[int]", (1, 4, 8, 16, 32, 64), "nodes per round", minimum=1),
            Param("anchors", "int", 16, "blocks per text", minimum=1),
            Param("max_text_tokens", "int", 256, "longer texts are cut", minimum=4),
            Param("limit", "int", 32, "at most so many texts", minimum=1),
            _SEED,
            *PLACEMENT,
            _SET,
        ),
    ),
    CommandSpec(
        "convert",
        "tenfold_treeflash.training_commands:convert",
        "write a drafter in another layout: treeflash, dflash, or that of speculators",
        (
            Param("source", "path", positional=True, help="folder of a drafter, any layout"),
            Param("out", "path", positional=True, help="new folder"),
            Param("to", "str", "treeflash", "the layout",
                  choices=("treeflash", "dflash", "speculators")),
            Param("target", "str", None, "folder of the model it is for (speculators wants it)"),
            Param("approximator", "str", None, "give a drafter without one a new approximator",
                  choices=("swiglu", "linear", "swiglu2")),
            PLACEMENT[1],
        ),
    ),
]  # fmt: skip
