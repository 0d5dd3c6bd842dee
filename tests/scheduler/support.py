"""What the scheduler's tests share: catalog, configuration, fakes of the effects, and real processes."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engine.config import Config
from engine.routes import ExpertBalance
from engine.scheduler.commands import Commands
from engine.scheduler.devices import Device
from engine.scheduler.launcher import Order
from engine.scheduler.messages import Event
from engine.scheduler.plan import RunnerPlan, Standing, make_plan
from engine.scheduler.probe import BusyError, ProbeError
from engine.scheduler.units import GatewayPlan, Policy, PreparationPlan, ProcessRef
from models.catalog import Catalog
from models.entry import LocalSource, ModelEntry
from models.profile import Profile, ProfileModel

HERE = Path(__file__).parent
GIB = 1 << 30
HOST = [Device("cpu:0", 64 * GIB)]


def entry(name: str, **fields: Any) -> ModelEntry:
    defaults: dict[str, Any] = {
        "category": "chat",
        "engine": "vllm",
        "sources": [LocalSource(kind="local", path=f"/nowhere/{name}")],
        "memory_bytes": GIB,
        "warm_up_s": 20.0,
    }
    return ModelEntry(id=name, **(defaults | fields))


def napper(name: str, **fields: Any) -> ModelEntry:
    """A standby model of 2 GiB, of which its engine keeps less than one while asleep."""
    kind: dict[str, Any] = {"category": "embedding", "engine": "sentence-transformers"}
    return entry(name, **({**kind, "memory_bytes": 2 * GIB} | fields))


def nap_config(tmp_path: Path, *names: str, **fields: Any) -> Config:
    """Models that sleep; room for one of them to be awake."""
    tiers = {"min_residence_s": 0.2, "cpu_memory_bytes": 3 * GIB + GIB // 2}
    return config(tmp_path, tiers=tiers, models={name: {"tier": "standby"} for name in names}, **fields)


def catalog(*entries: ModelEntry) -> Catalog:
    return Catalog(entries)


def profile(*names: str, **fields: Any) -> Profile:
    return Profile(name="test", models=[ProfileModel(id=name, **fields) for name in names])


def config(tmp_path: Path, **fields: Any) -> Config:
    scheduler = {
        "health_interval_s": 0.1,
        "backoff_first_s": 0.05,
        "backoff_max_s": 0.4,
        "stop_timeout_s": 0.5,
        "drain_s": 0.5,
        "start_timeout_s": 20,
        "warm_timeout_s": 10,
    } | fields.pop("scheduler", {})
    gateway = {"drain_s": 0.5} | fields.pop("gateway", {})
    return Config(
        **{"port": 0, "state_dir": tmp_path / "state", "scheduler": scheduler, "gateway": gateway} | fields
    )


def runner_plans(tmp_path: Path, *entries: ModelEntry, **fields: Any) -> list[RunnerPlan]:
    names = [one.id for one in entries]
    return make_plan(config(tmp_path, **fields), profile(*names), catalog(*entries), HOST)


def standing(
    tmp_path: Path,
    name: str,
    device: str = "cuda:0",
    *,
    awake: int = 5,
    asleep: int = 1,
    tier: Literal["resident", "standby"] = "standby",
    number: int = 0,
    **fields: Any,
) -> RunnerPlan:
    """A replica on a device of its own choice, with sizes that are easy to add up (bytes)."""
    (plan,) = runner_plans(tmp_path, entry(name))
    host = fields.pop("host", 0)
    return replace(
        plan,
        id=f"{name}-{number}",
        device=device,
        standing=Standing(tier=tier, **fields),
        awake_bytes=awake,
        asleep_bytes=asleep if tier == "standby" else 0,
        host_bytes=host,
    )


def gateway_plan(index: int = 0, fingerprint: str = "g", *, alone: bool = True) -> GatewayPlan:
    return GatewayPlan(f"gateway-{index}", fingerprint, Path("/nowhere/gateway.json"), index, alone)


def preparation_plan(runner: RunnerPlan) -> PreparationPlan:
    return PreparationPlan(runner.preparation, "p", runner.entry, runner.model)


POLICY = Policy(
    start_timeout_s=100,
    health_interval_s=2,
    health_failures=3,
    backoff_first_s=1,
    backoff_max_s=8,
    stop_timeout_s=5,
    drain_s=10,
    gateway_drain_s=10,
    concurrent_starts=2,
)


class FakeClock:
    """Time that stands still but for the waits: a wait with nothing to come jumps to its end."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    async def next_event(self, queue: asyncio.Queue[Event], until: float | None) -> Event | None:
        for _ in range(20):  # let the effects that are under way say what they have to
            if not queue.empty():
                return queue.get_nowait()
            await asyncio.sleep(0)
        if until is None:
            return await queue.get()
        self.time = max(self.time, until)
        return None


class FakeLauncher:
    """Processes that are numbers in a table."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.living: dict[ProcessRef, asyncio.Future[int | None]] = {}
        self.units: dict[ProcessRef, str] = {}
        self.obeys: Callable[[str], bool] = lambda unit: True
        self.on_launch: Callable[[ProcessRef, Order], None] = lambda ref, order: None
        self.signals: list[tuple[str, str]] = []
        self._numbers = itertools.count(100)

    def launch(self, order: Order) -> ProcessRef:
        number = next(self._numbers)
        ref = ProcessRef(number, number, f"token-{number}")
        assert order.unit not in self.units.values(), f"{order.unit} lives twice"
        self.orders.append(order)
        self.living[ref] = asyncio.get_running_loop().create_future()
        self.units[ref] = order.unit
        self.on_launch(ref, order)
        return ref

    def die(self, unit: str, code: int = -9) -> None:
        ref = next(ref for ref, name in self.units.items() if name == unit)
        if not self.living[ref].done():
            self.living[ref].set_result(code)

    async def exited(self, ref: ProcessRef) -> int | None:
        return await self.living[ref]

    def terminate(self, ref: ProcessRef) -> None:
        self.signals.append(("TERM", self.units[ref]))
        if self.obeys(self.units[ref]):
            self.die(self.units[ref], 0)

    async def sweep(self, ref: ProcessRef, *, at_once: bool) -> None:
        self.signals.append(("KILL" if at_once else "SWEEP", self.units[ref]))
        if not self.living[ref].done():
            self.living[ref].set_result(-9)
        del self.units[ref]

    def log_tail(self, unit: str) -> tuple[str, ...]:
        return (f"last words of {unit}",)

    def trim_logs(self) -> None:
        pass

    def memory(self, ref: ProcessRef) -> int:
        return 1 << 20


class FakeProber:
    """Answers that a test chooses; by default all is well."""

    def __init__(self) -> None:
        self.sick: set[str] = set()
        self.cold: dict[str, str] = {}
        self.warmed: list[str] = []
        #: Names of sockets, which are those of units, of runners that sleep; and of those that are in use.
        self.asleep: set[str] = set()
        self.busy: set[str] = set()
        self.stiff: set[str] = set()
        #: What runners tell of their experts, by the same names.
        self.balances: dict[str, ExpertBalance] = {}

    async def expert_balance(self, socket: Path) -> ExpertBalance | None:
        return self.balances.get(socket.stem)

    async def runner_health(self, socket: Path) -> None:
        if socket.stem in self.sick:
            raise ProbeError("nothing within 5 s")

    async def gateway_health(self, url: str) -> None:
        if "gateway" in self.sick:
            raise ProbeError("nothing within 5 s")

    async def warm_up(self, plan: RunnerPlan, timeout_s: float) -> None:
        if plan.id in self.cold:
            raise ProbeError(self.cold[plan.id])
        self.warmed.append(plan.id)

    async def sleep(self, socket: Path, timeout_s: float) -> None:
        if socket.stem in self.stiff:
            raise ProbeError(f"falling asleep took longer than {timeout_s:g} s")
        if socket.stem in self.busy:
            raise BusyError("it has a request in hand")
        self.asleep.add(socket.stem)

    async def wake(self, plan: RunnerPlan, timeout_s: float) -> None:
        if plan.id in self.stiff:
            raise ProbeError(f"waking up took longer than {timeout_s:g} s")
        self.asleep.discard(plan.spec.socket.stem)
        await self.warm_up(plan, timeout_s)

    async def is_sleeping(self, socket: Path, timeout_s: float) -> bool:
        return socket.stem in self.asleep

    async def close(self) -> None:
        pass


class FakeCommands(Commands):
    """Real processes without engines: see fake_runner.py and its fellows."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weights = config.state_dir / "prepared"

    def runner_argv(self, plan: RunnerPlan, spec_file: Path) -> list[str]:
        return [sys.executable, "-S", str(HERE / "fake_runner.py"), "--spec", str(spec_file)]

    def gateway_argv(self, plan: GatewayPlan, listener: int) -> list[str]:
        return [
            sys.executable,
            "-S",
            str(HERE / "fake_gateway.py"),
            str(listener),
            str(self._config.control_socket),
        ]

    def preparation_argv(self, plan: PreparationPlan, entry: Path) -> list[str]:
        folder = self.weights / plan.id
        return [
            sys.executable,
            "-S",
            str(HERE / "fake_preparation.py"),
            str(folder),
            str(self.progress_file(plan)),
        ]
