"""Large fleets: fast when all fits, and bounded when it does not."""

from __future__ import annotations

import time
from dataclasses import replace

from engine.planner.hardware import parse_nodes
from engine.planner.layout import Want
from engine.planner.needs import ModelNeeds
from engine.planner.plan import make_plan
from tests.planner.support import catalog


def many(count: int) -> dict[str, ModelNeeds]:
    known = [needs for needs in catalog().values() if not needs.unknown()]
    every = [replace(known[i % len(known)], id=f"m{i}") for i in range(count)]
    return {needs.id: needs for needs in every}


def test_116_models_onto_1000_gpus_take_less_than_a_second() -> None:
    needs = many(116)
    began = time.perf_counter()
    found = make_plan(needs, [Want(name) for name in needs], parse_nodes("60x8xH200,45x8xH100,40x4xL40S"))
    assert time.perf_counter() - began < 1
    assert sum(node.gpus for node in found.nodes) == 1000
    assert len(found.placements) == 116 and not found.refusals


def test_far_too_much_for_a_fleet_ends_with_a_reason_for_each() -> None:
    needs = many(116)
    found = make_plan(needs, [Want(name, replicas=2) for name in needs], parse_nodes("6x8xH100"))
    assert len(found.placements) + len(found.refusals) == 232
    assert found.refusals and all(each.reason and each.change for each in found.refusals)
