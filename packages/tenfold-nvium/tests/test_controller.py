"""The feedback controller follows its rules, saves its state, refuses a wrong baseline."""

from __future__ import annotations

import json
import math

import pytest
from tenfold.errors import ConfigError
from tenfold_nvium.controller import BaselineCurve, ComputePenaltyController

CURVE = BaselineCurve({100: 4.0, 200: 3.5, 400: 3.0}, {"data": "abc"})


def controller(**changes) -> ComputePenaltyController:
    return ComputePenaltyController(**({"baseline": CURVE, "beta": 0.15} | changes))


@pytest.mark.parametrize(
    ("nll", "beta"),
    [
        (3.996, 0.15),  # inside the dead band
        (4.004, 0.15),
        (3.99, 0.15 + 4 * 0.01),  # head-room: up by k_up * gap
        (4.01, 0.15 - 4 * 0.01),
        (3.0, 0.15 + 0.2),  # up by max_step at most
        (5.0, 0.0),  # never below min_weight
        (math.nan, 0.15),
    ],
)
def test_one_move(nll, beta):
    assert controller().step(100, nll) == pytest.approx(beta, abs=1e-12)


def test_a_gap_of_exactly_the_dead_band_acts():
    exact = controller(baseline=BaselineCurve({100: 4.0}), dead_band=0.25)
    assert exact.step(100, 3.75) == pytest.approx(0.35)
    assert controller(dead_band=0.25).step(100, 3.75 + 1e-9) == 0.15


def test_gains_limits_and_scale():
    assert controller(k_up=8.0).step(100, 3.99) == pytest.approx(0.23)
    assert controller(k_down=1.0).step(100, 4.1) == pytest.approx(0.05)
    assert controller(max_weight=0.2).step(100, 1.0) == pytest.approx(0.2)
    assert controller(gain_scale=0.25).step(100, 3.99) == pytest.approx(0.16)
    # The published long run: no step limit.
    assert controller(max_step=100.0, k_up=8.0).step(100, 3.0) == pytest.approx(8.15)


def test_beta_may_reach_zero_and_come_back():
    c = controller()
    assert c.step(100, 5.0) == 0.0
    assert c.step(200, 3.4) == pytest.approx(0.2)


def test_state_round_trip_continues_the_same_trace():
    losses = [(100, 3.98), (200, 3.52), (300, 3.1), (400, 3.2)]
    whole = controller()
    trace = [whole.step(*row) for row in losses]
    first = controller()
    for row in losses[:2]:
        first.step(*row)
    second = controller(beta=9.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.step(*row) for row in losses[2:]] == trace[2:]
    assert second.history == whole.history


def test_the_curve_gives_the_nearest_step_or_interpolates():
    assert [CURVE.at(s) for s in (0, 100, 149, 150, 151, 300, 301, 999)] == [
        4.0, 4.0, 4.0, 4.0, 3.5, 3.5, 3.0, 3.0
    ]  # fmt: skip
    assert CURVE.at(150, "linear") == pytest.approx(3.75)
    assert BaselineCurve.constant(2.5).at(12345) == 2.5


def test_the_curve_is_saved_and_read_and_the_bare_form_too(tmp_path):
    CURVE.save(tmp_path / "a.json")
    assert BaselineCurve.load(tmp_path / "a.json") == CURVE
    (tmp_path / "b.json").write_text('{"100": 4.0, "200": 3.5}')
    assert BaselineCurve.load(tmp_path / "b.json").values == {100: 4.0, 200: 3.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "empty"),
        ('{"100": null}', "maps steps to losses"),
        ('{"x": 1.0}', "maps steps to losses"),
        ('{"100": NaN}', "value nan at step 100"),
        ("[1, 2]", "empty"),
        ("not json", "is not JSON"),
    ],
)
def test_bad_curves_are_named(tmp_path, text, words):
    path = tmp_path / "curve.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        BaselineCurve.load(path)


def test_missing_and_foreign_curves_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="train the dense baseline first"):
        BaselineCurve.load(tmp_path / "none.json")
    CURVE.check({"data": "abc", "vocabulary": "unknown there"})
    with pytest.raises(ConfigError, match="another data"):
        CURVE.check({"data": "abd"})
    with pytest.raises(ConfigError, match="min <= max"):
        controller(min_weight=1.0, max_weight=0.5)
