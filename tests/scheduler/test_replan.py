"""From old plans to new ones: who stays, who moves, in which order; checked against all placements."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runners.spec import RunnerSpec
from engine.scheduler import replan as replans
from engine.scheduler.handover import hand_over
from engine.scheduler.plan import RunnerPlan, Standing, spec_fingerprint
from engine.scheduler.replan import Replan, Stood, essence, replan, standing
from engine.scheduler.seats import Seeker, Taken, elsewhere, seat

from .support import entry

ROOMS = {"cuda:0": 10, "cuda:1": 10}


def replica(
    model: str,
    device: str = "cuda:0",
    awake: int = 4,
    *,
    number: int = 0,
    asleep: int | None = None,
    **fields: Any,
) -> RunnerPlan:
    """A plan of one replica; standby when it is told what it keeps asleep."""
    standby = asleep is not None
    options = fields.pop("options", {})
    unit = f"{model}-{number}"
    one = entry(model)
    spec = RunnerSpec(
        model=model,
        category="chat",
        engine="vllm",
        model_dir=Path(),
        socket=Path(f"/run/{unit}.sock"),
        device=device,
        memory_bytes=awake,
        can_sleep=standby,
        max_batch=fields.pop("max_batch", 8),
        options=options,
    )
    return RunnerPlan(
        id=unit,
        entry=one,
        device=device,
        preparation=f"prepare-{model}",
        spec=spec,
        fingerprint=spec_fingerprint(spec, one),
        standing=Standing(tier="standby" if standby else "resident", **fields),
        awake_bytes=awake,
        asleep_bytes=asleep or 0,
    )


def plan(
    old: Sequence[RunnerPlan], fresh: Sequence[RunnerPlan], rooms: dict[str, int] | None = None
) -> Replan:
    return replan([Stood(one) for one in old], fresh, ROOMS if rooms is None else rooms)


def stands(result: Replan) -> dict[str, str]:
    return {one.id: one.device for one in result.runners}


def kinds(result: Replan) -> dict[str, str]:
    return {change.unit: change.kind for change in result.changes}


def test_what_is_unchanged_stays_where_it_is_though_a_new_plan_has_it_elsewhere() -> None:
    old = [replica("a", "cuda:1"), replica("b", "cuda:0", number=3)]
    result = plan(old, [replica("a", "cuda:0"), replica("b", "cuda:1")])
    assert result.runners == old and not result.leaving and not result.waits
    assert kinds(result) == {"a-0": "kept", "b-3": "kept"}


def test_other_words_of_standing_restart_nothing_and_are_said() -> None:
    old = replica("a")
    result = plan([old], [replica("a", priority=5, pinned=True, max_replicas=3)])
    assert result.runners == [old] and result.runners[0].standing.priority == 5
    assert (
        result.changes[0].reason == "pinned: false → true; priority: 0 → 5; max_replicas: 1 → 3 (no restart)"
    )


def test_a_changed_replica_gets_a_new_id_and_socket_and_the_old_one_waits_for_it() -> None:
    old = replica("a", options={"x": {"y": 1}})
    result = plan([old], [replica("a", max_batch=16, options={"x": {"y": 2}})])
    (new,) = result.runners
    assert (new.id, new.device) == ("a-1", "cuda:0") and new.spec.socket != old.spec.socket
    assert result.leaving["a-0"].successors == ("a-1",) and result.waits == {"a-1": frozenset()}
    (change,) = result.changes
    assert change.kind == "changed" and change.was == "a-0" and not change.old_first
    assert change.reason == "max_batch: 8 → 16; options.x.y: 1 → 2"


def test_where_both_do_not_fit_the_old_one_goes_first_and_that_is_said() -> None:
    result = plan([replica("a", awake=8)], [replica("a", awake=9)], {"cuda:0": 10})
    assert result.leaving["a-0"].successors == () and result.waits == {"a-1": frozenset({"a-0"})}
    assert result.changes[0].old_first and "a-0 ends first: no room for both" in result.changes[0].reason


def test_a_changed_replica_stays_on_its_device_rather() -> None:
    result = plan([replica("a", "cuda:1")], [replica("a", "cuda:0", max_batch=9)])
    assert stands(result) == {"a-1": "cuda:1"}


def test_one_that_grows_makes_the_cheapest_neighbour_move() -> None:
    old = [replica("a"), replica("b", awake=3), replica("c", awake=2)]
    result = plan(old, [replica("a", awake=6, max_batch=9), *old[1:]], {"cuda:0": 10, "cuda:1": 2})
    assert stands(result) == {"a-1": "cuda:0", "b-0": "cuda:0", "c-1": "cuda:1"} and result.moves == 1
    moved = next(change for change in result.changes if change.kind == "moved")
    assert moved.reason == "cuda:0 → cuda:1 to make room" and not moved.old_first
    # The one that grows starts when c has left; there is no room for both a's, so its old one goes as well.
    assert result.leaving["c-0"].successors == ("c-1",)
    assert result.waits["a-1"] == {"c-0", "a-0"}


def test_two_that_change_places_with_no_room_to_spare() -> None:
    old = [replica("a", "cuda:0", 6), replica("b", "cuda:1", 9)]
    fresh = [replica("a", "cuda:1", 9, max_batch=9), replica("b", "cuda:0", 6, max_batch=9)]
    result = plan(old, fresh, {"cuda:0": 6, "cuda:1": 9})
    assert stands(result) == {"a-1": "cuda:1", "b-1": "cuda:0"}
    assert result.leaving["b-0"].successors == ()
    assert result.waits["a-1"] == {"b-0"} and result.waits["b-1"] == {"a-0"}
    assert result.leaving["a-0"].successors == ("a-1",)


def test_models_come_and_go() -> None:
    result = plan([replica("a"), replica("b")], [replica("a"), replica("c", "cuda:1")])
    assert kinds(result) == {"a-0": "kept", "c-0": "added", "b-0": "removed"}
    assert result.leaving["b-0"].reason == "no longer asked for" and not result.leaving["b-0"].successors


def test_one_that_never_answered_is_not_waited_for() -> None:
    result = replan([Stood(replica("a"), serves=False)], [replica("a", max_batch=9)], ROOMS)
    assert result.leaving["a-0"].successors == ()


def test_going_back_takes_up_the_old_one_that_still_serves() -> None:
    good, broken = replica("a"), replica("a", max_batch=9, number=1)
    result = replan([Stood(broken, serves=False), Stood(good)], [replica("a")], ROOMS)
    assert [one.id for one in result.runners] == ["a-0"] and set(result.leaving) == {"a-1"}


def test_replicas_beyond_the_fewest_stay_within_the_most_and_where_they_fit() -> None:
    old = [replica("a", awake=3, number=n, max_replicas=3) for n in range(3)]
    assert stands(plan(old, [replica("a", awake=3, max_replicas=3)])) == dict.fromkeys(
        ["a-0", "a-1", "a-2"], "cuda:0"
    )
    fewer = plan(old, [replica("a", awake=3, max_replicas=2)])
    assert len(fewer.runners) == 2 and next(iter(fewer.leaving.values())).reason == "fewer replicas"
    crowded = plan(old, [replica("a", awake=3, max_replicas=3), replica("b", awake=7)], {"cuda:0": 10})
    assert set(stands(crowded)) == {"a-0", "b-0"} and set(crowded.leaving) == {"a-1", "a-2"}
    anew = plan(old, [replica("a", awake=3, max_replicas=3, max_batch=9)])
    assert len(anew.runners) == 3 and {change.kind for change in anew.changes} == {"changed"}


def test_another_tier_is_another_specification() -> None:
    result = plan([replica("a")], [replica("a", asleep=1)])
    assert result.changes[0].reason == "tier: resident → standby"


def test_several_devices_at_once_move_as_one() -> None:
    rooms = dict.fromkeys(("cuda:0", "cuda:1", "cuda:2", "cuda:3"), 10)
    old = [replica("a", "cuda:0,1", 8)]
    result = plan(old, [replica("b", "cuda:2,3", 8), replica("a", "cuda:0,1", 8)], rooms)
    assert stands(result) == {"b-0": "cuda:2,3", "a-0": "cuda:0,1"}
    wide = plan([replica("a", "cuda:0", 8)], [replica("a", "cuda:0,1", 4)], rooms)
    assert wide.changes[0].kind == "changed" and "ranks: 1 → 2" in wide.changes[0].reason


def test_standing_ones_are_recognised_by_what_they_were_started_with() -> None:
    fresh = [replica("a"), replica("a-b")]
    elsewhere_ = elsewhere(fresh[1], "a-b-7", "cuda:1")
    records = [
        ("a-b-7", "cuda:1", elsewhere_.fingerprint),
        ("a-0", "cuda:0", "another"),
        ("c-0", "cuda:0", "x"),
    ]
    assert standing(fresh, records, {}) == [Stood(elsewhere_)]


def test_a_search_is_bounded_and_then_the_plan_from_nothing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [replica(f"m{n}", "cuda:0", 2) for n in range(6)]
    fresh = [replica(f"m{n}", f"cuda:{n % 2}", 2) for n in range(6)]
    rooms = {"cuda:0": 6, "cuda:1": 6}
    assert seat([Seeker(one, at="cuda:0") for one in fresh], rooms, steps=3) is None
    monkeypatch.setattr(replans, "seat", partial(seat, steps=3))
    assert sorted(stands(plan(old, fresh, rooms)).values()) == ["cuda:0"] * 3 + ["cuda:1"] * 3


def test_an_unchanged_model_keeps_its_layout_though_a_new_plan_would_have_another() -> None:
    rooms = dict.fromkeys(("cuda:0", "cuda:1", "cuda:2", "cuda:3"), 10)
    narrow, wide = replica("a", "cuda:0,1", 8), replica("a", "cuda:0,1,2,3", 4)
    result = replan([Stood(narrow)], [wide, replica("b", awake=2)], rooms, former=[narrow])
    assert result.runners[0] == narrow and not result.leaving
    # Where its old layout leaves no room for another, it changes.
    result = replan(
        [Stood(narrow)], [wide, *(replica(f"b{n}", f"cuda:{n}", 6) for n in range(4))], rooms, former=[narrow]
    )
    assert stands(result)["a-1"] == wide.device


def test_replicas_stay_on_the_kind_of_gpu_that_they_were_laid_out_for() -> None:
    kinds = {"cuda:0": "H100", "cuda:1": "L40S", "cuda:2": "H100"}
    rooms = dict.fromkeys(kinds, 10)
    old = [replica("a", "cuda:0", 6)]
    fresh = [replica("a", "cuda:0", 6), replica("b", "cuda:0", 6)]
    result = replan([Stood(one) for one in old], fresh, rooms, kinds=kinds)
    assert stands(result) == {"a-0": "cuda:0", "b-0": "cuda:2"}


# Against every placement there is, on small instances.

small = st.tuples(st.integers(1, 4), st.none() | st.integers(0, 1))  # awake, asleep
names = st.sampled_from("abcdef")


@st.composite
def instances(draw: st.DrawFn) -> tuple[dict[str, int], list[RunnerPlan], list[RunnerPlan]]:
    """Rooms, old replicas that fit, and new ones for which a place is known."""
    rooms = {f"cuda:{n}": draw(st.integers(3, 8)) for n in range(draw(st.integers(1, 3)))}
    sizes = {name: draw(small) for name in "abcdef"}

    def some(changed: bool) -> list[RunnerPlan]:
        taken, plans = Taken(rooms), []
        for name in draw(st.lists(names, max_size=5, unique=True)):
            awake, asleep = sizes[name]
            batch = draw(st.sampled_from([8, 9])) if changed else 8
            device = draw(st.sampled_from(sorted(rooms)))
            one = replica(
                name, device, awake, asleep=None if asleep is None else min(asleep, awake), max_batch=batch
            )
            if taken.takes(one):
                taken.add(one)
                plans.append(one)
        return plans

    return rooms, some(False), some(True)


def fewest_moves(seekers: Sequence[Seeker], rooms: dict[str, int]) -> int:
    best = len(seekers) + 1
    for devices in itertools.product(sorted(rooms), repeat=len(seekers)):
        pairs = list(zip(seekers, devices, strict=True))
        if Taken.by(rooms, (elsewhere(s.plan, s.plan.id, device) for s, device in pairs)).fits:
            best = min(best, sum(s.at not in (None, device) for s, device in pairs))
    return best


@settings(deadline=None)
@given(instances())
def test_no_placement_moves_fewer_and_nobody_is_over_room(
    instance: tuple[dict[str, int], list[RunnerPlan], list[RunnerPlan]],
) -> None:
    rooms, old, fresh = instance
    result = plan(old, fresh, rooms)
    assert Taken.by(rooms, result.runners).fits
    standing_at = {essence(one): one.device for one in old}
    seekers = [Seeker(one, at=standing_at.get(essence(one))) for one in fresh]
    assert result.moves == fewest_moves(seekers, rooms)
    assert [essence(one) for one in result.runners] == [essence(one) for one in fresh]
    by_kind = {kind: {c.unit for c in result.changes if c.kind == kind} for kind in ("kept", "removed")}
    assert by_kind["kept"] | set(result.leaving) == {one.id for one in old}
    assert not by_kind["kept"] & set(result.leaving)
    assert len({one.id for one in [*old, *result.runners]}) == len(old) + len(result.waits)


@settings(deadline=None)
@given(instances())
def test_carried_out_in_any_order_memory_always_suffices_and_it_comes_to_an_end(
    instance: tuple[dict[str, int], list[RunnerPlan], list[RunnerPlan]],
) -> None:
    rooms, old, fresh = instance
    result = plan(old, fresh, rooms)
    living = {one.id: one for one in old}
    wanted = {one.id: one for one in result.runners}
    for _ in range(2 * len(old) + 2 * len(fresh) + 2):
        for name in [n for n in result.waits if n not in living]:
            if not result.waits[name] & set(living):
                living[name] = wanted[name]
        assert Taken.by(rooms, living.values()).fits
        for name, leaving in result.leaving.items():
            if all(one in living for one in leaving.successors):
                living.pop(name, None)
    assert living == wanted


def test_an_order_for_what_does_not_fit_at_all_still_ends() -> None:
    order = hand_over([], [replica("a", awake=11)], {"b-0": replica("b")}, {}, ROOMS)
    assert order.waits == {"a-0": frozenset({"b-0"})}
