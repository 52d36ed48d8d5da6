"""Descriptions of the built-in components that need no torch: models over HTTP, recorded or
trivial ones, datasets, and the evaluators. Plain data; nothing is imported but `tenfold.spec`.
"""

from __future__ import annotations

from tenfold.builtin.describe_data import DATASETS, GENERATION, PROMPT_CUT
from tenfold.spec import ComponentSpec, Param

__all__ = ["DATASETS", "EVALUATORS", "MODELS"]

_BATCH = Param("batch_size", "int", 8, "prompts per call of the model", minimum=1, identity=False)
_GROUP = Param("group_by", "str", "", "also report each value of this metadata column")
_ROLES = Param("roles", "list[str]", ("model",), "model roles that take part")

MODELS: list[ComponentSpec] = [
    ComponentSpec(
        name="openai",
        target="tenfold.builtin.openai:OpenAI",
        summary="any OpenAI-compatible HTTP endpoint (vLLM, llama.cpp, Ollama, hosted services)",
        params=(
            Param("model", "str", None, "the model's name there; left out: the only one served"),
            Param("base_url", "str", "http://127.0.0.1:8000/v1", "address up to `/v1`"),
            Param("endpoint", "str", "chat", "which of the two interfaces is used",
                  choices=("chat", "completions")),
            Param("api_key_env", "str", "OPENAI_API_KEY",
                  "environment variable that holds the key; the key itself is never written"),
            Param("dialect", "str", "openai",
                  "`vllm` also honours regex and choice constraints", choices=("openai", "vllm")),
            Param("max_tokens_field", "str", "max_tokens", "what the endpoint calls the limit",
                  choices=("max_tokens", "max_completion_tokens")),
            Param("send_seed", "bool", True, "send a seed with sampled requests"),
            Param("extra", "table", {}, "more fields of the request, such as reasoning_effort"),
            Param("concurrency", "int", 8, "requests at the same time", minimum=1, identity=False),
            Param("retries", "int", 5, "further attempts after a passing failure", minimum=0,
                  identity=False),
            Param("backoff_s", "float", 0.5, "first pause between attempts; doubles each time",
                  minimum=0, identity=False),
            Param("max_wait_s", "float", 60.0, "longest pause, also where the endpoint asks for "
                  "more", minimum=0, identity=False),
            Param("timeout_s", "float", 300.0, "longest wait for an answer", minimum=0.001,
                  identity=False),
            Param("offline", "bool", None, "refuse addresses outside this machine and its private "
                  "network; left out: the workspace's setting", identity=False),
        ),
        provides=("generate", "constrain"),
        modules=("httpx2",),
        extras=("tenfold[openai]",),
        tags=("http", "chat"),
    ),
    ComponentSpec(
        name="replay",
        target="tenfold.builtin.replay:Replay",
        summary="recorded answers: from a JSON Lines file or from an earlier run",
        params=(
            Param("path", "path", None, "JSON Lines file with `prompt` and `completion`"),
            Param("run", "str", None, "or a run folder or name, as in core:run-samples",
                  identity=False),
            Param("role", "str", "", "only what this model role of the run wrote"),
        ),
        provides=("generate",),
        tags=("offline", "testing"),
    ),
    ComponentSpec(
        name="echo",
        target="tenfold.builtin.echo:Echo",
        summary="answers with its prompt, or with a fixed text; deterministic, needs nothing",
        params=(
            Param("text", "str", None, "answer with this text instead of the prompt"),
            Param("prefix", "str", "", "text before each answer"),
            Param("reverse", "bool", False, "write the answer's words in reverse order"),
            Param("upper", "bool", False, "write the answer in capitals"),
        ),
        provides=("generate",),
        tags=("offline", "testing"),
    ),
]  # fmt: skip

EVALUATORS: list[ComponentSpec] = [
    ComponentSpec(
        name="generate",
        target="tenfold.builtin.generate:Generate",
        summary="writes completions and records them; core:run-samples reads them back",
        params=(
            Param("n", "int", 1, "samples per prompt", minimum=1),
            *GENERATION,
            *PROMPT_CUT,
            _ROLES,
            _BATCH,
        ),
        requires={"*": ("generate",)},
        data={"dataset": ("prompt", "text")},
        tags=("generation",),
    ),
    ComponentSpec(
        name="perplexity",
        target="tenfold.builtin.perplexity:Perplexity",
        summary="nats per token, perplexity and bits per byte of texts",
        params=(
            Param("start", "str", "none", "what the first token of a text is predicted from: "
                  "`none` leaves it unscored, `special` uses the start or end-of-text token",
                  choices=("none", "special")),
            Param("window", "int", None, "longest window in tokens; left out: the model's context",
                  minimum=2),
            Param("stride", "int", None, "new tokens per window; left out: half a window",
                  minimum=1),
            _GROUP,
            Param("batch_size", "int", 8, "windows per call of the model", minimum=1,
                  identity=False),
        ),
        requires={"model": ("score",)},
        data={"dataset": ("text",)},
        tags=("likelihood",),
    ),
    ComponentSpec(
        name="exact-match",
        target="tenfold.builtin.exact_match:ExactMatch",
        summary="share of completions that equal their reference, with Wilson's interval",
        params=(
            Param("compare", "str", "equal", "how completion and reference must agree",
                  choices=("equal", "starts-with", "contains", "number")),
            Param("extract", "str", "", "regular expression; its last match in the completion "
                  "(first group, if any) is compared"),
            Param("ignore_case", "bool", False, "compare in lower case"),
            Param("ignore_whitespace", "bool", True, "trim, and count runs of blanks as one"),
            Param("ignore_punctuation", "bool", False, "compare without punctuation"),
            Param("ignore_articles", "bool", False, "compare without a, an, the"),
            *GENERATION,
            _GROUP,
            _BATCH,
        ),
        requires={"model?": ("generate",)},
        data={"dataset": ("prompt", "sample")},
        tags=("accuracy",),
    ),
    ComponentSpec(
        name="throughput",
        target="tenfold.builtin.throughput:Throughput",
        summary="tokens per second of generation, by batch size; median and spread",
        params=(
            Param("batch_sizes", "list[int]", (1, 8), "batch sizes to compare", minimum=1),
            Param("repeats", "int", 7, "timed passes per batch size", minimum=1),
            Param("warmup", "int", 1, "untimed passes before", minimum=0),
            Param("prompts", "int", 16, "prompts per pass, from the beginning of the dataset",
                  minimum=1),
            *GENERATION,
            *PROMPT_CUT,
            _ROLES,
        ),
        requires={"*": ("generate",)},
        data={"dataset": ("prompt", "text")},
        tags=("speed",),
    ),
]  # fmt: skip
