"""Draft trees: the nodes with the largest path probability under first-order tables.

If the drafter were the target, a tree's expected number of tokens per round would be
`1 + sum of its nodes' path probabilities` (OPT-Tree). A parent is at least as likely as its
child, so the `B - 1` likeliest nodes are a tree by themselves, and a best-first search finds them.

Shapes: `n` nodes (root included), `D` drafted depths, `M` rows per depth, `K` children per row.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tenfold.errors import ConfigError

LEAF = -1
"""Link of a child that cannot be expanded: its token has no row at the next depth."""


@dataclass(frozen=True)
class TransitionTables:
    """What may follow what, per depth.

    Attributes:
        tokens: `[D, M, K]` int64, best children of each row, most likely first.
        log_probs: `[D, M, K]`, minus infinity where there is none.
        links: `[D, M, K]` int64, row of the child at the next depth, or `LEAF`.

    Depth 1 has one row (0): the anchor's.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    links: np.ndarray

    @property
    def depth(self) -> int:
        """Drafted depths D."""
        return self.tokens.shape[0]

    def upto(self, depth: int) -> TransitionTables:
        """The tables of the first `depth` depths."""
        return TransitionTables(self.tokens[:depth], self.log_probs[:depth], self.links[:depth])

    def within(self, rows: int) -> TransitionTables:
        """The tables with the first `rows` candidates per depth only."""
        if rows >= self.tokens.shape[1]:
            return self
        links = np.where(self.links[:, :rows] < rows, self.links[:, :rows], LEAF)
        return TransitionTables(self.tokens[:, :rows], self.log_probs[:, :rows], links)


@dataclass(frozen=True)
class DraftTree:
    """Nodes in the order they were chosen: parents before children, root first.

    Attributes:
        tokens: `[n]` token of each node; the root's is the anchor.
        parents: `[n]` index of the parent, -1 for the root.
        depths: `[n]`, 0 for the root.
        log_probs: `[n]` log path probability, 0 for the root.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    log_probs: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """Per node: token to child node."""
        out: list[dict[int, int]] = [{} for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            out[self.parents[node]][self.tokens[node]] = node
        return out

    def ancestors(self) -> np.ndarray:
        """`[n, n]` bool; row i marks i and the nodes on its path to the root."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen

    def expected_block_efficiency(self) -> float:
        """Tokens per round if the drafter were the target: `1 + sum of path probabilities`."""
        return 1.0 + sum(math.exp(p) for p in self.log_probs[1:])

    def paths(self) -> Iterator[list[int]]:
        """Tokens from the anchor to each leaf."""
        inner = set(self.parents)
        for node in range(len(self.tokens)):
            if node not in inner:
                yield [self.tokens[i] for i in self.path(node)]

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    def first(self, size: int) -> DraftTree:
        """The tree of its first `size` nodes."""
        return DraftTree(
            self.tokens[:size], self.parents[:size], self.depths[:size], self.log_probs[:size]
        )


def single(anchor: int) -> DraftTree:
    """The tree of the anchor alone: plain autoregression."""
    return DraftTree([anchor], [-1], [0], [0.0])


def build_tree(tables: TransitionTables, anchor: int, size: int) -> DraftTree:
    """The `size - 1` likeliest nodes below the anchor (fewer when the tables hold no more).

    Best-first with lazy siblings: a node enters the heap when its parent or its likelier sibling
    leaves it. Ties go to the node found first.

    Raises:
        ConfigError: a size below 1.
    """
    if size < 1:
        raise ConfigError(f"tree_size is {size}; it must be at least 1 (the newest token itself)")
    tree = single(anchor)
    tokens, parents, depths, log_probs = tree.tokens, tree.parents, tree.depths, tree.log_probs
    last, width = tables.depth - 1, tables.tokens.shape[2]
    if last < 0:
        return tree
    rows: dict[tuple[int, int], tuple[list[int], list[float], list[int]]] = {}

    def row_of(depth: int, row: int) -> tuple[list[int], list[float], list[int]]:
        """A row as plain lists; only those in use are converted."""
        found = rows.get((depth, row))
        if found is None:
            found = rows[depth, row] = (
                tables.tokens[depth, row].tolist(), tables.log_probs[depth, row].tolist(),
                tables.links[depth, row].tolist(),
            )  # fmt: skip
        return found

    first = row_of(0, 0)
    if first[1][0] == -math.inf:
        return tree
    push, pop = heapq.heappush, heapq.heappop
    count = 1
    # (cost, order, parent node, depth index, row, rank, cost of the parent)
    heap = [(-first[1][0], 0, 0, 0, first, 0, 0.0)]
    while heap and len(tokens) < size:
        cost, _, parent, depth, row, rank, above = pop(heap)
        names, scores, links = row
        node = len(tokens)
        tokens.append(names[rank])
        parents.append(parent)
        depths.append(depth + 1)
        log_probs.append(-cost)
        if rank + 1 < width and scores[rank + 1] > -math.inf:
            push(heap, (above - scores[rank + 1], count, parent, depth, row, rank + 1, above))
            count += 1
        if links[rank] >= 0 and depth < last:
            below = row_of(depth + 1, links[rank])
            if below[1][0] > -math.inf:
                push(heap, (cost - below[1][0], count, node, depth + 1, below, 0, cost))
                count += 1
    return tree


def build_tree_by_levels(
    tables: TransitionTables, anchor: int, size: int, device: str = "cpu"
) -> DraftTree:
    """The same nodes, found level by level with tensor operations of fixed shapes: the `size - 1`
    best of every depth, then the best of all depths. It waits for the device once, at its end.

    Nodes come sorted by probability, ties to lower depths.

    Raises:
        ConfigError: a size below 1.
    """
    if size < 1:
        raise ConfigError(f"tree_size is {size}; it must be at least 1 (the newest token itself)")
    keep, width = size - 1, tables.tokens.shape[2]
    if keep == 0 or tables.depth == 0:
        return single(anchor)
    token_rows, score_rows, link_rows = (
        torch.as_tensor(part, device=device)
        for part in (tables.tokens, tables.log_probs, tables.links)
    )
    scores = score_rows.new_zeros(1)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    numbers, offset = torch.full_like(rows, -1), 0
    found = []
    for depth in range(tables.depth):
        total = (scores[:, None] + score_rows[depth, rows]).flatten()
        order = torch.sort(total, descending=True, stable=True).indices[:keep]
        parent, rank = order // width, order % width
        above, best = rows[parent], total[order]
        links = link_rows[depth, above, rank]
        level = torch.full_like(order, depth + 1)
        found.append((token_rows[depth, above, rank], numbers[parent], level, best))
        numbers = offset + torch.arange(order.numel(), device=device)
        offset += order.numel()
        # A child without a row stays in the beam, but nothing can follow it.
        scores, rows = best.masked_fill(links < 0, -torch.inf), links.clamp(min=0)
    tokens, parents, depths, log_probs = (torch.cat(part) for part in zip(*found, strict=True))
    best = torch.sort(log_probs, descending=True, stable=True).indices[:keep]
    place = torch.full_like(parents, -1)
    place[best] = torch.arange(1, best.numel() + 1, device=device)
    above = torch.where(parents[best] < 0, 0, place[parents[best].clamp(min=0)])
    columns = torch.stack([tokens[best], above, depths[best]]).tolist()
    values = log_probs[best].tolist()
    count = sum(value > -math.inf for value in values)
    root = single(anchor)
    new_tokens, new_parents, new_depths = (column[:count] for column in columns)
    return DraftTree(
        root.tokens + new_tokens, root.parents + new_parents, root.depths + new_depths,
        root.log_probs + values[:count],
    )  # fmt: skip


def brute_force_tree(tables: TransitionTables, size: int) -> float:
    """The largest `sum of path probabilities` of any tree of `size - 1` drafted nodes, by trying
    every set of nodes that contains its nodes' parents; for tiny tables."""
    nodes: list[tuple[int, float]] = []  # (parent, probability)

    def expand(parent: int, depth: int, row: int, above: float) -> None:
        for rank in range(tables.tokens.shape[2]):
            score = above + float(tables.log_probs[depth, row, rank])
            if score == -math.inf:
                continue
            nodes.append((parent, math.exp(score)))
            node, link = len(nodes) - 1, int(tables.links[depth, row, rank])
            if link >= 0 and depth + 1 < tables.depth:
                expand(node, depth + 1, link, score)

    if tables.depth:
        expand(-1, 0, 0, 0.0)
    best = 0.0
    for chosen in itertools.combinations(range(len(nodes)), min(size - 1, len(nodes))):
        members = set(chosen)
        if all(nodes[i][0] in members or nodes[i][0] < 0 for i in chosen):
            best = max(best, sum(nodes[i][1] for i in chosen))
    return best


def chain(tables: TransitionTables, anchor: int, size: int) -> DraftTree:
    """The path of best children, conditioned on the token really drafted.

    Where that token has no row at the next depth, the row of the most likely candidate stands in.
    """
    tree, row, total = single(anchor), 0, 0.0
    for depth in range(min(tables.depth, size - 1)):
        total += float(tables.log_probs[depth, row, 0])
        if total == -math.inf:
            break
        tree.tokens.append(int(tables.tokens[depth, row, 0]))
        tree.parents.append(depth)
        tree.depths.append(depth + 1)
        tree.log_probs.append(total)
        row = max(int(tables.links[depth, row, 0]), 0)
    return tree


def walk(tree: DraftTree, choose: Sequence[int]) -> tuple[list[int], int]:
    """Accepted nodes and the token after them, given the target's choice at every node."""
    node, path = 0, [0]
    while True:
        token = choose[node]
        child = tree.children[node].get(token)
        if child is None:
            return path, token
        path.append(child)
        node = child
