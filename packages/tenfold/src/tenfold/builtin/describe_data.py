"""Descriptions of the built-in datasets: plain data, nothing imported beyond `tenfold.spec`."""

from __future__ import annotations

from tenfold.spec import ComponentSpec, Param

GENERATION: tuple[Param, ...] = (
    Param("max_new_tokens", "int", 128, "longest completion, in tokens", minimum=1),
    Param("temperature", "float", 0.0, "0 is greedy", minimum=0),
    Param("top_p", "float", 1.0, "nucleus sampling; above 0, up to 1", minimum=0, maximum=1),
    Param("top_k", "int", None, "sample from the k likeliest tokens only", minimum=1),
    Param("stop", "list[str]", (), "texts that end a completion; they are not part of it"),
    Param("constraint", "table", None, "json_schema, regex or choice that completions follow"),
    Param("chat", "bool", True, "write message lists with the model's chat template"),
    Param("seed", "int", None, "seed of sampling; left out: the run's seed"),
)
"""Parameters that become a `GenerationConfig`, shared by everything that generates."""

PROMPT_CUT: tuple[Param, ...] = (
    Param("prompt_chars", "int", None, "text records: this many characters are the prompt, "
          "the rest is the reference", minimum=1),
    Param("prompt_lines", "int", None, "text records: this many lines are the prompt, "
          "the rest is the reference", minimum=1),
)  # fmt: skip
"""How a text record becomes a prompt."""

_SELECTION = (
    Param("limit", "int", None, "at most this many records", minimum=1),
    Param("shuffle_seed", "int", None, "shuffle by this seed, before `limit`"),
)
_LENGTHS = (
    Param("min_chars", "int", 1, "leave shorter texts out", minimum=0),
    Param("max_chars", "int", None, "leave longer texts out", minimum=1),
)


def _splits(fraction: float, by: str) -> tuple[Param, ...]:
    """Parameters of a dataset that splits itself by a stable hash."""
    return (
        Param("split", "str", "train", "the split that is read where none is named",
              choices=("train", "validation", "test", "all")),
        Param("validation", "float", fraction, f"share of {by} in the split `validation`",
              minimum=0, maximum=1),
        Param("test", "float", fraction, f"share of {by} in the split `test`",
              minimum=0, maximum=1),
    )  # fmt: skip


_PYTHON = (
    Param("packages", "list[str]", (), "only these packages or modules (`json`, `email.mime`)"),
    Param("exclude", "list[str]", (), "not these packages or modules"),
    Param("include_tests", "bool", False, "also the standard library's own tests"),
)

_FILES = (
    Param("path", "path", help="a file, a folder, or a glob such as `books/**/*.txt`"),
    Param("encoding", "str", "utf-8", "how the files are written",
          choices=("utf-8", "latin-1", "cp1252")),
)  # fmt: skip

STDLIB = (
    ComponentSpec(
        name="python-stdlib",
        target="tenfold.builtin.python_stdlib:PythonStdlib",
        summary="source code or docstrings of the Python standard library on this machine",
        params=(
            Param("unit", "str", "module", "what one record holds",
                  choices=("module", "class", "function", "docstring")),
            *_PYTHON,
            *_LENGTHS,
            *_splits(0.05, "modules"),
            *_SELECTION,
        ),
        provides=("text",),
        tags=("code", "python", "real"),
    ),
    ComponentSpec(
        name="python-prompts",
        target="tenfold.builtin.python_prompts:PythonPrompts",
        summary="functions of held-out standard-library modules: signature as prompt, "
        "body or docstring as reference",
        params=(
            Param("task", "str", "body", "what is to be written", choices=("body", "docstring")),
            Param("docstrings", "str", "keep", "for task `body`: keep docstrings in prompts, "
                  "drop them, or take only functions that have one",
                  choices=("keep", "drop", "require")),
            *_PYTHON,
            Param("min_chars", "int", 40, "leave shorter references out", minimum=1),
            Param("max_chars", "int", None, "leave longer references out", minimum=1),
            Param("max_prompt_chars", "int", None, "leave longer prompts out", minimum=1),
            Param("split", "str", "test", "the split that is read where none is named",
                  choices=("train", "validation", "test", "all")),
            *_splits(0.05, "modules")[1:],
            *_SELECTION,
        ),
        provides=("prompt",),
        tags=("code", "python", "real"),
    ),
)  # fmt: skip

TEXT = ComponentSpec(
    name="text",
    target="tenfold.builtin.files:TextFiles",
    summary="text files: one record per file, paragraph or line",
    params=(
        _FILES[0],
        Param("pattern", "str", "**/*", "which files of a folder"),
        Param(
            "unit", "str", "file", "what one record holds", choices=("file", "paragraph", "line")
        ),
        _FILES[1],
        *_LENGTHS,
        *_splits(0.0, "files (of records, when there is one file)"),
        *_SELECTION,
    ),
    provides=("text",),
    tags=("files",),
)

_FORMATS = {
    "jsonl": "JSON Lines files: one object per line",
    "csv": "CSV files with a header line",
    "parquet": "Parquet files",
}
_KINDS: dict[str, tuple[str, str, tuple[Param, ...]]] = {
    "text": (
        "",
        "text records",
        (Param("text_column", "str", "text", "column of the text"),),
    ),
    "prompt": (
        "-prompts",
        "prompts with optional references",
        (
            Param("prompt_column", "str", "prompt", "column of the prompt: text, or messages"),
            Param("reference_column", "str", "reference", "column of the reference, if any"),
        ),
    ),
    "preference": (
        "-preferences",
        "prompts with a preferred and a rejected answer",
        (
            Param("prompt_column", "str", "prompt", "column of the prompt: text, or messages"),
            Param("chosen_column", "str", "chosen", "column of the preferred answer"),
            Param("rejected_column", "str", "rejected", "column of the rejected answer"),
        ),
    ),
}


def _table(form: str, kind: str) -> ComponentSpec:
    """A dataset over one file format that gives one record kind."""
    suffix, what, columns = _KINDS[kind]
    encoding = (_FILES[1],) if form == "csv" else ()
    parquet = form == "parquet"
    return ComponentSpec(
        name=f"{form}{suffix}",
        target=f"tenfold.builtin.tables:{form}_{kind}",
        summary=f"{what} from {_FORMATS[form]}",
        params=(
            _FILES[0],
            *columns,
            Param("id_column", "str", "id", "column of the id; where it is missing, ids come "
                  "from the content"),
            *encoding,
            *_splits(0.0, "records"),
            *_SELECTION,
        ),
        provides=(kind,),
        modules=("pyarrow",) if parquet else (),
        extras=("tenfold[parquet]",) if parquet else (),
        tags=("files",),
    )  # fmt: skip


TABLES = tuple(_table(form, kind) for form in _FORMATS for kind in _KINDS)

SAMPLES = (
    ComponentSpec(
        name="run-samples",
        target="tenfold.builtin.run_samples:RunSamples",
        summary="what a model wrote in an earlier run of core:generate",
        params=(
            Param("run", "str", help="a run folder, or a run's name for its newest finished run",
                  identity=False),
            Param("role", "str", "", "only samples of this model role"),
            Param("partial", "bool", False, "also accept a run that did not finish well"),
            *_SELECTION,
        ),
        provides=("sample",),
        tags=("runs",),
    ),
    ComponentSpec(
        name="generated",
        target="tenfold.builtin.generated:Generated",
        summary="what a model writes now, for prompts or for the beginnings of texts",
        params=(
            Param("model", "component:model", help="the model that writes"),
            Param("prompts", "component:dataset", help="prompts, or texts to begin with"),
            Param("n", "int", 1, "samples per prompt", minimum=1),
            *GENERATION,
            *PROMPT_CUT,
            Param("batch_size", "int", 8, "prompts per call of the model", minimum=1,
                  identity=False),
            *_SELECTION,
        ),
        provides=("sample",),
        requires={"model": ("generate",)},
        data={"prompts": ("prompt", "text")},
        tags=("generation",),
    ),
)  # fmt: skip

DATASETS: list[ComponentSpec] = [*STDLIB, TEXT, *TABLES, *SAMPLES]
