"""Prepares models, one after the other, and shows how far each is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from models.catalog import CatalogError, load_catalog, load_profile
from models.entry import ModelEntry
from models.prepare import PrepareError, key_of, prepare
from models.progress import Progress


def prepare_profile(name: str, weights_dir: Path, offline: bool, endpoint: str = "") -> int:
    """Prepares each model of profile ``name``; returns the exit status: 0, or 1 when any failed."""
    console = Console(stderr=True)
    try:
        catalog = load_catalog()
        entries = [catalog.find(model.id) for model in load_profile(name).models]
    except CatalogError as error:
        console.print(str(error), markup=False)
        return 1
    return prepare_entries(entries, weights_dir, offline, endpoint)


def prepare_entries(
    entries: Iterable[ModelEntry], weights_dir: Path, offline: bool, endpoint: str = ""
) -> int:
    """Prepares each model, with a bar on stderr; returns the exit status: 0, or 1 when any failed."""
    console = Console(stderr=True)
    # Chat and code may share weights: one of them is enough.
    unique = {key_of(entry): entry for entry in reversed(list(entries))}
    failed = 0
    columns = (TextColumn("{task.fields[model]:<24}"), BarColumn(24), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.description}"), console=console) as bars:
        for entry in reversed(unique.values()):
            failed += not _prepare_one(entry, weights_dir, offline, endpoint, bars)
    return 1 if failed else 0


def _prepare_one(entry: ModelEntry, weights_dir: Path, offline: bool, endpoint: str, bars: Bars) -> bool:
    task = bars.add_task("starting", model=entry.id, total=None)
    began = time.monotonic()
    try:
        path = prepare(entry, weights_dir, offline, lambda state: _show(bars, task, state), endpoint)
    except PrepareError as error:
        bars.update(task, description="failed", total=1, completed=0)
        bars.stop_task(task)
        bars.console.print(f"{entry.id}: {error}", markup=False, soft_wrap=True)
        return False
    bars.update(task, description="ready", total=1, completed=1)
    bars.stop_task(task)
    if not sys.stderr.isatty():
        bars.console.print(
            f"{entry.id}: {path} ({time.monotonic() - began:.1f} s)", markup=False, soft_wrap=True
        )
    return True


def _show(bars: Bars, task: TaskID, state: Progress) -> None:
    done = f" {state.done / 1e6:.0f} MB" if state.unit == "bytes" and state.done else ""
    bars.update(task, description=state.message + done, total=state.total, completed=state.done)
