"""Exit modules: norm, residual adapter and router (paper "Architecture").

At exit k, with residual stream `x_k`:

    n_k = RMSNorm_k(x_k)                      own weights for every early exit
    a_k = n_k + B_k SiLU(A_k n_k)             adapter, B_k = 0 at the start
    z_k = W a_k                               head, W shared with the last one by default
    s_k = (router(n_k)[exit] - router(n_k)[continue]) / temperature

Shapes: `H` hidden, `R` router width.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold_nvium.configuration import NviumConfig

CONTINUE, EXIT = 0, 1
"""Order of a router's two logits."""


class NviumRMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 or wider.

    Equal bit for bit to the one of Llama in fp32 and in half precision. In fp64 it stays in
    fp64 (Llama's drops to fp32), so that exactness can be checked to 1e-12.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises the last dimension of `hidden [..., H]`."""
        if hidden.dtype in (torch.float32, torch.float64) and self.weight.dtype == hidden.dtype:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)
        wide = hidden.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale).to(hidden.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ScaledLinear(nn.Linear):
    """A linear layer that says with which standard deviation its weight starts (0: zeros).

    The scale sits on the layer itself because transformers initialises modules of custom code
    only when they own parameters directly, so a parent's own rule would be skipped.
    """

    def __init__(self, in_size: int, out_size: int, *, std: float, bias: bool = False) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.init_std = std


class NviumAdapter(nn.Module):
    """Residual adapter `n + B SiLU(A n)`, no biases; the identity at the start (B = 0)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.down = ScaledLinear(hidden_size, inner_size, std=hidden_size**-0.5)
        self.up = ScaledLinear(inner_size, hidden_size, std=0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[..., H]`."""
        return hidden + self.up(F.silu(self.down(hidden)))


class NviumRouterBlock(nn.Module):
    """`Linear -> GELU -> Linear -> RMSNorm`, with biases; a per-token perceptron."""

    def __init__(self, in_size: int, inner_size: int, out_size: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, inner_size)
        self.fc2 = nn.Linear(inner_size, out_size)
        self.norm = NviumRMSNorm(out_size, eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[..., R]`."""
        return self.norm(self.fc2(F.gelu(self.fc1(hidden))))


class NviumRouter(nn.Module):
    """Log-odds of leaving at an exit, from its normalised hidden state alone.

    No attention and no cache: a router's answer for a token depends on that token's state.
    """

    def __init__(self, config: NviumConfig) -> None:
        super().__init__()
        width = config.router_hidden_size or config.hidden_size
        inner = config.router_intermediate_size or width
        sizes = [config.hidden_size] + [width] * config.router_num_layers
        self.blocks = nn.ModuleList(
            NviumRouterBlock(a, inner, b, config.rms_norm_eps) for a, b in itertools.pairwise(sizes)
        )
        # Each logit starts with the same spread whatever the width.
        self.head = ScaledLinear(width, 2, std=config.router_init_std * width**-0.5, bias=True)
        self.temperature = config.router_temperature

    def forward(self, normed: Tensor) -> Tensor:
        """`s_k [...]` in fp32 or wider, from `n_k [..., H]`."""
        for block in self.blocks:
            normed = block(normed)
        # In fp32 or wider: logits rounded to half precision lose the odds.
        with torch.autocast(normed.device.type, enabled=False):
            weight, bias = self.head.weight, self.head.bias
            if weight.dtype in (torch.float32, torch.float64):
                logits = self.head(normed.to(weight.dtype))
            else:
                logits = F.linear(normed.float(), weight.float(), bias.float())
            return (logits[..., EXIT] - logits[..., CONTINUE]) / self.temperature


class NviumExit(nn.Module):
    """One early exit: its norm, router, adapter and, when heads are untied, its own head."""

    def __init__(self, config: NviumConfig) -> None:
        super().__init__()
        self.norm = NviumRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = NviumRouter(config)
        self.adapter = make_adapter(config)
        if config.exit_head_tying == "none":
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            # No module at all: calling the model's own head is the one tying that survives
            # saving, loading and resizing without bookkeeping.
            self.head = None


def make_adapter(config: NviumConfig) -> nn.Module:
    """The configured adapter, or the identity when its size is 0."""
    if not config.adapter_size:
        return nn.Identity()
    return NviumAdapter(config.hidden_size, config.adapter_size)
