"""The same laws on a GPU: tables packed into one transfer, generators and masks of the device."""

from __future__ import annotations

import pytest
import torch
from tenfold_treeflash.tree import build_tree, build_tree_by_levels
from treeflash_cases import drafted, drafter_for, llama, plain, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def pair():
    target = llama().cuda()
    return target, drafter_for(target).cuda()


@pytest.mark.parametrize("method", ["tree", "marginal", "chain"])
@pytest.mark.parametrize("rule", [{}, {"do_sample": True, "top_k": 9}])
def test_texts_are_the_targets_own(pair, method, rule):
    target, drafter = pair
    ids = prompt().cuda()
    wanted = plain(target, ids, seed=1, max_new_tokens=40, **rule)
    draft = {"method": method, "tree_size": 40}
    found = drafted(target, ids, drafter, draft=draft, seed=1, max_new_tokens=40, **rule)
    assert found.tolist() == wanted.tolist()


def test_batches_are_the_targets_own(pair):
    target, drafter = pair
    ids = prompt(rows=4).cuda()
    wanted = plain(target, ids, max_new_tokens=40)
    assert drafted(target, ids, drafter, max_new_tokens=40).tolist() == wanted.tolist()


@pytest.mark.parametrize("verification", ["match", "rejection"])
def test_a_row_has_its_own_random_numbers(pair, verification):
    target, drafter = pair
    ids = prompt(rows=3).cuda()
    settings = {
        "draft": {"verification": verification}, "do_sample": True, "max_new_tokens": 25,
    }  # fmt: skip
    together = drafted(target, ids, drafter, seeds=[1, 2, 3], **settings)
    for row in range(3):
        alone = drafted(target, ids[row : row + 1], drafter, seeds=[row + 1], **settings)
        assert together[row].tolist() == alone[0].tolist()


def test_the_level_builder_runs_on_the_device():
    from test_tree import random_tables

    tables = random_tables(5, depth=7, rows=4, width=4)
    here, there = build_tree(tables, 3, 64), build_tree_by_levels(tables, 3, 64, device="cuda")
    assert here.log_probs == pytest.approx(there.log_probs, abs=1e-12)
