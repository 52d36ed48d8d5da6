"""Rows of a batch are written as each would be alone."""

from __future__ import annotations

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash.batch_decoding import BatchDecoding
from tenfold_treeflash.decoding import METHODS, DraftSettings, SpeculativeDecoder
from tenfold_treeflash.target import Target
from transformers import MistralConfig, MistralForCausalLM
from treeflash_cases import VOCABULARY, drafted, drafter_for, llama, plain, prompt

LENGTHS = (9, 1, 14, 5)


@pytest.fixture(scope="module")
def target():
    return llama()


@pytest.fixture(scope="module")
def drafter(target):
    return drafter_for(target, block_size=8)


def padded(lengths=LENGTHS):
    """Prompts of different lengths without token 0, padded with it on the left."""
    width = max(lengths)
    ids, mask = torch.zeros((len(lengths), width), dtype=torch.int64), []
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed=row)[0].clamp(min=1)
        mask.append([0] * (width - length) + [1] * length)
    return ids, torch.tensor(mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_greedy_batch_is_transformers_batch(target, drafter, method, size):
    ids, mask = padded()
    settings = {"attention_mask": mask, "max_new_tokens": 30}
    wanted = plain(target, ids, **settings)
    found = drafted(target, ids, drafter, draft={"method": method, "tree_size": size}, **settings)
    assert found.tolist() == wanted.tolist()


def test_rows_end_at_different_times_and_are_padded(target, drafter):
    ids, mask = padded()
    free = plain(target, ids, attention_mask=mask, max_new_tokens=30)[:, ids.shape[1] :]
    ends = [int(free[0, 3]), int(free[2, 9])]
    settings = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": ends}
    wanted = plain(target, ids, **settings)
    out = drafted(
        target, ids, drafter, draft={"tree_size": 24}, return_dict_in_generate=True, **settings
    )
    assert out.sequences.tolist() == wanted.tolist()
    lengths = [stats.new_tokens for stats in out.spec_stats]
    assert len(set(lengths)) > 1
    for row, stats in enumerate(out.spec_stats):
        assert 1 + sum(stats.accepted) >= stats.new_tokens
        assert stats.prompt_tokens == LENGTHS[row]


def test_processors_see_every_rows_own_text(target, drafter):
    ids, mask = padded()
    settings = {
        "attention_mask": mask, "max_new_tokens": 25, "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
        "encoder_repetition_penalty": 1.1,
        "prefix_allowed_tokens_fn": lambda row, text: [
            (int(text[-1]) * 3 + row + i) % VOCABULARY for i in range(9)
        ],
    }  # fmt: skip
    wanted = plain(target, ids, **settings)
    found = drafted(target, ids, drafter, draft={"tree_size": 24}, **settings)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("verification", ["match", "rejection"])
def test_a_sampled_row_is_what_its_seed_gives_alone(target, drafter, verification):
    ids, mask = padded()
    settings = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 25}
    draft = {"tree_size": 24, "verification": verification}
    found = drafted(
        target, ids, drafter, draft=draft, attention_mask=mask, seeds=[3, 4, 5, 6], **settings
    )
    for row, length in enumerate(LENGTHS):
        alone = drafted(
            target, ids[row : row + 1, -length:], drafter, draft=draft, seeds=[3 + row], **settings
        )
        assert found[row, ids.shape[1] :].tolist() == alone[0, length:].tolist()
        if verification == "match":
            wanted = plain(target, ids[row : row + 1, -length:], seed=3 + row, **settings)
            assert alone.tolist() == wanted.tolist()


def test_several_samples_of_a_prompt_are_a_batch(target, drafter):
    settings = {"do_sample": True, "num_return_sequences": 5, "max_new_tokens": 12}
    first = drafted(target, prompt(), drafter, seed=1, **settings)
    assert first.shape == (5, 21)
    assert len({tuple(row) for row in first.tolist()}) > 1
    assert first.tolist() == drafted(target, prompt(), drafter, seed=1, **settings).tolist()
    assert first.tolist() != drafted(target, prompt(), drafter, seed=2, **settings).tolist()


def test_scores_and_logits_of_a_batch_are_transformers(target, drafter):
    ids, mask = padded()
    settings = {
        "attention_mask": mask, "max_new_tokens": 12, "repetition_penalty": 1.2,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    wanted, found = plain(target, ids, **settings), drafted(target, ids, drafter, **settings)
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert len(ours) == len(theirs) == 12
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Rule:
    greedy = True

    def __init__(self, length):
        self._length = length

    def choose(self, ids, logits):
        return int(logits.argmax())

    def ends(self, ids):
        return len(ids) >= self._length


@pytest.mark.parametrize("windowed", [False, True])
def test_each_rows_caches_are_those_of_a_fresh_start(drafter, windowed):
    model = llama()
    if windowed:
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=6, initializer_range=0.3,
        )  # fmt: skip
        model = MistralForCausalLM(config).double().eval()
    wrapped = Target(model)
    decoder = SpeculativeDecoder(wrapped, drafter, DraftSettings(tree_size=32))
    prompts = [prompt(n, seed=n)[0].tolist() for n in LENGTHS]
    rules = [Rule(20 + 7 * row) for row in range(4)]
    with torch.inference_mode(), wrapped.features(drafter.config.target_layer_ids) as features:
        state = BatchDecoding(decoder, prompts, rules, features)
        state.begin()
        while state.ids:
            for row, (text, length) in enumerate(zip(state.ids, state.lengths, strict=True)):
                assert length == len(text) - 1
                fresh = wrapped.new_cache()
                wrapped.prefill(torch.tensor(text[:-1]), fresh)
                for ours, alone in zip(state._cache.stores, fresh.stores, strict=True):
                    for name in ("keys", "values"):
                        torch.testing.assert_close(
                            getattr(ours, name)[row, :, :length],
                            getattr(alone, name)[0, :, :length], atol=1e-6, rtol=1e-6,
                        )  # fmt: skip
                wanted = drafter.model.context(features(), torch.arange(length)[None])
                for (k, v), (a, b) in zip(state._context.pairs(), wanted, strict=True):
                    torch.testing.assert_close(k[row, :, :length], a[0], atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(v[row, :, :length], b[0], atol=1e-5, rtol=1e-5)
            state.round()
    assert [len(text) for text in state._texts] >= [20, 27, 34, 41]


def test_a_mask_with_holes_hides_what_it_hides_from_the_target(target, drafter):
    ids = prompt(12).clamp(min=1)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 25, "repetition_penalty": 1.2}
    assert (
        drafted(target, ids, drafter, **settings).tolist()
        == plain(target, ids, **settings).tolist()
    )


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_do_not_turn_each_others_rotary_embedding(kind):
    rope = {
        "rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0, 1.0],
        "long_factor": [3.0, 7.0], "original_max_position_embeddings": 24,
    }  # fmt: skip
    target = llama(rope_parameters=rope, max_position_embeddings=24 if kind == "dynamic" else 96)
    drafter = drafter_for(target, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ids, mask = padded((20, 3, 9))
    found = drafted(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
    for row, length in enumerate((20, 3, 9)):
        alone = plain(target, ids[row : row + 1, -length:], max_new_tokens=20)
        assert found[row, 20:].tolist() == alone[0, length:].tolist()


def test_batches_that_make_no_sense_are_named(target, drafter):
    ids, mask = padded()
    with pytest.raises(ConfigError, match="row 0 hides the last token"):
        drafted(target, ids, drafter, attention_mask=mask.flip(1), max_new_tokens=3)
    with pytest.raises(ConfigError, match="seeds holds 2 numbers; there are 4 rows"):
        drafted(
            target,
            ids,
            drafter,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=True,
            seeds=[1, 2],
        )
