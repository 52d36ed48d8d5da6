"""Capabilities that follow from others.

    loss + tokenize  ->  score
    step + tokenize  ->  generate

The planner reads the table `ADAPTERS`, so this module imports torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenfold.capabilities import Delegate, Prompt
from tenfold.errors import ConfigError
from tenfold.records import Completion, GenerationConfig, TokenScores
from tenfold.seeds import content_hash, derive

if TYPE_CHECKING:
    from torch import Tensor

ADAPTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "score": (("loss", "tokenize"), "tenfold.adapters:ScoreFromLoss"),
    "generate": (("step", "tokenize"), "tenfold.adapters:GenerateFromStep"),
}
"""Capability → (capabilities it is made from, target that wraps a model)."""


def _ids(model: Any, text: Any) -> list[int]:
    """Token ids of text, chat messages or ids."""
    if isinstance(text, str):
        return list(model.encode(text))
    items = list(text)
    if items and isinstance(items[0], dict):
        return list(model.encode(model.render_chat(items)))
    return [int(i) for i in items]


def _prompt_ids(model: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt, never empty: texts start after the end-of-sequence token."""
    ids = _ids(model, prompt)
    return ids or [model.eos_id if model.eos_id is not None else model.pad_id]


class ScoreFromLoss(Delegate):
    """`score` for a model that offers `loss` and `tokenize`."""

    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[TokenScores]:
        """For each (context, continuation) the continuation's token log-probabilities, one
        pair at a time: equal to minus `token_loss`.

        Raises:
            ConfigError: a pair that is longer than the model's context.
        """
        return [self._one(context, continuation) for context, continuation in pairs]

    def _one(self, context: Prompt, continuation: str | Sequence[int]) -> TokenScores:
        import torch

        from tenfold.capabilities import TokenBatch

        before, scored = _prompt_ids(self.base, context), _ids(self.base, continuation)
        row = [*before, *scored]
        if len(row) > self.base.context_length:
            raise ConfigError(
                f"a sequence of {len(row)} tokens does not fit the model's context of "
                f"{self.base.context_length} tokens"
            )
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        wanted = mask.clone()
        wanted[:, : len(before)] = 0
        with torch.no_grad():
            losses = self.base.token_loss(TokenBatch(ids, mask, wanted))[0]
        return TokenScores(scored, (-losses[len(before) :]).tolist())


class GenerateFromStep(Delegate):
    """`generate` for a model that offers `step` and `tokenize`; one row at a time."""

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """For each prompt its `config.n` completions.

        Raises:
            ConfigError: a constraint is asked for, or a prompt fills the context.
        """
        if config.constraint is not None:
            raise ConfigError("a model that generates through its steps honors no constraint")
        return [
            [self._one(_prompt_ids(self.base, prompt), config, i) for i in range(config.n)]
            for prompt in prompts
        ]

    def _one(self, ids: list[int], config: GenerationConfig, sample: int) -> Completion:
        import torch

        room = self.base.context_length - len(ids)
        if room < 1:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens leaves no room in the model's context of "
                f"{self.base.context_length} tokens"
            )
        seed = derive(config.seed or 0, content_hash(ids), sample)
        generator = torch.Generator().manual_seed(seed)
        session, output = self.base.start(torch.tensor([ids]))
        written: list[int] = []
        logprobs: list[float] = []
        reason = "length"
        while len(written) < min(config.max_new_tokens, room):
            logits = output.logits[0, -1].float().cpu()
            token = choose(logits, config, generator)
            written.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            if token == self.base.eos_id:
                reason = "eos"
                break
            if _stop_position(self.base.decode(written), config.stop) is not None:
                reason = "stop"
                break
            if len(written) < min(config.max_new_tokens, room):
                output = session.extend(torch.tensor([[token]]))
        text = self.base.decode(written)
        position = _stop_position(text, config.stop)
        text = text if position is None else text[:position]
        return Completion(text, written, logprobs if config.logprobs else None, reason)


def _stop_position(text: str, stops: Sequence[str]) -> int | None:
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return min(found, default=None)


def choose(logits: Tensor, config: GenerationConfig, generator: Any) -> int:
    """The next token of `logits [V]`: arg-max at temperature 0, else a draw after top-k and
    top-p."""
    import torch

    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= config.top_p
        logits = logits.index_fill(0, order[beyond], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
