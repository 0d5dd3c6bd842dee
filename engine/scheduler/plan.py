"""Which replica of which model stands on which device, with its memory: pure data from a pure function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.config import Config, ModelConfig
from engine.errors import nearest
from engine.runners.spec import RunnerSpec
from engine.scheduler.devices import Device
from models.catalog import merge_options
from models.entry import LocalSource, ModelEntry
from models.profile import Profile, ProfileModel

#: A Unix socket's path may have this many bytes (``sun_path`` less its closing zero).
SOCKET_PATH_BYTES = 107
#: Host memory that is nobody's budget: the system, the gateways, the scheduler.
HOST_RESERVE_BYTES = 1 << 30


class PlanError(Exception):
    """The models cannot be placed; the message names the thing, the reason and the next step."""


class Entries(Protocol):
    """The catalog, as far as planning needs it."""

    @property
    def entries(self) -> Mapping[str, ModelEntry]: ...


@dataclass(frozen=True)
class Standing:
    """How a model keeps its place in memory: the same for all its replicas, and no reason to restart one."""

    tier: Literal["resident", "standby"] = "resident"
    #: Once awake, never put to sleep for another model.
    pinned: bool = False
    priority: int = 0
    min_replicas: int = 1
    max_replicas: int = 1


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

    @property
    def devices(self) -> tuple[str, ...]:
        """Its devices by name: ('cuda:0', 'cuda:1') for 'cuda:0,1'; ranks on a CPU share 'cpu:0'."""
        kind, _, numbers = self.device.partition(":")
        return ("cpu:0",) if kind == "cpu" else tuple(f"{kind}:{number}" for number in numbers.split(","))

    @property
    def model(self) -> str:
        return self.entry.id


def make_plan(
    config: Config, profile: Profile, catalog: Entries, devices: Sequence[Device]
) -> list[RunnerPlan]:
    """Places every replica of the profile, as the configuration changes it.

    A profile made for GPUs places on GPUs, each replica on the first that has room for its budget; one made
    for none places all on ``cpu:0``.

    Raises:
        PlanError: a model is unknown, or the memory budgets do not fit.
    """
    on_gpu = profile.needs.gpus > 0
    places = [device for device in devices if device.is_gpu == on_gpu]
    if not places:
        raise PlanError(
            f"profile '{profile.name}' needs {profile.needs.gpus} GPU(s) and this machine shows none. "
            "Check `nvidia-smi`, or take the CPU profile: HEARTH_PROFILE=tiny."
        )
    room = {d.name: max(0, d.memory_bytes - (0 if d.is_gpu else HOST_RESERVE_BYTES)) for d in places}
    total = dict(room)
    standing: dict[str, list[str]] = {name: [] for name in room}
    plans: list[RunnerPlan] = []
    for wish, entry, own in _wishes(config, profile, catalog):
        budget = _first(own.memory_bytes, wish.memory_bytes, entry.memory_bytes)
        for number in range(_first(own.replicas, wish.replicas)):
            device = next((name for name, free in room.items() if budget <= free), None)
            if device is None:
                raise _does_not_fit(entry.id, budget, room, total, standing)
            room[device] -= budget
            standing[device].append(entry.id)
            plans.append(_runner(config, entry, wish, own, device, budget, number))
    if not plans:
        raise PlanError(
            f"profile '{profile.name}' has no model left to serve: each is disabled in [models]. Enable one."
        )
    return plans


def _wishes(
    config: Config, profile: Profile, catalog: Entries
) -> list[tuple[ProfileModel, ModelEntry, ModelConfig]]:
    """The profile's models and those that the configuration adds, each with its catalog entry."""
    known = catalog.entries
    listed = [*profile.models]
    ids = {wish.id for wish in listed}
    listed += [ProfileModel(id=name) for name in config.models if name not in ids]
    wishes = []
    for wish in listed:
        own = config.models.get(wish.id) or ModelConfig()
        entry = known.get(wish.id)
        if entry is None:
            close = nearest(wish.id, known)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(sorted(known))}."
            raise PlanError(f"model '{wish.id}' is not in the catalog (models/catalog/). {hint}")
        if own.enabled:
            wishes.append((wish, entry, own))
    return wishes


def _first(*values: Any) -> int:
    return next(int(value) for value in values if value is not None)


def _does_not_fit(
    model: str,
    budget: int,
    room: Mapping[str, int],
    total: Mapping[str, int],
    standing: Mapping[str, Sequence[str]],
) -> PlanError:
    device = max(room, key=lambda name: room[name])
    after = f" after {', '.join(standing[device])}" if standing[device] else ""
    return PlanError(
        f"{model} needs {gib(budget)}; {device} has {gib(room[device])} of {gib(total[device])} left{after}. "
        f"Lower `memory_bytes`, leave a model out (`[models.{model}] enabled = false`), "
        "or take a smaller profile."
    )


def _runner(
    config: Config,
    entry: ModelEntry,
    wish: ProfileModel,
    own: ModelConfig,
    device: str,
    budget: int,
    number: int,
) -> RunnerPlan:
    if own.path is not None:
        # Weights of one's own are prepared apart from those that other entries share under the same key.
        local = LocalSource(kind="local", path=str(own.path.expanduser().resolve()))
        entry = entry.model_copy(
            update={"sources": [local, *entry.sources], "weights_key": f"{entry.id}-local"}
        )
    unit = f"{entry.id}-{number}"
    context = own.context_length or wish.context_length or entry.context_length
    spec = RunnerSpec(
        model=entry.id,
        aliases=entry.aliases,
        category=entry.category,
        engine=entry.engine,
        capabilities=entry.capabilities,
        model_dir=Path(),
        socket=socket_path(config.runtime_dir, unit),
        device=device,
        threads=_first(own.threads, wish.threads),
        memory_bytes=budget,
        context_length=context,
        max_batch=_first(own.max_batch, wish.max_batch),
        max_wait_ms=own.max_wait_ms if own.max_wait_ms is not None else wish.max_wait_ms,
        max_queue=_first(own.max_queue, wish.max_queue),
        drain_s=config.scheduler.drain_s,
        options=merge_options(entry.options, wish.options, own.options),
    )
    weights = entry.model_dump(mode="json", include={"sources", "convert", "weights_key"})
    return RunnerPlan(
        id=unit,
        entry=entry,
        device=device,
        preparation=f"prepare-{entry.weights_key or entry.id}",
        spec=spec,
        fingerprint=fingerprint(spec.model_dump(mode="json"), weights),
        awake_bytes=budget,
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


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able data; equal data, equal hash."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB"
