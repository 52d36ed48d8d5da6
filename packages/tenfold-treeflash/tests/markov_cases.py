"""A first-order Markov source with known block efficiencies, and a target and drafter for it.

Each of 32 states has four successors, with probabilities .4, .3, .2, .1. A drafter that knows the
source's marginals, or its transitions, reaches a number of tokens per round that follows from
these probabilities alone.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from tenfold_treeflash.configuration import for_target
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.objective import DraftObjective, ObjectiveSettings
from tenfold_treeflash.target import Target
from transformers import LlamaConfig, LlamaForCausalLM

STATES, BLOCK, LENGTH = 32, 8, 64
PROBABILITIES = (0.4, 0.3, 0.2, 0.1)


def successors(state):
    """Likeliest first."""
    steps = ((5, 1), (9, 0), (13, 2), (17, 3))
    return [(a * state + b) % STATES for a, b in steps]


def transitions():
    """`[s, v]` probability of `v` after `s`."""
    matrix = np.zeros((STATES, STATES))
    for state in range(STATES):
        for follower, probability in zip(successors(state), PROBABILITIES, strict=True):
            matrix[state, follower] += probability
    return matrix


MATRIX = transitions()


def texts(count, length, generator):
    """`[count, length]` draws of the source, uniform first states (its stationary law)."""
    matrix = torch.tensor(MATRIX, dtype=torch.float32)
    column = torch.randint(STATES, (count, 1), generator=generator)
    columns = [column]
    for _ in range(length - 1):
        column = torch.multinomial(matrix[column[:, 0]], 1, generator=generator)
        columns.append(column)
    return torch.cat(columns, dim=1)


def expected_tokens(tree):
    """Tokens per round of a tree, if the source decides: 1 + the sum of its path probabilities."""
    chances = [1.0]
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        chances.append(chances[parent] * MATRIX[tree.tokens[parent], tree.tokens[node]])
    return sum(chances)


# --- What perfect drafters reach ------------------------------------------------------------------


def perfect_tree(size):
    """Tokens per round of the best tree by true transitions: the same below every state."""
    heap = [(-1.0, 0)]
    total = 0.0
    for _ in range(size):
        cost, depth = heapq.heappop(heap)
        total -= cost
        if depth < BLOCK - 1:
            for probability in PROBABILITIES:
                heapq.heappush(heap, (cost * probability, depth + 1))
    return total


def perfect_marginal_tree(size):
    """The mean over states of the best tree of true marginals."""
    return float(np.mean([_marginal_tree(state, size) for state in range(STATES)]))


def _marginal_tree(state, size):
    powers = [np.linalg.matrix_power(MATRIX, depth)[state] for depth in range(BLOCK)]
    order = [np.argsort(-row, kind="stable") for row in powers]
    # (minus log of the drafter's probability, order, depth, rank, parent's cost, token above,
    #  true probability of the parent)
    total, count, heap = 1.0, 0, []

    def push(depth, rank, above, token, truth):
        nonlocal count
        if depth < BLOCK and rank < STATES and powers[depth][order[depth][rank]] > 0:
            count += 1
            cost = above - math.log(powers[depth][order[depth][rank]])
            heapq.heappush(heap, (cost, count, depth, rank, above, token, truth))

    push(1, 0, 0.0, state, 1.0)
    for _ in range(size - 1):
        cost, _, depth, rank, above, token, truth = heapq.heappop(heap)
        child = int(order[depth][rank])
        chance = truth * MATRIX[token, child]
        total += chance
        push(depth, rank + 1, above, token, truth)
        push(depth + 1, 0, cost, child, chance)
    return total


def perfect_marginal_chain():
    """The mean over states of the chain of marginal arg-maxes."""
    means = []
    for state in range(STATES):
        token, chance, total = state, 1.0, 1.0
        for depth in range(1, BLOCK):
            best = int(np.argmax(np.linalg.matrix_power(MATRIX, depth)[state]))
            chance *= MATRIX[token, best]
            total, token = total + chance, best
        means.append(total)
    return float(np.mean(means))


# --- Training -------------------------------------------------------------------------------------


def _optimise(parameters, steps, rate, step):
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    warm = max(1, steps // 25)
    for number in range(steps):
        share = min(1.0, (number + 1) / warm) * 0.5 * (1 + math.cos(math.pi * number / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = step(number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return float(loss.detach())


def train_target(steps=400, seed=0):
    """A small Llama that knows the source, and its last loss (the source's entropy is 1.280)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=STATES + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=2 * LENGTH, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def step(number):
        rows = texts(16, LENGTH, generator)
        return model(input_ids=rows, labels=rows).loss

    loss = _optimise(list(model.parameters()), steps, 3e-3, step)
    return model.eval().requires_grad_(False), loss


def train_drafter(model, steps=600, steps_b=400, rows=16, anchors=6, seed=1, rates=(2e-3, 1e-3)):
    """A drafter for it, trained in two phases."""
    config = for_target(
        model.config, num_hidden_layers=2, block_size=BLOCK, num_features=3, mask_token_id=STATES
    )
    torch.manual_seed(seed)
    drafter = TreeFlashDraftModel(config)
    generator = torch.Generator().manual_seed(seed)
    for phase, count, rate in zip(("dflash", "treeflash"), (steps, steps_b), rates, strict=True):
        objective = DraftObjective(
            Target(model), ObjectiveSettings(phase=phase, anchors=anchors, decay=4.0)
        )

        def step(number, objective=objective):
            ids = texts(rows, LENGTH, generator)
            objective.step = number
            batch = {"input_ids": ids, "labels": ids, "row": torch.arange(rows)}
            return objective(drafter, batch)[0]

        drafter.train()
        _optimise(list(drafter.parameters()), count, rate, step)
    return drafter.eval()
