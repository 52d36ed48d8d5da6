"""DeepSpeed through Accelerate, on CUDA and on plain CPU processes.

Three things are needed together on CPU, or each process believes that it is alone and the data
is not sharded: `DS_ACCELERATOR=cpu` with `ACCELERATE_USE_DEEPSPEED=true` in the environment,
an Accelerate state that is told the gloo backend and *not* told `cpu` (which switches DeepSpeed
off), and batch sizes that agree with the world size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.scale import process

DEFAULT_STAGE = 2
STAGES = (0, 1, 2, 3)


def deepspeed_config(stage: int = DEFAULT_STAGE, *, offload: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration; `auto` values are filled from the training plan.

    Args:
        stage: what is sharded: 1 optimizer state, 2 also gradients, 3 also weights.
        offload: keep the optimizer's state (stage 3: weights too) in CPU memory.

    Raises:
        ConfigError: no such stage.
    """
    if stage not in STAGES:
        raise ConfigError(f"DeepSpeed ZeRO stage is {stage!r}; known: 0, 1, 2, 3")
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        # The checkpoint is one folder of ordinary weights, whatever sharded them.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        # The plan's optimizer is torch's AdamW, so that one file trains the same everywhere.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def active_config() -> dict[str, Any] | None:
    """This run's DeepSpeed configuration: the `scale.config` file, else ZeRO-2; None when
    DeepSpeed is not in use, or when `accelerate launch` configured it.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    if not process.uses_deepspeed() or process.launcher() != "deepspeed":
        return None
    path = os.environ.get(process.CONFIG, "")
    if not path:
        return deepspeed_config()
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"scale.config {path} is not a DeepSpeed JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"scale.config {path} must hold a JSON object")
    return {**{k: v for k, v in deepspeed_config().items() if v == "auto"}, **config}


def prepare_environment(device: str) -> None:
    """Sets what DeepSpeed and Accelerate read from the environment; before they are imported."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # Accelerate's own CPU switch turns DeepSpeed off without a word.
        os.environ.pop("ACCELERATE_USE_CPU", None)


def configure_accelerate(device: str) -> None:
    """Gives Accelerate a state that knows about DeepSpeed and the group's backend."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=False, backend="nccl" if device == "cuda" else "gloo")
