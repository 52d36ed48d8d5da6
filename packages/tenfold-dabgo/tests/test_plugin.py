"""The description is light, sound, and says what the evaluator really takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from tenfold.spec import HEAVY_MODULES, check_component
from tenfold_dabgo import plugin
from tenfold_dabgo.evaluation import relevance, retraining, tail_patching
from tenfold_dabgo.evaluation.tail_patch import OPTIMIZERS, VARIANTS
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
    for spec in plugin.tenfold_trainers():
        assert check_component("trainer", spec) == []


def test_described_parameters_are_the_settings_with_equal_defaults():
    described = {p.name: p for p in plugin.ATTRIBUTION.params}
    settings = {f.name: f for f in dataclasses.fields(AttributionSettings)}
    assert set(described) == set(settings)
    for name, field in settings.items():
        if name != "seed":  # left out: the host fills in the run's seed
            assert described[name].default == field.default, name
    Attribution(**{name: p.default for name, p in described.items()})


QUALITY = [
    (plugin.TAIL_PATCH, tail_patching.TailPatchSettings, tail_patching.TailPatch),
    (plugin.RETRAINING, retraining.RetrainingSettings, retraining.Retraining),
    (plugin.LABELS, relevance.LabelSettings, relevance.Labels),
]
HIDDEN = {
    "null_queries",
    "method",
    "view",
    "top_k",
    "columns",
    "how",
    "min_group",
    "compare",
    "base_losses",
    "export",
}
"""Settings of `dabgo:attribution` that the quality evaluators decide themselves."""


@pytest.mark.parametrize(("spec", "own", "cls"), QUALITY, ids=lambda x: getattr(x, "name", ""))
def test_quality_evaluators_describe_their_settings_and_the_methods(spec, own, cls):
    described = {p.name: p for p in spec.params}
    settings = {f.name: f for f in dataclasses.fields(AttributionSettings)}
    mine = {f.name: f for f in dataclasses.fields(own)}
    assert set(described) == set(mine) | set(settings) - HIDDEN
    for name, field in {**settings, **mine}.items():
        if name in described and name != "seed":
            assert described[name].default == field.default, name
    cls(**{name: p.default for name, p in described.items()})


def test_described_choices_of_the_quality_evaluators_are_those_of_the_code():
    tail, again, labels = ({p.name: p.choices for p in spec.params} for spec, *_ in QUALITY)
    assert tail["variants"] == VARIANTS
    assert tail["patch_optimizer"] == OPTIMIZERS
    assert set(again["measure"]) == set(retraining.MEASURES)
    assert again["removal_rule"] == again["lds_rule"] == retraining.RULES
    assert again["vary"] == retraining.SEEDED
    assert again["attributed"] == retraining.ATTRIBUTED
    assert labels["relevance"] == relevance.RELEVANCE
    assert labels["null"] == relevance.NULLS


def test_described_choices_are_those_of_the_code():
    choices = {p.name: p.choices for p in plugin.ATTRIBUTION.params}
    assert choices["method"] == choices["compare"] == METHODS
    assert choices["preset"] == PRESETS
    assert choices["view"] == VIEWS
    assert choices["rule"] == RULES
    assert choices["fisher"] == KINDS
