"""`CalmForCausalLM` and `LayerSkipForCausalLM`: dense models whose early layers predict too.

As a language model each *is* its last head: `forward`, `generate`, scores and losses for users
are the dense model's. What training adds are the early heads' losses, weighed by `loss_weights`,
and LayerSkip's layer dropout. An exit at depth d reads the residual stream that leaves layer d,
in training and in every decoder alike.

Shapes: `B` batch, `T` time, `H` hidden, `V` vocabulary, `K` exits, `L` layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
)
from transformers.utils import ModelOutput

from tenfold_nvium.backbone import NviumBackbone
from tenfold_nvium.baselines.configuration import CalmConfig, LayerSkipConfig
from tenfold_nvium.baselines.schedules import calm_weights, layerskip_weights
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.exits import NviumRMSNorm
from tenfold_nvium.loss import IGNORED, target_log_probs
from tenfold_nvium.modeling import NviumPreTrainedModel


@dataclass
class ExitOutput(ModelOutput):
    """Output of a baseline.

    Attributes:
        loss: `sum_k w_k CE_k`, when labels were given.
        logits: `[B, T, V]` of the last head; left out when labels were given, unless asked for.
        exit_losses: `[K]` mean cross-entropy of each head, NaN where none was needed.
        exit_logits: `[B, T, K, V]` of every head, only when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_losses: Tensor | None = None
    exit_logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ExitForCausalLM(NviumPreTrainedModel, GenerationMixin):
    """A dense causal language model with trained early predictions.

    `loss_weights` (one number per exit, the last one's included) is a plain attribute that a
    training loop may change between steps; heads of weight 0 are not evaluated in training.
    """

    config: Any
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NviumConfig) -> None:
        super().__init__(config)
        self.model = NviumBackbone(config)
        own = getattr(config, "exit_norms", "shared") == "own"
        self.exit_norms = nn.ModuleList(
            NviumRMSNorm(config.hidden_size, config.rms_norm_eps)
            for _ in (config.depths[:-1] if own else ())
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_weights = self.initial_weights()
        self.post_init()

    def initial_weights(self) -> list[float]:
        """Loss weights when no schedule has set any."""
        raise NotImplementedError

    @property
    def num_exits(self) -> int:
        """Number of heads K."""
        return len(self.config.depths)

    def exit_parts(self, k: int) -> tuple[nn.Module, None, nn.Module]:
        """Norm and adapter of exit `k` (0-based), as of an N-vium: no router, no adapter."""
        norm = self.exit_norms[k] if k < len(self.exit_norms) else self.model.norm
        return norm, None, nn.Identity()

    def head_weight(self, k: int) -> Tensor:
        """Output embedding `[V, H]` of every head."""
        return self.lm_head.weight

    def normed(self, k: int, state: Tensor) -> Tensor:
        """Exit `k`'s head input (0-based) from the residual stream `x_k [..., H]`."""
        if k < len(self.exit_norms):
            return self.exit_norms[k](state)
        return self.model.norm(state)

    def head_input(self, k: int, normed: Tensor) -> Tensor:
        """What head `k` multiplies: `normed` itself, there are no adapters."""
        return normed

    def head_logits(self, k: int, normed: Tensor) -> Tensor:
        """Head `k`'s logits `[..., V]` from `normed [..., H]`; all heads are one."""
        return F.linear(normed, self.lm_head.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool | None = None,
        output_exit_logits: bool = False,
        output_hidden_states: bool | None = None,
        keep: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ExitOutput | tuple[Any, ...]:
        """A pass through all layers; arguments as in `NviumForCausalLM.forward`.

        Args:
            keep: `[L, B]` boolean on the CPU: which rows run which layer (layer dropout).
            labels: `[B, T]`, shifted inside, -100 = not scored.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        states = (
            self.layer_states(*inputs, **kwargs)
            if keep is None
            else self._thinned_states(input_ids, attention_mask, keep, **kwargs)
        )
        output = ExitOutput(past_key_values=past_key_values)
        if output_hidden_states:
            output.hidden_states = tuple(states)
        exits = [states[depth] for depth in self.config.depths]
        if labels is not None:
            self._add_losses(output, exits, labels, num_items_in_batch)
        if return_logits or (return_logits is None and labels is None):
            part = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else (
                logits_to_keep
            )  # fmt: skip
            heads = range(self.num_exits) if output_exit_logits else [self.num_exits - 1]
            logits = [self.head_logits(k, self.normed(k, exits[k][:, part])) for k in heads]
            output.logits = logits[-1]
            if output_exit_logits:
                output.exit_logits = torch.stack(logits, -2)
        return output if return_dict is not False else output.to_tuple()

    def _add_losses(
        self,
        output: ExitOutput,
        exits: Sequence[Tensor],
        labels: Tensor,
        num_items: int | Tensor | None,
    ) -> None:
        """Fills the loss fields: means over scored shifted positions."""
        targets = labels[:, 1:].to(exits[0].device).reshape(-1)
        needed = [
            k for k, weight in enumerate(self.loss_weights) if weight or not self.training
        ]  # fmt: skip
        inputs = [self.normed(k, exits[k])[:, :-1].flatten(0, 1) for k in needed]
        values = target_log_probs(
            torch.cat(inputs), self.lm_head.weight, targets.repeat(len(needed)),
            self.config.loss_chunk_tokens,
        )  # fmt: skip
        sums = -values.view(len(needed), -1).sum(-1)
        count = (targets != IGNORED).sum().clamp(min=1)
        weights = sums.new_tensor([self.loss_weights[k] for k in needed])
        output.loss = (weights * sums).sum() / (count if num_items is None else num_items)
        output.exit_losses = torch.full((self.num_exits,), torch.nan).to(sums)
        output.exit_losses[needed] = sums.detach() / count

    def _thinned_states(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, keep: Tensor, **kwargs: Any
    ) -> list[Tensor]:
        """`layer_states` where layer i runs for the rows `keep[i]` only; the residual stream of
        the others passes by it."""
        hidden = self.model.embed_tokens(input_ids)
        mask, positions = self._mask_and_positions(hidden, attention_mask, None, None)
        angles = self.model.rotary.at(positions, int(positions.max()) + 1, hidden)
        states = [hidden]
        for i, layer in enumerate(self.model.layers):
            rows = keep[i].nonzero()[:, 0].to(hidden.device)
            # A layer that no row keeps runs for the first one and counts for nothing: every
            # process then runs every layer, which sharded weights need, and every weight gets
            # a gradient, however rows are spread over processes and accumulation steps.
            idle = len(rows) == 0
            run = _Rows(rows.new_zeros(1) if idle else rows, hidden.shape[0])
            out = layer(
                run.of(hidden),
                attention_mask=run.of(mask),
                position_ids=run.of(positions),
                position_embeddings=tuple(run.of(a) for a in angles),
                **kwargs,
            )
            if idle:
                hidden = hidden + 0.0 * out.sum()
            else:
                hidden = out if run.whole else hidden.index_copy(0, rows, out)
            states.append(hidden)
        return states


class _Rows:
    """Some rows of a batch of `count`."""

    def __init__(self, rows: Tensor, count: int) -> None:
        self._rows, self._count = rows, count
        self.whole = len(rows) == count

    def of(self, values: Any) -> Any:
        """These rows of `values [B, ...]`; what has one row for all, or is None, stays."""
        if values is None or self.whole or values.shape[0] != self._count:
            return values
        return values.index_select(0, self._rows)


class CalmForCausalLM(ExitForCausalLM):
    """Confident Adaptive Language Modeling: every exit is trained to predict, and a decoder
    leaves at the first one that is confident enough."""

    config_class = CalmConfig

    def initial_weights(self) -> list[float]:
        """By depth, or equal."""
        return calm_weights(self.config.depths, self.config.exit_weights)


class LayerSkipForCausalLM(ExitForCausalLM):
    """LayerSkip: layer dropout and early losses over the final norm and head, so that the first
    layers alone draft well."""

    config_class = LayerSkipConfig

    def initial_weights(self) -> list[float]:
        """All exits active."""
        early = range(len(self.config.depths) - 1)
        return layerskip_weights(self.config.depths, early, self.config.exit_scale)


for _config, _model in ((CalmConfig, CalmForCausalLM), (LayerSkipConfig, LayerSkipForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
