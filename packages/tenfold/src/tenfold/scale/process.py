"""This process among the others of a run: process groups and small exchanges.

The launcher (`tenfold.scale.launch`) starts every process with RANK, WORLD_SIZE, LOCAL_RANK
and MASTER_*; a run of one process has none of them, and everything here is then a no-op.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tenfold.errors import RunFailed

LAUNCHER = "TENFOLD_LAUNCHER"
CONFIG = "TENFOLD_SCALE_CONFIG"


def launcher() -> str:
    """What started this process: `none`, `torchrun`, `accelerate` or `deepspeed`."""
    return os.environ.get(LAUNCHER, "") or "none"


def rank() -> int:
    """This process's number among the run's processes."""
    return int(os.environ.get("RANK", "0"))


def asked_world_size() -> int:
    """Number of processes that the launcher's environment speaks of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def obtained_world_size() -> int:
    """Number of processes that really form a group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> str:
    """The device of this process: `cuda` becomes `cuda:<local rank>` where there are several."""
    if device == "cuda" and asked_world_size() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def init_process_group(device: str) -> None:
    """Joins this run's processes into one group; nothing to do for a single process.

    CPU uses gloo. CUDA uses nccl for tensors and gloo for everything else. Under DeepSpeed the
    group is made through its own front end, which otherwise would not know of it.

    Raises:
        RunFailed: the group has another size than was asked for.
    """
    if asked_world_size() == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(local_device(device))
    if uses_deepspeed():
        import deepspeed

        backend = "nccl" if device == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if obtained_world_size() != asked_world_size():
        raise RunFailed(
            f"asked for {asked_world_size()} processes, the group has {obtained_world_size()}"
        )


def uses_deepspeed() -> bool:
    """Whether this run trains through DeepSpeed."""
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    return launcher() == "deepspeed" or (launcher() == "accelerate" and by_accelerate)


def barrier() -> None:
    """Waits for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process. For small Python objects."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; a cheap vote, so that all act alike."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())
