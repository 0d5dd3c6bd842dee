"""NVML, as far as Hearth asks it: which GPUs there are, what of them is used, and by which processes.

The library (`nvidia-ml-py`) stands behind a small interface, so that tests hand in a fake.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class NvmlError(Exception):
    """There is no NVIDIA driver, its library is not installed, or it does not answer."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of this machine."""

    index: int
    uuid: str
    #: The product's name: 'NVIDIA H100 80GB HBM3'.
    product: str
    memory_bytes: int
    #: CUDA compute capability; None = it does not say.
    capability: tuple[int, int] | None = None
    #: Whether one NVLink at least is up.
    nvlink: bool = False


class Nvml(Protocol):
    """Every method raises :class:`NvmlError` where the driver does not answer."""

    def gpus(self) -> list[GpuFacts]:
        """The GPUs, in the order of their PCI addresses."""

    def used_bytes(self, index: int) -> int:
        """Bytes of this GPU that are taken."""

    def processes(self, index: int) -> dict[int, int]:
        """Bytes of this GPU by process id; 0 where the driver does not tell. Not all may be to be seen."""


class DriverNvml:
    """The driver's own. Each call opens and closes the library, which costs about a millisecond."""

    def gpus(self) -> list[GpuFacts]:
        with _library() as nvml:
            return [_facts(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]

    def used_bytes(self, index: int) -> int:
        with _library() as nvml:
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)

    def processes(self, index: int) -> dict[int, int]:
        with _library() as nvml:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return {int(each.pid): int(each.usedGpuMemory or 0) for each in found}


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(f"the NVIDIA driver does not answer: {error}") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise NvmlError(f"the NVIDIA driver does not answer: {error}") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _facts(nvml: Any, index: int) -> GpuFacts:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    capability = None
    with contextlib.suppress(nvml.NVMLError):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = int(major), int(minor)
    return GpuFacts(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        product=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=capability,
        nvlink=_has_nvlink(nvml, handle),
    )


def _has_nvlink(nvml: Any, handle: Any) -> bool:
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                return True
        except nvml.NVMLError:
            return False
    return False


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def visible(gpus: list[GpuFacts], setting: str | None) -> list[GpuFacts]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves; None = all.

    Numbers and (beginnings of) UUIDs are understood, as CUDA does; what comes after one that is neither is
    hidden, as CUDA hides it.
    """
    if setting is None:
        return gpus
    found: list[GpuFacts] = []
    for word in (word.strip() for word in setting.split(",")):
        if re.fullmatch(r"\d+", word):
            match = [gpu for gpu in gpus if gpu.index == int(word)]
        else:
            match = [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
        if len(match) != 1:
            break
        found += [gpu for gpu in match if gpu not in found]
    return found
