"""`byzantine:consensus`: plays games and says how they ended.

Each item is a game and its values are one row of the result table. Games of all items share
waves, and with them the calls of the models; how many do changes nothing but speed. Event logs
lie under the run's artifacts, so that every game can be replayed and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError, nearest
from tenfold.records import ItemResult, Metrics, WorkItem, WorkItems

from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog
from tenfold_byzantine.grid import KEEP_PROMPTS
from tenfold_byzantine.play import play_many
from tenfold_byzantine.presets import PRESETS
from tenfold_byzantine.replay import resume
from tenfold_byzantine.result import GROUPINGS
from tenfold_byzantine.roster import NoModelError, Roster, by_role
from tenfold_byzantine.rows import game_row
from tenfold_byzantine.rules import GameConfig, Group
from tenfold_byzantine.summary import Cell, cell_metrics, collect, compare, comparison_metrics

if TYPE_CHECKING:
    from tenfold.report import Block

EVENTS = "events"
DATASET = "games"


class Consensus:
    """The evaluator.

    Args:
        honest: policy of all honest agents, e.g. `low-median`, instead of the games' own.
        byzantine: the same for Byzantine agents.
        width: games in a wave.
        taxonomy: how outcomes are grouped: `full`, `paper-text` or `paper-figures`.
        base: label of the cell that others are compared with; empty: the first.
        reference: preset whose published rates stand beside ours.
        events: write event logs.
        keep_prompts: what they keep of prompts: `full`, `hash` or `none`.
        stories: games that the report shows in full, one per outcome.
        unsafe: run algorithms outside of their bounds.

    Raises:
        ConfigError: an unknown taxonomy or preset.
    """

    def __init__(
        self,
        honest: str | None = None,
        byzantine: str | None = None,
        width: int = 64,
        taxonomy: str = "full",
        base: str = "",
        reference: str | None = None,
        events: bool = True,
        keep_prompts: str = "hash",
        stories: int = 6,
        unsafe: bool = False,
    ) -> None:
        for what, value, known in (
            ("taxonomy", taxonomy, GROUPINGS),
            ("keep_prompts", keep_prompts, KEEP_PROMPTS),
            ("reference", reference, PRESETS),
        ):
            if value is not None and value not in known:
                raise ConfigError(
                    f"{what} is {value!r}{nearest(value, known)} (known: {', '.join(known)})"
                )
        self.sides = {"honest": honest, "byzantine": byzantine}
        self.width, self.taxonomy, self.base, self.reference = width, taxonomy, base, reference
        self.events, self.keep_prompts, self.stories = events, keep_prompts, stories
        self.unsafe = unsafe

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every game of the dataset."""
        games = data[DATASET]
        total = len(games) if isinstance(games, Sized) else None
        return WorkItems((WorkItem(record.id, record) for record in games.load()), total)

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Plays the games in waves and gives each row as soon as its game is over.

        A game whose backend failed is a failed item, played again by the next `--resume`.

        Raises:
            NoModelError: agents are language models and the run has none for them.
        """
        roster = Roster(by_role(models), unsafe=self.unsafe)
        waiting: dict[str, list[WorkItem]] = {}
        refused: list[ItemResult] = []
        logs: dict[str, EventLog] = {}

        def games() -> Iterator[Game]:
            for item in items:
                try:
                    config = self._config(item.payload.settings)
                    cast = roster.cast(config)
                    name = cast.game_id(config.seed)
                    # Two items can be the same game; it has one log.
                    log = None if name in logs else self._log(ctx, name)
                    game = Game(config, cast, log=log)
                    if log is not None:
                        resume(game, log.path)
                except ConfigError as error:
                    refused.append(ItemResult(item.id, error=str(error)))
                    continue
                if log is not None:
                    logs[name] = log
                waiting.setdefault(name, []).append(item)
                yield game

        try:
            for result in play_many(games(), width=self.width):
                log = logs.pop(result.game_id, None)
                if log is not None:
                    log.flush()
                item = waiting[result.game_id].pop(0)
                ctx.log("game", item=item.id, game=result.game_id, seconds=dict(result.timing))
                if result.error:
                    yield ItemResult(item.id, error=result.error)
                    continue
                place = item.payload.metadata
                yield ItemResult(
                    item.id,
                    game_row(
                        result,
                        cell=place.get("cell", {}),
                        replicate=place.get("replicate", 0),
                        sweep=place.get("sweep", ""),
                    ),
                )
                yield from _drained(refused)
        finally:
            for log in logs.values():
                log.close()
        yield from _drained(refused)

    def _config(self, settings: Mapping[str, Any]) -> GameConfig:
        config = GameConfig.from_table(settings)
        for side, use in self.sides.items():
            count = getattr(config, f"n_{side}")
            if use is not None and count:
                config = replace(config, **{side: (Group(count, use),)})
        return config

    def _log(self, ctx: Context, name: str) -> EventLog | None:
        if not self.events:
            return None
        folder = Path(ctx.artifacts) / EVENTS
        return EventLog(folder, name, self.keep_prompts)  # ty: ignore[invalid-argument-type]

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Rates, properties and times per cell, and every cell against the base cell.

        Raises:
            ConfigError: no cell has the label of `base`.
        """
        cells = self._cells(results)
        alone = len(cells) == 1
        metrics = [m for cell in cells for m in cell_metrics(cell, self.taxonomy, alone=alone)]
        used = [cell for cell in cells if cell.games]
        if len(used) > 1:
            metrics += comparison_metrics(compare(used, self._base(used)))
        return metrics

    @staticmethod
    def _cells(results: Iterable[ItemResult]) -> list[Cell]:
        return collect(result.values for result in results)

    def _base(self, cells: list[Cell]) -> int:
        labels = [cell.label for cell in cells]
        if not self.base:
            return 0
        if self.base not in labels:
            raise ConfigError(
                f"base is {self.base!r}, but no cell has that label{nearest(self.base, labels)} "
                f"(cells: {'; '.join(labels)})"
            )
        return labels.index(self.base)

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Rates, outcomes, time, comparisons, and one game of each outcome in full."""
        from tenfold_byzantine.reports import report_blocks
        from tenfold_byzantine.stories import Examples

        examples = Examples(Path(ctx.artifacts) / EVENTS, self.stories)
        cells = collect(examples.watch(result.values for result in results))
        published = () if self.reference is None else PRESETS[self.reference].published
        yield from report_blocks(
            cells,
            published=published,
            stories=examples.stories(),
            taxonomy=self.taxonomy,
            base=self._base([c for c in cells if c.games] or cells) if cells else 0,
        )


def _drained(results: list[ItemResult]) -> Iterator[ItemResult]:
    while results:
        yield results.pop(0)


__all__ = ["Consensus", "NoModelError"]
