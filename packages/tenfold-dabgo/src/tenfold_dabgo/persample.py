"""Per-sample gradients of the training loss, weight by weight.

Two routes with one result. `capture` takes one backward pass per batch (see `capture`); `loop`
takes one per sample and works for anything differentiable. `auto` captures, checks the first
batch against autograd (a randomly weighted sum of the captured gradients must equal the
gradient of that weighted loss), and falls back to the loop when they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from tenfold.capabilities import Grad, TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.batching import scored_positions
from torch import Tensor, nn

from tenfold_dabgo.batches import sample_means, single_row
from tenfold_dabgo.capture import Capture, Unsupported, Use

Consume = Callable[[str, int, Tensor], None]
"""Receives (weight name, first row, gradients `[b, *shape]` of rows first..first+b)."""

ROUTES = ("auto", "capture", "loop")
CHUNK_BYTES = 16 * 2**20
"""Largest block of per-sample gradients handed over at once (one sample's is always allowed).
Blocks of more than 32 MB would be fresh, unmapped memory each time."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
"""Accepted relative error of the check. Many models normalize in single precision even when
their weights are double; single precision itself sums thousands of products."""


class PerSampleGradients:
    """Delivers the gradient of every sample's loss for chosen weights.

    Args:
        model: offers `token_loss` and `module`.
        params: the weights, by name (from `weights.borrowed`).
        route: `auto`, `capture` or `loop`.
        reduction: `mean` or `sum` over a sample's scored tokens.
    """

    def __init__(
        self,
        model: Grad,
        params: Mapping[str, nn.Parameter],
        route: str = "auto",
        reduction: str = "mean",
    ) -> None:
        if route not in ROUTES:
            raise ConfigError(f"gradient route is {route!r}; known: {', '.join(ROUTES)}")
        self.model = model
        self.params = dict(params)
        self.reduction = reduction
        self.route = route
        self.checked = route != "auto"
        self.reason = ""
        """Why the loop is used, when `auto` chose it."""

    def run(self, batch: TokenBatch, consume: Consume) -> Tensor:
        """Hands over the gradients of one batch; returns the samples' losses `[B]`."""
        if self.settle(batch) == "loop":
            return self._loop(batch, consume)
        losses, capture = self._capture(batch)
        for name, uses in capture.by_name():
            for first, gradients in sample_gradients(uses, self.params[name].shape, batch):
                consume(name, first, gradients)
        return losses

    def factors(self, batch: TokenBatch) -> Iterator[tuple[str, list[Use]]]:
        """The recorded uses of each weight with their output gradients (capture only).

        Raises:
            Unsupported: the model uses a weight in a way that cannot be captured.
        """
        yield from self._capture(batch)[1].by_name()

    def settle(self, batch: TokenBatch) -> str:
        """The route in use; `auto` is settled on the first batch it sees."""
        if self.checked:
            return self.route
        self.checked = True
        try:
            self.route = "capture"
            error = self._check(batch)
            if error > TOLERANCE.get(next(iter(self.params.values())).dtype, 2e-2):
                self.reason = f"captured gradients differ from autograd by {error:.1e}"
        except Unsupported as problem:
            self.reason = f"capture does not understand {problem}"
        if self.reason:
            self.route = "loop"
        return self.route

    def _check(self, batch: TokenBatch) -> float:
        """Largest error of `sum_i w_i G_i` against autograd, relative to each weight's scale."""
        rows = batch.input_ids.shape[0]
        weights = torch.linspace(1.0, 2.0, rows, device=batch.input_ids.device)
        sums = {n: torch.zeros_like(p) for n, p in self.params.items()}

        def consume(name: str, first: int, gradients: Tensor) -> None:
            part = weights[first : first + len(gradients)].to(gradients.dtype)
            sums[name] += torch.einsum("b,b...->...", part, gradients)

        self.run(batch, consume)
        with torch.enable_grad():
            losses = sample_means(self.model.token_loss(batch), batch, self.reduction)
            total = (losses * weights.to(losses.dtype)).sum()
            expected = torch.autograd.grad(total, list(self.params.values()), allow_unused=True)
        worst = 0.0
        for (name, p), true in zip(self.params.items(), expected, strict=True):
            true = torch.zeros_like(p) if true is None else true
            scale = float(true.abs().max()) or 1e-12
            worst = max(worst, float((sums[name] - true).abs().max()) / scale)
        return worst

    def _capture(self, batch: TokenBatch) -> tuple[Tensor, Capture]:
        """Forward and backward pass of a batch with all uses recorded."""
        wanted = [(p, p.requires_grad) for p in self.params.values()]
        try:
            for p, _ in wanted:
                p.requires_grad_(False)  # only activations need gradients: one third less work
            capture = Capture(self.params, batch.input_ids.shape[0])
            with torch.enable_grad():
                with capture:
                    token_loss = self.model.token_loss(batch)
                losses = sample_means(token_loss, batch, self.reduction)
                losses.sum().backward()
        finally:
            for p, required in wanted:
                p.requires_grad_(required)
        return losses.detach(), capture

    def _loop(self, batch: TokenBatch, consume: Consume) -> Tensor:
        losses = []
        for row in range(batch.input_ids.shape[0]):
            single = single_row(batch, row)
            with torch.enable_grad():
                loss = sample_means(self.model.token_loss(single), single, self.reduction)[0]
            values = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
            for (name, _), value in zip(self.params.items(), values, strict=True):
                if value is not None:
                    consume(name, row, value[None])
            losses.append(loss.detach())
        return torch.stack(losses)


def sample_gradients(
    uses: list[Use], shape: torch.Size, batch: TokenBatch
) -> Iterator[tuple[int, Tensor]]:
    """`(first row, G [b, *shape])` blocks of one weight's gradients, all uses added.

    Raises:
        Unsupported: rows of a use cannot be told apart by sample.
    """
    pieces = by_sample(uses, batch)
    rows = batch.input_ids.shape[0]
    size = shape.numel() * pieces[0][2].element_size()
    block = max(1, min(rows, CHUNK_BYTES // max(size, 1)))
    for first in range(0, rows, block):
        last = min(first + block, rows)
        total: Tensor | None = None
        for kind, a, delta in pieces:
            part = _gradient(kind, None if a is None else a[first:last], delta[first:last], shape)
            total = part if total is None else total.add_(part)
        if total is not None:
            yield first, total


def by_sample(uses: list[Use], batch: TokenBatch) -> list[tuple[str, Tensor | None, Tensor]]:
    """The uses of one weight as `(kind, a [B, R, ...], delta [B, R, O])`: rows by sample.

    Raises:
        Unsupported: rows of a use cannot be told apart by sample.
    """
    return [_by_sample(group, batch) for group in _groups(uses)]


def _groups(uses: list[Use]) -> list[list[Use]]:
    """Uses of one kind whose flattened rows belong together (chunks of one call)."""
    whole = [[use] for use in uses if use.delta is not None and use.delta.dim() > 2]
    flat: dict[str, list[Use]] = {}
    for use in uses:
        if use.delta is not None and use.delta.dim() <= 2:
            flat.setdefault(use.kind, []).append(use)
    return whole + list(flat.values())


def _by_sample(group: list[Use], batch: TokenBatch) -> tuple[str, Tensor | None, Tensor]:
    """`(kind, a [B, R, ...], delta [B, R, O])`, with R rows per sample."""
    kind = group[0].kind
    deltas = [use.delta for use in group if use.delta is not None]
    inputs = [use.a for use in group if use.a is not None]
    rows, width = batch.input_ids.shape
    if deltas[0].dim() > 2:
        delta, a = deltas[0], (inputs[0] if inputs else None)
        if delta.shape[0] != rows:
            raise Unsupported(f"{delta.shape[0]} rows for {rows} samples")
        delta = delta.reshape(rows, -1, delta.shape[-1])
        return kind, a if a is None else a.reshape(rows, delta.shape[1], *a.shape[2:][-1:]), delta
    delta = torch.cat(deltas)
    a = torch.cat(inputs) if inputs else None
    count = len(delta)
    if rows == 1 or count == rows or any(count % (rows * w) == 0 for w in (width, width - 1)):
        return kind, *_split_evenly(a, delta, rows, width)
    return kind, *_split_by_mask(a, delta, batch)


def _split_evenly(
    a: Tensor | None, delta: Tensor, rows: int, width: int
) -> tuple[Tensor | None, Tensor]:
    """Rows `[k * B * T, ...]` (k passes over the batch, sample-major) as `[B, k * T, ...]`."""
    count = len(delta)
    per_pass = rows * width if count % (rows * width) == 0 else rows * (width - 1)
    if rows == 1 or count == rows:
        per_pass = count
    passes = count // per_pass

    def split(x: Tensor) -> Tensor:
        x = x.reshape(passes, rows, per_pass // rows, *x.shape[1:])
        return x.transpose(0, 1).reshape(rows, passes * (per_pass // rows), *x.shape[3:])

    return (None if a is None else split(a)), split(delta)


def _split_by_mask(
    a: Tensor | None, delta: Tensor, batch: TokenBatch
) -> tuple[Tensor | None, Tensor]:
    """Rows of the scored positions only (in row-major order), padded to `[B, T, ...]`."""
    mask = scored_positions(batch)
    total = int(mask.sum())
    if total == 0 or len(delta) % total:
        raise Unsupported(f"{len(delta)} flattened rows, {total} scored tokens")
    passes = len(delta) // total
    rows, width = mask.shape

    def spread(x: Tensor) -> Tensor:
        out = x.new_zeros((passes, rows, width, *x.shape[1:]))
        out[:, mask] = x.reshape(passes, total, *x.shape[1:])
        return out.transpose(0, 1).reshape(rows, passes * width, *x.shape[1:])

    return (None if a is None else spread(a)), spread(delta)


def _gradient(kind: str, a: Tensor | None, delta: Tensor, shape: torch.Size) -> Tensor:
    """`G [b, *shape]` from `a [b, R, ...]` and `delta [b, R, O]`."""
    if kind == "shift":
        return delta.sum(dim=1).reshape(-1, *shape)
    if a is None:
        raise Unsupported(f"a {kind} use without its input")
    if kind == "outer":
        return torch.bmm(delta.transpose(1, 2), a)
    if kind == "outer-t":
        return torch.bmm(a.transpose(1, 2), delta)
    if kind == "scale":
        return (delta * a).sum(dim=1).reshape(-1, *shape)
    out = delta.new_zeros((delta.shape[0], shape[0] + 1, shape[1]))
    index = torch.where(a < 0, shape[0], a)  # the extra row collects silenced ids
    out.scatter_add_(1, index.unsqueeze(-1).expand(-1, -1, shape[1]), delta)
    return out[:, :-1]
