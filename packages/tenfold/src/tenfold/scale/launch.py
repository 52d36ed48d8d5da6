"""Several processes: the host re-executes itself under a launcher and checks what it got.

Workers run `python -m tenfold worker RUN_DIR`; they read the resolved configuration from the
run folder. The world size that a worker finds is compared with the one that was asked for:
`accelerate launch --cpu --num_processes 2`, for one, silently starts a single process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold.errors import EXIT_INTERRUPTED, ConfigError, RunFailed
from tenfold.run import Process

_STDERR = "TENFOLD_STDERR"


def launch(run_dir: Path, scale: Mapping[str, Any], device: str, arguments: list[str]) -> int:
    """Starts the workers of a run and waits; the exit code of the first that failed, or 0.

    Args:
        scale: the run's `[scale]` table.
        device: the resolved device, which decides between CPU and GPU back ends.
        arguments: further arguments for each worker.
    """
    processes = int(scale["processes"])
    launcher = "torchrun" if scale["launcher"] == "auto" else str(scale["launcher"])
    config = _config_file(scale)
    environment = _environment(launcher, processes, device, config)
    worker = ["worker", str(run_dir), "--expect", str(processes), *arguments]
    command = _command(launcher, processes, config) + worker
    with (run_dir / "launcher.log").open("ab") as log:
        own = environment.get(_STDERR)
        child = subprocess.Popen(command, env=environment, stderr=log if own else None)
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The terminal has sent SIGINT to the workers too; the launcher needs a moment.
            child.send_signal(signal.SIGTERM)
            child.wait()
            return EXIT_INTERRUPTED


def use_host_stderr() -> None:
    """Lets this worker write to the host's own stderr.

    A launcher reports every failure with a long traceback of its own, which goes to
    `launcher.log`; what the workers say is for the user.
    """
    path = os.environ.get(_STDERR, "")
    if path:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_APPEND)
            sys.stderr.flush()
            os.dup2(handle, 2)
            os.close(handle)


def _config_file(scale: Mapping[str, Any]) -> str:
    path = str(scale.get("config", ""))
    if path and not Path(path).is_file():
        raise ConfigError(f"scale.config: no such file: {path}")
    return path


def _command(launcher: str, processes: int, config: str) -> list[str]:
    """The launcher's command line, up to the worker's own arguments."""
    if launcher == "accelerate" and config:
        # Accelerate's own file decides how many processes start; the worker checks the number.
        module = ["-m", "accelerate.commands.launch", "--config_file", config]
        return [sys.executable, *module, "-m", "tenfold"]
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *module, "-m", "tenfold"]


def _environment(launcher: str, processes: int, device: str, config: str) -> dict[str, str]:
    """Variables that Accelerate and DeepSpeed read in each worker."""
    environment = dict(os.environ)
    environment["TENFOLD_LAUNCHER"] = launcher
    environment["TENFOLD_LAUNCH_ID"] = secrets.token_hex(4)
    environment["TENFOLD_SCALE_CONFIG"] = config
    environment.pop(_STDERR, None)
    if Path("/proc/self/fd/2").exists():
        environment[_STDERR] = f"/proc/{os.getpid()}/fd/2"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # DeepSpeed compiles a small operator at first use and looks for ninja on PATH.
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", "")])
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    if launcher == "deepspeed":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
    return environment


def this_process(expected: int, recorded: int = 0) -> Process:
    """This worker's place, from the launcher's environment.

    Raises:
        RunFailed: the launcher started another number of processes than was asked for.
    """
    obtained = int(os.environ.get("WORLD_SIZE", "1"))
    if obtained != expected:
        raise RunFailed(
            f"asked for {expected} processes and got {obtained}",
            hint="the launcher or its configuration file starts another number; on CPU use "
            'launcher = "torchrun"',
        )
    return Process(
        rank=int(os.environ.get("RANK", "0")),
        world_size=obtained,
        launch_id=os.environ.get("TENFOLD_LAUNCH_ID", ""),
        recorded=recorded,
    )
