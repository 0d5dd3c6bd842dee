"""The run loop: it alone owns the world. Events come in on one queue; actions go out as effects."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from engine.routes import ExpertBalance
from engine.scheduler.commands import Commands
from engine.scheduler.launcher import Launcher, LaunchError, describe_exit
from engine.scheduler.listener import ListenError, Listeners
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
    Measured,
    Missed,
    Progressed,
    Renewed,
    Settle,
    Sleep,
    SleepFailed,
    Slept,
    Sweep,
    Terminate,
    UsageReported,
    Wake,
    WakeFailed,
    Warmed,
    WarmFailed,
    WarmUp,
    Woken,
)
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.probe import BusyError, ProbeError, Prober
from engine.scheduler.reconcile import next_wakeup, reconcile
from engine.scheduler.transitions import apply, commit
from engine.scheduler.units import GatewayPlan, PreparationPlan, ProcessRef, Unit, World

log = logging.getLogger(__name__)

#: Between two looks at the progress of preparations, seconds.
_PROGRESS_S = 0.5
#: Between two measurements of memory while something warms, and in the steady state, seconds. Reading the
#: proportional set size of a big process costs milliseconds.
_MEASURE_WARMING_S = 5.0
_MEASURE_STEADY_S = 60.0


class Clock(Protocol):
    """Time, as the loop sees it; tests hand in a fake."""

    def now(self) -> float: ...

    async def next_event(self, queue: asyncio.Queue[Event], until: float | None) -> Event | None: ...


class RealClock:
    """Monotonic time."""

    def now(self) -> float:
        return time.monotonic()

    async def next_event(self, queue: asyncio.Queue[Event], until: float | None) -> Event | None:
        """The next event, or None once it is ``until`` (None: wait for ever)."""
        if not queue.empty():
            return queue.get_nowait()
        timeout = None if until is None else max(0.0, until - self.now())
        try:
            return await asyncio.wait_for(queue.get(), timeout)
        except TimeoutError:
            return None


class Supervisor:
    """Runs a world until it has been stopped and nothing lives."""

    def __init__(
        self,
        world: World,
        *,
        commands: Commands,
        launcher: Launcher,
        prober: Prober,
        listeners: Listeners,
        clock: Clock,
        warm_timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called in the loop after every step that may have changed the world."""
        self.world = world
        self._commands = commands
        self._launcher = launcher
        self._prober = prober
        self._listeners = listeners
        self._clock = clock
        self._warm_timeout_s = warm_timeout_s
        self._changed = changed
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._news = True
        self._tasks: set[asyncio.Task[None]] = set()

    def renewed(self, *, warm_timeout_s: float) -> None:
        """The world was given another plan, and the numbers have changed; in the loop's thread."""
        self._warm_timeout_s = warm_timeout_s
        self.send(Renewed())

    def send(self, event: Event) -> None:
        """Hands an event to the loop; to be called in the loop's thread."""
        self._queue.put_nowait(event)

    async def run(self) -> None:
        """Returns once the world was stopped and is empty. Cancelled, it leaves the processes alive."""
        for unit in self.world.units.values():
            if unit.process:
                self._watch(unit, unit.process)
        self._spawn(self._follow_progress())
        self._spawn(self._measure())
        try:
            while True:
                self._step()
                if self.world.stop and self.world.empty:
                    return
                until = next_wakeup(self.world, self._clock.now())
                event = await self._clock.next_event(self._queue, until)
                while event is not None:
                    self._take(event)
                    event = None if self._queue.empty() else self._queue.get_nowait()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, event: Event) -> None:
        unit = self.world.units.get(event.unit) if isinstance(event, Healthy) else None
        # That what is well is still well, or what is in use, several times a second, is nothing to write or
        # publish.
        routine = isinstance(event, UsageReported) or (unit is not None and unit.state in ("ready", "asleep"))
        self._news = self._news or not routine
        apply(self.world, event, self._clock.now())

    def _step(self) -> None:
        """Carries out what is due until nothing is."""
        now = self._clock.now()
        while actions := reconcile(self.world, now):
            for action in actions:
                self._news = self._news or not isinstance(action, Check)
                commit(self.world, action, now)
                self._execute(action, self.world.units[action.unit])
        if self._news:
            self._news = False
            self._changed()

    def _execute(self, action: Action, unit: Unit) -> None:
        ref = unit.process
        match action:
            case Launch():
                self._launch(unit)
            case Check() if ref:
                self._spawn(self._check(unit, ref))
            case WarmUp() if ref:
                self._spawn(self._warm(unit, ref))
            case Sleep() | Wake() | Settle() if ref:
                self._spawn(self._move(unit, ref, action))
            case Terminate() if ref:
                log.info("%s: %s; ending process %d", unit.id, action.reason, ref.pid)
                if isinstance(unit.plan, GatewayPlan) and unit.leaving:
                    self._release_listener(unit, unit.plan)
                if unit.kind == "gateway" and self.world.stop:
                    # Our copies would go on taking connections that nobody accepts.
                    self._listeners.close()
                self._launcher.terminate(ref)
            case Sweep() if ref:
                self._spawn(self._sweep(unit.id, ref, at_once=action.at_once))

    def _release_listener(self, unit: Unit, plan: GatewayPlan) -> None:
        """Our copy of a socket goes with the last worker that accepts on it."""
        others = (other.plan for other in self.world.of_kind("gateway") if other is not unit)
        if not any(isinstance(other, GatewayPlan) and other.index == plan.index for other in others):
            self._listeners.release(plan.index)

    def _launch(self, unit: Unit) -> None:
        now = self._clock.now()
        try:
            ref = self._start(unit)
        except (LaunchError, ListenError) as error:
            log.error("%s", error)
            apply(self.world, LaunchFailed(unit.id, str(error)), now)
            return
        log.info("%s: started as process %d", unit.id, ref.pid)
        apply(self.world, Launched(unit.id, ref), now)
        self._watch(unit, ref)

    def _start(self, unit: Unit) -> ProcessRef:
        plan = unit.plan
        if isinstance(plan, RunnerPlan):
            weights = self.world.units[plan.preparation].result
            assert weights is not None, "runners start after their preparation"
            return self._launcher.launch(self._commands.runner(plan, weights))
        if isinstance(plan, GatewayPlan):
            listener = self._listeners.open(plan.index, shared=self._gateways_live())
            return self._launcher.launch(self._commands.gateway(plan, listener.fileno()))
        assert isinstance(plan, PreparationPlan), "only what is wanted is started"
        return self._launcher.launch(self._commands.preparation(plan))

    def _gateways_live(self) -> bool:
        return any(unit.process for unit in self.world.of_kind("gateway"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("an effect failed in an unforeseen way", exc_info=error)

    def _watch(self, unit: Unit, ref: ProcessRef) -> None:
        self._spawn(self._await_exit(unit, ref))

    async def _await_exit(self, unit: Unit, ref: ProcessRef) -> None:
        code = await self._launcher.exited(ref)
        tail = self._launcher.log_tail(unit.id)
        reason, detail, result = describe_exit(code), "", None
        if code and code > 0 and tail:
            detail = tail[-1]
        if isinstance(unit.plan, PreparationPlan):
            progress = self._commands.progress(unit.plan)
            if progress and progress.stage == "failed" and progress.message:
                detail = progress.message
            if code == 0:
                result = self._commands.prepared_folder(unit.plan)
                detail = "" if result else "it named no folder that exists"
        log.info("%s: %s%s", unit.id, reason, f": {detail}" if detail else "")
        self.send(Exited(unit.id, ref, code, reason, detail, tail, result))

    async def _sweep(self, unit: str, ref: ProcessRef, *, at_once: bool) -> None:
        await self._launcher.sweep(ref, at_once=at_once)
        self.send(Gone(unit, ref))

    async def _check(self, unit: Unit, ref: ProcessRef) -> None:
        try:
            if isinstance(unit.plan, RunnerPlan):
                await self._prober.runner_health(unit.plan.spec.socket)
            else:
                await self._prober.gateway_health(self._listeners.url)
        except ProbeError as error:
            self.send(Missed(unit.id, ref, str(error)))
        except Exception as error:  # whatever it is, the unit must not be left unwatched
            log.exception("%s: the health check failed in an unforeseen way", unit.id)
            self.send(Missed(unit.id, ref, repr(error)))
        else:
            self.send(Healthy(unit.id, ref))

    async def _warm(self, unit: Unit, ref: ProcessRef) -> None:
        assert isinstance(unit.plan, RunnerPlan), "only runners are warmed"
        try:
            await self._prober.warm_up(unit.plan, self._warm_timeout_s)
        except ProbeError as error:
            self.send(WarmFailed(unit.id, ref, str(error)))
        except Exception as error:  # whatever it is, the unit must not be left half warm
            log.exception("%s: the warm-up failed in an unforeseen way", unit.id)
            self.send(WarmFailed(unit.id, ref, repr(error)))
        else:
            log.info("%s: ready", unit.id)
            self.send(Warmed(unit.id, ref))
            await self._measure_one(unit.id, ref)

    async def _move(self, unit: Unit, ref: ProcessRef, action: Sleep | Wake | Settle) -> None:
        """Carries out a sleep or a wake; half-way ones are first asked which they were at."""
        plan, limit = unit.plan, self.world.policy.wake_timeout_s
        assert isinstance(plan, RunnerPlan), "only runners sleep"
        sleeps = isinstance(action, Sleep)
        event: Event
        try:
            if isinstance(action, Settle):
                sleeps = await self._stays_asleep(plan, limit)
                event = Slept(unit.id, ref)
                if not sleeps:
                    await self._prober.wake(plan, limit)
                    event = Woken(unit.id, ref)
            elif sleeps:
                await self._prober.sleep(plan.spec.socket, limit)
                event = Slept(unit.id, ref)
            else:
                await self._prober.wake(plan, limit)
                event = Woken(unit.id, ref)
        except BusyError as error:
            event = SleepFailed(unit.id, ref, str(error), busy=True)
        except ProbeError as error:
            event = (SleepFailed if sleeps else WakeFailed)(unit.id, ref, str(error))
        except Exception as error:  # whatever it is, the unit must not be left half asleep
            log.exception("%s: %s failed in an unforeseen way", unit.id, "sleep" if sleeps else "wake")
            event = (SleepFailed if sleeps else WakeFailed)(unit.id, ref, repr(error))
        log.info("%s: %s", unit.id, _told(event))
        self.send(event)
        await self._measure_one(unit.id, ref)

    async def _stays_asleep(self, plan: RunnerPlan, limit: float) -> bool:
        """Whether one taken over half-way is asleep now, not only on its way there or back."""
        if not await self._prober.is_sleeping(plan.spec.socket, limit):
            return False
        try:
            await self._prober.sleep(plan.spec.socket, limit)
        except BusyError:  # it was waking
            return False
        return True

    async def _follow_progress(self) -> None:
        while True:
            for unit in self.world.of_kind("preparation"):
                if unit.process and isinstance(unit.plan, PreparationPlan):
                    progress = self._commands.progress(unit.plan)
                    if progress and progress != unit.progress:
                        self.send(Progressed(unit.id, progress))
            await asyncio.sleep(_PROGRESS_S)

    async def _measure_one(self, unit: str, ref: ProcessRef) -> None:
        memory = await asyncio.to_thread(self._launcher.memory, ref)
        self.send(Measured(unit, ref, memory, await self._expert_balance(unit)))

    async def _expert_balance(self, unit: str) -> ExpertBalance | None:
        seen = self.world.units.get(unit)
        if seen is None or seen.state != "ready" or not isinstance(seen.plan, RunnerPlan):
            return None
        return await self._prober.expert_balance(seen.plan.spec.socket) if seen.plan.entry.experts else None

    async def _measure(self) -> None:
        while True:
            processes = [(u.id, u.process) for u in self.world.units.values() if u.process]
            for unit, ref in processes:
                await self._measure_one(unit, ref)
            await asyncio.to_thread(self._launcher.trim_logs)
            steady = all(u.state in ("ready", "asleep") for u in self.world.units.values() if u.process)
            await asyncio.sleep(_MEASURE_STEADY_S if steady and processes else _MEASURE_WARMING_S)


def _told(event: Event) -> str:
    """A sleep's or wake's outcome for the log."""
    match event:
        case Slept():
            return "asleep"
        case SleepFailed(busy=True):
            return f"not put to sleep: {event.reason}"
        case SleepFailed() | WakeFailed():
            return event.reason
        case _:
            return "awake and ready"
