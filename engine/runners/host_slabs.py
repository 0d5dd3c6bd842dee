"""Copies of tensors in pinned host memory, packed byte after byte into slabs of one size.

PyTorch's allocator of pinned memory rounds every block up to a power of two, which would cost a model's
weights, one block a tensor, up to as much again. A slab is a power of two, and a tensor goes on in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Copied:
    """A tensor's place: its bytes begin at ``start`` of the slabs put end to end."""

    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class HostSlabs:
    """Host copies of tensors.

    Args:
        allocate: gives that many bytes as a uint8 tensor in host memory; another only in tests.
        slab_bytes: a power of two.
    """

    def __init__(
        self,
        allocate: Callable[[int], Tensor] = lambda size: torch.empty(
            size, dtype=torch.uint8, pin_memory=True
        ),
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        self._allocate = allocate
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._end = 0

    def copy(self, tensor: Tensor) -> Copied:
        """Copies a dense tensor (see :func:`is_dense`) to the host; the caller synchronises."""
        copied = Copied(self._end, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        source = _bytes(tensor)
        self._end += source.numel()
        while len(self._slabs) * self._slab_bytes < self._end:
            self._slabs.append(self._allocate(self._slab_bytes))
        for piece, part in self._pieces(copied.start, source):
            piece.copy_(part, non_blocking=True)
        return copied

    def restore(self, copied: Copied) -> Tensor:
        """The tensor as it was, anew on its device; the caller synchronises."""
        made = torch.empty_strided(copied.shape, copied.stride, dtype=copied.dtype, device=copied.device)
        for piece, part in self._pieces(copied.start, _bytes(made)):
            part.copy_(piece, non_blocking=True)
        return made

    def _pieces(self, start: int, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of equal length: a piece of a slab, and the part of ``data`` that stands there."""
        done = 0
        while done < data.numel():
            number, offset = divmod(start + done, self._slab_bytes)
            size = min(self._slab_bytes - offset, data.numel() - done)
            yield self._slabs[number][offset : offset + size], data[done : done + size]
            done += size


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory without gaps or overlaps, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
