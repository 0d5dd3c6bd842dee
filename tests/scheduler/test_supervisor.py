"""The run loop with fake processes and a fake clock: nothing sleeps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from engine.scheduler.listener import Listeners
from engine.scheduler.messages import StopAsked, WakeAsked, WakeLeft
from engine.scheduler.outlook import outlook
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.publish import make_routes
from engine.scheduler.statefile import record
from engine.scheduler.supervisor import Supervisor
from engine.scheduler.transitions import begin
from engine.scheduler.units import PreparationPlan, World
from models.entry import ModelEntry

from .support import (
    POLICY,
    FakeClock,
    FakeCommands,
    FakeLauncher,
    FakeProber,
    config,
    entry,
    napper,
    runner_plans,
)


class PreparedCommands(FakeCommands):
    """Every preparation names a folder that exists, unless the test says otherwise."""

    broken = False

    def prepared_folder(self, plan: PreparationPlan) -> Path | None:
        return None if self.broken else Path("/")


class Stage:
    """A supervisor among fakes."""

    def __init__(self, tmp_path: Path, *entries: ModelEntry, **fields: Any) -> None:
        settings = config(tmp_path, **fields)
        self.launcher = FakeLauncher()
        self.launcher.on_launch = self._preparations_end_well
        self.prober = FakeProber()
        self.clock = FakeClock()
        self.commands = PreparedCommands(settings)
        self.world = World(policy=POLICY)
        runners = runner_plans(tmp_path, *entries, **fields)
        plans = [*self.commands.gateway_plans(), *self.commands.preparation_plans(runners), *runners]
        begin(self.world, plans, [], self.clock.now())
        self.listeners = Listeners("127.0.0.1", 0)
        self.seen: list[dict[str, str]] = []
        self.supervisor = Supervisor(
            self.world,
            commands=self.commands,
            launcher=self.launcher,
            prober=self.prober,
            listeners=self.listeners,
            clock=self.clock,
            warm_timeout_s=5,
            changed=lambda: self.seen.append({u.id: u.state for u in self.world.units.values()}),
        )

    def _preparations_end_well(self, ref: object, order: object) -> None:
        for known, unit in self.launcher.units.items():
            if unit.startswith("prepare-") and not self.launcher.living[known].done():
                self.launcher.living[known].set_result(0)

    def state(self, unit: str) -> str:
        return self.world.units[unit].state

    def pid(self, unit: str) -> int | None:
        process = self.world.units[unit].process
        return process.pid if process else None

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(20_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError({unit.id: (unit.state, unit.reason) for unit in self.world.units.values()})

    async def until_ready(self) -> None:
        await self.until(lambda: all(unit.state == "ready" for unit in self.world.units.values()))


@contextlib.asynccontextmanager
async def playing(stage: Stage) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(stage.supervisor.run())
    try:
        yield task
    finally:
        stage.supervisor.send(StopAsked(drain=False, kill=True))
        await task
        stage.listeners.close()
        assert not stage.launcher.units, "processes were left"


async def test_all_become_ready_each_warmed_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"), entry("b"), entry("c"))
    async with playing(stage):
        await stage.until_ready()
        assert sorted(stage.prober.warmed) == ["a-0", "b-0", "c-0"]
        assert stage.launcher.orders[0].unit == "gateway-0"
        loading = [sum(row[unit] == "starting" for unit in ("a-0", "b-0", "c-0")) for row in stage.seen]
        assert max(loading) == POLICY.concurrent_starts


async def test_a_killed_runner_comes_back_warm_and_says_so_meanwhile(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    async with playing(stage):
        await stage.until_ready()
        old = stage.pid("a-0")
        stage.launcher.die("a-0", -9)
        await stage.until(lambda: stage.state("a-0") == "failed")
        (row,) = make_routes(stage.world, stage.clock.now(), 5.0, 1)
        assert (row.state, row.replicas) == ("failed", [])
        assert "signal 9 (SIGKILL)" in row.reason
        assert row.eta_s is not None and row.eta_s > POLICY.backoff_first_s
        await stage.until_ready()
        assert stage.prober.warmed == ["a-0", "a-0"] and stage.pid("a-0") != old
        assert [name for name, unit in stage.launcher.signals if unit == "a-0"] == ["SWEEP"]
        (row,) = make_routes(stage.world, stage.clock.now(), 5.0, 1)
        assert (row.state, len(row.replicas)) == ("ready", 1)


async def test_only_what_was_warmed_is_routed(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"), entry("b"))
    stage.prober.cold["b-0"] = "its first request was answered wrongly: an empty message"
    async with playing(stage):
        await stage.until(lambda: stage.state("a-0") == "ready" and stage.world.units["b-0"].failures > 2)
        rows = {row.id: row for row in make_routes(stage.world, stage.clock.now(), 5.0, 1)}
        assert [len(rows["a"].replicas), len(rows["b"].replicas)] == [1, 0]
        del stage.prober.cold["b-0"]
        await stage.until_ready()


async def test_a_runner_that_hangs_is_restarted_though_it_ignores_sigterm(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    stage.launcher.obeys = lambda unit: False
    async with playing(stage):
        await stage.until_ready()
        socket = stage.world.units["a-0"].plan
        assert isinstance(socket, RunnerPlan)
        stage.prober.sick.add(socket.spec.socket.stem)
        await stage.until(lambda: stage.state("a-0") == "failed")
        reason = stage.world.units["a-0"].reason
        stage.prober.sick.clear()
        await stage.until_ready()
        assert "health checks" in reason
        assert [name for name, unit in stage.launcher.signals if unit == "a-0"] == ["TERM", "KILL"]


async def test_a_dead_gateway_comes_back_on_the_same_socket(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    async with playing(stage):
        await stage.until_ready()
        stage.launcher.die("gateway-0", 1)
        await stage.until(lambda: stage.state("gateway-0") != "ready")
        await stage.until_ready()
        orders = [order for order in stage.launcher.orders if order.unit == "gateway-0"]
        assert len(orders) == 2 and orders[0].pass_fds == orders[1].pass_fds != ()


async def test_a_preparation_that_fails_shows_why_and_is_tried_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    stage.commands.broken = True
    async with playing(stage):
        await stage.until(lambda: stage.world.units["prepare-a"].failures == 3)
        seen = outlook(stage.world, stage.world.units["a-0"], stage.clock.now())
        assert (seen.state, seen.reason) == ("failed", "its weights could not be prepared")
        assert "named no folder" in seen.full_reason and seen.log_tail
        assert "a-0" not in {order.unit for order in stage.launcher.orders}
        stage.commands.broken = False
        await stage.until_ready()


async def test_a_taken_port_is_a_failure_of_the_gateway_alone(tmp_path: Path) -> None:
    other = Listeners("127.0.0.1", 0)
    other.open(0, shared=False)
    stage = Stage(tmp_path, entry("a"))
    stage.listeners.port = other.port
    async with playing(stage):
        await stage.until(lambda: stage.state("a-0") == "ready")
        gateway = stage.world.units["gateway-0"]
        assert gateway.state == "backoff" and f"port {other.port}" in gateway.detail
        other.close()
        await stage.until_ready()


async def test_stop_drains_gateways_then_runners_and_leaves_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"), entry("b"))
    async with playing(stage) as task:
        await stage.until_ready()
        stage.supervisor.send(StopAsked())
        await task
        terms = [unit for name, unit in stage.launcher.signals if name == "TERM"]
        assert terms[0] == "gateway-0" and sorted(terms[1:]) == ["a-0", "b-0"]
        assert not stage.launcher.units and stage.world.empty


async def test_a_second_request_to_stop_kills(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    stage.launcher.obeys = lambda unit: False
    async with playing(stage) as task:
        await stage.until_ready()
        before = stage.clock.now()
        stage.supervisor.send(StopAsked())
        stage.supervisor.send(StopAsked(drain=False, kill=True))
        await task
        assert stage.clock.now() == before
        assert {("KILL", "gateway-0"), ("KILL", "a-0")} <= set(stage.launcher.signals)


async def test_the_state_file_names_what_lives_as_it_stands(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    async with playing(stage):
        await stage.until_ready()
        state = record(stage.world, scheduler_pid=1, host="h", port=2)
        assert {(unit.id, unit.state) for unit in state.units} == {("gateway-0", "ready"), ("a-0", "ready")}
        assert state.durations["a"] >= 0


async def test_a_restart_tells_why_it_happened(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("a"))
    async with playing(stage):
        await stage.until_ready()
        stage.launcher.die("a-0", -6)
        await stage.until(lambda: stage.state("a-0") == "starting")
        seen = outlook(stage.world, stage.world.units["a-0"], stage.clock.now())
        assert seen.reason.startswith("loading the model again") and "SIGABRT" in seen.reason


NAP: dict[str, Any] = {"models": {"nap": {"tier": "standby"}}}


async def test_a_standby_model_sleeps_and_wakes_when_asked(tmp_path: Path) -> None:
    stage = Stage(tmp_path, napper("nap"), **NAP)
    async with playing(stage):
        await stage.until(lambda: stage.state("nap-0") == "asleep")
        assert stage.prober.asleep == {"nap-0"} and stage.prober.warmed == ["nap-0"]
        stage.supervisor.send(WakeAsked("nap", 1))
        await stage.until(lambda: stage.state("nap-0") == "ready")
        assert not stage.prober.asleep and stage.prober.warmed == ["nap-0", "nap-0"]
        stage.supervisor.send(WakeLeft("nap", 1))
        await stage.until(lambda: not stage.world.demands)
        assert stage.state("nap-0") == "ready"


async def test_a_runner_that_cannot_fall_asleep_or_wake_is_restarted_with_the_reason(tmp_path: Path) -> None:
    stage = Stage(tmp_path, napper("nap"), **NAP)
    stage.prober.stiff.add("nap-0")
    async with playing(stage):
        await stage.until(lambda: stage.state("nap-0") == "failed")
        assert "falling asleep took longer" in stage.world.units["nap-0"].reason
        stage.prober.stiff.clear()
        await stage.until(lambda: stage.state("nap-0") == "asleep")
        stage.prober.cold["nap-0"] = "its first request was answered wrongly: status 500"
        stage.supervisor.send(WakeAsked("nap", 1))
        await stage.until(lambda: stage.state("nap-0") == "failed")
        assert "answered wrongly" in stage.world.units["nap-0"].reason
        stage.prober.cold.clear()
        await stage.until(lambda: stage.state("nap-0") == "ready")
        stage.supervisor.send(WakeLeft("nap", 1))


async def test_one_taken_over_while_it_was_waking_is_awake_in_the_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, napper("nap"), **NAP)
    stage.prober.asleep.add("nap-0")
    stage.prober.busy.add("nap-0")  # its own runner answers 409 while it wakes
    async with playing(stage):
        await stage.until(lambda: stage.state("nap-0") == "ready")
        unit = stage.world.units["nap-0"]
        unit.become("waking", stage.clock.now())
        unit.unsettled = True
        stage.supervisor.send(WakeLeft("nap", 1))  # anything that has it look again
        await stage.until(lambda: stage.state("nap-0") == "ready")
        assert not stage.prober.asleep and not unit.unsettled
