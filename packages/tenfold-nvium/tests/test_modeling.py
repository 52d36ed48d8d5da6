"""The model: generalises a dense transformer, survives saving, padding, resizing, autocast."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from nvium_cases import shake, tiny_config, tiny_model
from tenfold.errors import ConfigError
from tenfold_nvium.backbone import base_class
from tenfold_nvium.configuration import NviumConfig, even_exits, router_width
from tenfold_nvium.mixture import exit_log_probs
from tenfold_nvium.modeling import NviumForCausalLM
from transformers import AutoModelForCausalLM


def base_model(config: NviumConfig, kind: str = "llama"):
    """The base architecture's own causal language model of the same shape."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    import transformers

    cls = getattr(transformers, f"{names[kind]}Config")
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
              "max_position_embeddings")  # fmt: skip
    values = {name: getattr(config, name) for name in fields}
    if kind == "mistral":
        values["sliding_window"] = None
    model = base_class(kind, "ForCausalLM")(cls(**values, tie_word_embeddings=False)).eval()
    shake(model, 3)
    return model


def ids(rows=2, length=9, vocab=23, seed=0):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_one_exit_equals_the_base_model_bit_for_bit(kind):
    config = tiny_config(exit_layers=[], final_adapter=False, base_model_type=kind)
    base = base_model(config, kind)
    model = NviumForCausalLM(config).eval()
    report = model.load_state_dict(base.state_dict())
    assert not report.missing_keys
    with torch.no_grad():
        expected, output = base(ids()), model(ids(), output_exit_logits=True)
    assert torch.equal(output.exit_logits[:, :, 0], expected.logits)
    assert torch.equal(output.logits, expected.logits.log_softmax(-1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = base(ids(), attention_mask=mask, position_ids=positions).logits
        got = model(ids(), attention_mask=mask, output_exit_logits=True).exit_logits[:, :, 0]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1, 4:], expected[1, 4:])


def close_gates(model: NviumForCausalLM) -> None:
    with torch.no_grad():
        for exit_ in model.exits:
            exit_.router.head.weight.zero_()
            exit_.router.head.bias.copy_(torch.tensor([0.0, -1e4]))


def test_closed_gates_equal_the_last_head_bit_for_bit():
    model = tiny_model(dtype=torch.float32)
    close_gates(model)
    with torch.no_grad():
        output = model(ids(), output_exit_logits=True)
    assert torch.equal(output.logits, output.exit_logits[:, :, -1].log_softmax(-1))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_gate_wide_open_equals_the_truncated_model_with_that_head(k):
    model = tiny_model()
    close_gates(model)
    with torch.no_grad():
        model.exits[k].router.head.bias.copy_(torch.tensor([0.0, 1e4]))
        output = model(ids()).logits
        depth = model.config.exit_layers[k]
        layers = model.model(model.model.embed_tokens(ids()), torch.arange(9)[None], None)
        logits = model.head_logits(k, model.normed(k, layers[depth - 1]))
    torch.testing.assert_close(output, logits.log_softmax(-1), rtol=0, atol=1e-12)


def test_logits_are_the_brute_force_sum_over_exits():
    model = tiny_model()
    with torch.no_grad():
        output = model(ids(), output_exit_logits=True)
    weights = exit_log_probs(output.gate_log_odds).exp()
    mixed = (weights[..., None] * output.exit_logits.softmax(-1)).sum(-2).log()
    torch.testing.assert_close(output.logits, mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tying", ["lm_head", "embeddings", "none"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_loss_is_the_mean_mixture_nll_plus_the_phase_term(tying, chunk):
    model = tiny_model(exit_head_tying=tying, loss_chunk_tokens=chunk)
    tokens, labels = ids(), ids()
    labels[0, :5] = -100
    output = model(tokens, labels=labels, return_logits=True)
    scored = labels[:, 1:] != -100
    picked = output.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    nll = -(picked * scored).sum() / scored.sum()
    depth = (output.exit_log_probs.exp() * torch.tensor([0.25, 0.5, 0.75, 1.0])).sum(-1)
    depth = (depth[:, :-1] * scored).sum() / scored.sum()
    assert output.mixture_loss.item() == pytest.approx(nll.item(), rel=1e-12)
    assert output.loss.item() == pytest.approx((nll + 0.05 * depth).item(), rel=1e-9)
    free = model(tokens, labels=labels, compute_penalty=0.0)
    assert free.loss.item() == pytest.approx(nll.item(), rel=1e-12)
    warm = model(tokens, labels=labels, loss_phase="warmup")
    assert warm.loss.item() == pytest.approx((nll + warm.router_warmup).item(), rel=1e-9)
    assert output.exit_shares.sum().item() == pytest.approx(1.0)


def test_no_scored_token_gives_zero_loss_and_finite_gradients():
    model = tiny_model()
    loss = model(ids(), labels=torch.full((2, 9), -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_loss_over_accumulated_micro_batches_equals_one_batch():
    """Unequal numbers of scored tokens per micro-batch, one common denominator."""
    model, tokens, labels = tiny_model(), ids(4), ids(4)
    labels[0, :6], labels[3, :3] = -100, -100
    count = int((labels[:, 1:] != -100).sum())
    model(tokens, labels=labels).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in range(4):
        part = slice(row, row + 1)
        model(tokens[part], labels=labels[part], num_items_in_batch=count).loss.backward()
    for one, many in zip(whole, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-12)


def test_every_parameter_gets_gradient_in_both_phases():
    for phase in ("main", "warmup"):
        model = tiny_model()
        model(ids(), labels=ids(), loss_phase=phase).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    model(ids(), labels=ids()).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model()
    tokens, width = ids(1, 6), 10
    pad = width - 6
    place = slice(pad, width) if side == "left" else slice(0, 6)
    padded, mask = torch.zeros(1, width, dtype=torch.long), torch.zeros(1, width, dtype=torch.long)
    padded[:, place], mask[:, place] = tokens, 1
    with torch.no_grad():
        alone, got = model(tokens).logits, model(padded, attention_mask=mask).logits
    torch.testing.assert_close(got[:, place], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    model = tiny_model(dtype=torch.float32)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids(), attention_mask=mask).logits
        model.set_attn_implementation(attention)
        got = model(ids(), attention_mask=mask).logits
    torch.testing.assert_close(got[0, 3:], expected[0, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = NviumForCausalLM(tiny_config(hidden_size=128, num_attention_heads=4))
    for exit_ in model.exits:
        assert exit_.adapter.up.weight.eq(0).all()
        assert exit_.adapter.down.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert exit_.router.head.weight.std().item() == pytest.approx(0.4 * 128**-0.5, rel=0.25)
        assert exit_.router.head.bias.eq(0).all()
        assert exit_.norm.weight.eq(1).all()
        assert exit_.router.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        log_odds = model(ids(4, 50)).gate_log_odds
    # Two logits of spread 0.4 each: their difference has 0.57.
    assert 0.3 < log_odds.square().mean().sqrt() < 0.9


@pytest.mark.parametrize("changes", [
    {}, {"exit_head_tying": "none"}, {"exit_head_tying": "embeddings"},
    {"tie_word_embeddings": True}, {"adapter_size": 0, "final_adapter": False},
    {"base_model_type": "qwen3", "num_key_value_heads": 1, "router_num_layers": 2},
])  # fmt: skip
def test_save_and_load_through_auto_model(tmp_path, changes):
    model = tiny_model(dtype=torch.float32, **changes)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is NviumForCausalLM
    assert loaded.config.exit_layers == [1, 2, 3]
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == bool(model.config.tie_word_embeddings)


def test_load_in_a_fresh_process_and_in_half_precision(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, tenfold_nvium.modeling\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "o = m(torch.arange(9)[None])\n"
        "print(type(m).__name__, m.dtype, float(o.logits.exp().sum(-1).sub(1).abs().max()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    name, dtype, error = done.stdout.split()
    assert (name, dtype) == ("NviumForCausalLM", "torch.bfloat16")
    assert float(error) < 1e-5


def test_resizing_the_vocabulary_keeps_all_heads_tied(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.resize_token_embeddings(29)
    with torch.no_grad():
        output = model(ids(), output_exit_logits=True)
    assert output.exit_logits.shape[-1] == 29
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, output.logits)


def test_bf16_mixture_sums_to_one():
    model = tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        output = model(ids())
    assert output.logits.dtype == torch.float32
    assert output.logits.exp().sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exit_layers": [2, 1]}, "strictly increasing"),
        ({"exit_layers": [1, 1, 2]}, "strictly increasing"),
        ({"exit_layers": [0, 2]}, "outside 1..3"),
        ({"exit_layers": [2, 4]}, "outside 1..3"),
        ({"exit_layers": None, "num_exits": 5}, "do not fit"),
        ({"base_model_type": "gpt2"}, "not supported"),
        ({"base_model_type": "qwen"}, "did you mean 'qwen"),
        ({"exit_head_tying": "shared"}, "must be one of"),
        ({"sliding_window": 4}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ({"router_temperature": 0.0}, "above 0"),
        ({"max_deferred": 0}, "at least 1"),
        ({"compute_cost": [0.5, 1.0]}, "2 numbers for 4 exits"),
        ({"hidden_size": 15}, "not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_bad_configurations_name_the_problem(changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(**changes)


def test_default_exits_and_router_widths():
    assert even_exits(24, 4) == [6, 12, 18]
    assert even_exits(24, 12) == list(range(2, 24, 2))
    assert even_exits(3, 1) == []
    assert [router_width(h) for h in (128, 256, 512, 768, 1024, 1536)] == [
        88, 176, 344, 512, 688, 1016
    ]  # fmt: skip
