"""What the plugin `dabgo` offers: descriptions only, nothing heavy is imported here."""

from __future__ import annotations

from tenfold.hookspecs import hookimpl
from tenfold.spec import CommandSpec, ComponentSpec, Param, PluginInfo

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
    Param("null_queries", "int", 0, "random queries against which exported tables standardise "
          "each score (column z); 0 for none", minimum=0),
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


_SCORED = (
    Param(
        "methods",
        "list[str]",
        ("dabgo", "bm25", "gradient-dot", "random"),
        "methods to compare; the first is the one that others are tested against. Also "
        "dabgo/abs, dabgo/ascent, dabgo/descent, dabgo/paper, bm25/characters, and run:NAME "
        "for the scores of an earlier dabgo:attribution run",
    ),
)
_METHOD_PARAMS = (
    Param(
        "preset",
        "str",
        "recommended",
        "recommended, or the paper's constants",
        choices=("recommended", "paper"),
    ),
    *_STEPS,
    *_FISHER,
    *_SCALE,
    *_CORPUS,
)


def _quality(
    name: str, target: str, summary: str, params: tuple[Param, ...], cost: str = ""
) -> ComponentSpec:
    """A quality evaluator: methods to compare, its own parameters, those of the methods."""
    return ComponentSpec(
        name=name,
        target=f"tenfold_dabgo.evaluation.{target}",
        summary=summary,
        params=(*_SCORED, *params, *_METHOD_PARAMS),
        requires={"model": ("grad", "tokenize")},
        data={"train": ("text",), "queries": ("sample", "text", "prompt")},
        modules=("torch", "numpy", "transformers"),
        tags=("attribution", "data", "quality"),
        cost=cost,
    )


_TRAINING = (
    Param("train_steps", "int", None, "optimizer steps of a training on the full corpus; left "
          "out: 120", minimum=1),
    Param("train_epochs", "float", None, "passes over the corpus instead of steps", minimum=0),
    Param("train_batch_size", "int", None, "samples per step; left out: 32", minimum=1),
    Param("train_lr", "float", None, "peak learning rate; left out: 3e-3", minimum=0),
    Param("train_weight_decay", "float", None, "left out: 0.01", minimum=0),
    Param("train_warmup", "float", None, "share of the steps with a rising rate; left out: 0",
          minimum=0, maximum=1),
    Param("train_clip", "float", None, "largest gradient norm, 0 for no limit; left out: 1",
          minimum=0),
)  # fmt: skip

TAIL_PATCH = _quality(
    name="tail-patch",
    target="tail_patching:TailPatch",
    summary="does a small training step on a method's top k make the query likelier?",
    params=(
        Param("k", "list[int]", (1, 3, 5, 7, 10, 15, 20), "how many of the top samples",
              minimum=1),
        Param("variants", "list[str]", ("joint", "individual"), "one step on all k, or one step "
              "per sample", choices=("joint", "individual")),
        Param("opponents", "bool", True, "also patch with the first method's lowest scores"),
        Param("random_draws", "int", 3, "draws of the random controls", minimum=1),
        Param("string_length", "int", None, "tokens of a random string; left out: the corpus' "
              "median", minimum=2),
        Param("joint_lr", "float", 1e-5, "learning rate of the joint step", minimum=0),
        Param("joint_clip", "float", 1.0, "largest gradient norm of the joint step, 0 for no "
              "limit", minimum=0),
        Param("individual_lr", "float", 1e-3, "learning rate of the individual steps",
              minimum=0),
        Param("individual_clip", "float", 0.0, "the same limit for the individual steps",
              minimum=0),
        Param("patch_weight_decay", "float", 0.01, "weight decay of the step", minimum=0),
        Param("patch_optimizer", "str", "adamw", "optimizer of the step",
              choices=("adamw", "sgd")),
    ),
)  # fmt: skip

RETRAINING = _quality(
    name="retraining",
    target="retraining:Retraining",
    summary="LDS, leave-k-out, leave-one-out and query loss difference by training again",
    params=(
        Param("measure", "list[str]", ("removal", "lds"), "what to measure",
              choices=("removal", "qld", "lds", "loo")),
        Param("attributed", "str", "given", "score the given weights, or those of a training by "
              "this recipe", choices=("given", "retrained")),
        Param("k", "list[int]", (10, 30), "how many units to remove", minimum=1),
        Param("unit", "str", "sample", "what is removed: sample, neighbours (and overlapping "
              "windows), document, or a metadata column"),
        Param("qld_share", "float", 0.01, "share of the units that qld removes", minimum=0,
              maximum=1),
        Param("seeds", "int", 3, "trainings of each full and reduced set", minimum=1),
        Param("vary", "str", "order", "what the seeds change",
              choices=("order", "init", "both")),
        Param("random_draws", "int", 3, "random removals of each size", minimum=1),
        Param("removal_rule", "str", "equal-steps", "length of a training on a reduced set",
              choices=("equal-steps", "equal-epochs")),
        Param("subsets", "int", 36, "random subsets of lds", minimum=2),
        Param("subset_share", "float", 0.5, "their size", minimum=0, maximum=1),
        Param("lds_seeds", "int", 2, "trainings of each subset; 2 or more give a noise ceiling",
              minimum=1),
        Param("lds_rule", "str", "equal-epochs", "length of a training on a subset",
              choices=("equal-steps", "equal-epochs")),
        Param("loo_samples", "int", 24, "single samples that loo removes", minimum=2),
        *_TRAINING,
    ),
    cost="tenfold_dabgo.cost:retraining_cost",
)  # fmt: skip

LABELS = _quality(
    name="labels",
    target="relevance:Labels",
    summary="rankings against known sources, random queries and untrained weights",
    params=(
        Param("relevance", "str", "column", "relevant samples share the query's value of a "
              "column, or hold its text", choices=("column", "duplicate")),
        Param("column", "str", "module", "metadata column of corpus and queries"),
        Param("k", "list[int]", (1, 5, 10), "cut-offs of precision, recall and cardinality",
              minimum=1),
        Param("null_queries", "int", 16, "random queries that scores are calibrated against; 0 "
              "for none", minimum=0),
        Param("null", "str", "corpus", "their tokens: as often as in the corpus, or uniform",
              choices=("corpus", "uniform")),
        Param("randomized", "bool", True, "also score with untrained weights"),
    ),
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
        Param("limit", "int", None, "at most this many records of a split", minimum=1),
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

MIXED = ComponentSpec(
    name="mixed",
    target="tenfold_dabgo.mixed:Mixed",
    summary="two text datasets as one, with a column that says where each text is from",
    params=(
        Param("own", "component:dataset", help="the corpus"),
        Param("foreign", "component:dataset", help="texts to plant in it"),
        Param("planted", "int", None, "how many foreign texts; left out: all", minimum=0),
        Param("column", "str", "source", "metadata column with the values own and foreign"),
        Param("part", "str", "all", "only one part, for queries",
              choices=("all", "own", "foreign")),
        Param("split", "str", "", "split of both datasets; left out: their first"),
    ),
    provides=("text",),
    data={"own": ("text",), "foreign": ("text",)},
    modules=("numpy",),
    tags=("testing",),
)  # fmt: skip

HARNESS = ComponentSpec(
    name="harness",
    target="tenfold_dabgo.harness:HarnessTrainer",
    summary="trains a small GPT-2 over characters exactly as dabgo:retraining trains its models",
    params=(
        Param("dataset", "component:dataset", help="texts to learn from"),
        Param("context_length", "int", 32, "longest sample, in characters", minimum=2),
        Param("layers", "int", 2, "blocks", minimum=1),
        Param("hidden_size", "int", 48, "width", minimum=1),
        Param("heads", "int", 4, "attention heads", minimum=1),
        *_TRAINING,
        Param("seed", "int", None, "seed of weights and order; left out: the run's seed"),
    ),
    data={"dataset": ("text",)},
    modules=("torch", "transformers", "numpy"),
    tags=("language-model", "testing"),
)  # fmt: skip


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    return [TOPICS, MIXED, *TOKEN_FILES]


@hookimpl
def tenfold_trainers() -> list[ComponentSpec]:
    return [HARNESS]


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    return [ATTRIBUTION, TAIL_PATCH, RETRAINING, LABELS]


_SOURCE = Param("source", "str", None, "run file, recipe, or a run's folder, id or name",
                positional=True)  # fmt: skip
_PATHS = (
    Param("model", "path", None, "checkpoint folder, instead of the source's model"),
    Param("train", "path", None, "training texts, instead of the source's: JSON Lines, CSV, "
          "Parquet, a text file or a folder"),
    Param("queries", "path", None, "queries, instead of the source's: JSON Lines, CSV or Parquet "
          "with prompt and completion, or texts"),
)  # fmt: skip
_SET = Param("set", "list[str]", (), "change a value of the run file (evaluator.steps=5)")
_RUN = (
    Param("limit", "int", None, "take only the first items of the plan", minimum=1),
    Param("resume", "bool", False, "continue the newest unfinished equal run"),
)


@hookimpl
def tenfold_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            "attribute",
            "tenfold_dabgo.commands:attribute",
            "name the training texts that shaped each query; a run with a report",
            (
                _SOURCE,
                *_PATHS,
                Param("method", "str", None, "attribution method", choices=_METHODS),
                Param("preset", "str", None, "recommended, or the paper's constants",
                      choices=("recommended", "paper")),
                Param("view", "str", None, "how scores are looked at",
                      choices=("signed", "abs", "ascent", "descent")),
                Param("top_k", "int", None, "proponents and opponents to show", minimum=1),
                Param("prefilter", "float", None, "share of the corpus that is scored exactly",
                      minimum=0, maximum=1),
                Param("compare", "list[str]", None, "methods to compare with",
                      choices=_METHODS),
                Param("export", "list[str]", None, "write each ranking as these formats",
                      choices=("jsonl", "csv", "parquet", "markdown", "latex")),
                Param("null_queries", "int", None, "random queries for the exports' column z",
                      minimum=0),
                _SET,
                *_RUN,
            ),
        ),
        CommandSpec(
            "fisher",
            "tenfold_dabgo.commands:fisher",
            "estimate the diagonal Fisher of a model over a corpus, into a file",
            (
                _SOURCE,
                Param("out", "path", None, "safetensors file to write"),
                *_PATHS[:2],
                Param("kind", "str", "sample_mean", "kind of Fisher",
                      choices=("sample_mean", "sample_sum", "token", "sampled")),
                Param("params", "str", "all", "weights, as in dabgo:attribution"),
                Param("max_samples", "int", None, "a random subset of this size", minimum=1),
                _SET,
            ),
        ),
        CommandSpec(
            "perturb",
            "tenfold_dabgo.commands:perturb",
            "take a query's steps both ways and show its loss, distance and KL; scores nothing",
            (
                _SOURCE,
                Param("query", "str", None, "query's id; left out: the first"),
                *_PATHS,
                _SET,
            ),
        ),
        CommandSpec(
            "explain",
            "tenfold_dabgo.commands:explain",
            "shade the tokens of one training text by their score, on the terminal or as HTML",
            (
                _SOURCE,
                Param("query", "str", None, "query's id; left out: the first"),
                Param("sample", "str", None, "training text's id; left out: a recorded run's "
                      "best proponent"),
                Param("out", "path", None, "HTML file to write, besides"),
                *_PATHS,
                _SET,
            ),
        ),
        CommandSpec(
            "compare",
            "tenfold_dabgo.commands:compare",
            "rank correlation and overlap of recorded runs, or of methods on one source",
            (
                Param("sources", "list[str]", positional=True,
                      help="runs of dabgo:attribution, or one run file, recipe or run"),
                Param("methods", "list[str]", (), "methods to compare on one source"),
                Param("k", "int", 10, "overlap of the top k", minimum=1),
                _SET,
            ),
        ),
        CommandSpec(
            "doctor",
            "tenfold_dabgo.commands:doctor",
            "noise floor, hashes, memory and cost of an attribution; exit code 1 if it is unfit",
            (_SOURCE, *_PATHS, _SET),
        ),
        CommandSpec(
            "eval",
            "tenfold_dabgo.commands:evaluate",
            "measure how good methods are; a run with a report",
            (
                Param("measure", "str", positional=True, help="what to measure",
                      choices=("tail-patch", "leave-k-out", "lds", "loo", "qld", "precision")),
                _SOURCE,
                *_PATHS,
                Param("methods", "list[str]", None, "methods to compare"),
                Param("k", "list[int]", None, "sizes of the top", minimum=1),
                _SET,
                *_RUN,
            ),
        ),
    ]  # fmt: skip
