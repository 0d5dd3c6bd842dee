"""A plan as JSON-able data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.planner.launch import launch_lines, spec_of
from engine.planner.memory import capacity
from engine.planner.outcome import Placement, Plan


def document(plan: Plan, utilisation: float, runtime_dir: Path) -> dict[str, Any]:
    """Nodes with what is free, placements with each term of their memory and their launch lines, refusals.

    Sizes are bytes; a placement's terms, total and what it keeps asleep are of each of its GPUs, its
    ``host_bytes`` those of all.
    """
    return {
        "fits": not plan.refusals,
        "nodes": [
            {
                "name": node.name,
                "gpu": node.kind.name,
                "gpus": node.gpus,
                "gpu_memory_bytes": node.kind.memory_bytes,
                "usable_bytes": capacity(node.kind, utilisation),
                "free_bytes": list(free),
                "gpu_owners": [plan.homes.get((number, gpu)) for gpu in range(node.gpus)],
                "host_usable_bytes": node.host_bytes,
                "host_free_bytes": host,
            }
            for number, (node, free, host) in enumerate(
                zip(plan.nodes, plan.free, plan.host_free, strict=True)
            )
        ],
        "placements": [_placement(each, runtime_dir) for each in plan.placements],
        "refusals": [
            {"id": r.id, "model": r.model, "step": r.step, "reason": r.reason, "change": r.change}
            for r in plan.refusals
        ],
    }


def _placement(placement: Placement, runtime_dir: Path) -> dict[str, Any]:
    layout, foot, sleep = placement.layout, placement.footprint, placement.sleep
    return {
        "id": placement.id,
        "model": placement.needs.id,
        "owner": placement.want.owner or None,
        "engine": placement.needs.engine,
        "gpus": [{"node": node.name, "gpus": list(gpus)} for node, gpus in placement.places],
        "layout": {
            "name": layout.name(),
            "tensor_parallel": layout.tp,
            "data_parallel": layout.dp,
            "pipeline_parallel": layout.pp,
            "expert_parallel": layout.ep_size,
            "decode_context_parallel": layout.dcp,
            "kv_dtype": layout.kv_dtype,
            "eplb": layout.eplb,
            "redundant_experts": layout.redundant_experts,
            "all2all": layout.all2all,
        },
        "context_length": placement.context if foot.token_bytes else None,
        "kv_tokens": foot.kv_tokens,
        "tier": placement.want.tier,
        "gpu_bytes": foot.total,
        "asleep": {"gpu_bytes": sleep.kept, "host_bytes": sleep.host * placement.gpus} if sleep else None,
        "terms": [{"name": t.name, "bytes": t.bytes, "how": t.how} for t in foot.terms],
        "why": list(placement.why),
        "launch": [
            {
                "node": line.node,
                "environment": dict(line.environment),
                "arguments": list(line.arguments),
                "line": line.text,
            }
            for line in launch_lines(placement, runtime_dir)
        ],
        "spec": spec_of(placement, runtime_dir).model_dump(mode="json"),
    }
