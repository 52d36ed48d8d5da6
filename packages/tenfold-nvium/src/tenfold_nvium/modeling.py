"""`NviumForCausalLM`: a causal language model that is a learned mixture of exits.

A real `PreTrainedModel`: saved and loaded by `AutoModelForCausalLM`, trained by `Trainer`,
driven by `generate`. Its next-token distribution is `p_mix(y) = sum_k pi_k p_k(y)`; its loss is
the mixture's negative log-likelihood plus a router term (paper "Mixture objective"). With an
`NviumCache` a forward pass may leave upper layers for later (`tenfold_nvium.cascade`).

Shapes: `B` batch, `T` time, `H` hidden, `V` vocabulary, `K` exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from tenfold.errors import ConfigError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from tenfold_nvium.backbone import (
    NviumBackbone,
    attention_mask_for,
    causal_pattern,
    positions_from_mask,
)
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.exits import NviumExit, NviumRouter, ScaledLinear, make_adapter
from tenfold_nvium.generation import RoutedGenerationMixin
from tenfold_nvium.loss import IGNORED, target_log_probs
from tenfold_nvium.mixture import (
    exit_log_probs,
    expected_depth,
    in_full_precision,
    mixture_log_prob,
    router_warmup_loss,
)
from tenfold_nvium.runner_cache import ATTRIBUTE

LOSS_PHASES = ("main", "warmup")


@dataclass
class NviumOutput(ModelOutput):
    """Output of `NviumForCausalLM`.

    Attributes:
        loss: scalar training loss, when labels were given.
        logits: `[B, T, V]`, `log p_mix` in fp32 (a normalised log-distribution); left out when
            labels were given, unless asked for.
        mixture_loss: mean mixture negative log-likelihood, nats per token, no router term.
        router_warmup: mean warm-up term.
        expected_depth: mean expected normalised depth over scored positions.
        exit_losses: `[K]` mean cross-entropy of each head, for reports only.
        exit_shares: `[K]` mean mixture weight of each exit over scored positions.
        gate_log_odds: `[B, T, K-1]` router log-odds `s_k`.
        exit_log_probs: `[B, T, K]` log mixture weights `log pi_k`.
        target_log_probs: `[B, T-1, K]` each head's log-probability of the label, 0 where
            ignored; with labels only.
        exit_logits: `[B, T, K, V]` every head's logits, only when asked for.
        exits: `[B]` exit that each row's logits come from (0-based), in routed decoding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mixture_loss: Tensor | None = None
    router_warmup: Tensor | None = None
    expected_depth: Tensor | None = None
    exit_losses: Tensor | None = None
    exit_shares: Tensor | None = None
    gate_log_odds: Tensor | None = None
    exit_log_probs: Tensor | None = None
    target_log_probs: Tensor | None = None
    exit_logits: Tensor | None = None
    exits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class NviumPreTrainedModel(PreTrainedModel):
    """Initialisation, the switches transformers reads, and the pass through all layers."""

    config: NviumConfig
    model: NviumBackbone
    config_class = NviumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "NviumExit",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Paper's initialisation: adapters and router heads by their own scale, everything
        else N(0, initializer_range), norms 1, biases 0; loaded weights are left alone."""
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, mean=0.0, std=module.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def __getstate__(self) -> dict[str, Any]:
        """The module's state without packed copies of its weights."""
        return {name: value for name, value in self.__dict__.items() if name != ATTRIBUTE}

    def layer_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Residual streams `[B, T, H]`: entry 0 enters the first layer, entry i leaves layer i.
        Arguments as in `forward`."""
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask, positions = self._mask_and_positions(
            hidden, attention_mask, position_ids, past_key_values
        )
        return [hidden, *self.model(hidden, positions, mask, past_key_values, **kwargs)]

    def exit_states(self, input_ids: Tensor, **inputs: Any) -> list[Tensor]:
        """Residual streams `x_k [B, T, H]` at the K exits; arguments as in `layer_states`."""
        states = self.layer_states(input_ids, **inputs)
        return [states[depth] for depth in self.config.depths]

    def _mask_and_positions(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Cache | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Attention mask in the implementation's form, and `[B or 1, T]` positions."""
        length = hidden.shape[1]
        seen = past.get_seq_length() if past is not None else 0
        if attention_mask is not None and attention_mask.dim() == 4:
            allowed = attention_mask
            if allowed.dtype == torch.bool:
                allowed = attention_mask_for(self.config, allowed, hidden.dtype)
        else:
            pattern = causal_pattern(attention_mask, length, seen + length)
            if pattern is None and length > 1 and self.config._attn_implementation == "eager":
                # Only sdpa knows the plain causal case without a mask.
                pattern = torch.ones(1, 1, length, seen + length, dtype=torch.bool).tril(seen)
            pattern = pattern if pattern is None else pattern.to(hidden.device)
            allowed = attention_mask_for(self.config, pattern, hidden.dtype)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions_from_mask(attention_mask)[:, -length:]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=hidden.device)[None]
        return allowed, position_ids


class NviumForCausalLM(NviumPreTrainedModel, RoutedGenerationMixin):
    """Causal language model with K exits whose distribution is their learned mixture.

    `loss_phase` (`main` or `warmup`) and `compute_penalty` (beta) are plain attributes that a
    training loop may change between steps; both can also be given per call.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NviumConfig) -> None:
        super().__init__(config)
        self.model = NviumBackbone(config)
        self.exits = nn.ModuleList(NviumExit(config) for _ in config.depths[:-1])
        self.final_adapter = make_adapter(config) if config.final_adapter else nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_phase = "main"
        self.compute_penalty = float(config.compute_penalty)
        self.post_init()

    # --- Exits ------------------------------------------------------------------------------

    @property
    def num_exits(self) -> int:
        """Number of heads K."""
        return len(self.exits) + 1

    def _resize_token_embeddings(
        self,
        new_num_tokens: int | None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resizes untied early heads along with embeddings and last head; tied heads have no
        weight of their own, so they follow by themselves."""
        parent: Any = super()
        embeddings = parent._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        for k in range(len(self.exits)):
            old = self._exit(k).head
            if old is None:
                continue
            new = self._get_resized_lm_head(
                old, embeddings.weight.shape[0], mean_resizing=mean_resizing
            )
            self._exit(k).head = new.requires_grad_(old.weight.requires_grad)
        return embeddings

    def _exit(self, k: int) -> NviumExit:
        return cast(NviumExit, self.exits[k])

    def exit_parts(self, k: int) -> tuple[nn.Module, NviumRouter | None, nn.Module]:
        """Norm, router (none at the last exit) and adapter of exit `k` (0-based)."""
        if k == len(self.exits):
            return self.model.norm, None, self.final_adapter
        parts = self._exit(k)
        return parts.norm, parts.router, parts.adapter

    def normed(self, k: int, state: Tensor) -> Tensor:
        """`n_k` of exit `k` (0-based) from the residual stream `x_k [..., H]`."""
        return self._exit(k).norm(state) if k < len(self.exits) else self.model.norm(state)

    def gate(self, k: int, normed: Tensor) -> Tensor:
        """Router log-odds `s_k [...]` of early exit `k` from `n_k [..., H]`."""
        return self._exit(k).router(normed)

    def head_input(self, k: int, normed: Tensor) -> Tensor:
        """`a_k = adapter_k(n_k)`, what head `k` multiplies."""
        adapter = self._exit(k).adapter if k < len(self.exits) else self.final_adapter
        return adapter(normed)

    def head_weight(self, k: int) -> Tensor:
        """Output embedding `[V, H]` of head `k`: its own, or the shared one."""
        own = self._exit(k).head if k < len(self.exits) else None
        if own is not None:
            return own.weight
        if type(self.lm_head) is not nn.Linear:
            raise ConfigError(
                f"lm_head is a {type(self.lm_head).__name__}, but every exit multiplies with its "
                "plain weight, so what was put around it would be ignored",
                hint="leave lm_head out of LoRA targets and of quantisation",
            )
        if k < len(self.exits) and self.config.exit_head_tying == "embeddings":
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def head_logits(self, k: int, normed: Tensor) -> Tensor:
        """Head `k`'s logits `[..., V]` in the model's dtype, from `n_k`."""
        return F.linear(self.head_input(k, normed), self.head_weight(k))

    def exit_views(self, states: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Head inputs `a_k` and router log-odds `[..., K-1]` of the residual streams `x_k`."""
        normed = [self.normed(k, state) for k, state in enumerate(states)]
        gates = [self.gate(k, normed[k]) for k in range(len(self.exits))]
        inputs = [self.head_input(k, n) for k, n in enumerate(normed)]
        if not gates:
            shape = (*states[0].shape[:-1], 0)
            return inputs, torch.zeros(shape, dtype=torch.float32, device=states[0].device)
        return inputs, torch.stack(gates, -1)

    def mixture_logits(self, inputs: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        """`log p_mix [..., V]` in fp32 or wider from head inputs and `log pi [..., K]`.

        Heads are added one by one, so two `[..., V]` buffers exist at a time, not K.
        """
        total = None
        for k, hidden in enumerate(inputs):
            logits = in_full_precision(F.linear(hidden, self.head_weight(k)))
            part = log_weights[..., k, None] + logits.log_softmax(-1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total

    # --- Forward ----------------------------------------------------------------------------

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
        loss_phase: str | None = None,
        compute_penalty: float | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool | None = None,
        output_exit_logits: bool = False,
        output_hidden_states: bool | None = None,
        decode_policy: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NviumOutput | tuple[Any, ...]:
        """Full-depth forward pass, or routed decoding when `decode_policy` is given.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds [B, T, H]`.
            attention_mask: `[B, S]` of past and present columns, 0 = padding on either side;
                or a ready boolean `[B, 1, T, S]` mask.
            position_ids: `[B, T]`; default counts real tokens.
            past_key_values: an `NviumCache`, or any cache of transformers (full depth only).
            labels: `[B, T]`, shifted inside, -100 = not scored.
            logits_to_keep: as everywhere in transformers: last columns with logits, 0 = all.
            loss_phase: `main` (NLL + beta * depth) or `warmup` (NLL + router warm-up).
            compute_penalty: beta; default: the attribute of the same name.
            num_items_in_batch: scored tokens of the whole accumulated batch; the loss is
                divided by it instead of by this batch's own count.
            return_logits: default: only without labels.
            decode_policy: an `ExitPolicy` or its name; needs an `NviumCache`. Logits then come
                from the chosen exit of each row's last token, `[B, 1, V]`.
        """
        routed = decode_policy is not None
        extras = {
            "labels": labels is not None,
            "output_hidden_states": bool(output_hidden_states),
            "output_exit_logits": bool(output_exit_logits),
        }
        if use_cache and past_key_values is None and not (any(extras.values()) or self.training):
            past_key_values = NviumCache(self.config)
        if isinstance(past_key_values, NviumCache):
            if refused := [name for name, given in extras.items() if given]:
                raise ConfigError(
                    f"{refused[0]} does not go with an NviumCache, whose upper layers may wait; "
                    "leave past_key_values out, or pass a DynamicCache"
                )
            from tenfold_nvium.cached import cached_forward

            output = cached_forward(
                self, past_key_values, input_ids, inputs_embeds, attention_mask,
                logits_to_keep=logits_to_keep, decode_policy=decode_policy,
            )  # fmt: skip
            return output if return_dict is not False else output.to_tuple()
        if routed:
            raise ValueError("decode_policy needs past_key_values to be an NviumCache")
        layers = self.layer_states(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
        )
        output = NviumOutput(past_key_values=past_key_values)
        if output_hidden_states:
            output.hidden_states = tuple(layers)
        inputs, gates = self.exit_views([layers[depth] for depth in self.config.depths])
        output.gate_log_odds, output.exit_log_probs = gates, exit_log_probs(gates)
        if labels is not None:
            phase = loss_phase or self.loss_phase
            beta = self.compute_penalty if compute_penalty is None else compute_penalty
            self._add_losses(output, inputs, labels, phase, beta, num_items_in_batch)
        if return_logits or (return_logits is None and labels is None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else (
                logits_to_keep
            )  # fmt: skip
            kept = [a[:, keep] for a in inputs]
            output.logits = self.mixture_logits(kept, output.exit_log_probs[:, keep])
            if output_exit_logits:
                heads = [F.linear(a, self.head_weight(k)) for k, a in enumerate(kept)]
                output.exit_logits = torch.stack(heads, -2)
        return output if return_dict is not False else output.to_tuple()

    def _add_losses(
        self,
        output: NviumOutput,
        inputs: Sequence[Tensor],
        labels: Tensor,
        phase: str,
        beta: float,
        num_items: int | Tensor | None,
    ) -> None:
        """Fills the loss fields; per-token terms are averaged over scored shifted positions."""
        if phase not in LOSS_PHASES:
            raise ValueError(f"loss_phase {phase!r} must be one of {', '.join(LOSS_PHASES)}")
        assert output.exit_log_probs is not None
        assert output.gate_log_odds is not None
        targets = labels[:, 1:].to(inputs[0].device)
        scored = targets != IGNORED
        heads = self.target_head_log_probs([a[:, :-1] for a in inputs], targets)
        log_weights = output.exit_log_probs[:, :-1]
        count = scored.sum().clamp(min=1)
        total = count if num_items is None else num_items

        def over(values: Tensor, items: int | Tensor) -> Tensor:
            return (values * scored).sum() / items

        nll = -mixture_log_prob(log_weights, heads)
        costs = torch.tensor(self.config.exit_costs, device=nll.device)
        depth = expected_depth(log_weights, costs)
        warmup = router_warmup_loss(output.gate_log_odds[:, :-1])
        extra, weight = (depth, beta) if phase == "main" else (
            warmup, self.config.router_warmup_weight
        )  # fmt: skip
        output.loss = over(nll, total)
        if weight:
            output.loss = output.loss + weight * over(extra, total)
        with torch.no_grad():
            output.mixture_loss, output.expected_depth = over(nll, count), over(depth, count)
            output.router_warmup = over(warmup, count)
            mask = scored[..., None]
            output.exit_losses = -(heads * mask).sum((0, 1)) / count
            output.exit_shares = (log_weights.exp() * mask).sum((0, 1)) / count
        output.target_log_probs = heads

    def target_head_log_probs(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Every head's log-probability of the target tokens, `[B, T, K]` in fp32 or wider.

        `inputs`: K head inputs `[B, T, H]`; `targets [B, T]`, `IGNORED` gives 0. Heads that
        share a weight are evaluated in one chunked pass.
        """
        chunk, shape = self.config.loss_chunk_tokens, targets.shape
        flat = [a.reshape(-1, a.shape[-1]) for a in inputs]
        labels = targets.reshape(-1)
        if self.config.exit_head_tying == "lm_head":
            stacked, repeated = torch.cat(flat), labels.repeat(len(flat))
            values = target_log_probs(stacked, self.lm_head.weight, repeated, chunk)
            return values.view(len(flat), *shape).movedim(0, -1)
        parts = [
            target_log_probs(a, self.head_weight(k), labels, chunk) for k, a in enumerate(flat)
        ]
        return torch.stack(parts, -1).view(*shape, len(flat))


AutoConfig.register("nvium", NviumConfig, exist_ok=True)
AutoModelForCausalLM.register(NviumConfig, NviumForCausalLM, exist_ok=True)
