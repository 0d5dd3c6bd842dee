"""Tables for a terminal; plain text when piped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.cli.doctor import Check
from engine.routes import ExpertBalance
from engine.scheduler.changes import Reloaded
from engine.scheduler.status import DeviceStatus, ModelStatus, Status

_STYLES = {
    "ready": "green",
    "failed": "red",
    "backoff": "red",
    "draining": "yellow",
    "asleep": "blue",
    "stopped": "dim",
}


def size(count: float | None) -> str:
    """Bytes for a person."""
    if not count:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def note(model: ModelStatus) -> str:
    """What a person wants to know of a model that is not ready: progress, reason, time left."""
    parts = []
    progress = model.progress
    if progress is not None:
        done = size(progress.done) if progress.unit == "bytes" else f"{100 * progress.done:.0f} %"
        of = f" of {size(progress.total)}" if progress.unit == "bytes" and progress.total else ""
        parts.append(f"{progress.message or progress.stage} {done}{of}")
    elif model.state != "ready" and model.reason:
        parts.append(model.reason)
    if model.state == "asleep" and model.eta_s:
        parts.append(f"wakes in about {max(1.0, model.eta_s):.0f} s")
    elif model.state not in ("ready", "stopped", "failed") and model.eta_s:
        parts.append(f"about {model.eta_s:.0f} s left")
    if model.state == "ready" and model.tier == "standby":
        parts.append("standby, pinned" if model.pinned else "standby")
    if len(model.replicas) > 1 and model.owner:
        ready = sum(replica.state == "ready" for replica in model.replicas)
        parts.append(f"{ready} of {len(model.replicas)} replicas ready")
    if model.spill_over:
        parts.append("spill-over")
    if model.expert_balance:
        parts.append(balance(model.expert_balance))
    if model.restarts:
        parts.append(f"{model.restarts} restart{'s' if model.restarts != 1 else ''}")
    return "; ".join(parts)


def balance(found: ExpertBalance) -> str:
    """How evenly experts are loaded, in words."""
    text = f"balance of {found.over} {found.overall:.2f}"
    return text if found.worst is None else f"{text} (layer {found.worst_layer}: {found.worst:.2f})"


def models(status: Status) -> Table:
    """One row a model: name, category, state, seconds in it, memory, note."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    owned = any(model.owner for model in status.models)
    table.add_column("runner", no_wrap=True)
    if owned:
        table.add_column("owner", overflow="fold", max_width=24)
    for name in ("category", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for model in status.models:
        state = Text(model.state, style=_STYLES.get(model.state, "cyan"))
        owner = [model.owner or "shared"] if owned else []
        seconds, memory_ = f"{model.since_s:.0f}", size(model.memory_bytes)
        table.add_row(model.id, *owner, model.category, state, seconds, memory_, note(model))
    return table


def full(status: Status) -> Group:
    """The whole status: where it serves, then the models."""
    head = f"Hearth {status.scheduler.version}, profile {status.profile}, serving at {status.base_url}"
    return Group(Text(head), models(status), *(memory(device) for device in status.devices))


def memory(device: DeviceStatus) -> Text:
    """How much of a device's memory is spoken for."""
    share = 100 * device.held_bytes / device.room_bytes if device.room_bytes else 0
    return Text(
        f"{device.device}: {size(device.held_bytes)} of {size(device.room_bytes)} held, {share:.0f} %"
    )


_KINDS: dict[str, str] = {
    "kept": "dim",
    "added": "green",
    "removed": "red",
    "changed": "yellow",
    "moved": "cyan",
    "restarted": "yellow",
}


def changes(told: Reloaded) -> Group:
    """What a reload does: one row a replica or gateway worker, then what takes effect without a restart."""
    verb = "A reload would change" if told.dry_run else "Reloaded"
    parts: list[RenderableType] = [Text(f"{verb}: {told.summary()}" if not told.quiet else _calm(told))]
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in ("", "replica", "device"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for change in told.changes:
        style = _KINDS[change.kind]
        unit = f"{change.was} → {change.unit}" if change.was not in (None, change.unit) else change.unit
        table.add_row(Text(change.kind, style=style), unit, change.device, change.reason)
    parts.append(table)
    parts += [Text(f"at once: {note}") for note in told.notes]
    return Group(*parts)


def _calm(told: Reloaded) -> str:
    return f"{'A reload would restart' if told.dry_run else 'Reloaded, restarting'} nothing."


def checks(found: Sequence[Check]) -> Table:
    """The doctor's findings."""
    table = Table(box=None, pad_edge=False, show_header=False)
    marks = {
        "ok": Text("ok", style="green"),
        "note": Text("note", style="yellow"),
        "missing": Text("missing", style="red"),
    }
    for check in found:
        text = check.found + (f"\n→ {check.next_step}" if check.next_step else "")
        table.add_row(marks[check.state], check.name, text)
    return table
