"""Descriptions that would crowd the plugin's own module: plain data, nothing heavy."""

from __future__ import annotations

from tenfold import ComponentSpec, Param

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
