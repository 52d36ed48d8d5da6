"""Scores, losses, hidden states, snapshots and fingerprints of `CausalLM`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from tenfold.capabilities import CAPABILITIES, TokenBatch, supports
from tenfold.errors import ConfigError
from tenfold.lm.batching import pad_batch, scored_positions
from tenfold.lm.model import CausalLM

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import CONTEXT, KINDS, TEXTS, causal_lm, network, tokenizer

ALL = (*KINDS, "gemma2")
"""Gemma 2 caps its logits after the head, so that its loss cannot be made from hidden states."""


@pytest.fixture(scope="module")
def model():
    return causal_lm()


def batch_of(model, side="right"):
    return pad_batch([model.encode(text)[:40] for text in TEXTS], model.pad_id, side=side)


def test_it_has_every_capability_of_its_description(model):
    from tenfold.builtin.describe_lm import MODELS

    for name in MODELS[0].provides:
        assert supports(model, name), CAPABILITIES[name].members


@pytest.mark.parametrize("kind", ALL)
def test_token_loss_is_the_cross_entropy_of_the_logits(kind):
    model = causal_lm(kind)
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)[:40]])
        losses = model.token_loss(pad_batch(ids.tolist(), 0))
        logits = model.model(input_ids=ids).logits
        expected = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
        torch.testing.assert_close(losses[0, 1:], expected, rtol=0, atol=1e-5)
        assert losses[0, 0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_loss(kind):
    model = causal_lm(kind)
    right, left = batch_of(model), batch_of(model, "left")
    for i, text in enumerate(TEXTS):
        alone = model.token_loss(pad_batch([model.encode(text)[:40]], 0))[0, 1:]
        for batch in (right, left):
            row = model.token_loss(batch)[i][scored_positions(batch)[i]]
            torch.testing.assert_close(row, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_the_full_loss(kind, side):
    model = causal_lm(kind)
    batch = batch_of(model, side)
    parameters = list(model.module().parameters())
    ours = torch.autograd.grad(model.token_loss(batch).sum(), parameters)
    arguments = model._inputs(batch)
    logits = model.model(**arguments).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    total = losses[scored_positions(batch)[:, 1:]].sum()
    for a, b in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_score_is_minus_the_token_loss(kind):
    model = causal_lm(kind)
    pairs = [("def add", "(a, b):"), ("", "hé"), ("x", [5, 6, 7]), ([9, 8], "z"), ("a" * 20, "")]
    for (context, continuation), scores in zip(pairs, model.score(pairs), strict=True):
        before = model.prompt_ids(context)
        target = model.encode(continuation) if isinstance(continuation, str) else continuation
        assert scores.token_ids == target
        batch = pad_batch([before + target], 0, loss_from=[len(before)])
        total = -model.token_loss(batch).sum().item()
        assert scores.total == pytest.approx(total, abs=1e-5 * max(1, len(target)))
        assert len(scores.logprobs) == len(target)


def test_scores_do_not_depend_on_batches(model):
    pairs = [(text[:10], text[10:40]) for text in TEXTS]
    together = model.score(pairs)
    for pair, scores in zip(pairs, together, strict=True):
        assert model.score([pair])[0].logprobs == pytest.approx(scores.logprobs, abs=2e-5)
    assert model.score([]) == []


def test_sequences_beyond_the_context_are_refused(model):
    with pytest.raises(ConfigError, match=f"{CONTEXT + 1} tokens does not fit .* {CONTEXT}"):
        model.score([([1] * CONTEXT, [1])])
    with pytest.raises(ConfigError, match="does not fit"):
        model.token_loss(pad_batch([[1] * (CONTEXT + 1)], 0))
    assert model.score([([1] * (CONTEXT - 1), [1])])[0].logprobs


def test_an_empty_batch_has_no_losses(model):
    empty = pad_batch([], 0)
    assert model.token_loss(empty).shape == (0, 0)
    assert model.token_loss(pad_batch([[3], [4]], 0)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_residual_stream(kind):
    model = causal_lm(kind)
    batch = batch_of(model)
    result = model.hidden_states(batch, [0, 1, 2, -1])
    assert result.layers == (0, 1, 2, 2)
    theirs = model.model(**model._inputs(batch), output_hidden_states=True).hidden_states
    real = batch.attention_mask.bool()
    for ours, other in zip(result.states[:2], theirs[:2], strict=True):
        torch.testing.assert_close(ours[real], other[real])
    # transformers' last state has the final norm applied; ours is what the norm receives.
    decoder = model.model.get_decoder()
    norm = next(
        getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, n)
    )
    torch.testing.assert_close(norm(result.states[2])[real], theirs[-1][real])
    with pytest.raises(ConfigError, match=r"layer 3 is not in -3\.\.2"):
        model.hidden_states(batch, [3])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_restore_is_bit_exact_and_in_place(kind):
    model = causal_lm(kind)
    assert (kind == "qwen2") == model.model.config.tie_word_embeddings
    before = {n: p.detach().clone() for n, p in model.module().named_parameters()}
    places = {n: p.data_ptr() for n, p in model.module().named_parameters()}
    loss = model.token_loss(batch_of(model))
    token = model.snapshot()
    with torch.no_grad():
        for parameter in model.module().parameters():
            parameter.mul_(1.1).add_(1e-3)
    assert not torch.equal(model.token_loss(batch_of(model)), loss)
    model.restore(token)
    for name, parameter in model.module().named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]
    assert torch.equal(model.token_loss(batch_of(model)), loss)
    head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (kind == "qwen2")


def test_a_snapshot_of_another_model_is_refused(model):
    with pytest.raises(ConfigError, match="belongs to another model"):
        model.restore(causal_lm("gpt2").snapshot())


def test_the_fingerprint_is_of_content_not_of_places(tmp_path):
    encode = tokenizer()

    def print_of(folder, **changes):
        network(**changes).save_pretrained(folder)
        return CausalLM(network(**changes), encode, source=folder).fingerprint()

    first = print_of(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert CausalLM(network(), encode, source=tmp_path / "b").fingerprint() == first
    assert print_of(tmp_path / "c", seed=1) != first
    assert CausalLM(network(), encode).fingerprint() == CausalLM(network(), encode).fingerprint()
    assert (
        CausalLM(network(), encode).fingerprint() != CausalLM(network(seed=1), encode).fingerprint()
    )
    half = CausalLM(network().bfloat16(), encode)
    assert half.fingerprint() != CausalLM(network(), encode).fingerprint()


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ConfigError, match="no language-model head"):
        CausalLM(network().model, tokenizer())


def test_loss_masks_are_honored(model):
    ids = model.encode(TEXTS[0])[:20]
    whole = model.token_loss(pad_batch([ids], 0))
    mask = torch.zeros(1, 20, dtype=torch.long)
    mask[0, [0, 3, 7]] = 1
    some = model.token_loss(TokenBatch(torch.tensor([ids]), torch.ones(1, 20), mask))
    assert some.nonzero()[:, 1].tolist() == [3, 7]
    torch.testing.assert_close(some[0, [3, 7]], whole[0, [3, 7]])
