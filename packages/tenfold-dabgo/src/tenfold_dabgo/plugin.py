"""What the plugin `dabgo` offers: descriptions only, nothing heavy is imported here."""

from __future__ import annotations

from tenfold.hookspecs import hookimpl
from tenfold.spec import ComponentSpec, Param, PluginInfo

_METHODS = (
    "dabgo", "bm25", "gradient-dot", "gradient-cosine", "trackstar", "trak", "datainf",
    "untrac-inv", "embeddings", "perplexity", "random", "bergson", "kronfluence",
)  # fmt: skip

_STEPS = (
    Param("rule", "str", "natural_gradient", "how the weights move",
          choices=("natural_gradient", "ewc_adamw", "sgd", "sign_sgd")),
    Param("steps", "int", 10, "steps in each direction", minimum=1),
    Param("lr", "float", None, "step size alpha; left out: chosen by `change`", minimum=0),
    Param("change", "float", 1.0, "automatic step size: the first-order change of the query's "
          "loss after all steps, nats per token", minimum=0),
    Param("damping", "float", None, "epsilon in 1 / (F + epsilon); left out: relative_damping "
          "times the mean of F", minimum=0),
    Param("relative_damping", "float", 1.5, "damping as a multiple of the mean of F", minimum=0),
    Param("dataset_size", "int", None, "N of the step alpha / N; left out: the number of samples",
          minimum=1),
    Param("params", "str", "all", "weights that move: all, attention, mlp, kv, no-embeddings, "
          "last-N-layers, lora, or re:<pattern>"),
    Param("ewc_weight", "float", 50.0, "lambda of ewc_adamw", minimum=0),
    Param("weight_decay", "float", 0.0, "weight decay of ewc_adamw", minimum=0),
    Param("grad_clip", "float", None, "gradient norm limit of ewc_adamw", minimum=0),
    Param("dropout", "bool", False, "keep dropout active in the steps (seeded)"),
)  # fmt: skip

_FISHER = (
    Param("fisher", "str", "sample_mean", "kind of Fisher",
          choices=("sample_mean", "sample_sum", "token", "sampled", "identity", "file")),
    Param("fisher_path", "path", None, 'safetensors file for fisher = "file"'),
    Param("fisher_max_samples", "int", None, "estimate F on a random subset of this size",
          minimum=1),
    Param("fisher_force", "bool", False, "accept a Fisher file of another model or corpus"),
)  # fmt: skip

_CORPUS = (
    Param("window", "int", None, "longest sample in tokens; left out: the model's context",
          minimum=2),
    Param("stride", "int", None, "distance of windows; left out: no overlap", minimum=1),
    Param("min_tokens", "int", 2, "drop shorter windows of longer texts", minimum=1),
    Param("dedupe", "bool", False, "leave out samples that repeat another one exactly"),
    Param("truncate", "bool", False, "cut queries that do not fit the model's context"),
)  # fmt: skip

_OUTPUT = (
    Param("view", "str", None, "signed, abs, ascent or descent; left out: the preset's",
          choices=("signed", "abs", "ascent", "descent")),
    Param("top_k", "int", 10, "proponents and opponents to show", minimum=1),
    Param("columns", "list[str]", ("module", "package", "author"),
          "metadata columns of the roll-ups"),
    Param("how", "str", "mean", "roll-up: sum, mean, max, share or topk_mean:<k>"),
    Param("min_group", "int", 1, "leave smaller groups out of the roll-ups", minimum=1),
    Param("compare", "list[str]", (), "methods to compare with", choices=_METHODS),
    Param("export", "list[str]", (), "also write each ranking to artifacts/exports, as these "
          "formats", choices=("jsonl", "csv", "parquet", "markdown", "latex")),
    Param("base_losses", "bool", False, "also evaluate the unchanged model"),
)  # fmt: skip

_SCALE = (
    Param("prefilter", "float", None, "share of the corpus that is scored exactly, chosen by "
          "first-order scores of all queries in one pass; left out: all of it",
          minimum=0, maximum=1),
    Param("early_stop", "float", None, "score only as much as the top_k groups of "
          "early_stop_by need, with this probability of a wrong set; left out: everything",
          minimum=0, maximum=1),
    Param("early_stop_by", "str", "document", "metadata column of those groups, or document"),
    Param("precision", "str", "float32", "of the loss pass; a lower one is used only if a probe "
          "ranks alike", choices=("float32", "bfloat16", "float16")),
    Param("token_budget", "int", 8192, "tokens per batch, padding included", minimum=1,
          identity=False),
    Param("shard_samples", "int", 4096, "samples per file of an unfinished pass: what an "
          "interruption loses at most", minimum=1, identity=False),
    Param("force", "bool", False, "discard what an interrupted pass over another model or corpus "
          "left, instead of refusing to go on", identity=False),
    Param("seed", "int", None, "seed; left out: the run's seed"),
)  # fmt: skip

ATTRIBUTION = ComponentSpec(
    name="attribution",
    target="tenfold_dabgo.evaluator:Attribution",
    summary="which training texts shaped a generated text, by bidirectional gradient steps",
    params=(
        Param("method", "str", "dabgo", "attribution method", choices=_METHODS),
        Param("preset", "str", "recommended", "recommended, or the paper's constants",
              choices=("recommended", "paper")),
        *_OUTPUT,
        *_STEPS,
        *_FISHER,
        *_SCALE,
        *_CORPUS,
    ),
    requires={"model": ("grad", "tokenize")},
    data={"train": ("text",), "queries": ("sample", "text", "prompt")},
    modules=("torch", "numpy", "transformers"),
    tags=("attribution", "data", "interpretability"),
    cost="tenfold_dabgo.cost:plan_cost",
)  # fmt: skip


@hookimpl
def tenfold_plugin() -> PluginInfo:
    return PluginInfo(
        "dabgo",
        "Training-data attribution by bidirectional gradient optimization",
        paper="arXiv:2606.04928",
    )


TOPICS = ComponentSpec(
    name="synthetic-topics",
    target="tenfold_dabgo.topics:SyntheticTopics",
    summary="texts from topic bigram tables: a small corpus whose texts have a known origin",
    params=(
        Param("n", "int", 208, "number of texts", minimum=1),
        Param("length", "int", 32, "characters per text", minimum=2),
        Param("vocabulary", "int", 96, "different characters", minimum=2, maximum=96),
        Param("topics", "int", 8, "number of topics", minimum=1),
        Param("held_out", "int", 16, "how many of the last texts form the split test", minimum=0),
        Param("split", "str", "train", "the split that is read where none is named",
              choices=("train", "test")),
        Param("seed", "int", 0, "seed of the tables and texts"),
    ),
    provides=("text",),
    modules=("numpy",),
    tags=("synthetic", "testing"),
)  # fmt: skip


_SELECTION = (
    Param("limit", "int", None, "at most this many records", minimum=1),
    Param("shuffle_seed", "int", None, "shuffle by this seed, before `limit`"),
)
_COLUMNS = (
    Param("ids_column", "str", "input_ids", "column of the token ids"),
    Param("text_column", "str", "text", "column of the text"),
    Param("id_column", "str", "id", "column of the id; where it is missing, the row's place"),
)

TOKEN_FILES = (
    ComponentSpec(
        name="token-npy",
        target="tenfold_dabgo.token_files:NpyTokens",
        summary="token ids in .npy arrays: a text per row, or per array",
        params=(
            Param("path", "path", help="a .npy file, a folder of them, or a glob"),
            Param("pad_id", "int", None, "this id at the end of a row is padding", minimum=0),
            Param("columns", "path", None, "JSON Lines file with ids and metadata of the texts"),
            *_SELECTION,
        ),
        provides=("text",),
        modules=("numpy",),
        tags=("files", "tokens"),
    ),
    ComponentSpec(
        name="token-jsonl",
        target="tenfold_dabgo.token_files:JsonlTokens",
        summary="JSON Lines whose rows hold token ids (`input_ids`) or text",
        params=(
            Param("path", "path", help="a file, a folder of .jsonl files, or a glob"),
            *_COLUMNS,
            *_SELECTION,
        ),
        provides=("text",),
        modules=("numpy",),
        tags=("files", "tokens"),
    ),
    ComponentSpec(
        name="hf-disk",
        target="tenfold_dabgo.token_files:HfDisk",
        summary="a Hugging Face dataset folder (`save_to_disk`) with texts or token ids",
        params=(
            Param("path", "path", help="the folder"),
            Param("split", "str", "", "split of a DatasetDict; left out: its only one"),
            *_COLUMNS,
            *_SELECTION,
        ),
        provides=("text",),
        modules=("numpy",),
        extras=("tenfold-dabgo[datasets]",),
        tags=("files", "tokens", "huggingface"),
    ),
)  # fmt: skip


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    return [TOPICS, *TOKEN_FILES]


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    return [ATTRIBUTION]
