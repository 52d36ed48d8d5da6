"""The conformance kit: every law that applies, on every component of one plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tenfold.registry import Component, Registry, load_registry
from tenfold.testing import datasets, evaluators, likelihood, models, plugin, stepping
from tenfold.testing.building import Settings, Workbench, refuses_bad_values
from tenfold.testing.findings import FAIL, SKIP, Finding, check

LAWS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "generate": models.GENERATE_LAWS,
    "tokenize": models.TOKENIZE_LAWS,
    "constrain": models.CONSTRAIN_LAWS,
    "loss": likelihood.LOSS_LAWS,
    "grad": likelihood.GRAD_LAWS,
    "score": likelihood.SCORE_LAWS,
    "hidden": likelihood.HIDDEN_LAWS,
    "exits": likelihood.EXITS_LAWS,
    "step": stepping.STEP_LAWS,
}
"""Capability → laws of the models that provide it."""


def check_plugin(
    name: str,
    *,
    params: Settings | None = None,
    registry: Registry | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Checks one installed plugin; see the modules of this package for the laws.

    Args:
        name: the plugin's name.
        params: component id → parameters to build it with, for components that need some;
            `{"nvium:causal-lm": {"checkpoint": "..."}}`. Those also serve as models and
            datasets for the evaluators that are checked.
        registry: loaded when None.
        progress: called with the id of each component before it is checked.

    Returns:
        One finding per law and component, laws that could not be checked included.
    """
    registry = registry or load_registry(lenient=True, cached=False)
    tell = progress or (lambda message: None)
    findings = [
        Finding(name, f"loads [{broken.phase}]", FAIL, broken.cause)
        for broken in registry.broken
        if broken.name == name
    ]
    row = registry.plugins.get(name)
    if row is None:
        return findings or [Finding(name, "is installed", FAIL, "no plugin of that name")]
    ignored = [message for message in row.warnings if "is ignored" in message]
    findings += [Finding(name, "has no ignored hook", FAIL, message) for message in ignored]
    laws = (plugin.imports_nothing_heavy, plugin.imports_fast)
    findings += [check(name, _title(law), law, row) for law in laws]
    for command in registry.commands(name):
        subject = f"{name} {command.name}"
        law = plugin.target_accepts_parameters
        findings.append(check(subject, _title(law), law, command, f"command {subject}"))
    with Workbench(registry, params or {}) as bench:
        for component in registry.items:
            if component.plugin == name:
                tell(f"checking {component.kind} {component.id}")
                findings += check_component(component, bench)
    return findings


def check_component(component: Component, bench: Workbench) -> Iterator[Finding]:
    """Findings about one component."""
    subject = f"{component.kind} {component.id}"
    law = plugin.target_accepts_parameters
    yield check(subject, _title(law), law, component.spec, component.id)
    yield check(subject, _title(refuses_bad_values), refuses_bad_values, bench, component)
    built: list[Any] = []
    finding = check(subject, "builds", lambda: built.append(bench.build(component)))
    yield finding
    if not built:
        return
    if component.kind == "model":
        yield from check_model(built[0], component.spec.provides, subject)
    elif component.kind == "dataset":
        yield from _check_dataset(subject, component, built[0], bench)
    elif component.kind == "evaluator":
        for law in (evaluators.items_repeat, evaluators.shards_add_up):
            yield check(subject, _title(law), law, component, bench)
    else:
        yield Finding(subject, "trains", SKIP, "training takes minutes; test it in the plugin")


def check_model(model: Any, provides: tuple[str, ...], subject: str = "model") -> list[Finding]:
    """Findings about a model object, built by any means, that claims some capabilities."""
    from tenfold.plan import with_implied

    members = models.has_its_members
    findings = [check(subject, _title(members), members, model, provides)]
    if findings[0].status == FAIL:
        return findings
    offered = with_implied(provides)
    for capability in sorted(offered):
        laws = LAWS.get(capability)
        if laws is None:
            findings.append(Finding(subject, capability, SKIP, "there is no kit for it"))
            continue
        findings += [check(subject, f"{capability}: {_title(law)}", law, model) for law in laws]
    if {"score", "loss", "tokenize"} <= offered:
        law = likelihood.score_is_minus_the_loss
        findings.append(check(subject, _title(law), law, model))
    return findings


def _check_dataset(
    subject: str, component: Component, dataset: Any, bench: Workbench
) -> Iterator[Finding]:
    kind = datasets.records_have_the_described_kind
    yield check(subject, _title(kind), kind, dataset, component)
    for law in (
        datasets.splits_are_known,
        datasets.order_is_fixed,
        datasets.limits_take_the_first,
        datasets.shuffles_repeat,
    ):
        yield check(subject, _title(law), law, dataset)
    stable = datasets.fingerprints_are_stable
    yield check(subject, _title(stable), stable, dataset, component, bench)


def _title(law: Callable[..., None]) -> str:
    """A law's name in words."""
    return getattr(law, "__name__", "law").replace("_", " ")
