"""Which rows of a batch share the beginning of their prompts, so that it is read once.

Rows are put into groups; a group's first tokens are computed for one row and copied to the
others. Groups are chosen so that the fewest tokens are computed, by dynamic programming over the
tree of prompts: a row saves the depth of the deepest group above it, and a group costs its depth
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LEAST_SAVED = 16
"""Prompts that save fewer tokens per row are read as they are: sharing costs a pass."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """`length` first tokens that all `rows` have in common; rows share nothing at length 0."""

    length: int
    rows: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return self.length * (len(self.rows) - 1)


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[Prefix]:
    """Groups of all rows that save most tokens; every row keeps one token of its own.

    A prompt that shares nothing is a group of its own, of length 0. Where the whole batch saves
    less than 16 tokens a row, nothing is shared.
    """
    texts = [list(prompt[:-1]) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda row: (texts[row], row))
    common = [_common(texts[a], texts[b]) for a, b in pairwise(order)]
    groups = _best(_tree(order, common)) if order else []
    if sum(group.saved for group in groups) < LEAST_SAVED * len(prompts):
        return [Prefix(0, (row,)) for row in range(len(prompts))]
    return sorted(groups, key=lambda group: group.rows)


@dataclass(slots=True)
class _Node:
    """Rows that share `depth` tokens: those of its children, and `rows` that share no more."""

    depth: int
    rows: list[int] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    above: set[int] = field(default_factory=set)
    """Depths of its ancestors."""
    values: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Depth of the deepest group above → tokens saved at best, and whether this is a group."""


def _tree(order: Sequence[int], common: Sequence[int]) -> list[_Node]:
    """All nodes, children first; `common[i]`: tokens shared by the sorted rows i and i + 1."""
    done: list[_Node] = []
    stack = [_Node(0)]
    for at, row in enumerate(order):
        ahead = common[at] if at < len(common) else 0
        if ahead > stack[-1].depth:
            stack.append(_Node(ahead))
        stack[-1].rows.append(row)
        while ahead < stack[-1].depth:
            node = stack.pop()
            done.append(node)
            if ahead > stack[-1].depth:
                stack.append(_Node(ahead))
            stack[-1].children.append(node)
    return [*done, stack[0]]


def _best(nodes: list[_Node]) -> list[Prefix]:
    """The groups that save most."""
    for node in reversed(nodes):
        for child in node.children:
            child.above = node.above | {node.depth}
    for node in nodes:
        for depth in sorted(node.above | {0}):
            apart = _value(node, depth)
            together = _value(node, node.depth) - node.depth
            node.values[depth] = max((apart, False), (together, True))
    members: dict[int, list[int]] = {}
    group = {id(nodes[-1]): (0, -1)}  # node → depth of the group above it, and its number
    for number, node in reversed(list(enumerate(nodes))):
        depth, above = group[id(node)]
        if node.depth and node.values[depth][1]:
            depth, above = node.depth, number
        group.update({id(child): (depth, above) for child in node.children})
        members.setdefault(above, []).extend(node.rows)
    alone = [Prefix(0, (row,)) for row in members.pop(-1, [])]
    return alone + [Prefix(nodes[i].depth, tuple(sorted(rows))) for i, rows in members.items()]


def _value(node: _Node, depth: int) -> int:
    """Tokens saved below a node when the deepest group above its parts has this depth."""
    return depth * len(node.rows) + sum(child.values[depth][0] for child in node.children)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count, most = 0, min(len(a), len(b))
    while count < most and a[count] == b[count]:
        count += 1
    return count
