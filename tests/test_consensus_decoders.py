"""Consensus agents that decode with TreeFlash: the same transcripts as without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold_byzantine.language import LanguagePolicy, LanguageSettings
from tenfold_byzantine.play import play
from tenfold_byzantine.rules import Context, GameConfig
from tenfold_treeflash.lm import Drafter, TreeDecoder

_PACKAGES = Path(__file__).parents[1] / "packages"
sys.path.insert(0, str(_PACKAGES / "tenfold-treeflash" / "tests"))
from treeflash_cases import drafter_for, llama

TEXTS = ['{"internal_strategy": "stay", "value": 7, "public_reasoning": "seven"} stop continue'] * 9
SHORT = Context(history_rounds=1, notes=1, line_chars=10, listing_chars=20, message_chars=40)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_transcripts_are_equal_with_and_without_treeflash(temperature):
    tokenizer = train_bpe(TEXTS, 300)
    network = llama(
        dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=4096
    )
    base = CausalLM(network, tokenizer)
    drafter = Drafter(drafter_for(network, dtype=torch.float32))
    settings = LanguageSettings(
        context=SHORT,
        temperature={"decide": temperature, "vote": temperature},
        max_new_tokens={"decide": 60, "vote": 30},
    )
    config = GameConfig(n_honest=2, n_byzantine=1, max_rounds=2, seed=4)
    results = []
    for model in (base, TreeDecoder(base, drafter, tree_size=9)):
        policy = LanguagePolicy(model, settings)
        results.append(play(config, honest=policy, byzantine=policy))
        assert results[-1].counters["calls"] >= 6 * results[-1].rounds
    without, tree = results
    assert (without.proposed, without.votes) == (tree.proposed, tree.votes)
    assert without.state_hash == tree.state_hash  # texts and tokens of all answers included
