"""Trained tokenizers are lossless and repeatable; pieces of tokens join to the text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import TokenizerMixin, _prefix_pieces, token_pieces, train_bpe

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import TEXTS, tokenizer


class Bare(TokenizerMixin):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def bare():
    return Bare(tokenizer())


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_every_text_survives(bare, text):
    if "<|" in text:
        return
    ids = bare.encode(text)
    assert bare.decode(ids) == text
    pieces = token_pieces(bare, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 299), max_size=20))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_ids_join_to_their_text(bare, ids):
    ids = [i % bare.vocabulary_size for i in ids]
    pieces = token_pieces(bare, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == bare.decode(ids)


def test_both_ways_to_find_pieces_agree(bare):
    for text in TEXTS:
        ids = bare.encode(text)
        assert token_pieces(bare, ids) == _prefix_pieces(bare, ids, text)


def test_a_character_belongs_to_the_token_that_completes_it(bare):
    ids = bare.encode("€")
    assert len(ids) == 3  # not learned: one token per byte
    assert token_pieces(bare, ids) == ["", "", "€"]


def test_order_of_texts_does_not_matter():
    one, other = train_bpe(TEXTS, 320), train_bpe(TEXTS[::-1], 320)
    assert Bare(one).vocabulary_hash == Bare(other).vocabulary_hash
    assert one.get_vocab() == other.get_vocab()


def test_the_hash_tells_vocabularies_apart_and_ignores_padding(bare):
    assert Bare(train_bpe(TEXTS, 280)).vocabulary_hash != bare.vocabulary_hash
    padded = tokenizer()
    padded(["a", "bcd"], padding=True)
    assert Bare(padded).vocabulary_hash == bare.vocabulary_hash


def test_a_vocabulary_holds_every_byte():
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(TEXTS, 256)
    assert len(train_bpe([], 257)) == 257


def test_chat_without_a_template_is_plain_lines(bare):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert bare.render_chat(messages) == "system: Be kind.\nuser: Hi\nassistant:"
    with pytest.raises(ConfigError, match="needs 'role' and 'content'"):
        bare.render_chat([{"role": "user"}])


def test_chat_with_a_template_is_the_templates():
    templated = tokenizer()
    templated.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert Bare(templated).render_chat([{"role": "user", "content": "Hi"}]) == "<user>Hi<assistant>"
    templated.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="no system role"):
        Bare(templated).render_chat([{"role": "system", "content": "x"}])


def test_special_tokens_before_a_text_are_found():
    from tokenizers.processors import TemplateProcessing

    begins = tokenizer()
    assert Bare(begins).prompt_prefix == []
    begins._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert Bare(begins).prompt_prefix == [0]
