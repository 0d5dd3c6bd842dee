"""What a reload reads, refuses and reckons, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from engine.config import Config
from engine.scheduler.changes import Reloaded, nested_differences
from engine.scheduler.commands import GATEWAY_NEEDS_NOT
from engine.scheduler.dedicated import device_kinds, gpu_owners
from engine.scheduler.devices import find_devices
from engine.scheduler.plan import (
    Entries,
    RunnerPlan,
    all_wishes,
    gpu_numbers,
    host_room,
    make_plan,
    rooms,
)
from engine.scheduler.renewal import Standing
from engine.scheduler.replan import Replan, replan, standing
from engine.scheduler.rolling import Rolling, roll
from engine.scheduler.statefile import UnitRecord
from engine.scheduler.units import GatewayPlan
from engine.scheduler.wishes import Wish
from models.profile import Profile


class ReloadError(Exception):
    """Nothing was changed; the message says why. ``status``: 409 not now or not live, 422 not usable."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Setup:
    """A configuration with what follows from it on this machine."""

    config: Config
    profile: Profile
    #: The fewest replicas, as a plan from nothing places them.
    runners: list[RunnerPlan]
    rooms: dict[str, int]
    host_room: int
    #: What each model (of each owner) is to be, by its replicas' family.
    wishes: dict[str, Wish] = field(default_factory=dict)
    #: Product and owner of each device.
    kinds: dict[str, str] = field(default_factory=dict)

    def same_as(self, other: Setup) -> list[RunnerPlan]:
        """The replicas here of models that are to be just the same in another setup."""
        if self.config.scheduler.drain_s != other.config.scheduler.drain_s or self.kinds != other.kinds:
            return []
        return [
            plan for plan in self.runners if self.wishes.get(plan.family) == other.wishes.get(plan.family)
        ]


def make_setup(config: Config, profile: Profile, catalog: Entries) -> Setup:
    """Looks at the machine and plans.

    Raises:
        PlanError: the models cannot be placed.
    """
    devices = find_devices()
    plans = make_plan(config, profile, catalog, devices)
    owners = gpu_owners(config, gpu_numbers(devices))
    return Setup(
        config,
        profile,
        plans,
        rooms(config, devices),
        host_room(config, devices),
        {wish.family: wish for wish in all_wishes(config, profile, catalog)},
        device_kinds({device.name: device.product for device in devices}, owners),
    )


@dataclass(frozen=True)
class Renewal:
    """A new setup and the way to it."""

    setup: Setup
    runners: Replan
    gateways: Rolling

    def told(self, old: Setup, *, dry_run: bool) -> Reloaded:
        """What it does, for a person."""
        return Reloaded(
            dry_run=dry_run,
            profile=self.setup.profile.name,
            changes=[*self.gateways.changes, *self.runners.changes],
            notes=list(_live(old, self.setup)),
        )


def prepare(old: Setup, new: Setup, seen: Standing, gateways: Sequence[GatewayPlan]) -> Renewal:
    """The way from what stands to the new setup.

    Raises:
        ReloadError: a setting has changed that cannot change while Hearth runs.
        PlanError: a socket's path would be too long.
    """
    refuse_fixed(old.config, new.config)
    reason = "; ".join(_differences(old.config, new.config, GATEWAY_NEEDS_NOT)) or "another version"
    return Renewal(
        new,
        replan(seen.runners, new.runners, new.rooms, seen.going, former=old.same_as(new), kinds=new.kinds),
        roll(seen.gateways, gateways, seen.gateways_going, reason),
    )


def refuse_fixed(old: Config, new: Config) -> None:
    """Refuses what only a restart can change.

    Raises:
        ReloadError: names the setting.
    """
    pairs = {
        "host": (old.host, new.host),
        "port": (old.port, new.port),
        "state_dir": (old.state_dir.expanduser().resolve(), new.state_dir.expanduser().resolve()),
        "weights.dir": (old.weights_dir, new.weights_dir),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise ReloadError(
                409,
                f"`{name}` cannot change while Hearth runs ({before} → {after}). "
                "Restart to change it (`hearth stop`, then `hearth serve`), or take it back.",
            )
    if old.metering.database_url != new.metering.database_url:
        # Either may hold a password: they are not told.
        raise ReloadError(
            409,
            "`metering.database_url` cannot change while Hearth runs, or some workers would count in one "
            "database and some in another. Restart to change it (`hearth stop`, then `hearth serve`).",
        )
    if old.api_key != new.api_key:
        raise ReloadError(
            409,
            "`api_key` is read at the start only. Restart to change it, or use `hearth keys create`.",
        )


def _live(old: Setup, new: Setup) -> Iterator[str]:
    """Settings that need no restart of anything."""
    if old.profile.name != new.profile.name:
        yield f"profile: {old.profile.name} → {new.profile.name}"
    # `drain_s` is told to each runner, so that it is among the reasons to start them anew.
    others = set(Config.model_fields) - {"scheduler", "tiers", "scaling", "weights"}
    for line in _differences(old.config, new.config, others):
        if not line.startswith(("scheduler.drain_s:", "weights.dir:")):
            yield line


def _differences(old: Config, new: Config, without: set[str]) -> Iterator[str]:
    before, after = (one.model_dump(mode="json", exclude=without) for one in (old, new))
    for section in dict.fromkeys((*before, *after)):
        yield from nested_differences(section, before.get(section), after.get(section))


def adopted(
    setup: Setup, gateways: Sequence[GatewayPlan], left: Sequence[UnitRecord]
) -> tuple[list[GatewayPlan], list[RunnerPlan]]:
    """The plans of a scheduler that comes after another one: what lives and is wanted stays where it is.

    Args:
        setup: the configuration.
        gateways: its gateway workers, as without any that live.
        left: what the earlier scheduler left alive.
    """
    whole = [one for one in left if one.state != "ending"]
    records = [(one.id, one.device, one.fingerprint) for one in whole if one.kind == "runner"]
    serves = {one.id: one.state != "starting" for one in whole}
    stood = standing(setup.runners, records, serves)
    workers = [one for one in whole if one.kind == "gateway" and one.fingerprint == gateways[0].fingerprint]
    # Their sockets are not ours, so any place will do.
    kept = [replace(gateways[0], id=one.id, index=place) for place, one in enumerate(workers)]
    return roll(kept, gateways).plans, replan(stood, setup.runners, setup.rooms, kinds=setup.kinds).runners
