"""Per-sample weight gradients of a whole batch from one backward pass.

While the forward pass runs, every call of a linear map, embedding, norm, scale or shift that
uses one of the weights is recorded with its input `a`; the backward pass delivers the gradient
`d` of its output. A sample's gradient is then (spec of each layer type):

    linear, W [O, I]      G_i = sum_t d_it a_it^T        bias: sum_t d_it
    Conv1D (stored [I,O]) G_i = sum_t a_it d_it^T
    embedding             G_i[v] = sum_{t: id_it = v} d_it
    norms, scales         G_i = sum_t d_it * xhat_it     shifts: sum_t d_it

Uses of a tied weight are added before anyone sees G_i. Recording happens at the level of torch
functions, not of module classes, so that any model code works; a use of a weight that is not
understood raises `Unsupported`, and callers fall back to one backward pass per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Unsupported(Exception):
    """A weight is used in a way that per-sample capture does not understand."""


@dataclass
class Use:
    """One use of a weight in the forward pass.

    `kind`: `outer` (W [O, I]), `outer-t` (W [I, O]), `gather`, `scale`, `shift`.
    `a`: the input (ids for `gather`, None for `shift`), leading axes = rows of the batch.
    `delta`: gradient of the output, once the backward pass has delivered it.
    """

    name: str
    kind: str
    a: Tensor | None
    delta: Tensor | None = None


class Capture(TorchFunctionMode):
    """Records uses of the given weights while active; see the module's text."""

    def __init__(self, params: Mapping[str, nn.Parameter], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.names = {id(p): name for name, p in params.items()}
        self.shapes = {name: p.shape for name, p in params.items()}
        self.turned: dict[int, str] = {}
        self.uses: list[Use] = []
        self._alive: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tracked = [a for a in (*args, *kwargs.values()) if self._tracked(a)]
        if not tracked or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        result = func(*args, **kwargs)
        if not _has_tensor(result) or any(result is t for t in tracked):
            return result  # a property such as .shape, or a cast that changed nothing
        raise Unsupported(f"{getattr(func, '__name__', func)} of {self._name(tracked[0])}")

    def _tracked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (id(value) in self.names or id(value) in self.turned)

    def _name(self, value: Tensor) -> str:
        return self.names.get(id(value)) or self.turned[id(value)]

    def turn(self, weight: Tensor, result: Tensor) -> Tensor:
        """Remembers `result` as the transpose of a tracked weight."""
        self._alive.append(result)  # an id is only meaningful while its tensor lives
        if id(weight) in self.turned:
            self.names[id(result)] = self.turned[id(weight)]
        else:
            self.turned[id(result)] = self.names[id(weight)]
        return result

    def record(self, output: Tensor, *uses: Use) -> Tensor:
        """Notes uses whose output gradient the backward pass will deliver."""
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)

        def arrived(gradient: Tensor) -> None:
            for use in uses:
                use.delta = gradient.detach()

        output.register_hook(arrived)
        self.uses.extend(uses)
        return output

    def by_name(self) -> Iterator[tuple[str, list[Use]]]:
        """Uses on the backward path, grouped by weight, in the order of first use."""
        grouped: dict[str, list[Use]] = {name: [] for name in self.shapes}
        for use in self.uses:
            if use.delta is not None:
                grouped[use.name].append(use)
        yield from ((name, uses) for name, uses in grouped.items() if uses)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _linear_uses(
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, stored: str
) -> list[Use]:
    uses = []
    if capture._tracked(weight):
        turned = id(weight) in capture.turned
        kind = {"outer": "outer-t", "outer-t": "outer"}[stored] if turned else stored
        uses.append(Use(capture._name(weight), kind, x.detach()))
    if bias is not None and capture._tracked(bias):
        uses.append(Use(capture._name(bias), "shift", None))
    return uses


def _linear(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = _arguments(args, kwargs, ("input", "weight", "bias"))
    return capture.record(func(x, weight, bias), *_linear_uses(capture, x, weight, bias, "outer"))


def _addmm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, weight = _arguments(args, kwargs, ("input", "mat1", "mat2"))
    if kwargs.keys() & {"alpha", "beta"} or capture._tracked(x):
        raise Unsupported("addmm with factors")
    return capture.record(func(bias, x, weight), *_linear_uses(capture, x, weight, bias, "outer-t"))


def _matmul(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args
    if capture._tracked(x) or weight.dim() != 2:
        raise Unsupported("matmul with the weight on the left")
    return capture.record(func(x, weight), *_linear_uses(capture, x, weight, None, "outer-t"))


def _embedding(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type")
    ids, weight, padding, max_norm, _ = _arguments(args, kwargs, names)
    if max_norm is not None:
        raise Unsupported("embedding with max_norm")
    # A padding_idx only silences that row's gradient; rows of padding carry none anyway, and
    # a genuine token with that id has to match autograd, so the row is masked out here too.
    if ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1):
        # Positions looked up once for the whole batch: each sample gets its own copy.
        ids = ids.reshape(1, -1).expand(capture.rows, -1)
    a = ids if padding is None or padding < 0 else ids.masked_fill(ids == padding, -1)
    return capture.record(F.embedding(ids, weight), Use(capture._name(weight), "gather", a))


def _layer_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = _arguments(args, kwargs, names)
    eps = 1e-5 if eps is None else eps
    uses = []
    if capture._tracked(weight):
        with torch.no_grad():
            normed = F.layer_norm(x.detach(), shape, None, None, eps)
        uses.append(Use(capture._name(weight), "scale", normed))
    if capture._tracked(bias):
        uses.append(Use(capture._name(bias), "shift", None))
    return capture.record(func(*args, **kwargs), *uses)


def _rms_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    x, shape, weight, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "eps"))
    with torch.no_grad():
        normed = F.rms_norm(x.detach(), shape, None, eps)
    return capture.record(func(*args, **kwargs), Use(capture._name(weight), "scale", normed))


def _multiply(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, x = _weight_and_other(capture, args)
    return capture.record(func(*args, **kwargs), Use(capture._name(weight), "scale", x.detach()))


def _add(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, _ = _weight_and_other(capture, args)
    if kwargs:
        raise Unsupported("add with a factor")
    return capture.record(func(*args, **kwargs), Use(capture._name(weight), "shift", None))


def _transpose(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    result = func(*args, **kwargs)
    weight = args[0]
    if weight.dim() != 2 or result.shape != weight.shape[::-1]:
        raise Unsupported("a transpose that is not a matrix transpose")
    if weight.shape[0] == weight.shape[1] and result.stride() == weight.stride():
        raise Unsupported("a transpose that keeps the axes")
    return capture.turn(weight, result)


def _weight_and_other(capture: Capture, args: Any) -> tuple[Tensor, Tensor]:
    first, second = args[0], args[1]
    weight, other = (first, second) if capture._tracked(first) else (second, first)
    simple = isinstance(other, Tensor) and not capture._tracked(other) and weight.dim() == 1
    if not simple or other.dim() < 2 or other.shape[-1] != weight.shape[0]:
        raise Unsupported(f"an elementwise use of {capture._name(weight)}")
    return weight, other


def _arguments(args: Any, kwargs: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """Positional and keyword arguments in the order of `names`, None where left out."""
    values = list(args[: len(names)])
    return values + [kwargs.get(name) for name in names[len(values) :]]


_TRANSPOSED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT"))
"""What `x.T` and `x.mT` call."""

_Handler = Callable[[Capture, Any, Any, Any], Tensor]
_HANDLERS: dict[Any, _Handler] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    F.embedding: _embedding,
    torch.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.t, Tensor.t, *_TRANSPOSED), _transpose),
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
}
