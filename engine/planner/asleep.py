"""What a sleeping replica still takes: of its GPUs, and of the host for its weights.

vLLM at level 1 (`device_allocator/cumem.py`, `CuMemAllocator.sleep`): everything in its memory pool is
unmapped, the weights after a copy into pinned host memory, the KV cache without one; then the allocator's
unused blocks are released. Outside the pool, and so kept: the CUDA context with its libraries, NCCL's
buffers, the CUDA graphs (`--sleep-mode-offload-cudagraph` is left off). Our own runners move the weights to
pinned host memory and empty the allocator's cache: the context is left. So the kept terms are the plan's own,
and as far to be trusted as it says of them; none was measured on a GPU of ours yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.planner.layout import Layout
from engine.planner.memory import COMMUNICATION_BYTES, CONTEXT_BYTES, GRAPH_BYTES, Footprint
from engine.planner.needs import ModelNeeds


@dataclass(frozen=True)
class Sleep:
    """One standby replica asleep, for each of its GPUs."""

    #: What stays of the GPU's memory, bytes.
    kept: int
    #: Host memory of the weights that stood there, bytes.
    host: int


def sleep_of(needs: ModelNeeds, layout: Layout, foot: Footprint) -> Sleep:
    """What a replica so laid out takes while asleep."""
    kept, host = CONTEXT_BYTES, sum(foot.of(name) for name in ("weights", "unsplit", "redundant experts"))
    if needs.engine == "vllm":
        kept += math.ceil((needs.layers or 32) / layout.pp) * GRAPH_BYTES
        kept += COMMUNICATION_BYTES if layout.gpus > 1 else 0
    if not host:  # a budget without its parts
        host = math.ceil(needs.loaded_bytes / layout.gpus) or foot.total
    return Sleep(min(kept, foot.total), min(host, foot.total))
