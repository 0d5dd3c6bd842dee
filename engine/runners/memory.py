"""Gives freed memory back to the machine; libraries and the allocator keep it otherwise."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def give_back(*, cycles: bool = False) -> None:
    """Returns free memory to the kernel and the GPU.

    Args:
        cycles: first look for objects that only refer to each other, which takes some tenths of a second.
    """
    if cycles:
        gc.collect()
    torch = sys.modules.get("torch")  # where nothing has imported it, it holds nothing
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Lets glibc return its free pages, of all its arenas; nothing where the C library is another."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
