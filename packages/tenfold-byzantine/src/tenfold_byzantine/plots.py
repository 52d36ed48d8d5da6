"""Charts of games and of cells, as report blocks.

One game: trajectory, votes, blocs, influence. Many: rates by setting, rates over n × f, time to
a valid end, outcomes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tenfold.report import Bars, HeatMap, Lines
from tenfold.stats import Interval, wilson

from tenfold_byzantine.contracts import agent_name
from tenfold_byzantine.presets import Published
from tenfold_byzantine.result import GROUPINGS, GameResult
from tenfold_byzantine.summary import Cell, setting_name

VOTE_SIGNS = {"stop": 1.0, "continue": 0.0, "abstain": -1.0}
MAX_BLOCS = 24


def seat(result: GameResult, agent: int) -> str:
    """`agent_3`, with `(B)` behind a Byzantine one."""
    mark = " (B)" if result.roles[agent] == "byzantine" else ""
    return agent_name(agent) + mark


def trajectory(result: GameResult) -> Lines:
    """Value held per agent and round, honest agents first; round 0 is the initial value."""
    order = sorted(range(len(result.roles)), key=lambda a: (result.roles[a] != "honest", a))
    series = {}
    for agent in order:
        points = [(float(t + 1), float(v)) for t, v in _known(h[agent] for h in result.held)]
        first = result.initial[agent]
        if first is not None:
            points.insert(0, (0.0, float(first)))
        series[seat(result, agent)] = points
    return Lines(series, "round", "value held", caption="Values held; (B) marks Byzantine agents.")


def _known(values: object) -> list[tuple[int, int]]:
    return [(i, v) for i, v in enumerate(values) if v is not None]  # ty: ignore[invalid-argument-type]


def votes(result: GameResult) -> HeatMap:
    """Votes per agent and round."""
    agents = range(len(result.roles))
    return HeatMap(
        [seat(result, a) for a in agents],
        [str(t + 1) for t in range(len(result.votes))],
        [[VOTE_SIGNS[line[a]] for line in result.votes] for a in agents],
        [[line[a] for line in result.votes] for a in agents],
        column_label="round",
        caption="Votes: orange stop, plain continue, blue abstain.",
        scale=1.0,
    )


def blocs(result: GameResult) -> HeatMap:
    """How many honest agents hold each value, round by round; the largest blocs ever first."""
    counts = [Counter(held[a] for a in result.honest) for held in result.held]
    largest: Counter[int] = Counter()
    for count in counts:
        for value, n in count.items():
            if value is not None:
                largest[value] = max(largest[value], n)
    values = sorted(largest, key=lambda v: (-largest[v], v))
    shown = values[:MAX_BLOCS]
    left_out = f" {len(values) - len(shown)} smaller values are left out." if values[24:] else ""
    return HeatMap(
        [str(v) for v in shown],
        [str(t + 1) for t in range(len(counts))],
        [[float(count[v]) for count in counts] for v in shown],
        [[str(count[v]) if count[v] else "" for count in counts] for v in shown],
        row_label="value",
        column_label="round",
        caption=f"Honest agents per value.{left_out}",
        scale=float(len(result.honest)),
    )


def adoptions(result: GameResult) -> list[list[float]]:
    """`[N][N]`: how often row's agent moved to what column's agent had proposed the round before.

    Only honest agents' moves count; a move to a value that k agents proposed gives each 1/k.
    """
    n = len(result.roles)
    found = [[0.0] * n for _ in range(n)]
    for t in range(1, result.rounds):
        for agent in result.honest:
            value = result.held[t][agent]
            if value is None or value == result.held[t - 1][agent]:
                continue
            said = [s for s in range(n) if s != agent and result.proposed[t - 1][s] == value]
            for sender in said:
                found[agent][sender] += 1 / len(said)
    return found


def influence(result: GameResult) -> HeatMap:
    """Who moved to whose value, see `adoptions`."""
    found = adoptions(result)
    honest = result.honest
    return HeatMap(
        [seat(result, a) for a in honest],
        [seat(result, s) for s in range(len(result.roles))],
        [[value or None for value in found[a]] for a in honest],
        [["" if value == 0 else f"{value:.2g}" for value in found[a]] for a in honest],
        row_label="moved",
        column_label="to the value of",
        caption="Moves of honest agents to what another had proposed the round before; equal "
        "proposals share a move.",
    )


def rates(cells: Sequence[Cell], published: Sequence[Published] = (), kind: str = "VALID") -> Bars:
    """Rate of an outcome per cell in percent, with Wilson intervals; the paper's rates below."""
    labels: list[str] = []
    values: list[float] = []
    intervals: list[Interval | None] = []
    for cell in cells:
        if cell.games:
            labels.append(cell.label)
            values.append(100 * cell.count(kind) / cell.games)
            intervals.append(_percent(wilson(cell.count(kind), cell.games)))
    for row in published if kind == "VALID" else ():
        labels.append(row.label)
        values.append(float(row.valid))
        intervals.append(_percent(row.interval))
    words = GROUPINGS["full"].get(kind, kind.lower())
    return Bars(labels, values, intervals, "%", f"Share of {words} games, 95 % Wilson intervals.")


def _percent(interval: Interval | None) -> Interval | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])


def heatmap(cells: Sequence[Cell]) -> HeatMap | None:
    """Valid rate over group size (rows) and Byzantine agents (columns); None for fewer than two
    different pairs. Cells that differ in other settings are pooled."""
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    for cell in cells:
        valid, games = cell.valid
        if games:
            before = sums.get(cell.agents, (0, 0))
            sums[cell.agents] = (before[0] + valid, before[1] + games)
    if len(sums) < 2:
        return None
    rows = sorted({h for h, _ in sums})
    columns = sorted({b for _, b in sums})
    values = [[_rate(sums.get((h, b))) for b in columns] for h in rows]
    texts = [[_rate_text(sums.get((h, b))) for b in columns] for h in rows]
    return HeatMap(
        [f"H={h}" for h in rows],
        [f"B={b}" for b in columns],
        values,
        texts,
        caption="Valid rate by honest (rows) and Byzantine agents (columns).",
        scale=1.0,
    )


def _rate(count: tuple[int, int] | None) -> float | None:
    return None if count is None else count[0] / count[1]


def _rate_text(count: tuple[int, int] | None) -> str:
    return "" if count is None else f"{100 * count[0] / count[1]:.0f} %"


def survival(cells: Sequence[Cell]) -> Lines:
    """Share of games that were valid by each round (1 - Kaplan-Meier), as stairs."""
    series = {}
    for cell in cells:
        curve = cell.survival
        points, value = [(0.0, 0.0)], 0.0
        for t, s in zip(curve.times, curve.survival, strict=True):
            points += [(float(t), value), (float(t), 1 - s)]
            value = 1 - s
        if cell.games:
            series[cell.label] = [*points, (float(cell.deadline), value)]
    return Lines(
        series,
        "round",
        "valid by then",
        caption="A game that ended otherwise stays in the denominator until its deadline.",
    )


def outcomes(cells: Sequence[Cell]) -> HeatMap:
    """Share of each outcome, down to its sub-class, per cell."""
    names = sorted({name for cell in cells for name in cell.outcomes}, key=_outcome_order)
    used = [cell for cell in cells if cell.games]
    return HeatMap(
        [cell.label for cell in used],
        names,
        [[cell.outcomes[name] / cell.games for name in names] for cell in used],
        [[_rate_text((cell.outcomes[n], cell.games)) for n in names] for cell in used],
        caption="Outcomes; the sub-classes are defined by what the agents held, not by a model.",
        scale=1.0,
    )


def _outcome_order(name: str) -> tuple[int, str]:
    order = ("VALID", "INVALID", "PREMATURE", "TIMEOUT")
    top = name.partition(".")[0]
    return order.index(top) if top in order else len(order), name


def setting_names(cells: Sequence[Cell]) -> list[str]:
    """Short names of the settings that the cells differ in, in the order they appear."""
    paths = dict.fromkeys(path for cell in cells for path in cell.coordinates)
    return [setting_name(path) for path in paths]
