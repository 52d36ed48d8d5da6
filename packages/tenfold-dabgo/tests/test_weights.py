"""Selecting weights, borrowing them, and giving them back."""

from __future__ import annotations

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.weights import borrowed, fingerprint, select_parameters


def test_tied_weights_appear_once(make):
    names = list(select_parameters(make.gpt2().module()))
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_selections_by_name(make):
    module = make.llama().module()
    every = set(select_parameters(module))
    assert all("self_attn" in n for n in select_parameters(module, "attention"))
    assert all("mlp" in n for n in select_parameters(module, "mlp"))
    assert {n.split(".")[-2] for n in select_parameters(module, "kv")} == {"k_proj", "v_proj"}
    assert every - set(select_parameters(module, "no-embeddings")) == {"model.embed_tokens.weight"}
    assert all(".1." in n for n in select_parameters(module, "last-1-layers"))
    assert set(select_parameters(module, r"re:norm\.weight$")) == {n for n in every if "norm" in n}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("heads", "is unknown"),
        ("lora", "selects none"),
        ("re:zzz", "selects none"),
        ("re:(", "not a regular expression"),
    ],
)
def test_selections_that_fit_nothing_are_refused(make, which, message):
    with pytest.raises(ConfigError, match=message):
        select_parameters(make.gpt2().module(), which)


def test_borrowed_weights_come_back_bit_identical(make):
    model = make.gpt2()
    before, bits = fingerprint(model), model.model.lm_head.weight.clone()

    def changes_and_fails():
        with borrowed(model) as params:
            for p in params.values():
                p.data.add_(torch.randn_like(p))
            assert fingerprint(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        changes_and_fails()
    assert fingerprint(model) == before
    assert torch.equal(model.model.lm_head.weight, bits)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight


def test_a_model_may_name_itself(make):
    model = make.gpt2()
    model.fingerprint = lambda: "checkpoint-7"
    assert fingerprint(model) == "checkpoint-7"
