"""Packed copies of a model's weights, made once and checked before each use.

Packing costs about as much as reading all weights a few times, which short texts would feel.
Version counters of tensors do not tell reliably whether weights have changed (fused optimisers
leave them alone), so the copies are reused while the sum of every weight is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tenfold_nvium.layers import SegmentRunner

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM

ATTRIBUTE = "_packed_runner"
"""Where a model keeps its runner; left out of copies and pickles."""


def packed_runner(model: NviumForCausalLM) -> SegmentRunner:
    """A packed `SegmentRunner` of the model's present weights: the one of an earlier call, when
    no weight has changed since."""
    now = fingerprint(model)
    known = model.__dict__.get(ATTRIBUTE)
    if known is None or known[0] != now:
        known = now, SegmentRunner(model, packed=True)
        model.__dict__[ATTRIBUTE] = known
    return known[1]


@torch.no_grad()
def fingerprint(model: NviumForCausalLM) -> tuple[object, ...]:
    """Place, type and sum of every weight, and the routers' temperature."""
    weights = list(model.parameters())
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights:
        sums.setdefault(weight.device, []).append(weight.sum(dtype=torch.float64))
    values = [value for part in sums.values() for value in torch.stack(part).tolist()]
    places = [(weight.data_ptr(), weight.dtype) for weight in weights]
    return (*places, *values, model.config.router_temperature)
