"""What stands on a machine without GPUs, before anything is loaded: `hearth plan` with a CPU profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.cli.tables import size
from engine.scheduler.devices import CPU
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.seats import Taken


def held(plans: Sequence[RunnerPlan], room: int) -> int:
    """The most bytes that the replicas ever hold together."""
    return Taken.by({CPU: room}, plans).bytes_on(CPU)


def shown(plans: Sequence[RunnerPlan], room: int) -> Group:
    """One row a replica, then the sum.

    Args:
        plans: the replicas.
        room: bytes that they may take together.
    """
    owned = any(plan.owner for plan in plans)
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in ("replica", *(["owner"] if owned else [])):
        table.add_column(name, overflow="fold")
    table.add_column("tier", no_wrap=True)
    for name in ("awake", "asleep", "threads"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        owner = [plan.owner or "shared"] if owned else []
        sizes = size(plan.awake_bytes), size(plan.asleep_bytes), str(plan.spec.threads)
        table.add_row(plan.id, *owner, plan.standing.tier, *sizes)
    taken = held(plans, room)
    return Group(table, Text(f"{CPU}: at most {size(taken)} of {size(room)}, {100 * taken / room:.0f} %"))


def document(plans: Sequence[RunnerPlan], room: int) -> dict[str, Any]:
    """The same as JSON-able data; sizes are bytes."""
    return {
        "fits": True,
        "devices": [{"name": CPU, "usable_bytes": room, "held_bytes": held(plans, room)}],
        "placements": [
            {
                "id": plan.id,
                "model": plan.model,
                "owner": plan.owner,
                "spill_over": plan.standing.spill_over,
                "engine": plan.entry.engine,
                "device": plan.device,
                "tier": plan.standing.tier,
                "awake_bytes": plan.awake_bytes,
                "asleep_bytes": plan.asleep_bytes,
                "spec": plan.spec.model_dump(mode="json"),
            }
            for plan in plans
        ],
    }
