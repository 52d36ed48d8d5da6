"""Per-sample gradients of the training loss, weight by weight.

Two routes with one result. `capture` takes one backward pass per batch (see `capture`); `loop`
takes one per sample and works for anything differentiable. `auto` captures, checks rows of the
first batch against autograd (a weighted sum of the captured gradients must equal the gradient of
that weighted loss), and falls back to the loop when they differ.
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

Piece = tuple[str, Tensor | None, Tensor]
"""One use of a weight by sample: (kind, a `[B, R, ...]`, delta `[B, R, O]`), R rows per sample."""

ROUTES = ("auto", "capture", "loop")
CHUNK_BYTES = 16 * 2**20
"""Largest block of per-sample gradients handed over at once (one sample's is always allowed).
Blocks of more than 32 MB would be fresh, unmapped memory each time."""
PROBE_ROWS, PROBE_WIDTH = 3, 48
"""Samples of the first batch that the check is made on, and their first tokens: whether a layer
is understood does not depend on length, and the check must not cost as much as the batch."""
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
        self.automatic = route == "auto"
        self.checked = not self.automatic
        self.reason = ""
        """Why the loop is used, when `auto` chose it."""

    def run(self, batch: TokenBatch, consume: Consume) -> Tensor:
        """Hands over the gradients of one batch; returns the samples' losses `[B]`."""
        captured = self.captured(batch)
        if captured is None:
            return self._loop(batch, consume)
        losses, pieces = captured
        for name, uses in pieces:
            for first, gradients in sample_gradients(uses, self.params[name].shape):
                consume(name, first, gradients)
        return losses

    def captured(self, batch: TokenBatch) -> tuple[Tensor, list[tuple[str, list[Piece]]]] | None:
        """The samples' losses `[B]` and each weight's uses by sample, from one backward pass.

        None where the loop has to be taken: chosen, settled on, or (with `auto`) because this
        batch's rows cannot be told apart.

        Raises:
            Unsupported: route `capture`, and the model uses a weight in a way that cannot be
                captured.
        """
        if self.settle(batch) == "loop":
            return None
        losses, capture = self._capture(batch)
        try:
            return losses, [(name, by_sample(uses, batch)) for name, uses in capture.by_name()]
        except Unsupported:
            if not self.automatic:
                raise
            return None

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
            error = self._check(probe(batch))
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

        for name, uses in self._capture(batch)[1].by_name():
            shape = self.params[name].shape
            for first, gradients in sample_gradients(by_sample(uses, batch), shape):
                part = weights[first : first + len(gradients)].to(gradients.dtype)
                sums[name] += torch.einsum("b,b...->...", part, gradients)
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


def probe(batch: TokenBatch) -> TokenBatch:
    """The beginnings of a few rows of a batch, of unequal lengths where possible."""
    rows, width = len(batch.input_ids), min(batch.input_ids.shape[1], PROBE_WIDTH)
    chosen = sorted({round(i * (rows - 1) / (PROBE_ROWS - 1)) for i in range(PROBE_ROWS)})
    mask = batch.attention_mask[chosen, :width].clone()
    if rows > 1 and width > 3 and bool(mask.all()):
        mask[-1, -(width // 3) :] = 0  # rows of one length would hide a mix-up of rows
    loss_mask = None if batch.loss_mask is None else batch.loss_mask[chosen, :width]
    return TokenBatch(batch.input_ids[chosen, :width], mask, loss_mask)


def sample_gradients(pieces: list[Piece], shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
    """`(first row, G [b, *shape])` blocks of one weight's gradients, all uses added."""
    rows = len(pieces[0][2])
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


def by_sample(uses: list[Use], batch: TokenBatch) -> list[Piece]:
    """The uses of one weight, their rows by sample.

    Raises:
        Unsupported: rows of a use cannot be told apart by sample.
    """
    pieces = []
    flat: dict[str, list[Use]] = {}
    for use in uses:
        assert use.delta is not None
        if use.delta.dim() > 2:
            pieces.append(_whole(use, batch))
        else:
            flat.setdefault(use.kind, []).append(use)
    return pieces + [_flat(group, batch) for group in flat.values()]


def _whole(use: Use, batch: TokenBatch) -> Piece:
    """A use on `[B, ..., O]`: axes between are positions."""
    assert use.delta is not None
    rows = batch.input_ids.shape[0]
    if use.delta.shape[0] != rows:
        raise Unsupported(f"{use.delta.shape[0]} rows for {rows} samples")
    delta = use.delta.reshape(rows, -1, use.delta.shape[-1])
    a = use.a
    return use.kind, a if a is None else a.reshape(rows, delta.shape[1], *a.shape[2:][-1:]), delta


def _flat(group: list[Use], batch: TokenBatch) -> Piece:
    """Uses of one kind on flattened rows `[n, O]`: chunks of one pass over the batch, or of
    several passes (heads that share a weight), each over the same positions."""
    deltas = [use.delta for use in group if use.delta is not None]
    inputs = [use.a for use in group if use.a is not None]
    delta, a = torch.cat(deltas), (torch.cat(inputs) if inputs else None)
    mask = _layout([len(d) for d in deltas], delta, batch)
    passes, (rows, width) = len(delta) // int(mask.sum()), mask.shape

    def spread(x: Tensor) -> Tensor:
        if bool(mask.all()):
            out = x.reshape(passes, rows, width, *x.shape[1:])
        else:
            out = x.new_zeros((passes, rows, width, *x.shape[1:]))
            out[:, mask] = x.reshape(passes, -1, *x.shape[1:])
        return out.transpose(0, 1).reshape(rows, passes * width, *x.shape[1:])

    return group[0].kind, (None if a is None else spread(a)), spread(delta)


def _layout(counts: list[int], delta: Tensor, batch: TokenBatch) -> Tensor:
    """The positions `[B, W]` (bool) that flattened rows stand for, in row-major order.

    All positions, all but the last, the scored ones, or one row per sample. Sizes alone can be
    ambiguous (four passes over three quarters of the batch look like three over all of it), so
    a layout counts only if each pass ends with a call, and if rows without a loss have no
    gradient.
    """
    scored = scored_positions(batch)
    rows = len(scored)
    if rows == 1:
        return scored.new_ones((1, sum(counts)))
    every = scored.new_ones(scored.shape)
    # With targets shifted, row t predicts token t + 1.
    predicts = torch.cat([scored[:, 1:], scored.new_zeros((rows, 1))], dim=1)
    for mask, live in ((every, predicts), (every[:, 1:], scored[:, 1:])):
        size = mask.numel()
        if _passes_end_with_calls(counts, size):
            silent = delta.reshape(-1, *mask.shape, delta.shape[-1])[:, ~live]
            if not bool(silent.any()):
                return mask
    if _passes_end_with_calls(counts, int(scored.sum())):
        return scored
    if all(count == rows for count in counts):
        return scored.new_ones((rows, 1))
    raise Unsupported(f"{sum(counts)} flattened rows, {int(scored.sum())} scored tokens")


def _passes_end_with_calls(counts: list[int], size: int) -> bool:
    """Whether calls of so many rows can be cut into passes of `size` rows."""
    if size == 0:
        return False
    done = 0
    for count in counts:
        done = done + count
        if done > size:
            # One call may hold whole passes at once, never the end of one and the next's start.
            if done != count or count % size:
                return False
            done = size
        if done == size:
            done = 0
    return done == 0


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
