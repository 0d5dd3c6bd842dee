"""Whatever happens, in whatever order: the promises of the scheduler, played by a state machine."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.messages import (
    Action,
    Check,
    Exited,
    Gone,
    Healthy,
    Launch,
    Launched,
    LaunchFailed,
    Missed,
    StopAsked,
    Sweep,
    Terminate,
    Warmed,
    WarmFailed,
    WarmUp,
)
from engine.scheduler.reconcile import next_wakeup, reconcile
from engine.scheduler.transitions import apply, begin, commit
from engine.scheduler.units import ProcessRef, World

from .support import POLICY, entry, gateway_plan, preparation_plan, runner_plans

PATH = Path(tempfile.gettempdir()) / "hearth-never-made"
RUNNERS = runner_plans(PATH, entry("a", weights_key="k"), entry("b", weights_key="k"), entry("c"), entry("d"))
PLANS = [gateway_plan(), preparation_plan(RUNNERS[0]), *map(preparation_plan, RUNNERS[2:]), *RUNNERS]
good = st.booleans()


class Schedule(RuleBasedStateMachine):
    """Processes that live, die and hang as hypothesis likes; effects answered late and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(policy=POLICY)
        self.now = 0.0
        self.pids = 0
        self.living: dict[ProcessRef, str] = {}
        #: Ended, but the loop has not been told.
        self.untold: list[tuple[str, ProcessRef, int]] = []
        self.asked: list[tuple[Action, ProcessRef]] = []
        self.launch_works = True
        begin(self.world, PLANS, [], self.now)
        self.step()

    def step(self) -> None:
        for _ in range(100):
            actions = reconcile(self.world, self.now)
            if not actions:
                return
            for action in actions:
                commit(self.world, action, self.now)
                self.carry_out(action)
        raise AssertionError("decisions never come to rest")

    def carry_out(self, action: Action) -> None:
        unit = self.world.units[action.unit]
        if isinstance(action, Launch):
            assert unit.id not in self.living.values(), "two living processes for one unit"
            if unit.needs:
                assert self.world.units[unit.needs].result, "started without weights"
            if not self.launch_works:
                apply(self.world, LaunchFailed(unit.id, "no memory to fork"), self.now)
                return
            self.pids += 1
            ref = ProcessRef(self.pids, self.pids, str(self.pids))
            self.living[ref] = unit.id
            apply(self.world, Launched(unit.id, ref), self.now)
        else:
            assert unit.process is not None
            self.asked.append((action, unit.process))

    def die(self, ref: ProcessRef, code: int) -> None:
        self.untold.append((self.living[ref], ref, code))

    def tell_exit(self, index: int) -> None:
        unit, ref, code = self.untold.pop(index)
        result = PATH if code == 0 else None
        apply(self.world, Exited(unit, ref, code, f"ended with {code}", result=result), self.now)
        self.step()

    def answer(self, index: int, well: bool) -> None:
        action, ref = self.asked.pop(index)
        event: Any
        match action:
            case Check():
                event = Healthy(action.unit, ref) if well else Missed(action.unit, ref, "silence")
            case WarmUp():
                event = Warmed(action.unit, ref) if well else WarmFailed(action.unit, ref, "status 500")
            case Sweep():
                if not any(known == ref for _, known, _ in self.untold) and ref in self.living:
                    self.die(ref, -9)
                self.living.pop(ref, None)
                event = Gone(action.unit, ref)
            case _:
                assert isinstance(action, Terminate)
                if well and ref in self.living and not any(known == ref for _, known, _ in self.untold):
                    self.die(ref, 0)
                return
        apply(self.world, event, self.now)
        self.step()

    @rule(works=good)
    def change_the_weather(self, works: bool) -> None:
        self.launch_works = works

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 10.0, 120.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), well=good)
    def an_effect_is_answered(self, data: st.DataObject, well: bool) -> None:
        self.answer(data.draw(st.integers(0, len(self.asked) - 1)), well)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9]))
    def a_process_ends(self, data: st.DataObject, code: int) -> None:
        ref = data.draw(st.sampled_from(sorted(self.living, key=lambda one: one.pid)))
        if not any(known == ref for _, known, _ in self.untold):
            self.die(ref, code)

    @precondition(lambda self: self.untold)
    @rule(data=st.data())
    def an_exit_is_told(self, data: st.DataObject) -> None:
        self.tell_exit(data.draw(st.integers(0, len(self.untold) - 1)))

    @precondition(lambda self: self.now > 15)
    @rule(ask=st.sampled_from([StopAsked(), StopAsked(drain=False), StopAsked(kill=True)]))
    def a_stop_is_asked_for(self, ask: StopAsked) -> None:
        apply(self.world, ask, self.now)
        self.step()

    @invariant()
    def starts_are_bounded(self) -> None:
        loading = Counter(
            unit.device for unit in self.world.of_kind("runner") if unit.state == "starting" and unit.process
        )
        assert all(count <= POLICY.concurrent_starts for count in loading.values())

    @invariant()
    def no_timer_is_in_the_past(self) -> None:
        """Or the loop would spin."""
        due = next_wakeup(self.world, self.now)
        assert due is None or due > self.now

    @invariant()
    def ready_means_a_process_that_was_warmed(self) -> None:
        for unit in self.world.of_kind("runner"):
            if unit.state == "ready":
                assert unit.process is not None and unit.warming_asked and not unit.ending

    @invariant()
    def nothing_waits_for_nothing(self) -> None:
        """A unit that is not ready has an effect under way, a timer, a death to tell, or another's turn."""
        for unit in self.world.units.values():
            if unit.state == "ready" or (self.world.stop and unit.process is None):
                continue
            ref = unit.process
            under_way = any(known == ref for _, known in self.asked) or any(
                known == ref for _, known, _ in self.untold
            )
            preparing = unit.kind == "preparation" and ref is not None
            waits = unit.state == "planned" or (unit.needs and self.world.units[unit.needs].state != "ready")
            timer = next_wakeup(self.world, self.now) is not None
            assert under_way or preparing or waits or timer, unit

    def teardown(self) -> None:
        """From now on all goes well: then all becomes ready, soon; or, where a stop was asked for, gone."""
        self.launch_works = True
        for _ in range(400):
            while self.untold:
                self.tell_exit(0)
            for action, ref in list(self.asked):
                self.answer(self.asked.index((action, ref)), True)
            for ref, unit in list(self.living.items()):
                told = not any(known == ref for _, known, _ in self.untold)
                if self.world.units[unit].kind == "preparation" and told:
                    self.die(ref, 0)
            if self.world.stop and self.world.empty:
                assert not self.living, "processes were left"
                return
            states = {unit.state for unit in self.world.units.values() if unit.kind != "preparation"}
            if states == {"ready"} and not self.world.stop and not self.untold:
                return
            due = next_wakeup(self.world, self.now)
            self.now = max(self.now, due if due is not None else self.now)
            self.step()
        raise AssertionError({unit.id: unit.state for unit in self.world.units.values()})


Schedule.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedule = Schedule.TestCase
