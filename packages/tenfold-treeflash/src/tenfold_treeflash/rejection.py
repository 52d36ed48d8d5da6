"""Verification by rejection: trees of tokens drawn without replacement, over a shape fixed first.

A deterministic tree of the best children accepts `p(children)`. Children drawn from the drafter's
`q` can be accepted more often where `q` is close to the target's `p`: with `p = q` the first
always is. At a node with children `x_1, x_2, ...` in the order of their draws,

    accept x_i with probability min(1, p(x_i) / q(x_i));
    else p <- norm(max(p - q, 0)),  q(x_i) <- 0,  q <- norm(q)

and a node whose children were all refused gives a draw of what is left of `p`. The token at
every node then has the law `p`, whatever `q` is, because given the children refused so far the
next one is distributed as `q` without them. That needs a shape that does not depend on the draws:
it is the best-first tree of how often children of each rank were accepted before.

Shapes: `K` children in a table's row, `V` vocabulary.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tenfold_treeflash.tree import LEAF, DraftTree, TransitionTables

_PRIOR_WEIGHT = 8.0
"""How many visits the first guess of a rank's acceptance counts for."""


class Drawer(Protocol):
    """Where random numbers and the target's distribution come from."""

    generator: torch.Generator | None

    def probabilities(self, ids: list[int], logits: Tensor) -> Tensor:
        """The target's distribution `[1, V]` after `ids`."""
        ...

    def draw(self, probabilities: Tensor) -> int:
        """A token from `[1, V]`."""
        ...

    def ends(self, ids: list[int]) -> bool:
        """Whether the text ends with its newest token."""
        ...


@dataclass(frozen=True)
class Shape:
    """A tree without tokens: parents first; `ranks` says which child of its parent a node is."""

    parents: list[int]
    ranks: list[int]


@dataclass(frozen=True)
class SampledTree(DraftTree):
    """A tree of draws.

    Attributes:
        order: per node its children in the order of their draws.
        proposals: per node the tokens `[K]` and probabilities `[K]` that its children were drawn
            from; None for leaves.
    """

    order: list[list[int]] = field(default_factory=list)
    proposals: list[tuple[np.ndarray, np.ndarray] | None] = field(default_factory=list)


class RankRates:
    """How often the child of each rank is the accepted one, learnt while decoding."""

    def __init__(self, width: int) -> None:
        guess = 0.5 ** np.arange(1, width + 1)
        self._visits = np.full(width, _PRIOR_WEIGHT)
        self._accepted = guess * _PRIOR_WEIGHT

    def saw(self, children: int, accepted: int | None) -> None:
        """Counts a node with `children`, of which the one of rank `accepted` was taken."""
        self._visits[:children] += 1
        if accepted is not None:
            self._accepted[accepted] += 1

    def rates(self) -> list[float]:
        """Non-increasing in the rank, so that the likeliest nodes form a tree."""
        return np.minimum.accumulate(self._accepted / self._visits).tolist()


def best_shape(rates: list[float], size: int, depth: int) -> Shape:
    """The `size - 1` likeliest nodes when the child of rank r is accepted with `rates[r]`."""
    parents, ranks, depths = [-1], [0], [0]
    heap = [(-rates[0], 0, 0, 0, 1.0)] if depth and rates else []
    count = 1
    while heap and len(parents) < size:
        cost, _, parent, rank, above = heapq.heappop(heap)
        node, level = len(parents), depths[parent] + 1
        parents.append(parent)
        ranks.append(rank)
        depths.append(level)
        if rank + 1 < len(rates):
            heapq.heappush(heap, (-above * rates[rank + 1], count, parent, rank + 1, above))
        if level < depth:
            heapq.heappush(heap, (cost * rates[0], count + 1, node, 0, -cost))
        count += 2
    return Shape(parents, ranks)


def path_shape(size: int, depth: int) -> Shape:
    """A single path."""
    count = min(size - 1, depth)
    return Shape([-1, *range(count)], [0] * (count + 1))


def sample_tree(
    tables: TransitionTables, anchor: int, shape: Shape, generator: torch.Generator | None
) -> SampledTree:
    """Fills a shape with draws without replacement from the rows of the tables.

    Nodes below a token that has no row are left out.
    """
    width = tables.tokens.shape[2]
    device = "cpu" if generator is None else generator.device
    # The largest of log q + Gumbel noise, in descending order, are draws without replacement.
    uniform = torch.rand((len(shape.parents), width), generator=generator, device=device).double()
    noise = -np.log(-np.log(uniform.clamp_(1e-12, 1 - 1e-12).cpu().numpy()))
    tree = SampledTree([anchor], [-1], [0], [0.0], [[]], [None])
    places, rows, drawn = {0: 0}, [0], {}
    for node in range(1, len(shape.parents)):
        parent = places.get(shape.parents[node])
        if parent is None or rows[parent] == LEAF:
            continue
        depth, row = tree.depths[parent], rows[parent]
        if parent not in drawn:
            scores = tables.log_probs[depth, row]
            total = np.exp(scores)
            tree.proposals[parent] = (tables.tokens[depth, row], total / total.sum())
            keys = scores + noise[parent]
            drawn[parent] = np.argsort(-keys)[: int(np.isfinite(scores).sum())]
        if shape.ranks[node] >= len(drawn[parent]):
            continue
        choice = drawn[parent][shape.ranks[node]]
        proposal = tree.proposals[parent]
        assert proposal is not None
        places[node] = len(tree.tokens)
        tree.order[parent].append(len(tree.tokens))
        tree.tokens.append(int(tables.tokens[depth, row, choice]))
        tree.parents.append(parent)
        tree.depths.append(depth + 1)
        tree.log_probs.append(tree.log_probs[parent] + math.log(max(proposal[1][choice], 1e-300)))
        tree.order.append([])
        tree.proposals.append(None)
        rows.append(int(tables.links[depth, row, choice]))
    return tree


def accept_child(
    target: np.ndarray,
    children: list[int],
    tokens: np.ndarray,
    proposal: np.ndarray,
    uniform: np.ndarray,
) -> tuple[int | None, np.ndarray]:
    """Which child is accepted (its rank, or None), and what is left of the target's distribution.

    Args:
        target: `p [V]`.
        children: tokens in the order of their draws.
        tokens, proposal: `q`, as tokens `[K]` and probabilities `[K]`.
        uniform: one number in [0, 1) per child.
    """
    p, q = target, proposal.copy()
    for rank, token in enumerate(children):
        place = int(np.flatnonzero(tokens == token)[0])
        if uniform[rank] * q[place] < p[token]:
            return rank, p
        rest = p.copy()
        rest[tokens] = np.maximum(rest[tokens] - q, 0)
        total = rest.sum()
        if total <= 0:  # p and q are equal up to rounding: refusal had probability zero
            return rank, p
        p = rest / total
        q[place] = 0
        left = q.sum()
        if left <= 0:
            break
        q /= left
    return None, p


def walk_by_rejection(
    tree: SampledTree, logits: Tensor, ids: list[int], drawer: Drawer, rates: RankRates
) -> tuple[list[int], bool]:
    """Appends a round's tokens to `ids`; the accepted nodes, and whether the text has ended."""
    node, path = 0, [0]
    while True:
        weights = drawer.probabilities(ids, logits[node])
        children, proposal = tree.order[node], tree.proposals[node]
        rank = None
        if proposal is not None and children:
            device = "cpu" if drawer.generator is None else drawer.generator.device
            uniform = torch.rand(
                len(children), generator=drawer.generator, device=device, dtype=torch.float64
            )
            p = weights[0].double().cpu().numpy()
            rank, left = accept_child(
                p / p.sum(), [tree.tokens[c] for c in children], *proposal, uniform.cpu().numpy()
            )
            rates.saw(len(children), rank)
            if rank is None:
                weights = torch.from_numpy(left)[None].to(weights)
        ids.append(drawer.draw(weights) if rank is None else tree.tokens[children[rank]])
        if drawer.ends(ids):
            return path, True
        if rank is None:
            return path, False
        node = children[rank]
        path.append(node)
