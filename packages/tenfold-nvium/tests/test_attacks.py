"""Inputs that break careless decoders: endless early exits, broken routers, no room, no time."""

from __future__ import annotations

import pytest
import torch
from nvium_cases import TEXTS, tiny_model
from tenfold.errors import ConfigError, RunFailed
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import GenerationConfig
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.policies import FixedExit
from tenfold_nvium.sampling import Warp


@pytest.fixture(scope="module")
def lm() -> NviumLM:
    tokenizer = train_bpe(TEXTS, 300)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return NviumLM(model, tokenizer)


def waiting_numbers(cache: NviumCache) -> int:
    """Numbers held by all states that wait."""
    return sum(states.numel() for queue in cache._waiting for _, states in queue)


@pytest.mark.parametrize("limit", [1, 16])
def test_leaving_early_at_every_token_holds_no_more_than_max_deferred(limit):
    """500 tokens that all leave at exit 1: the queue stays bounded, the text is the same, and
    what was deferred is complete and equal to one full pass."""
    model = tiny_model(max_position_embeddings=512)
    free = PiggybackDecoder(model, FixedExit(0)).generate([[1, 2]], 500, seeds=[3])
    assert free.cache.deferred().tolist() == [499]
    cache, deferred, held = NviumCache(model.config), [], []

    def watch(row: int, tokens: list[int]) -> str:
        deferred.append(int(cache.deferred()[0]))
        held.append(waiting_numbers(cache))
        return ""

    decoder = PiggybackDecoder(model, FixedExit(0), max_deferred=limit)
    done = decoder.generate([[1, 2]], 500, seeds=[3], cache=cache, stop=watch)
    assert done.rows[0].tokens == free.rows[0].tokens
    assert len(deferred) == 500
    assert max(deferred) == limit
    assert max(held) <= (limit + 1) * model.config.hidden_size
    assert done.trace.flushes == 499 // (limit + 1)
    reference = NviumCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[1, 2, *done.rows[0].tokens[:-1]]]), past_key_values=reference)
    cache.flush(model)
    for mine, theirs in zip(cache.stores, reference.stores, strict=True):
        torch.testing.assert_close(
            mine.pair[:, :, :, :501], theirs.pair[:, :, :, :501], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("policy", ["sample", "certified", "full", "greedy-router"])
def test_a_nan_router_stops_every_way_of_decoding(broken, policy):
    model = tiny_model()
    with torch.no_grad():
        model.exits[broken].router.head.bias.fill_(torch.nan)
    warp = Warp(0.0) if policy == "certified" else Warp()
    decoder = PiggybackDecoder(model, policy, warp=warp)
    with pytest.raises(RunFailed, match=f"router of exit {broken + 1} gave NaN"):
        # Every token has to get as far as the broken router sooner or later.
        decoder.generate([[1, 2, 3]], 200)


def test_a_nan_router_stops_generate_and_the_capability(lm):
    model = tiny_model(vocab_size=lm.model.config.vocab_size, eos_token_id=0)
    with torch.no_grad():
        model.exits[0].router.head.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="router of exit 1 gave NaN"):
        NviumLM(model, lm.tokenizer).generate(["def f"], GenerationConfig(max_new_tokens=3))
    with pytest.raises(RunFailed, match="router of exit 1 gave NaN"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
    with pytest.raises(RunFailed, match="router of exit 1 gave NaN"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=True, top_k=5)


def test_one_new_token_and_no_room(lm):
    config = GenerationConfig(max_new_tokens=1, temperature=1.0, seed=1)
    [[one]] = lm.generate(["def add_1(a, b):"], config)
    assert len(one.token_ids) == len(one.stats["exits"]) == 1
    long = "def " * 300
    assert len(lm.encode(long)) > lm.context_length
    with pytest.raises(ConfigError, match="leaves no room in the model's context"):
        lm.generate([long], config)


def test_a_truncated_model_is_the_fixed_exit():
    """Gates wide open at exit k: the same as a model that has no further layers at all."""
    model, ids = tiny_model(), torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))
    for k, depth in enumerate(model.config.exit_layers):
        values = model.config.to_dict() | {"num_hidden_layers": depth, "exit_layers": []}
        for name in ("layer_types", "num_exits", "compute_cost"):
            values.pop(name, None)
        short = NviumForCausalLM(type(model.config)(**values)).to(torch.float64).eval()
        state = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith(("exits.", "final_adapter.", "model.norm."))
            and not any(name.startswith(f"model.layers.{i}.") for i in range(depth, 4))
        }
        state["model.norm.weight"] = model.exits[k].norm.weight
        for part in ("down", "up"):
            state[f"final_adapter.{part}.weight"] = getattr(model.exits[k].adapter, part).weight
        short.load_state_dict(state)
        with torch.no_grad():
            wanted = short(ids).logits
            got = model(ids, output_exit_logits=True).exit_logits[:, :, k].log_softmax(-1)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
