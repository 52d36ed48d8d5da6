"""`generate` of transformers: same text as the full mixture, through all its features."""

from __future__ import annotations

import itertools

import pytest
import torch
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold_nvium.cache import NviumCache
from test_distribution import LENGTH, VOCAB, p_value
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

IDS = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PAD = 0


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = PAD
    return model


def run(model, ids=IDS, mask=MASK, new=12, **settings):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **settings)


def full_depth(model, ids=IDS, mask=MASK, new=12, **settings):
    return run(model, ids, mask, new, past_key_values=DynamicCache(), **settings)


def test_greedy_generate_equals_the_full_mixture_and_leaves_early(model):
    cache = NviumCache(model.config)
    got = run(model, do_sample=False, past_key_values=cache)
    assert torch.equal(got, full_depth(model, do_sample=False))
    assert torch.equal(got, run(model, do_sample=False))
    assert min(exits.min() for exits in cache.exit_history[1:]) < 3


def test_each_row_equals_its_own_run(model):
    together = run(model, do_sample=False)
    alone = run(model, IDS[:1, 2:], MASK[:1, 2:], do_sample=False)
    assert together[0, 5:].tolist() == alone[0, 3:].tolist()


def test_processors_see_the_whole_mixture(model):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    got = run(model, do_sample=False, logits_processor=processors)
    wanted = full_depth(model, do_sample=False, repetition_penalty=1.7)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, run(model, do_sample=False))


def test_sampling_draws_from_the_mixture():
    model = tiny_model(vocab_size=VOCAB, dtype=torch.float32)
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    tokens = torch.tensor([[0, *text] for text in texts])
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    total = logits.gather(-1, tokens[:, 1:, None])[..., 0].double().sum(-1).exp()
    expected = dict(zip(texts, total.tolist(), strict=True))
    torch.manual_seed(0)
    counts, cache = {}, NviumCache(model.config)
    drawn = model.generate(
        torch.zeros(6000, 1, dtype=torch.long), attention_mask=torch.ones(6000, 1).long(),
        max_new_tokens=LENGTH, do_sample=True, top_k=0, past_key_values=cache,
    )  # fmt: skip
    for row in drawn[:, 1:].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert p_value(counts, expected) > 0.001
    assert {int(e) for exits in cache.exit_history for e in exits} == {0, 1, 2, 3}


def test_a_head_policy_lets_warpers_edit_the_chosen_head(model):
    torch.manual_seed(1)
    cache = NviumCache(model.config)
    run(model, do_sample=True, top_k=3, decode_policy="fixed:1", past_key_values=cache)
    assert {int(e) for exits in cache.exit_history for e in exits} == {0}


class Recorder:
    """A streamer."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_and_stopping_criteria_work(model):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    streamer = Recorder()
    done = run(
        model, IDS[1:], MASK[1:], do_sample=False, streamer=streamer,
        stopping_criteria=StoppingCriteriaList([After()]),
    )  # fmt: skip
    assert done.shape[1] == 9
    assert streamer.tokens == done[0].tolist()
    assert streamer.ended


def test_rows_that_end_defer_nothing_more(model):
    free = run(model, do_sample=False, new=20)
    eos = int(free[0, 8])
    settings = {"eos_token_id": eos, "do_sample": False, "new": 20}
    cache = NviumCache(model.config)
    done = run(model, past_key_values=cache, **settings)
    assert torch.equal(done, full_depth(model, **settings))
    ends = [row[5:].tolist() for row in done]
    lengths = [r.index(eos) + 1 if eos in r else len(r) for r in ends]
    assert min(lengths) < max(lengths)
    # Prompt plus generated; the very last column is drawn and not read.
    columns = done.shape[1] - 1
    real = [int(m.sum()) + n for m, n in zip(MASK, lengths, strict=True)]
    assert cache.lengths.tolist() == [min(n, columns - int((m == 0).sum())) for n, m in
                                      zip(real, MASK, strict=True)]  # fmt: skip


def test_a_returned_cache_continues_a_conversation(model):
    torch.manual_seed(2)
    first = run(model, do_sample=True, top_k=0, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, NviumCache)
    assert not first.past_key_values.is_complete
    more = torch.tensor([[3, 1, 4], [1, 5, 9]])
    ids = torch.cat([first.sequences, more], -1)
    mask = torch.cat([MASK, torch.ones(2, 15, dtype=torch.long)], -1)
    second = run(model, ids, mask, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(second, full_depth(model, ids, mask, do_sample=False))


def test_beams_and_assisted_generation_run_at_full_depth(model):
    beams = run(model, num_beams=3, do_sample=False)
    wanted = full_depth(model, num_beams=3, do_sample=False)
    assert torch.equal(beams, wanted)
    assisted = run(model, IDS[1:], MASK[1:], do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted, run(model, IDS[1:], MASK[1:], do_sample=False))


def test_several_samples_per_prompt(model):
    torch.manual_seed(0)
    done = run(model, do_sample=True, num_return_sequences=3, top_k=0)
    assert done.shape == (6, 17)
    assert len({tuple(row) for row in done[:3].tolist()}) > 1


def test_what_does_not_go_together_is_one_clear_error(model):
    with pytest.raises(ConfigError, match="needs an NviumCache"):
        run(model, decode_policy="sample", past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="needs an NviumCache"):
        run(model, decode_policy="sample", use_cache=False)
    with pytest.raises(ConfigError, match="greedy search"):
        run(model, decode_policy="certified", do_sample=True)
    with pytest.raises(ConfigError, match="unknown decode policy"):
        run(model, decode_policy="early")
    with pytest.raises(ConfigError, match="left padding"):
        run(model, IDS, MASK.flip(-1), do_sample=False)
    with pytest.raises(ConfigError, match="wait forever"):
        run(model, decode_policy="sample", synced_gpus=True)


class Twice(LogitsProcessor):
    """Edits logits in place, as some processors do."""

    def __call__(self, input_ids, scores):
        return scores.mul_(2)


def test_processors_may_edit_in_place(model):
    run(model, do_sample=True, decode_policy="sample",
        logits_processor=LogitsProcessorList([Twice()]))  # fmt: skip
