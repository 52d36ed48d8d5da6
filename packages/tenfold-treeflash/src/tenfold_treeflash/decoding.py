"""The draft-and-verify loop, one text at a time.

A round drafts a tree behind the newest token, runs all of it through the target in one pass, and
walks from the root: at each node the target itself chooses the next token, from the logits of
that node and with the real text so far; where the tree holds that token the walk goes on. So every
token is drawn by the target's own rule, whatever the tree is, and processors that look at the
text are exact. Choices are made in the order of the text, one draw each: the same random numbers
as plain decoding give the same text.

Shapes: `n` nodes, `V` vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tenfold.errors import ConfigError, nearest
from torch import Tensor

from tenfold_treeflash.costs import CostModel
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tables import transition_tables
from tenfold_treeflash.target import Target, own_masks
from tenfold_treeflash.tree import DraftTree, build_tree, chain, single

METHODS = ("tree", "marginal", "chain", "none")
"""TreeFlash, trees of marginals, the single best path, plain autoregression in the same loop."""


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """How rounds are drafted.

    Attributes:
        method: one of `METHODS`.
        tree_size: nodes that the target sees per round, the newest token included.
        top_m: candidates per depth whose followers are computed.
        top_k: followers considered per candidate.
        temperature: of the drafter's distributions.
        shortlist: rank followers among so many tokens per depth; None ranks all.
        block_size: slots used, at most the drafter's own; None uses all.
    """

    method: str = "tree"
    tree_size: int = 16
    top_m: int = 16
    top_k: int = 16
    temperature: float = 1.0
    shortlist: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        if self.method not in METHODS:
            raise ConfigError(
                f"method is {self.method!r}{nearest(self.method, METHODS)} "
                f"(known: {', '.join(METHODS)})"
            )
        for name in ("tree_size", "top_m", "top_k", "shortlist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.block_size is not None and self.block_size < 2:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 2")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more")


class Chooser(Protocol):
    """The target's own decoding rule."""

    greedy: bool
    """Whether it is the arg-max of the logits whatever the text is."""

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """The token after `ids`, from the target's logits `[V]`."""
        ...

    def ends(self, ids: list[int]) -> bool:
        """Whether the text ends with its newest token."""
        ...


@dataclass(slots=True)
class Round:
    """One round: the tree, the accepted nodes (root first), and the token after them."""

    tree: DraftTree
    path: list[int]
    token: int


@dataclass(slots=True)
class DecodingStats:
    """What happened, and where time went (seconds; only clocks, no device is synchronised).

    Attributes:
        prompt_tokens, new_tokens: lengths.
        accepted: tokens of each round, the target's own last one included.
        tree_sizes: nodes of each round's tree.
        seconds: time by stage: prefill, draft, tables, tree, verify, walk, commit.
        first_token_s: from the start to the first token.
        total_s: the whole call.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    tree_sizes: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def rounds(self) -> int:
        """Draft-and-verify rounds."""
        return len(self.accepted)

    @property
    def block_efficiency(self) -> float:
        """Mean number of tokens per round."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else float("nan")

    def acceptance_by_depth(self) -> list[float]:
        """Share of rounds that got past each drafted depth, given that they got there."""
        deepest = max(self.accepted, default=1)
        reached = [sum(a > depth for a in self.accepted) for depth in range(deepest)]
        counts = [self.rounds, *reached[1:]]
        return [b / a for a, b in itertools.pairwise(counts) if a]

    def to_json(self) -> dict[str, Any]:
        """Plain values for records."""
        return {
            "rounds": self.rounds,
            "block_efficiency": self.block_efficiency if self.accepted else None,
            "accepted": list(self.accepted),
            "tree_sizes": list(self.tree_sizes),
            "seconds": dict(self.seconds),
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
        }


class SpeculativeDecoder:
    """Decodes a target with a drafter.

    Args:
        target: the model to decode.
        drafter: None decodes without one.
        settings: how rounds are drafted.
        watch: called with every round.
        costs: cuts each tree to its best size; `tree_size` is then the largest.

    Raises:
        ConfigError: a method that needs a drafter without one, or a larger block than it has.
    """

    def __init__(
        self,
        target: Target,
        drafter: TreeFlashDraftModel | None,
        settings: DraftSettings | None = None,
        watch: Callable[[Round], None] | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.target, self.drafter = target, drafter
        self._costs = costs
        self.settings = settings or DraftSettings()
        self.watch = watch
        if drafter is None:
            if self.settings.method != "none":
                raise ConfigError(f"method {self.settings.method!r} needs a drafter")
            return
        target.check_drafter(drafter.config)
        for what, ours, theirs in (
            ("device", drafter.device, target.device), ("dtype", drafter.dtype, target.dtype),
        ):  # fmt: skip
            if ours != theirs:
                raise ConfigError(
                    f"the drafter's {what} is {ours}, the target's {theirs}; move one of them, "
                    f"as in drafter.to(target.{what})"
                )
        own, asked = drafter.config.block_size, self.settings.block_size
        if asked is not None and asked > own:
            raise ConfigError(f"block_size is {asked}; this drafter was trained for {own}")
        self._block = asked or own
        if self.settings.method == "tree" and drafter.looks_back > 1:
            raise ConfigError("trees need a drafter that looks back one token (swiglu or linear)")

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], chooser: Chooser) -> tuple[list[int], DecodingStats]:
        """Continues a prompt until the chooser ends it; returns prompt and text, and the record.

        Raises:
            ConfigError: an empty prompt.
        """
        if not len(prompt):
            raise ConfigError("the prompt is empty; give at least one token")
        with own_masks(self.target.model), self._reading() as features:
            return _Decoding(self, list(prompt), chooser, features).run()

    @property
    def drafts(self) -> bool:
        """Whether there is anything to draft."""
        settings = self.settings
        return self.drafter is not None and settings.method != "none" and settings.tree_size > 1

    def _reading(self) -> Any:
        read = self.drafter is not None and self.drafts
        layers = self.drafter.config.target_layer_ids if read else []
        return self.target.features(layers)

    def tree(self, cache: DraftCache, anchor: int, clock: _Clock) -> DraftTree:
        """Drafts one round."""
        settings, drafter, target = self.settings, self.drafter, self.target
        deepest = target.deepest(cache.length)
        if not self.drafts or drafter is None or deepest == 0:
            return single(anchor)
        embedding = target.embedding
        hidden = drafter.draft(cache, anchor, embedding, self._block)
        clock.lap("draft")
        tables = transition_tables(
            drafter, hidden, anchor, embedding, target.head,
            top_m=settings.top_m, top_k=settings.top_k, temperature=settings.temperature,
            shortlist=settings.shortlist, marginal=settings.method == "marginal",
        )  # fmt: skip
        clock.lap("tables")
        grow = chain if settings.method == "chain" else build_tree
        if deepest < tables.depth:
            tables = tables.upto(deepest)
        tree = grow(tables, anchor, settings.tree_size)
        if self._costs is not None:
            tree = tree.first(self._costs.best(tree.log_probs))
        clock.lap("tree")
        return tree


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Books the time since the last lap."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began


class _Decoding:
    """State of one `decode` call."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        prompt: list[int],
        chooser: Chooser,
        features: Callable[[], Tensor],
    ) -> None:
        self._decoder, self._target, self._drafter = decoder, decoder.target, decoder.drafter
        self._ids, self._chooser, self._features = prompt, chooser, features
        self._cache, self._context = decoder.target.new_cache(), DraftCache()
        self._stats = DecodingStats(prompt_tokens=len(prompt))
        self._clock = _Clock()

    def run(self) -> tuple[list[int], DecodingStats]:
        """The whole text."""
        ids, stats, clock = self._ids, self._stats, self._clock
        logits = self._target.prefill(torch.tensor(ids, device=self._target.device), self._cache)
        ids.append(self._chooser.choose(ids, logits))
        clock.lap("prefill")
        self._read(range(self._cache.length))
        stats.first_token_s = clock.elapsed
        clock.lap("draft")
        over = self._chooser.ends(ids)
        while not over:
            over = self._round()
        stats.new_tokens = len(ids) - stats.prompt_tokens
        stats.seconds, stats.total_s = clock.seconds, clock.elapsed
        return ids, stats

    def _round(self) -> bool:
        """Drafts, verifies and commits; whether the text has ended."""
        start, clock = self._cache.length, self._clock
        tree = self._decoder.tree(self._context, self._ids[-1], clock)
        logits = self._target.verify(tree, self._cache)
        clock.lap("verify")
        path, over = self._walk(tree, logits)
        clock.lap("walk")
        self._stats.accepted.append(len(path))
        self._stats.tree_sizes.append(len(tree))
        if self._decoder.watch is not None:
            self._decoder.watch(Round(tree, path, self._ids[-1]))
        if not over:
            self._cache.keep(start, path)
            self._read(path)
            clock.lap("commit")
        return over

    def _walk(self, tree: DraftTree, logits: Tensor) -> tuple[list[int], bool]:
        """Appends the round's tokens; the accepted nodes, and whether the text has ended."""
        chooser, ids = self._chooser, self._ids
        best = logits.argmax(-1).tolist() if chooser.greedy else None
        node, path = 0, [0]
        while True:
            token = chooser.choose(ids, logits[node]) if best is None else best[node]
            ids.append(token)
            if chooser.ends(ids):
                return path, True
            child = tree.children[node].get(token)
            if child is None:
                return path, False
            path.append(child)
            node = child

    def _read(self, nodes: Sequence[int]) -> None:
        """Hands the features of newly accepted tokens to the drafter."""
        if self._drafter is None or not self._decoder.drafts:
            return
        features = self._features()[0]
        if len(nodes) < features.shape[0]:
            features = features[torch.tensor(list(nodes), device=features.device)]
        first = self._context.length
        positions = torch.arange(first, first + len(nodes), device=features.device)
        self._drafter.extend(self._context, features[None], positions[None])
