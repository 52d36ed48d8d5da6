"""Running a script on several CPU processes, for tests of training and evaluation at scale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(
    script: Path,
    *arguments: str,
    launcher: str = "torchrun",
    config: str | Path = "",
    processes: int = 2,
    fails: bool = False,
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Runs `script` on so many processes, with the environment that the host gives its workers.

    Args:
        launcher: `torchrun` or `deepspeed`: what the workers take themselves to be started by.
        config: file of DeepSpeed settings.
        fails: whether the script has to fail; it has to succeed otherwise.

    Raises:
        AssertionError: it did not; the message ends with what the processes printed.
    """
    environment = {
        **os.environ,
        "TENFOLD_LAUNCHER": launcher,
        "TENFOLD_SCALE_CONFIG": str(config),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles a small operator at first use and looks for ninja on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if launcher == "deepspeed":
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(processes), str(script), *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if (done.returncode != 0) != fails:
        raise AssertionError(
            f"{script.name} ended with {done.returncode}\n"
            f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
    return done
