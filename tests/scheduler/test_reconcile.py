"""Decisions: what is due, given the world and the clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.scheduler.messages import (
    Action,
    Check,
    Event,
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
from engine.scheduler.statefile import UnitRecord
from engine.scheduler.transitions import PREPARATION_PATIENCE, apply, begin, commit
from engine.scheduler.units import ProcessRef, UnitPlan, World

from .support import POLICY, entry, gateway_plan, preparation_plan, runner_plans


class Play:
    """A world whose time and events a test moves by hand."""

    def __init__(self, plans: Sequence[UnitPlan], left: Sequence[UnitRecord] = ()) -> None:
        self.world = World(policy=POLICY)
        self.now = 0.0
        self._pid = 10
        begin(self.world, plans, left, self.now)

    def step(self) -> list[Action]:
        """Everything that is due now, committed; launches succeed."""
        done: list[Action] = []
        while actions := reconcile(self.world, self.now):
            for action in actions:
                commit(self.world, action, self.now)
                if isinstance(action, Launch):
                    self._pid += 1
                    self.happen(Launched(action.unit, ProcessRef(self._pid, self._pid, f"t{self._pid}")))
            done += actions
        return done

    def happen(self, event: Event) -> None:
        apply(self.world, event, self.now)

    def pass_time(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.step()

    def process(self, unit: str) -> ProcessRef:
        ref = self.world.units[unit].process
        assert ref is not None
        return ref

    def state(self, unit: str) -> str:
        return self.world.units[unit].state

    def exit(self, unit: str, code: int = -9, result: Path | None = None) -> None:
        self.happen(Exited(unit, self.process(unit), code, f"ended with {code}", result=result))

    def end(self, unit: str, code: int = -9, result: Path | None = None) -> list[Action]:
        """The leader ends and the sweep finds nothing more."""
        ref = self.process(unit)
        self.exit(unit, code, result)
        actions = self.step()
        self.happen(Gone(unit, ref))
        return actions + self.step()

    def make_ready(self, unit: str) -> None:
        self.happen(Healthy(unit, self.process(unit)))
        self.step()
        if self.world.units[unit].kind == "runner":
            self.happen(Warmed(unit, self.process(unit)))
        self.step()


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """One runner and its weights, which are prepared already."""
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner])
    play.step()
    play.end("prepare-m", 0, Path("/weights"))
    return play


def test_a_runner_waits_for_its_weights_then_loads_then_answers_then_is_ready(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner])
    assert play.step() == [Launch("prepare-m")]
    assert play.end("prepare-m", 0, Path("/w")) == [Sweep("prepare-m", at_once=False), Launch("m-0")]
    assert play.pass_time(POLICY.start_check_s) == [Check("m-0")]
    play.happen(Missed("m-0", play.process("m-0"), "no socket yet"))
    assert play.state("m-0") == "starting"
    assert play.pass_time(POLICY.start_check_s) == [Check("m-0")]
    play.happen(Healthy("m-0", play.process("m-0")))
    assert (play.state("m-0"), play.step()) == ("warming", [WarmUp("m-0")])
    play.happen(Warmed("m-0", play.process("m-0")))
    assert (play.state("m-0"), play.step()) == ("ready", [])
    assert play.world.durations == {"m": play.now}


def test_a_killed_runner_is_swept_and_started_again_after_its_backoff(play: Play) -> None:
    play.make_ready("m-0")
    old = play.process("m-0")
    play.exit("m-0")
    assert play.state("m-0") == "failed"
    # Not before nothing of its group lives, however long that takes.
    assert play.step() == [Sweep("m-0", at_once=False)]
    assert play.pass_time(1000) == []
    play.happen(Gone("m-0", old))
    assert play.step() == [Launch("m-0")]
    assert play.world.units["m-0"].restarts == 1


def test_backoff_doubles_to_its_longest_and_begins_again_after_a_good_while(play: Play) -> None:
    waits = []
    for _ in range(6):
        play.end("m-0", 1)
        due = next_wakeup(play.world, play.now)
        assert due is not None
        waits.append(due - play.now)
        assert play.pass_time(waits[-1] - 0.01) == []
        assert Launch("m-0") in play.pass_time(0.02)
    assert waits == pytest.approx([1, 2, 4, 8, 8, 8])
    play.make_ready("m-0")
    play.now += POLICY.backoff_max_s
    play.end("m-0")
    assert play.world.units["m-0"].retry_at - play.now == POLICY.backoff_first_s


def test_a_failed_warm_up_is_a_failure(play: Play) -> None:
    play.happen(Healthy("m-0", play.process("m-0")))
    play.step()
    play.happen(WarmFailed("m-0", play.process("m-0"), "status 500"))
    assert play.step() == [Terminate("m-0", POLICY.stop_timeout_s, "failed", "backoff", "status 500")]
    assert play.state("m-0") == "failed"


def test_a_hung_runner_is_ended_after_several_misses_and_killed_at_the_deadline(play: Play) -> None:
    play.make_ready("m-0")
    for _ in range(POLICY.health_failures):
        assert play.pass_time(POLICY.health_interval_s) == [Check("m-0")]
        play.happen(Missed("m-0", play.process("m-0"), "nothing within 5 s"))
    (terminate,) = play.step()
    assert isinstance(terminate, Terminate) and "3 health checks" in terminate.reason
    assert play.pass_time(POLICY.stop_timeout_s - 0.1) == []
    assert play.pass_time(0.2) == [Sweep("m-0", at_once=True)]
    play.happen(Gone("m-0", play.process("m-0")))
    play.step()
    assert play.state("m-0") == "starting"  # the backoff had passed meanwhile


def test_one_missed_check_is_forgiven(play: Play) -> None:
    play.make_ready("m-0")
    for good in [False, False, True, False, False, True]:
        assert play.pass_time(POLICY.health_interval_s) == [Check("m-0")]
        ref = play.process("m-0")
        play.happen(Healthy("m-0", ref) if good else Missed("m-0", ref, "slow"))
    assert (play.step(), play.state("m-0")) == ([], "ready")


def test_loading_for_too_long_is_a_failure(play: Play) -> None:
    play.world.units["m-0"].checking = True
    (terminate,) = play.pass_time(POLICY.start_timeout_s)
    assert isinstance(terminate, Terminate) and "start_timeout_s" in terminate.reason


def test_a_failed_preparation_holds_its_runner_and_is_tried_again(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner])
    play.step()
    play.end("prepare-m", 1)
    assert play.state("prepare-m") == "backoff"
    assert play.pass_time(POLICY.backoff_first_s) == []
    assert play.pass_time(POLICY.backoff_first_s * (PREPARATION_PATIENCE - 1)) == [Launch("prepare-m")]
    assert Launch("m-0") in play.end("prepare-m", 0, Path("/w"))


def test_models_with_one_weights_key_share_a_preparation(tmp_path: Path) -> None:
    runners = runner_plans(tmp_path, entry("a", weights_key="k"), entry("b", weights_key="k"))
    play = Play([preparation_plan(runners[0]), *runners])
    assert play.step() == [Launch("prepare-k")]
    actions = play.end("prepare-k", 0, Path("/w"))
    assert {Launch("a-0"), Launch("b-0")} <= set(actions)


def test_starts_on_a_device_are_bounded_the_longest_first(tmp_path: Path) -> None:
    entries = [
        entry(name, warm_up_s=seconds) for name, seconds in [("a", 5), ("b", 50), ("c", 20), ("d", 30)]
    ]
    runners = runner_plans(tmp_path, *entries)
    play = Play([*map(preparation_plan, runners), *runners])
    play.step()
    for name in "abcd":
        play.exit(f"prepare-{name}", 0, Path("/w"))
    play.step()
    for name in "abcd":
        play.happen(Gone(f"prepare-{name}", play.process(f"prepare-{name}")))
    assert play.step() == [Launch("b-0"), Launch("d-0")]
    play.happen(Healthy("d-0", play.process("d-0")))
    assert play.step() == [WarmUp("d-0"), Launch("c-0")]


def test_on_a_gpu_nothing_starts_beside_one_that_ends(tmp_path: Path) -> None:
    from engine.scheduler.devices import Device
    from engine.scheduler.plan import make_plan
    from models.profile import Needs

    from .support import GIB, catalog, config, profile

    entries = [entry("a"), entry("b")]
    wanted = profile("a", "b").model_copy(update={"needs": Needs(gpus=1)})
    settings = config(tmp_path)
    runners = make_plan(
        settings, wanted, catalog(*entries), [Device("cpu:0", GIB), Device("cuda:0", 8 * GIB)]
    )
    assert {runner.device for runner in runners} == {"cuda:0"}
    play = Play([*map(preparation_plan, runners), *runners])
    play.world.policy = type(POLICY)(concurrent_starts=1)
    play.step()
    play.end("prepare-a", 0, Path("/w"))
    play.exit("a-0")
    play.step()
    play.end("prepare-b", 0, Path("/w"))
    assert play.world.units["b-0"].process is None
    play.happen(Gone("a-0", play.process("a-0")))
    assert play.step() == [Launch("b-0")]


def test_a_launch_that_fails_is_tried_again(tmp_path: Path) -> None:
    world = World(policy=POLICY)
    begin(world, [gateway_plan()], [], 0.0)
    (action,) = reconcile(world, 0.0)
    commit(world, action, 0.0)
    apply(world, LaunchFailed("gateway-0", "no such file"), 0.0)
    assert reconcile(world, 0.5) == []
    assert reconcile(world, 1.0) == [Launch("gateway-0")]


def stop_play(tmp_path: Path) -> Play:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([gateway_plan(), preparation_plan(runner), runner])
    play.step()
    play.end("prepare-m", 0, Path("/w"))
    play.make_ready("m-0")
    play.make_ready("gateway-0")
    return play


def test_stopping_ends_gateways_first_then_runners(tmp_path: Path) -> None:
    play = stop_play(tmp_path)
    play.happen(StopAsked())
    grace = POLICY.gateway_drain_s + POLICY.stop_timeout_s
    assert play.step() == [Terminate("gateway-0", grace, "draining", "stopped", "stopping")]
    assert play.state("m-0") == "ready"  # what the gateway still carries needs it
    assert play.pass_time(POLICY.health_interval_s) == []
    assert next_wakeup(play.world, play.now) == grace  # no timer in the past, on which the loop would spin
    actions = play.end("gateway-0", 0)
    grace = POLICY.drain_s + POLICY.stop_timeout_s
    assert actions[-1] == Terminate("m-0", grace, "draining", "stopped", "stopping")
    play.end("m-0", 0)
    assert play.world.empty and play.state("m-0") == "stopped"
    assert play.pass_time(1000) == []


def test_asked_to_kill_everything_is_killed_now(tmp_path: Path) -> None:
    play = stop_play(tmp_path)
    play.happen(StopAsked())
    play.step()
    play.happen(StopAsked(drain=False, kill=True))
    actions = play.step()
    assert {Sweep("gateway-0", at_once=True), Sweep("m-0", at_once=True)} <= set(actions)


def test_asked_not_to_drain_the_deadline_comes_nearer(tmp_path: Path) -> None:
    play = stop_play(tmp_path)
    play.happen(StopAsked())
    play.step()
    play.happen(StopAsked(drain=False))
    assert Sweep("gateway-0", at_once=True) in play.pass_time(POLICY.stop_timeout_s)


def test_a_runner_that_ends_while_stopping_is_not_started_again(tmp_path: Path) -> None:
    play = stop_play(tmp_path)
    play.happen(StopAsked())
    play.step()
    play.end("m-0")
    assert play.state("m-0") == "stopped"
    assert not any(isinstance(action, Launch) for action in play.pass_time(1000))


def record(unit: str, kind: str, fingerprint: str, state: str = "ready") -> UnitRecord:
    return UnitRecord.model_validate(
        {
            "id": unit,
            "kind": kind,
            "pid": 5,
            "started": 5,
            "token": "t",
            "fingerprint": fingerprint,
            "state": state,
        }
    )


def test_what_lives_with_an_equal_plan_is_adopted_ready_without_a_start(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner], [record("m-0", "runner", runner.fingerprint)])
    assert play.state("m-0") == "ready"
    assert play.step() == [Check("m-0")]  # neither a launch nor a preparation


def test_an_adopted_runner_that_was_not_ready_is_warmed(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([runner], [record("m-0", "runner", runner.fingerprint, "starting")])
    assert play.step() == [Check("m-0")]
    play.happen(Healthy("m-0", play.process("m-0")))
    assert play.step() == [WarmUp("m-0")]


def test_changed_settings_replace_the_process(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner], [record("m-0", "runner", "another")])
    (terminate,) = play.step()
    assert isinstance(terminate, Terminate) and terminate.then == "planned"
    play.end("m-0", 0)
    play.end("prepare-m", 0, Path("/w"))
    assert play.world.units["m-0"].running == runner.fingerprint
    assert play.world.units["m-0"].failures == 0


def test_what_is_no_longer_wanted_is_ended_and_forgotten(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([runner], [record("old-0", "runner", "x")])
    assert any(isinstance(action, Terminate) and action.unit == "old-0" for action in play.step())
    play.end("old-0", 0)
    assert set(play.world.units) == {"m-0"}


def test_a_preparation_left_over_is_begun_anew(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("m"))
    play = Play([preparation_plan(runner), runner], [record("prepare-m", "preparation", "p", "starting")])
    assert isinstance(play.step()[0], Terminate)
    play.end("prepare-m", 0, None)
    assert Launch("prepare-m") in play.pass_time(POLICY.backoff_first_s * PREPARATION_PATIENCE)


def test_workers_that_share_a_port_are_not_blamed_for_a_missed_check() -> None:
    play = Play([gateway_plan(0, alone=False), gateway_plan(1, alone=False)])
    play.step()
    play.make_ready("gateway-0")
    for _ in range(10):
        play.pass_time(POLICY.health_interval_s)
        play.happen(Missed("gateway-0", play.process("gateway-0"), "nothing"))
    assert play.state("gateway-0") == "ready"


def test_events_of_an_earlier_process_are_ignored(play: Play) -> None:
    old = play.process("m-0")
    play.end("m-0")
    play.pass_time(POLICY.backoff_first_s)
    play.happen(Exited("m-0", old, 1, "late"))
    play.happen(Gone("m-0", old))
    play.happen(Healthy("m-0", old))
    assert play.state("m-0") == "starting" and play.process("m-0") != old
