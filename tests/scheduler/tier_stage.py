"""A stage for warm tiers: processes, devices and gateway workers that behave as real ones do.

The stage keeps its own books of what each process holds and of which worker has what in hand, and holds every
decision to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.scheduler.memory import held
from engine.scheduler.messages import (
    Action,
    Check,
    Exited,
    Gone,
    Healthy,
    Launch,
    Launched,
    Missed,
    Restore,
    Settle,
    Sleep,
    SleepFailed,
    Slept,
    Sweep,
    Terminate,
    UsageReported,
    Wake,
    WakeAsked,
    WakeFailed,
    WakeLeft,
    Warmed,
    WarmFailed,
    WarmUp,
    Withdraw,
    Woken,
)
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.reconcile import next_wakeup, reconcile
from engine.scheduler.statefile import UnitRecord, record
from engine.scheduler.transitions import apply, begin, commit
from engine.scheduler.units import ModelUsage, Policy, ProcessRef, ReplicaUsage, World

from .support import POLICY, gateway_plan, preparation_plan


@dataclass
class Worker:
    """A gateway worker: it sends only where its table says."""

    table: int = -1
    in_hand: Counter[str] = field(default_factory=Counter)
    used: dict[str, float] = field(default_factory=dict)
    #: Held calls, by model: their number and how many requests share each.
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict)


class Stage:
    """A world with its surroundings; effects are answered when the test says."""

    def __init__(
        self,
        runners: Sequence[RunnerPlan],
        room: Mapping[str, int],
        *,
        gateways: int = 1,
        left: Sequence[UnitRecord] = (),
        policy: Policy = POLICY,
        host_room: int | None = None,
    ) -> None:
        self.world = World(policy=policy, room=room, host_room=host_room)
        self.gateways = gateways
        self.plans = {plan.id: plan for plan in runners}
        self.now = 1000.0
        self.pids = 100
        self.numbers = 0
        self.living: dict[ProcessRef, str] = {}
        self.sleeping: set[ProcessRef] = {one.process for one in left if one.state == "asleep"}
        self.untold: list[ProcessRef] = []
        self.asked: list[tuple[Action, ProcessRef]] = []
        self.done: list[Action] = []
        self.tables: list[dict[str, list[str]]] = [{}]
        self.workers: dict[int, Worker] = {}
        #: When each unit was last awake for somebody.
        self.served_since: dict[str, float] = {}
        for one in left:
            self.living[one.process] = one.id
        self._begin(left)

    def _begin(self, left: Sequence[UnitRecord]) -> None:
        preparations = {plan.preparation: preparation_plan(plan) for plan in self.plans.values()}
        wanted = [gateway_plan(i, alone=self.gateways == 1) for i in range(self.gateways)]
        begin(self.world, [*wanted, *preparations.values(), *self.plans.values()], left, self.now)
        for name in preparations:
            self.world.units[name].become("ready", self.now)
            self.world.units[name].result = Path("/weights")
        self.step()

    def replace_scheduler(self, has_happened: Callable[[], bool]) -> None:
        """The scheduler is killed and another comes; what it had asked of runners has happened or not."""
        for action, ref in self.asked:
            if isinstance(action, Sleep) and has_happened() and not self._used(action.unit):
                self.sleeping.add(ref)
            elif isinstance(action, Wake) and has_happened():
                self.sleeping.discard(ref)
        self.asked.clear()
        for ref in self.untold:
            self.forget(ref)
        self.untold.clear()
        old = self.world
        state = record(old, scheduler_pid=1, host="h", port=1)
        self.world = World(policy=old.policy, room=old.room, host_room=old.host_room)
        self.world.published = old.published
        self.served_since = dict.fromkeys(self.plans, self.now)
        self._begin([one for one in state.units if one.process in self.living])
        for worker in self.workers.values():
            for model, (_, sharing) in list(worker.waiting.items()):
                self.numbers += 1
                worker.waiting[model] = self.numbers, sharing
                self.happen(WakeAsked(model, self.numbers))

    def _used(self, name: str) -> bool:
        return any(worker.in_hand[name] for worker in self.workers.values())

    # Carrying out what is decided, and holding it to the promises.

    def step(self) -> list[Action]:
        """Everything that is due now; then the route table."""
        done: list[Action] = []
        for _ in range(200):
            actions = reconcile(self.world, self.now)
            if not actions:
                break
            for action in actions:
                self._judge(action)
                commit(self.world, action, self.now)
                self._carry_out(action)
                self.check_memory()
            done += actions
        else:
            raise AssertionError(f"decisions never come to rest: {actions}")
        self._publish()
        self.done += done
        due = next_wakeup(self.world, self.now)
        assert due is None or due > self.now, "a timer in the past: the loop would spin"
        return done

    def _judge(self, action: Action) -> None:
        unit = self.world.units[action.unit]
        if isinstance(action, Launch | Wake | Sleep) and unit.kind == "runner":
            for device in unit.devices:
                if device.startswith("cuda"):
                    beside = [other.id for other in self._at_work(device) if other.id != unit.id]
                    assert not beside, f"{action} beside {beside} on {device}"
        if isinstance(action, Withdraw):
            assert unit.standby and not unit.pinned and unit.state == "ready", action
            stayed = self.now - self.served_since[unit.id]
            assert stayed >= self.world.policy.min_residence_s - 1e-6, f"{action} after {stayed} s"
            assert unit.model not in self.world.demands, f"{action}: it is asked for itself"
        if isinstance(action, Sleep):
            assert unit.standby, f"{action} of a resident"
            assert unit.withdrawal is not None
            assert not (unit.pinned and unit.withdrawal.room_for), f"{action} of a pinned model"
            using = [pid for pid, worker in self.workers.items() if worker.in_hand[unit.id]]
            if not unit.withdrawal.room_for:
                # Nobody was asked to leave it: only a table from before its start can lead there. What has
                # not been reported yet, the runner refuses (`_sleep`).
                using = [pid for pid in using if self._has_reported(pid, unit.id)]
            assert not using, f"{action}: workers {using} have requests in flight there"
        if isinstance(action, Wake):
            others = [other for other in self._replicas(unit.model) if other.id != unit.id]
            assert not any(other.state in ("ready", "waking") for other in others), f"{action} for nothing"
        if isinstance(action, Restore) and action.asked:
            self.served_since[unit.id] = self.now

    def _has_reported(self, pid: int, name: str) -> bool:
        usage = self.world.usage.get(pid)
        return bool(usage and name in usage.replicas and usage.replicas[name].in_flight)

    def _at_work(self, device: str) -> list[object]:
        return [
            unit
            for unit in self.world.of_kind("runner")
            if device in unit.devices and (unit.starting or unit.moving or unit.ending)
        ]

    def _replicas(self, model: str) -> list[object]:
        return [unit for unit in self.world.of_kind("runner") if unit.model == model]

    def _carry_out(self, action: Action) -> None:
        unit = self.world.units[action.unit]
        match action:
            case Launch():
                self.pids += 1
                ref = ProcessRef(self.pids, self.pids, str(self.pids))
                self.living[ref] = unit.id
                if unit.kind == "gateway":
                    self.workers[ref.pid] = Worker()
                apply(self.world, Launched(unit.id, ref), self.now)
            case Withdraw() | Restore():
                pass
            case _:
                assert unit.process is not None
                self.asked.append((action, unit.process))

    def check_memory(self) -> None:
        """No device over its room: by our own books, and by those of the decisions."""
        total: Counter[str] = Counter()
        awake = {name for ref, name in self.living.items() if ref not in self.sleeping}
        for name, plan in self.plans.items():
            size = 0
            if plan.standing.tier == "resident" or name in awake:
                size = plan.awake_bytes
            elif name in self.living.values():
                size = plan.asleep_bytes
            for device in plan.devices:
                total[device] += size
        for device, room in self.world.room.items():
            assert total[device] <= room, f"{device} holds {total[device]} of {room}: {sorted(awake)}"
            assert total[device] <= held(self.world)[device] <= room

    def _publish(self) -> None:
        table: dict[str, list[str]] = {}
        for unit in self.world.of_kind("runner"):
            if unit.state == "ready":
                table.setdefault(unit.model, []).append(unit.id)
        if table != self.tables[-1]:
            self.tables.append(table)
            self.world.published = len(self.tables) - 1

    # What happens.

    def answer(self, index: int = 0, *, well: bool = True) -> None:
        """One effect ends, well or not."""
        action, ref = self.asked.pop(index)
        name = action.unit
        alive = ref in self.living and ref not in self.untold
        well = well and alive
        match action:
            case Check():
                self.happen(Healthy(name, ref) if well else Missed(name, ref, "silence"))
            case WarmUp():
                if well and self.plans[name].standing.tier == "standby":
                    self.served_since[name] = self.now
                self.happen(Warmed(name, ref) if well else WarmFailed(name, ref, "status 500"))
            case Sleep():
                self._sleep(name, ref, well)
            case Wake():
                self._wake(name, ref, well)
            case Settle():
                (self._sleep if ref in self.sleeping else self._wake)(name, ref, well)
            case Terminate():
                if well:
                    self.die(name)
            case Sweep():
                self.untold = [one for one in self.untold if one != ref]
                self.forget(ref)
                self.happen(Gone(name, ref))

    def _sleep(self, name: str, ref: ProcessRef, well: bool) -> None:
        if self._used(name):
            self.happen(SleepFailed(name, ref, "a request in hand", busy=True))
        elif well:
            self.sleeping.add(ref)
            self.happen(Slept(name, ref))
        else:
            self.happen(SleepFailed(name, ref, "nothing within 120 s"))

    def _wake(self, name: str, ref: ProcessRef, well: bool) -> None:
        self.sleeping.discard(ref)
        if well:
            self.served_since[name] = self.now
        self.happen(Woken(name, ref) if well else WakeFailed(name, ref, "status 500"))

    def happen(self, event: object) -> list[Action]:
        apply(self.world, event, self.now)  # type: ignore[arg-type]  # any event
        self.check_memory()
        return self.step()

    def answer_all(self, seconds: float = 0.1) -> None:
        """Effects end well until none is under way, workers keep up with the table, time passes a little."""
        for _ in range(400):
            if self.asked:
                self.answer()
            elif self.untold:
                self.tell_exit(self.untold[0])
            elif not any(self.keep_up(pid) for pid in list(self.workers)):
                starting = any(
                    u.state in ("starting", "warming", "waking") or u.moving
                    for u in self.world.of_kind("runner")
                )
                if not starting:
                    return
                self.now += seconds
                self.step()
        raise AssertionError("never at rest")

    def pass_time(self, seconds: float) -> list[Action]:
        """Time jumps from timer to timer."""
        until, done = self.now + seconds, []
        while True:
            due = next_wakeup(self.world, self.now)
            if due is None or due > until:
                break
            self.now = due
            done += self.step()
            for action, ref in [one for one in self.asked if isinstance(one[0], Check)]:
                self.answer(self.asked.index((action, ref)))
        self.now = until
        return done + self.step()

    def die(self, name: str) -> None:
        """A process ends, unnoticed yet."""
        ref = next(ref for ref, unit in self.living.items() if unit == name)
        if ref not in self.untold:
            self.untold.append(ref)
            self._break_off(ref)

    def tell_exit(self, ref: ProcessRef) -> list[Action]:
        self.untold.remove(ref)
        name = self.living[ref]
        return self.happen(Exited(name, ref, -9, "its process was killed by signal 9 (SIGKILL)"))

    def forget(self, ref: ProcessRef) -> None:
        self._break_off(ref)
        self.living.pop(ref, None)
        self.sleeping.discard(ref)

    def _break_off(self, ref: ProcessRef) -> None:
        """The connections of a process that is no more."""
        name = self.living.get(ref, "")
        for worker in self.workers.values():
            worker.in_hand.pop(name, None)
        gone = self.workers.pop(ref.pid, None)
        for model, (number, _) in (gone.waiting if gone else {}).items():
            apply(self.world, WakeLeft(model, number), self.now)

    # Gateway workers.

    def worker(self, index: int = 0) -> int:
        return sorted(self.workers)[index]

    def request(self, model: str, worker: int | None = None) -> str:
        """A request comes: it is sent at once, or waits for the model to wake."""
        mine = self.workers[self.worker() if worker is None else worker]
        replicas = self.tables[mine.table].get(model, []) if mine.table >= 0 else []
        if replicas:
            replica = min(replicas, key=lambda name: mine.in_hand[name])
            mine.in_hand[replica] += 1
            mine.used[replica] = self.now
            return replica
        if model in mine.waiting:
            number, sharing = mine.waiting[model]
            mine.waiting[model] = number, sharing + 1
        else:
            self.numbers += 1
            mine.waiting[model] = self.numbers, 1
            self.happen(WakeAsked(model, self.numbers))
        return ""

    def leave(self, model: str, worker: int | None = None) -> list[Action]:
        """One client that waits gives up."""
        mine = self.workers[self.worker() if worker is None else worker]
        number, sharing = mine.waiting.pop(model)
        if sharing > 1:
            mine.waiting[model] = number, sharing - 1
            return []
        return self.happen(WakeLeft(model, number))

    def finish(self, replica: str, worker: int | None = None) -> None:
        mine = self.workers[self.worker() if worker is None else worker]
        mine.in_hand[replica] -= 1
        mine.used[replica] = self.now

    def take_table(self, pid: int) -> None:
        """A worker takes the newest table; those who waited for what is ready now are sent there."""
        mine = self.workers[pid]
        mine.table = len(self.tables) - 1
        for model in list(mine.waiting):
            if self.tables[-1].get(model):
                number, sharing = mine.waiting.pop(model)
                for _ in range(sharing):
                    self.request(model, pid)
                self.happen(WakeLeft(model, number))

    def report(self, pid: int) -> list[Action]:
        mine = self.workers[pid]
        replicas = {
            name: ReplicaUsage(mine.in_hand[name], self.now - mine.used[name])
            for name in mine.used
            if mine.in_hand[name] or any(name in names for names in self.tables[mine.table].values())
        }
        models = {model: ModelUsage(sharing) for model, (_, sharing) in mine.waiting.items()}
        return self.happen(UsageReported(pid, mine.table, replicas, models))

    def keep_up(self, pid: int) -> bool:
        """Takes a newer table where there is one, and reports; whether there was."""
        mine = self.workers.get(pid)
        if mine is None or mine.table == len(self.tables) - 1:
            return False
        self.take_table(pid)
        self.report(pid)
        return True

    # Short words.

    def state(self, name: str) -> str:
        return self.world.units[name].state

    def states(self) -> dict[str, str]:
        return {unit.id: unit.state for unit in self.world.of_kind("runner")}

    def count(self, kind: type[object], unit: str) -> int:
        return sum(isinstance(action, kind) and action.unit == unit for action in self.done)
