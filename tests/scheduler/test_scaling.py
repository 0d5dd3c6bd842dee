"""Replicas between the fewest and the most: the trend in numbers, and steps of a whole scheduler's world."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler.messages import (
    Add,
    Drop,
    Exited,
    Gone,
    Healthy,
    Launch,
    Launched,
    Terminate,
    UsageReported,
    Warmed,
)
from engine.scheduler.reconcile import reconcile
from engine.scheduler.transitions import apply, begin, commit
from engine.scheduler.trend import Bounds, Load, Rules, Trend, begun_anew, due, grown, observe
from engine.scheduler.units import GatewayPlan, ModelUsage, PreparationPlan, ProcessRef, ReplicaUsage, World

from .support import POLICY
from .test_replan import replica

RULES = Rules(target_in_flight=0.5, queue_wait_s=1.0, up_after_s=10.0, down_after_s=60.0)
BOUNDS = Bounds(fewest=1, most=4, max_batch=8)


def after(load: Load, ready: int, seconds: float, trend: Trend | None = None) -> str | None:
    """What is due once the same load was reported every half second for so long."""
    trend = trend or Trend()
    for step in range(int(seconds * 2) + 1):
        trend = observe(trend, load, ready, BOUNDS, RULES, step / 2)
    return due(trend, ready, RULES, seconds)


@pytest.mark.parametrize(
    ("load", "ready", "what"),
    [
        (Load(4), 1, None),  # just at half of a batch of 8
        (Load(5), 1, "more"),
        (Load(8), 2, None),
        (Load(9), 2, "more"),
        (Load(99), 4, None),  # the most there may be
        (Load(2, first_byte_s=1.5), 1, "more"),
        (Load(1, first_byte_s=60.0), 1, None),  # it waits for nobody
        (Load(2, first_byte_s=60.0), 2, None),
        (Load(1), 2, "fewer"),
        (Load(2), 2, None),  # half of what one may have
        (Load(0), 1, None),
        (Load(0, first_byte_s=9.0), 3, "fewer"),  # nobody waits now
    ],
)
def test_high_and_low(load: Load, ready: int, what: str | None) -> None:
    assert after(load, ready, 60) == what


def test_only_without_a_break_and_for_long_enough() -> None:
    assert after(Load(9), 1, 9.5) is None and after(Load(9), 1, 10) == "more"
    assert after(Load(0), 2, 59.5) is None and after(Load(0), 2, 60) == "fewer"
    trend = observe(Trend(), Load(9), 1, BOUNDS, RULES, 0.0)
    trend = observe(trend, Load(3), 1, BOUNDS, RULES, 9.0)
    trend = observe(trend, Load(9), 1, BOUNDS, RULES, 9.5)
    assert due(trend, 1, RULES, 19.0) is None and due(trend, 1, RULES, 19.5) == "more"
    # Another number of replicas begins it anew.
    trend = observe(trend, Load(9), 2, BOUNDS, RULES, 19.5)
    assert due(trend, 2, RULES, 20.0) is None and due(trend, 1, RULES, 40.0) is None


@given(
    requests=st.integers(0, 60),
    waits=st.lists(st.sampled_from([0.0, 0.5, 1.5, 9.0]), min_size=4, max_size=4),
    ready=st.integers(1, 4),
    fewest=st.integers(1, 4),
)
def test_a_constant_load_settles(requests: int, waits: list[float], ready: int, fewest: int) -> None:
    """Whatever the waits with 1, 2, 3, 4 replicas: at most one step back, then none at all."""
    bounds = Bounds(min(fewest, ready), 4, 8)
    trend, steps, since = Trend(), [], 0.0
    for second in range(3600):
        load = Load(requests, sorted(waits, reverse=True)[ready - 1])
        trend = observe(trend, load, ready, bounds, RULES, float(second))
        what = due(trend, ready, RULES, float(second))
        if what:
            steps.append(what)
            ready += 1 if what == "more" else -1
            trend = grown(trend) if what == "more" else begun_anew(trend)
            since = second
        assert bounds.fewest <= ready <= bounds.most
    turns = sum(a != b for a, b in itertools.pairwise(steps))
    assert turns <= 1 and since < 1800 and steps != ["more", "fewer"]


class Node:
    """A world of one model (and a sleeping neighbour), carried on by hand; effects come at once."""

    def __init__(self, room: dict[str, int], *plans: Any) -> None:
        self.world = World(policy=POLICY, room=room, scaling=RULES)
        self.now, self.pids = 0.0, 100
        self.gateway = GatewayPlan("gateway-0", "g", Path("/nowhere"), 0)
        needed = {plan.preparation: plan for plan in plans}
        preparations = [PreparationPlan(key, "p", plan.entry, plan.model) for key, plan in needed.items()]
        begin(self.world, [self.gateway, *preparations, *plans], [], self.now)
        self.hold: set[str] = set()
        self.step()

    def step(self) -> list[Any]:
        done: list[Any] = []
        while actions := reconcile(self.world, self.now):
            for action in actions:
                commit(self.world, action, self.now)
                done.append(action)
                self.carry_out(action)
        return done

    def carry_out(self, action: Any) -> None:
        unit = self.world.units[action.unit]
        if isinstance(action, Launch):
            self.pids += 1
            ref = ProcessRef(self.pids, 1, "t")
            apply(self.world, Launched(unit.id, ref), self.now)
            if unit.kind == "preparation":
                apply(self.world, Exited(unit.id, ref, 0, "done", result=Path("/weights")), self.now)
                apply(self.world, Gone(unit.id, ref), self.now)
            elif unit.id not in self.hold:
                apply(self.world, Healthy(unit.id, ref), self.now)
        elif unit.process and isinstance(action, Terminate):
            apply(self.world, Exited(unit.id, unit.process, 0, "ended"), self.now)
            apply(self.world, Gone(unit.id, unit.process), self.now)
        elif unit.process and type(action).__name__ == "WarmUp":
            apply(self.world, Warmed(unit.id, unit.process), self.now)
        elif unit.process and type(action).__name__ == "Check" and unit.id not in self.hold:
            apply(self.world, Healthy(unit.id, unit.process), self.now)

    def report(self, seconds: float, waiting: int = 0, flight: dict[str, int] | None = None) -> list[Any]:
        """The gateway says the same every second for so long; what was done meanwhile."""
        done: list[Any] = []
        for _ in range(int(seconds)):
            self.now += 1.0
            process = self.world.units["gateway-0"].process
            assert process
            self.world.published += 1
            replicas = {name: ReplicaUsage(count) for name, count in (flight or {}).items()}
            usage = UsageReported(process.pid, self.world.published, replicas, {"a": ModelUsage(waiting)})
            apply(self.world, usage, self.now)
            done += self.step()
        return done

    def replicas(self) -> dict[str, str]:
        return {unit.id: unit.device for unit in self.world.of_kind("runner") if unit.model == "a"}


def test_replicas_come_with_load_where_room_is_and_go_without_it() -> None:
    node = Node({"cuda:0": 10, "cuda:1": 5}, replica("a", max_replicas=4))
    assert node.replicas() == {"a-0": "cuda:0"}
    done = node.report(12, waiting=5)
    # Beside its fellow is worse than alone.
    assert node.replicas() == {"a-0": "cuda:0", "a-1": "cuda:1"}
    assert [a.reason for a in done if isinstance(a, Add)] == ["5 requests in hand, more than 4"]
    node.report(12, waiting=20)
    assert node.replicas() == {"a-0": "cuda:0", "a-1": "cuda:1", "a-2": "cuda:0"}
    # A fourth is allowed, but nothing has room.
    assert not [a for a in node.report(60, waiting=20) if isinstance(a, Add)] and len(node.replicas()) == 3
    done = node.report(70, flight={"a-0": 0, "a-1": 1, "a-2": 1})
    assert [a.unit for a in done if isinstance(a, Drop)] == ["a-0"]
    node.report(300)
    assert len(node.replicas()) == 1
    # The lowest free number is used again.
    node.report(12, waiting=9)
    assert len(node.replicas()) == 2 and min(node.replicas()) == "a-0"


def test_nobody_is_put_to_sleep_for_one_more() -> None:
    neighbour = replica("s", awake=6, asleep=1)
    node = Node({"cuda:0": 10}, replica("a", max_replicas=2), neighbour)
    assert node.world.units["s-0"].state in ("draining", "asleep")
    # 4 for a, 1 for s asleep and 5 more for when it wakes: the sum is full.
    node.report(30, waiting=9)
    assert len(node.replicas()) == 1


def test_one_step_at_a_time() -> None:
    node = Node({"cuda:0": 100}, replica("a", max_replicas=4))
    node.hold.add("a-1")
    node.report(40, waiting=99)
    assert set(node.replicas()) == {"a-0", "a-1"} and node.world.units["a-1"].state == "starting"
    node.hold.clear()
    started = node.world.units["a-1"].process
    assert started
    apply(node.world, Healthy("a-1", started), node.now)
    node.step()
    node.report(12, waiting=99)
    assert len(node.replicas()) == 3


def test_silence_of_the_gateways_is_no_reason_to_end_anything() -> None:
    node = Node({"cuda:0": 100}, replica("a", max_replicas=4), replica("a", number=1, max_replicas=4))
    node.report(30)
    node.now += 200.0
    assert not [action for action in node.step() if isinstance(action, Drop)]


def test_several_gpus_of_one_replica_must_all_be_free() -> None:
    rooms = {"cuda:0": 5, "cuda:1": 5, "cuda:2": 5, "cuda:3": 3}
    node = Node(rooms, replica("a", "cuda:0,1", max_replicas=2))
    node.report(30, waiting=99)
    assert len(node.replicas()) == 1
    node = Node(rooms | {"cuda:3": 4}, replica("a", "cuda:0,1", max_replicas=2))
    node.report(30, waiting=99)
    assert node.replicas() == {"a-0": "cuda:0,1", "a-1": "cuda:2,3"}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([3, 12, 70])), max_size=8), st.integers(4, 20))
def test_bounds_and_room_are_kept_whatever_the_load(course: list[tuple[int, int]], room: int) -> None:
    node = Node({"cuda:0": room}, replica("a", max_replicas=3))
    for waiting, seconds in course:
        for _ in range(seconds):
            node.report(1, waiting=waiting)
            count = len(node.replicas())
            assert 1 <= count <= 3 and count * 4 <= room
