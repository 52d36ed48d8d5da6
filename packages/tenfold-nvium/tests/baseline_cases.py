"""Small baselines, and decoders written the slow and obvious way to check the real ones."""

from __future__ import annotations

import torch
from nvium_cases import shake, tiny_config
from tenfold_nvium.baselines.configuration import CalmConfig, LayerSkipConfig
from tenfold_nvium.baselines.modeling import CalmForCausalLM, LayerSkipForCausalLM
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.noise import PositionNoise
from tenfold_nvium.sampling import Warp, draw

_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "max_position_embeddings", "exit_layers", "bos_token_id",
          "eos_token_id", "loss_chunk_tokens")  # fmt: skip


def shape(**changes) -> dict:
    config = tiny_config(exit_layers=[1, 3])
    return {name: getattr(config, name) for name in _SHAPE} | changes


def _shaken(model, seed: int, dtype: torch.dtype, scale: float):
    """Random weights everywhere, heads sharp enough that confidences differ."""
    model = model.to(dtype).eval()
    shake(model, seed, scale)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        for norm in model.exit_norms:
            norm.weight.add_(1)
    return model


def tiny_calm(
    seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3, **changes
) -> CalmForCausalLM:
    return _shaken(CalmForCausalLM(CalmConfig(**shape(**changes))), seed, dtype, scale)


def tiny_layerskip(
    seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3, **changes
) -> LayerSkipForCausalLM:
    return _shaken(LayerSkipForCausalLM(LayerSkipConfig(**shape(**changes))), seed, dtype, scale)


def dense_of(model) -> NviumForCausalLM:
    """The dense N-vium (K = 1) with a baseline's weights."""
    config = tiny_config(**{
        name: getattr(model.config, name)
        for name in (*_SHAPE, "base_model_type", "num_key_value_heads", "head_dim")
        if name != "exit_layers"
    }, exit_layers=[], adapter_size=0, final_adapter=False)  # fmt: skip
    dense = NviumForCausalLM(config).to(model.dtype).eval()
    missing = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(name.startswith("exit_norms") for name in missing.unexpected_keys)
    return dense


class SlowCalm:
    """CALM one token and one layer at a time: explicit attention over lists of keys and values,
    no cache class, no blocks, no packed weights."""

    def __init__(self, model: CalmForCausalLM, threshold: float, measure: str) -> None:
        self.model, self.threshold, self.measure = model, threshold, measure
        layers = model.config.num_hidden_layers
        self.keys = [[] for _ in range(layers)]
        self.values = [[] for _ in range(layers)]

    @torch.no_grad()
    def read(self, token: int, deep: bool) -> tuple[int, torch.Tensor]:
        """`(exit, logits)` of one more token."""
        model, position = self.model, len(self.keys[0])
        x = model.model.embed_tokens.weight[token]
        depth, before = 0, x
        for k, end in enumerate(model.config.depths):
            for i in range(depth, end):
                x = self._layer(i, x, position)
            depth = end
            logits = model.lm_head(self._norm(k, x))
            if end == model.config.num_hidden_layers:
                return k, logits
            if not deep and self._confidence(x, before, logits) > self.threshold:
                for i in range(end, model.config.num_hidden_layers):
                    self._remember(i, x, position)
                return k, logits
            before = x
        raise AssertionError

    def _norm(self, k, x):
        early = self.model.config.exit_norms == "own" and k < len(self.model.config.exit_layers)
        return (self.model.exit_norms[k] if early else self.model.model.norm)(x)

    def _confidence(self, x, before, logits) -> float:
        if self.measure == "saturation":
            return float(x @ before / (x.norm() * before.norm()))
        first, second = logits.softmax(-1).sort(descending=True).values[:2].tolist()
        return first if self.measure == "max_prob" else first - second

    def _rotate(self, states, position):
        """`[heads, D]` by the position's angles, written out."""
        size = states.shape[-1]
        base = self.model.config.rope_parameters["rope_theta"]
        angles = position / base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
        cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        a, b = states[..., : size // 2], states[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _remember(self, i, x, position):
        layer = self.model.model.layers[i]
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        size = attention.head_dim
        k = attention.k_proj(normed).view(-1, size)
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k)
        self.keys[i].append(self._rotate(k, position))
        self.values[i].append(attention.v_proj(normed).view(-1, size))
        return normed

    def _layer(self, i, x, position):
        layer = self.model.model.layers[i]
        attention = layer.self_attn
        normed = self._remember(i, x, position)
        q = attention.q_proj(normed).view(-1, attention.head_dim)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm(q)
        q = self._rotate(q, position)
        keys, values = torch.stack(self.keys[i]), torch.stack(self.values[i])
        groups = q.shape[0] // keys.shape[1]
        mixed = []
        for head in range(q.shape[0]):
            scores = keys[:, head // groups] @ q[head] * attention.head_dim**-0.5
            mixed.append(scores.softmax(-1) @ values[:, head // groups])
        x = x + attention.o_proj(torch.cat(mixed))
        return x + layer.mlp(layer.post_attention_layernorm(x))


def slow_calm(
    model, prompt, count, seed=0, threshold=0.1, measure="margin", warp=None, forced=None
):
    """Tokens, exits and unwarped log-probabilities; `forced` tokens are read instead."""
    slow, noise, warp = SlowCalm(model, threshold, measure), PositionNoise(seed, 1), warp or Warp()
    for token in prompt[:-1]:
        slow.read(token, deep=True)
    token, deep = prompt[-1], True
    tokens, exits, log_probs = [], [], []
    for n in range(count):
        k, logits = slow.read(token, deep)
        deep = False
        token = int(draw(logits[None], warp, [noise.at(len(prompt) + n - 1)[1]])[0])
        if forced is not None:
            token = forced[n]
        tokens.append(token)
        exits.append(k)
        log_probs.append(float(logits.log_softmax(-1)[token]))
    return tokens, exits, log_probs


@torch.no_grad()
def slow_greedy(model, prompt, count: int) -> list[int]:
    """The dense arg-max, one full forward pass per token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]
