"""A world that is given one plan after the other, faster than it can follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler.memory import held
from engine.scheduler.messages import Exited, Gone, Healthy, Slept
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.reload import Setup, adopted
from engine.scheduler.renewal import renew, survey
from engine.scheduler.replan import Replan, essence, replan
from engine.scheduler.rolling import roll
from engine.scheduler.seats import Taken, elsewhere
from engine.scheduler.statefile import RecordState, UnitRecord
from engine.scheduler.transitions import apply
from engine.scheduler.units import GatewayPlan, PreparationPlan

from .support import config, profile
from .test_replan import replica
from .test_scaling import Node

ROOMS = {"cuda:0": 10, "cuda:1": 10}


def worker(number: int, fingerprint: str = "g", index: int | None = None) -> GatewayPlan:
    return GatewayPlan(f"gateway-{number}", fingerprint, Path("/nowhere"), number if index is None else index)


def test_gateway_workers_roll() -> None:
    fresh = [worker(0, "new"), worker(1, "new")]
    rolling = roll([worker(0, "old"), worker(1, "old")], fresh, reason="why")
    assert [(p.id, p.index) for p in rolling.plans] == [("gateway-2", 0), ("gateway-3", 1)]
    assert rolling.waits == {"gateway-2": frozenset(), "gateway-3": frozenset({"gateway-0"})}
    assert rolling.leaving["gateway-1"].successors == ("gateway-3",)
    same = roll([worker(4, "new", 1), worker(2, "new", 0)], fresh)
    assert [(p.id, p.index) for p in same.plans] == [("gateway-4", 1), ("gateway-2", 0)] and not same.leaving
    fewer = roll([worker(0), worker(1), worker(2)], [worker(0)])
    assert [p.id for p in fewer.plans] == ["gateway-0"] and set(fewer.leaving) == {"gateway-1", "gateway-2"}
    more = roll([worker(1)], [worker(0), worker(1)], going=[worker(0)])
    assert [(p.id, p.index) for p in more.plans] == [("gateway-1", 1), ("gateway-2", 2)] and not more.waits


def record(plan: RunnerPlan, state: RecordState = "ready", *, fingerprint: str = "") -> UnitRecord:
    return UnitRecord(
        id=plan.id,
        kind="runner",
        pid=1,
        started=1,
        token="t",
        fingerprint=fingerprint or plan.fingerprint,
        device=plan.device,
        state=state,
    )


def test_a_scheduler_takes_over_replicas_where_an_earlier_one_put_them(tmp_path: Path) -> None:
    shape = replica("a", "cuda:0", max_replicas=3)
    setup = Setup(config(tmp_path), profile("a"), [shape, replica("b", "cuda:1")], ROOMS, 0)
    moved, added = elsewhere(shape, "a-3", "cuda:1"), elsewhere(shape, "a-1", "cuda:0")
    other = record(replica("b", "cuda:0"), fingerprint="of other settings")
    gateway = UnitRecord(
        id="gateway-7", kind="gateway", pid=2, started=1, token="t", fingerprint="g", state="ready"
    )
    left = [record(moved), record(added), other, gateway]
    gateways, runners = adopted(setup, [worker(0)], left)
    assert {plan.id: plan.device for plan in runners} == {"a-1": "cuda:0", "a-3": "cuda:1", "b-0": "cuda:1"}
    assert [plan.id for plan in gateways] == ["gateway-7"]
    # One that was added is not kept where its room is needed, and one that was ending is none.
    tight = Setup(setup.config, setup.profile, setup.runners, {"cuda:0": 8, "cuda:1": 4}, 0)
    crowd = [record(moved), record(added), record(replica("a", number=9, max_replicas=3))]
    _, runners = adopted(tight, [worker(0)], crowd)
    assert sorted(plan.model for plan in runners) == ["a", "a", "b"]
    assert Taken.by(tight.rooms, runners).fits
    _, runners = adopted(setup, [worker(0)], [record(moved, "ending")])
    assert {plan.id for plan in runners} == {"a-0", "b-0"}


class Changing(Node):
    """A node whose plan changes; the runners that are held neither load nor answer."""

    def renew(self, *fresh: RunnerPlan, gateway: str = "g") -> Replan:
        seen = survey(self.world)
        runners = replan(seen.runners, fresh, self.world.room, seen.going)
        gateways = roll(seen.gateways, [worker(0, gateway)], seen.gateways_going)
        needed = {plan.preparation: plan for plan in runners.runners}
        preparations = [PreparationPlan(key, "p", plan.entry, plan.model) for key, plan in needed.items()]
        renew(self.world, gateways, preparations, runners, self.now)
        self.step()
        return runners

    def release(self) -> None:
        """What was held answers from now on."""
        for name in sorted(self.hold):
            unit = self.world.units.get(name)
            if unit and unit.process and unit.state == "starting":
                apply(self.world, Healthy(name, unit.process), self.now)
        self.hold.clear()
        self.settle()

    def settle(self) -> None:
        for _ in range(120):
            self.now += 1.0
            self.step()

    def carry_on_sleeping(self, name: str) -> None:
        """It has fallen asleep as it was told."""
        unit = self.world.units[name]
        assert unit.moving and unit.process, unit
        apply(self.world, Slept(name, unit.process), self.now)
        self.step()

    def check_memory(self) -> None:
        for device, room in self.world.room.items():
            assert held(self.world)[device] <= room, f"{device} is over its room"

    def step(self) -> list[Any]:
        done = super().step()
        self.check_memory()
        return done

    def ready(self, model: str) -> set[str]:
        return {
            u.id for u in self.world.of_kind("runner") if u.model == model and u.state in ("ready", "asleep")
        }

    def runners(self) -> set[str]:
        return {unit.id for unit in self.world.of_kind("runner")}


def test_a_change_while_another_is_under_way() -> None:
    node = Changing({"cuda:0": 100}, replica("a"))
    node.hold |= {"a-1", "a-2"}
    node.renew(replica("a", max_batch=9))
    assert node.ready("a") == {"a-0"} and node.world.units["a-1"].state == "starting"
    node.renew(replica("a", max_batch=10))
    # What never answered goes at once; what answers stays for the third.
    assert node.runners() == {"a-0", "a-2"} and node.ready("a") == {"a-0"}
    node.renew(replica("a", max_batch=10))
    assert node.runners() == {"a-0", "a-2"}
    node.release()
    assert node.runners() == node.ready("a") == {"a-2"}


def test_back_again_before_the_new_one_was_ready() -> None:
    node = Changing({"cuda:0": 100}, replica("a"))
    node.hold.add("a-1")
    node.renew(replica("a", max_batch=9))
    process = node.world.units["a-0"].process
    node.renew(replica("a"))
    assert node.runners() == {"a-0"} and node.world.units["a-0"].process == process
    node.settle()
    assert node.ready("a") == {"a-0"}


def test_a_sleeper_with_other_settings_is_loaded_before_the_old_one_goes() -> None:
    node = Changing({"cuda:0": 10}, replica("s", awake=6, asleep=1))
    node.carry_on_sleeping("s-0")
    node.hold.add("s-1")
    node.renew(replica("s", awake=6, asleep=1, max_batch=9))
    assert node.ready("s") == {"s-0"} and node.world.units["s-1"].state == "starting"
    node.release()
    node.carry_on_sleeping("s-1")
    node.settle()
    assert node.runners() == node.ready("s") == {"s-1"}


def test_one_that_leaves_dies_before_its_successor_is_ready() -> None:
    node = Changing({"cuda:0": 100}, replica("a"))
    node.hold.add("a-1")
    node.renew(replica("a", max_batch=9))
    process = node.world.units["a-0"].process
    assert process
    apply(node.world, Exited("a-0", process, -9, "killed"), node.now)
    apply(node.world, Gone("a-0", process), node.now)
    node.step()
    assert node.runners() == {"a-1"}
    node.release()
    assert node.ready("a") == {"a-1"}


def test_requests_keep_a_replica_until_every_worker_has_the_new_table() -> None:
    node = Changing({"cuda:0": 100}, replica("a"))
    node.report(1)
    node.renew(replica("a", max_batch=9))
    old = node.world.units["a-0"]
    assert old.state == "draining" and old.process and node.ready("a") == {"a-1"}
    # A report of a table that still names it is not enough.
    node.report(1)
    assert "a-0" not in node.runners()


shapes = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(2, 6), st.sampled_from([8, 9])),
    max_size=3,
    unique_by=lambda s: s[0],
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            shapes, st.booleans(), st.sets(st.sampled_from("abc")), st.integers(0, 40), st.sampled_from("gh")
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_plans_follow_each_other_the_last_one_is_reached(course: list[Any]) -> None:
    """In every step room is kept (see `check_memory`); models go on answering where the plan says so."""
    node = Changing(dict(ROOMS), replica("z", "cuda:0", 1))
    fresh: list[RunnerPlan] = []
    print_ = "g"
    for shapes_, stuck, stuck_models, seconds, print_ in course:
        taken, fresh = Taken(ROOMS), []
        for name, awake, batch in shapes_:
            for device in ROOMS:
                one = replica(name, device, awake, max_batch=batch)
                if taken.takes(one):
                    taken.add(one)
                    fresh.append(one)
                    break
        node.hold = {f"{m}-{n}" for m in stuck_models for n in range(9)} if stuck else set()
        answering = {one.model for one in fresh if node.ready(one.model)}
        changes = node.renew(*fresh, gateway=print_).changes
        answering -= {change.model for change in changes if change.old_first}
        for _ in range(seconds):
            assert all(node.ready(model) for model in answering)
            node.now += 1.0
            node.step()
    node.hold = {f"{m}-{n}" for m in "abc" for n in range(9)} & node.runners()
    node.release()
    node.settle()
    found = [unit.plan for unit in node.world.of_kind("runner") if isinstance(unit.plan, RunnerPlan)]
    assert sorted(map(essence, found)) == sorted(map(essence, fresh))
    assert all(unit.state == "ready" and not unit.leaving for unit in node.world.units.values())
    (gateway,) = node.world.of_kind("gateway")
    assert gateway.plan and gateway.running == gateway.plan.fingerprint == print_
