"""From a placement to what is started: runner specs and exact command lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.planner.layout import Layout
from engine.planner.memory import pass_tokens
from engine.planner.needs import ModelNeeds
from engine.planner.outcome import Placement
from engine.runners.environment import visible_devices
from engine.runners.spec import RUNNER_MODULES, RunnerSpec
from engine.runners.vllm_arguments import server_arguments

#: For the processes of one replica that spans nodes.
MASTER_PORT = 29_501
RPC_PORT = 13_345


@dataclass(frozen=True)
class LaunchLine:
    """One process group: on which node, in which environment, which command."""

    node: str
    environment: tuple[tuple[str, str], ...]
    arguments: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is typed into a shell."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment]
        return " ".join([*variables, shlex.join(self.arguments)])


def spec_of(placement: Placement, runtime_dir: Path, rank: int = 0) -> RunnerSpec:
    """The runner's specification, its weights named by their source.

    Args:
        placement: what to run.
        runtime_dir: folder of the Unix sockets.
        rank: which of the replica's nodes, 0 = the one that answers.
    """
    needs, want = placement.needs, placement.want
    _, gpus = placement.places[rank]
    options = dict(needs.options)
    if needs.engine == "vllm":
        options["args"] = needs.arguments | layout_arguments(placement, rank)
        if want.memory_bytes is None:
            options["kv_cache_bytes"] = placement.footprint.kv_bytes
    return RunnerSpec(
        model=needs.id,
        aliases=list(needs.aliases),
        category=needs.category,
        engine=needs.engine,
        capabilities=list(needs.capabilities),
        model_dir=Path(needs.source),
        socket=runtime_dir / f"{placement.id}.sock",
        device="cuda:" + ",".join(map(str, gpus)),
        memory_bytes=placement.footprint.total * len(gpus),
        context_length=placement.context if needs.engine == "vllm" else want.context or needs.context,
        max_batch=want.max_batch,
        can_sleep=want.tier == "standby",
        options=options,
    )


def launch_lines(placement: Placement, runtime_dir: Path) -> list[LaunchLine]:
    """One line for each node of the replica, the answering node first."""
    lines = []
    for rank, (node, _) in enumerate(placement.places):
        spec = spec_of(placement, runtime_dir, rank)
        environment: tuple[tuple[str, str], ...] = (("CUDA_VISIBLE_DEVICES", visible_devices(spec.device)),)
        if spec.engine == "vllm":
            command = ["vllm", "serve", *_server(spec, rank, placement.needs)]
            if spec.can_sleep:
                environment = (*environment, ("VLLM_SERVER_DEV_MODE", "1"))
        else:
            file = runtime_dir / f"{placement.id}.json"
            command = ["python", "-m", RUNNER_MODULES[spec.engine], "--spec", str(file)]
        lines.append(LaunchLine(node.name, environment, tuple(command)))
    return lines


def layout_arguments(placement: Placement, rank: int = 0) -> dict[str, Any]:
    """vLLM's options for the layout, by name without dashes."""
    layout, nodes = placement.layout, placement.places
    kind = nodes[0][0].kind
    found: dict[str, Any] = {
        # What the plan reckoned with, whatever vLLM's default for this GPU is.
        "max-num-batched-tokens": pass_tokens(placement.needs, placement.want, kind),
        "tensor-parallel-size": layout.tp,
    }
    if layout.kv_dtype == "fp8":
        found["kv-cache-dtype"] = "fp8"
    if layout.dcp > 1:
        found["decode-context-parallel-size"] = layout.dcp
    if layout.ep:
        found |= _experts(layout)
    if layout.dp > 1:
        found |= {"data-parallel-size": layout.dp, "api-server-count": 1}
    if layout.pp > 1:
        found |= {"pipeline-parallel-size": layout.pp, "nnodes": len(nodes), "node-rank": rank}
        found |= {"master-addr": nodes[0][0].name, "master-port": MASTER_PORT}
    elif layout.dp > 1 and len(nodes) > 1:
        local = layout.dp // len(nodes)
        found |= {"data-parallel-size-local": local, "data-parallel-address": nodes[0][0].name}
        found["data-parallel-rpc-port"] = RPC_PORT
        if rank:
            found["data-parallel-start-rank"] = rank * local
            del found["api-server-count"]
    if rank:
        found["headless"] = True
    return found


def _experts(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"enable-expert-parallel": True}
    if layout.all2all:
        found["all2all-backend"] = layout.all2all
    if layout.eplb:
        found |= {"enable-eplb": True, "eplb-config": {"num_redundant_experts": layout.redundant_experts}}
    else:
        # Each rank reads only its own experts from the disk; vLLM does not do it together with EPLB.
        found["enable-ep-weight-filter"] = True
    return found


def _server(spec: RunnerSpec, rank: int, needs: ModelNeeds) -> Sequence[str]:
    # The runner itself looks at the size of the files; it matters only where a budget was configured.
    arguments = server_arguments(spec, needs.weights_bytes or 0)
    # `vllm serve` takes the model by its place; only the first node answers requests.
    others = [a for a in arguments if not a.startswith("--model=") and not (rank and a.startswith("--uds="))]
    return [str(spec.model_dir), *others]
