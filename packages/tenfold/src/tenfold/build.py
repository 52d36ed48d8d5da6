"""From a plan to live objects: imports targets, shares equal components, trains once.

This is the first moment at which a heavy library may be imported.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tenfold import reproducible
from tenfold.adapters import ADAPTERS
from tenfold.capabilities import CAPABILITIES, supports
from tenfold.context import RunContext
from tenfold.errors import ComponentError, RunFailed, TenfoldError
from tenfold.files import write_json
from tenfold.plan import Node, Plan, scalar
from tenfold.seeds import content_hash, derive
from tenfold.workspace import Workspace

MANIFEST = "tenfold-checkpoint.json"


def load_target(target: str, what: str, extras: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The callable that `package.module:name` names.

    Raises:
        ComponentError: the module or name is missing, or importing it failed.
    """
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        needed = ", ".join(extras) or f"the package that has the module {error.name}"
        raise ComponentError(
            f"{what} needs the module {error.name!r}, which is not installed",
            hint=f"install {needed}",
        ) from error
    except AttributeError as error:
        raise ComponentError(f"{what}: {target} does not exist ({error})") from error
    except TenfoldError:
        raise
    except Exception as error:
        raise ComponentError(
            f"{what}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    return found


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint that a model's `train` table gave: where, and whether it was cached."""

    path: Path
    key: str
    reused: bool
    seconds: float


class Builder:
    """Builds a plan's nodes; equal nodes are one object."""

    def __init__(self, plan: Plan, context: RunContext, workspace: Workspace) -> None:
        self.plan = plan
        self.context = context
        self.checkpoints = workspace.path("checkpoints")
        self.root = workspace.root or Path.cwd()
        self.trained: dict[str, Trained] = {}
        self._objects: dict[str, Any] = {}

    def build(self, node: Node) -> Any:
        """The node's object, with the adapters that its place needs around it."""
        key = node.key()
        if key not in self._objects:
            self._objects[key] = self._create(node)
        built = self._objects[key]
        for capability in self.plan.adapters.get(node.where, ()):
            _, target = ADAPTERS[capability]
            built = load_target(target, f"the adapter to {capability!r}")(built)
        return built

    def _create(self, node: Node) -> Any:
        component = node.component
        what = f"{component.id} ({node.where})"
        factory = load_target(component.spec.target, what, component.spec.extras)
        arguments = self._arguments(node)
        config = self.plan.config
        reproducible.settle(config.reproducibility, derive(config.seed, node.key()))
        if node.train is not None:
            arguments["checkpoint"] = str(self._train(node).path)
        try:
            built = factory(**arguments)
        except TenfoldError:
            raise
        except ModuleNotFoundError as error:
            raise ComponentError(
                f"{what} needs the module {error.name!r}, which is not installed",
                hint=f"install {', '.join(component.spec.extras) or error.name}",
            ) from error
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            raise ComponentError(
                f"building {what} failed: {type(error).__name__}: {error}"
            ) from error
        if component.kind == "model":
            _check_capabilities(node, built)
        return built

    def _arguments(self, node: Node) -> dict[str, Any]:
        arguments = {}
        for param in node.component.spec.params:
            value = node.params[param.name]
            if isinstance(value, Node):
                value = self.build(value)
            elif isinstance(value, list) and any(isinstance(v, Node) for v in value):
                value = [self.build(v) if isinstance(v, Node) else v for v in value]
            elif value is None:
                value = self._from_run(param.name)
            else:
                value = scalar(param, value, f"{node.where}.{param.name}")
                if param.element_type == "path":
                    value = self._anchored(value)
            arguments[param.name] = value
        return arguments

    def _anchored(self, value: Any) -> Any:
        """A relative path that exists below the workspace root, made absolute.

        Others stay as written: they may name a file relative to the current folder, or a
        repository of a hub.
        """
        if isinstance(value, list):
            return [self._anchored(item) for item in value]
        below = self.root / Path(value).expanduser()
        return str(below) if below.exists() else value

    def _from_run(self, name: str) -> Any:
        """Values that a component leaves to the run (`seed` and `dtype` are planned)."""
        return {"device": self.context.device, "offline": self.context.offline}.get(name)

    def _train(self, node: Node) -> Trained:
        """The checkpoint of a model's `train` table: from the cache, or trained now.

        The cache key covers the trainer and its parameters (nested ones included), the
        content of its datasets, and the model component's behaviour version.
        """
        train = node.train
        assert train is not None
        datasets = [n for n in train.walk() if n.component.kind == "dataset"]
        prints = {n.where: self.build(n).fingerprint("") for n in datasets}
        key = content_hash([train.describe(identity=True), sorted(prints.values())])
        name = f"{train.component.id.replace(':', '-')}-{key}"
        target = self.checkpoints / name
        started = time.monotonic()
        with _directory_lock(self.checkpoints / f".{name}.lock", self.context.rank):
            reused = self._agree(name, (target / MANIFEST).is_file())
            if not reused:
                self._fit(train, target, key, prints)
        trained = Trained(target, key, reused, time.monotonic() - started)
        self.trained[node.where] = trained
        return trained

    def _agree(self, name: str, cached: bool) -> bool:
        """Rank 0's answer to "is it cached?", on every rank.

        Ranks that looked for themselves could differ while another run publishes the
        checkpoint, and then wait for each other for ever.
        """
        if self.context.world_size == 1:
            return cached
        note = self.context.run_dir / f".train-{name}-{self.context.launch_id}.json"
        if self.context.rank == 0:
            write_json(note, {"cached": cached})
            return cached
        _wait_for(note)
        return bool(json.loads(note.read_text(encoding="utf-8"))["cached"])

    def _fit(self, train: Node, target: Path, key: str, prints: Mapping[str, str]) -> None:
        work = target.with_name(f".{target.name}.partial")
        work.mkdir(parents=True, exist_ok=True)
        context = replace(self.context, work_dir=work)
        trainer = self.build(train)
        checkpoint = trainer.fit(context, None, {})
        if self.context.rank != 0:
            _wait_for(target / MANIFEST)
            return
        manifest = {
            "key": key,
            "trainer": train.describe(),
            "datasets": prints,
            "seed": self.context.seed,
            "metrics": [asdict(metric) for metric in checkpoint.metrics],
        }
        write_json(checkpoint.path / MANIFEST, manifest)
        if target.exists():
            shutil.rmtree(target)
        checkpoint.path.rename(target)
        shutil.rmtree(work, ignore_errors=True)


def _check_capabilities(node: Node, built: Any) -> None:
    for name in node.component.spec.provides:
        if not supports(built, name):
            missing = [m for m in CAPABILITIES[name].members if not hasattr(built, m)]
            raise ComponentError(
                f"{node.component.id} says that it provides {name!r}, but the built object has "
                f"no {', '.join(missing)}",
                hint="this is a defect of the plugin; `tenfold plugins check` shows more",
            )


@contextmanager
def _directory_lock(path: Path, rank: int) -> Iterator[None]:
    """Keeps two runs from training the same checkpoint; only rank 0 of a run takes it."""
    if rank != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another run that trains {path.name[1:-5]}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _wait_for(path: Path, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.is_file():
        if time.monotonic() > deadline:
            raise RunFailed(f"rank 0 did not publish {path} within {timeout_s:.0f} s")
        time.sleep(0.05)


def quiet_libraries() -> None:
    """Keeps progress bars and notices of heavy libraries off the user's terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
