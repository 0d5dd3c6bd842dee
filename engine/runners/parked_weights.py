"""A torch model's weights, put away and taken back, while the model itself (its modules, configuration,
tokenizer) stays built.

On a GPU they wait in pinned host memory, and the copy is kept: weights do not change, so the second sleep
copies nothing. On a CPU they are let go, and mapped again from the safetensors files that they came from.
Which tensor of which file a weight is, is found by comparing contents at the first sleep, so no library's
renaming has to be known. One whose type was changed at loading (float16 files on a CPU) is converted again.
One that no file holds (buffers, fused layers) stays in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.runners.host_slabs import Copied, HostSlabs, is_dense
from engine.runners.memory import give_back

log = logging.getLogger("hearth.runner")

#: Beginning of a tensor that is compared before the whole, elements.
_HEAD = 64


class WeightsChangedError(RuntimeError):
    """The files that the weights came from are not what they were."""


@dataclass(frozen=True)
class _InFile:
    """Where a weight stands: its name in a safetensors file."""

    file: Path
    name: str


@dataclass(eq=False)
class _Parked:
    """One weight; those that share their memory are one."""

    holders: list[Tensor]
    dtype: torch.dtype
    source: _InFile | Copied | None = None


class ParkedWeights:
    """The weights (parameters and buffers) of some modules, at their place or put away.

    Args:
        modules: the modules of one model.
        folder: has the safetensors files that they were loaded from, at any depth.
        slabs: keep the weights of a GPU; others only in tests.
        on_gpu: whether a tensor is on a GPU; another only in tests.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        folder: Path,
        *,
        slabs: HostSlabs | None = None,
        on_gpu: Callable[[Tensor], bool] = lambda tensor: tensor.device.type != "cpu",
    ) -> None:
        self._modules = list(modules)
        self._folder = folder
        self._slabs = slabs or HostSlabs()
        self._on_gpu = on_gpu
        self._parked: list[_Parked] | None = None
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._away = False

    def put_away(self) -> None:
        """Gives the weights' memory back. Nothing may use the modules until :meth:`take_back`.

        Raises:
            RuntimeError: no host memory to pin.
        """
        if self._away:
            return
        if self._parked is None:
            self._parked = self._look()
            _synchronise()
        for weight in self._parked:
            if weight.source is None:
                continue
            nothing = torch.empty(0, dtype=weight.dtype)
            for holder in weight.holders:
                holder.data = nothing
        self._away = True
        give_back()

    def take_back(self) -> None:
        """Puts the weights back at their place.

        Raises:
            WeightsChangedError: a file of theirs has gone or was written since.
            RuntimeError: the device has not enough memory.
        """
        if not self._away or self._parked is None:
            return
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise WeightsChangedError(f"{file} has changed since the model was loaded from it")
        with ExitStack() as files:
            opened = {file: files.enter_context(_mapped(file)) for file in self._stamps}
            for weight in self._parked:
                if weight.source is None:
                    continue
                if isinstance(weight.source, Copied):
                    data = self._slabs.restore(weight.source)
                else:
                    data = opened[weight.source.file].get_tensor(weight.source.name).to(weight.dtype)
                for holder in weight.holders:
                    holder.data = data
        _synchronise()
        self._away = False

    def _look(self) -> list[_Parked]:
        """All weights, each with the place that it comes back from."""
        weights = list(self._weights())
        in_files: dict[tuple[int, ...], list[_InFile]] | None = None
        stay = 0
        for name, weight in weights:
            tensor = weight.holders[0]
            if self._on_gpu(tensor):
                weight.source = self._slabs.copy(tensor) if is_dense(tensor) else None
                continue
            if in_files is None:
                in_files = self._files()
            weight.source = _find(name, tensor, in_files.get(tuple(tensor.shape), []))
            stay += tensor.nbytes if weight.source is None else 0
        used = {weight.source.file for _, weight in weights if isinstance(weight.source, _InFile)}
        self._stamps = {file: _stamp(file) for file in used}
        if stay:
            log.info("%.1f MiB of weights stay in memory: no file holds them as they are", stay / 2**20)
        return [weight for _, weight in weights]

    def _weights(self) -> Iterator[tuple[str, _Parked]]:
        """Each weight once, under one of its names; equal views of one memory belong together."""
        seen: dict[tuple[Any, ...], _Parked] = {}
        for module in self._modules:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.numel() == 0:
                    continue
                key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if key in seen:
                    seen[key].holders.append(tensor)
                    continue
                seen[key] = _Parked([tensor], tensor.dtype)
                yield name, seen[key]

    def _files(self) -> dict[tuple[int, ...], list[_InFile]]:
        """The tensors of all files, by shape."""
        found: dict[tuple[int, ...], list[_InFile]] = {}
        for file in sorted(self._folder.rglob("*.safetensors")):
            with _mapped(file) as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    shape = tuple(opened.get_slice(name).get_shape())
                    found.setdefault(shape, []).append(_InFile(file, name))
        return found


def _find(name: str, tensor: Tensor, candidates: list[_InFile]) -> _InFile | None:
    """The candidate whose contents, in the tensor's type, are the tensor's; the likeliest names first."""
    # A view of other strides would come back laid out in another way, and sums in another order.
    if not tensor.is_contiguous():
        return None
    for candidate in sorted(candidates, key=lambda one: -_common_end(one.name, name)):
        with _mapped(candidate.file) as opened:
            stored = opened.get_tensor(candidate.name)
        head = stored.flatten()[:_HEAD].to(tensor.dtype)
        if torch.equal(head, tensor.flatten()[:_HEAD]) and torch.equal(stored.to(tensor.dtype), tensor):
            return candidate
    return None


def _synchronise() -> None:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)


def _common_end(one: str, other: str) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _mapped(file: Path) -> Any:
    """The file's tensors as views of its mapping: nothing is read until it is used."""
    return safe_open(file, framework="pt", device="cpu")


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        facts = file.stat()
    except FileNotFoundError:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
