"""Warm tiers: who starts, wakes, falls asleep and makes room for whom. Pure.

One pass looks at the wants in order of precedence: models that are asked for (higher priority first, then
first come), residents that are to start, and last standby models that are to be loaded for later. Each want
takes its memory from the ledger before the next is looked at, so that none is overtaken where room can be
made for it; one for which no room can be made (all others are busy or pinned) keeps nobody else waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.scheduler.idleness import in_use, is_known, last_used, quietness
from engine.scheduler.memory import Amount, Ledger, covers, host_takes, needed_by, relief_of
from engine.scheduler.messages import Action, Launch, Restore, Settle, Sleep, Wake, Withdraw
from engine.scheduler.starts import Turns, expected_s, may_start
from engine.scheduler.units import Unit, World


@dataclass(frozen=True)
class Want:
    """One replica of ``options`` is to be made ready, or (nobody asks for it) loaded."""

    model: str
    options: tuple[Unit, ...]
    #: Requests wait for it, or it is a resident.
    urgent: bool


def tier_actions(world: World, now: float) -> list[Action]:
    """What is due for runners: starts, wakes, sleeps, and leaving or taking up a place in the route table."""
    return _Pass(world, now).run()


def tier_timers(world: World, now: float) -> Iterator[float]:
    """When a decision may be another though nothing happens."""
    policy = world.policy
    for unit in world.of_kind("runner"):
        if not unit.standby or not unit.process or unit.ending:
            continue
        if unit.withdrawal and not unit.moving:
            yield unit.withdrawal.since + policy.quiet_s
            yield unit.withdrawal.since + policy.acknowledge_s
        elif unit.state == "ready":
            yield unit.spared_until
            yield unit.awake_since + policy.acknowledge_s
            yield unit.awake_since + policy.min_residence_s
            yield last_used(world, unit) + policy.min_residence_s


def is_sound(unit: Unit) -> bool:
    """Whether the unit's process lives and is to live on as it is."""
    return bool(
        unit.process
        and not unit.ending
        and not unit.fault
        and unit.plan
        and unit.running == unit.plan.fingerprint
    )


class _Pass:
    """One pass over the wants; collects the actions."""

    def __init__(self, world: World, now: float) -> None:
        self.world = world
        self.now = now
        self.ledger = Ledger(world)
        self.turns = Turns(world)
        self.actions: list[Action] = []
        self.runners = list(world.of_kind("runner"))
        #: Out of the table and still to fall asleep.
        self.leaving = [u for u in self.runners if u.withdrawal and not u.moving and is_sound(u)]
        #: Those of them whose room a want counts on.
        self.claimed: set[str] = set()
        #: Spoken for by a want of higher precedence, or dealt with.
        self.used: set[str] = set()

    def run(self) -> list[Action]:
        for unit in self.runners:
            if unit.unsettled and not unit.moving and is_sound(unit) and self.turns.may_move(unit.devices):
                self.turns.move(unit.devices)
                self.actions.append(Settle(unit.id))
        for want in self._wants():
            self._serve(want)
        for unit in self.leaving:
            if unit.id not in self.used:
                self._leave(unit)
        return self.actions

    # Which wants there are.

    def _wants(self) -> Iterator[Want]:
        asked: set[str] = set()
        for want in self._demanded():
            asked.update(unit.id for unit in want.options)
            yield want
        idle = [u for u in self.runners if u.id not in asked and may_start(self.world, u, self.now)]
        # The longest start first: it decides when all are ready.
        idle.sort(key=lambda unit: -expected_s(self.world, unit))
        sleepers = [u for u in self.runners if u.state == "asleep" and is_sound(u)]
        for unit in [*idle, *sleepers]:
            if not unit.standby:
                yield Want(unit.model, (unit,), urgent=True)
        for unit in sorted(idle, key=lambda unit: -unit.priority):
            if unit.standby:
                yield Want(unit.model, (unit,), urgent=False)

    def _demanded(self) -> list[Want]:
        found: list[tuple[int, float, Want]] = []
        for model, demand in self.world.demands.items():
            replicas = [unit for unit in self.runners if unit.standby and unit.model == model]
            if not replicas or any(_is_coming(unit) for unit in replicas):
                continue
            options = [u for u in replicas if u in self.leaving]
            options += [u for u in replicas if u.state == "asleep" and is_sound(u)]
            options += [u for u in replicas if may_start(self.world, u, self.now)]
            if options:
                want = Want(model, tuple(options), urgent=True)
                found.append((-replicas[0].priority, demand.since, want))
        return [want for *_, want in sorted(found, key=lambda one: one[:2])]

    # How one want is served.

    def _serve(self, want: Want) -> None:
        for unit in want.options:
            if unit in self.leaving and unit.id not in self.claimed:
                # It is still awake; nobody who goes first needs its room.
                self.used.add(unit.id)
                self.actions.append(Restore(unit.id, asked=True))
                return
        options = [unit for unit in want.options if unit not in self.leaving]
        fitting = [unit for unit in options if self.ledger.fits(needed_by(unit))]
        if fitting:
            self._begin(next((u for u in fitting if self._has_turn(u)), fitting[0]))
            return
        if not want.urgent and self._is_loading(options):
            # What loads for later falls asleep by itself.
            return
        if not self._await_room(want, options):
            self._make_room(want, options)

    def _has_turn(self, unit: Unit) -> bool:
        if unit.state == "asleep":
            return self.turns.may_move(unit.devices)
        return self.turns.may_start(unit.devices)

    def _begin(self, unit: Unit) -> None:
        if self._has_turn(unit):
            if unit.state == "asleep":
                self.turns.move(unit.devices)
                self.actions.append(Wake(unit.id))
            else:
                self.turns.start(unit.devices)
                self.actions.append(Launch(unit.id))
        # Without its turn it has its room kept.
        self.ledger.take(needed_by(unit))

    def _is_loading(self, options: Iterable[Unit]) -> bool:
        devices = {device for unit in options for device in unit.devices}
        return any(
            is_sound(other)
            and other.standby
            and (
                other.state in ("starting", "warming") or (other.withdrawal and not other.withdrawal.room_for)
            )
            and not devices.isdisjoint(other.devices)
            for other in self.runners
        )

    def _await_room(self, want: Want, options: Iterable[Unit]) -> bool:
        """Whether enough comes back by itself or from those that have left the table; then keeps it."""
        free = [unit for unit in self.leaving if unit.id not in self.used | self.claimed]
        # Those first that left for this very want.
        free.sort(key=lambda unit: self._model_of_room(unit) != want.model)
        for unit in options:
            need = needed_by(unit)
            short = self.ledger.short(need)
            chosen = _enough(free, short)
            if chosen is not None:
                self._claim(chosen, need)
                return True
        return False

    def _make_room(self, want: Want, options: Iterable[Unit]) -> None:
        """Takes the fewest and least missed out of the table; none where that would not be enough."""
        victims = self._victims(want)
        ripe = [unit for unit in victims if self._is_ripe(unit, want)]
        for pool, now in ((ripe, True), (victims, False)):
            best: tuple[int, Amount, list[Unit], Unit] | None = None
            for unit in options:
                need = needed_by(unit)
                left = [one for one in self.leaving if one.id not in self.used | self.claimed]
                chosen = _enough([*left, *pool], self.ledger.short(need))
                if chosen is not None and (best is None or len(chosen) < best[0]):
                    best = (len(chosen), need, chosen, unit)
            if best is None:
                continue
            _, need, chosen, unit = best
            if now:
                self.actions += [Withdraw(v.id, room_for=unit.id) for v in chosen if v not in self.leaving]
                self._claim(chosen, need)
            else:
                # Only time is wanting: nobody else may take what this one will get.
                self.used.update(v.id for v in chosen if v not in self.leaving)
                for victim in chosen:
                    self.ledger.expect(relief_of(victim))
                self.ledger.take(need)
            return

    def _claim(self, chosen: Iterable[Unit], need: Amount) -> None:
        for unit in chosen:
            self.claimed.add(unit.id)
            self.ledger.expect(relief_of(unit))
            # Nothing may begin to load beside one that is about to fall asleep.
            self.turns.move(unit.devices)
        self.ledger.take(need)

    def _model_of_room(self, unit: Unit) -> str:
        room_for = unit.withdrawal.room_for if unit.withdrawal else ""
        other = self.world.units.get(room_for)
        return other.model if other else ""

    # Who makes room.

    def _victims(self, want: Want) -> list[Unit]:
        """Those that could make room, the least missed first."""
        found = [
            unit
            for unit in self.runners
            if unit.standby
            and unit.state == "ready"
            and is_sound(unit)
            and not unit.pinned
            and unit.id not in self.used | self.claimed
            and unit.model != want.model
            and unit.model not in self.world.demands
            and host_takes(self.world, unit)
            and not in_use(self.world, unit)
        ]
        return sorted(found, key=lambda unit: (unit.priority, last_used(self.world, unit)))

    def _is_ripe(self, unit: Unit, want: Want) -> bool:
        """Whether it may make room now: it has stayed long enough, and nothing stands in the way."""
        residence = self.world.policy.min_residence_s
        since = unit.awake_since if want.urgent else last_used(self.world, unit)
        return (
            self.now >= since + residence
            and self.now >= unit.spared_until
            and is_known(self.world, unit, self.now)
            and self.turns.may_move(unit.devices)
        )

    # What becomes of those that have left the table.

    def _leave(self, unit: Unit) -> None:
        assert unit.withdrawal is not None
        if unit.withdrawal.room_for and unit.id not in self.claimed:
            self.actions.append(Restore(unit.id))
            return
        state = quietness(self.world, unit, self.now)
        if state == "busy" or not host_takes(self.world, unit):
            self.actions.append(Restore(unit.id, busy=True))
        elif state == "quiet" and self._may_sleep(unit):
            self.turns.move(unit.devices)
            self.actions.append(Sleep(unit.id))

    def _may_sleep(self, unit: Unit) -> bool:
        # Asked of the world itself: this pass keeps devices for the very sleep that is decided here.
        if any(
            isinstance(a, Sleep | Wake | Launch | Settle) and self._shares(a.unit, unit) for a in self.actions
        ):
            return False
        return Turns(self.world).may_move(unit.devices)

    def _shares(self, other: str, unit: Unit) -> bool:
        mine = {device for device in unit.devices if device.startswith("cuda")}
        return not mine.isdisjoint(self.world.units[other].devices)


def _is_coming(unit: Unit) -> bool:
    """Whether it is ready or will be without further ado."""
    if not is_sound(unit):
        return False
    return unit.state in ("ready", "starting", "warming", "waking")


def _enough(units: Iterable[Unit], short: Amount) -> list[Unit] | None:
    """The first of ``units`` that make up for what lacks, without those not needed; None = too few."""
    chosen: list[Unit] = []
    for unit in units:
        if covers(map(relief_of, chosen), short):
            break
        if any(relief_of(unit).get(device) for device in short):
            chosen.append(unit)
    if not covers(map(relief_of, chosen), short):
        return None
    # Of those that turn out not to be needed the most missed is let off first.
    for unit in reversed(chosen):
        rest = [other for other in chosen if other is not unit]
        if covers(map(relief_of, rest), short):
            chosen = rest
    return chosen
