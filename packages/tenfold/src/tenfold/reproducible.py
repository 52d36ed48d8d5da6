"""The `[reproducibility]` table: thread counts, deterministic kernels, global seeds.

Results must not rest on any of this: seeds are derived by name and handed to whoever needs
one. It is the net below libraries that use global state.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from typing import Any

from tenfold.seeds import derive


def prepare(settings: Mapping[str, Any]) -> None:
    """Sets what libraries read when they are imported. Call before anything heavy is."""
    # Threads that spin while they wait take the cores from those they wait for, as soon as
    # anything else runs on the machine: training became eight times slower on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads := settings["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if settings["deterministic"]:
        # cuBLAS is deterministic only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def settle(settings: Mapping[str, Any], seed: int) -> None:
    """Applies the table to libraries that are imported by now; cheap to call again."""
    random.seed(derive(seed, "random"))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(derive(seed, "numpy") % 2**32)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.manual_seed(derive(seed, "torch"))
    if threads := settings["threads"]:
        torch.set_num_threads(threads)
    if settings["deterministic"]:
        # Operations that have no deterministic form warn instead of failing.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling fresh memory finds bugs in kernels; it costs time and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
