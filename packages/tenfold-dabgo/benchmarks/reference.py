"""Two small models with corpus, queries and a way to retrain them, for the quality benchmark.

*tiny*: topics written by bigram tables and a GPT-2 of 62,784 parameters. *stdlib*: functions of
sixteen modules of the standard library and a Llama of 140 thousand. Both have 32 queries that the
model wrote itself and 32 held-out ones. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tenfold.builtin.python_stdlib import PythonStdlib
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import GenerationConfig
from tenfold_dabgo.baselines.bm25 import words
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.retrain import Recipe, Retrainer
from tenfold_dabgo.queries import Query
from tenfold_dabgo.topics import ALPHABET, topic_corpus
from tenfold_dabgo.weights import load, select_parameters
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TRAIN, HELD_OUT, PROMPT = 192, 32, 8
VOCABULARY, LENGTH = 96, 32
MODULES = (
    "argparse", "ast", "asyncio", "concurrent", "configparser", "ctypes", "datetime", "difflib",
    "email", "http", "logging", "multiprocessing", "tarfile", "tkinter", "unittest", "xml",
)  # fmt: skip
FUNCTION_LENGTH = 64


@dataclass
class Setting:
    """A trained model with its corpus and queries.

    Attributes:
        groups: `[N]` topic or module of each sample.
        split: what BM25 takes for words.
    """

    name: str
    model: CausalLM
    dataset: TokenDataset
    groups: np.ndarray
    generated: list[Query]
    held_out: list[Query]
    held_out_groups: np.ndarray
    recipe: Recipe
    split: Callable[[str], list[str]]

    @property
    def queries(self) -> list[Query]:
        """Generated ones first."""
        return [*self.generated, *self.held_out]

    def retrainer(self, folder: Path | None) -> Retrainer:
        """The harness that gives the ground truth."""
        return Retrainer(self.model, self.dataset, self.queries, self.recipe, folder)


def tiny(seed: int = 0) -> Setting:
    """The tiny reference benchmark: topic corpus, 62,784-parameter GPT-2."""
    corpus = topic_corpus(TRAIN + HELD_OUT, LENGTH, VOCABULARY, seed=seed)
    rows = [row.tolist() for row in corpus.ids]
    return _trained("tiny", tiny_gpt2(seed), rows, np.asarray(corpus.topics), list, seed)


def stdlib(seed: int = 0) -> Setting:
    """Functions of `MODULES`, fourteen each, the last two of them held out."""
    texts = [_functions(module, seed) for module in MODULES]
    tokenizer = train_bpe([text for part in texts for text in part], 512)
    per_module = TRAIN // len(MODULES)
    order = [(m, i) for m in range(len(MODULES)) for i in range(per_module)]
    order += [(m, i) for m in range(len(MODULES)) for i in range(per_module, len(texts[m]))]
    rows = [tokenizer(texts[m][i]).input_ids[:FUNCTION_LENGTH] for m, i in order]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=FUNCTION_LENGTH, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = CausalLM(LlamaForCausalLM(config), tokenizer)
    return _trained("stdlib", model, rows, np.array([m for m, _ in order]), words, seed)


def _functions(module: str, seed: int) -> list[str]:
    """Functions of a module, long enough to fill their sample."""
    count = (TRAIN + HELD_OUT) // len(MODULES)
    data = PythonStdlib(
        "function", packages=[module], min_chars=400, split="all", limit=count, shuffle_seed=seed
    )
    found = [record.text for record in data.load()]
    assert len(found) == count, f"{module} has {len(found)} such functions"
    return found


def _trained(
    name: str,
    model: CausalLM,
    rows: Sequence[list[int]],
    groups: np.ndarray,
    split: Callable[[str], list[str]],
    seed: int,
) -> Setting:
    """Trains on the first rows, and makes queries: continuations of training prefixes, and the
    held-out rows."""
    columns = [{"group": str(g)} for g in groups[:TRAIN]]
    dataset = TokenDataset.from_ids(rows[:TRAIN], metadata=columns)
    recipe = Recipe()
    params = select_parameters(model.module())
    load(params, Retrainer(model, dataset, [], recipe).train(np.arange(TRAIN)))
    length = max(map(len, rows))
    prefixes = [row[:PROMPT] for row in rows[: TRAIN : TRAIN // HELD_OUT]]
    config = GenerationConfig(max_new_tokens=length - PROMPT, temperature=1.0, seed=seed)
    texts = model.generate(prefixes, config)
    generated = [
        Query(f"generated-{i}", tuple(p), tuple(t[0].token_ids))
        for i, (p, t) in enumerate(zip(prefixes, texts, strict=True))
    ]
    held_out = [
        Query(f"held-out-{i}", tuple(r[:PROMPT]), tuple(r[PROMPT:]))
        for i, r in enumerate(rows[TRAIN:])
    ]
    return Setting(
        name, model, dataset, groups[:TRAIN], generated, held_out, groups[TRAIN:], recipe, split
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th character of the topic corpus' alphabet."""
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
