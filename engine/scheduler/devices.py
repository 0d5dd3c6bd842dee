"""The devices of this machine: the host's memory and its NVIDIA GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.scheduler.nvml import DriverNvml, Nvml, NvmlError, visible

CPU = "cpu:0"


@dataclass(frozen=True)
class Device:
    """A place for runners; ``memory_bytes`` is all that it has."""

    name: str
    memory_bytes: int
    #: A GPU's product name: 'NVIDIA H100 80GB HBM3'; '' = not known.
    product: str = ""
    #: A GPU's CUDA compute capability; None = not known.
    capability: tuple[int, int] | None = None
    #: Whether a GPU has NVLink.
    nvlink: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("cuda:")


def find_devices() -> list[Device]:
    """The host first (``cpu:0``), then each GPU (``cuda:0`` …) that the NVIDIA driver shows."""
    return [Device(CPU, host_memory()), *find_gpus()]


def host_memory() -> int:
    """Bytes that this machine has, or its control group may use where that is less."""
    total = int(psutil.virtual_memory().total)
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def find_gpus(nvml: Nvml | None = None, setting: str | None = None) -> list[Device]:
    """The GPUs, in the order of their numbers; none when there is no NVIDIA driver.

    Args:
        nvml: whom to ask; None = the driver.
        setting: as ``CUDA_VISIBLE_DEVICES``; None = this process's own.
    """
    try:
        facts = (nvml or DriverNvml()).gpus()
    except NvmlError:
        return []
    setting = os.environ.get("CUDA_VISIBLE_DEVICES") if setting is None else setting
    return [
        Device(f"cuda:{gpu.index}", gpu.memory_bytes, gpu.product, gpu.capability, gpu.nvlink)
        for gpu in sorted(visible(facts, setting), key=lambda gpu: gpu.index)
    ]
