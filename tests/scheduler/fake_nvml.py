"""An NVML whose GPUs are what a test says."""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduler.nvml import GpuFacts, NvmlError


class FakeNvml:
    """GPUs with used bytes and processes that a test sets; ``error`` is raised by every call."""

    def __init__(self, gpus: Sequence[GpuFacts]) -> None:
        self._gpus = list(gpus)
        self.used = {gpu.index: 0 for gpu in gpus}
        self.running: dict[int, dict[int, int]] = {gpu.index: {} for gpu in gpus}
        self.error: NvmlError | None = None

    def _check(self) -> None:
        if self.error:
            raise self.error

    def gpus(self) -> list[GpuFacts]:
        self._check()
        return list(self._gpus)

    def used_bytes(self, index: int) -> int:
        self._check()
        return self.used[index]

    def processes(self, index: int) -> dict[int, int]:
        self._check()
        return dict(self.running[index])
