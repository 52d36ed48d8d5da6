"""Rows, cells and reports of hand-made games."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path

import pytest
from tenfold.errors import ConfigError
from tenfold.report import HeatMap, render_html, render_markdown, render_svg

sys.path.insert(0, str(Path(__file__).parent))

from host_cases import game
from tenfold_byzantine import plots
from tenfold_byzantine.presets import PRESETS, Q1, Q2, preset, preset_table, published_for
from tenfold_byzantine.reports import Story, percent, report_blocks
from tenfold_byzantine.rows import export, flat, game_row, table_text, top
from tenfold_byzantine.summary import cell_label, cell_metrics, collect, compare, effects


def rows_of(outcomes, coordinates, start=0):
    return [
        game_row(game(outcome, seed=r), cell=coordinates, replicate=r, sweep="s")
        for r, outcome in enumerate(outcomes, start)
    ]


BASE = {"game.n_byzantine": 0, "honest.use": "low-median"}
OTHER = {"game.n_byzantine": 2, "honest.use": "low-median"}


@pytest.fixture
def rows():
    first = rows_of(["VALID"] * 6 + ["PREMATURE", "TIMEOUT.stalled"], BASE)
    second = rows_of(["VALID"] + ["INVALID.captured"] * 2 + ["TIMEOUT.near"] * 5, OTHER)
    return [*first, *second, *rows_of(["ERROR.backend"], OTHER, start=8)]


def test_a_row_says_what_was_decided_and_when():
    row = game_row(game())
    assert (row["rounds"], row["first_unanimous"], row["decided"]) == (3, 2, 20)
    assert (row["n_honest"], row["n_byzantine"], row["max_rounds"]) == (2, 1, 10)
    split = game_row(game("PREMATURE", held=((20, 30, 5), (20, 21, 5))))
    assert (split["first_unanimous"], split["decided"], top(split)) == (None, None, "PREMATURE")
    failed = game_row(game("ERROR.backend", held=(), error="down"))
    assert (failed["rounds"], failed["decided"], failed["error"]) == (0, None, "down")


def test_the_table_has_the_same_cells_in_every_format(rows, tmp_path):
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        export(rows, tmp_path / name)
    read = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [line["cell.game.n_byzantine"] for line in read[:9]] == ["0"] * 8 + ["2"]
    assert read[0]["properties.termination"] == "True"
    assert read[0]["metrics.undefined"] == ""
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "t.parquet")
    assert parquet.column("outcome").to_pylist() == [row["outcome"] for row in rows]
    assert parquet.num_columns == len(read[0])
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    with pytest.raises(ConfigError, match=r"\.csv, \.parquet or \.jsonl"):
        export(rows, tmp_path / "t.xlsx")
    assert "wall" not in "".join(flat(rows[0]))
    assert table_text(rows) == table_text(json.loads(json.dumps(rows)))


def test_cells_count_outcomes_and_leave_errors_out(rows):
    base, other = collect(rows)
    assert base.label == "n_byzantine=0, honest=low-median"
    assert (base.valid, other.valid, other.errors) == ((6, 8), (1, 8), 1)
    assert (other.count("INVALID"), other.count("TIMEOUT")) == (2, 5)
    assert other.safety_failures == 2
    assert cell_label({}) == "all"


def test_failed_games_are_at_risk_until_the_deadline(rows):
    """1 - survival at the deadline is the valid rate; the restricted mean counts failures whole."""
    base, other = collect(rows)
    for cell in (base, other):
        valid, games = cell.valid
        assert 1 - cell.survival.at(10) == pytest.approx(valid / games)
        expected = (3 * valid + 10 * (games - valid)) / games
        assert cell.survival.restricted_mean(cell.deadline) == pytest.approx(expected)
    assert base.rounds is not None
    assert (base.rounds.value, base.rounds.n) == (3.0, 6)


def test_metrics_of_a_cell(rows):
    _, other = collect(rows)
    found = {m.name: m for m in cell_metrics(other)}
    assert (found["valid"].value, found["valid"].n) == (1 / 8, 8)
    assert found["valid"].group == other.label
    assert found["errors"].value == 1
    assert found["liveness_failure"].value == 5 / 8
    assert found["messages"].value == 6
    assert "undefined" not in found
    text = {m.name: m.value for m in cell_metrics(other, "paper-text")}
    figures = {m.name: m.value for m in cell_metrics(collect(rows)[0], "paper-figures")}
    assert (text["invalid"], text["no_consensus"]) == (2 / 8, 5 / 8)
    assert (figures["invalid"], figures["no_consensus"]) == (0, 2 / 8)


def test_comparison_pairs_replicates(rows):
    [found] = compare(collect(rows))
    assert found.p == found.p_holm == pytest.approx(0.0406, abs=1e-4)  # C(8,·) by hand: 522/12870
    assert found.paired is not None
    assert (found.paired.pairs, found.paired.only_first, found.paired.only_second) == (8, 0, 5)
    assert found.paired.p == pytest.approx(2 / 32)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(-5 / 8)
    ways = [dict(r, course="a" if i < 11 else "b") for i, r in enumerate(rows)]
    assert compare(collect(ways))[0].same == 3
    assert compare(collect(rows), paired=False)[0].paired is None


def test_regression_over_cells_is_the_table_of_two_cells(rows):
    """Two cells: the only column that varies beside N is B, so Firth's closed form holds."""
    found = {e.name: e.value for e in effects(collect([dict(r, n_byzantine=1) for r in rows]))}
    assert found == {}
    varied = [dict(r, n_byzantine=r["cell"]["game.n_byzantine"], n_honest=4 - r["cell"][
        "game.n_byzantine"]) for r in rows]  # fmt: skip
    found = {e.name: e.value for e in effects(collect(varied))}
    expected = math.log((1.5 / 7.5) / (6.5 / 2.5)) / 2
    assert found["B"] == pytest.approx(expected)


def test_presets_match_the_published_numbers():
    assert sum(row.runs for row in Q1) == 600
    assert round(sum(row.valid for row in Q1) / len(Q1), 1) == 41.5
    by_n = {n: [row.valid for row in Q1 if row.honest == n] for n in (4, 8, 16)}
    assert [sum(by_n[n]) / 4 for n in (4, 8, 16)] == [46.5, 45.0, 33.0]
    assert [row.interval for row in Q2][1] == pytest.approx((0.234, 0.593), abs=5e-4)
    assert all(row.successes * 100 == row.valid * row.runs for row in (*Q1, *Q2))
    q1 = preset_table("paper-q1")
    q1["base"]["game"]["n_honest"] = 99
    assert preset_table("paper-q1")["base"]["game"]["n_honest"] == 4
    cell = {"game.n_honest": 8, "game.awareness": "none_exist"}
    assert [row.valid for row in published_for(cell, Q1)] == [12, 88]
    assert set(PRESETS) == {"paper-q1", "paper-q2", "prompts-q3", "smoke"}
    with pytest.raises(ConfigError, match="did you mean 'paper-q1'"):
        preset("paper-q11")


def test_trajectory_votes_and_blocs_show_the_game():
    played = game()
    lines = plots.trajectory(played)
    assert list(lines.series) == ["agent_0", "agent_1", "agent_2 (B)"]
    assert lines.series["agent_1"] == [(0.0, 30.0), (1.0, 30.0), (2.0, 20.0), (3.0, 20.0)]
    raster = plots.votes(played)
    assert [line[-1] for line in raster.values] == [1.0, 1.0, -1.0]
    sizes = plots.blocs(played)
    assert dict(zip(sizes.rows, sizes.values, strict=True)) == {
        "20": [1.0, 2.0, 2.0], "30": [1.0, 0.0, 0.0],
    }  # fmt: skip


def test_influence_counts_moves_to_what_was_proposed_before():
    found = plots.adoptions(game(held=((20, 30, 5), (20, 5, 5), (5, 5, 7))))
    # agent_1 moves to 5 (only agent_2 said it); agent_0 to 5, which 1 and 2 had said: half each.
    assert found == [[0, 0.5, 0.5], [0, 0, 1], [0, 0, 0]]


def test_heatmap_pools_cells_of_one_size(rows):
    assert plots.heatmap(collect(rows)) is None  # hand-made games are all of one size
    sized = [dict(r, n_byzantine=r["cell"]["game.n_byzantine"]) for r in rows]
    grid = plots.heatmap(collect([*sized, *[dict(r, cell={"x": 1}) for r in sized[:8]]]))
    assert isinstance(grid, HeatMap)
    assert (grid.rows, grid.columns) == (["H=2"], ["B=0", "B=2"])
    assert grid.values == [[12 / 16, 1 / 8]]


def test_the_report_shows_rates_references_and_games(rows):
    cells = collect(rows)
    story = Story("VALID: game 0123", game())
    blocks = list(report_blocks(cells, published=Q2, stories=[story]))
    page, text = render_html("Games", blocks), render_markdown("Games", blocks)
    for part in (
        "75.0 % [40.9, 92.9]", "paper: Qwen3-14B, may_exist, H=8, B=1", "McNemar p",
        "liveness failures",
        "restricted mean rounds", "agent_2 (B)", "INVALID.captured",
    ):  # fmt: skip
        assert part in page, part
    assert "Published rates" in text
    assert page.count("<svg") >= 7
    assert percent(0, 0) == "–"
    for draw in (plots.rates(cells), plots.survival(cells), plots.outcomes(cells)):
        assert render_svg(draw).startswith("<svg")


def test_a_report_without_finished_games_renders():
    cells = collect(rows_of(["ERROR.backend"], BASE))
    assert "errors" in render_html("Games", list(report_blocks(cells)))
    assert list(report_blocks([]))
