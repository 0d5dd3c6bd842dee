"""The state file: what a new scheduler must know of the processes that an old one left running."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.scheduler.units import Placed, ProcessRef, Unit, UnitKind, World

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


#: 'moving' = falling asleep or waking.
RecordState = Literal["starting", "ready", "asleep", "moving", "ending"]


class UnitRecord(BaseModel):
    """One living process group."""

    model_config = ConfigDict(extra="ignore")
    id: str
    kind: UnitKind
    pid: int
    started: int = Field(description="Start time of the leader, clock ticks since boot.")
    token: str
    fingerprint: str = Field(description="Of the plan that it was started with.")
    device: str = ""
    owner: str | None = Field(default=None, description="The tenant that owns it; its id says so too.")
    state: RecordState
    placed: Placed | None = Field(default=None, description="Memory that it was started with, by device.")
    awake: bool = Field(default=True, description="Whether it holds that of one awake, even if it ends now.")

    @property
    def process(self) -> ProcessRef:
        return ProcessRef(self.pid, self.started, self.token)


class StateFile(BaseModel):
    """``<state_dir>/scheduler.json``."""

    model_config = ConfigDict(extra="ignore")
    version: Literal[1] = 1
    boot_id: str = ""
    scheduler_pid: int = 0
    host: str = ""
    port: int = 0
    units: list[UnitRecord] = []
    durations: dict[str, float] = Field(default={}, description="Seconds from start to ready, by model.")
    wakes: dict[str, float] = Field(default={}, description="Seconds from asleep to ready, by model.")


def boot_id() -> str:
    """A name for this boot of the machine: process numbers of another boot mean nothing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def record(world: World, *, scheduler_pid: int, host: str, port: int) -> StateFile:
    """The state file's content for a world."""
    units = []
    for unit in world.units.values():
        if unit.process is None:
            continue
        ref = unit.process
        units.append(
            UnitRecord(
                id=unit.id,
                kind=unit.kind,
                pid=ref.pid,
                started=ref.started,
                token=ref.token,
                fingerprint=unit.running,
                device=unit.device,
                owner=unit.owner,
                state=_state(unit),
                placed=unit.placed,
                awake=unit.awake,
            )
        )
    return StateFile(
        boot_id=boot_id(),
        scheduler_pid=scheduler_pid,
        host=host,
        port=port,
        units=units,
        durations={model: round(seconds, 1) for model, seconds in world.durations.items()},
        wakes={model: round(seconds, 2) for model, seconds in world.wakes.items()},
    )


def _state(unit: Unit) -> RecordState:
    if unit.ending:
        return "ending"
    if unit.moving or unit.unsettled:
        return "moving"
    if unit.state == "asleep":
        return "asleep"
    # One that only left the table is as ready as before.
    return "ready" if unit.state == "ready" or unit.withdrawal else "starting"


def load(file: Path) -> StateFile:
    """What the last scheduler left; an empty state when there is none or it cannot be read.

    After a boot of the machine only the durations and wakes are left of it.
    """
    try:
        found = StateFile.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return StateFile(boot_id=boot_id())
    if found.boot_id != boot_id():
        return StateFile(boot_id=boot_id(), durations=found.durations, wakes=found.wakes)
    return found


def write_atomically(file: Path, content: str, *, mode: int = 0o600) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(content)
        Path(temporary).chmod(mode)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class StateWriter:
    """Writes the state file when it has changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last = ""

    def save(self, state: StateFile) -> None:
        content = json.dumps(state.model_dump(mode="json"), indent=1)
        if content != self._last:
            write_atomically(self._file, content)
            self._last = content
