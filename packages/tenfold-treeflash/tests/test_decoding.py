"""Decoding in trees writes what the target alone writes, whatever the tree and the rule."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash import decoding
from tenfold_treeflash.decoding import (
    GREEDY_TEMPERATURE,
    METHODS,
    DecodingStats,
    DraftSettings,
    SpeculativeDecoder,
    _Decoding,
)
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.generation import generate
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import TransitionTables, build_tree, walk
from transformers import LogitsProcessor, StoppingCriteria
from treeflash_cases import VOCABULARY, drafted, drafter_for, letters, llama, plain, prompt

BUDGETS, CANDIDATES, BLOCKS = (1, 2, 7, 16, 64), (1, 2, 16), (2, 6, 16)


@pytest.fixture(scope="module")
def target():
    return llama()


@pytest.fixture(scope="module")
def drafter(target):
    return drafter_for(target, block_size=8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_greedy_text_is_the_targets_own(seed, method):
    choose = random.Random(100 * seed + METHODS.index(method))
    target = llama(seed=seed)
    drafter = drafter_for(
        target,
        seed=seed + 50,
        block_size=choose.choice(BLOCKS),
        ar_approximation=choose.choice(["swiglu", "linear"]),
        mask_token_id=choose.choice([1, None]),
    )
    ids = prompt(choose.choice([1, 2, 13]), seed)
    wanted = plain(target, ids, max_new_tokens=40, do_sample=False)
    for _ in range(2):
        draft = {
            "method": method,
            "tree_size": choose.choice(BUDGETS),
            "top_m": choose.choice(CANDIDATES),
            "top_k": choose.choice(CANDIDATES),
            "shortlist": choose.choice([None, 8]),
            "block_size": choose.choice([None, 2]),
        }
        found = drafted(target, ids, drafter, draft=draft, max_new_tokens=40, do_sample=False)
        assert found.tolist() == wanted.tolist(), draft


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_thousands_of_tokens_are_the_targets_own(seed):
    target = llama(seed=seed, max_position_embeddings=1024)
    drafter = drafter_for(target, seed=seed, block_size=8)
    ids = prompt(20, seed)
    for rule in ({}, {"do_sample": True, "top_k": 9}, {"repetition_penalty": 1.1}):
        wanted = plain(target, ids, seed=seed, max_new_tokens=300, **rule)
        for draft in ({"tree_size": 64}, {"tree_size": 16, "method": "marginal"}):
            found = drafted(
                target, ids, drafter, draft=draft, seed=seed, max_new_tokens=300, **rule
            )
            assert found.tolist() == wanted.tolist()


def test_trees_really_accept_drafted_tokens(target, drafter):
    """The other tests would hold if nothing were ever accepted."""
    out = drafted(
        target,
        prompt(),
        drafter,
        draft={"tree_size": 300, "top_m": 23, "top_k": 23, "temperature": 1.0},
        max_new_tokens=60,
        return_dict_in_generate=True,
    )
    stats = out.spec_stats[0]
    assert stats.block_efficiency > 1.3
    assert max(stats.accepted) >= 3
    assert 1 + sum(stats.accepted) >= stats.new_tokens == 60
    assert stats.rounds < 50
    assert set(stats.seconds) == {"prefill", "draft", "tables", "tree", "verify", "walk", "commit"}
    assert 0 < stats.first_token_s < stats.total_s


class NoTokenTwiceInARow(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -math.inf)


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.3},
    "ngram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [4, 5], [7, 8]]},
    "suppress": {"suppress_tokens": [2, 11]},
    "bias": {"sequence_bias": [[[4], 2.5], [[6, 7], -3.0]]},
    "custom": {"logits_processor": [NoTokenTwiceInARow()]},
    "prefix": {
        "prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) + i) % 23 for i in (1, 5)]
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_read_the_text_are_exact(target, drafter, name):
    ids, settings = prompt(seed=3), PROCESSORS[name] | {"max_new_tokens": 30}
    draft = {"method": "tree", "tree_size": 24}
    wanted = plain(target, ids, **settings)
    assert drafted(target, ids, drafter, draft=draft, **settings).tolist() == wanted.tolist()
    wanted = plain(target, ids, seed=5, do_sample=True, **settings)
    found = drafted(target, ids, drafter, draft=draft, seed=5, do_sample=True, **settings)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("method", ["tree", "chain"])
@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 0.7},
        {},
        {"temperature": 1.3},
        {"top_k": 5},
        {"top_p": 0.8, "top_k": 0},
        {"repetition_penalty": 1.2},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_the_same_seed_samples_the_same_text(target, drafter, rule, method):
    settings = {"do_sample": True, "max_new_tokens": 25} | rule
    for seed in (METHODS.index(method),):
        wanted = plain(target, prompt(), seed=seed, **settings)
        found = drafted(
            target,
            prompt(),
            drafter,
            seed=seed,
            draft={"method": method, "tree_size": 32},
            **settings,
        )
        assert found.tolist() == wanted.tolist()


def test_the_random_stream_ends_where_plain_sampling_leaves_it(target, drafter):
    after = []
    for run in (plain, lambda *a, **k: drafted(a[0], a[1], drafter, **k)):
        run(target, prompt(), seed=3, do_sample=True, max_new_tokens=17)
        after.append(torch.rand(3).tolist())
    assert after[0] == after[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sample", [False, True])
def test_a_text_ends_at_eos_inside_a_round(drafter, target, seed, sample):
    ids = prompt(seed=seed)
    free = plain(target, ids, seed=seed, max_new_tokens=30, do_sample=sample)[0, 9:].tolist()
    for end in sorted({free[0], free[1], free[4], free[11]}):
        settings = {
            "eos_token_id": [end, VOCABULARY - 1],
            "max_new_tokens": 30,
            "do_sample": sample,
        }
        wanted = plain(target, ids, seed=seed, **settings)
        found = drafted(target, ids, drafter, draft={"tree_size": 40}, seed=seed, **settings)
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_length": 10},
        {"max_length": 21},
        {"min_new_tokens": 9, "max_new_tokens": 20, "eos_token_id": list(range(12))},
        {"min_length": 15, "max_new_tokens": 20, "eos_token_id": list(range(12))},
        {"max_new_tokens": 20, "eos_token_id": 3, "forced_eos_token_id": 3},
        {"max_new_tokens": 20, "eos_token_id": 3, "exponential_decay_length_penalty": (4, 1.5)},
    ],
    ids=str,
)
def test_lengths_are_the_targets_own(target, drafter, settings):
    for sample in (False, True):
        wanted = plain(target, prompt(), seed=1, do_sample=sample, **settings)
        found = drafted(target, prompt(), drafter, seed=1, do_sample=sample, **settings)
        assert found.tolist() == wanted.tolist()


class EndsOnRepeat(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == input_ids[:, -4]


def test_criteria_of_ones_own_stop_inside_a_round(target, drafter):
    for seed in range(4):
        settings = {
            "stopping_criteria": [EndsOnRepeat()],
            "max_new_tokens": 40,
            "do_sample": True,
        }
        wanted = plain(target, prompt(), seed=seed, **settings)
        found = drafted(target, prompt(), drafter, seed=seed, **settings)
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("place", [1, 5, 12])
@pytest.mark.parametrize("in_config", [False, True])
def test_stop_strings_stop_inside_a_round(target, drafter, place, in_config):
    tokenizer, ids = letters(), prompt()
    free = plain(target, ids, max_new_tokens=30)[0, 9:]
    stop = tokenizer.decode(free[place : place + 2])
    settings = {"max_new_tokens": 30, "tokenizer": tokenizer}
    if in_config:
        settings["generation_config"] = copy.deepcopy(target.generation_config)
        settings["generation_config"].update(stop_strings=stop)
    else:
        settings["stop_strings"] = [stop, "zz"]
    wanted = plain(target, ids, **settings)
    assert wanted.shape[1] < 39
    assert drafted(target, ids, drafter, **settings).tolist() == wanted.tolist()


def keys_values(cache):
    return [(s.keys[..., : s.length, :], s.values[..., : s.length, :]) for s in cache.stores]


class Rule:
    """Greedy, or a seeded sample; ends after some tokens."""

    def __init__(self, greedy, length):
        self.greedy, self._length = greedy, length

    def choose(self, ids, logits):
        if self.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(logits.float().softmax(-1), 1))

    def ends(self, ids):
        return len(ids) >= self._length


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("method", ["tree", "marginal", "chain"])
def test_caches_after_each_round_are_those_of_a_fresh_start(target, drafter, greedy, method):
    torch.manual_seed(2)
    wrapped = Target(target)
    decoder = SpeculativeDecoder(wrapped, drafter, DraftSettings(method, 200, 23, 23))
    layers = drafter.config.target_layer_ids
    lengths = []
    with torch.inference_mode(), wrapped.features(layers) as features:
        state = _Decoding(decoder, prompt()[0].tolist(), Rule(greedy, 50), features)
        over = state.begin()
        while not over:
            length = state._cache.length
            assert length == len(state._ids) - 1 == state._context.length
            lengths.append(length)
            fresh = wrapped.new_cache()
            wrapped.prefill(torch.tensor(state._ids[:-1]), fresh)
            for a, b in zip(keys_values(state._cache), keys_values(fresh), strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # rotary angles are fp32
            context = DraftCache()
            drafter.extend(context, features(), torch.arange(length)[None])
            for a, b in zip(state._context.pairs(), context.pairs(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            over = state.round()
    assert max(b - a for a, b in itertools.pairwise(lengths)) > 1


def test_mean_acceptance_is_one_plus_the_sum_of_path_probabilities():
    """On a target whose rule is known at every node; the drafter is another, wrong one."""
    generator = torch.Generator().manual_seed(0)
    target_rule = torch.rand((6, 6), generator=generator).pow(2).double()
    target_rule /= target_rule.sum(-1, keepdim=True)
    draft_rule = torch.rand((6, 6), generator=generator).double()
    draft_rule /= draft_rule.sum(-1, keepdim=True)
    best = draft_rule.topk(4)
    tokens = torch.stack([best.indices] * 4).numpy()
    links = tokens.copy()
    links[-1] = -1
    tables = TransitionTables(tokens, torch.stack([best.values.log()] * 4).numpy(), links)
    tree = build_tree(tables, 0, 20)  # row 0 is the anchor, token 0
    edge = [1.0] + [
        float(target_rule[tree.tokens[tree.parents[i]], tree.tokens[i]])
        for i in range(1, len(tree))
    ]
    wanted = sum(math.prod(edge[i] for i in tree.path(node)) for node in range(len(tree)))
    runs = 20_000
    choices = torch.multinomial(target_rule[tree.tokens], runs, True, generator=generator)
    lengths = torch.tensor([len(walk(tree, row)[0]) for row in choices.T.tolist()]).double()
    error = lengths.std() / math.sqrt(runs)
    assert abs(lengths.mean() - wanted) < 4 * error
    assert abs(lengths.mean() - tree.expected_block_efficiency()) > 4 * error  # the drafter is off


def test_acceptance_by_depth_is_that_of_the_rounds(target, drafter):
    rounds = []
    settings = DraftSettings(tree_size=200, top_m=23, top_k=23, temperature=1.0)
    decoder = SpeculativeDecoder(Target(target), drafter, settings, rounds.append)
    _, stats = decoder.decode(prompt()[0].tolist(), Rule(True, 80))
    shares = stats.acceptance_by_depth()
    drafted_tokens = [len(round_.path) - 1 for round_ in rounds]
    assert len(shares) == max(drafted_tokens) >= 2
    product = 1.0
    for depth, share in enumerate(shares, start=1):
        product *= share
        assert product == pytest.approx(
            sum(n >= depth for n in drafted_tokens) / len(drafted_tokens)
        )
    assert DecodingStats(accepted=[1, 3, 1, 2]).acceptance_by_depth() == [0.5, 0.5]
    assert DecodingStats(accepted=[1, 1]).acceptance_by_depth() == []
    assert DecodingStats().acceptance_by_depth() == []


def test_trees_stay_below_the_last_position(target):
    """Rotary positions have no end; some change what they mean at one."""
    assert Target(target).deepest(10**6) > 1000
    for kind, goes_on in (("longrope", True), ("dynamic", False)):
        rope = {
            "rope_type": kind,
            "rope_theta": 10000.0,
            "factor": 2.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [2.0, 2.0],
            "original_max_position_embeddings": 64,
        }
        changed = Target(llama(rope_parameters=rope, max_position_embeddings=64))
        assert (changed.deepest(60), changed.deepest(63)) == (3, 0)
        assert (changed.deepest(64) > 1000) == goes_on
        assert goes_on or changed.deepest(64) == 0


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_change_with_the_length_stay_exact(kind):
    rope = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [3.0, 7.0],
        "original_max_position_embeddings": 32,
    }
    target = llama(rope_parameters=rope, max_position_embeddings=32 if kind == "dynamic" else 128)
    drafter = drafter_for(target, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    wanted = plain(target, prompt(20), max_new_tokens=40)
    found = drafted(target, prompt(20), drafter, draft={"tree_size": 40}, max_new_tokens=40)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["tree", "chain"])
def test_a_budget_cuts_every_tree_and_keeps_the_text(target, drafter, rows, method):
    seen = []

    def budget(tree, start):
        assert tree.log_probs == sorted(tree.log_probs, reverse=True)
        seen.append(1 + (start * 7) % len(tree))
        return seen[-1]

    out = drafted(
        target,
        prompt(rows=rows),
        drafter,
        draft={"tree_size": 20, "method": method},
        max_new_tokens=25,
        budget=budget,
        return_dict_in_generate=True,
    )
    assert out.sequences.tolist() == plain(target, prompt(rows=rows), max_new_tokens=25).tolist()
    assert sorted(n for stats in out.spec_stats for n in stats.tree_sizes) == sorted(seen)
    assert len(set(seen)) > 2


def test_the_users_model_is_left_as_it_was(target, drafter):
    model = copy.deepcopy(target)
    model.set_attn_implementation("eager")

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks(), model.config.to_dict(), model.generation_config.to_dict()
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    drafted(model, prompt(), drafter, max_new_tokens=10)

    def fails(ids, scores):
        raise RuntimeError("from a processor")

    with pytest.raises(RuntimeError, match="from a processor"):
        drafted(model, prompt(), drafter, max_new_tokens=10, logits_processor=[fails])
    assert (hooks(), model.config.to_dict(), model.generation_config.to_dict()) == before
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "trees"}, "did you mean 'tree'"),
        ({"tree_size": 0}, "tree_size is 0"),
        ({"top_m": 0}, "top_m is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"block_size": 1}, "block_size is 1"),
        ({"block_size": 99}, "this drafter was trained for 8"),
        ({"shortlist": 0}, "shortlist is 0"),
    ],
)
def test_settings_out_of_range_are_named(target, drafter, settings, message):
    with pytest.raises(ConfigError, match=message):
        drafted(target, prompt(), drafter, draft=settings, max_new_tokens=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 29}, "vocab_size = 29; this one has 23"),
        ({"hidden_size": 32}, "hidden_size = 32; this one has 16"),
        ({"num_target_layers": 7}, "num_target_layers = 7; this one has 4"),
        ({"mask_token_id": 23}, "mask_token_id is 23; the target has 23 embeddings"),
    ],
)
def test_pairs_that_do_not_fit_are_named(target, changes, message):
    drafter = drafter_for(target, **changes)
    with pytest.raises(ConfigError, match=message):
        generate(target, prompt(), drafter=drafter, max_new_tokens=4)


def test_another_precision_is_named(target):
    drafter = drafter_for(target, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"dtype is torch\.float32, the target's torch\.float64"):
        drafted(target, prompt(), drafter, max_new_tokens=4)


def test_a_method_without_its_drafter_is_named(target, drafter):
    with pytest.raises(ConfigError, match="needs a drafter"):
        SpeculativeDecoder(Target(target), None, DraftSettings(method="tree"))
    two = drafter_for(target, ar_approximation="swiglu2")
    for method in ("tree", "chain"):
        with pytest.raises(ConfigError, match=f"'{method}' needs a drafter that looks back one"):
            SpeculativeDecoder(Target(target), two, DraftSettings(method=method))
    SpeculativeDecoder(Target(target), two, DraftSettings(method="marginal"))
    decoder = SpeculativeDecoder(Target(target), drafter)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        decoder.decode([], Rule(True, 5))


def test_greedy_texts_are_drafted_from_sharper_corrections():
    assert DraftSettings().drafting_temperature(greedy=False) == 1.0
    assert DraftSettings().drafting_temperature(greedy=True) == GREEDY_TEMPERATURE < 1
    assert DraftSettings("marginal").drafting_temperature(greedy=True) == 1.0
    assert DraftSettings(temperature=0.7).drafting_temperature(greedy=True) == 0.7


@pytest.mark.parametrize("sampled", [False, True])
def test_the_temperature_left_out_is_what_the_texts_call_for(target, drafter, sampled, monkeypatch):
    """Seen where tables are made, alone and in a batch."""
    used = []
    made = decoding.batch_tables

    def watched(*args, temperature, **settings):
        used.append(temperature)
        return made(*args, temperature=temperature, **settings)

    monkeypatch.setattr(decoding, "batch_tables", watched)
    for rows in (1, 2):
        ids = prompt(5, seed=rows, rows=rows)
        generate(target, ids, drafter=drafter, max_new_tokens=8, do_sample=sampled)
    assert set(used) == {1.0 if sampled else GREEDY_TEMPERATURE}
