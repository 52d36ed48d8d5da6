"""`tenfold treeflash build-data | train | evaluate | convert`.

The first three are runs of the host: they leave a record, show its progress, and called again with
the same arguments they go on where they were interrupted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.builtin.run_samples import RunSamples
from tenfold.cli.execution import print_outcome
from tenfold.cli.output import note, print_json
from tenfold.config import SCHEMA
from tenfold.errors import EXIT_OK, ConfigError
from tenfold.files import replacing, write_json
from tenfold.host import Host
from tenfold.run import Options, Outcome


def build_data(
    target: str,
    out: str,
    prompts: str = "core:python-prompts",
    n: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    suffix: str = "",
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Lets the model answer prompts; writes the answers with their exact tokens as JSON Lines."""
    path = Path(out).expanduser()
    if path.is_dir() or path.suffix != ".jsonl":
        raise ConfigError(f"OUT is {out}; give a file that ends in .jsonl")
    dataset = _dataset(prompts, "treeflash:row-prompts")
    if suffix:
        dataset["suffix"] = suffix
    if limit is not None:
        dataset["limit"] = limit
    settings = {
        "n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "batch_size": batch_size,
    } | ({} if top_k is None else {"top_k": top_k})  # fmt: skip
    table = {
        "name": "treeflash-data", "seed": seed,
        "model": _model(target, device, dtype),
        "dataset": dataset,
        "evaluator": {"use": "core:generate", **settings},
    }  # fmt: skip
    outcome = _run(table, set, device)
    if outcome.exit_code != EXIT_OK:
        return print_outcome(outcome, as_json=as_json)
    samples = tokens = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for sample in RunSamples(str(outcome.run_dir)).load():
            row = {name: value for name, value in sample.to_json().items()
                   if value not in (None, {}, "") and name != "stats"}  # fmt: skip
            # An answer of no token at all is an answer.
            row.setdefault("completion", "")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            samples, tokens = samples + 1, tokens + len(sample.completion_ids or ())
    about = path.with_suffix(".about.json")
    write_json(about, {"model": target, "prompts": prompts, "suffix": suffix, "seed": seed,
                       **settings, "samples": samples, "run": outcome.run_dir.name})  # fmt: skip
    facts = {"file": out, "samples": samples, "tokens": tokens, "run": str(outcome.run_dir)}
    if as_json:
        print_json(facts)
    else:
        print(f"{out}: {samples} samples, {tokens:,} tokens")
        note(f"settings and seed: {about.name}; record: {outcome.run_dir}")
    return EXIT_OK


def train(
    target: str,
    data: str,
    out: str,
    phase: str = "both",
    init: str | None = None,
    layers: int | None = None,
    block_size: int | None = None,
    steps: int | None = None,
    steps_b: int | None = None,
    batch_size: int | None = None,
    context_length: int | None = None,
    features: str = "online",
    processes: int = 1,
    launcher: str = "auto",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Trains a drafter and puts it into a folder of its own."""
    folder = _new_folder(out)
    given = {
        "init": init, "layers": layers, "block_size": block_size, "steps": steps,
        "steps_b": steps_b, "batch_size": batch_size, "context_length": context_length,
    }  # fmt: skip
    table = {
        "name": "treeflash-train", "seed": seed,
        "trainer": {
            "use": "treeflash:drafter", "target": _model(target, device, dtype),
            "dataset": _dataset(data, "treeflash:rows"), "phase": phase, "features": features,
            **{name: value for name, value in given.items() if value is not None},
        },
        "scale": {"processes": processes, "launcher": launcher},
    }  # fmt: skip
    outcome = _run(table, set, device)
    if outcome.exit_code != EXIT_OK or outcome.checkpoint is None:
        return print_outcome(outcome, as_json=as_json)
    with _filling(folder) as partial:
        shutil.copytree(outcome.checkpoint, partial, dirs_exist_ok=True)
    if as_json:
        print_json({**outcome.to_json(), "drafter": out})
        return EXIT_OK
    print_outcome(outcome, as_json=False)
    print(f"drafter: {out}")
    return EXIT_OK


def evaluate(
    target: str,
    drafter: str,
    data: str = "core:python-stdlib",
    method: str = "tree",
    tree_sizes: Sequence[int] = (1, 4, 8, 16, 32, 64),
    anchors: int = 16,
    max_text_tokens: int = 256,
    limit: int = 32,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Measures a drafter on given texts, by depth and by tree size; generates nothing."""
    dataset = {**_dataset(data, "treeflash:rows"), "limit": limit}
    table = {
        "name": "treeflash-evaluate", "seed": seed,
        "model": {
            "use": f"treeflash:{method}", "base": _model(target, device, dtype), "tree_size": 16,
            "drafter": {"use": "treeflash:drafter", "checkpoint": drafter,
                        **_placement(device, dtype)},
        },
        "dataset": dataset,
        "evaluator": {
            "use": "treeflash:diagnostics", "anchors": anchors, "tree_sizes": list(tree_sizes),
            "max_text_tokens": max_text_tokens,
        },
    }  # fmt: skip
    return print_outcome(_run(table, set, device), as_json=as_json)


def convert(
    source: str,
    out: str,
    to: str = "treeflash",
    target: str | None = None,
    approximator: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Writes a drafter in another layout."""
    from tenfold_treeflash.checkpoints import load_drafter, save_drafter
    from tenfold_treeflash.formats import save_dflash, save_speculators

    if approximator is not None and to != "treeflash":
        raise ConfigError(f"--approximator is for --to treeflash; {to} has no place for one")
    if to == "speculators" and target is None:
        raise ConfigError("--to speculators names the model that the drafter is for: give --target")
    folder = _new_folder(out)
    network = load_drafter(source, dtype=dtype, ar_approximation=approximator)
    left_out: list[str] = []
    with _filling(folder) as partial:
        if to == "treeflash":
            save_drafter(network, partial)
        elif to == "dflash":
            left_out = save_dflash(network, partial)
        else:
            from transformers import AutoConfig

            try:
                config = AutoConfig.from_pretrained(str(target), local_files_only=True)
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read the configuration of {target}: {error}") from error
            left_out = save_speculators(network, partial, config, str(target))
    if as_json:
        print_json({"drafter": out, "format": to, "left_out": left_out})
        return EXIT_OK
    print(f"{out}: {to}")
    if left_out:
        note(f"left out, since {to} has no place for it: {', '.join(left_out)}")
    return EXIT_OK


# --- Shared ---------------------------------------------------------------------------------------


def _run(table: Mapping[str, Any], settings: Sequence[str], device: str | None) -> Outcome:
    """Runs a table, or goes on with the newest unfinished run of the same one."""
    host = Host()
    scale = dict(table.get("scale", {})) | ({} if device is None else {"device": device})
    config = host.resolve({"schema": SCHEMA, **table, "scale": scale}, settings)
    return host.run_config(config, Options(resume=True, argv=tuple(sys.argv[1:])))


def _placement(device: str | None, dtype: str | None) -> dict[str, str]:
    return {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}


def _model(folder: str, device: str | None, dtype: str | None) -> dict[str, Any]:
    return {"use": "core:hf", "checkpoint": folder, **_placement(device, dtype)}


def _dataset(source: str, files: str) -> dict[str, Any]:
    """A component by its id (its settings by --set dataset.KEY=VALUE), or files read by `files`."""
    if Path(source).expanduser().exists():
        return {"use": files, "path": source}
    plugin, colon, name = source.partition(":")
    if colon and plugin.isidentifier() and name and "/" not in source:
        return {"use": source}
    raise ConfigError(
        f"{source} is no file; give JSON Lines, or a data set's id such as core:python-stdlib"
    )


def _new_folder(out: str) -> Path:
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{out} is not empty; name a new folder")
    return folder


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
