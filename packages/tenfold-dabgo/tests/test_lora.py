"""Which weights move: selections on three architectures, and models with adapters."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import spearman
from tenfold_dabgo.weights import borrowed, fingerprint, select_parameters
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "support"))
QUERY = Query("q", (3, 4), (5, 6, 7, 8))


def neox():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


SELECTED = {
    "gpt2": {
        "attention": r"\.attn\.c_(attn|proj)\.",
        "mlp": r"\.mlp\.c_(fc|proj)\.",
        "kv": r"\.c_attn\.",
        "no-embeddings": r"^transformer\.(h|ln_f)\.",
        "last-1-layers": r"\.h\.1\.",
        "last-2-layers": r"\.h\.[01]\.",
        "last-9-layers": r"\.h\.[01]\.",
        "re:ln_1": r"\.ln_1\.",
        "all": r"",
    },
    "llama": {
        "attention": r"\.self_attn\.[qkvo]_proj\.",
        "mlp": r"\.mlp\.(gate|up|down)_proj\.",
        "kv": r"\.[kv]_proj\.",
        "no-embeddings": r"^(?!model\.embed_tokens)",
        "last-1-layers": r"\.layers\.1\.",
        "all": r"",
    },
    "neox": {
        "attention": r"\.attention\.(query_key_value|dense)\.",
        "mlp": r"\.mlp\.dense_",
        "kv": r"\.query_key_value\.",
        "no-embeddings": r"^(?!gpt_neox\.embed_in)",
        "last-1-layers": r"\.layers\.1\.",
        "all": r"",
    },
}


@pytest.mark.parametrize(
    ("kind", "which"), [(kind, which) for kind, rows in SELECTED.items() for which in rows]
)
def test_a_selection_takes_exactly_its_weights(make, kind, which):
    model = {"gpt2": lambda: make.gpt2().module(), "llama": lambda: make.llama().module(),
             "neox": neox}[kind]()  # fmt: skip
    pattern = re.compile(SELECTED[kind][which])
    expected = {name for name, _ in model.named_parameters() if pattern.search(name)}
    assert expected
    assert set(select_parameters(model, which)) == expected


# --- Adapters ---------------------------------------------------------------------------------


def adapted(make, *, merge=False, seed=0, **config):
    """A tiny GPT-2 with a trained-looking adapter (B is not zero)."""
    peft = pytest.importorskip("peft")
    model = make.gpt2()
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": False, **config}
    wrapped = peft.get_peft_model(model.model, peft.LoraConfig(**config)).eval()
    model.model = wrapped.merge_and_unload() if merge else wrapped.base_model.model
    return model


@pytest.fixture
def model(make):
    return adapted(make)


def attribute(model, dataset, **settings):
    perturbation = Perturbation(**{"params": "lora", **settings})
    fisher = estimate_fisher(model, dataset, params=perturbation.params)
    attributor = BidirectionalAttributor(model, dataset, fisher, perturbation, token_top=2)
    return attributor, attributor.score(QUERY)


def test_only_the_adapter_moves_and_the_base_stays_untouched(make, model):
    dataset = make.corpus(12)
    base = {n: p.clone() for n, p in model.module().named_parameters() if "lora_" not in n}
    before = fingerprint(model)
    attributor, result = attribute(model, dataset)
    moved = attributor.perturb(QUERY)
    assert moved.ascent
    assert all("lora_" in name for name in moved.ascent)
    with borrowed(model, "lora") as params:
        assert all(
            (moved.ascent[n] != p).any() and (moved.descent[n] != p).any()
            for n, p in params.items()
        )
    assert all(torch.equal(p, base[n]) for n, p in model.module().named_parameters() if n in base)
    assert fingerprint(model) == before
    assert np.isfinite(result.values).all()
    assert (
        result.details["trace"]["ascent"][-1]["loss"] > result.details["trace"]["ascent"][0]["loss"]
    )


def test_adapter_scores_are_the_influence_through_the_adapter(make):
    """Small steps: s = 2 eta K <g_i, Pi g_x> with explicit gradients of the adapter alone."""
    from tenfold_dabgo.batches import sample_means, token_batch

    model = adapted(make)
    model.model.double()
    dataset = make.corpus(8)
    fisher = estimate_fisher(model, dataset, params="lora")
    settings = Perturbation(params="lora", steps=1, lr=1e-5, damping=1e-3, dataset_size=1)
    result = BidirectionalAttributor(model, dataset, fisher, settings).score(QUERY)
    with borrowed(model, "lora") as params:
        names, leaves = list(params), list(params.values())
        batch = QUERY.batch()
        query = torch.autograd.grad(sample_means(model.token_loss(batch), batch)[0], leaves)
        expected = []
        for i in range(len(dataset)):
            batch = token_batch(dataset, [i], 0)
            own = torch.autograd.grad(sample_means(model.token_loss(batch), batch)[0], leaves)
            parts = zip(names, own, query, strict=True)
            total = sum((g * q / (fisher.values[n] + 1e-3)).sum() for n, g, q in parts)
            expected.append(2e-5 * float(total))
    np.testing.assert_allclose(result.values, expected, rtol=1e-3)


def test_merged_adapters_give_the_scores_of_a_plain_model(make):
    """A merged adapter is a change of the weights, nothing else."""
    merged, apart = adapted(make, merge=True), adapted(make)
    dataset = make.corpus(12)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(merged.model(ids).logits, apart.model(ids).logits)
    plain = make.gpt2()
    plain.model.load_state_dict(merged.model.state_dict())
    _, ours = attribute(merged, dataset, params="all")
    _, theirs = attribute(plain, dataset, params="all")
    np.testing.assert_array_equal(ours.values, theirs.values)
    _, restricted = attribute(apart, dataset)
    assert spearman(restricted.values, ours.values) < 0.999  # another set of weights moved


@pytest.mark.parametrize(
    "which", ["all", "attention", "mlp", "kv", "no-embeddings", "last-1-layers"]
)
def test_an_adapter_and_a_request_for_full_weights_contradict_each_other(model, which):
    with pytest.raises(ConfigError, match=r"carries an adapter of 4 weights") as told:
        select_parameters(model.module(), which)
    assert 'params = "lora"' in str(told.value)
    assert "merge_adapter = true" in str(told.value)


def test_a_pattern_may_choose_base_weights_all_the_same(model):
    chosen = select_parameters(model.module(), r"re:mlp\.c_fc")
    assert chosen
    assert not any("lora_" in name for name in chosen)
    layer = select_parameters(model.module(), r"re:\.1\..*lora_")
    assert len(layer) == 2


def test_dora_and_dropout_adapters_work_too(make):
    model = adapted(make, use_dora=True, lora_dropout=0.5)
    names = list(select_parameters(model.module(), "lora"))
    assert any("magnitude" in name for name in names)
    dataset = make.corpus(8)
    _, first = attribute(model, dataset)
    _, second = attribute(model, dataset)
    np.testing.assert_array_equal(first.values, second.values)  # no dropout in eval mode


def test_the_host_loads_an_adapter_beside_the_weights(make, tmp_path):
    import tiny_checkpoint
    from tenfold.builtin.hf import load

    peft = pytest.importorskip("peft")
    tiny_checkpoint.write(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    peft.get_peft_model(tiny_checkpoint.model(), config).save_pretrained(tmp_path / "adapter")
    dataset = make.corpus(8, vocabulary=30)
    apart = load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), merge_adapter=False)
    merged = load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    _, result = attribute(apart, dataset)
    assert np.isfinite(result.values).all()
    with pytest.raises(ConfigError, match="carries an adapter"):
        attribute(apart, dataset, params="all")
    with pytest.raises(ConfigError, match="the model has no adapter"):
        attribute(merged, dataset)
