"""The scheduler as the command line sees it: make it, run it, ask it, stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence

from engine.config import Config, ConfigError
from engine.scheduler import statefile
from engine.scheduler.changes import Reloaded
from engine.scheduler.commands import Commands
from engine.scheduler.control import control_app, serve_control
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
from engine.scheduler.plan import Entries, PlanError, RunnerPlan
from engine.scheduler.probe import HttpProber, Prober
from engine.scheduler.publish import RouteBoard, make_routes
from engine.scheduler.reload import ReloadError, Renewal, Setup, adopted, make_setup, prepare
from engine.scheduler.renewal import renew, survey
from engine.scheduler.reports import Waiters
from engine.scheduler.status import SchedulerStatus, Status, make_status
from engine.scheduler.supervisor import Clock, RealClock, Supervisor
from engine.scheduler.transitions import begin
from engine.scheduler.trend import Rules
from engine.scheduler.units import GatewayPlan, Policy, UnitPlan, World
from models.catalog import CatalogError
from models.profile import Profile

__all__ = ["ReloadError", "Scheduler", "SchedulerError", "stop_leftovers"]

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
        read: Callable[[], tuple[Config, Profile, Entries]] | None = None,
    ) -> None:
        """Plans; starts nothing yet. The keyword arguments but ``read`` are for tests.

        Args:
            config: the configuration.
            profile: which models are served.
            catalog: what they are.
            read: reads all three anew, for a reload; None = there is no reload.

        Raises:
            SchedulerError: the profile's models cannot be placed on this machine.
        """
        self._read = read
        self._reloading = asyncio.Lock()
        #: Told of each reload, whoever asked for it: what it did, or why it was refused.
        self.on_reload: Callable[[Reloaded | ReloadError], None] = lambda _: None
        self._commands = commands or Commands(config)
        self._launcher = launcher or LocalLauncher(scope_of(config))
        self._prober = prober or HttpProber()
        self._clock = clock or RealClock()
        try:
            self._setup = make_setup(config, profile, catalog)
        except PlanError as error:
            raise SchedulerError(str(error)) from error
        self._world = World()
        self._take_numbers(self._setup)
        begin(self._world, self._plans(self._commands.gateway_plans(), self._setup.runners), [], self._now())
        self._listeners = Listeners(config.host, config.port)
        self._me = SchedulerStatus(pid=os.getpid(), started=time.time())
        self._supervisor: Supervisor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early_stop: StopAsked | None = None
        self._changed: asyncio.Event = asyncio.Event()

    def _now(self) -> float:
        return self._clock.now()

    @property
    def _config(self) -> Config:
        return self._setup.config

    def _plans(self, gateways: Sequence[GatewayPlan], runners: list[RunnerPlan]) -> list[UnitPlan]:
        # Gateways first: they answer "not ready yet, this long" while the runners start.
        return [*gateways, *self._commands.preparation_plans(runners), *runners]

    def _take_numbers(self, setup: Setup) -> None:
        self._world.policy = _policy(setup.config)
        self._world.scaling = Rules(**setup.config.scaling.model_dump())
        self._world.room = setup.rooms
        self._world.kinds = setup.kinds
        self._world.host_room = setup.host_room

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
            reload=lambda dry_run: self.reload(dry_run=dry_run),
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
        gateways, runners = adopted(self._setup, self._commands.gateway_plans(), whole)
        self._world.units.clear()
        begin(self._world, self._plans(gateways, runners), whole, self._now())
        if any(unit.kind == "gateway" for unit in whole) and self._config.port in (0, left.port):
            self._listeners.port = left.port
            return
        try:
            # Before anything is started: a taken port is to be known at once.
            self._listeners.open(0, shared=False)
        except ListenError as error:
            raise SchedulerError(str(error)) from error

    async def reload(self, *, dry_run: bool = False) -> Reloaded:
        """Reads the configuration anew and goes over to it, by the smallest number of moves.

        Returns once it is decided what becomes of every replica; new ones are yet to become ready.

        Args:
            dry_run: only say what would change.

        Raises:
            ReloadError: it cannot be used, or not live; nothing was changed.
        """
        async with self._reloading:
            try:
                told = await self._reload(dry_run)
            except ReloadError as error:
                log.error("reload refused: %s", error)
                if not dry_run:
                    self.on_reload(error)
                raise
        if not dry_run:
            log.info("reloaded: %s", told.summary())
            self.on_reload(told)
        return told

    async def _reload(self, dry_run: bool) -> Reloaded:
        read = self._read
        if read is None or self._supervisor is None:
            raise ReloadError(409, "this Hearth was started without a configuration that can be read again.")
        try:
            setup = await asyncio.to_thread(lambda: make_setup(*read()))
            # From here on nothing else runs in between: what is seen is what is changed.
            if self._world.stop:
                raise ReloadError(409, "Hearth is stopping.")
            plans = self._commands.gateway_plans(setup.config)
            renewal = prepare(self._setup, setup, survey(self._world), plans)
        except (ConfigError, CatalogError, PlanError) as error:
            raise ReloadError(422, f"nothing was changed: {error}") from error
        told = renewal.told(self._setup, dry_run=dry_run)
        if not dry_run:
            self._take_over(renewal)
        return told

    def _take_over(self, renewal: Renewal) -> None:
        if renewal.setup.config.log_level != self._config.log_level:
            logging.getLogger().setLevel(renewal.setup.config.log_level.upper())
        self._setup = renewal.setup
        self._commands.use(self._config)
        self._take_numbers(self._setup)
        preparations = self._commands.preparation_plans(renewal.runners.runners)
        renew(self._world, renewal.gateways, preparations, renewal.runners, self._now())
        if self._supervisor:
            self._supervisor.renewed(warm_timeout_s=self._config.scheduler.warm_timeout_s)

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
            profile=self._setup.profile.name,
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
