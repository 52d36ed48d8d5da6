"""Laws of evaluators, checked by running them small: stable ids, repeatable items, shards that
add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tenfold.errors import CapabilityError, ComponentError, ConfigError
from tenfold.host import Host
from tenfold.plan import with_implied
from tenfold.registry import Component
from tenfold.run import Options
from tenfold.store import RunStore
from tenfold.testing.building import SERVICE_TAG, Workbench
from tenfold.testing.findings import LawBrokenError, NotApplicableError, require

LIMIT = 4
"""Items per run."""
TIMED_TAGS = ("speed", "timing")
"""Tags of evaluators that measure time, whose values cannot repeat."""

Items = dict[str, Any]


def items_repeat(component: Component, bench: Workbench) -> None:
    """Two runs give the same items with the same values, without a failed one."""
    table = run_table(component, bench)
    first, second = (_run(table, bench, Options(limit=LIMIT, progress=False)) for _ in range(2))
    require(bool(first), "no items")
    require(list(first) == list(second), f"item ids change: {list(first)} / {list(second)}")
    if not set(component.spec.tags) & set(TIMED_TAGS):
        changed = [name for name in first if first[name] != second[name]]
        require(not changed, f"the values of {changed[:1]} change from run to run")


def shards_add_up(component: Component, bench: Workbench) -> None:
    """The items of all shards together are the items of one run."""
    table = run_table(component, bench)
    whole = _run(table, bench, Options(limit=LIMIT, progress=False))
    parts: Items = {}
    for i in range(2):
        options = Options(limit=LIMIT, shard=(i, 2), progress=False)
        part = _run(table, bench, options, may_be_empty=True)
        require(not set(part) & set(parts), "an item is in two shards")
        parts |= part
    require(set(parts) == set(whole), f"shards hold {sorted(parts)}, one run {sorted(whole)}")
    if not set(component.spec.tags) & set(TIMED_TAGS):
        changed = [name for name in whole if parts[name] != whole[name]]
        require(not changed, f"the values of {changed[:1]} depend on the shard")


def run_table(component: Component, bench: Workbench) -> dict[str, Any]:
    """A run of the evaluator with models and datasets that build without help.

    Raises:
        NotApplicableError: a role has no such component.
    """
    if reason := bench.obstacle(component):
        raise NotApplicableError(reason)
    spec = component.spec
    own = {param.name for param in spec.params}
    table: dict[str, Any] = {
        "schema": "tenfold-run/1",
        "name": f"check-{spec.name}",
        "evaluator": bench.table(component),
        "models": {},
        "datasets": {},
    }
    for kind, needs in (("model", spec.requires), ("dataset", spec.data)):
        for key, wanted in needs.items():
            name = key.rstrip("?")
            if name in own:
                continue
            role = kind if name == "*" else name
            try:
                table[f"{kind}s"][role] = _filler(bench, component, kind, wanted, role)
            except NotApplicableError:
                if not key.endswith("?"):
                    raise
    return table


def _filler(
    bench: Workbench, component: Component, kind: str, wanted: tuple[str, ...], role: str
) -> dict[str, Any]:
    """The first component that fits a role and builds; those with given settings first."""
    candidates = [
        c
        for c in bench.registry.components(kind)
        if _fits(c, wanted) and not bench.obstacle(c) and SERVICE_TAG not in c.spec.tags
    ]
    candidates.sort(key=lambda c: (c.id not in bench.settings, c.plugin != component.plugin))
    for candidate in candidates:
        try:
            bench.build(candidate)
        except NotApplicableError:
            continue
        except LawBrokenError as error:
            raise NotApplicableError(f"{candidate.id} {error}") from error
        return bench.table(candidate)
    raise NotApplicableError(
        f"no {kind} that offers {', '.join(wanted) or 'anything'} for {role!r} builds by itself"
    )


def _fits(component: Component, wanted: tuple[str, ...]) -> bool:
    provides = component.spec.provides
    if component.kind == "dataset":
        return not wanted or bool(set(provides) & set(wanted))
    return set(wanted) <= with_implied(provides)


def _run(
    table: dict[str, Any], bench: Workbench, options: Options, *, may_be_empty: bool = False
) -> Items:
    """Item id → values of a run in the temporary workspace."""
    try:
        outcome = Host(bench.workspace, bench.registry).run(table, options=options)
    except (CapabilityError, ConfigError) as error:
        # Roles and parameters that the description calls optional may still be needed.
        raise NotApplicableError(f"does not run with its defaults: {error}") from error
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.failed:
        _judge_failures(outcome.run_dir)
    require(outcome.status == "ok", f"the run ended {outcome.status}: {outcome.message}")
    items = {line.id: line.values for line in RunStore(outcome.run_dir).ordered_lines()}
    require(may_be_empty or len(items) == outcome.done, "an item id comes twice")
    return items


def _judge_failures(run_dir: Path) -> None:
    """Failed items are the evaluator's fault unless each is a clear error of the set-up, such
    as a prompt that is longer than the chosen model's context."""
    lines = (run_dir / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    errors = [str(json.loads(line)["error"]) for line in lines]
    clear = (CapabilityError, ComponentError, ConfigError)
    if errors and all(error.startswith(tuple(c.__name__ for c in clear)) for error in errors):
        raise NotApplicableError(f"items do not suit the components at hand: {errors[0]}")
    raise LawBrokenError(f"{len(errors)} items failed: {errors[0] if errors else 'no reason kept'}")
