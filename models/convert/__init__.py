"""Conversions: from the files a package holds to what an engine loads, by the name in a catalog entry."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from engine.runners.environment import repair_imports

#: Called with what is being done and how much of the whole is done (0 to 1).
Progress = Callable[[str, float], None]
#: (files by base name, an empty folder to fill, progress).
Convert = Callable[[dict[str, Path], Path, Progress], None]

#: Name -> version. A raised version makes prepared folders stale: raise it whenever the outcome changes.
CONVERSIONS = {"smollm2": 1, "whisper": 1}


class ConversionError(Exception):
    """A conversion cannot be done; the message says why."""


def find(name: str) -> Convert:
    """The conversion of this name.

    Raises:
        ConversionError: there is none.
    """
    if name not in CONVERSIONS:
        raise ConversionError(f"there is no conversion '{name}'. Known: {', '.join(sorted(CONVERSIONS))}.")
    # Imported when needed: each pulls in its engine's libraries, which may need the repairs first.
    repair_imports()
    convert: Convert = importlib.import_module(f"models.convert.{name}").convert
    return convert
