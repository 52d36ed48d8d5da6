"""A tiny model with most capabilities, and one broken variant per law of the conformance kit.

Its state at a position is the mean embedding of all bytes up to it, so everything depends on
the whole prefix, as in a transformer, and can be computed exactly.
"""

from __future__ import annotations

import torch
from tenfold.capabilities import Delegate, ExitScores, HiddenStates, StepOutput
from tenfold.records import Completion, TokenScores
from tenfold.seeds import content_hash, derive

PAD, EOS, SIZE = 256, 257, 258


class Bag:
    """Bytes in, bytes out; `[B, T, H]` states are running means."""

    eos_id, pad_id, vocabulary_size, context_length = EOS, PAD, SIZE, 1000
    vocabulary_hash = content_hash([SIZE])
    constraint_kinds = frozenset({"choice"})

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.net = torch.nn.Module()
        self.net.embedding = torch.nn.Parameter(torch.randn(SIZE, 8, generator=generator))
        self.net.head = torch.nn.Parameter(torch.randn(8, SIZE, generator=generator))

    # tokenize
    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render_chat(self, messages):
        return "\n".join(f"{m['role']}: {m['content']}" for m in messages)

    # loss, grad, hidden, exits
    def states(self, ids, mask):
        kept = self.net.embedding[ids] * mask[..., None]
        return kept.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]

    def token_loss(self, batch):
        states = self.states(batch.input_ids, batch.attention_mask)
        logp = (states @ self.net.head).log_softmax(-1)
        picked = logp[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = torch.cat([torch.zeros_like(picked[:, :1]), -picked], 1)
        return torch.where(batch.loss_mask == 1, loss, torch.zeros_like(loss))

    def module(self):
        return self.net

    def snapshot(self):
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def restore(self, token):
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(token[name])

    def hidden_states(self, batch, layers):
        embedded = self.net.embedding[batch.input_ids]
        both = (embedded, self.states(batch.input_ids, batch.attention_mask))
        layers = [layer % 2 for layer in layers]
        return HiddenStates(tuple(layers), tuple(both[layer] for layer in layers))

    def exit_scores(self, batch):
        loss = self.token_loss(batch)
        weights = torch.tensor([0.25, 0.75]).log().expand(*loss.shape, 2)
        return ExitScores(weights, -loss[..., None].expand(*loss.shape, 2), (0.5, 1.0))

    # score
    def score(self, pairs):
        return [self._score(context, continuation) for context, continuation in pairs]

    def _score(self, context, continuation):
        left, right = (
            self.encode(x) if isinstance(x, str) else list(x) for x in (context, continuation)
        )
        ids = torch.tensor([[*left, *right]])
        states = self.states(ids, torch.ones_like(ids))
        logp = (states @ self.net.head).log_softmax(-1)[0].detach()
        first = len(left)
        return TokenScores(right, [float(logp[first + i - 1, t]) for i, t in enumerate(right)])

    def _ids(self, text):
        return self.encode(text) if isinstance(text, str) else list(text)

    # generate, constrain
    def generate(self, prompts, config):
        return [self._generate(prompt, config) for prompt in prompts]

    def _generate(self, prompt, config):
        if config.constraint:
            return [Completion(config.constraint["choice"][0])] * config.n
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return [self._complete(ids, config, sample) for sample in range(config.n)]

    def _complete(self, ids, config, sample):
        seed = derive(config.seed or 0, ids, sample)
        generator = torch.Generator().manual_seed(seed)
        session, output = self.start(torch.tensor([ids]))
        written = []
        while len(written) < config.max_new_tokens and EOS not in written:
            logits = output.logits[0, -1]
            if config.temperature:
                chances = (logits / config.temperature).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            else:
                token = int(logits.argmax())
            written.append(token)
            output = session.extend(torch.tensor([[token]]))
        return Completion(self.decode(written), written, finish_reason="length")

    # step
    def start(self, tokens, mask=None):
        session = BagSession(self)
        mask = torch.ones_like(tokens) if mask is None else mask
        return session, session.run(tokens, mask)


class BagSession:
    """The cache is every embedding so far, and which of them count."""

    def __init__(self, model):
        self.model, self.ids, self.mask = model, None, None

    def run(self, tokens, mask):
        count = tokens.shape[1]
        self.ids = tokens if self.ids is None else torch.cat([self.ids, tokens], 1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        states = self.model.states(self.ids, self.mask)[:, -count:].detach()
        return StepOutput((states @ self.model.net.head).detach(), states, self.ids.shape[1])

    def extend(self, tokens, positions=None, attention=None):
        return self.run(tokens, torch.ones_like(tokens))

    def truncate(self, length):
        self.ids, self.mask = self.ids[:, :length], self.mask[:, :length]

    def reorder(self, rows):
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def keep(self, indices):
        self.ids, self.mask = self.ids[:, indices], self.mask[:, indices]

    def fork(self):
        other = BagSession(self.model)
        other.ids, other.mask = self.ids, self.mask
        return other


class Broken(Delegate):
    """The good model with one thing wrong; the class attribute names the law it breaks."""

    law = ""


class EmptyBatch(Broken):
    law = "generates nothing from nothing"

    def generate(self, prompts, config):
        return self.base.generate(prompts, config) or [[]]


class WrongCount(Broken):
    law = "generates n per prompt"

    def generate(self, prompts, config):
        return [row[:1] for row in self.base.generate(prompts, config)]


class Neighbours(Broken):
    law = "generation ignores batch neighbours"

    def generate(self, prompts, config):
        rows = self.base.generate(prompts, config)
        return rows if len(prompts) != 1 else [[Completion("alone")] * config.n]


class Forgetful(Broken):
    law = "generation repeats under a seed"

    calls = 0

    def generate(self, prompts, config):
        self.calls += len(prompts) == 2
        rows = self.base.generate(prompts, config)
        return rows if self.calls % 2 else [[Completion(c.text + "!") for c in r] for r in rows]


class LossyText(Broken):
    law = "tokens read back"

    def decode(self, ids):
        return self.base.decode(ids).lower().replace(" ", "")


class SmallVocabulary(Broken):
    law = "vocabulary is sound"
    vocabulary_size = 100


class SilentChat(Broken):
    law = "chat is rendered"

    def render_chat(self, messages):
        return "user:"


class Unconstrained(Broken):
    law = "constraints hold"

    def generate(self, prompts, config):
        if config.constraint:
            return [[Completion("sideways")] for _ in prompts]
        return self.base.generate(prompts, config)


class Unmasked(Broken):
    law = "loss is zero where nothing is scored"

    def token_loss(self, batch):
        return self.base.token_loss(batch) + 0.1


class Padded(Broken):
    law = "loss ignores padding"

    def token_loss(self, batch):
        width = batch.input_ids.shape[1]
        return self.base.token_loss(batch) * (1 + width / 100)


class Detached(Broken):
    law = "loss has a gradient"

    def token_loss(self, batch):
        return self.base.token_loss(batch).detach() + 0 * self.base.net.head.sum()


class HalfRestored(Broken):
    law = "restore is bit exact"

    def restore(self, token):
        with torch.no_grad():
            self.base.net.embedding.copy_(token["embedding"])


class Replaced(Broken):
    law = "restore is bit exact"

    def restore(self, token):
        for name, value in token.items():
            setattr(self.base.net, name, torch.nn.Parameter(value))


class NothingScored(Broken):
    law = "scores nothing from nothing"

    def score(self, pairs):
        return self.base.score(pairs) or [TokenScores([], [])]


class ScoredTogether(Broken):
    law = "scores ignore batch neighbours"

    def score(self, pairs):
        extra = 0.5 * (len(pairs) > 1)
        rows = self.base.score(pairs)
        return [TokenScores(s.token_ids, [p - extra for p in s.logprobs]) for s in rows]


class OtherScore(Broken):
    law = "score is minus the loss"

    def score(self, pairs):
        rows = self.base.score(pairs)
        return [TokenScores(s.token_ids, [p * 1.01 for p in s.logprobs]) for s in rows]


class OtherLayer(Broken):
    law = "hidden states are layers"

    def hidden_states(self, batch, layers):
        states = self.base.hidden_states(batch, layers)
        return HiddenStates((0,) * len(layers), states.states)


class HeavyExits(Broken):
    law = "exits mix to the loss"

    def exit_scores(self, batch):
        scores = self.base.exit_scores(batch)
        return ExitScores(scores.log_weights + 0.1, scores.log_probs, scores.depths)


class BrokenSession:
    """Replaces one method of every session."""

    def __init__(self, session, name, method):
        self.session, self.name, self.method = session, name, method

    def __getattr__(self, attribute):
        if attribute == self.name:
            return lambda *arguments: self.method(self.session, *arguments)
        return getattr(self.session, attribute)

    def fork(self):
        if self.name == "fork":
            return self
        return BrokenSession(self.session.fork(), self.name, self.method)


def stepping(name, broken_law, method):
    """A model whose sessions have one broken method."""

    class Stepping(Broken):
        law = broken_law

        def start(self, tokens, mask=None):
            session, output = self.base.start(tokens, mask)
            return BrokenSession(session, name, method), output

    Stepping.__name__ = f"Broken{name.title()}"
    return Stepping


class OtherArgmax(Broken):
    law = "greedy text is the argmax of steps"

    def start(self, tokens, mask=None):
        session, output = self.base.start(tokens, mask)
        return session, StepOutput(-output.logits, output.hidden, output.cache_length)


class LeftPadded(Broken):
    law = "left padding changes nothing"

    def start(self, tokens, mask=None):
        return self.base.start(tokens, None)


BROKEN = [
    EmptyBatch,
    WrongCount,
    Neighbours,
    Forgetful,
    LossyText,
    SmallVocabulary,
    SilentChat,
    Unconstrained,
    Unmasked,
    Padded,
    Detached,
    HalfRestored,
    Replaced,
    NothingScored,
    ScoredTogether,
    OtherScore,
    OtherLayer,
    HeavyExits,
    OtherArgmax,
    LeftPadded,
    stepping("truncate", "truncation forgets", lambda session, length: None),
    stepping("fork", "forks are independent", None),
    stepping("reorder", "rows can be reordered", lambda s, rows: s.reorder(sorted(rows))),
]
PROVIDES = (
    "generate",
    "score",
    "grad",
    "hidden",
    "tokenize",
    "step",
    "exits",
    "constrain",
)
