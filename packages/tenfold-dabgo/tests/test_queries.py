"""Queries: ids stay apart, only the completion is scored, misfits are explained."""

from __future__ import annotations

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.records import AudioRecord, PromptRecord, SampleRecord, TextRecord
from tenfold_dabgo.queries import Query, query_from_record


def test_the_first_generated_token_is_scored_and_the_prompt_is_not(make):
    """L_x is the mean over completion tokens; token m is predicted from position m - 1."""
    model = make.gpt2(dtype=torch.float64)
    query = Query("q", (3, 4, 5), (6, 7))
    batch = query.batch()
    assert batch.loss_mask is not None
    assert batch.loss_mask.tolist() == [[0, 0, 0, 1, 1]]
    loss = model.token_loss(batch)
    logits = model.model(input_ids=batch.input_ids).logits.log_softmax(-1)
    torch.testing.assert_close(loss[0, 3], -logits[0, 2, 6])
    torch.testing.assert_close(loss[0, 4], -logits[0, 3, 7])
    assert loss[0, :3].tolist() == [0, 0, 0]


def test_samples_keep_the_ids_they_were_generated_with(make):
    record = SampleRecord(
        id="s",
        prompt="ab",
        completion="cd",
        prompt_ids=[9, 9, 9],
        completion_ids=[8],
        stats={"x": 1},
    )
    query = query_from_record(record, make.gpt2())
    assert (query.prompt_ids, query.completion_ids) == ((9, 9, 9), (8,))
    assert query.stats == {"x": 1}


def test_without_ids_prompt_and_completion_are_encoded_separately(make):
    model = make.gpt2()
    query = query_from_record(SampleRecord(id="s", prompt="ab", completion="cd"), model)
    assert query.prompt_ids == tuple(model.encode("ab"))
    assert query.completion_ids == tuple(model.encode("cd"))
    chat = query_from_record(
        SampleRecord(id="s", prompt=[{"role": "user", "content": "hi"}], completion="cd"), model
    )
    assert chat.prompt_ids == tuple(model.encode("user: hi\n"))


def test_texts_and_prompts_with_reference_are_queries_too(make):
    model = make.gpt2()
    text = query_from_record(TextRecord(id="t", text="abc"), model)
    assert text.prompt_ids == ()
    assert text.scored == (1, 3)
    prompt = query_from_record(PromptRecord(id="p", prompt="ab", reference="c"), model)
    assert prompt.completion_ids == tuple(model.encode("c"))
    with pytest.raises(ConfigError, match="prompt without a reference"):
        query_from_record(PromptRecord(id="p", prompt="ab"), model)
    with pytest.raises(ConfigError, match="queries are sample, text or prompt"):
        query_from_record(AudioRecord(id="a", path="x", sample_rate=1), model)


def test_a_span_scores_only_its_part_of_the_completion():
    query = Query("q", (1, 2), (3, 4, 5, 6), span=(1, 3)).check(10, 32)
    mask = query.batch().loss_mask
    assert mask is not None
    assert mask.tolist() == [[0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("q", (1, 2), ()), "empty completion"),
        (Query("q", (), (1,)), "one token and no prompt"),
        (Query("q", (1,), (99,)), "token id 99.*48 entries"),
        (Query("q", (1,) * 30, (2,) * 5), r"35 tokens \(prompt 30, completion 5\).*at most 32"),
        (Query("q", (1,), (2, 3), span=(1, 5)), r"span \[1, 5\]"),
        (Query("q", (1,), (2, 3), span=(1, 1)), "span"),
    ],
)
def test_queries_that_cannot_be_scored_are_refused(query, message):
    with pytest.raises(ConfigError, match=message):
        query.check(48, 32)


def test_truncation_cuts_the_prompt_first_and_says_what_was_cut():
    query = Query("q", tuple(range(30)), (40, 41, 42)).truncated(10)
    assert query.prompt_ids == tuple(range(23, 30))
    assert query.completion_ids == (40, 41, 42)
    assert query.notes == ("cut to the model's context of 10: 23 prompt tokens",)
    both = Query("q", (1, 2, 3), tuple(range(20))).truncated(8)
    assert both.prompt_ids == (3,)
    assert both.completion_ids == tuple(range(7))
    assert "the last 13 completion tokens" in both.notes[0]
    assert Query("q", (1,), (2,)).truncated(8).notes == ()
