"""Adapters: capabilities made from others equal the model's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tenfold.adapters import ADAPTERS, generate_from_step, score_from_loss
from tenfold.build import load_target
from tenfold.capabilities import CAPABILITIES, Delegate, supports
from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import KINDS, causal_lm

PROMPTS = ["def add(a, b):", "hé", "", "for i in range(10):\n    print"]
TOKENIZE = CAPABILITIES["tokenize"].members


class Only(Delegate):
    """Shows the base's `tokenize` capability and nothing but the named members."""

    def __init__(self, base, *members):
        super().__init__(base)
        object.__setattr__(self, "shown", (*members, *TOKENIZE))

    def __getattr__(self, name):
        if name not in object.__getattribute__(self, "shown"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "base"), name)


@pytest.mark.parametrize("kind", KINDS)
def test_score_from_loss_is_the_models_own_score(kind):
    model = causal_lm(kind)
    adapted = score_from_loss(Only(model, "token_loss"))
    pairs = [("def", " add"), ("", "hé"), ([5, 6], [7, 8]), ("x", "")]
    for ours, own in zip(adapted.score(pairs), model.score(pairs), strict=True):
        assert ours.token_ids == own.token_ids
        assert ours.logprobs == pytest.approx(own.logprobs, abs=1e-5)
    assert adapted.score([]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(max_new_tokens=10, stop=("re",)),
        GenerationConfig(max_new_tokens=10, temperature=0.9, top_p=0.9, top_k=30, n=3, seed=2),
    ],
    ids=["greedy", "sampled"],
)
def test_generate_from_step_is_the_models_own_text(kind, config):
    model = causal_lm(kind)
    adapted = generate_from_step(Only(model, "start"))
    assert adapted.generate(PROMPTS, config) == model.generate(PROMPTS, config)
    assert [adapted.generate([p], config)[0] for p in PROMPTS] == adapted.generate(PROMPTS, config)
    assert adapted.generate([], config) == []


def test_logprobs_come_along():
    model = causal_lm()
    config = GenerationConfig(max_new_tokens=5, logprobs=1)
    [[ours]] = generate_from_step(Only(model, "start")).generate(["def"], config)
    [[own]] = model.generate(["def"], config)
    assert ours.logprobs == pytest.approx(own.logprobs, abs=1e-4)


def test_a_constraint_is_refused():
    adapted = generate_from_step(Only(causal_lm(), "start"))
    assert not supports(adapted, "constrain")
    with pytest.raises(ConfigError, match="cannot follow a constraint"):
        adapted.generate(["def"], GenerationConfig(constraint={"choice": ["a"]}))


def test_adapted_models_keep_what_they_had():
    model = causal_lm()
    adapted = score_from_loss(generate_from_step(model))
    for capability in ("generate", "score", "grad", "hidden", "tokenize", "step"):
        assert supports(adapted, capability)
    assert adapted.module() is model.module()


def test_the_table_names_what_exists():
    for capability, (needs, target) in ADAPTERS.items():
        assert {capability, *needs} <= set(CAPABILITIES)
        assert callable(load_target(target, "the adapter"))


def test_the_table_imports_nothing_heavy():
    code = "import sys, tenfold.adapters; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
