"""CPU time of the command line, beside llm, inspect, kedro and lm_eval, in one interleaved run.

    python tools/bench_cli.py                          # writes docs/benchmarks/cli.md
    python tools/bench_cli.py --repeats 5 --out -      # a quick look

The others are installed into a scratch environment by this script (`uv`, network needed once).
Made-up plugins are added until ten are installed. CPU time is user + system time of the whole
process tree, so that it does not depend on what else the machine does as wall time would.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = REPOSITORY / "docs" / "benchmarks" / "cli.md"
COMPARED = {"llm": "llm", "inspect": "inspect-ai", "kedro": "kedro", "lm_eval": "lm-eval"}
"""Program → distribution."""
PLUGINS = 10
HELP_BUDGET, LIST_BUDGET = 0.10, 0.20
PYTHON_FLOOR = ("python", "-c", "pass")

RUN_FILE = """\
schema = "tenfold-run/1"
name = "bench"

[model]
use = "core:hf"
checkpoint = "not-needed-for-a-plan"

[dataset]
use = "core:python-stdlib"

[evaluator]
use = "core:perplexity"
"""

PLUGIN = """\
from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

PARAMS = (
    Param("checkpoint", "path", None, "folder of the weights"),
    Param("base", "component:model", None, "model that is wrapped"),
    *(Param(f"rate_{{i}}", "float", 0.1 * i, "a rate", minimum=0, maximum=10) for i in range(6)),
    Param("mode", "str", "mean", "how values are joined", choices=("mean", "sum", "max")),
    Param("layers", "list[int]", (1, 2), "layers that take part", minimum=0),
)


@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "A made-up plugin of the usual size", paper="arXiv:0000.00000")


@hookimpl
def tenfold_models():
    provides = ("generate", "score", "loss", "tokenize")
    return [
        ComponentSpec(f"model-{{i}}", "json:loads", "a model", PARAMS, provides) for i in range(3)
    ]


@hookimpl
def tenfold_datasets():
    return [ComponentSpec("data", "json:loads", "a dataset", PARAMS, ("text",))]


@hookimpl
def tenfold_evaluators():
    needs, data = {{"model": ("grad", "tokenize")}}, {{"dataset": ("text",)}}
    return [
        ComponentSpec(f"measure-{{i}}", "json:loads", "an evaluator", PARAMS, (), needs, data)
        for i in range(2)
    ]


@hookimpl
def tenfold_commands():
    return [CommandSpec("go", "json:loads", "a command", PARAMS[2:])]
"""


@dataclass(slots=True)
class Case:
    """One command line and what was measured of it."""

    label: str
    command: tuple[str, ...]
    budget: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    fresh_cache: bool = False
    seconds: list[float] = field(default_factory=list)
    exit_code: int = 0


def main() -> int:
    """Measures, writes the table, and returns 1 when a budget is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="measured runs per command line")
    parser.add_argument("--scratch", type=Path, help="environment of the others, made if missing")
    parser.add_argument("--out", default=str(OUT), help="file to write, or - for stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tenfold-bench-") as folder:
        work = Path(folder)
        scratch = args.scratch or work / "others"
        others = install_others(scratch)
        cases = [*tenfold_cases(work), *other_cases(scratch)]
        measure(cases, args.repeats, work)
    text = table(cases, others, args.repeats)
    if args.out == "-":
        print(text)
    else:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text, encoding="utf-8")
        print(f"wrote {args.out}")
    failed = [c for c in cases if c.budget and statistics.median(c.seconds) > c.budget]
    for case in failed:
        median = statistics.median(case.seconds)
        print(f"over budget: {case.label}: {median:.3f} > {case.budget}", file=sys.stderr)
    return 1 if failed else 0


def install_others(scratch: Path) -> dict[str, str]:
    """Installs the compared programs into an environment of their own; their versions."""
    python = scratch / "bin" / "python"
    if not python.exists():
        uv = shutil.which("uv")
        if uv is None:
            sys.exit("uv is needed to install the compared programs: pip install uv")
        print(f"installing {', '.join(COMPARED.values())} into {scratch}", file=sys.stderr)
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(scratch)], check=True)
        line = [uv, "pip", "install", "-q", "--python", str(python), *COMPARED.values()]
        subprocess.run(line, check=True)
    probe = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps([m.version(n) for n in sys.argv[1:]]))"
    )
    answer = subprocess.run(
        [str(python), "-c", probe, *COMPARED.values()], check=True, capture_output=True, text=True
    )
    return dict(zip(COMPARED, json.loads(answer.stdout), strict=True))


def tenfold_cases(work: Path) -> list[Case]:
    """The installed `tenfold` script with ten plugins, and a bare Python as the floor."""
    script = shutil.which("tenfold", path=str(Path(sys.executable).parent))
    if script is None:
        sys.exit("tenfold is not installed beside this Python; run `uv sync` first")
    installed = sorted({e.name for e in importlib.metadata.entry_points(group="tenfold.plugins")})
    site = work / "plugins"
    made_up = [f"made-up-{i}" for i in range(len(installed), PLUGINS)]
    for name in made_up:
        add_plugin(site, name)
    (work / "run.toml").write_text(RUN_FILE)
    (work / "workspace.toml").write_text("")
    environment = {"PYTHONPATH": str(site), "TENFOLD_CACHE": str(work / "cache")}
    lines = {
        "--help": HELP_BUDGET,
        "plugins": LIST_BUDGET,
        "list": LIST_BUDGET,
        "show core:hf": LIST_BUDGET,
        "run --dry-run run.toml": LIST_BUDGET,
    }
    cases = [
        Case(f"tenfold {line}", (script, *line.split()), budget, environment)
        for line, budget in lines.items()
    ]
    cases.append(
        Case("tenfold list (first time, no index)", (script, "list"), None, environment, True)
    )
    return [Case("python -c pass (floor)", (sys.executable, *PYTHON_FLOOR[1:])), *cases]


def add_plugin(site: Path, name: str) -> None:
    """An installed distribution with one plugin of the usual size."""
    module = name.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(PLUGIN.format(name=name))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tenfold.plugins]\n{name} = {module}\n")


def other_cases(scratch: Path) -> list[Case]:
    """Help and a listing command of each compared program."""
    lines = (
        "llm --help",
        "llm plugins",
        "llm models",
        "inspect --help",
        "inspect list tasks",
        "kedro --help",
        "kedro info",
        "lm_eval --help",
    )
    return [
        Case(line, (str(scratch / "bin" / line.split()[0]), *line.split()[1:])) for line in lines
    ]


def measure(cases: Sequence[Case], repeats: int, work: Path) -> None:
    """Runs every case once to warm up (byte code, index), then `repeats` times interleaved."""
    order = random.Random(0)
    for round_number in range(repeats + 1):
        for case in order.sample(list(cases), len(cases)):
            seconds = run_once(case, work)
            if round_number:
                case.seconds.append(seconds)
        print(f"round {round_number} of {repeats}", file=sys.stderr)


def run_once(case: Case, work: Path) -> float:
    """CPU seconds (user + system) of one process and its children."""
    environment = {**os.environ, **case.environment}
    if case.fresh_cache:
        environment["TENFOLD_CACHE"] = tempfile.mkdtemp(dir=work)
    process = subprocess.Popen(
        case.command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = case.exit_code = os.waitstatus_to_exitcode(status)
    if case.exit_code != 0 and case.command[0].endswith("tenfold"):
        sys.exit(f"{case.label} failed with exit code {case.exit_code}")
    return usage.ru_utime + usage.ru_stime


def table(cases: Sequence[Case], others: Mapping[str, str], repeats: int) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in others.items())
    rows = [
        f"| `{case.label}` | {min(case.seconds):.3f} | {statistics.median(case.seconds):.3f} | "
        f"{_budget(case)} |"
        for case in cases
    ]
    return "\n".join(
        [
            "# Command line",
            "",
            "CPU seconds (user + system) of one call, by `tools/bench_cli.py`: every command line "
            f"{repeats} times, interleaved in random order, after one warm-up each. `tenfold` is "
            f"the installed script with {PLUGINS} plugins; its `--dry-run` plans "
            "`core:perplexity` of `core:hf` on `core:python-stdlib`.",
            "",
            "| command | best | median | budget |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"CPython {platform.python_version()}, {os.cpu_count()} {platform.machine()} cores, "
            f"tenfold {importlib.metadata.version('tenfold')}, {versions}.",
            "",
        ]
    )


def _budget(case: Case) -> str:
    if case.exit_code != 0:
        return f"exit code {case.exit_code}"
    return "" if case.budget is None else f"{case.budget:.2f}"


if __name__ == "__main__":
    sys.exit(main())
