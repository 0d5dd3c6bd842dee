"""Which replica of which model stands on which device, with its memory: pure data from a pure function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.planner.ownership import family
from engine.runners.spec import RunnerSpec
from engine.scheduler.dedicated import gpu_owners, owned_wishes
from engine.scheduler.devices import CPU, Device
from engine.scheduler.gpus import machine_of, number_of, place_on_gpus
from engine.scheduler.places import Place, place_on_cpu
from engine.scheduler.rooms import host_room, rooms
from engine.scheduler.wishes import Entries, PlanError, Standing, Wish, gib, wishes_of
from models.entry import ModelEntry
from models.profile import Profile

__all__ = ["Entries", "PlanError", "RunnerPlan", "Standing", "gib", "host_room", "make_plan", "rooms"]

#: A Unix socket's path may have this many bytes (``sun_path`` less its closing zero).
SOCKET_PATH_BYTES = 107


@dataclass(frozen=True)
class RunnerPlan:
    """One replica: what it serves, where it stands, what its process is told."""

    id: str
    entry: ModelEntry
    device: str
    preparation: str
    #: Complete but for ``model_dir``, which is known once the weights are prepared.
    spec: RunnerSpec
    fingerprint: str
    standing: Standing = field(default=Standing(), compare=False)
    #: What it holds of each of its devices while awake, loading or on its way out, bytes.
    awake_bytes: int = 0
    #: What it still holds of each of its devices while asleep, bytes.
    asleep_bytes: int = 0
    #: Host memory of its weights while asleep, bytes; 0 on a CPU, where they are mapped again from disk.
    host_bytes: int = 0
    #: The tenant whose keys alone go there; None = shared.
    owner: str | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Its devices by name: ('cuda:0', 'cuda:1') for 'cuda:0,1'; ranks on a CPU share 'cpu:0'."""
        kind, _, numbers = self.device.partition(":")
        return ("cpu:0",) if kind == "cpu" else tuple(f"{kind}:{number}" for number in numbers.split(","))

    @property
    def model(self) -> str:
        return self.entry.id

    @property
    def family(self) -> str:
        """What it shares with the replicas that may stand in for it: the model and the owner."""
        return family(self.model, self.owner)


def make_plan(
    config: Config, profile: Profile, catalog: Entries, devices: Sequence[Device]
) -> list[RunnerPlan]:
    """Places the fewest replicas of every model of the profile, as the configuration changes it, and those
    that tenants own.

    A profile made for GPUs is placed on them by ``engine.planner``; one made for none stands on ``cpu:0``.

    Raises:
        PlanError: a model is unknown, the models do not fit, or a tenant owns what is not there.
    """
    wishes = all_wishes(config, profile, catalog)
    on_gpu = profile.needs.gpus > 0
    if not any(device.is_gpu == on_gpu for device in devices):
        raise PlanError(
            f"profile '{profile.name}' needs {profile.needs.gpus} GPU(s) and this machine shows none. "
            "Check `nvidia-smi`, or take the CPU profile: HEARTH_PROFILE=tiny."
        )
    owners = gpu_owners(config, gpu_numbers(devices) if on_gpu else ())
    if on_gpu:
        machine = machine_of(devices, host_room(config, devices), owners)
        places = place_on_gpus(wishes, profile, machine, config.runtime_dir)
    else:
        places = place_on_cpu(wishes, rooms(config, devices)[CPU])
    return [_runner(config, place) for place in places]


def all_wishes(config: Config, profile: Profile, catalog: Entries) -> list[Wish]:
    """What is to be served to everybody, then what tenants own.

    Raises:
        PlanError: as of both.
    """
    shared = wishes_of(config, profile, catalog)
    return [*shared, *owned_wishes(config, profile, catalog, shared)]


def gpu_numbers(devices: Sequence[Device]) -> list[int]:
    """The numbers of a machine's GPUs."""
    return [number_of(device.name) for device in devices if device.is_gpu]


def _runner(config: Config, place: Place) -> RunnerPlan:
    wish, entry = place.wish, place.wish.entry
    planned = place.spec
    spec = RunnerSpec(
        model=entry.id,
        aliases=entry.aliases,
        category=entry.category,
        engine=entry.engine,
        capabilities=entry.capabilities,
        model_dir=Path(),
        socket=socket_path(config.runtime_dir, place.id),
        device=place.device,
        threads=wish.threads,
        memory_bytes=planned.memory_bytes if planned else place.awake_bytes,
        context_length=planned.context_length if planned else wish.context or entry.context_length,
        max_batch=wish.max_batch,
        max_wait_ms=wish.max_wait_ms,
        max_queue=wish.max_queue,
        drain_s=config.scheduler.drain_s,
        can_sleep=wish.standing.tier == "standby",
        options=planned.options if planned else wish.options,
    )
    return RunnerPlan(
        id=place.id,
        entry=entry,
        device=place.device,
        preparation=f"prepare-{entry.weights_key or entry.id}",
        spec=spec,
        fingerprint=spec_fingerprint(spec, entry),
        standing=wish.standing,
        awake_bytes=place.awake_bytes,
        asleep_bytes=place.asleep_bytes,
        host_bytes=place.host_bytes,
        owner=wish.owner,
    )


def socket_path(folder: Path, unit: str) -> Path:
    """Where a unit's socket stands: named by the unit, or shortened where the path would be too long.

    Raises:
        PlanError: the folder's own path leaves no room.
    """
    path = folder / f"{unit}.sock"
    if len(bytes(path)) <= SOCKET_PATH_BYTES:
        return path
    path = folder / f"{hashlib.sha256(unit.encode()).hexdigest()[:12]}.sock"
    if len(bytes(path)) <= SOCKET_PATH_BYTES:
        return path
    raise PlanError(
        f"{folder} is too long for Unix sockets (a path may have {SOCKET_PATH_BYTES} bytes). "
        "Set XDG_RUNTIME_DIR or TMPDIR to a shorter folder."
    )


def spec_fingerprint(spec: RunnerSpec, entry: ModelEntry, without: Iterable[str] = ()) -> str:
    """What a replica is started with, in a hash: its spec, less the fields ``without``, and its weights."""
    weights = entry.model_dump(mode="json", include={"sources", "convert", "weights_key"})
    return fingerprint(spec.model_dump(mode="json", exclude=set(without)), weights)


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able data; equal data, equal hash."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
