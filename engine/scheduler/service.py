"""The scheduler as the command line sees it: make it, run it, ask it, stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator

from engine.config import Config
from engine.scheduler import statefile
from engine.scheduler.commands import Commands
from engine.scheduler.control import control_app, serve_control
from engine.scheduler.devices import find_devices
from engine.scheduler.launcher import Launcher, LocalLauncher
from engine.scheduler.leftovers import (
    SchedulerError,
    end_strays,
    living,
    make_runtime,
    remove_runtime,
    scope_of,
    sole_scheduler,
    stop_leftovers,
)
from engine.scheduler.listener import ListenError, Listeners
from engine.scheduler.messages import StopAsked
from engine.scheduler.plan import Entries, PlanError, host_room, make_plan, rooms
from engine.scheduler.probe import HttpProber, Prober
from engine.scheduler.publish import RouteBoard, make_routes
from engine.scheduler.reports import Waiters
from engine.scheduler.status import SchedulerStatus, Status, make_status
from engine.scheduler.supervisor import Clock, RealClock, Supervisor
from engine.scheduler.transitions import begin
from engine.scheduler.units import Policy, UnitPlan, World
from models.profile import Profile

__all__ = ["Scheduler", "SchedulerError", "stop_leftovers"]

log = logging.getLogger(__name__)


class Scheduler:
    """Keeps every model of a profile warm, and says where requests may go."""

    def __init__(
        self,
        config: Config,
        profile: Profile,
        catalog: Entries,
        *,
        launcher: Launcher | None = None,
        prober: Prober | None = None,
        clock: Clock | None = None,
        commands: Commands | None = None,
    ) -> None:
        """Plans; starts nothing yet. The keyword arguments are for tests.

        Raises:
            SchedulerError: the profile's models cannot be placed on this machine.
        """
        self._config = config
        self._profile = profile
        self._commands = commands or Commands(config)
        self._launcher = launcher or LocalLauncher(scope_of(config))
        self._prober = prober or HttpProber()
        self._clock = clock or RealClock()
        devices = find_devices()
        try:
            runners = make_plan(config, profile, catalog, devices)
        except PlanError as error:
            raise SchedulerError(str(error)) from error
        # Gateways first: they answer "not ready yet, this long" while the runners start.
        self._plans: list[UnitPlan] = [
            *self._commands.gateway_plans(),
            *self._commands.preparation_plans(runners),
            *runners,
        ]
        self._world = World(
            policy=_policy(config), room=rooms(config, devices), host_room=host_room(config, devices)
        )
        begin(self._world, self._plans, [], self._clock.now())
        self._listeners = Listeners(config.host, config.port)
        self._me = SchedulerStatus(pid=os.getpid(), started=time.time())
        self._supervisor: Supervisor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early_stop: StopAsked | None = None
        self._changed: asyncio.Event = asyncio.Event()

    async def run(self) -> None:
        """Starts (or adopts) everything and keeps it warm; returns when stopped and nothing is left running.

        Raises:
            SchedulerError: another one runs here, the port is taken, or a folder cannot be made.
        """
        self._loop = asyncio.get_running_loop()
        with sole_scheduler(self._config):
            make_runtime(self._config.runtime_dir)
            try:
                await self._run()
            finally:
                self._listeners.close()
                if self._world.empty:
                    remove_runtime(self._config)

    async def _run(self) -> None:
        config = self._config
        left = statefile.load(config.state_file)
        self._adopt(left)
        board = RouteBoard(config.routes_file)
        self._world.published = board.table.version
        writer = statefile.StateWriter(config.state_file)

        def changed() -> None:
            port = self._listeners.port
            state = statefile.record(self._world, scheduler_pid=os.getpid(), host=config.host, port=port)
            routes = make_routes(self._world, self._clock.now(), time.time(), int(self._me.started))
            try:
                writer.save(state)
                board.publish(routes)
            except OSError as error:
                # Serving goes on; a full disk must not end it. Tried again at the next step.
                log.error("the state folder %s cannot be written: %s", config.state_dir, error)
            self._world.published = board.table.version
            self._changed.set()
            self._changed = asyncio.Event()

        self._supervisor = Supervisor(
            self._world,
            commands=self._commands,
            launcher=self._launcher,
            prober=self._prober,
            listeners=self._listeners,
            clock=self._clock,
            warm_timeout_s=config.scheduler.warm_timeout_s,
            changed=changed,
        )
        if self._early_stop:
            self._supervisor.send(self._early_stop)
        waiters = Waiters(
            self._world,
            now=self._clock.now,
            send=self._supervisor.send,
            changed=lambda: self._changed,
        )
        app = control_app(
            status=self.status,
            board=board,
            stop=lambda drain: self._ask(StopAsked(drain=drain)),
            waiters=waiters,
            report=self._supervisor.send,
        )
        try:
            async with serve_control(app, config.control_socket):
                await self._supervisor.run()
        finally:
            await self._prober.close()

    def _adopt(self, left: statefile.StateFile) -> None:
        """Takes over what lives and fits; ends, before anything starts, what can only be ended."""
        whole, _ = living(left)
        # Groups without their leader are among the strays.
        strays = end_strays(self._config, whole)
        if strays:
            log.warning("ended %d processes that an earlier scheduler left", len(strays))
        for unit in whole:
            log.info("%s: process %d lives on", unit.id, unit.pid)
        self._world.durations.update(left.durations)
        self._world.wakes.update(left.wakes)
        begin(self._world, self._plans, whole, self._clock.now())
        if any(unit.kind == "gateway" for unit in whole) and self._config.port in (0, left.port):
            self._listeners.port = left.port
            return
        try:
            # Before anything is started: a taken port is to be known at once.
            self._listeners.open(0, shared=False)
        except ListenError as error:
            raise SchedulerError(str(error)) from error

    def request_stop(self, *, kill: bool = False) -> None:
        """Drains and stops; with ``kill`` at once. From any thread or signal handler, also again."""
        ask = StopAsked(drain=not kill, kill=kill)
        if self._loop is None:
            self._early_stop = ask
        else:
            self._loop.call_soon_threadsafe(self._ask, ask)

    def _ask(self, ask: StopAsked) -> None:
        if self._supervisor:
            self._supervisor.send(ask)
        else:
            self._early_stop = ask

    def status(self) -> Status:
        """What runs, in which state and why."""
        return make_status(
            self._world,
            self._clock.now(),
            scheduler=self._me,
            profile=self._profile.name,
            base_url=f"{self._listeners.url}/v1",
        )

    async def subscribe(self) -> AsyncIterator[Status]:
        """The status now and after every change."""
        while True:
            changed = self._changed
            yield self.status()
            await changed.wait()


def _policy(config: Config) -> Policy:
    given = config.scheduler
    return Policy(
        start_timeout_s=given.start_timeout_s,
        health_interval_s=given.health_interval_s,
        health_failures=given.health_failures,
        backoff_first_s=given.backoff_first_s,
        backoff_max_s=given.backoff_max_s,
        stop_timeout_s=given.stop_timeout_s,
        drain_s=given.drain_s,
        gateway_drain_s=config.gateway.drain_s,
        concurrent_starts=given.concurrent_starts,
        wake_wait_s=config.tiers.wake_wait_s,
        most_waiting=config.tiers.most_waiting,
        wake_timeout_s=config.tiers.wake_timeout_s,
        min_residence_s=config.tiers.min_residence_s,
    )
