"""The draft-and-verify loop.

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

from tenfold_treeflash.batch_decoding import BatchDecoding
from tenfold_treeflash.costs import TableSize
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.planning import Planner, Planners
from tenfold_treeflash.rejection import (
    RankRates,
    SampledTree,
    best_shape,
    path_shape,
    sample_tree,
    walk_by_rejection,
)
from tenfold_treeflash.tables import batch_tables
from tenfold_treeflash.target import Target, own_masks
from tenfold_treeflash.tree import DraftTree, TransitionTables, build_tree, chain, single

METHODS = ("tree", "marginal", "chain", "none")
"""TreeFlash, trees of marginals, the single best path, plain autoregression in the same loop."""

VERIFICATIONS = ("match", "rejection")

GREEDY_TEMPERATURE = 0.3
"""Of corrected distributions for greedy texts. Corrections learn the model's distributions, and
greedy decoding follows their peaks: at 1 a tree grows broad where it should grow deep."""


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """How rounds are drafted.

    Attributes:
        method: one of `METHODS`.
        tree_size: nodes that the target sees per round, the newest token included.
        top_m: candidates per depth whose followers are computed.
        top_k: followers considered per candidate.
        temperature: of the drafter's distributions. None is the published 1, and
            `GREEDY_TEMPERATURE` where corrected distributions draft greedy texts.
        shortlist: rank followers among so many tokens per depth; None ranks all.
        block_size: slots used, at most the drafter's own; None uses all.
        verification: `match` draws the target's token and looks for it in a tree of the best
            tokens; `rejection` draws the tree's tokens too and accepts or refuses them. Both
            keep the target's distribution; only `match` keeps its stream of random numbers.
    """

    method: str = "tree"
    tree_size: int = 16
    top_m: int = 16
    top_k: int = 16
    temperature: float | None = None
    shortlist: int | None = None
    block_size: int | None = None
    verification: str = "match"

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        if self.method not in METHODS:
            raise ConfigError(
                f"method is {self.method!r}{nearest(self.method, METHODS)} "
                f"(known: {', '.join(METHODS)})"
            )
        if self.verification not in VERIFICATIONS:
            raise ConfigError(
                f"verification is {self.verification!r}{nearest(self.verification, VERIFICATIONS)} "
                f"(known: {', '.join(VERIFICATIONS)})"
            )
        for name in ("tree_size", "top_m", "top_k", "shortlist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.block_size is not None and self.block_size < 2:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 2")
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more")

    def drafting_temperature(self, greedy: bool) -> float:
        """The drafter's temperature for greedy texts, or for others."""
        if self.temperature is not None:
            return self.temperature
        return GREEDY_TEMPERATURE if greedy and self.method in ("tree", "chain") else 1.0


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
        """Share of rounds that accepted a token at each drafted depth, of those that accepted
        one at the depth before; up to the deepest accepted."""
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
        budget: how many of a tree's nodes the target is to see, from the tree (its likeliest
            nodes come first) and the number of cached tokens; None shows all `tree_size`. Trees
            of draws are not cut: their shape must not depend on them.
        planners: decide by measured time whether a round drafts, how wide its tables are and how
            many of at most `tree_size` nodes are verified.

    Raises:
        ConfigError: a method that needs a drafter without one, or a larger block than it has.
    """

    def __init__(
        self,
        target: Target,
        drafter: TreeFlashDraftModel | None,
        settings: DraftSettings | None = None,
        watch: Callable[[Round], None] | None = None,
        budget: Callable[[DraftTree, int], int] | None = None,
        planners: Planners | None = None,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.settings = settings or DraftSettings()
        self.watch, self.budget, self.planners = watch, budget, planners
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
        if self.settings.method in ("tree", "chain") and drafter.looks_back > 1:
            raise ConfigError(
                f"method {self.settings.method!r} needs a drafter that looks back one token "
                "(swiglu or linear); this one (swiglu2) drafts with method 'marginal' only"
            )

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], chooser: Chooser) -> tuple[list[int], DecodingStats]:
        """Continues a prompt until the chooser ends it; returns prompt and text, and the record.

        Raises:
            ConfigError: an empty prompt.
        """
        _check_prompts([prompt])
        with own_masks(self.target.model), self._reading() as features:
            return _Decoding(self, list(prompt), chooser, features).run()

    @torch.inference_mode()
    def decode_batch(
        self, prompts: Sequence[Sequence[int]], choosers: Sequence[Chooser]
    ) -> tuple[list[list[int]], list[DecodingStats]]:
        """Continues prompts side by side, each as `decode` would alone.

        Where a pass's longest row decides how all its keys are rotated, rows run one by one.

        Raises:
            ConfigError: an empty prompt, or none.
        """
        _check_prompts(prompts)
        if self.target.turns:
            alone = [self.decode(*row) for row in zip(prompts, choosers, strict=True)]
            return [text for text, _ in alone], [stats for _, stats in alone]
        with own_masks(self.target.model), self._reading() as features:
            return BatchDecoding(self, prompts, choosers, features).run()

    @property
    def drafts(self) -> bool:
        """Whether there is anything to draft."""
        settings = self.settings
        return self.drafter is not None and settings.method != "none" and settings.tree_size > 1

    def planner(self, choosers: Sequence[Chooser]) -> Planner | None:
        """What decides about rounds of these texts."""
        if self.planners is None or not self.drafts:
            return None
        return self.planners.of(len(choosers), all(chooser.greedy for chooser in choosers))

    def _reading(self) -> Any:
        read = self.drafter is not None and self.drafts
        layers = self.drafter.config.target_layer_ids if read else []
        return self.target.features(layers)

    # --- One round ----------------------------------------------------------------------------

    def new_rates(self) -> RankRates:
        """What a text learns about its rounds; empty at its start."""
        return RankRates(self.settings.top_k)

    def tree(
        self, cache: DraftCache, anchor: int, chooser: Chooser, rates: RankRates, clock: Clock
    ) -> DraftTree:
        """Drafts a round of one text."""
        if not self.drafts or self.drafter is None or self.target.deepest(cache.length) == 0:
            return single(anchor)
        planner = self.planner([chooser])
        embedding = self.target.embedding
        hidden = self.drafter.draft(cache, anchor, embedding, self._block)
        clock.lap("draft")
        tables = self._tables(hidden[None], [anchor], [chooser], planner)[0]
        clock.lap("tables")
        tree = self._grow(tables, anchor, cache.length, chooser, rates, planner)
        clock.lap("tree")
        return tree

    def trees(
        self,
        cache: DraftCache,
        anchors: Sequence[int],
        lengths: Sequence[int],
        choosers: Sequence[Chooser],
        rates: Sequence[RankRates],
        clock: Clock,
    ) -> list[DraftTree]:
        """Drafts a round of several texts, whose contexts have these lengths."""
        planner = self.planner(choosers)
        paused = planner is not None and not planner.drafts
        if paused or not self.drafts or self.drafter is None:
            return [single(anchor) for anchor in anchors]
        embedding = self.target.embedding
        hidden = self.drafter.draft_rows(cache, anchors, embedding, self._block, lengths)
        clock.lap("draft")
        tables = self._tables(hidden, anchors, choosers, planner)
        clock.lap("tables")
        trees = [
            self._grow(*row, planner)
            for row in zip(tables, anchors, lengths, choosers, rates, strict=True)
        ]
        clock.lap("tree")
        return trees

    def _tables(
        self,
        hidden: Tensor,
        anchors: Sequence[int],
        choosers: Sequence[Chooser],
        planner: Planner | None,
    ) -> list[TransitionTables]:
        settings = self.settings
        greedy = all(chooser.greedy for chooser in choosers)
        assert self.drafter is not None
        size = TableSize(settings.top_m, settings.top_k, settings.shortlist)
        if planner is not None:
            size = planner.table_size or size
        return batch_tables(
            self.drafter, hidden, anchors, self.target.embedding, self.target.head,
            temperature=settings.drafting_temperature(greedy),
            marginal=settings.method == "marginal", **size._asdict(),
        )  # fmt: skip

    def _grow(
        self,
        tables: TransitionTables,
        anchor: int,
        start: int,
        chooser: Chooser,
        rates: RankRates,
        planner: Planner | None,
    ) -> DraftTree:
        """A tree from tables, below an anchor at position `start`."""
        size, straight = self.settings.tree_size, self.settings.method == "chain"
        tables = tables.upto(min(self.target.deepest(start), tables.depth))
        if self.settings.verification == "match" or not getattr(chooser, "sample", False):
            if planner is not None and not straight:
                planner.look(tables, anchor)
            tree = (chain if straight else build_tree)(tables, anchor, size)
            if planner is not None:
                return tree.first(planner.size(tree))
            return tree if self.budget is None else tree.first(max(self.budget(tree, start), 1))
        width = tables.tokens.shape[2]
        shape = (
            path_shape(size, tables.depth) if straight
            else best_shape(rates.rates()[:width], size, tables.depth)
        )  # fmt: skip
        drawer: Any = chooser
        return sample_tree(tables, anchor, shape, drawer.generator)

    def walk(
        self,
        tree: DraftTree,
        logits: Tensor,
        ids: list[int],
        chooser: Chooser,
        rates: RankRates,
        best: list[int] | None,
    ) -> tuple[list[int], bool]:
        """Appends a round's tokens to `ids`; the accepted nodes, and whether the text has ended.

        `best` holds the arg-max of every node where that is the rule.
        """
        if isinstance(tree, SampledTree):
            drawer: Any = chooser
            return walk_by_rejection(tree, logits, ids, drawer, rates)
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

    def record(self, stats: DecodingStats, tree: DraftTree, path: list[int], token: int) -> None:
        """Books a round."""
        stats.accepted.append(len(path))
        stats.tree_sizes.append(len(tree))
        if self.watch is not None:
            self.watch(Round(tree, path, token))


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ConfigError("the prompt is empty; give at least one token")


class Clock:
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
        """Seconds since the start."""
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
        self._rates = decoder.new_rates()
        self._clock = Clock()
        self._planner = decoder.planner([chooser])
        self._unread: list[Tensor] = []

    def run(self) -> tuple[list[int], DecodingStats]:
        """The whole text."""
        over = self.begin()
        while not over:
            over = self.round()
        stats = self._stats
        stats.new_tokens = len(self._ids) - stats.prompt_tokens
        stats.seconds, stats.total_s = self._clock.seconds, self._clock.elapsed
        return self._ids, stats

    def begin(self) -> bool:
        """Reads the prompt and chooses the first token; whether the text has ended."""
        ids, clock = self._ids, self._clock
        logits = self._target.prefill(torch.tensor(ids, device=self._target.device), self._cache)
        ids.append(self._chooser.choose(ids, logits))
        clock.lap("prefill")
        self._read(range(self._cache.length))
        self._stats.first_token_s = clock.elapsed
        clock.lap("draft")
        return self._chooser.ends(ids)

    def round(self) -> bool:
        """Drafts, verifies and commits; whether the text has ended."""
        start, clock = self._cache.length, self._clock
        chooser, ids, planner = self._chooser, self._ids, self._planner
        began = clock.elapsed
        if self._drafting:
            self._catch_up()
            tree = self._decoder.tree(self._context, ids[-1], chooser, self._rates, clock)
        else:
            tree = single(ids[-1])
        logits = self._target.verify(tree, self._cache)
        clock.lap("verify")
        best = logits.argmax(-1).tolist() if chooser.greedy else None
        path, over = self._decoder.walk(tree, logits, ids, chooser, self._rates, best)
        clock.lap("walk")
        self._decoder.record(self._stats, tree, path, ids[-1])
        if not over:
            self._cache.keep(start, path)
            self._read(path)
            clock.lap("commit")
        if planner is not None:
            planner.book([tree], [len(path)], clock.elapsed - began)
        return over

    @property
    def _drafting(self) -> bool:
        return self._planner is None or self._planner.drafts

    def _read(self, nodes: Sequence[int]) -> None:
        """Takes the features of newly accepted tokens for the drafter."""
        if self._drafter is None or not self._decoder.drafts:
            return
        features = self._features()[0]
        if len(nodes) < features.shape[0]:
            features = features[torch.tensor(list(nodes), device=features.device)]
        self._unread.append(features)
        if self._drafting:
            self._catch_up()

    def _catch_up(self) -> None:
        """Hands what was taken to the drafter: at once, unless drafting pauses."""
        if self._drafter is None or not self._unread:
            return
        features = self._unread[0] if len(self._unread) == 1 else torch.cat(self._unread)
        self._unread.clear()
        first = self._context.length
        positions = torch.arange(first, first + features.shape[0], device=features.device)
        self._drafter.extend(self._context, features[None], positions[None])
