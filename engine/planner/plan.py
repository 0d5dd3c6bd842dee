"""The planner: models wanted and nodes in, placements and reasons out. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.planner import rules
from engine.planner.advice import refuse
from engine.planner.fleet import Fleet, Homes, Item, Move
from engine.planner.hardware import Node
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import Footprint, context_of
from engine.planner.needs import ModelNeeds
from engine.planner.outcome import Placement, Plan, Refusal
from engine.planner.pack import Placed, pack
from engine.planner.wishes import Prepared, prepare


def make_plan(
    needs: Mapping[str, ModelNeeds],
    wants: Sequence[Want],
    nodes: Sequence[Node],
    policy: Policy | None = None,
    homes: Homes | None = None,
) -> Plan:
    """Places every replica wanted, or says why it cannot be and what would help.

    Args:
        needs: what is known of each model, by id.
        wants: the models, with how much of each.
        nodes: where they may stand.
        policy: what the planner may do; None = the defaults.
        homes: who owns which GPU; none = nobody owns any.

    Residents are placed first; standby replicas then share what is left (``fleet``). Equal arguments give
    equal plans. No GPU is ever given more than ``policy.utilisation`` of its memory.
    """
    policy = policy or Policy()
    fleet = Fleet(nodes, policy.utilisation, homes=homes)
    prepared = prepare(needs, wants, fleet, policy)
    fleet, placed = _packed(prepared, fleet, policy)
    spare = {} if len(placed) < len(prepared.items) else pack(prepared.spare, fleet, 0)
    grown = grow(prepared, placed, fleet, needs, policy)
    for item in prepared.spare:
        if item.id in spare:
            fleet.undo(item, spare[item.id])
    placements: list[Placement] = []
    refusals: list[Refusal] = []
    told: dict[Want, Refusal] = {}
    for item in prepared.items:
        want = prepared.wants[item.id]
        if item.id in placed:
            placements.append(_placement(item, placed[item.id], grown[item.id], want, needs, nodes, policy))
        else:
            # Replicas of one want are refused alike.
            if want not in told:
                told[want] = refuse(item, prepared, placed, fleet, needs, policy)
            refusals.append(replace(told[want], id=item.id))
    free = tuple(tuple(each) for each in fleet.free)
    return Plan(tuple(nodes), tuple(placements), tuple(refusals), free, tuple(fleet.host), fleet.homes)


def _packed(prepared: Prepared, fleet: Fleet, policy: Policy) -> tuple[Fleet, Placed]:
    """Residents, then standby replicas. Where some of those have no place, once more with residents spread.

    Residents on the fullest GPUs leave whole ones to others; but a standby model over all GPUs of a node
    wants as much on each of them. What places more standby memory counts, unless a resident loses its place.
    """
    residents = [item for item in prepared.items if not item.standby]
    standby = [item for item in prepared.items if item.standby]
    found: list[tuple[Fleet, Placed, int]] = []
    for room in (fleet, Fleet(fleet.nodes, policy.utilisation, even=True, homes=fleet.homes)):
        first = pack(residents, room, policy.search_steps)
        second = pack(standby, room, policy.search_steps)
        found.append((room, first | second, sum(i.value for i in standby if i.id in second)))
        if len(second) == len(standby) or (len(found) > 1 and len(first) < len(residents)):
            break
    best = max(found, key=lambda each: each[2]) if _all(residents, found[-1][1]) else found[0]
    return best[0], best[1]


def _all(items: Sequence[Item], placed: Placed) -> bool:
    return all(item.id in placed for item in items)


def grow(
    prepared: Prepared,
    placed: Mapping[str, Move],
    fleet: Fleet,
    needs: Mapping[str, ModelNeeds],
    policy: Policy,
) -> dict[str, Footprint]:
    """Footprints with KV caches grown into what is left, shared evenly, and no more than could be used.

    Residents' only: a larger cache of a standby replica would keep others from being awake beside it. And
    not of those that may get more replicas: all of a model are alike, and a further one is to find room.
    """
    result = {name: move.option.footprint for name, move in placed.items()}
    if not policy.grow:
        return result
    growers: dict[tuple[int, int], int] = {}
    able = [
        name
        for name, move in placed.items()
        if move.option.footprint.token_bytes
        and move.option.sleep is None
        and prepared.wants[name].kv_bytes is None
        and prepared.wants[name].most <= prepared.wants[name].replicas
    ]
    for name in able:
        for node, gpus in placed[name].places:
            for gpu in gpus:
                growers[node, gpu] = growers.get((node, gpu), 0) + 1
    for name in able:
        move, want = placed[name], prepared.wants[name]
        spots = [(node, gpu) for node, gpus in move.places for gpu in gpus]
        layout, foot = move.option.layout, move.option.footprint
        most = math.ceil(
            want.max_batch * context_of(needs[want.model], want, policy) / layout.dp / layout.dcp
        )
        useful = max(0, math.ceil(most * foot.token_bytes) - foot.kv_bytes)
        extra = min(useful, *(fleet.free[node][gpu] // growers[node, gpu] for node, gpu in spots))
        for node, gpu in spots:
            fleet.free[node][gpu] -= extra
            growers[node, gpu] -= 1
        result[name] = foot.with_kv(foot.kv_bytes + extra)
    return result


def _placement(
    item: Item,
    move: Move,
    foot: Footprint,
    want: Want,
    needs: Mapping[str, ModelNeeds],
    nodes: Sequence[Node],
    policy: Policy,
) -> Placement:
    model = needs[item.model]
    places = tuple((nodes[node], gpus) for node, gpus in move.places)
    context = context_of(model, want, policy)
    why = _why(model, move.option.layout, move.option.rank, places[0][0], want)
    return Placement(
        item.id, want, model, move.option.layout, foot, places, context, tuple(why), move.option.sleep
    )


def _why(needs: ModelNeeds, layout: Layout, rank: int, node: Node, want: Want) -> list[str]:
    lines = []
    if layout.gpus == 1:
        lines.append("one GPU holds it")
    elif want.tensor_parallel:
        lines.append(f"TP{layout.tp} as asked")
    elif rank == 0:
        lines.append(f"{layout.gpus} {node.kind.name} are the fewest that hold it")
    else:
        lines.append(f"fewer than {layout.gpus} GPUs would do, but not in the room that is left")
    if layout.ep and layout.dp > 1:
        lines.append("DP attention with EP: each rank has a cache of its own, experts are spread over all")
    elif needs.kv is not None and needs.kv.latent and layout.tp > 1 and layout.dcp == 1:
        lines.append("TP: the latent cache is the same on every rank (DCP would split it)")
    if needs.kv is not None and not needs.kv.latent and layout.tp > needs.kv.heads:
        lines.append(
            f"{needs.kv.heads} KV heads: each is held {layout.tp // needs.kv.heads} times under TP{layout.tp}"
        )
    if layout.pp > 1:
        lines.append(f"PP{layout.pp} across nodes, TP inside each")
    if layout.all2all:
        lines.append(f"all-to-all by {layout.all2all}: experts are on several nodes")
    if layout.eplb:
        lines.append(f"EPLB with {layout.redundant_experts} redundant experts")
    elif needs.is_moe and (layout.ep or layout.gpus > 1):
        reason = rules.eplb_reason(needs, layout.ep_size)
        because = reason.removeprefix("EPLB ") if reason else "worth its copies on 16 ranks or more"
        lines.append(f"no EPLB: {because}")
    if layout.kv_dtype == "fp8":
        lines.append("fp8 KV cache" + (", this architecture's default" if want.kv_dtype == "auto" else ""))
    if want.owner:
        lines.append(f"dedicated to {want.owner}" + (", on GPUs of its own" if want.own_gpus else ""))
    return lines
