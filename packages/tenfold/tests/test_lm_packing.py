"""Packed rows hold the documents in order, at one length."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tenfold.errors import ConfigError
from tenfold.lm.packing import pack_tokens

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import TEXTS, tokenizer


def test_rows_are_the_documents_joined_by_end_tokens():
    encode = tokenizer()
    stream = [t for text in TEXTS for t in (*encode(text)["input_ids"], encode.eos_token_id)]
    rows = pack_tokens(iter(TEXTS), encode, 16)
    assert len(rows) == len(stream) // 16
    assert rows.tokens.flatten().tolist() == stream[: len(rows) * 16]
    assert torch.equal(rows[1]["input_ids"], rows[1]["labels"])
    assert rows[1]["input_ids"].dtype == torch.int64


def test_equal_texts_give_equal_rows_and_others_another_fingerprint():
    encode = tokenizer()
    first, again = pack_tokens(TEXTS, encode, 16), pack_tokens(TEXTS, encode, 16)
    assert first.fingerprint() == again.fingerprint()
    assert pack_tokens(TEXTS[::-1], encode, 16).fingerprint() != first.fingerprint()
    assert pack_tokens(TEXTS, encode, 8).fingerprint() != first.fingerprint()


def test_held_out_rows_are_a_partition_chosen_by_seed():
    rows = pack_tokens(TEXTS * 3, tokenizer(), 16)
    kept, held = rows.split(4, seed=1)
    assert (len(kept), len(held)) == (len(rows) - 4, 4)
    both = torch.cat([kept.tokens, held.tokens]).tolist()
    assert sorted(both) == sorted(rows.tokens.tolist())
    assert torch.equal(rows.split(4, seed=1)[1].tokens, held.tokens)
    assert not torch.equal(rows.split(4, seed=2)[1].tokens, held.tokens)
    with pytest.raises(ConfigError, match="cannot hold out"):
        rows.split(len(rows))


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [(["a"], 64, "less than one row of 64"), ([], 8, "0 tokens"), (["a"], 1, "at least 2")],
)
def test_too_little_text_is_explained(texts, length, message):
    with pytest.raises(ConfigError, match=message):
        pack_tokens(texts, tokenizer(), length)
