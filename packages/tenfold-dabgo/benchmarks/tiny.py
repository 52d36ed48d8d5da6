"""The tiny reference benchmark: topic corpus, 62,784-parameter GPT-2, queries, ground truth.

Shared by the quality benchmark and the slow tests. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tenfold.lm.model import CausalLM
from tenfold.records import GenerationConfig
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.retrain import Recipe, Retrainer
from tenfold_dabgo.queries import Query
from tenfold_dabgo.topics import ALPHABET, topic_corpus
from tenfold_dabgo.weights import load, select_parameters
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY, LENGTH, TRAIN, HELD_OUT, PROMPT = 96, 32, 192, 16, 8


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th character of the corpus' alphabet."""
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def tiny_gpt2(seed: int = 0, layers: int = 2, width: int = 48) -> CausalLM:
    """Two layers, width 48, four heads, no dropout: 62,784 parameters."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_layer=layers,
        n_embd=width,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return CausalLM(GPT2LMHeadModel(config), character_tokenizer())


@dataclass
class Setting:
    """A trained model with its corpus and queries."""

    model: CausalLM
    dataset: TokenDataset
    topics: np.ndarray
    generated: list[Query]
    held_out: list[Query]
    held_out_topics: np.ndarray
    recipe: Recipe

    @property
    def queries(self) -> list[Query]:
        """Generated ones first."""
        return [*self.generated, *self.held_out]

    def retrainer(self, folder: Path | None) -> Retrainer:
        """The harness that gives the ground truth."""
        return Retrainer(self.model, self.dataset, self.queries, self.recipe, folder)


def prepare(seed: int = 0) -> Setting:
    """Trains the model and makes 16 generated and 16 held-out queries."""
    corpus = topic_corpus(TRAIN + HELD_OUT, LENGTH, VOCABULARY, seed=seed)
    columns = [{"topic": f"topic-{t}"} for t in corpus.topics[:TRAIN]]
    dataset = TokenDataset.from_ids(list(corpus.ids[:TRAIN]), metadata=columns)
    model = tiny_gpt2(seed)
    recipe = Recipe()
    params = select_parameters(model.module())
    load(params, Retrainer(model, dataset, [], recipe).train(np.arange(TRAIN)))
    prefixes = [corpus.ids[i, :PROMPT].tolist() for i in range(HELD_OUT)]
    config = GenerationConfig(max_new_tokens=LENGTH - PROMPT, temperature=1.0, seed=seed)
    texts = model.generate(prefixes, config)
    generated = [
        Query(f"generated-{i}", tuple(p), tuple(t[0].token_ids))
        for i, (p, t) in enumerate(zip(prefixes, texts, strict=True))
    ]
    rows = corpus.ids[TRAIN:].tolist()
    held_out = [
        Query(f"held-out-{i}", tuple(r[:PROMPT]), tuple(r[PROMPT:])) for i, r in enumerate(rows)
    ]
    return Setting(
        model, dataset, corpus.topics[:TRAIN], generated, held_out, corpus.topics[TRAIN:], recipe
    )
