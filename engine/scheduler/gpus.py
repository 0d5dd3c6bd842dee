"""The placement of replicas on this machine's GPUs, by ``engine.planner``: the very plan of `hearth plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.planner.catalog import needs_of, nodes_of, want_of
from engine.planner.fleet import Homes
from engine.planner.hardware import KINDS, GpuKind, Node
from engine.planner.launch import spec_of
from engine.planner.layout import Policy, Want
from engine.planner.needs import ModelNeeds
from engine.planner.outcome import Placement, Plan
from engine.planner.plan import make_plan
from engine.scheduler.devices import Device
from engine.scheduler.places import Place
from engine.scheduler.wishes import PlanError, Wish
from models.profile import Profile

#: What a GPU can do that does not say so: the least that vLLM's kernels of today are made for.
_LEAST_CAPABILITY = 8, 0
#: Product names, as the driver tells them, by kind; where two kinds share one, by memory.
_PRODUCTS: tuple[tuple[str, str], ...] = (
    (r"\bB200\b", "B200"),
    (r"\bH200\b", "H200"),
    (r"\bH100\b", "H100"),
    (r"\bH20\b", "H20"),
    (r"\bA100\b.*\b80GB", "A100-80"),
    (r"\bA100\b", "A100-40"),
    (r"\bL40S\b", "L40S"),
    (r"\bL4\b", "L4"),
    (r"\bA10G?\b", "A10"),
    (r"\bRTX 4090\b", "RTX4090"),
)


def kind_of(device: Device) -> GpuKind:
    """The planner's kind of a GPU, with the memory that this one has; an unknown product makes its own."""
    known = next((kind for pattern, kind in _PRODUCTS if re.search(pattern, device.product)), None)
    if known is not None:
        return replace(KINDS[known], memory_bytes=device.memory_bytes)
    name = device.product.removeprefix("NVIDIA ").replace(" ", "-") or "GPU"
    return GpuKind(name, device.memory_bytes, device.capability or _LEAST_CAPABILITY, device.nvlink)


@dataclass(frozen=True)
class Machine:
    """This machine's GPUs as the planner's nodes: one for each kind, with the names of its devices."""

    nodes: tuple[Node, ...]
    names: Mapping[str, tuple[str, ...]]
    #: Who owns which GPU, by (node index, GPU index).
    homes: Homes = field(default_factory=dict)


def machine_of(devices: Sequence[Device], host: int, owners: Mapping[int, str] | None = None) -> Machine:
    """GPUs by kind; the host's memory is shared out among the kinds by their GPUs.

    Args:
        devices: all of the machine.
        host: bytes of host memory for the weights of sleeping models.
        owners: who owns which GPU, by its number.
    """
    kinds: dict[GpuKind, list[str]] = {}
    gpus = [device for device in devices if device.is_gpu]
    for device in gpus:
        kinds.setdefault(kind_of(device), []).append(device.name)
    nodes = [
        Node(f"n{number}", kind, len(names), kind.nvlink, host * len(names) // len(gpus))
        for number, (kind, names) in enumerate(kinds.items())
    ]
    by_node = {node.name: tuple(names) for node, names in zip(nodes, kinds.values(), strict=True)}
    homes = {
        (node, gpu): owner
        for node, names in enumerate(kinds.values())
        for gpu, name in enumerate(names)
        if (owner := (owners or {}).get(number_of(name)))
    }
    return Machine(tuple(nodes), by_node, homes)


def number_of(device: str) -> int:
    """3 of 'cuda:3'."""
    return int(device.partition(":")[2])


def suits(profile: Profile, devices: Sequence[Device]) -> bool:
    """Whether the machine has the GPUs that the profile is laid out for, in kind and number."""
    nodes = nodes_of(profile)
    kinds = [kind_of(device).name for device in devices if device.is_gpu]
    return all(kinds.count(node.kind.name) >= node.gpus for node in nodes)


def asked(wishes: Sequence[Wish]) -> tuple[dict[str, ModelNeeds], list[Want]]:
    """The wishes in the planner's terms."""
    needs, wants = {}, []
    for wish in wishes:
        entry = wish.entry.model_copy(update={"options": wish.options})
        needs[wish.id] = needs_of(entry)
        want = replace(want_of(wish.effective), owner=wish.owner or "", own_gpus=wish.own_gpus)
        if entry.engine == "vllm" and want.memory_bytes is None and entry.weights_bytes is None:
            # An entry without figures to reckon with, whose author gave the sum.
            want = replace(want, memory_bytes=entry.memory_bytes or None)
        wants.append(want)
    return needs, wants


def place_on_gpus(
    wishes: Sequence[Wish], profile: Profile, machine: Machine, runtime_dir: Path
) -> list[Place]:
    """Every replica on the machine's GPUs, in the order of the wishes.

    Args:
        wishes: what to place.
        profile: whose wishes they are.
        machine: the GPUs.
        runtime_dir: folder of the Unix sockets.

    Raises:
        PlanError: the profile is made for several machines, or something does not fit.
    """
    if len(nodes_of(profile)) > 1:
        raise PlanError(
            f"profile '{profile.name}' is laid out for {profile.needs.nodes}: several machines, and one "
            "`hearth serve` starts runners on its own only. Take a profile for one machine, or start the "
            f"lines of `hearth plan --profile {profile.name}` by hand."
        )
    needs, wants = asked(wishes)
    found = make_plan(needs, wants, machine.nodes, Policy(), machine.homes)
    if found.refusals:
        raise PlanError(_refusals(found))
    by_family = {wish.family: wish for wish in wishes}
    return [_place(by_family[each.want.family], each, machine, runtime_dir) for each in found.placements]


def _refusals(found: Plan) -> str:
    lines = []
    for each in found.refusals:
        change = f" {each.change}" if each.change else ""
        lines.append(f"{each.id} has no place ({each.step}): {each.reason}.{change}")
    first = found.refusals[0]
    table = f"`[models.{first.model}] enabled = false`"
    if "@" in first.id:
        table = "take it out of its table in [dedicated]"
    lines.append(f"Or leave it out: {table}. `hearth plan` shows the whole.")
    return "\n".join(lines)


def _place(wish: Wish, placement: Placement, machine: Machine, runtime_dir: Path) -> Place:
    ((node, gpus),) = placement.places
    names = [machine.names[node.name][gpu] for gpu in gpus]
    device = "cuda:" + ",".join(name.partition(":")[2] for name in names)
    sleep = placement.sleep
    return Place(
        wish=wish,
        number=int(placement.id.rpartition("-")[2]),
        device=device,
        awake_bytes=placement.footprint.total,
        asleep_bytes=sleep.kept if sleep else 0,
        host_bytes=sleep.host * len(gpus) if sleep else 0,
        spec=spec_of(placement, runtime_dir),
    )
