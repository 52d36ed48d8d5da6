"""The planner: parameters, roles, capabilities, and agreement with brute force."""

from __future__ import annotations

import itertools
import random

import pytest
from tenfold.adapters import ADAPTERS
from tenfold.capabilities import CAPABILITIES, IMPLIED
from tenfold.config import resolve
from tenfold.errors import CapabilityError, ComponentError, ConfigError
from tenfold.plan import make_plan
from tenfold.registry import Component, Registry
from tenfold.spec import ComponentSpec, Param
from tenfold.workspace import find_workspace


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": {"use": "toy:uper"}}, ComponentError, r"unknown model 'toy:uper'; .*toy:upper"),
        ({"model": {"use": "toy:lengths"}}, ComponentError, "it names an evaluator"),
        (
            {"model": {"use": "toy:upper", "prefx": "a"}},
            ConfigError,
            r"models.model: toy:upper has no parameter 'prefx'; did you mean 'prefix'",
        ),
        (
            {"model": {"use": "toy:upper", "prefix": 3}},
            ConfigError,
            r"models.model.prefix is 3; it must be a string",
        ),
        (
            {"evaluator": {"use": "toy:lengths", "factor": 11}},
            ConfigError,
            r"evaluator.factor is 11.* it must be a number from 0 to 10",
        ),
        ({"model": {"use": "toy:twice"}}, ConfigError, "models.model.base is required"),
        ({"model": {"use": "toy:twice", "base": 3}}, ConfigError, "models.model.base is 3"),
        (
            {"dataset": {"use": "toy:pictures"}},
            ConfigError,
            "needs text or prompt records in datasets.dataset, but toy:pictures gives audio",
        ),
        (
            {"models": {"judge": {"use": "toy:upper", "prefix": "j"}}},
            ConfigError,
            "toy:lengths has no model role 'judge'",
        ),
        (
            {"evaluator": {"use": "toy:lengths", "train": {}}},
            ConfigError,
            "only models are trained",
        ),
        (
            {"model": {"use": "toy:upper", "checkpoint": "x", "train": {"use": "toy:learn"}}},
            ConfigError,
            "has both checkpoint and train",
        ),
        ({"model": {"use": ""}}, ConfigError, "it must name a component"),
    ],
)
def test_mistake_is_one_clear_message(host, table, change, error, message):
    with pytest.raises(error, match=message):
        host.plan(host.resolve(table(**change)))


@pytest.mark.parametrize("role", ["model", "dataset"])
def test_missing_role_is_named(host, table, role):
    run = table()
    del run[role]
    with pytest.raises(ConfigError, match=rf"needs the {role} role '{role}'; add \[{role}\]"):
        host.plan(host.resolve(run))


def test_shared_model_may_be_a_role_of_its_own(host, table):
    models = {
        "model": {"use": "toy:twice", "base": {"share": "small"}},
        "small": {"use": "toy:upper", "prefix": "s"},
    }
    run = table(models=models)
    del run["model"]
    plan = host.plan(host.resolve(run))
    assert plan.models["model"].params["base"].key() == plan.models["small"].key()


def test_mismatch_names_capability_component_and_offers(host, table):
    plan = host.plan(host.resolve(table(evaluator={"use": "toy:gradients"})))
    with pytest.raises(CapabilityError) as caught:
        plan.require_fit()
    message = str(caught.value)
    assert "toy:gradients needs 'grad' of models.model, which toy:upper does not offer" in message
    assert caught.value.exit_code == 4


def test_identity_leaves_out_paths_batch_sizes_and_devices(host, table):
    def tree(**evaluator):
        run = table(evaluator={"use": "toy:lengths", **evaluator})
        return host.plan(host.resolve(run)).tree(identity=True)

    assert tree(batch=1) == tree(batch=7)
    assert tree(factor=1.0) != tree(factor=2.0)


def test_policy_defaults_fill_parameters(workspace_dir, table):
    from tenfold.host import Host

    (workspace_dir / "plugins.toml").write_text(
        "[plugins.toy]\n[plugins.toy.defaults.upper]\nprefix = 'zz'\n"
    )
    host = Host()
    assert host.plan(host.resolve(table())).models["model"].params["prefix"] == "zz"
    (workspace_dir / "plugins.toml").write_text(
        "[plugins.toy]\n[plugins.toy.defaults.upper]\nprefx = 'zz'\n"
    )
    host = Host()
    with pytest.raises(ConfigError, match=r"no such parameter; did you mean 'prefix'"):
        host.plan(host.resolve(table()))


# --- against brute force ---

NAMES = sorted(CAPABILITIES)


def random_registry(rng):
    """Models that provide random capabilities, some of them decoders over a base."""
    specs = []
    for number in range(6):
        provides = tuple(rng.sample(NAMES, rng.randint(0, 3)))
        decoder = rng.random() < 0.5
        params = (Param("base", "component:model"),) if decoder else ()
        specs.append(
            ComponentSpec(
                f"m{number}",
                "x:y",
                "s",
                params,
                provides,
                {"base": tuple(rng.sample(NAMES, rng.randint(0, 2)))} if decoder else {},
                inherits="base" if decoder and rng.random() < 0.7 else "",
            )
        )
    needs = tuple(rng.sample(NAMES, rng.randint(1, 3)))
    evaluator = ComponentSpec("e", "x:y", "s", (), (), {"model": needs})
    items = [Component(f"p:{s.name}", "p", "model", s, "d", "1") for s in specs]
    items.append(Component("p:e", "p", "evaluator", evaluator, "d", "1"))
    return Registry({}, [], find_workspace(), items=tuple(items))


def random_model(rng, registry, depth=0):
    """A component table, nested where the component has a base."""
    models = [c for c in registry.items if c.kind == "model"]
    if depth > 3:
        models = [c for c in models if not c.spec.params] or models[:0]
    if not models:
        return None
    component = rng.choice(models)
    table = {"use": component.id}
    if component.spec.params:
        base = random_model(rng, registry, depth + 1)
        if base is None:
            return None
        table["base"] = base
    return table


def closure(capabilities):
    """All capabilities implied, by trying until nothing changes."""
    found = set(capabilities)
    for _ in NAMES:
        found |= set(itertools.chain.from_iterable(IMPLIED.get(c, ()) for c in found))
    return found


def brute_force(registry, table):
    """(capabilities, unmet needs inside), straight from the definition."""
    spec = registry.component("model", table["use"]).spec
    own, unmet = set(spec.provides), []
    if "base" in table:
        base, unmet = brute_force(registry, table["base"])
        unmet = unmet + [n for n in spec.requires["base"] if not meets(base, n)]
        if spec.inherits:
            own |= base
    return closure(own), unmet


def meets(capabilities, need):
    return need in capabilities or (
        need in ADAPTERS and all(n in capabilities for n in ADAPTERS[need][0])
    )


def test_plan_agrees_with_brute_force_on_random_graphs(workspace_dir):
    workspace = find_workspace()
    planned = 0
    for seed in range(400):
        rng = random.Random(seed)
        registry = random_registry(rng)
        table = random_model(rng, registry)
        if table is None:
            continue
        planned += 1
        run = {"schema": "tenfold-run/1", "model": table, "evaluator": {"use": "p:e"}}
        plan = make_plan(resolve(run, workspace), registry, workspace)
        capabilities, unmet = brute_force(registry, table)
        needs = registry.component("evaluator", "p:e").spec.requires["model"]
        unmet = unmet + [need for need in needs if not meets(capabilities, need)]
        assert plan.models["model"].capabilities == capabilities
        assert sorted(c.needs for c in plan.checks if not c.ok) == sorted(unmet)
        adapted = {n for n in needs if n not in capabilities and meets(capabilities, n)}
        assert set(plan.adapters.get("models.model", ())) == adapted
    assert planned > 300
