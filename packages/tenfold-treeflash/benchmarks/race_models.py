"""The models that `race.py` races: a target, its drafter, and an assistant; all trained here.

The target is deep and narrow: on a CPU one token then costs about as much as a few, which is what
a large model is like on an accelerator. It learns functions of the Python standard library; the
drafter learns what the target itself wrote. Whatever FOLDER holds is not trained again: folders
are named by the content of the run file that made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

from tenfold.builtin import hf
from tenfold.builtin.python_prompts import PythonPrompts
from tenfold.files import write_json
from tenfold.host import Host
from tenfold.records import GenerationConfig, SampleRecord
from tenfold.run import Options
from tenfold.seeds import content_hash
from tenfold.testing import FakeContext
from tenfold_treeflash.training import DrafterTrainer

SEED = 17
CONTEXT = 256
DATA: dict[str, Any] = {
    "use": "core:python-stdlib", "unit": "function", "min_chars": 80, "max_chars": 1200,
    "shuffle_seed": SEED,
}  # fmt: skip
TARGET: dict[str, Any] = {
    "use": "core:lm", "vocab_size": 2048, "hidden_size": 128, "layers": 24, "heads": 4,
    "context_length": CONTEXT, "batch_size": 4, "learning_rate": 2e-3, "steps": 900,
    "save_steps": 50, "dataset": DATA,
}  # fmt: skip
ASSISTANT: dict[str, Any] = TARGET | {"layers": 2, "steps": 600}
"""For transformers' assisted generation: the same tokenizer, a twelfth of the layers."""
PROMPTS: dict[str, Any] = {"max_prompt_chars": 300, "split": "train", "shuffle_seed": SEED}
TEXTS: dict[str, Any] = {"prompts": 1024, "max_new_tokens": 112, "temperatures": [0.0, 1.0]}
SHARD = 128
"""Prompts per file of written texts; what is written is not written again."""
DRAFTER: dict[str, Any] = {
    "layers": 2, "block_size": 8, "num_features": 4, "steps": 600, "steps_b": 500,
    "batch_size": 8, "context_length": 192, "anchors": 24, "learning_rate": 2e-3,
    "learning_rate_b": 1e-3, "save_steps": 100,
}  # fmt: skip


def train(name: str, trainer: dict[str, Any], folder: Path) -> Path:
    """The checkpoint that this trainer makes, from `folder` where it is there already."""
    file = {"schema": "tenfold-run/1", "name": f"race-{name}", "seed": SEED, "trainer": trainer}
    made = folder / f"{name}-{content_hash(trainer)[:12]}"
    if made.is_dir():
        return made
    with chdir(folder):  # where its run folder goes
        outcome = Host().run(file, options=Options(resume=True))
        checkpoint = outcome.run_dir.absolute() / "artifacts" / "checkpoint"
    partial = folder / f".{made.name}"
    shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
    partial.rename(made)
    return made


def train_target(folder: Path) -> Path:
    """The model to decode."""
    return train("target", TARGET, folder)


def train_assistant(folder: Path) -> Path:
    """A small model with the target's tokenizer."""
    return train("assistant", ASSISTANT, folder)


class Written:
    """Sample records that the target wrote, greedily and by sampling; see `TEXTS`.

    Prompts are functions of the modules that the target was trained on.
    """

    kind = "sample"

    def __init__(self, target: Path, folder: Path) -> None:
        self._target = target
        self._made = folder / f"texts-{content_hash([target.name, PROMPTS, TEXTS, SHARD])[:12]}"

    def splits(self) -> list[str]:
        """No splits: the trainer holds rows out itself."""
        return []

    def write(self) -> None:
        """Lets the target write what is missing."""
        model = None
        prompts = list(PythonPrompts(**PROMPTS).load(limit=TEXTS["prompts"]))
        for start in range(0, len(prompts), SHARD):
            for temperature in TEXTS["temperatures"]:
                path = self._made / f"{start:05d}-{temperature:g}.json"
                if path.is_file():
                    continue
                model = model or hf.load(str(self._target))
                config = GenerationConfig(
                    max_new_tokens=TEXTS["max_new_tokens"], temperature=temperature, seed=SEED
                )
                asked = [record.prompt for record in prompts[start : start + SHARD]]
                answers = model.generate(asked, config)
                rows = [
                    [model.prompt_ids(prompt), list(done.token_ids)]
                    for prompt, [done] in zip(asked, answers, strict=True)
                ]
                self._made.mkdir(parents=True, exist_ok=True)
                write_json(path, rows)
                print(f"{path.name}: {sum(len(ids) for _, ids in rows)} tokens", flush=True)

    def fingerprint(self, split: str = "") -> str:
        """Hash of what decides the texts."""
        return self._made.name

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[SampleRecord]:
        """All of them."""
        self.write()
        for path in sorted(self._made.glob("*.json")):
            for number, (before, after) in enumerate(json.loads(path.read_text(encoding="utf-8"))):
                yield SampleRecord(
                    id=f"{path.stem}-{number}", prompt="", completion="", prompt_ids=before,
                    completion_ids=after,
                )  # fmt: skip


def unused_token(tokenizer: Any) -> int:
    """A token that no text holds, for the drafter's mask: the byte 0xff is never part of UTF-8.

    transformers' own DFlash loop takes a token only, and this vocabulary has no row to spare.
    """
    return int(tokenizer.convert_tokens_to_ids("ÿ"))


def train_drafter(target: Path, folder: Path, **changes: Any) -> Path:
    """The target's drafter, learned from what the target writes."""
    settings = DRAFTER | changes
    written = Written(target, folder)
    name = content_hash([target.name, PROMPTS, TEXTS, SHARD, settings])[:12]
    made = folder / f"drafter-{name}"
    if made.is_dir():
        return made
    model: Any = hf.load(str(target))
    work = folder / f".work-{name}"
    context = FakeContext(work, seed=SEED, on_advance=_report)
    trainer = DrafterTrainer(model, written, mask=str(unused_token(model.tokenizer)), **settings)
    checkpoint = trainer.fit(context, None, {})
    for metric in checkpoint.metrics:
        print(f"{metric.name} = {metric.value:.4f}", flush=True)
    partial = folder / f".{made.name}"
    shutil.copytree(checkpoint.path, partial, dirs_exist_ok=True)
    partial.rename(made)
    shutil.rmtree(work)
    return made


def _report(done: int) -> None:
    if done % 50 == 0:
        print(f"drafter: {done} steps", flush=True)
