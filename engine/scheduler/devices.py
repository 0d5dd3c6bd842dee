"""The devices of this machine: the host's memory and its NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CPU = "cpu:0"


@dataclass(frozen=True)
class Device:
    """A place for runners; ``memory_bytes`` is all that it has."""

    name: str
    memory_bytes: int

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


def find_gpus() -> list[Device]:
    """The GPUs; none when there is no NVIDIA driver or its library is not installed."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        sizes = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return [Device(f"cuda:{index}", size) for index, size in enumerate(sizes)]
