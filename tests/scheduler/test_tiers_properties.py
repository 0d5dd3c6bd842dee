"""Whatever happens, in whatever order: the promises of warm tiers, played by a state machine.

The stage itself refuses any decision that breaks one: a device over its room, a victim in use, pinned,
resident or not long enough there, two at work beside each other on one GPU, a wake for nothing.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduler.messages import Check, StopAsked
from engine.scheduler.reconcile import next_wakeup

from .support import POLICY, standing
from .tier_stage import Stage

PATH = Path(tempfile.gettempdir()) / "hearth-never-made"
PLANS = [
    standing(PATH, "r", "cuda:0", tier="resident", awake=2),
    standing(PATH, "s", "cuda:1", tier="resident", awake=1),
    standing(PATH, "a", "cuda:0"),
    standing(PATH, "b", "cuda:0", host=3),
    standing(PATH, "c", "cuda:0", priority=1),
    standing(PATH, "c", "cuda:1", awake=2, priority=1, number=1),
    standing(PATH, "d", "cuda:0,1", awake=4),
    standing(PATH, "e", "cuda:1", awake=3),
    standing(PATH, "p", "cuda:0", awake=2, pinned=True),
]
#: Everything asleep but for the residents and one: a, b or c on the first, c-1, d or e on the second.
ROOM = {"cuda:0": 12, "cuda:1": 7}
STANDBY = ["a", "b", "c", "d", "e", "p"]
index = st.integers(0, 99)


class Tiers(RuleBasedStateMachine):
    """Requests, workers, processes and effects as hypothesis likes; late, in any order, with failures."""

    residence_s = 20.0

    def __init__(self) -> None:
        super().__init__()
        policy = replace(POLICY, min_residence_s=self.residence_s, health_interval_s=30, start_check_s=2)
        self.stage = Stage(PLANS, ROOM, gateways=2, policy=policy, host_room=3)

    @initialize(loaded=st.booleans())
    def some_time_after_the_start(self, loaded: bool) -> None:
        if loaded:
            self.stage.answer_all()

    @property
    def workers(self) -> list[int]:
        return sorted(self.stage.workers)

    @precondition(lambda self: self.stage.workers)
    @rule(model=st.sampled_from(STANDBY), which=index)
    def a_request_comes(self, model: str, which: int) -> None:
        self.stage.request(model, self.workers[which % len(self.workers)])

    @precondition(lambda self: self.stage.workers)
    @rule(which=index, first=index)
    def a_request_ends(self, which: int, first: int) -> None:
        pid = self.workers[which % len(self.workers)]
        mine = [name for name, count in self.stage.workers[pid].in_hand.items() if count]
        if mine:
            self.stage.finish(sorted(mine)[first % len(mine)], pid)

    @precondition(lambda self: self.stage.workers)
    @rule(which=index, first=index)
    def a_client_that_waits_leaves(self, which: int, first: int) -> None:
        pid = self.workers[which % len(self.workers)]
        if waiting := sorted(self.stage.workers[pid].waiting):
            self.stage.leave(waiting[first % len(waiting)], pid)

    @precondition(lambda self: self.stage.workers)
    @rule(which=index, newer=st.booleans())
    def a_worker_reports(self, which: int, newer: bool) -> None:
        pid = self.workers[which % len(self.workers)]
        if newer:
            self.stage.take_table(pid)
        self.stage.report(pid)

    @precondition(lambda self: self.stage.asked)
    @rule(which=index, luck=st.integers(0, 7))
    def an_effect_ends(self, which: int, luck: int) -> None:
        self.stage.answer(which % len(self.stage.asked), well=luck > 0)

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        for _ in range(20):
            for pid in self.workers:
                self.stage.keep_up(pid)
            if self.stage.asked:
                self.stage.answer()

    @precondition(lambda self: self.stage.workers)
    @rule(model=st.sampled_from(STANDBY), which=index, others=st.booleans())
    def a_model_is_used(self, model: str, which: int, others: bool) -> None:
        """What happens most: a request comes, is served and ends, and then nothing for a while."""
        pid = self.workers[which % len(self.workers)]
        self.stage.request(model, pid)
        self.all_goes_well_for_a_while()
        for name, count in list(self.stage.workers[pid].in_hand.items() if pid in self.stage.workers else []):
            for _ in range(count if others or name.startswith(model) else 0):
                self.stage.finish(name, pid)
        for pid in self.workers:
            self.stage.report(pid)
        self.stage.pass_time(self.residence_s)

    @precondition(lambda self: self.stage.living)
    @rule(which=index)
    def a_process_ends(self, which: int) -> None:
        names = sorted(self.stage.living.values())
        self.stage.die(names[which % len(names)])

    @precondition(lambda self: self.stage.untold)
    @rule(which=index)
    def an_exit_is_told(self, which: int) -> None:
        self.stage.tell_exit(self.stage.untold[which % len(self.stage.untold)])

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 5.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.pass_time(seconds)

    @rule(happened=st.lists(st.booleans(), min_size=1, max_size=4))
    def the_scheduler_is_killed_and_replaced(self, happened: list[bool]) -> None:
        again = itertools.cycle(happened)
        self.stage.replace_scheduler(lambda: next(again))

    @invariant()
    def demands_are_those_who_wait(self) -> None:
        held = {(m, n) for worker in self.stage.workers.values() for m, (n, _) in worker.waiting.items()}
        known = {(m, n) for m, demand in self.stage.world.demands.items() for n in demand.waiters}
        assert known == held

    @invariant()
    def only_the_ready_are_routed(self) -> None:
        for names in self.stage.tables[-1].values():
            for name in names:
                unit = self.stage.world.units[name]
                assert unit.awake and not unit.moving and not unit.ending
                assert unit.process not in self.stage.sleeping

    def teardown(self) -> None:
        """From now on all goes well: then every waiter is served, all is loaded, and can be stopped."""
        stage = self.stage
        for _ in range(1500):
            self.make_all_well()
            states = stage.states()
            waiting = any(worker.waiting for worker in stage.workers.values())
            loaded = all(
                state == "ready" or (state == "asleep" and name[0] in STANDBY)
                for name, state in states.items()
            )
            if not waiting and loaded and not stage.untold:
                break
            due = next_wakeup(stage.world, stage.now)
            stage.now = min(stage.now + 1.0, due if due is not None else 1e9)
            stage.step()
        else:
            raise AssertionError((stage.states(), [worker.waiting for worker in stage.workers.values()]))
        stage.happen(StopAsked())
        for _ in range(200):
            self.make_all_well()
            if stage.world.empty:
                break
        assert not stage.living, "processes were left"

    def make_all_well(self) -> None:
        stage = self.stage
        while stage.untold:
            stage.tell_exit(stage.untold[0])
        checks = [one for one in stage.asked if isinstance(one[0], Check)]
        for one in [one for one in stage.asked if one not in checks] + checks:
            if one in stage.asked:
                stage.answer(stage.asked.index(one))
        for pid in self.workers:
            if pid not in stage.workers:
                continue
            stage.take_table(pid)
            for name, count in list(stage.workers[pid].in_hand.items()):
                for _ in range(count):
                    stage.finish(name, pid)
            stage.report(pid)


class Restless(Tiers):
    """Without any residence: who was woken still has its turn before it makes room."""

    residence_s = 0.0


Tiers.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
Restless.TestCase.settings = settings(Tiers.TestCase.settings, max_examples=25)
TestTiers = Tiers.TestCase
TestRestless = Restless.TestCase
