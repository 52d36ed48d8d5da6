"""Laws of datasets: fixed order, honest limits, repeatable shuffles, stable fingerprints."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.records import RECORD_KINDS, Record
from tenfold.registry import Component
from tenfold.testing.building import Workbench
from tenfold.testing.findings import LawBrokenError, NotApplicableError, require

SAMPLE = 50
"""Records looked at; a dataset may be endless in practice."""
WHOLE = 2000
"""Datasets up to this size are shuffled as a whole."""
PROCESS_TIMEOUT_S = 300
_PROBE = """
import json, sys
from tenfold.registry import load_registry
from tenfold.testing.building import Workbench
component_id, settings = json.loads(sys.argv[1])
registry = load_registry(lenient=True)
with Workbench(registry, settings) as bench:
    component = registry.component("dataset", component_id)
    print(json.dumps(bench.build(component).fingerprint("")))
"""


def records_have_the_described_kind(dataset: Any, component: Component) -> None:
    """`kind` is what the description provides, and records are of that class, JSON-able and
    with unique ids."""
    [kind] = component.spec.provides
    require(dataset.kind == kind, f"kind is {dataset.kind!r}, described is {kind!r}")
    records = _head(dataset)
    expected = RECORD_KINDS[kind]
    for record in records:
        require(isinstance(record, expected), f"yields {type(record).__name__}")
        json.dumps(record.to_json())
    ids = [record.id for record in records]
    require(all(ids), "an empty id")
    twice = sorted({i for i in ids if ids.count(i) > 1})
    require(not twice, f"the id {twice[:1]} comes twice")


def splits_are_known(dataset: Any) -> None:
    """There is a split, the first is the default, and an unknown one is a clear error."""
    splits = list(dataset.splits())
    require(bool(splits), "no splits")
    default = [record.id for record in _head(dataset)]
    first = [record.id for record in islice(dataset.load(splits[0]), SAMPLE)]
    require(default == first, f"the default is not the first split {splits[0]!r}")
    try:
        list(islice(dataset.load("no-such-split"), 1))
    except TenfoldError:
        return
    raise LawBrokenError("an unknown split is accepted; raise a ConfigError with the known ones")


def limits_take_the_first(dataset: Any) -> None:
    """`load(limit=k)` gives the first k records of `load()`."""
    whole = _head(dataset)
    for k in {1, 2, len(whole) // 2, len(whole)} - {0}:
        part = list(dataset.load(limit=k))
        require(part == whole[:k], f"limit={k} is not the first {k} records")


def order_is_fixed(dataset: Any) -> None:
    """Loading twice gives equal records in equal order."""
    require(_head(dataset) == _head(dataset), "a second load gives other records")


def shuffles_repeat(dataset: Any) -> None:
    """A shuffle seed gives the same records every time: those of the dataset, once each."""
    first = [record.id for record in islice(dataset.load(shuffle_seed=1), SAMPLE)]
    second = [record.id for record in islice(dataset.load(shuffle_seed=1), SAMPLE)]
    require(first == second, "the same shuffle seed gives another order")
    whole = [record.id for record in islice(dataset.load(), WHOLE + 1)]
    if len(whole) > WHOLE:
        return
    shuffled = [record.id for record in dataset.load(shuffle_seed=1)]
    require(sorted(shuffled) == sorted(whole), "a shuffle loses or repeats records")
    orders = {tuple(r.id for r in dataset.load(shuffle_seed=seed)) for seed in range(4)}
    require(len(whole) < 4 or len(orders) > 1, "four shuffle seeds give one order")


def fingerprints_are_stable(dataset: Any, component: Component, bench: Workbench) -> None:
    """The fingerprint is the same again, from a new object, and in another process."""
    mark = dataset.fingerprint("")
    require(isinstance(mark, str) and bool(mark), f"fingerprint is {mark!r}")
    require(dataset.fingerprint("") == mark, "a second call differs")
    require(bench.build(component).fingerprint("") == mark, "a new object differs")
    settings = {key: dict(values) for key, values in bench.settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps([component.id, settings])],
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise NotApplicableError(f"could not be built in another process: {last}")
    other = json.loads(done.stdout.splitlines()[-1])
    require(other == mark, f"another process gives {other}, this one {mark}")


def _head(dataset: Any) -> list[Record]:
    return list(islice(dataset.load(), SAMPLE))
