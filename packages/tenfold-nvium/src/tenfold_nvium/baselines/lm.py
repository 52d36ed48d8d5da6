"""`nvium:calm` and `nvium:layerskip`: the baselines as language models.

`score`, `token_loss` and `step` are the full-depth model's, in both. LayerSkip's `generate`
writes that model's own text. CALM's does not: below a threshold of 1 tokens leave early, and
only `CalmLM.decoded_log_probs` tells how likely CALM itself makes a text. Shapes: `B` batch,
`T` time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.losses import shifted_token_nll
from tenfold.records import GenerationConfig
from torch import Tensor

from tenfold_nvium.baselines.calm import CalmDecoder, check_settings
from tenfold_nvium.baselines.layerskip import (
    LayerSkipDecoder,
    SpeculativeTrace,
    check_draft_length,
    drafting_depth,
)
from tenfold_nvium.decode import DecodedRow
from tenfold_nvium.lm import BackboneLM, load_network
from tenfold_nvium.sampling import Warp


class ExitLM(BackboneLM):
    """What both have in common.

    Provides `generate score loss grad hidden tokenize step constrain`.
    """

    def warp(self, config: GenerationConfig) -> Warp:
        """Temperature and truncation of a generation configuration."""
        if config.temperature == 0:
            return Warp(0.0)
        return Warp(config.temperature, config.top_k, config.top_p)

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """`[B, T]` nats: `-log p(x_t | x_<t)` of the last head, 0 where not scored;
        differentiable.

        Raises:
            ConfigError: the batch is longer than the model's context.
        """
        if batch.input_ids.numel() == 0:
            return torch.zeros(batch.input_ids.shape, device=self.device)
        batch, last = self._placed(batch), self.model.num_exits - 1
        state = self.model.layer_states(**self._inputs(batch))[-1]
        hidden = self.model.head_input(last, self.model.normed(last, state))
        chunk = self.model.config.loss_chunk_tokens
        return shifted_token_nll(hidden, self.model.lm_head.weight, batch, chunk)


class CalmLM(ExitLM):
    """A CALM model with its tokenizer. `generate` is approximate below a threshold of 1.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        device: a torch device.
        threshold: a token leaves where its confidence is above it.
        measure: the confidence, see `tenfold_nvium.baselines.confidence`.
        decode_rows: texts decoded together.
        batch_tokens: most tokens in a batch when scoring.
        source: the checkpoint folder.

    Raises:
        ConfigError: unknown measure, or a negative threshold.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: str = "cpu",
        threshold: float = 0.9,
        measure: str = "margin",
        decode_rows: int = 1,
        batch_tokens: int = 8192,
        source: Path | None = None,
    ) -> None:
        check_settings(model, threshold, measure)
        super().__init__(model, tokenizer, device=device, batch_tokens=batch_tokens, source=source)
        self.threshold, self.measure, self.decode_rows = threshold, measure, decode_rows

    def decoder(self, config: GenerationConfig) -> CalmDecoder:
        """See `ExitLM`."""
        return self._decoder(self.warp(config))

    def _decoder(self, warp: Warp) -> CalmDecoder:
        return CalmDecoder(self.model, self.threshold, measure=self.measure, warp=warp)

    def stats(self, decoder: Any, decoded: Any, row: DecodedRow) -> dict[str, Any]:
        """Exits (1-based) and the mean depth; says that the text is approximate."""
        depths = self.model.config.depths
        layers = sum(depths[k] for k in row.exits)
        return {
            "exit_histogram": {str(k + 1): row.exits.count(k) for k in range(len(depths))},
            "exits": [k + 1 for k in row.exits],
            "mean_depth": layers / max(1, len(row.exits)) / depths[-1],
            "threshold": self.threshold,
            "measure": self.measure,
            "approximate": self.threshold < 1,
        }

    def decoded_log_probs(
        self, context: Sequence[int], text: Sequence[int]
    ) -> tuple[list[float], list[int]]:
        """Per token of `text` its log-probability as CALM would write it, and its exit
        (0-based); see `CalmDecoder.log_probs`."""
        return self._decoder(Warp()).log_probs(context, text)


class LayerSkipLM(ExitLM):
    """A LayerSkip (or dense) model with its tokenizer, decoded by self-speculation; exact.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        device: a torch device.
        exit_layer: layers that draft; None takes the first trained depth.
        draft_length: most tokens drafted per check.
        batch_tokens: most tokens in a batch when scoring.
        source: the checkpoint folder.

    Raises:
        ConfigError: a depth that a LayerSkip model was not trained at, or one out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: str = "cpu",
        exit_layer: int | None = None,
        draft_length: int = 4,
        batch_tokens: int = 8192,
        source: Path | None = None,
    ) -> None:
        super().__init__(model, tokenizer, device=device, batch_tokens=batch_tokens, source=source)
        self.exit_layer = drafting_depth(model, exit_layer)
        self.draft_length = check_draft_length(draft_length)
        trained = model.config.exit_layers
        if trained and self.exit_layer not in trained:
            raise ConfigError(
                f"exit_layer is {exit_layer}, but this model's early predictions were trained at "
                f"depths {', '.join(map(str, trained))}; drafts from elsewhere would be bad"
            )

    def decoder(self, config: GenerationConfig) -> LayerSkipDecoder:
        """See `ExitLM`."""
        return LayerSkipDecoder(
            self.model, self.exit_layer, self.draft_length, warp=self.warp(config)
        )

    def stats(self, decoder: Any, decoded: Any, row: DecodedRow) -> dict[str, Any]:
        """How many drafted tokens stood."""
        trace = decoded.trace
        assert isinstance(trace, SpeculativeTrace)
        return {
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafted": trace.drafted,
            "kept": trace.kept,
            "checks": trace.checks,
            "acceptance": trace.acceptance,
            "tokens_per_check": trace.tokens_per_check,
        }


def load_calm(
    checkpoint: str,
    threshold: float = 0.9,
    measure: str = "margin",
    decode_rows: int = 1,
    batch_tokens: int = 8192,
    device: str | None = None,
    dtype: str | None = None,
) -> CalmLM:
    """Builds `nvium:calm` from a checkpoint folder.

    Raises:
        ConfigError: no such folder, another kind of model, or wrong settings.
    """
    network, tokenizer, folder = load_network(checkpoint, dtype, ("nvium-calm",))
    return CalmLM(
        network, tokenizer, device=device or "cpu", threshold=threshold, measure=measure,
        decode_rows=decode_rows, batch_tokens=batch_tokens, source=folder,
    )  # fmt: skip


def load_layerskip(
    checkpoint: str,
    exit_layer: int | None = None,
    draft_length: int = 4,
    batch_tokens: int = 8192,
    device: str | None = None,
    dtype: str | None = None,
) -> LayerSkipLM:
    """Builds `nvium:layerskip` from the folder of a LayerSkip model or of a dense one.

    Raises:
        ConfigError: no such folder, another kind of model, or wrong settings.
    """
    network, tokenizer, folder = load_network(checkpoint, dtype, ("nvium-layerskip", "nvium"))
    return LayerSkipLM(
        network, tokenizer, device=device or "cpu", exit_layer=exit_layer,
        draft_length=draft_length, batch_tokens=batch_tokens, source=folder,
    )  # fmt: skip
