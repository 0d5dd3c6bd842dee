"""Where one replica stands and what it holds there; and the placement of replicas on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.runners.spec import EngineKind, RunnerSpec
from engine.scheduler.devices import CPU
from engine.scheduler.wishes import PlanError, Wish, gib

MIB = 2**20
#: What a runner still holds of the host while asleep, bytes: Python, the engine's libraries, the server and
#: what the allocator keeps; its weights are mapped again from disk. Measured by `python -m benchmarks.sleep`
#: with the tiny profile's models (PSS, MiB): diffusers 458, sentence-transformers 396, ultralytics 333,
#: faster-whisper 155. A third or more is added, since larger models leave more behind.
ASLEEP_BYTES: Mapping[EngineKind, int] = {
    "diffusers": 640 * MIB,
    "sentence-transformers": 560 * MIB,
    "ultralytics": 480 * MIB,
    "faster-whisper": 256 * MIB,
}


@dataclass(frozen=True)
class Place:
    """One replica on its device or devices."""

    wish: Wish
    #: Which of the model's replicas, from 0.
    number: int
    #: 'cpu:0', 'cpu:0,1' (two ranks), 'cuda:0', 'cuda:2,3'.
    device: str
    awake_bytes: int
    asleep_bytes: int = 0
    host_bytes: int = 0
    #: What the planner decided of the runner's options and sizes; None on a CPU.
    spec: RunnerSpec | None = None

    @property
    def id(self) -> str:
        return f"{self.wish.family}-{self.number}"


def place_on_cpu(wishes: Sequence[Wish], room: int) -> list[Place]:
    """Every replica on the host, in the order of the wishes.

    Residents have their memory always; standby replicas share what is left: the sum of what all keep asleep
    and, beside it, the most that one takes on waking.

    Args:
        wishes: what to place.
        room: bytes that runners may take together.

    Raises:
        PlanError: it does not fit, or a model cannot stand so on a CPU.
    """
    places: list[Place] = []
    for wish in wishes:
        _refuse_impossible(wish)
        awake = wish.entry.memory_bytes if wish.budget is None else wish.budget
        standby = wish.standing.tier == "standby"
        asleep = min(awake, ASLEEP_BYTES[wish.entry.engine]) if standby else 0
        device = "cpu:" + ",".join(map(str, range(wish.model.ranks)))
        places += [Place(wish, number, device, awake, asleep) for number in range(wish.standing.min_replicas)]
    booked: list[Place] = []
    # Residents first: their memory is theirs, whatever sleeps beside them.
    for place in sorted(places, key=_is_standby):
        if held(*booked, place) > room:
            raise _does_not_fit(place, booked, places, room)
        booked.append(place)
    return places


def held(*places: Place) -> int:
    """The most bytes that replicas on one device ever hold together, when one standby is awake at a time."""
    resident = sum(place.awake_bytes for place in places if not _is_standby(place))
    standby = [place for place in places if _is_standby(place)]
    asleep = sum(place.asleep_bytes for place in standby)
    return resident + asleep + max((place.awake_bytes - place.asleep_bytes for place in standby), default=0)


def _is_standby(place: Place) -> bool:
    return place.wish.standing.tier == "standby"


def _does_not_fit(place: Place, booked: Sequence[Place], places: Sequence[Place], room: int) -> PlanError:
    wish = place.wish
    model = wish.id
    free = max(0, room - held(*booked))
    others = ", ".join(dict.fromkeys(other.wish.family for other in booked))
    after = f" after {others}" if others else ""
    names = _would_help(place, places, room)
    tables = " and ".join(f"[models.{name}]" for name in names)
    hint = f'`tier = "standby"` in {tables} would make it fit; or lower ' if names else ""
    awake = " awake" if _is_standby(place) else ""
    own = f" for each of {wish.owner}'s replicas ({wish.standing.min_replicas})" if wish.owner else ""
    out = (
        f"take it out of [dedicated] of {wish.owner}" if wish.owner else f"`[models.{model}] enabled = false`"
    )
    return PlanError(
        f"{model} needs {gib(place.awake_bytes)}{awake}{own}; {CPU} has {gib(free)} of {gib(room)} "
        f"left{after}. {hint or 'Lower '}`memory_bytes`, leave a model out ({out}), or take a "
        "smaller profile."
    )


def _would_help(place: Place, places: Sequence[Place], room: int) -> list[str]:
    """The fewest models, this one first, that make everything fit once they are standby; at most two."""
    residents = dict.fromkeys(
        other.wish.id
        for other in (place, *places)
        if not _is_standby(other) and not other.wish.owner and other.wish.entry.engine in ASLEEP_BYTES
    )
    for count in (1, 2):
        for names in itertools.combinations(residents, count):
            changed = [
                _standby(other) if other.wish.id in names and not other.wish.owner else other
                for other in places
            ]
            if held(*changed) <= room:
                return list(names)
    return []


def _standby(place: Place) -> Place:
    """The same replica, were it standby."""
    standing = replace(place.wish.standing, tier="standby")
    asleep = min(place.awake_bytes, ASLEEP_BYTES[place.wish.entry.engine])
    return replace(place, wish=replace(place.wish, standing=standing), asleep_bytes=asleep)


def _refuse_impossible(wish: Wish) -> None:
    model, engine = wish.id, wish.entry.engine
    if wish.standing.tier == "standby" and engine not in ASLEEP_BYTES:
        raise PlanError(
            f"{model}: {engine} has no sleep mode on a CPU, so it cannot be standby there. "
            f'Make it resident (`[models.{model}] tier = "resident"`), or leave it out.'
        )
    if wish.model.ranks > 1 and engine != "vllm":
        raise PlanError(
            f"{model}: ranks = {wish.model.ranks}, but {engine} runs a replica in one process. "
            "Leave `ranks` out of its profile."
        )
