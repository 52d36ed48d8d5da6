"""The cache owns its deferred tokens: editing, copying and saving it lose none."""

from __future__ import annotations

import pytest
import torch
from nvium_cases import tiny_model
from tenfold.errors import ComponentError, ConfigError
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.decode import PiggybackDecoder
from transformers import DynamicCache

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def started(model, prompts=PROMPTS, new=8, seeds=(0, 1, 2)):
    """A decoder, its cache with deferred tokens, and the texts so far."""
    decoder = PiggybackDecoder(model)
    done = decoder.generate(prompts, new, seeds=list(seeds))
    texts = [p + row.tokens for p, row in zip(prompts, done.rows, strict=True)]
    assert not done.cache.is_complete
    return decoder, done.cache, texts


def full_text(model, prompt, seed, new):
    return prompt + PiggybackDecoder(model).generate([prompt], new, seeds=[seed]).rows[0].tokens


def test_continuing_a_cache_equals_one_uninterrupted_run(model):
    decoder, cache, texts = started(model)
    more = decoder.generate([t[-1:] for t in texts], 10, seeds=[0, 1, 2], cache=cache)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        assert text + more.rows[row].tokens == full_text(model, prompt, row, 18)


def test_a_second_turn_merges_its_prompt_with_deferred_tokens(model):
    decoder, cache, texts = started(model)
    second = [[*t[-1:], 3, 1, 4, 1, 5] for t in texts]
    more = decoder.generate(second, 6, seeds=[7, 8, 9], cache=cache)
    for row, text in enumerate(texts):
        alone = decoder.generate([[*text, 3, 1, 4, 1, 5]], 6, seeds=[7 + row])
        assert more.rows[row].tokens == alone.rows[0].tokens


def test_two_conversations_do_not_mix(model):
    decoder = PiggybackDecoder(model)
    a, b = NviumCache(model.config), NviumCache(model.config)
    text_a, text_b = [1, 2], [9, 8, 7]
    feed_a, feed_b = list(text_a), list(text_b)
    for _ in range(6):
        new = decoder.generate([feed_a], 2, seeds=[0], cache=a).rows[0].tokens
        text_a += new
        feed_a = new[-1:]
        new = decoder.generate([feed_b], 2, seeds=[1], cache=b).rows[0].tokens
        text_b += new
        feed_b = new[-1:]
    assert text_a == full_text(model, [1, 2], 0, 12)
    assert text_b == full_text(model, [9, 8, 7], 1, 12)


def test_truncating_rolls_deferred_tokens_back(model):
    decoder, cache, texts = started(model)
    lengths = [len(t) - 4 for t in texts]
    cache.truncate(lengths)
    assert cache.lengths.tolist() == lengths
    feed = [t[n : n + 1] for t, n in zip(texts, lengths, strict=True)]
    more = decoder.generate(feed, 10, seeds=[0, 1, 2], cache=cache)
    for row, prompt in enumerate(PROMPTS):
        wanted = full_text(model, prompt, row, 18)
        n = lengths[row] + 1
        assert texts[row][:n] + more.rows[row].tokens == wanted[: n + 10]


def test_crop_takes_a_negative_number_of_tokens(model):
    _, cache, _texts = started(model)
    before = cache.lengths.tolist()
    cache.crop(-2)
    assert cache.lengths.tolist() == [n - 2 for n in before]
    cache.crop(0)
    assert cache.lengths.tolist() == [n - 2 for n in before]
    with pytest.raises(ConfigError, match="give minus the number"):
        cache.crop(3)


def test_selecting_and_repeating_rows_carries_deferred_tokens(model):
    decoder, cache, texts = started(model)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1]))
    order = [0, 2, 2]
    more = decoder.generate([texts[r][-1:] for r in order], 10, seeds=order, cache=cache)
    for row, r in enumerate(order):
        assert texts[r] + more.rows[row].tokens == full_text(model, PROMPTS[r], r, 18)


def test_a_boolean_mask_selects_rows(model):
    _, cache, _ = started(model)
    wanted = cache.lengths[1]
    cache.batch_select_indices(torch.tensor([False, True, False]))
    assert cache.lengths.tolist() == [wanted]


def test_saving_and_loading_keeps_everything(model, tmp_path):
    decoder, cache, texts = started(model)
    cache.save(tmp_path / "cache.safetensors")
    loaded = NviumCache.load(tmp_path / "cache.safetensors", model.config)
    for one in (loaded, cache.fork()):
        more = decoder.generate([t[-1:] for t in texts], 10, seeds=[0, 1, 2], cache=one)
        for row, prompt in enumerate(PROMPTS):
            assert texts[row] + more.rows[row].tokens == full_text(model, prompt, row, 18)


def test_a_fork_is_independent(model):
    decoder, cache, texts = started(model)
    twin = cache.fork()
    decoder.generate([t[-1:] for t in texts], 10, seeds=[5, 6, 7], cache=twin)
    more = decoder.generate([t[-1:] for t in texts], 10, seeds=[0, 1, 2], cache=cache)
    assert texts[0] + more.rows[0].tokens == full_text(model, PROMPTS[0], 0, 18)


def test_flushing_completes_and_changes_nothing(model):
    decoder, cache, texts = started(model)
    cache.flush(model, [1])
    assert cache.deferred()[1] == 0
    cache.flush(model)
    assert cache.is_complete
    more = decoder.generate([t[-1:] for t in texts], 10, seeds=[0, 1, 2], cache=cache)
    for row, prompt in enumerate(PROMPTS):
        assert texts[row] + more.rows[row].tokens == full_text(model, prompt, row, 18)


def test_padded_columns_are_not_stored_and_crop_counts_columns(model):
    tokens = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = NviumCache(model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    assert cache.lengths.tolist() == [2, 4]
    assert cache.get_seq_length() == 4
    cache.crop(-3)
    assert cache.lengths.tolist() == [0, 1]
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_forward_equals_plain_forward_under_padding(model, side):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(23, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, : 3 if side == "left" else 0] = 0
    if side == "right":
        mask[0, 4:] = 0
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask).logits
    cached = model(tokens, attention_mask=mask, past_key_values=NviumCache(model.config)).logits
    torch.testing.assert_close(cached[mask.bool()], plain[mask.bool()], rtol=0, atol=1e-12)


def test_a_dynamic_cache_runs_at_full_depth_with_the_same_logits(model):
    tokens = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, cache = model(tokens).logits, DynamicCache()
        parts = [
            model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 4), (4, 5), (5, 9))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), plain, rtol=0, atol=1e-12)


def test_a_cache_of_another_model_or_batch_is_refused(model):
    _, cache, _ = started(model)
    other = tiny_model(exit_layers=[2])
    with pytest.raises(ConfigError, match="belongs to another model"):
        other(torch.tensor([[1]] * 3), past_key_values=cache)
    with pytest.raises(ConfigError, match="holds 3 rows, but 2"):
        model(torch.tensor([[1]] * 2), past_key_values=cache)
    with pytest.raises(ComponentError, match="own segments only"):
        cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
