"""What a report of many games shows: rates, time, outcomes, comparisons, and games in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tenfold.report import Badges, Block, Columns, Details, Heading, Paragraph, Table
from tenfold.stats import wilson

from tenfold_byzantine import plots
from tenfold_byzantine.presets import Published
from tenfold_byzantine.result import GROUPINGS, GameResult
from tenfold_byzantine.rows import game_row
from tenfold_byzantine.statistics import Difference, Mean
from tenfold_byzantine.summary import KEY_MEASURES, PROPERTIES, Cell, compare, effects


@dataclass(frozen=True, slots=True)
class Story:
    """One game that the report shows in full: its result, and the blocks of its transcript."""

    title: str
    result: GameResult
    transcript: Sequence[Block] = field(default_factory=tuple)


def percent(count: int, n: int) -> str:
    """`58.0 % [44.2, 70.6]`; a dash without games."""
    interval = wilson(count, n)
    if interval is None:
        return "–"
    return f"{100 * count / n:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def mean_text(mean: Mean | None, digits: int = 1) -> str:
    """`14.7 ± 6.2`; without an interval the number of values instead."""
    if mean is None:
        return "–"
    if mean.interval is None:
        return f"{mean.value:.{digits}f} (n = {mean.n})"
    return f"{mean.value:.{digits}f} ± {mean.interval[1] - mean.value:.{digits}f}"


def report_blocks(
    cells: Sequence[Cell],
    *,
    published: Sequence[Published] = (),
    stories: Sequence[Story] = (),
    taxonomy: str = "full",
    paired: bool = True,
    base: int = 0,
) -> Iterator[Block]:
    """The blocks of a report, most wanted first."""
    yield Heading("How games ended")
    yield rates_table(cells, taxonomy)
    yield plots.rates(cells, published)
    if published:
        yield published_table(published)
    if (grid := plots.heatmap(cells)) is not None:
        yield grid
    yield Heading("Outcomes in detail")
    yield plots.outcomes(cells)
    yield properties_table(cells)
    yield Heading("Time")
    yield plots.survival(cells)
    yield time_table(cells)
    used = [cell for cell in cells if cell.games]
    if len(used) > 1:
        yield from comparison_blocks(used, base, paired=paired)
    yield from cost_blocks(cells)
    if stories:
        yield Heading("Games")
    for story in stories:
        yield Details(story.title, list(game_blocks(story.result, story.transcript)))


def rates_table(cells: Sequence[Cell], taxonomy: str = "full") -> Table:
    """Games and rates per cell, grouped by a taxonomy."""
    labels = list(dict.fromkeys(GROUPINGS[taxonomy].values()))
    rows = []
    for cell in cells:
        counts = dict.fromkeys(labels, 0)
        for outcome, n in cell.outcomes.items():
            counts[GROUPINGS[taxonomy][outcome.partition(".")[0]]] += n
        shown = [percent(counts[label], cell.games) for label in labels]
        rows.append([cell.label, cell.games, *shown, cell.errors or None])
    return Table(
        ["cell", "games", *labels, "errors"],
        rows,
        caption="Rates with 95 % Wilson intervals. Games whose backend failed are in no rate.",
    )


def published_table(published: Sequence[Published]) -> Table:
    """What the paper found."""
    rows = [
        [
            row.model,
            row.awareness,
            row.honest,
            row.byzantine,
            row.runs,
            percent(row.successes, row.runs),
            f"{row.invalid} %",
            None if row.rounds is None else _published_rounds(row),
        ]
        for row in published
    ]
    return Table(
        ["model", "prompt", "H", "B", "runs", "valid", "invalid", "rounds when valid"],
        rows,
        caption="Published rates (arXiv:2603.01213, read from the figures), for reference: "
        "measured by others, with their models.",
    )


def _published_rounds(row: Published) -> str:
    half = "" if row.rounds_half is None else f" ± {row.rounds_half}"
    return f"{row.rounds}{half}"


def properties_table(cells: Sequence[Cell]) -> Table:
    """The classical properties per cell."""
    rows = [
        [
            cell.label,
            *(percent(cell.properties[name], cell.games) for name in PROPERTIES),
            percent(cell.games - cell.properties["termination"], cell.games),
            percent(cell.safety_failures, cell.games),
        ]
        for cell in cells
    ]
    names = [name.replace("_", " ") for name in PROPERTIES]
    return Table(
        ["cell", *names, "liveness failures", "safety failures"],
        rows,
        caption="Strong validity: the value was an honest agent's initial one. Hull validity: it "
        "lay between them. Liveness fails without a stop; safety fails where a stop was wrong.",
    )


def time_table(cells: Sequence[Cell]) -> Table:
    """Restricted mean time to a valid end, and the paper's mean over valid games."""
    rows = [
        [
            cell.label,
            cell.games,
            f"{cell.survival.restricted_mean(cell.deadline):.2f}" if cell.games else None,
            cell.deadline or None,
            mean_text(cell.rounds),
            cell.count("VALID"),
        ]
        for cell in cells
    ]
    return Table(
        ["cell", "games", "restricted mean rounds", "deadline", "rounds when valid", "valid"],
        rows,
        caption="The restricted mean counts every game, one that never became valid with its "
        "deadline. The mean over valid games is what the paper prints; it forgets the failures.",
    )


def comparison_blocks(
    cells: Sequence[Cell], base: int = 0, *, paired: bool = True
) -> Iterator[Block]:
    """Each cell against the base, and a regression over all."""
    yield Heading("Comparisons")
    rows = []
    for c in compare(cells, base, paired=paired):
        d = c.difference
        rows.append(
            [
                c.cell.label,
                None
                if d is None
                else f"{100 * d.value:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]",
                f"{c.p:.4g}",
                f"{c.p_holm:.4g}",
                None if c.paired is None else f"{c.paired.only_first} : {c.paired.only_second}",
                None if c.paired is None else f"{c.paired.p:.4g}",
                None if c.paired is None else f"{c.same} of {c.paired.pairs}",
            ]
        )
    yield Table(
        [
            "cell",
            "valid, points",
            "Fisher p",
            "Holm p",
            "only here : only base",
            "McNemar p",
            "same course",
        ],
        rows,
        caption=f"Against {cells[base].label}: difference with Newcombe's interval; Fisher's exact "
        "test, adjusted for the family; McNemar's exact test over games of one "
        "seed, and how many of those went the same way.",
    )
    found = effects(cells)
    if found:
        yield Table(
            ["term", "log odds ratio", "95 % interval", "p"],
            [
                [
                    e.name,
                    round(e.value, 3),
                    f"{e.interval[0]:.3f} – {e.interval[1]:.3f}",
                    f"{e.p:.3g}",
                ]
                for e in found
            ],
            caption="Logistic regression of valid over all games, with Firth's penalty.",
        )


def _points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]"


def cost_blocks(cells: Sequence[Cell]) -> Iterator[Block]:
    """Means of measures, and counters per game."""
    names = sorted({name for cell in cells for name in cell.counters})
    measured = [n for n in KEY_MEASURES if any(n in cell.metrics for cell in cells)]
    if not names and not measured:
        return
    yield Heading("Behaviour and cost")
    rows = []
    for cell in cells:
        sums = [cell.metrics.get(name) for name in measured]
        means = [None if s is None else round(s.mean, 4) for s in sums]
        per_game = [round(cell.counters[n] / cell.games, 2) if cell.games else None for n in names]
        rows.append([cell.label, *means, *per_game])
    yield Table(
        ["cell", *(n.replace("_", " ") for n in [*measured, *names])],
        rows,
        caption="Measures are means over games where they are defined; the rest is per game.",
    )


def game_blocks(result: GameResult, transcript: Sequence[Block] = ()) -> Iterator[Block]:
    """One game: outcome, course, votes, influence, and what was said."""
    yield Badges(game_badges(result))
    if result.error:
        yield Paragraph(f"The backend failed: {result.error}")
    if not result.rounds:
        return
    yield plots.trajectory(result)
    yield Columns([[plots.votes(result)], [plots.blocs(result)]])
    if any(value for line in plots.adoptions(result) for value in line):
        yield plots.influence(result)
    yield from transcript


def game_badges(result: GameResult) -> Mapping[str, str | int | None]:
    """Facts of one game in a line."""
    row = game_row(result)
    flags = {k: v if isinstance(v, str | int) else str(v) for k, v in result.flags.items()}
    return {
        "outcome": result.outcome.value,
        "rounds": result.rounds,
        "decided": row["decided"],
        "honest": row["n_honest"],
        "Byzantine": row["n_byzantine"],
        "game": result.game_id,
        **{k.replace("_", " "): v for k, v in flags.items()},
    }
