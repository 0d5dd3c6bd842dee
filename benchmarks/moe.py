"""`python -m benchmarks.moe`: expert parallelism on two CPU workers, against tensor parallelism on the same.

One layer of experts of the shapes of Qwen3-30B-A3B (128 experts, 8 a token, hidden 2048, intermediate 768,
bfloat16), on two processes with one thread each. The same tokens and the same routing go through

- **tp**: vLLM's own way without expert parallelism: each worker has half of every expert's intermediate size;
- **zeros**: each worker has half of the experts, and those of the other get weight zero at a local expert;
- **slots**: ours, but with one kernel call for each number of local experts that a token can have;
- **ep**: ours (``kernels/moe/expert_parallel.py``), one call with the local pairs.

All four run vLLM's fused kernel. Time is that of the slower worker, up to the sum over workers, which is the
same for all; a fresh batch each run, the four in turns, medians. The summed results are compared as well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._measure import machine, write_result
from kernels.moe.expert_parallel import local_experts

WORKERS = 2
EXPERTS, SLOTS, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
DTYPE = torch.bfloat16
DECODE = (1, 4, 8, 16, 32)
PREFILL = (512, 2048, 4096)
ROUTINGS = ("uniform", "skewed")
WAYS = ("tp", "zeros", "slots", "ep")
_SEED = 7


@dataclass(frozen=True)
class Batch:
    """Tokens and where they go: hidden (tokens, HIDDEN), weights and ids (tokens, SLOTS)."""

    hidden: Tensor
    weights: Tensor
    ids: Tensor


Way = Callable[[Batch, Tensor], None]


def popularity(routing: str) -> Tensor:
    """How often each expert is chosen, relatively: evenly, or by Zipf's law with the ranks shuffled."""
    if routing == "uniform":
        return torch.ones(EXPERTS)
    shuffled = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(_SEED))
    return 1.0 / (1.0 + shuffled)


def draw(tokens: int, routing: str, generator: torch.Generator) -> Batch:
    """A batch; each token's experts differ."""
    ids = torch.multinomial(popularity(routing).expand(tokens, -1), SLOTS, generator=generator)
    weights = torch.rand(tokens, SLOTS, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(DTYPE)
    return Batch(hidden, weights / weights.sum(1, keepdim=True), ids.to(torch.int32))


def by_slots(batch: Batch, out: Tensor, expert_map: Tensor, kernel: Callable[..., None]) -> None:
    """The alternative to one call with pairs: tokens sorted by how many local experts they have."""
    places = expert_map[batch.ids.long()].to(torch.int32)
    here = places >= 0
    counts = here.sum(1)
    out.zero_()
    for slots in range(1, SLOTS + 1):
        chosen = (counts == slots).nonzero().squeeze(1)
        if len(chosen):
            mask = here[chosen]
            part = out.new_empty(len(chosen), HIDDEN)
            weights = batch.weights[chosen][mask].view(-1, slots)
            kernel(part, batch.hidden[chosen], weights, places[chosen][mask].view(-1, slots))
            out[chosen] = part


def make_ways(rank: int) -> dict[str, Way]:
    """The four ways on this worker, each with its own share of the same random weights."""
    from vllm import _custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    half, each = INTERMEDIATE // WORKERS, EXPERTS // WORKERS
    mine = slice(rank * half, (rank + 1) * half)
    local13 = torch.empty(each, 2 * INTERMEDIATE, HIDDEN, dtype=DTYPE)
    local2 = torch.empty(each, HIDDEN, INTERMEDIATE, dtype=DTYPE)
    split13 = torch.empty(EXPERTS, 2 * half, HIDDEN, dtype=DTYPE)
    split2 = torch.empty(EXPERTS, HIDDEN, half, dtype=DTYPE)
    generator = torch.Generator().manual_seed(_SEED)
    for expert in range(EXPERTS):
        w13 = (torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5).to(DTYPE)
        w2 = (torch.randn(HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5).to(DTYPE)
        gate, up = w13.chunk(2)
        split13[expert], split2[expert] = torch.cat((gate[mine], up[mine])), w2[:, mine]
        if expert // each == rank:
            local13[expert % each], local2[expert % each] = w13, w2
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[rank * each : (rank + 1) * each] = torch.arange(each, dtype=torch.int32)

    def kernel(w13: Tensor, w2: Tensor, out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        ops.cpu_fused_moe(out, hidden, w13, w2, None, None, weights, ids, "silu", isa)

    on_halves = partial(kernel, *(ops.cpu_prepack_moe_weight(w, isa) for w in (split13, split2)))
    on_local = partial(kernel, *(ops.cpu_prepack_moe_weight(w, isa) for w in (local13, local2)))

    def zeros(batch: Batch, out: Tensor) -> None:
        places = expert_map[batch.ids.long()]
        on_local(out, batch.hidden, batch.weights * (places >= 0), places.clamp(min=0))

    return {
        "tp": lambda batch, out: on_halves(out, batch.hidden, batch.weights, batch.ids),
        "zeros": zeros,
        "slots": lambda batch, out: by_slots(batch, out, expert_map, on_local),
        "ep": lambda batch, out: local_experts(
            out, batch.hidden, batch.weights, batch.ids, expert_map, on_local
        ),
    }


def measure(ways: dict[str, Way], tokens: int, routing: str, runs: int) -> dict[str, Any]:
    """Milliseconds of the slower worker by way (median), and what the ways' results differ by."""
    generator = torch.Generator().manual_seed(_SEED + tokens)
    times: dict[str, list[float]] = {name: [] for name in ways}
    pairs, differences = [], []
    for run in range(runs + 1):
        batch = draw(tokens, routing, generator)
        sums: dict[str, Tensor] = {}
        turn = run % len(ways)
        for name, way in [*ways.items()][turn:] + [*ways.items()][:turn]:
            out = torch.empty_like(batch.hidden)
            dist.barrier()
            began = time.perf_counter()
            way(batch, out)
            spent = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            sums[name] = out.float()
            dist.all_reduce(sums[name])
            if run:  # the first one warms
                times[name].append(spent.item() * 1e3)
        differences += [float((sums[name] - sums["tp"]).norm() / sums["tp"].norm()) for name in ways]
        local = (batch.ids < EXPERTS // WORKERS).sum().item() / batch.ids.numel()
        pairs.append(max(local, 1 - local))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens": tokens,
        "routing": routing,
        "ms": {name: round(value, 3) for name, value in medians.items()},
        "tp_over_ep": round(medians["tp"] / medians["ep"], 3),
        "zeros_over_ep": round(medians["zeros"] / medians["ep"], 3),
        "slots_over_ep": round(medians["slots"] / medians["ep"], 3),
        "busiest_share": round(statistics.median(pairs), 3),
        "largest_difference": round(max(differences), 5),
    }


def work(rank: int, store: str, runs: int, sizes: tuple[int, ...]) -> None:
    """One worker; the first writes the result down."""
    here = machine()  # before this process confines itself to one core
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    try:
        ways = make_ways(rank)
        rows = []
        for routing, tokens in itertools.product(ROUTINGS, sizes):
            # Small batches are noisier, and cheap to run more often.
            rows.append(measure(ways, tokens, routing, runs if tokens >= PREFILL[0] else 3 * runs))
            if rank == 0:
                print(rows[-1], file=sys.stderr, flush=True)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        shape = {"experts": EXPERTS, "top_k": SLOTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
        settings = {"workers": WORKERS, "runs": runs, "dtype": str(DTYPE), "shape": shape}
        show(rows)
        print(write_result("moe", {"machine": here, "settings": settings, "rows": rows}))


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(
        "routing", "tokens", *(f"{name}, ms" for name in WAYS), "tp/ep", "zeros/ep", "slots/ep", "busiest"
    )
    for row in rows:
        ratios = (row["tp_over_ep"], row["zeros_over_ep"], row["slots_over_ep"], row["busiest_share"])
        table.add_row(
            row["routing"],
            str(row["tokens"]),
            *(f"{row['ms'][name]:.2f}" for name in WAYS),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="of each prefill size; decode sizes run 3 times that"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=DECODE + PREFILL, help="sizes of the batches"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), options.runs, tuple(options.tokens))
        torch.multiprocessing.spawn(work, arguments, nprocs=WORKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
