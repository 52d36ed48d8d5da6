"""The baselines as models: AutoModel, generate, losses by hand, layer dropout by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baseline_cases import dense_of, shape, slow_greedy, tiny_calm, tiny_layerskip
from tenfold.errors import ConfigError
from tenfold_nvium.baselines.configuration import (
    CalmConfig,
    LayerSkipConfig,
    every_second_layer,
)
from tenfold_nvium.baselines.modeling import CalmForCausalLM, LayerSkipForCausalLM
from tenfold_nvium.baselines.schedules import (
    active_exits,
    calm_weights,
    dropout_rates,
    layerskip_weights,
    linear_ramp,
)
from transformers import AutoModelForCausalLM, DynamicCache

IDS = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize(
    "make", [tiny_calm, tiny_layerskip, lambda: tiny_calm(exit_norms="shared")]
)
def test_saved_and_loaded_by_automodel(make, tmp_path):
    model = make().float()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.config.exit_layers == [1, 3]
    wanted, got = (m(IDS, output_exit_logits=True).exit_logits for m in (model, again))
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("make", [tiny_calm, tiny_layerskip])
def test_the_language_model_is_the_dense_one(make):
    """Logits, `generate` of transformers with padding, and a cache in two parts."""
    model = make()
    dense = dense_of(model)
    torch.testing.assert_close(
        model(IDS).logits.log_softmax(-1), dense(IDS).logits.log_softmax(-1), **EXACT
    )
    padded = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    done = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert done[0, 4:].tolist() == slow_greedy(model, [1, 2], 8)
    assert done[1, 4:].tolist() == slow_greedy(model, [3, 4, 5, 6], 8)
    cache = DynamicCache()
    model(IDS[:, :4], past_key_values=cache)
    second = model(IDS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(second, model(IDS).logits[:, 4:], **EXACT)


@pytest.mark.parametrize("norms", ["own", "shared"])
@pytest.mark.parametrize("chunk", [0, 5])
def test_the_loss_is_the_weighted_sum_of_the_heads(norms, chunk):
    """By hand, with ignored labels; each exit after exactly its number of layers."""
    model = tiny_calm(exit_norms=norms, loss_chunk_tokens=chunk)
    labels = IDS.clone()
    labels[0, :5], labels[2, -1] = -100, -100
    output = model(IDS, labels=labels)
    states = model.layer_states(IDS)
    total, losses = 0.0, []
    for k, (depth, weight) in enumerate(zip((1, 3, 4), (1 / 8, 3 / 8, 4 / 8), strict=True)):
        norm = model.exit_norms[k] if norms == "own" and k < 2 else model.model.norm
        logits = model.lm_head(norm(states[depth]))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss)
        total = total + weight * loss
    torch.testing.assert_close(output.loss, total, **EXACT)
    torch.testing.assert_close(output.exit_losses, torch.stack(losses).detach(), **EXACT)
    assert len(model.exit_norms) == (2 if norms == "own" else 0)


def test_unused_heads_are_not_evaluated_in_training():
    model = tiny_layerskip().train()
    model.loss_weights = [0.0, 0.5, 1.0]
    output = model(IDS, labels=IDS)
    assert output.exit_losses.isnan().tolist() == [True, False, False]
    with torch.no_grad():
        other = model(IDS, labels=IDS, num_items_in_batch=48).loss
    torch.testing.assert_close(other * 2, output.loss.detach(), **EXACT)


def test_layer_dropout_is_each_rows_own_shorter_model():
    """Row by row: the same as running only the layers that are kept, gradients included."""
    model = tiny_layerskip().train()
    keep = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    output = model(IDS, labels=IDS, keep=keep)
    output.loss.backward()
    thinned = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row in range(3):
        hidden, positions = model.model.embed_tokens(IDS[row : row + 1]), torch.arange(9)[None]
        angles = model.model.rotary.at(positions, 9, hidden)
        states = [hidden]
        for i, layer in enumerate(model.model.layers):
            if keep[i, row]:
                hidden = layer(
                    hidden, attention_mask=None, position_ids=positions,
                    position_embeddings=angles,
                )  # fmt: skip
            states.append(hidden)
        for depth, weight in zip((1, 3, 4), model.loss_weights, strict=True):
            logits = model.lm_head(model.model.norm(states[depth]))[0, :-1]
            total = total + weight * F.cross_entropy(logits, IDS[row, 1:]) / 3
    torch.testing.assert_close(output.loss, total, **EXACT)
    total.backward()
    for name, parameter in model.named_parameters():
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(thinned[name], wanted, rtol=0, atol=1e-11)
    # A layer that no row runs still takes part, with a gradient of zero.
    assert thinned["model.layers.2.mlp.up_proj.weight"].eq(0).all()
    whole = model(IDS, labels=IDS, keep=torch.ones(4, 3, dtype=torch.bool)).loss
    torch.testing.assert_close(whole, model(IDS, labels=IDS).loss, **EXACT)


# --- Schedules ----------------------------------------------------------------------------------


def test_calm_weights():
    assert calm_weights([6, 12, 18, 24], "depth") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert calm_weights([1, 3, 4], "equal") == pytest.approx([1 / 3] * 3)
    assert calm_weights([2, 4], "depth", 0.5) == pytest.approx([0.2, 0.8])
    assert [linear_ramp(t, 10, 0.5) for t in (0, 1, 4, 9)] == pytest.approx([0.2, 0.4, 1, 1])
    assert linear_ramp(0, 10, 0.0) == 1


def test_layerskip_weights_are_squares_over_the_active_exits():
    assert layerskip_weights([2, 4, 6], [0, 1], 1.0) == pytest.approx([0.2, 0.8, 1.0])
    assert layerskip_weights([2, 4, 6], [1], 0.2) == pytest.approx([0.0, 0.2, 1.0])
    assert layerskip_weights([2, 4, 6], [], 1.0) == [0.0, 0.0, 1.0]


def test_curricula():
    assert active_exits("all", 3, 5, 10, 8, 8) == [0, 1, 2]
    # T / 2L = 100 / 8 steps: the deepest at once, then one more every 12.5.
    gradual = [active_exits("gradual", 3, t, 100, 4, 8) for t in (0, 12, 13, 25, 99)]
    assert gradual == [[2], [2], [1, 2], [0, 1, 2], [0, 1, 2]]
    turns = [active_exits("rotational", 11, t, 100, 24, 8) for t in range(9)]
    assert turns[0] == [0, 8]
    assert turns[3] == [3]
    assert turns[8] == turns[0]
    assert [active_exits("rotational", 2, t, 100, 6, 8) for t in range(3)] == [[0], [1], [0]]


def test_dropout_rates_follow_the_formula():
    constant = dropout_rates(4, 7, 10, 0.3, "constant")
    assert constant == pytest.approx([0.3 * (2 ** (i / 3) - 1) for i in range(4)])
    assert constant[0] == 0
    assert constant[3] == pytest.approx(0.3)
    rising = dropout_rates(4, 5, 10, 0.3, "rising")
    assert rising == pytest.approx([(2**0.5 - 1) * rate for rate in constant])
    assert not any(dropout_rates(4, 0, 10, 0.3, "rising"))
    assert dropout_rates(1, 5, 10, 0.3, "constant") == [0.0]


def test_bad_configurations_are_one_clear_error():
    with pytest.raises(ConfigError, match="exit_norms 'owned' must be one of own, shared"):
        CalmConfig(**shape(exit_norms="owned"))
    with pytest.raises(ConfigError, match=r"exit_ramp is 2; it must be in 0\.\.1"):
        CalmConfig(**shape(exit_ramp=2))
    with pytest.raises(ConfigError, match="exit_curriculum 'rotate'"):
        LayerSkipConfig(**shape(exit_curriculum="rotate"))
    with pytest.raises(ConfigError, match="layer_dropout is 1"):
        LayerSkipConfig(**shape(layer_dropout=1.0))
    with pytest.raises(ConfigError, match="exit_period is 0"):
        LayerSkipConfig(**shape(exit_period=0))
    with pytest.raises(ConfigError, match="shared head"):
        CalmConfig(**shape(exit_head_tying="none"))
    with pytest.raises(ConfigError, match=r"outside 1\.\.3"):
        CalmConfig(**shape(exit_layers=[4]))
    with pytest.raises(ConfigError, match="at least 2 layers"):
        every_second_layer(1)
    assert every_second_layer(24) == list(range(2, 24, 2))
    assert every_second_layer(2) == [1]
    assert CalmForCausalLM(CalmConfig(**shape())).config.model_type == "nvium-calm"
    assert LayerSkipForCausalLM(LayerSkipConfig(**shape())).config.model_type == "nvium-layerskip"
