"""The description is light, sound, and says what the evaluator really takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from tenfold.spec import HEAVY_MODULES, check_component
from tenfold_dabgo import plugin
from tenfold_dabgo.evaluator import Attribution
from tenfold_dabgo.fisher_estimate import KINDS
from tenfold_dabgo.rules import METHODS as RULES
from tenfold_dabgo.scores import VIEWS
from tenfold_dabgo.settings import METHODS, PRESETS, AttributionSettings


def test_plugin_imports_nothing_heavy():
    code = "import sys, tenfold_dabgo.plugin as p; p.tenfold_evaluators(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(HEAVY_MODULES) & set(loaded)
    assert "tenfold_dabgo.evaluator" not in loaded


def test_descriptions_are_sound():
    for spec in plugin.tenfold_evaluators():
        assert check_component("evaluator", spec) == []
    for spec in plugin.tenfold_datasets():
        assert check_component("dataset", spec) == []


def test_described_parameters_are_the_settings_with_equal_defaults():
    described = {p.name: p for p in plugin.ATTRIBUTION.params}
    settings = {f.name: f for f in dataclasses.fields(AttributionSettings)}
    assert set(described) == set(settings)
    for name, field in settings.items():
        if name != "seed":  # left out: the host fills in the run's seed
            assert described[name].default == field.default, name
    Attribution(**{name: p.default for name, p in described.items()})


def test_described_choices_are_those_of_the_code():
    choices = {p.name: p.choices for p in plugin.ATTRIBUTION.params}
    assert choices["method"] == choices["compare"] == METHODS
    assert choices["preset"] == PRESETS
    assert choices["view"] == VIEWS
    assert choices["rule"] == RULES
    assert choices["fisher"] == KINDS
