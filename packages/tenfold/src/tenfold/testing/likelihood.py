"""Laws of models that tell probabilities: `loss`, `grad`, `score`, `hidden`, `exits`.

Shapes: `B` rows, `T` positions, `H` hidden, `K` exits. All quantities are in nats.
"""

from __future__ import annotations

from typing import Any

from tenfold.testing.findings import NotApplicableError, require
from tenfold.testing.models import PROMPTS

TOLERANCE = 1e-4
"""Largest difference per token in float32 between two ways to compute the same number."""


def loss_is_zero_where_nothing_is_scored(model: Any) -> None:
    """`token_loss` is `[B, T]`, finite, not negative, and 0 outside the loss mask."""
    batch = _batch(model, PROMPTS)
    loss = model.token_loss(batch).detach()
    require(loss.shape == batch.input_ids.shape, f"shape {tuple(loss.shape)}")
    require(bool(loss.isfinite().all()), "not finite")
    require(bool((loss >= -TOLERANCE).all()), "a negative log-likelihood below 0")
    outside = loss[batch.loss_mask == 0]
    require(bool((outside == 0).all()), "not 0 where the loss mask is 0")


def loss_ignores_padding(model: Any) -> None:
    """A row's losses do not depend on its neighbours or on the padding side."""
    rows = [model.token_loss(_batch(model, [text])).detach()[0] for text in PROMPTS]
    for side in ("right", "left"):
        batch = _batch(model, PROMPTS, side=side)
        loss = model.token_loss(batch).detach()
        for i, alone in enumerate(rows):
            inside = loss[i][batch.attention_mask[i] == 1]
            worst = float((inside - alone).abs().max())
            require(worst < TOLERANCE, f"{side}-padded row {i} differs by {worst:.2g}")


def loss_has_a_gradient(model: Any) -> None:
    """The loss depends differentiably on the module's weights."""
    import torch

    weights = [p for p in model.module().parameters() if p.requires_grad]
    require(bool(weights), "module() has no trainable weights")
    loss = model.token_loss(_batch(model, PROMPTS[:2])).sum()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    norm = sum(float(g.square().sum()) for g in gradients if g is not None)
    require(norm > 0, "the gradient is zero everywhere")


def restore_is_bit_exact(model: Any) -> None:
    """`restore(snapshot())` undoes any change of the weights, in place and bit for bit."""
    import torch

    weights = dict(model.module().named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    token = model.snapshot()
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn_like(weight))
    model.restore(token)
    after = dict(model.module().named_parameters())
    require(after.keys() == before.keys(), "restore changed the set of weights")
    for name, weight in after.items():
        require(weight is weights[name], f"{name} was replaced instead of restored in place")
        require(torch.equal(weight.detach(), before[name]), f"{name} differs after restore")


def scores_nothing_from_nothing(model: Any) -> None:
    """An empty batch gives an empty list; an empty continuation has no tokens."""
    require(model.score([]) == [], "an empty batch gave scores")
    [empty] = model.score([(PROMPTS[0], "")])
    require(list(empty.token_ids) == [], f"an empty continuation has tokens {empty.token_ids}")


def scores_ignore_batch_neighbours(model: Any) -> None:
    """A pair's score does not depend on what else is in the batch."""
    pairs = [(text, " and more") for text in PROMPTS]
    together = [score.total for score in model.score(pairs)]
    alone = [model.score([pair])[0].total for pair in pairs]
    for text, first, second in zip(PROMPTS, together, alone, strict=True):
        distance = abs(first - second)
        require(distance < TOLERANCE * 10, f"{text!r}: {first} in a batch, {second} alone")


def score_is_minus_the_loss(model: Any) -> None:
    """`score` of token ids equals minus the sum of `token_loss` over them."""
    context, continuation = model.encode(PROMPTS[0]), model.encode(PROMPTS[1])
    [score] = model.score([(context, continuation)])
    require(list(score.token_ids) == list(continuation), "scored other tokens than given")
    loss = model.token_loss(_ids(model, [[*context, *continuation]], [len(context)])).detach()
    distance = abs(score.total + float(loss.double().sum()))
    require(
        distance < TOLERANCE * max(len(continuation), 1),
        f"score {score.total}, minus the loss {-float(loss.sum())}",
    )


def hidden_states_are_layers(model: Any) -> None:
    """`[B, T, H]` per layer asked for; -1 is the last layer."""
    batch = _batch(model, PROMPTS)
    states = model.hidden_states(batch, [0, -1])
    require(len(states.states) == 2, f"{len(states.states)} states for two layers")
    for state in states.states:
        require(state.ndim == 3, f"a state of shape {tuple(state.shape)}")
        require(state.shape[:2] == batch.input_ids.shape, f"shape {tuple(state.shape)}")
    last = states.layers[1]
    require(last >= 0, f"layer -1 is reported as {last}")
    again = model.hidden_states(batch, [last]).states[0]
    require(bool((again == states.states[1]).all()), f"layer {last} is not layer -1")


def exits_mix_to_the_loss(model: Any) -> None:
    """Weights sum to one per token, and the mixture of exits is the model's own loss."""
    batch = _batch(model, PROMPTS)
    scores = model.exit_scores(batch)
    scored = batch.loss_mask == 1
    require(len(scores.depths) == scores.log_weights.shape[-1], "not one depth per exit")
    total = scores.log_weights.logsumexp(-1)[scored]
    require(float(total.abs().max()) < TOLERANCE, "exit weights do not sum to one")
    mixed = -(scores.log_weights + scores.log_probs).logsumexp(-1)
    worst = float((mixed - model.token_loss(batch))[scored].abs().max().detach())
    require(worst < TOLERANCE, f"the mixture differs from token_loss by {worst:.2g}")


def _batch(model: Any, texts: Any, side: str = "right") -> Any:
    if not hasattr(model, "encode"):
        raise NotApplicableError("needs the capability 'tokenize' to make a batch")
    return _ids(model, [model.encode(text) for text in texts], side=side)


def _ids(model: Any, rows: list[list[int]], starts: Any = None, side: str = "right") -> Any:
    from tenfold.lm.batching import pad_batch

    return pad_batch(rows, model.pad_id, side=side, loss_from=starts)


LOSS_LAWS = (loss_is_zero_where_nothing_is_scored, loss_ignores_padding)
GRAD_LAWS = (loss_has_a_gradient, restore_is_bit_exact)
SCORE_LAWS = (scores_nothing_from_nothing, scores_ignore_batch_neighbours)
HIDDEN_LAWS = (hidden_states_are_layers,)
EXITS_LAWS = (exits_mix_to_the_loss,)
