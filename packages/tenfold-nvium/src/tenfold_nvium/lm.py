"""`nvium:causal-lm`: an N-vium checkpoint with every capability of a language model.

`token_loss` is the mixture's negative log-likelihood and `generate` the exact accelerated
decoder; everything else is `tenfold.lm`'s. Shapes: `B` batch, `T` time, `H` hidden, `K` exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import ExitScores, HiddenStates, TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.batching import scored_positions
from tenfold.lm.losses import token_nll
from tenfold.lm.model import CausalLM
from tenfold.lm.sampling import GeneratedRow, GenerationRow, RowStopper
from tenfold.records import GenerationConfig
from torch import Tensor

from tenfold_nvium.checkpoints import read_config, read_tokenizer, read_weights
from tenfold_nvium.decode import DecodedRow, Decodes, PiggybackDecoder
from tenfold_nvium.mixture import exit_log_probs, mixture_log_prob
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.policies import AUTO, ExitPolicy, make_policy
from tenfold_nvium.sampling import SCOPES, Warp


class BackboneLM(CausalLM):
    """What all models of this plugin have in common: texts through their own decoder, how inputs
    are given, and hidden states."""

    decode_rows = 1
    """Texts decoded together."""

    def decoder(self, config: GenerationConfig) -> Decodes:
        """The decoder that a generation configuration asks for."""
        raise NotImplementedError

    def stats(self, decoder: Any, decoded: Any, row: DecodedRow) -> dict[str, Any]:
        """What a completion tells about its decoding."""
        raise NotImplementedError

    def _generate_rows(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """Rows through the model's own decoder, a few at a time; under a constraint through
        `transformers.generate` at full depth (a grammar edits the whole distribution)."""
        if config.constraint is not None:
            return super()._generate_rows(rows, config)
        if not rows:
            return []
        decoder, written = self.decoder(config), []
        for start in range(0, len(rows), self.decode_rows):
            written += self._decode(decoder, rows[start : start + self.decode_rows], config)
        return written

    def _decode(
        self, decoder: Decodes, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        stopper = RowStopper(rows, 0, self, self._eos_ids, config.stop)
        done = decoder.generate(
            [row.ids for row in rows],
            [row.limit for row in rows],
            seeds=[row.seed for row in rows],
            stop=lambda row, tokens: stopper.reason(tokens, rows[row].limit),
            log_probs=config.logprobs > 0,
        )
        return [
            GeneratedRow(
                row.tokens,
                row.finish_reason,
                (row.log_probs or []) if config.logprobs else None,
                self.stats(decoder, done, row),
            )
            for row in done.rows
        ]

    def trace(self, ids: Sequence[int], config: GenerationConfig) -> Any:
        """Continues one prompt (token ids) and keeps the full decode trace; `config.seed` is
        the text's own seed here."""
        limit = min(config.max_new_tokens, self.context_length - len(ids) + 1)
        return self.decoder(config).generate(
            [ids], limit, seeds=[config.seed or 0], eos_ids=sorted(self._eos_ids)
        )

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        inputs = super()._inputs(batch)
        inputs.pop("use_cache")
        return inputs

    def hidden_states(self, batch: TokenBatch, layers: Sequence[int]) -> HiddenStates:
        """Residual-stream states `[B, T, H]`: 0 enters the first layer, i leaves layer i; no
        norm is applied. Negative numbers count from the last layer.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        depth = self.model.config.num_hidden_layers
        if bad := [i for i in layers if not -depth - 1 <= i <= depth]:
            raise ConfigError(f"layer {bad[0]} is not in -{depth + 1}..{depth}")
        chosen = [i % (depth + 1) for i in layers]
        states = self.model.layer_states(**self._inputs(self._placed(batch)))
        return HiddenStates(tuple(chosen), tuple(states[i] for i in chosen))


class NviumLM(BackboneLM):
    """An N-vium with its tokenizer.

    Provides `generate score loss grad hidden tokenize step exits constrain`.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        device: a torch device.
        policy: exit policy by name; `auto` samples exits, and decodes greedily with
            `certified`, so that both equal what the whole mixture would give.
        max_deferred: most positions a text may defer; None: no limit.
        warp_scope: where temperature and truncation apply when they are not neutral: `head`
            warps the chosen exit's head (fast, another distribution than the warped mixture),
            `mixture` the whole mixture (exact, no layer is skipped).
        decode_rows: texts decoded together. One is fastest per text, and independent of its
            neighbours to the last bit; more raise throughput and lower the saving per text.
        batch_tokens: most tokens in a batch when scoring.
        source: the checkpoint folder.

    Raises:
        ConfigError: unknown policy or scope.
    """

    model: NviumForCausalLM

    def __init__(
        self,
        model: NviumForCausalLM,
        tokenizer: Any,
        *,
        device: str = "cpu",
        policy: str = AUTO,
        max_deferred: int | None = None,
        warp_scope: str = "head",
        decode_rows: int = 1,
        batch_tokens: int = 8192,
        source: Path | None = None,
    ) -> None:
        super().__init__(model, tokenizer, device=device, batch_tokens=batch_tokens, source=source)
        if policy != AUTO:
            make_policy(policy)
        if warp_scope not in SCOPES:
            raise ConfigError(f"warp_scope {warp_scope!r} must be one of {', '.join(SCOPES)}")
        self.policy, self.warp_scope = policy, warp_scope
        self.max_deferred, self.decode_rows = max_deferred, decode_rows

    # --- generate -----------------------------------------------------------------------------

    def decoding(self, config: GenerationConfig) -> tuple[ExitPolicy, Warp]:
        """Policy and warp that a generation configuration asks for."""
        warp = Warp(config.temperature, config.top_k, config.top_p)
        if config.temperature == 0:
            warp = Warp(0.0)
            return make_policy("certified" if self.policy == AUTO else self.policy), warp
        if self.warp_scope == "mixture" and warp.changes_distribution:
            return make_policy("full"), warp
        return make_policy("sample" if self.policy == AUTO else self.policy), warp

    def decoder(self, config: GenerationConfig) -> PiggybackDecoder:
        """See `BackboneLM`."""
        policy, warp = self.decoding(config)
        return PiggybackDecoder(self.model, policy, warp=warp, max_deferred=self.max_deferred)

    def stats(self, decoder: Any, decoded: Any, row: DecodedRow) -> dict[str, Any]:
        """Exits (1-based), their histogram and mean depth, and how they were chosen."""
        depths = self.model.config.depths
        histogram = {str(k + 1): 0 for k in range(len(depths))}
        for k in row.exits:
            histogram[str(k + 1)] += 1
        layers = sum(depths[k] for k in row.exits)
        return {
            "exit_histogram": histogram,
            "exits": [k + 1 for k in row.exits],
            "mean_depth": layers / max(1, len(row.exits)) / depths[-1],
            "policy": decoder.policy.name,
            "warp_scope": "mixture" if decoder.policy.mixes else "head",
        }

    # --- score, loss, exits -------------------------------------------------------------------

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """`[B, T]` nats: `-log p_mix(x_t | x_<t)`, 0 where not scored; differentiable.

        Raises:
            ConfigError: the batch is longer than the model's context.
        """
        if batch.input_ids.numel() == 0:
            return torch.zeros(batch.input_ids.shape, device=self.device)
        weights, heads, scored = self._target_scores(batch)
        return -mixture_log_prob(weights, heads).masked_fill(~scored, 0.0)

    @torch.no_grad()
    def exit_scores(self, batch: TokenBatch) -> ExitScores:
        """Mixture weights and per-exit log-probabilities of the target tokens, `[B, T, K]`;
        where nothing is scored, log-probabilities are 0 and weights uniform."""
        depths = tuple(d / self.model.config.num_hidden_layers for d in self.model.config.depths)
        weights, heads, scored = self._target_scores(batch)
        uniform = -torch.log(torch.tensor(float(len(depths))))
        return ExitScores(torch.where(scored[..., None], weights, uniform), heads, depths)

    def _target_scores(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """`log pi [B, T, K]` and `log p_k(x_t) [B, T, K]`, both aligned with the *predicted*
        token, and the scored positions `[B, T]`.

        Heads go through plain linear maps, so that whoever watches the use of weights (as
        per-sample gradients do) sees every one of them.
        """
        batch = self._placed(batch)
        scored = scored_positions(batch)
        inputs, gates = self.model.exit_views(self.model.exit_states(**self._inputs(batch)))
        chunk, targets = self.model.config.loss_chunk_tokens, batch.input_ids[:, 1:]
        losses = [
            token_nll(a[:, :-1], self.model.head_weight(k), targets, scored[:, 1:], chunk)
            for k, a in enumerate(inputs)
        ]
        pad = (0, 0, 1, 0)
        heads = -torch.nn.functional.pad(torch.stack(losses, -1), pad)
        weights = torch.nn.functional.pad(exit_log_probs(gates)[:, :-1], pad)
        return weights, heads, scored


def load(
    checkpoint: str,
    policy: str = AUTO,
    max_deferred: int | None = None,
    warp_scope: str = "head",
    decode_rows: int = 1,
    batch_tokens: int = 8192,
    device: str | None = None,
    dtype: str | None = None,
) -> NviumLM:
    """Builds `nvium:causal-lm` from a checkpoint folder.

    Raises:
        ConfigError: no such folder, or it holds no N-vium.
    """
    network, tokenizer, folder = load_network(checkpoint, dtype)
    return NviumLM(
        network, tokenizer, device=device or "cpu", policy=policy, max_deferred=max_deferred,
        warp_scope=warp_scope, decode_rows=decode_rows, batch_tokens=batch_tokens, source=folder,
    )  # fmt: skip


def load_dense(checkpoint: str, **settings: Any) -> NviumLM:
    """Builds `nvium:dense`: the same, for a checkpoint with a single exit.

    Raises:
        ConfigError: as `load`; or the checkpoint has several exits.
    """
    built = load(checkpoint, **settings)
    if built.model.num_exits > 1:
        raise ConfigError(
            f"{checkpoint} has {built.model.num_exits} exits; nvium:dense takes a dense model",
            hint="use nvium:causal-lm, or train the twin with nvium:pretrain-dense",
        )
    return built


COMPONENTS = {
    "nvium": "nvium:causal-lm",
    "nvium-calm": "nvium:calm",
    "nvium-layerskip": "nvium:layerskip",
}
"""Model types of this plugin, and the component that loads each."""


def load_network(
    checkpoint: str, dtype: str | None = None, model_types: Sequence[str] = ("nvium",)
) -> tuple[Any, Any, Path]:
    """Network (evaluation mode), tokenizer and folder of a local checkpoint.

    Args:
        checkpoint: the folder.
        dtype: number type of the weights; None: the saved one.
        model_types: what the checkpoint may be.

    Raises:
        ConfigError: no such folder, a model of another type, or weights that do not fit.
    """
    import tenfold_nvium.baselines.modeling  # noqa: F401  (registers the baselines)

    folder = Path(checkpoint).expanduser()
    config = read_config(
        folder, "train one with `nvium:pretrain`, or convert a base with `tenfold nvium convert`"
    )
    if config.model_type not in COMPONENTS:
        raise ConfigError(
            f"{folder} holds a {config.model_type!r} model without routers, not an N-vium",
            hint=f"convert it: `tenfold nvium convert {folder} OUT`, or load it with core:hf",
        )
    if config.model_type not in model_types:
        raise ConfigError(
            f"{folder} holds a {config.model_type!r} model; this component loads "
            f"{' or '.join(repr(t) for t in model_types)}",
            hint=f"load it with {COMPONENTS[config.model_type]}",
        )
    network: Any = read_weights(folder, dtype)
    return network, read_tokenizer(folder), folder
