"""How many tokens each expert of each layer got, counted into a file that another process reads.

The file, ``$HEARTH_EXPERT_LOAD.RANK``: int64 layers, int64 experts, then the counts, int64, row-major
(layers, experts), in the machine's byte order; ``engine/runners/expert_load.py`` reads it. Layers stand in
the order in which they first ran; the file grows as they appear, the header last. Counts only rise; a new
process begins a new file.

Ranks of one expert-parallel group that see the same tokens (tensor parallelism) count the same: take one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Below vLLM's own logger, whose handlers it has.
logger = logging.getLogger("vllm.hearth_moe")

#: Where to count; unset, nothing is counted.
VARIABLE = "HEARTH_EXPERT_LOAD"
HEADER_BYTES = 16


class ExpertCounter:
    """Counts of tokens, shape (layers, experts), in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        """Begins the file anew, without layers.

        Raises:
            OSError: the file cannot be written.
        """
        self.path = path
        self._rows: dict[str, int] = {}
        self.counts: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)
        # Renamed into place: whoever has an old one mapped keeps it, rather than losing its pages.
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(bytes(HEADER_BYTES))
        fresh.replace(path)
        self._header: NDArray[np.int64] = np.memmap(path, dtype=np.int64, mode="r+", shape=(2,))

    def add(self, layer: str, ids: NDArray[np.integer], experts: int) -> None:
        """Counts the chosen experts of some tokens.

        Args:
            layer: the layer's name; a new one gets the next row.
            ids: experts by their global numbers, each in [0, experts), any shape.
            experts: how many the layer has.

        Raises:
            ValueError: the layer has another number of experts than the first one: the file has one width.
        """
        row = self._rows.get(layer)
        if row is None:
            row = self._new_row(layer, experts)
        self.counts[row] += np.bincount(ids.reshape(-1), minlength=experts)

    def _new_row(self, layer: str, experts: int) -> int:
        row = len(self._rows)
        if row and experts != self.counts.shape[1]:
            raise ValueError(
                f"{layer} has {experts} experts and the layers before it {self.counts.shape[1]}: one file of "
                f"counts has one width. Unset {VARIABLE} for this model."
            )
        with self.path.open("r+b") as file:
            # Not truncate: on a full disk that would end in a bus error when the first token is counted.
            os.posix_fallocate(file.fileno(), 0, HEADER_BYTES + (row + 1) * experts * 8)
        self.counts = np.memmap(
            self.path, dtype=np.int64, mode="r+", offset=HEADER_BYTES, shape=(row + 1, experts)
        )
        self._rows[layer] = row
        self._header[1], self._header[0] = experts, row + 1
        return row


class _Recorder:
    """The process's counter, made when the first layer runs: the rank is not known before."""

    def __init__(self) -> None:
        self.counter: ExpertCounter | None = None
        self.failed = False

    def record(self, layer: str, ids: Tensor, experts: int) -> None:
        if self.failed:
            return
        try:
            if self.counter is None:
                self.counter = ExpertCounter(Path(f"{os.environ[VARIABLE]}.{_rank()}"))
            self.counter.add(layer, ids.numpy(), experts)
        except (OSError, ValueError) as error:
            # Answers matter more than counts.
            self.failed = True
            logger.warning("hearth_moe counts no experts from here on: %s", error)


_recorder = _Recorder()


def counting() -> bool:
    """Whether this process is to count."""
    return bool(os.environ.get(VARIABLE))


def record(layer: str, ids: Tensor, experts: int) -> None:
    """Counts one call of a layer, where ``counting()``; arguments as of ``ExpertCounter.add``.

    A file that cannot be written ends the counting, with a line in the log, and nothing else.
    """
    _recorder.record(layer, ids, experts)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
