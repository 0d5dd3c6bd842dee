"""What a reload does, in words for a person and as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.scheduler.plan import RunnerPlan, gib, spec_fingerprint

ChangeKind = Literal["kept", "added", "removed", "changed", "moved", "restarted"]


class Change(BaseModel):
    """What becomes of one replica or one gateway worker."""

    kind: ChangeKind
    model: str = Field(description="Serving name; 'gateway' for a gateway worker.")
    unit: str = Field(description="Id of the process group from now on; of one removed: its id.")
    was: str | None = Field(default=None, description="Id of the one that it follows; the same when kept.")
    device: str = ""
    was_device: str = ""
    reason: str
    old_first: bool = Field(
        default=False,
        description="True: memory does not allow both at once, so the old one ends before the new starts.",
    )


class ReloadCall(BaseModel):
    """The body of a reload."""

    model_config = ConfigDict(extra="forbid")
    dry_run: bool = Field(default=False, description="True: only say what would change.")


class Reloaded(BaseModel):
    """The answer to a reload: what it does, or (dry run) would do."""

    dry_run: bool = False
    profile: str = ""
    changes: list[Change] = []
    notes: list[str] = Field(default=[], description="Settings that take effect without any restart.")

    @property
    def quiet(self) -> bool:
        """Nothing is started, ended or moved."""
        return all(change.kind == "kept" for change in self.changes)

    def summary(self) -> str:
        """'1 changed, 1 added, 5 kept' for a person."""
        kinds: tuple[ChangeKind, ...] = ("added", "removed", "changed", "moved", "restarted", "kept")
        counts = {kind: sum(change.kind == kind for change in self.changes) for kind in kinds}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


#: Fields of a spec that follow from where a replica stands or are shown in other words.
_NOT_SHOWN = {"socket", "device", "model_dir", "can_sleep", "memory_bytes", "options"}


def differences(old: RunnerPlan, new: RunnerPlan) -> list[str]:
    """Why a replica must be started anew: each setting that differs, as 'name: old → new'."""
    before, after = (plan.spec.model_dump(mode="json", exclude=_NOT_SHOWN) for plan in (old, new))
    found = [
        f"{key}: {_show(before[key])} → {_show(after[key])}" for key in before if before[key] != after[key]
    ]
    if old.spec.can_sleep != new.spec.can_sleep:
        found.append(f"tier: {old.standing.tier} → {new.standing.tier}")
    if old.spec.memory_bytes != new.spec.memory_bytes:
        found.append(f"memory: {gib(old.spec.memory_bytes)} → {gib(new.spec.memory_bytes)}")
    found += nested_differences("options", old.spec.options, new.spec.options)
    if _weights(old) != _weights(new):
        found.append("weights from elsewhere")
    if len(old.device.split(",")) != len(new.device.split(",")):
        found.append(f"ranks: {len(old.device.split(','))} → {len(new.device.split(','))}")
    return found


def live_differences(old: RunnerPlan, new: RunnerPlan) -> list[str]:
    """What changes of a replica that goes on running."""
    names = ("pinned", "priority", "min_replicas", "max_replicas", "spill_over")
    pairs = ((name, getattr(old.standing, name), getattr(new.standing, name)) for name in names)
    return [f"{name}: {_show(before)} → {_show(after)}" for name, before, after in pairs if before != after]


def _weights(plan: RunnerPlan) -> str:
    return spec_fingerprint(plan.spec, plan.entry, type(plan.spec).model_fields)


def nested_differences(name: str, old: Any, new: Any) -> Iterator[str]:
    """Each setting under ``name`` that differs, as 'name.key: old → new'."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from nested_differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield f"{name}: {_show(old)} → {_show(new)}"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
