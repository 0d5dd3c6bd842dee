"""`python -m benchmarks.planner`: how fast the planner is, and how close to an exact solver's optimum.

Two figures: the time to place 116 models onto 1 000 GPUs, and, over 200 random small instances, the wanted
memory that is left unplaced against the optimum of OR-tools' CP-SAT, which solves the same instances with the
same layouts exactly. CP-SAT is for this benchmark only (`pip install ortools`) and in no requirements file.
Exit status 1 when a budget is missed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from benchmarks._measure import machine, write_result
from engine.planner.catalog import needs_of_all
from engine.planner.fleet import Fleet, Item, group_of
from engine.planner.hardware import Node, parse_nodes
from engine.planner.layout import Policy, Want
from engine.planner.memory import GIB, MIB
from engine.planner.needs import ModelNeeds
from engine.planner.pack import pack
from engine.planner.plan import make_plan
from engine.planner.wishes import prepare
from models.catalog import load_catalog

TIME_BUDGET_S = 1.0
GAP_BUDGET = 0.05
MODELS = 116
NODES = "60x8xH200,45x8xH100,40x4xL40S"
_SEED = 3


@dataclass(frozen=True)
class Instance:
    """A random small wish: what is wanted, and on which nodes."""

    items: tuple[Item, ...]
    nodes: tuple[Node, ...]

    @property
    def wanted(self) -> int:
        """Bytes of all that could stand there alone."""
        return sum(item.value for item in self.items)


def many_models(catalog: dict[str, ModelNeeds], count: int) -> dict[str, ModelNeeds]:
    """So many models: those of the catalog that can be planned, and fine-tuned ones of equal size."""
    known = [needs for needs in catalog.values() if not needs.unknown()]
    every = itertools.chain.from_iterable(
        (needs if not turn else replace(needs, id=f"{needs.id}-tuned-{turn}") for needs in known)
        for turn in itertools.count()
    )
    return {needs.id: needs for needs in itertools.islice(every, count)}


def scale(catalog: dict[str, ModelNeeds], repeats: int) -> dict[str, Any]:
    """Places 116 models, two replicas of each fourth, onto 1 000 GPUs; seconds of each repeat."""
    needs = many_models(catalog, MODELS)
    wants = [Want(name, replicas=1 + (i % 4 == 0)) for i, name in enumerate(needs)]
    nodes = parse_nodes(NODES)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        found = make_plan(needs, wants, nodes)
        seconds.append(time.perf_counter() - began)
    return {
        "models": len(needs),
        "replicas": sum(want.replicas for want in wants),
        "gpus": sum(node.gpus for node in nodes),
        "placed": len(found.placements),
        "refused": {each.id: each.reason for each in found.refusals},
        "seconds": [round(each, 3) for each in seconds],
        "median_s": round(statistics.median(seconds), 3),
    }


def instances(catalog: dict[str, ModelNeeds], count: int) -> list[Instance]:
    """Random wishes of up to 14 catalog models on one to three nodes: 0.85 to 1.4 times what they hold."""
    dice = random.Random(_SEED)
    needs = {name: each for name, each in catalog.items() if not each.unknown()}
    shapes = ["1x2xH100", "1x4xH100", "1x8xL40S", "1x4xL40S", "2x2xA100-80", "1x2xH200", "1x4xL40S,1x2xH100"]
    found: list[Instance] = []
    while len(found) < count:
        nodes = parse_nodes(dice.choice(shapes))
        fleet = Fleet(nodes, 0.92)
        names = dice.sample(sorted(needs), dice.randint(6, 14))
        wants = [Want(name, context=dice.choice((2048, 4096, 8192))) for name in names]
        prepared = prepare(needs, wants, fleet, Policy())
        # Models that fill the place alone, or next to nothing of it, would make it easy.
        items = tuple(
            item for item in prepared.items if item.options and 0.02 < item.value / fleet.free_bytes < 0.5
        )
        instance = Instance(items, tuple(nodes))
        if len(items) >= 4 and 0.85 < instance.wanted / fleet.free_bytes < 1.4:
            found.append(instance)
    return found


def placed_by_planner(instance: Instance, steps: int) -> tuple[int, float]:
    """(bytes placed, seconds), with so many steps of search after the greedy try."""
    fleet = Fleet(instance.nodes, 0.92)
    began = time.perf_counter()
    placed = pack(instance.items, fleet, steps)
    worth = {item.id: item.value for item in instance.items}
    return sum(worth[name] for name in placed), time.perf_counter() - began


def placed_by_solver(instance: Instance, limit_s: float) -> tuple[int, bool, float]:
    """(bytes placed, whether that is proven to be the most, seconds), by CP-SAT."""
    cp_model = solver_module()
    model = cp_model.CpModel()
    fleet = Fleet(instance.nodes, 0.92)
    loads: dict[tuple[int, int], list[Any]] = {}
    goal = []
    for item in instance.items:
        stands = []
        for node_number, node in enumerate(instance.nodes):
            for number, option in enumerate(item.options.get(group_of(node), ())):
                if option.nodes > 1:
                    continue
                name = f"{item.id}@{node_number}/{number}"
                chosen = model.new_bool_var(name)
                stands.append(chosen)
                gpus = [model.new_bool_var(f"{name}#{gpu}") for gpu in range(node.gpus)]
                model.add(sum(gpus) == option.per_node * chosen)
                need = -(-option.footprint.total // MIB)
                for gpu, uses in enumerate(gpus):
                    loads.setdefault((node_number, gpu), []).append(need * uses)
        if stands:
            model.add(sum(stands) <= 1)
            goal.append(item.value // MIB * sum(stands))
    for (node_number, _), parts in loads.items():
        model.add(sum(parts) <= fleet.room[node_number] // MIB)
    model.maximize(sum(goal))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = 1
    began = time.perf_counter()
    status = solver.solve(model)
    return int(solver.objective_value) * MIB, status == cp_model.OPTIMAL, time.perf_counter() - began


def solver_module() -> Any:
    """OR-tools' CP-SAT.

    Raises:
        SystemExit: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module("ortools.sat.python.cp_model")
    except ImportError:
        sys.exit("OR-tools is not installed. It is needed for this benchmark only: pip install ortools")


def quality(catalog: dict[str, ModelNeeds], count: int, limit_s: float) -> dict[str, Any]:
    """Memory left unplaced by the planner and by the exact solver, over random small instances."""
    left, least, proven, same = 0, 0, 0, 0
    ours_s, theirs_s, worst = [], [], 0.0
    tight = greedy = 0
    for instance in instances(catalog, count):
        ours, seconds = placed_by_planner(instance, Policy().search_steps)
        greedy += instance.wanted - placed_by_planner(instance, 0)[0]
        best, is_proven, solver_seconds = placed_by_solver(instance, limit_s)
        left += instance.wanted - ours
        least += instance.wanted - max(best, ours)
        proven += is_proven
        tight += best < instance.wanted - len(instance.items) * MIB
        # The solver reckons in whole MiB.
        same += ours >= best - len(instance.items) * MIB
        worst = max(worst, (best - ours) / instance.wanted)
        ours_s.append(seconds)
        theirs_s.append(solver_seconds)
    return {
        "instances": count,
        "unplaced_gib": round(left / GIB, 1),
        "optimum_unplaced_gib": round(least / GIB, 1),
        "gap": round(left / least - 1, 4) if least else 0.0,
        "greedy_gap": round(greedy / least - 1, 4) if least else 0.0,
        "not_all_fits": tight,
        "optimal": same,
        "proven": proven,
        "worst_share_missed": round(worst, 4),
        "planner_median_ms": round(statistics.median(ours_s) * 1000, 1),
        "planner_slowest_s": round(max(ours_s), 2),
        "solver_median_ms": round(statistics.median(theirs_s) * 1000, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--limit", type=float, default=20.0, help="longest solver run an instance, seconds")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    solver_module()
    console = Console()
    catalog = needs_of_all(load_catalog().entries.values())
    big = scale(catalog, given.repeats)
    console.print(
        f"{big['replicas']} replicas of {big['models']} models onto {big['gpus']} GPUs: "
        f"{big['median_s']:.2f} s (budget {TIME_BUDGET_S:.0f} s), {big['placed']} placed."
    )
    small = quality(catalog, given.instances, given.limit)
    console.print(
        f"{small['instances']} small instances: {small['unplaced_gib']} GiB left unplaced, CP-SAT leaves "
        f"{small['optimum_unplaced_gib']} GiB: {small['gap']:.1%} more (budget {GAP_BUDGET:.0%}; "
        f"{small['greedy_gap']:.1%} without the search). As good as "
        f"CP-SAT in {small['optimal']}, of which CP-SAT proved {small['proven']} of {small['instances']}. "
        f"Median {small['planner_median_ms']} ms, CP-SAT {small['solver_median_ms']} ms."
    )
    result = {"machine": machine(), "scale": big, "quality": small}
    console.print(f"Written to {write_result('planner', result)}.")
    missed = big["median_s"] > TIME_BUDGET_S or small["gap"] > GAP_BUDGET
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
