"""Training blocks are drafting blocks: what slots see, what they should say, and the loss."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import training_cases as cases
from safetensors.torch import load_file
from tenfold.errors import ConfigError
from tenfold.lm.model import CausalLM
from tenfold.lm.packing import IGNORED
from tenfold.records import SampleRecord
from tenfold.seeds import derive
from tenfold.testing.context import FakeContext
from tenfold_treeflash.anchors import make_blocks, sample_anchors, starts
from tenfold_treeflash.checkpoints import load_drafter
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.objective import (
    DraftObjective,
    ObjectiveSettings,
    default_decay,
    slot_weights,
)
from tenfold_treeflash.target import Target
from tenfold_treeflash.training import DrafterTrainer
from training_cases import Samples, Texts, small_base
from treeflash_cases import VOCABULARY, drafter_for, llama

LENGTH = 20


@pytest.fixture(scope="module")
def target():
    return Target(llama())


def rows(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, LENGTH), generator=generator)


def batch_of(ids, labels=None):
    return {
        "input_ids": ids, "labels": ids if labels is None else labels,
        "row": torch.arange(len(ids)),
    }  # fmt: skip


# --- Blocks ---------------------------------------------------------------------------------------


def test_blocks_begin_before_supervised_tokens_and_end_with_the_row():
    labels = torch.full((LENGTH,), IGNORED)
    labels[6:12] = 1
    assert starts(labels).nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9, 10]
    chosen = sample_anchors(labels, 4, seed=3)
    assert chosen.tolist() == sample_anchors(labels, 4, seed=3).tolist()
    assert len(set(chosen.tolist())) == 4
    assert sample_anchors(labels, 9, seed=0).tolist() == [5, 6, 7, 8, 9, 10, -1, -1, -1]
    ids = rows(1)
    blocks = make_blocks(ids, labels[None], 6, 5, [0])
    for anchor, tokens, scored in zip(
        blocks.anchors[0].tolist(), blocks.tokens[0], blocks.scored[0], strict=True
    ):
        for slot in range(1, 5):
            inside = anchor + slot < LENGTH
            assert int(tokens[slot]) == (int(ids[0, anchor + slot]) if inside else 0)
            assert bool(scored[slot]) == (anchor + slot < 12)
        assert not scored[0]


def test_weights_fall_with_depth():
    weights = slot_weights(5, 4.0)
    assert weights[0] == 0
    wanted = torch.exp(-torch.arange(4.0) / 4)
    torch.testing.assert_close(weights[1:], wanted)
    assert [default_decay(size) for size in (16, 10, 8, 20)] == [7.0, 5.0, 4.0, 9.0]


@torch.no_grad()
def test_a_training_block_is_what_drafting_computes(target):
    """Positions, masks and the missing anchor: the strictest test of an off-by-one."""
    drafter = drafter_for(target.model)
    ids = rows(1)
    objective = DraftObjective(target, ObjectiveSettings(phase="treeflash", anchors=7))
    blocks = make_blocks(ids, ids, 7, drafter.config.block_size, [1])
    _, marginal, corrected = objective.states(drafter, ids, None, blocks)
    for n, anchor in enumerate(blocks.anchors[0].tolist()):
        cache = DraftCache()
        with target.features(drafter.config.target_layer_ids) as features:
            target.prefill(ids[0, :anchor], target.new_cache())
            seen = features()
        drafter.extend(cache, seen.reshape(1, anchor, -1), torch.arange(anchor)[None])
        hidden = drafter.draft(
            cache, int(ids[0, anchor]), target.embedding, drafter.config.block_size
        )
        torch.testing.assert_close(marginal[0, n], drafter.model.norm(hidden), rtol=0, atol=1e-6)
        for slot in range(1, drafter.config.block_size):
            if anchor + slot < LENGTH:
                before = target.embedding[ids[0, anchor + slot - 1]]
                wanted = drafter.model.norm(drafter.correct(hidden[slot], before[None]))
                torch.testing.assert_close(corrected[0, n, slot], wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_block_sees_tokens_before_its_anchor_and_itself_only(target):
    drafter = drafter_for(target.model)
    objective = DraftObjective(target, ObjectiveSettings(anchors=5))
    ids = rows(1)
    blocks = make_blocks(ids, ids, 5, drafter.config.block_size, [2])
    _, before, _ = objective.states(drafter, ids, None, blocks)
    anchors = blocks.anchors[0].tolist()
    for position in range(LENGTH):
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % VOCABULARY
        twin = make_blocks(other, other, 5, drafter.config.block_size, [2])
        _, after, _ = objective.states(drafter, other, None, twin)
        for number, anchor in enumerate(anchors):
            same = torch.allclose(before[0, number], after[0, number], rtol=0, atol=1e-9)
            # Its context, and the anchor itself: neither later tokens nor other blocks' anchors.
            assert same == (position > anchor)
    alone = make_blocks(ids, ids, 5, drafter.config.block_size, [2])
    for number in range(5):
        only = type(alone)(*(part[:, number : number + 1] for part in
                             (alone.anchors, alone.tokens, alone.scored)))  # fmt: skip
        _, single, _ = objective.states(drafter, ids, None, only)
        torch.testing.assert_close(single[0, 0], before[0, number], rtol=0, atol=1e-9)


def test_frozen_parts_have_no_gradients(target):
    drafter = drafter_for(target.model).train()
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(name.startswith("ar_approximation."))
    target.model.requires_grad_(False)
    settings = ObjectiveSettings(phase="treeflash", anchors=3, marginal_weight=0.0)
    loss, _ = DraftObjective(target, settings)(drafter, batch_of(rows(2)))
    loss.backward()
    target.model.requires_grad_(True)
    assert all(p.grad is None for p in target.model.parameters())
    for name, parameter in drafter.named_parameters():
        assert (parameter.grad is not None) == name.startswith("ar_approximation.")


# --- Loss -----------------------------------------------------------------------------------------


def by_hand(target, drafter, ids, labels, blocks, lam):
    """The loss slot by slot, from full logits."""
    objective = DraftObjective(target, ObjectiveSettings(phase="treeflash"))
    states, marginal, corrected = objective.states(drafter, ids, None, blocks)
    weights = slot_weights(drafter.config.block_size, default_decay(drafter.config.block_size))
    means = []
    for b in range(ids.shape[0]):
        kl = ce = total = 0.0
        for n in range(blocks.anchors.shape[1]):
            for k in range(1, drafter.config.block_size):
                if not blocks.scored[b, n, k]:
                    continue
                at = int(blocks.anchors[b, n]) + k
                p = target.head(states[b, at - 1]).float().softmax(-1)
                q = target.head(corrected[b, n, k]).float().log_softmax(-1)
                marginal_q = target.head(marginal[b, n, k]).float().log_softmax(-1)
                kl += weights[k] * F.kl_div(q, p, reduction="sum")
                ce -= weights[k] * marginal_q[ids[b, at]]
                total += weights[k]
        means.append(((1 - lam) * kl + lam * ce) / total)
    supervised = [int((row[1:] != IGNORED).sum()) for row in labels]
    pairs = zip(supervised, means, strict=True)
    return sum(n * mean for n, mean in pairs) / sum(supervised)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_loss_is_the_formula_for_every_chunk(target, chunk):
    drafter = drafter_for(target.model).train()
    ids = rows(2)
    labels = ids.clone()
    labels[1, :9] = IGNORED
    settings = ObjectiveSettings(phase="treeflash", anchors=3, marginal_weight=0.3, chunk=chunk)
    objective = DraftObjective(target, settings)
    objective.step = 4
    loss, values = objective(drafter, batch_of(ids, labels))
    gradients = torch.autograd.grad(loss, drafter.parameters())
    seeds = [derive(0, 4, row) for row in range(2)]
    blocks = make_blocks(ids, labels, 3, drafter.config.block_size, seeds)
    wanted = by_hand(target, drafter, ids, labels, blocks, 0.3)
    torch.testing.assert_close(loss, wanted.to(loss), rtol=1e-5, atol=1e-6)
    for got, own in zip(gradients, torch.autograd.grad(wanted, drafter.parameters()), strict=True):
        torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-6)
    assert values["corrected-kl"] > 0
    assert 0 <= values["marginal-accuracy"] <= 1


@torch.no_grad()
def test_logged_values_are_those_of_every_slot(target):
    """Means by weight and by depth, and the length of chains, from full logits."""
    drafter = drafter_for(target.model).train()
    ids, size = rows(2), drafter.config.block_size
    objective = DraftObjective(target, ObjectiveSettings(phase="treeflash", anchors=9, chunk=5))
    _, values = objective(drafter, batch_of(ids))
    blocks = make_blocks(ids, ids, 9, size, [derive(0, 0, row) for row in range(2)])
    states, marginal, corrected = objective.states(drafter, ids, None, blocks)
    weights = slot_weights(size, default_decay(size)) * blocks.scored
    weights = weights / weights.sum((1, 2), keepdim=True) / 2  # rows of equal length
    hits, kls = [], []
    for drafted in (marginal, corrected):
        q = target.head(drafted).float().log_softmax(-1)
        hits.append((q.argmax(-1) == blocks.tokens) & blocks.scored)
    before = (blocks.positions - 1).clamp_max(LENGTH - 1)
    for b in range(2):
        p = target.head(states[b, before[b]]).float().softmax(-1)
        kls.append(F.kl_div(q[b], p, reduction="none").sum(-1))
    kl = torch.stack(kls) * blocks.scored
    assert values["corrected-kl"] == pytest.approx(float((kl * weights).sum()), rel=1e-4)
    for kind, hit in zip(("marginal", "corrected"), hits, strict=True):
        wanted = float((hit * weights).sum())
        assert values[f"{kind}-accuracy"] == pytest.approx(wanted, abs=1e-6)
        lengths = []
        for row in hit[blocks.scored[..., 1:].all(-1)].tolist():
            length = 1
            while length < size and row[length]:
                length += 1
            lengths.append(length)
        assert len(lengths) > 5
        assert values[f"{kind}-length"] == pytest.approx(sum(lengths) / len(lengths))
    for depth in range(1, size):
        wanted = float(kl[..., depth].sum() / blocks.scored[..., depth].sum())
        assert values[f"corrected-kl@{depth}"] == pytest.approx(wanted, rel=1e-4)


def test_a_batch_is_the_sum_of_its_parts(target):
    """What makes the number of processes and of parts a matter of speed alone."""
    drafter = drafter_for(target.model).train()
    ids = rows(4, seed=3)
    labels = ids.clone()
    labels[0, 13:], labels[2, :7] = IGNORED, IGNORED
    batch = batch_of(ids, labels)
    objective = DraftObjective(target, ObjectiveSettings(phase="treeflash", anchors=3))
    whole, _ = objective(drafter, batch)
    counts, losses = [], []
    for part in ([0], [1, 2], [3]):
        loss, _ = objective(drafter, {name: values[part] for name, values in batch.items()})
        losses.append(loss)
        counts.append(int((labels[part][:, 1:] != IGNORED).sum()))
    wanted = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    torch.testing.assert_close(whole, wanted, rtol=1e-6, atol=1e-6)


def test_a_new_approximator_loses_what_its_backbone_loses(target):
    """At the first step the corrected distribution is the marginal one."""
    drafter = drafter_for(target.model, shake=0).eval()
    ids = rows(2)
    settings = {"anchors": 4, "marginal_loss": "kl"}
    backbone, _ = DraftObjective(target, ObjectiveSettings(phase="dflash", **settings))(
        drafter, batch_of(ids)
    )
    both = ObjectiveSettings(phase="treeflash", marginal_weight=0.0, **settings)
    corrected, _ = DraftObjective(target, both)(drafter, batch_of(ids))
    torch.testing.assert_close(corrected, backbone)


def test_rows_without_supervised_tokens_have_no_loss(target):
    drafter = drafter_for(target.model).train()
    ids = rows(1)
    loss, values = DraftObjective(target, ObjectiveSettings(anchors=3))(
        drafter, batch_of(ids, torch.full_like(ids, IGNORED))
    )
    assert float(loss.detach()) == 0
    assert values == {}
    loss.backward()


# --- The trainer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return small_base()


SETTINGS = cases.SETTINGS | {"steps": 24, "steps_b": 16}


def last_losses(folder):
    log = json.loads((folder / "training.json").read_text())["log"]
    return [row["loss"] for row in log if "loss" in row]


def test_both_phases_learn_and_the_target_stays(base, tmp_path):
    before = {n: p.clone() for n, p in base.model.state_dict().items()}
    done = DrafterTrainer(base, Texts(), **SETTINGS).fit(FakeContext(tmp_path), None, {})
    names = [m.name for m in done.metrics]
    assert {"dflash-train-loss", "treeflash-train-loss", "treeflash-eval-loss"} <= set(names)
    assert all(torch.equal(before[n], p) for n, p in base.model.state_dict().items())
    first = last_losses(tmp_path / "run/work/phase-dflash/checkpoint")
    assert first[-1] < first[0] - 0.1
    drafter = load_drafter(done.path)
    assert drafter.looks_back == 1
    assert drafter.ar_approximation.d.weight.abs().max() > 0


def test_an_interrupted_training_ends_like_an_uninterrupted_one(base, tmp_path):
    whole = DrafterTrainer(base, Samples(), **SETTINGS)
    whole.fit(FakeContext(tmp_path / "whole"), None, {})

    def stop(done):
        if done == 30:  # in the second phase
            raise KeyboardInterrupt

    parts = {**SETTINGS, "save_steps": 5}
    cut = _counting(FakeContext(tmp_path / "cut"), stop)
    with pytest.raises(KeyboardInterrupt):
        DrafterTrainer(base, Samples(), **parts).fit(cut, None, {})
    DrafterTrainer(base, Samples(), **parts).fit(FakeContext(tmp_path / "cut"), None, {})
    one = load_file(tmp_path / "whole/run/work/checkpoint/model.safetensors")
    two = load_file(tmp_path / "cut/run/work/checkpoint/model.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def _counting(ctx, stop):
    """Counts steps over all bars, since each phase has its own."""
    total = 0

    def advance(done):
        nonlocal total
        total += 1
        stop(total)

    ctx.on_advance = advance
    return ctx


def test_a_frozen_backbone_stays(base, tmp_path):
    first = DrafterTrainer(base, Texts(), **SETTINGS, phase="dflash")
    start = first.fit(FakeContext(tmp_path / "a"), None, {}).path
    second = DrafterTrainer(
        base, Texts(), **SETTINGS, phase="treeflash", init=str(start), freeze_backbone=True
    )
    done = second.fit(FakeContext(tmp_path / "b"), None, {}).path
    one, two = (load_file(folder / "model.safetensors") for folder in (start, done))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved
    assert all(name.startswith("ar_approximation.") for name in moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "treeflash"}, "give init"),
        ({"phase": "dfalsh"}, "known: both"),
        ({"context_length": 3}, "at least 4"),
        ({"anchors": 0}, "anchors"),
        ({"marginal_weight": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_settings_are_one_clear_error(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        DrafterTrainer(base, Texts(), **(SETTINGS | changes))


def test_records_without_answers_are_refused(base, tmp_path):
    class Empty(Samples):
        def load(self, split="", limit=None, shuffle_seed=None):
            yield SampleRecord(id="1", prompt="a", completion="")

    with pytest.raises(ConfigError, match="none of 1 records has two supervised"):
        DrafterTrainer(base, Empty(), **SETTINGS).fit(FakeContext(tmp_path), None, {})


def test_a_half_precision_target_trains_a_drafter_and_keeps_its_gradients(base, tmp_path):
    half = CausalLM(
        llama(dtype=torch.bfloat16, vocab_size=len(base.tokenizer), eos_token_id=0), base.tokenizer
    )
    short = SETTINGS | {"steps": 2, "steps_b": 2}
    done = DrafterTrainer(half, Texts(), **short).fit(FakeContext(tmp_path), None, {})
    assert load_drafter(done.path).dtype == torch.float32
    assert all(p.requires_grad for p in half.model.parameters())
