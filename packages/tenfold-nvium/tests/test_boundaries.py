"""Where modes meet: caches between routed and plain calls, attention without masks, settings
that do not go together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvium_cases import TEXTS, Texts, tiny_config, tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import ItemResult
from tenfold.testing.context import FakeContext
from tenfold_nvium.baselines.configuration import CalmConfig
from tenfold_nvium.baselines.modeling import CalmForCausalLM
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exactness import Exactness
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.sampling import Warp
from tenfold_nvium.speed import Speed
from tenfold_nvium.verify import verify
from torch import nn
from transformers import DynamicCache

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def reference(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["nvium", "calm"])
def test_eager_attention_is_causal_without_padding(kind):
    if kind == "nvium":
        model = tiny_model()
    else:
        config = CalmConfig(**{k: v for k, v in tiny_config().to_dict().items()
                               if k not in ("model_type", "transformers_version")})  # fmt: skip
        model = CalmForCausalLM(config).double().eval()
    wanted = reference(model, IDS)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(reference(model, IDS), wanted, rtol=0, atol=1e-5)  # fp32 softmax
    other = IDS.clone()
    other[0, -1] = 9
    torch.testing.assert_close(reference(model, other)[:, :-1], wanted[:, :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", ["forward", "penalty"])
def test_a_cache_of_routed_decoding_goes_on_at_full_depth(model, turn):
    cache, mask = NviumCache(model.config), torch.ones_like(IDS)
    torch.manual_seed(0)
    text = model.generate(IDS, attention_mask=mask, max_new_tokens=70, do_sample=True, top_k=0,
                          past_key_values=cache)  # fmt: skip
    more = torch.cat([text, torch.tensor([[3, 1]])], -1)
    if turn == "forward":
        with torch.no_grad():
            first = model(more[:, cache.get_seq_length() :], past_key_values=cache).logits
            second = model(torch.tensor([[7]]), past_key_values=cache).logits
        longer = torch.cat([more, torch.tensor([[7]])], -1)
        torch.testing.assert_close(first[:, -1], reference(model, more)[:, -1])
        torch.testing.assert_close(second[:, -1], reference(model, longer)[:, -1])
        return
    settings = {"attention_mask": torch.ones_like(more), "do_sample": False, "max_new_tokens": 8,
                "repetition_penalty": 1.3}  # fmt: skip
    done = model.generate(more, past_key_values=cache, **settings)
    assert torch.equal(done, model.generate(more, past_key_values=DynamicCache(), **settings))


def test_assisted_generation_starts_with_an_empty_cache(model):
    settings = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 8,
                "prompt_lookup_num_tokens": 3}  # fmt: skip
    cache = NviumCache(model.config)
    first = model.generate(IDS, past_key_values=cache, **settings)
    assert torch.equal(first, model.generate(IDS, **settings))
    with pytest.raises(ConfigError, match="cannot continue a cache"):
        model.generate(first, past_key_values=cache, **settings)


def test_the_decoders_cache_goes_on_in_forward(model):
    done = PiggybackDecoder(model).generate([[1, 2, 3]], 9, seeds=[1])
    text = [1, 2, 3, *done.rows[0].tokens]
    with torch.no_grad():
        logits = model(torch.tensor([text[-1:]]), past_key_values=done.cache).logits
    torch.testing.assert_close(logits[:, -1], reference(model, torch.tensor([text]))[:, -1])


def test_ended_rows_do_not_outlive_generate(model):
    cache = NviumCache(model.config)
    settings = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 8}
    free = model.generate(IDS, **settings)
    eos = int(free[0, 8])
    text = model.generate(IDS, past_key_values=cache, eos_token_id=eos, **settings)
    for token in (*text[0, cache.get_seq_length() :].tolist(), 5, 6):
        with torch.no_grad():
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    whole = torch.cat([text, torch.tensor([[5, 6]])], -1)
    torch.testing.assert_close(logits[:, -1], reference(model, whole)[:, -1])
    cache.reset()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, past_key_values=cache).logits, reference(model, IDS))


def test_labels_and_a_cache_do_not_mix_silently(model):
    output = model(IDS, labels=IDS, use_cache=True)
    assert output.loss.requires_grad
    for setting in ({"labels": IDS}, {"output_hidden_states": True}, {"output_exit_logits": True}):
        with pytest.raises(ConfigError, match="does not go with an NviumCache"):
            model(IDS, past_key_values=NviumCache(model.config), **setting)
    assert len(model(IDS, use_cache=True, output_hidden_states=True).hidden_states) == 5


def test_certified_decoding_refuses_to_sample(model):
    with pytest.raises(ConfigError, match="arg-max, which sampling does not take"):
        PiggybackDecoder(model, "certified").generate([[1]], 3)
    assert PiggybackDecoder(model, "certified", warp=Warp(0.0)).generate([[1]], 3).rows[0].tokens


def test_the_exactness_check_knows_certified_decoding(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    network = tiny_model(vocab_size=len(tokenizer), eos_token_id=0)
    with torch.no_grad():  # wide open gates over a sharp head: certificates do fire
        network.lm_head.weight.mul_(8)
        network.exits[0].router.head.bias.copy_(torch.tensor([0.0, 4.0]))
    rows = [c for c in verify(network, policy="certified", num_prompts=3, draws=0) if c["ok"]]
    assert {"sequence coupling", "keys and values", "log-probabilities"} <= {
        row["check"] for row in rows
    }
    lm, evaluator = NviumLM(network, tokenizer), Exactness(max_new_tokens=12, policy="certified")
    ctx = FakeContext(tmp_path)
    items = evaluator.plan(ctx, {"dataset": Texts(TEXTS[:3])})
    results = list(evaluator.run(ctx, {"model": lm}, items))
    assert all(result.values["equal"] for result in results)
    assert any(result.values["mean_depth"] < 1 for result in results)


def test_exactness_leaves_room_for_a_text(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    network = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=8, eos_token_id=0)
    evaluator, ctx = Exactness(), FakeContext(tmp_path)
    items = evaluator.plan(ctx, {"dataset": Texts(TEXTS[:2])})
    results = list(evaluator.run(ctx, {"model": NviumLM(network, tokenizer)}, items))
    assert all(result.values["tokens"] == 4 for result in results)


@pytest.mark.parametrize("name", ["fixed:0", "fixed:-3"])
def test_exits_are_counted_from_one(name):
    with pytest.raises(ConfigError, match="counted from 1"):
        PiggybackDecoder(tiny_model(), name)


def test_an_exit_that_is_not_there_is_an_error(model):
    with pytest.raises(ConfigError, match="exit 9 does not exist; the model has 4 exits"):
        PiggybackDecoder(model, "fixed:9").generate([[1]], 3)
    with pytest.raises(ConfigError, match="exit 9 does not exist"):
        model.generate(IDS, max_new_tokens=3, decode_policy="fixed:9")


def test_generate_options_it_cannot_serve_are_named(model):
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ConfigError, match="StaticCache cannot hold"):
        model.generate(IDS, cache_implementation="static", **settings)
    with pytest.raises(ConfigError, match="attention maps"):
        model.generate(IDS, output_attentions=True, return_dict_in_generate=True, **settings)
    done = model.generate(IDS, output_hidden_states=True, return_dict_in_generate=True, **settings)
    assert len(done.hidden_states) == 3
    assert len(done.hidden_states[0]) == 5
    assert torch.equal(done.sequences, model.generate(IDS, **settings))


def test_a_text_beyond_the_context_is_an_error():
    model = tiny_model(max_position_embeddings=8)
    with pytest.raises(ConfigError, match="context is 8"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), IDS], -1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones_like(IDS)], -1)
    assert model.generate(padded, attention_mask=mask, max_new_tokens=3).shape[1] == 15


def test_a_cache_of_another_model_is_not_loaded(model, tmp_path):
    done = PiggybackDecoder(model).generate([[1, 2, 3]], 9)
    done.cache.save(tmp_path / "cache.safetensors")
    again = NviumCache.load(tmp_path / "cache.safetensors", model.config)
    assert again.lengths.tolist() == done.cache.lengths.tolist()
    with pytest.raises(ConfigError, match="another model"):
        NviumCache.load(tmp_path / "cache.safetensors", tiny_config(exit_layers=[1, 2]))


def test_lists_of_the_wrong_length_are_named(model):
    decoder = PiggybackDecoder(model)
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts"):
        decoder.generate([[1], [2]], 3, seeds=[0])
    with pytest.raises(ConfigError, match="1 limits of new tokens for 2 prompts"):
        decoder.generate([[1], [2]], [3])
    with pytest.raises(ConfigError, match="outside the vocabulary of 23"):
        decoder.generate([[1, 23]], 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [1.9]}, "whole numbers"),
        ({"exit_layers": "12"}, "whole numbers"),
        ({"exit_layers": 2}, "whole numbers"),
        ({"compute_cost": [-1, 2, float("nan"), 1]}, "above 0, at most 1"),
        ({"compute_penalty": -3}, "compute_penalty is -3"),
        ({"adapter_size": -4}, "adapter_size is -4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"decode_policy": "bogus"}, "unknown decode policy"),
    ],
)
def test_impossible_configurations_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**settings)


def test_packed_decoding_steps_aside_under_autocast(model):
    small = tiny_model(dtype=torch.float32)
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        assert small.generate(IDS, **settings).shape == (1, 9)


def test_gates_of_a_half_precision_model_are_not_rounded():
    model = tiny_model(dtype=torch.bfloat16)
    router = model.exits[0].router
    with torch.no_grad():
        router.head.bias.copy_(torch.tensor([3.515625, 3.53125]))
    normed = torch.randn(50, model.config.hidden_size).to(torch.bfloat16)
    inner = normed
    for block in router.blocks:
        inner = block(inner)
    weight, bias = router.head.weight.double(), router.head.bias.double()
    wanted = inner.double() @ (weight[1] - weight[0]) + bias[1] - bias[0]
    got = router(normed)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


def test_what_is_wrapped_around_the_head_is_refused(model):
    class Wrapped(nn.Linear):
        pass

    other = tiny_model()
    other.lm_head = Wrapped(16, 23, bias=False)
    with pytest.raises(ConfigError, match="lm_head is a Wrapped"):
        other(IDS)


def test_speeds_survive_texts_that_end_at_once(tmp_path):
    def row(category, **tokens):
        return {"category": category, "roles": {
            role: {"first_s": [0.1], "total_s": [0.3], "tokens": n} for role, n in tokens.items()
        }}  # fmt: skip

    rows = [row("a", dense=1, quick=9), row("b", dense=5, quick=9), row("b", dense=5, quick=1)]
    results = [ItemResult(str(i), values) for i, values in enumerate(rows)]
    metrics = {m.name + m.group: m for m in Speed().aggregate(FakeContext(tmp_path), results)}
    assert metrics["speedupquick"].value == pytest.approx(2.0)
    assert metrics["speedupquick"].n == 1
    assert np.isfinite(metrics["decode_tokens_per_seconddense"].value)
