"""After a group on GPUs has ended: waiting until the driver has its memory back.

A process that is gone for the kernel may still be taken down by the driver, and the next start on the GPU
would find too little free. What a group uses of each GPU is looked at while it lives; after its end its
memory is back once none of its processes is listed on the GPU, or so much less is used there. Where process
ids cannot be matched (in a container the driver tells the host's), what is used must have stopped falling.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from engine.scheduler.nvml import DriverNvml, Nvml, NvmlError
from engine.scheduler.units import ProcessRef

log = logging.getLogger(__name__)

#: Longest wait for memory to come back, seconds.
PATIENCE_S = 30.0
#: What other processes on the GPU may have taken in the meantime, bytes.
TOLERANCE_BYTES = 256 * 2**20
#: Used memory that cannot be matched with a process must not fall for so many looks.
_STEADY_LOOKS = 3
_PAUSE_S = 0.2
GIB = 2**30


@dataclass
class _Use:
    """What a group was last seen to use of one GPU, and all that was used there at that moment; bytes."""

    ours: int = 0
    used: int = 0
    #: Its processes that the driver listed there.
    listed: set[int] = field(default_factory=set)


class GpuMemory:
    """Remembers which groups stand on which GPUs. Without NVML it does nothing."""

    def __init__(
        self,
        nvml: Nvml | None = None,
        *,
        patience_s: float = PATIENCE_S,
        pause_s: float = _PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``nvml``: whom to ask; None = the driver."""
        self._nvml = nvml or DriverNvml()
        self._patience_s, self._pause_s, self._clock = patience_s, pause_s, clock
        self._groups: dict[ProcessRef, dict[int, _Use]] = {}
        try:
            self._gpus = [gpu.index for gpu in self._nvml.gpus()]
        except NvmlError:
            self._gpus = []

    def stands_on(self, ref: ProcessRef, visible: str) -> None:
        """A group was started that sees these GPUs, as in ``CUDA_VISIBLE_DEVICES``; '' = none."""
        numbers = [int(word) for word in visible.split(",") if word.strip().isdigit()]
        self._groups[ref] = {number: _Use() for number in numbers if number in self._gpus}

    def observe(self, ref: ProcessRef, pids: Collection[int]) -> None:
        """Looks at what the living group uses. Blocks for some milliseconds a GPU."""
        try:
            if ref not in self._groups:  # started by an earlier scheduler
                found = [gpu for gpu in self._gpus if self._nvml.processes(gpu).keys() & set(pids)]
                self._groups[ref] = {gpu: _Use() for gpu in found}
            for gpu, use in self._groups[ref].items():
                own = {pid: size for pid, size in self._nvml.processes(gpu).items() if pid in pids}
                if own:
                    use.listed |= own.keys()
                    use.ours, use.used = sum(own.values()), self._nvml.used_bytes(gpu)
        except NvmlError as error:
            log.debug("GPU memory of process %d cannot be looked at: %s", ref.pid, error)

    async def returned(self, ref: ProcessRef) -> None:
        """Waits, a bounded time, until the memory of an ended group is back; then forgets the group."""
        uses = self._groups.pop(ref, None)
        if not uses:
            return
        deadline = self._clock() + self._patience_s
        waiting = list(uses)
        looks: dict[int, list[int]] = {index: [] for index in waiting}
        while waiting:
            try:
                waiting = await asyncio.to_thread(self._still_taken, waiting, uses, looks)
            except NvmlError as error:
                log.warning("GPU memory cannot be looked at, so nobody waits for it: %s", error)
                return
            if not waiting:
                return
            if self._clock() >= deadline:
                self._complain(ref, waiting, uses)
                return
            await asyncio.sleep(self._pause_s)

    def _still_taken(
        self, indices: Sequence[int], uses: dict[int, _Use], looks: dict[int, list[int]]
    ) -> list[int]:
        return [index for index in indices if not self._is_back(index, uses[index], looks[index])]

    def _is_back(self, index: int, use: _Use, looks: list[int]) -> bool:
        used = self._nvml.used_bytes(index)
        if use.listed:
            dropped = use.ours > 0 and used <= use.used - use.ours + TOLERANCE_BYTES
            return dropped or not use.listed & self._nvml.processes(index).keys()
        looks.append(used)
        last = looks[-_STEADY_LOOKS:]
        return len(last) == _STEADY_LOOKS and last[-1] >= last[0]

    def _complain(self, ref: ProcessRef, indices: Sequence[int], uses: dict[int, _Use]) -> None:
        for index in indices:
            log.error(
                "cuda:%d has not got its memory back %.0f s after process %d ended (%.1f GiB were its own). "
                "Starts there go on and may run out of memory. `nvidia-smi` shows who holds it: end that "
                "process, or reset the GPU (`nvidia-smi --gpu-reset -i %d`) once nothing runs on it.",
                index,
                self._patience_s,
                ref.pid,
                uses[index].ours / GIB,
                index,
            )
