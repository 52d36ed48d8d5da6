"""Drafting at given places of a given text: what a round there would have accepted.

All rounds of a text run side by side, as in training: one pass of the target over the text gives
the features, one pass of the drafter its blocks. A text that the target wrote says which token it
chose at every place, so the walk through a tree needs no further pass.

Why a walk ends (the token it looked for, at the depth where it stopped):

    whole-block    nothing was drafted any deeper
    wrong-parent   the tree holds the token at that depth, below another node
    not-in-tree    the tables list it at that depth, but the tree has no room for it
    not-in-tables  it is in no list of that depth

Shapes: `S` tokens, `N` places, `T` slots of a block, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_treeflash.anchors import Blocks, blocks_at
from tenfold_treeflash.decoding import DraftSettings
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tables import batch_tables
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import DraftTree, TransitionTables, build_tree, chain

ENDINGS = ("whole-block", "wrong-parent", "not-in-tree", "not-in-tables")


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """A round that begins at one place.

    Attributes:
        tables: what may follow what.
        tree: drafted from them.
        following: the text's own tokens behind the anchor, `[T - 1]`.
    """

    tables: TransitionTables
    tree: DraftTree
    following: list[int]

    def path(self, size: int | None = None) -> list[int]:
        """Nodes that the text goes through, root first, in the tree of the first `size` nodes."""
        limit = len(self.tree) if size is None else size
        node, path = 0, [0]
        for token in self.following:
            child = self.tree.children[node].get(token)
            if child is None or child >= limit:
                break
            path.append(child)
            node = child
        return path

    def ending(self, size: int | None = None) -> str:
        """Why the walk ended: one of `ENDINGS`."""
        depth = len(self.path(size))
        if depth > min(len(self.following), self.tables.depth):
            return "whole-block"
        token, tree = self.following[depth - 1], self.tree
        limit = len(tree) if size is None else size
        if any(
            tree.depths[node] == depth and tree.tokens[node] == token
            for node in range(1, min(len(tree), limit))
        ):
            return "wrong-parent"
        listed = self.tables.tokens[depth - 1] == token
        reachable = self.tables.log_probs[depth - 1] > -float("inf")
        return "not-in-tree" if bool((listed & reachable).any()) else "not-in-tables"


def whole_blocks(length: int, size: int) -> range:
    """Places of a text of `length` tokens that a block of `size` slots fits behind, with at least
    one token before them."""
    return range(1, max(length - size + 1, 1))


@torch.inference_mode()
def simulate(
    target: Target,
    drafter: TreeFlashDraftModel,
    ids: Sequence[int],
    places: Sequence[int],
    settings: DraftSettings,
) -> list[SimulatedRound]:
    """A round at each of these places of a text, each as `SpeculativeDecoder` would draft it, with
    the temperature of sampled texts where the settings leave it out.

    Raises:
        ConfigError: a place without a token before it, or whose block does not fit.
    """
    size = settings.block_size or drafter.config.block_size
    fitting = whole_blocks(len(ids), size)
    if outside := [p for p in places if p not in fitting]:
        raise ConfigError(
            f"place {outside[0]} of a text of {len(ids)} tokens: a block of {size} needs a place "
            f"from 1 to {fitting.stop - 1}"
        )
    if not places:
        return []
    text = torch.tensor([list(ids)], device=target.device)
    blocks = blocks_at(text, text, torch.tensor([list(places)], device=target.device), size)
    hidden = _streams(target, drafter, text, blocks)
    anchors = blocks.tokens[0, :, 0].tolist()
    tables = batch_tables(
        drafter, hidden, anchors, target.embedding, target.head,
        top_m=settings.top_m, top_k=settings.top_k, shortlist=settings.shortlist,
        temperature=settings.drafting_temperature(greedy=False),
        marginal=settings.method == "marginal",
    )  # fmt: skip
    grow = chain if settings.method == "chain" else build_tree
    return [
        SimulatedRound(table, grow(table, anchor, settings.tree_size), following)
        for table, anchor, following in zip(
            tables, anchors, blocks.tokens[0, :, 1:].tolist(), strict=True
        )
    ]


def _streams(target: Target, drafter: TreeFlashDraftModel, text: Tensor, blocks: Blocks) -> Tensor:
    """Residual streams `[N, T, H]` of the blocks of one text `[1, S]`."""
    with target.features(drafter.config.target_layer_ids) as features:
        target.prefill(text[0], target.new_cache())
        seen = features()
    length, size = text.shape[1], blocks.tokens.shape[-1]
    positions = torch.arange(length, device=text.device)[None]
    context = drafter.model.context(seen.to(drafter.dtype), positions)
    inputs = drafter.block_input(blocks.tokens[..., 0], target.embedding, size)
    hidden = drafter.model(
        inputs.flatten(1, 2).to(drafter.dtype), blocks.positions.flatten(1), context,
        blocks.mask(length),
    )  # fmt: skip
    return hidden.view(-1, size, hidden.shape[-1])
