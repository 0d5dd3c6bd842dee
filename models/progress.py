"""How far a preparation is: the line others read from its progress file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

_LEAST_INTERVAL_S = 0.2


class Progress(BaseModel):
    """One state of a preparation."""

    stage: Literal["download", "convert", "verify", "done", "failed"]
    done: float = 0
    total: float | None = None
    unit: Literal["bytes", "share"] = "share"
    message: str = ""


class ProgressFile:
    """Writes each state over the last one, in one step, so that a reader never sees half a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: Progress | None = None
        self._at = 0.0

    def write(self, progress: Progress) -> None:
        """Writes, except when only the number moved and the last writing was just now."""
        moved = self._last is None or (progress.stage, progress.message) != (
            self._last.stage,
            self._last.message,
        )
        now = time.monotonic()
        if not moved and now - self._at < _LEAST_INTERVAL_S:
            return
        self._last, self._at = progress, now
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.write_text(progress.model_dump_json())
        temporary.replace(self._path)
