"""Light models and datasets for the tests of the built-in components."""

from __future__ import annotations

import hashlib
import math

from tenfold.records import Completion, TokenScores


class Records:
    """A dataset of given records."""

    def __init__(self, kind, records):
        self.kind, self.records = kind, list(records)
        self.loads = 0

    def splits(self):
        return ("all",)

    def load(self, split="", limit=None, shuffle_seed=None):
        self.loads += 1
        yield from self.records[:limit]

    def fingerprint(self, split=""):
        return hashlib.sha256(repr(self.records).encode()).hexdigest()


class Bytes:
    """A byte-level language model: byte b follows context c with a probability that depends on
    up to `memory` bytes of c; generation takes the likeliest byte, or "samples" by the seed.

    Counts its calls and the prompts of each.
    """

    eos_id, pad_id, vocabulary_size, vocabulary_hash = 256, 256, 257, "bytes"

    def __init__(self, context_length=64, memory=1000):
        self.context_length, self.memory = context_length, memory
        self.calls = []

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render_chat(self, messages):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def logprob(self, context, token):
        seen = tuple(context[-self.memory :])
        digest = hashlib.sha256(repr((seen, token)).encode()).digest()
        return -0.1 - 5 * digest[0] / 255

    def score(self, pairs):
        self.calls.append(len(pairs))
        results = []
        for context, continuation in pairs:
            ids = list(context)
            assert ids, "nothing to predict the first token from"
            assert len(ids) + len(continuation) <= self.context_length
            logprobs = []
            for token in continuation:
                logprobs.append(self.logprob(ids, token))
                ids.append(token)
            results.append(TokenScores(list(continuation), logprobs))
        return results

    def generate(self, prompts, config):
        self.calls.append(list(prompts))
        return [
            [self._complete(prompt, config, sample) for sample in range(config.n)]
            for prompt in prompts
        ]

    def _complete(self, prompt, config, sample):
        text = prompt if isinstance(prompt, str) else self.render_chat(prompt)
        label = (text, config.seed, sample) if config.temperature else (text,)
        letters = hashlib.sha256(repr(label).encode()).hexdigest()
        written = letters[: config.max_new_tokens]
        return Completion(
            written,
            self.encode(written),
            finish_reason="length",
            stats={"exit_histogram": {"1": 1, "2": len(written) - 1}},
        )


def nats(model, text, skip=1):
    """Nats of a text's bytes after the first `skip`, each from all before it."""
    ids = model.encode(text)
    return -math.fsum(model.logprob(ids[:i], ids[i]) for i in range(skip, len(ids)))
