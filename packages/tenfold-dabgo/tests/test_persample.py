"""Per-sample gradients: capture = loop = brute force, whatever the batch looks like."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tenfold.capabilities import TokenBatch
from tenfold.lm.batching import scored_positions
from tenfold_dabgo.batches import sample_means, single_row, token_batch
from tenfold_dabgo.persample import PerSampleGradients, probe
from tenfold_dabgo.weights import borrowed


def collect(model, batch, route, reduction="mean"):
    with borrowed(model) as params:
        rows = batch.input_ids.shape[0]
        out = {n: torch.zeros((rows, *p.shape), dtype=p.dtype) for n, p in params.items()}

        def consume(name, first, block):
            out[name][first : first + len(block)] += block

        gradients = PerSampleGradients(model, params, route, reduction)
        losses = gradients.run(batch, consume)
    return losses, out, gradients


def brute(model, batch):
    out = {}
    for row in range(batch.input_ids.shape[0]):
        model.module().zero_grad()
        single = single_row(batch, row)
        sample_means(model.token_loss(single), single)[0].backward()
        for name, p in model.module().named_parameters():
            out.setdefault(name, []).append(p.grad.clone())
    return {name: torch.stack(rows) for name, rows in out.items()}


@pytest.mark.parametrize("route", ["capture", "loop", "auto"])
def test_every_route_equals_one_backward_pass_per_sample(model64, make, route):
    batch = token_batch(make.corpus(6), range(6), 0)
    expected = brute(model64, batch)
    _, got, used = collect(model64, batch, route)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-13)
    assert used.route == ("loop" if route == "loop" else "capture")


def test_sum_reduction_is_the_mean_times_the_scored_tokens(make):
    model = make.gpt2(dtype=torch.float64)
    batch = token_batch(make.corpus(4), range(4), 0)
    mean_losses, mean, _ = collect(model, batch, "capture")
    sum_losses, total, _ = collect(model, batch, "capture", "sum")
    counts = scored_positions(batch).sum(1)
    torch.testing.assert_close(sum_losses, mean_losses * counts)
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(total[name], mean[name] * counts[:, None, None])


@pytest.mark.parametrize("flatten", ["all", "shifted", "masked", "chunked"])
def test_head_over_flattened_rows_is_attributed_to_the_right_samples(make, flatten):
    """A loss that computes its head on flattened, masked or chunked rows."""
    model = make.gpt2(dtype=torch.float64)

    def token_loss(batch):
        hidden = model.model.transformer(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        mask, head = scored_positions(batch), model.model.lm_head.weight
        out = torch.zeros(mask.shape, dtype=torch.float64)
        states, targets = hidden[:, :-1], batch.input_ids[:, 1:]
        if flatten == "all":
            logits = F.linear(hidden.flatten(0, 1), head).unflatten(0, mask.shape)[:, :-1]
        elif flatten == "shifted":
            logits = (states.flatten(0, 1) @ head.T).unflatten(0, states.shape[:2])
        else:
            rows = states[mask[:, 1:]]
            parts = rows.split(7) if flatten == "chunked" else [rows]
            nll = F.cross_entropy(
                torch.cat([F.linear(part, head) for part in parts]),
                targets[mask[:, 1:]],
                reduction="none",
            )
            return out.masked_scatter(mask, nll)
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return F.pad(nll, (1, 0)) * mask

    batch = token_batch(make.corpus(5), range(5), 0)
    expected = brute(model, batch)
    model.token_loss = token_loss
    _, got, used = collect(model, batch, "auto")
    assert used.route == "capture", used.reason
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_uses_that_capture_cannot_see_fall_back_to_the_loop(make):
    """A weight that acts through a custom function, and one through an unknown operation."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx, *gradients):
            (gradient,), (x, scale) = gradients, ctx.saved_tensors
            return gradient * scale, (gradient * x).flatten(0, -2).sum(0)

    for use in (Hidden.apply, lambda x, scale: x * torch.exp(scale)):
        model = make.gpt2(dtype=torch.float64)
        model.model.extra = torch.nn.Parameter(torch.full((16,), 0.5, dtype=torch.float64))
        plain = model.model.transformer.ln_f.forward
        model.model.transformer.ln_f.forward = lambda x, plain=plain, use=use, model=model: use(
            plain(x), model.model.extra
        )
        batch = token_batch(make.corpus(3), range(3), 0)
        expected = brute(model, batch)
        _, got, used = collect(model, batch, "auto")
        assert used.route == "loop"
        assert used.reason
        torch.testing.assert_close(got["extra"], expected["extra"], rtol=1e-10, atol=1e-13)


def test_genuine_pad_tokens_inside_a_text_count(make):
    """Masks come from lengths: id 0 is padding and end of text at once."""
    model = make.gpt2(dtype=torch.float64)
    ids = torch.tensor([[5, 0, 7, 0], [3, 4, 0, 0]])
    batch = TokenBatch(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert scored_positions(batch).sum(1).tolist() == [3, 2]
    expected = brute(model, batch)
    _, got, _ = collect(model, batch, "capture")
    torch.testing.assert_close(got["transformer.wte.weight"], expected["transformer.wte.weight"])


@pytest.mark.parametrize("chunk", [None, 5])
def test_heads_that_share_a_weight_are_not_mistaken_for_fewer_passes(make, chunk):
    """Four passes over 12 of 16 positions have as many rows as three passes over all of them."""
    model = make.gpt2(dtype=torch.float64)
    ids = torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids)
    keep[1, 6:] = 0
    batch = TokenBatch(ids, keep)
    assert int(scored_positions(batch).sum()) == 12

    def token_loss(batch):
        hidden = model.model.transformer(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        mask, total = scored_positions(batch), 0.0
        for scale in (1.0, 0.5, -0.3, 2.0):
            rows = (hidden * scale)[:, :-1][mask[:, 1:]]
            parts = [F.linear(p, model.model.lm_head.weight) for p in rows.split(chunk or 99)]
            targets = batch.input_ids[:, 1:][mask[:, 1:]]
            total = total + F.cross_entropy(torch.cat(parts), targets, reduction="none")
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, total)

    model.token_loss = token_loss
    expected = brute(model, batch)
    _, got, used = collect(model, batch, "auto")
    assert used.route == "capture", used.reason
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_the_check_of_the_first_batch_is_small_and_sees_unequal_rows():
    ids = torch.arange(20 * 300).reshape(20, 300)
    small = probe(TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids)))
    assert small.input_ids.shape == small.attention_mask.shape == small.loss_mask.shape == (3, 48)
    assert small.input_ids[:, 0].tolist() == [0, 10 * 300, 19 * 300]
    assert small.attention_mask.sum(1).tolist() == [48, 48, 32]
