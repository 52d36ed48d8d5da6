"""Which number types a device is fast with."""

from __future__ import annotations

from pathlib import Path

import torch


def native_bf16(device: str) -> bool:
    """Whether bfloat16 is fast on a device: GPUs from Ampere on, CPUs with bf16 instructions
    (without them it is emulated, tens of times slower than fp32)."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has_bf16()
    return False


def _cpu_has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text
