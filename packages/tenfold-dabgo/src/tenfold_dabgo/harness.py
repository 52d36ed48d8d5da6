"""`dabgo:harness`: a small model trained exactly as the retraining metrics train theirs.

Whole samples, no packing, the harness's own recipe: a model retrained on everything with equal
seeds is then the same model, and differences come from what was removed alone. One token per
character, GPT-2 architecture, no dropout.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.lm.model import CausalLM
from tenfold.records import Checkpoint, Metric, TextRecord
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.retrain import Retrainer
from tenfold_dabgo.evaluation.retraining import RetrainingSettings
from tenfold_dabgo.topics import ALPHABET
from tenfold_dabgo.weights import load, select_parameters


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Token i < 96 is the i-th character of `topics.ALPHABET`; other characters of the texts
    follow in their order."""
    others = sorted(set().union(*map(set, texts)) - set(ALPHABET))
    vocabulary = {character: i for i, character in enumerate([*ALPHABET, *others])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class HarnessTrainer:
    """Trains a GPT-2 over characters from scratch.

    Args:
        dataset: text records.
        context_length: longest sample, in characters; longer texts are cut into windows.
        layers, hidden_size, heads: shape.
        seed: of initialization and order.
        recipe: `train_...` parameters of `dabgo:retraining`.

    Raises:
        ConfigError: heads that do not divide the width, or a recipe that makes no sense.
    """

    def __init__(
        self,
        dataset: Dataset,
        context_length: int = 32,
        layers: int = 2,
        hidden_size: int = 48,
        heads: int = 4,
        seed: int | None = None,
        **recipe: Any,
    ) -> None:
        if hidden_size % heads:
            raise ConfigError(f"hidden_size {hidden_size} cannot be divided into {heads} heads")
        self.dataset = dataset
        self.context_length = context_length
        self.shape: dict[str, Any] = {"n_layer": layers, "n_embd": hidden_size, "n_head": heads}
        self.seed = seed
        self.recipe = RetrainingSettings(**recipe)

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"`.

        Raises:
            ConfigError: a model role, no text, or records that are no texts.
        """
        if model is not None:
            raise ConfigError("dabgo:harness trains from scratch; leave the model role out")
        if ctx.device == "cpu":
            # Accelerate imports DeepSpeed wherever it is installed, and that looks for a GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        seed = ctx.seed if self.seed is None else self.seed
        records = [r for r in self.dataset.load() if isinstance(r, TextRecord)]
        if not records:
            raise ConfigError("dabgo:harness needs text records to learn from")
        lm = self._model(character_tokenizer(r.text for r in records))
        samples = TokenDataset.from_records(records, lm, window=self.context_length)
        recipe = self.recipe.recipe(int(samples.scorable.sum()))
        trainer = Retrainer(lm, samples, [], recipe)
        with ctx.progress("training", None, "steps") as bar:
            weights = trainer.train(np.arange(len(samples)), seed, seed)
            bar.advance(recipe.steps)
        network: Any = lm.module()
        load(select_parameters(network), weights)
        target = Path(ctx.work_dir) / "checkpoint"
        partial = target.with_name(".checkpoint.partial")
        shutil.rmtree(partial, ignore_errors=True)
        network.save_pretrained(partial)
        lm.tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        size = sum(p.numel() for p in network.parameters())
        return Checkpoint(
            target, [Metric("parameters", size, 1), Metric("steps", recipe.steps, recipe.steps)]
        )

    def _model(self, tokenizer: PreTrainedTokenizerFast) -> CausalLM:
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=self.context_length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            **self.shape,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CausalLM(GPT2LMHeadModel(config), tokenizer)
