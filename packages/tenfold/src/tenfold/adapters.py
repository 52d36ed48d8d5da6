"""Adapters."""

ADAPTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "score": (("loss", "tokenize"), "tenfold.adapters:score_from_loss"),
    "generate": (("step", "tokenize"), "tenfold.adapters:generate_from_step"),
}
