"""Packed copies of weights compute what the modules compute, and follow the weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nvium_cases import tiny_model
from tenfold_nvium import packing
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exit_runners import ModuleExit, PackedExit, module_exits, packed_exits
from tenfold_nvium.exits import NviumRMSNorm
from tenfold_nvium.packing import NormedLinear, PackedLinear, PackedNorm
from tenfold_nvium.runner_cache import packed_runner
from torch import nn

WIDTHS = (1, 2, 5, 16, 17, 40)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 40), (40, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocked", [True, False])
def test_packed_linear_is_the_linear_layers_side_by_side(
    dtype, width, inputs, outputs, bias, blocked, monkeypatch
):
    monkeypatch.setattr(packing, "_BLOCKED_SIZE", 0 if blocked else 1 << 40)
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, outputs, bias=bias, dtype=dtype) for _ in range(2)]
    x, scale = torch.randn(width, inputs, dtype=dtype), torch.rand(inputs, dtype=dtype)
    packed = PackedLinear.of(*layers, scale=scale)
    wanted = torch.cat([layer(x * scale) for layer in layers], -1)
    torch.testing.assert_close(packed(x), wanted, rtol=0, atol=TOLERANCE[dtype])
    start = torch.randn(width, 2 * outputs, dtype=dtype)
    got = packed.add_to(start, x)
    torch.testing.assert_close(got, start + wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_norm_is_the_norm(dtype, width):
    torch.manual_seed(0)
    norm = NviumRMSNorm(24).to(dtype)
    nn.init.uniform_(norm.weight)
    x = 3 * torch.randn(width, 24, dtype=dtype)
    wanted = norm(x)
    torch.testing.assert_close(PackedNorm(norm)(x), wanted, rtol=0, atol=TOLERANCE[dtype])
    for bias in (True, False):
        layers = [nn.Linear(24, 9, bias=bias, dtype=dtype) for _ in range(2)]
        with torch.inference_mode():
            got = NormedLinear(norm, *layers, factor=0.5)(x)
            wanted = 0.5 * torch.cat([layer(norm(x)) for layer in layers], -1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[dtype])


def test_half_precision_is_left_to_the_modules():
    norm = NviumRMSNorm(24).to(torch.bfloat16)
    layer = nn.Linear(24, 9).to(torch.bfloat16)
    x = torch.randn(3, 24).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(PackedNorm(norm)(x), norm(x))
        assert torch.equal(NormedLinear(norm, layer)(x), layer(norm(x)))
    model = tiny_model().to(torch.bfloat16)
    assert all(isinstance(runner, ModuleExit) for runner in packed_exits(model))


@pytest.mark.parametrize("tying", ["lm_head", "embeddings", "none"])
@pytest.mark.parametrize("settings", [{}, {"router_num_layers": 3, "router_temperature": 0.7},
                                      {"adapter_size": 0, "final_adapter": False}])  # fmt: skip
@pytest.mark.parametrize("width", [1, 3])
def test_packed_exits_are_the_exits(tying, settings, width):
    model = tiny_model(exit_head_tying=tying, **settings)
    states = torch.randn(width, model.config.hidden_size, dtype=model.dtype)
    pairs = list(zip(module_exits(model), packed_exits(model), strict=True))
    with torch.inference_mode():
        for k, (plain, packed) in enumerate(pairs):
            assert isinstance(packed, PackedExit)
            logits = plain.logits(states)
            torch.testing.assert_close(packed.logits(states), logits, rtol=0, atol=1e-12)
            if k + 1 < len(pairs):
                assert packed.log_odds(states) == pytest.approx(plain.log_odds(states), abs=1e-12)


def test_heads_that_share_a_weight_share_its_copy():
    runners = packed_exits(tiny_model())
    assert len({id(runner._head) for runner in runners}) == 1


def test_an_exit_with_other_linear_layers_runs_through_its_modules():
    class Adapted(nn.Linear):
        pass

    model = tiny_model()
    down = model.exits[1].adapter.down
    model.exits[1].adapter.down = Adapted(down.in_features, down.out_features, dtype=model.dtype)
    kinds = [type(runner) for runner in packed_exits(model)]
    assert kinds == [PackedExit, ModuleExit, PackedExit, PackedExit]


def test_copies_are_reused_until_a_weight_changes():
    model = tiny_model(dtype=torch.float32)
    first = packed_runner(model)
    assert packed_runner(model) is first
    before = PiggybackDecoder(model, "full").generate([[1, 2]], 8).rows[0].scores
    # A fused optimiser changes weights without moving their version counters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    assert packed_runner(model) is not first
    plain = PiggybackDecoder(model, "full", packed=False).generate([[1, 2]], 8).rows[0].scores
    after = PiggybackDecoder(model, "full").generate([[1, 2]], 8).rows[0].scores
    assert after == pytest.approx(plain, abs=1e-4)
    assert after != pytest.approx(before, abs=1e-4)


def test_copies_and_pickles_of_a_model_leave_packed_weights_out():
    model = tiny_model()
    runner = packed_runner(model)
    twin = copy.deepcopy(model)
    assert packed_runner(twin) is not runner
    with torch.no_grad():
        twin.lm_head.weight.add_(1.0)
    assert packed_runner(model) is runner
    assert "_packed_runner" not in pickle.loads(pickle.dumps(model)).__dict__


def test_generate_uses_copies_only_while_it_runs():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False,
                "return_dict_in_generate": True}  # fmt: skip
    done = model.generate(ids, **settings)
    assert "_packed_runner" in model.__dict__
    assert done.past_key_values.runner is None
    other = tiny_model(packed_decoding=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.generate(ids, **settings).sequences, done.sequences)
    assert "_packed_runner" not in other.__dict__
