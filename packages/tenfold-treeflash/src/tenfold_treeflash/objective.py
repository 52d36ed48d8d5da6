"""The drafter's loss over blocks, in chunks, so that logits never exist for all slots at once.

    L_KL   = sum m w_k KL(p_{a+k-1} || q'_k(. | x_{a+k-1})) / sum m w_k
    L_marg = sum m w_k CE(q_k, x_{a+k}) / sum m w_k           w_k = exp(-(k - 1) / decay)
    L      = (1 - lambda) L_KL + lambda L_marg

The sums run over a row's blocks; a batch's loss is the mean of its rows' by their supervised
tokens. So the parts of a step add up to it whatever the number of processes and parts is.

The corrected distribution reads the true token at slot `k - 1` (teacher forcing). Phase `dflash`
trains the backbone on marginals alone.

Shapes: `B` rows, `S` tokens, `N` blocks per row, `T` slots, `n` slots of a chunk, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tenfold.errors import ConfigError
from tenfold.lm.packing import IGNORED
from tenfold.seeds import derive
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tenfold_treeflash.anchors import Blocks, make_blocks
from tenfold_treeflash.features import FeatureStore, read_features
from tenfold_treeflash.target import Target

Head = Callable[[Tensor], Tensor]
PHASES = ("dflash", "treeflash", "joint")
MARGINAL_LOSSES = ("ce", "kl")


def default_decay(block_size: int) -> float:
    """Decay of the weights by slot: 7, 5 and 4 for blocks of 16, 10 and 8, as published."""
    return {16: 7.0, 10: 5.0, 8: 4.0}.get(block_size, float(max(1, round(0.44 * block_size))))


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """Settings of the loss.

    Attributes:
        phase: `dflash` (marginals), `treeflash` (corrected distributions), or `joint`.
        anchors: blocks per row.
        marginal_weight: lambda; None takes 0.2 in phase `treeflash`, 0.5 in `joint`.
        marginal_loss: `ce` against the data, or `kl` against the target.
        decay: of the weights by slot; None takes `default_decay`.
        chunk: slots whose logits exist at once.
        seed: of the anchors.
    """

    phase: str = "dflash"
    anchors: int = 32
    marginal_weight: float | None = None
    marginal_loss: str = "ce"
    decay: float | None = None
    chunk: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        for name, known in (("phase", PHASES), ("marginal_loss", MARGINAL_LOSSES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.anchors < 1 or self.chunk < 1:
            raise ConfigError("anchors and chunk must be at least 1")
        weight = self.marginal_weight
        if weight is not None and not 0 <= weight <= 1:
            raise ConfigError(f"marginal_weight is {weight}; it must lie between 0 and 1")
        if self.decay is not None and self.decay <= 0:
            raise ConfigError(f"decay is {self.decay}; it must be above 0")

    @property
    def lam(self) -> float:
        """Weight of the marginal term."""
        if self.phase == "dflash":
            return 1.0
        if self.marginal_weight is not None:
            return self.marginal_weight
        return 0.2 if self.phase == "treeflash" else 0.5


def slot_weights(size: int, decay: float, device: torch.device | None = None) -> Tensor:
    """`[T]` weights by slot; slot 0 has none."""
    slots = torch.arange(size, device=device, dtype=torch.float32)
    return torch.exp(-(slots - 1) / decay) * (slots > 0)


class DraftObjective:
    """`(drafter, batch) -> loss, values` for `fit_causal_lm`, with a frozen target.

    `step` is set from outside before each optimizer step: anchors are a function of (seed, step,
    row), so they do not depend on processes, accumulation or interruptions.
    """

    def __init__(
        self,
        target: Target,
        settings: ObjectiveSettings,
        stores: tuple[FeatureStore | None, FeatureStore | None] = (None, None),
    ) -> None:
        self.target, self.settings = target, settings
        self.stores = stores
        """Stored features of training and of held-out rows; None runs the target."""
        self.step = 0

    def __call__(
        self, drafter: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The batch's mean loss (see the module), and values to log."""
        # Not the wrapper's own flag: DeepSpeed's engine says it trains while its module does not.
        network = getattr(drafter, "module", drafter)
        config, training = network.config, network.training
        ids, labels = batch["input_ids"], batch["labels"]
        step = self.step if training else -1
        rows = batch["row"].tolist() if "row" in batch else list(range(len(ids)))
        seeds = [derive(self.settings.seed, step, row) for row in rows]
        blocks = make_blocks(ids, labels, self.settings.anchors, config.block_size, seeds)
        store = self.stores[0 if training else 1]
        if store is None:
            states, features = read_features(
                self.target, ids, config.target_layer_ids, batch.get("attention_mask")
            )
        else:
            states, features = store.batch(rows, ids.shape[1], ids.device)
        marginal, corrected = self._draft(drafter, config, blocks, features)
        shares = labels[:, 1:].ne(IGNORED).sum(1).float()
        shares = shares / shares.sum().clamp_min(1)
        return self._loss(config, blocks, shares, states, marginal, corrected)

    def states(
        self, drafter: Any, ids: Tensor, mask: Tensor | None, blocks: Blocks
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What goes into the head: the target's states `[B, S, H]`, and the blocks' marginal and
        corrected ones `[B, N, T, H]`."""
        config = getattr(drafter, "module", drafter).config
        states, features = read_features(self.target, ids, config.target_layer_ids, mask)
        return states, *self._draft(drafter, config, blocks, features)

    def _draft(
        self, drafter: Any, config: Any, blocks: Blocks, features: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Normed marginal and corrected states `[B, N, T, H]`."""
        rows, count, size = blocks.tokens.shape
        length = features.shape[1]
        table = self.target.embedding
        device = features.device
        network = getattr(drafter, "module", drafter)
        kind = network.dtype
        learned = network.mask_embedding
        if learned is not None and learned.numel() == 0:
            raise ConfigError(
                "the drafter's mask is a learned vector, which ZeRO-3 splits among processes "
                "outside of its layers; use ZeRO-1 or 2, or a mask token (mask = an id)"
            )
        anchors = blocks.tokens[..., 0]
        context = torch.arange(length, device=device).expand(rows, -1)
        positions = torch.cat([context, blocks.positions.flatten(1)], dim=1)
        previous = None
        if self.settings.phase != "dflash" and network.looks_back:
            previous = self._previous(blocks, table, network.looks_back, config)
        states = drafter(
            network.block_input(anchors, table, size).flatten(1, 2).to(kind),
            features.to(kind),
            positions,
            prev_token_embds=None if previous is None else previous.to(kind),
            attention_mask=blocks.mask(length),
            with_marginal=previous is not None,
        )
        marginal, corrected = states if isinstance(states, tuple) else (states, None)
        shape = (rows, count, size, -1)
        return marginal.view(shape), None if corrected is None else corrected.view(shape)

    def _previous(self, blocks: Blocks, table: Tensor, back: int, config: Any) -> Tensor:
        """Embeddings `[B, N T, back, H]` of the true tokens before each slot, nearest first; a
        block's beginning repeats its anchor."""
        size = blocks.tokens.shape[-1]
        slots = torch.arange(size, device=blocks.tokens.device)
        index = torch.stack([(slots - i).clamp_min(0) for i in range(1, back + 1)], dim=-1)
        tokens = blocks.tokens[..., index]
        return (table[tokens] * config.input_embedding_scale).flatten(1, 2)

    def _loss(
        self,
        config: Any,
        blocks: Blocks,
        shares: Tensor,
        states: Tensor,
        marginal: Tensor,
        corrected: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and values; `shares [B]` of the rows."""
        settings, size = self.settings, blocks.tokens.shape[-1]
        decay = settings.decay or default_decay(config.block_size)
        weights = slot_weights(size, decay, states.device).expand_as(blocks.tokens)
        chosen = blocks.scored
        if not bool(chosen.any()):
            return marginal.sum() * 0.0, {}
        row, block, slot = chosen.nonzero(as_tuple=True)
        before = blocks.positions[chosen] - 1
        truth = blocks.tokens[chosen]
        sums = (weights * chosen).sum((1, 2))
        weight = weights[chosen] * (shares / sums.clamp_min(1e-12))[row]
        totals = torch.zeros(3, dtype=torch.float32, device=states.device)
        seen = torch.zeros((len(row), 4), dtype=torch.float32, device=states.device)
        for part in torch.arange(len(row), device=states.device).split(settings.chunk):
            inputs = [
                marginal[row[part], block[part], slot[part]],
                None if corrected is None else corrected[row[part], block[part], slot[part]],
                states[row[part], before[part]],
                truth[part],
                weight[part],
            ]
            sums, slots = checkpoint(self._terms, *inputs, use_reentrant=False)
            totals = totals + sums
            seen[part] = slots.detach()
        kl, nll, marginal_kl = totals
        own = nll if settings.marginal_loss == "ce" else marginal_kl
        loss = own if corrected is None else (1 - settings.lam) * kl + settings.lam * own
        table = seen.new_zeros((*chosen.shape, 4))
        table[chosen] = seen
        values = _values(table, chosen, weight, corrected=corrected is not None)
        return loss, values

    def _terms(
        self,
        marginal: Tensor,
        corrected: Tensor | None,
        states: Tensor,
        truth: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums over a chunk: KL of the corrected, CE and KL of the marginal; and per slot
        `[n, 4]` CE and hit (the best token is the true one) of the marginal, KL and hit of the
        corrected."""
        zero, kind = weight.new_zeros(()), states.dtype

        def head(x: Tensor) -> Tensor:
            return self.target.head(x.to(kind))

        q = head(marginal).float().log_softmax(-1)
        nll = -q.gather(-1, truth[:, None])[:, 0]
        hit = q.argmax(-1) == truth
        need_p = corrected is not None or self.settings.marginal_loss == "kl"
        p = None
        if need_p:
            with torch.no_grad():
                p = head(states).float().log_softmax(-1)
        kl = hit_corrected = torch.zeros_like(nll)
        marginal_kl = zero
        if p is not None and self.settings.marginal_loss == "kl":
            marginal_kl = (_kl(p, q) * weight).sum()
        if p is not None and corrected is not None:
            q = head(corrected).float().log_softmax(-1)
            kl = _kl(p, q)
            hit_corrected = q.argmax(-1) == truth
        sums = torch.stack([(kl * weight).sum(), (nll * weight).sum(), marginal_kl])
        return sums, torch.stack([nll, hit.float(), kl, hit_corrected.float()], dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q) [n]` of log-probabilities `[n, V]`."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def _values(table: Tensor, scored: Tensor, weight: Tensor, *, corrected: bool) -> dict[str, float]:
    """What is logged, from CE, hit, KL, hit of slots `table [B, N, T, 4]` where `scored`.

    Weighted means; `@k` for plain means at depth k; and `length`, the tokens per round of a chain
    whose slots are right exactly where their best token (after the true one) is.
    """
    means = (table[scored] * weight[:, None]).sum(0).tolist()
    counts = scored.sum((0, 1))
    by_depth = (table.sum((0, 1)) / counts.clamp_min(1)[:, None])[1:]
    chains = table[..., 1:, :].cumprod(-2).sum(-2) + 1
    whole = scored[..., 1:].all(-1)
    values: dict[str, float] = {}
    kinds = [("marginal", "nll", 0)] + ([("corrected", "kl", 2)] if corrected else [])
    for kind, name, column in kinds:
        values[f"{kind}-{name}"] = means[column]
        values[f"{kind}-accuracy"] = means[column + 1]
        if bool(whole.any()):
            values[f"{kind}-length"] = float(chains[whole][:, column + 1].mean())
        for depth, value in enumerate(by_depth[:, column].tolist(), start=1):
            if counts[depth]:
                values[f"{kind}-{name}@{depth}"] = value
    return values
