"""Tiers: residents have their memory, standby replicas share; no GPU and no host is ever over its budget."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from engine.planner.asleep import Sleep, sleep_of
from engine.planner.catalog import nodes_of, wants_of
from engine.planner.chart import chart
from engine.planner.document import document
from engine.planner.fleet import Fleet, Item, group_of
from engine.planner.hardware import HOST_SHARE, parse_nodes
from engine.planner.launch import launch_lines
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    GIB,
    GRAPH_BYTES,
    Footprint,
    Term,
    capacity,
    footprint,
)
from engine.planner.outcome import Plan
from engine.planner.pack import pack
from engine.planner.plan import make_plan
from engine.planner.select import Option
from models.catalog import load_catalog, load_profile
from tests.planner.support import catalog, dense, node, plan, small

RUN = Path("/run/hearth")


def assert_within_budget(found: Plan) -> None:
    """The formula, reckoned anew from what is placed: on every GPU, and on every host."""
    for node_, free, host_free in zip(found.nodes, found.free, found.host_free, strict=True):
        host = 0
        for gpu in range(node_.gpus):
            here = [p for p in found.placements for n, gpus in p.places if n == node_ and gpu in gpus]
            resident = sum(p.footprint.total for p in here if p.sleep is None)
            standby = [(p.footprint.total, p.sleep) for p in here if p.sleep]
            asleep = sum(sleep.kept for _, sleep in standby)
            waking = max((awake - sleep.kept for awake, sleep in standby), default=0)
            host += sum(sleep.host for _, sleep in standby)
            room = capacity(node_.kind, 0.92)
            assert resident + asleep + waking == room - free[gpu] <= room
        assert host == node_.host_bytes - host_free <= node_.host_bytes


models = st.lists(
    st.tuples(
        st.floats(0.5, 130),
        st.booleans(),
        st.sampled_from(["resident", "standby"]),
        st.integers(0, 2),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(models, st.sampled_from(["1x2xH100", "2x2xL40S", "1x4xH200:96", "1x1xH200,2x2xH100:64"]))
def test_the_formula_holds_on_every_gpu_and_host(
    wished: list[tuple[float, bool, str, int, int]], nodes: str
) -> None:
    needs, wants = {}, []
    for number, (gib, with_cache, tier, priority, replicas) in enumerate(wished):
        name = f"m{number}"
        needs[name] = dense(name, gib) if with_cache else small(name, gib)
        wants.append(Want(name, tier=tier, priority=priority, replicas=replicas, context=4096))  # type: ignore[arg-type]  # sampled from the two tiers
    policy = Policy(search_steps=300)
    found = make_plan(needs, wants, parse_nodes(nodes), policy)
    assert_within_budget(found)
    assert len(found.placements) + len(found.refusals) == sum(want.replicas for want in wants)
    assert all(refusal.reason for refusal in found.refusals)
    assert found == make_plan(needs, wants, parse_nodes(nodes), policy)
    # Standby replicas cost no resident its place, though residents may stand elsewhere to make room for one.
    alone = make_plan(needs, [w for w in wants if w.tier == "resident"], parse_nodes(nodes), policy)
    assert {p.id for p in alone.placements} <= {p.id for p in found.placements}


NODES = parse_nodes("1x2xH100:40")


def sleeper(number: int, awake: int, kept: int, host: int, gpus: int) -> Item:
    foot = Footprint((Term("weights", awake * GIB, ""),))
    option = Option(Layout(tp=gpus), foot, 1, gpus, sleep=Sleep(min(kept, awake) * GIB, host * GIB))
    return Item(f"i{number}", f"m{number}", 0, {group_of(NODES[0]): (option,)}, option.total)


sleepers = st.lists(
    st.tuples(st.integers(1, 72), st.integers(1, 30), st.integers(0, 20), st.sampled_from([1, 1, 2])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(sleepers)
def test_as_much_stands_by_as_can_be(sizes: list[tuple[int, int, int, int]]) -> None:
    """Against every way to place them: on no GPU, on either, on both."""
    items = [sleeper(i, *size) for i, size in enumerate(sizes)]
    placed = pack(items, Fleet(NODES, 0.92), 20_000)
    room, host = capacity(NODES[0].kind, 0.92), NODES[0].host_bytes
    best = 0
    for where in itertools.product(((), (0,), (1,), (0, 1)), repeat=len(sizes)):
        stands = [(s, gpus) for s, gpus in zip(sizes, where, strict=True) if gpus]
        if any(len(gpus) != size[3] for size, gpus in stands):
            continue
        fits = sum(size[2] * len(gpus) for size, gpus in stands) * GIB <= host
        for gpu in (0, 1):
            here = [(size[0], min(size[1], size[0])) for size, gpus in stands if gpu in gpus]
            most = max((awake - kept for awake, kept in here), default=0)
            fits = fits and (sum(kept for _, kept in here) + most) * GIB <= room
        if fits:
            best = max(best, sum(size[0] * size[3] for size, _ in stands))
    assert sum(move.option.total for move in placed.values()) == best * GIB


@settings(max_examples=60, deadline=None)
@given(sleepers)
def test_what_is_booked_does_not_depend_on_the_order_and_can_be_undone(
    sizes: list[tuple[int, int, int, int]],
) -> None:
    items = [sleeper(i, *size) for i, size in enumerate(sizes)]
    fleet = Fleet(NODES, 0.92)
    empty = [list(free) for free in fleet.free], list(fleet.host)
    placed = pack(items, fleet, 200)
    full = [list(free) for free in fleet.free], list(fleet.host)
    by_id = {item.id: item for item in items}
    for name, move in placed.items():
        fleet.undo(by_id[name], move)
    assert (fleet.free, fleet.host) == empty
    for name, move in reversed(placed.items()):
        fleet.apply(by_id[name], move)
    assert (fleet.free, fleet.host) == full


def test_asleep_vllm_keeps_context_graphs_and_buffers_and_the_host_its_weights() -> None:
    needs, layout = dense(weights_gib=40), Layout(tp=2)
    foot = footprint(needs, Want("dense"), layout, node().kind, Policy())
    asleep = sleep_of(needs, layout, foot)
    assert asleep.kept == CONTEXT_BYTES + COMMUNICATION_BYTES + 32 * GRAPH_BYTES
    assert asleep.host == foot.of("weights") + foot.of("unsplit")
    assert asleep.kept < foot.total // 4
    whole = small("picture", 0.5)
    rest = sleep_of(whole, Layout(), footprint(whole, Want("picture"), Layout(), node().kind, Policy()))
    assert rest.kept == GIB // 2  # never more than it takes awake


def test_far_more_stand_by_than_could_be_awake_at_once() -> None:
    wants = [
        Want(name, tier="standby", context=8192) for name in ("qwen3-32b", "gpt-oss-120b", "gemma-3-27b-it")
    ]
    found = plan("1x2xH100", *wants)
    assert not found.refusals
    assert sum(p.footprint.total for p in found.placements) > sum(
        found.nodes[0].kind.memory_bytes for _ in "ab"
    )
    assert_within_budget(found)
    assert len(plan("1x2xH100", *(replace(want, tier="resident") for want in wants)).refusals) == 1


def test_standby_models_spread_out_so_that_several_can_be_awake() -> None:
    names = ["qwen3-8b", "qwen3-0.6b", "qwen2.5-coder-7b", "qwen3-vl-8b"]
    found = plan("1x4xH100", *(Want(name, tier="standby") for name in names))
    assert len({p.places for p in found.placements}) == 4
    assert all("grown" not in term.how for p in found.placements for term in p.footprint.terms)


def test_who_is_to_sleep_is_told_and_then_it_fits() -> None:
    oss = Want("gpt-oss-120b", tier="standby")
    chat = Want("qwen3-32b", kv_dtype="fp8", context=8192)
    (refusal,) = plan("1x1xH100", oss, chat).refusals
    assert refusal.step == "room"
    assert "needs 65.0 GiB awake (1.8 asleep) of one GPU" in refusal.reason
    assert refusal.change == 'Make qwen3-32b standby (`tier = "standby"`) or leave it out.'
    assert not plan("1x1xH100", oss, replace(chat, tier="standby")).refusals


def test_where_the_host_has_no_memory_for_their_weights_nobody_is_told_to_sleep() -> None:
    (refusal,) = plan("1x1xH100:8", Want("gpt-oss-120b", priority=1), "qwen3-8b").refusals
    assert refusal.change == "Leave gpt-oss-120b out."


def test_a_host_that_is_full_is_named_with_the_way_out() -> None:
    sleeping = [Want("gpt-oss-120b", tier="standby"), Want("qwen3-8b", tier="standby")]
    (refusal,) = plan("1x1xH200:80", *sleeping).refusals
    assert (refusal.id, refusal.step) == ("qwen3-8b-0", "host memory")
    assert refusal.reason == (
        "asleep, its weights take 15.3 GiB of the host's memory; n0 has 11.2 GiB of 72.0 left for that "
        "after gpt-oss-120b-0"
    )
    assert refusal.change == '`tier = "resident"` would make it fit: there is room for it to stay awake.'
    assert not plan("1x1xH200:80", sleeping[0], "qwen3-8b").refusals
    # Where it cannot stay awake beside the others, the host needs more.
    (other,) = plan("1x1xH100:80", *sleeping).refusals
    assert other.change.startswith("Give its node 4.1 GiB more of host memory")
    assert not plan("1x1xH100:85", *sleeping).refusals


def test_a_host_that_is_too_small_for_one_model_is_told_by_the_filter() -> None:
    (refusal,) = plan("1x1xH100:8", Want("qwen3-8b", tier="standby")).refusals
    assert refusal.step == "host memory" and "7.2 GiB of each node are for that" in refusal.reason


def test_the_drawing_hatches_what_is_shared_and_lists_who_sleeps() -> None:
    found = plan(
        "1x2xH100", "qwen3-8b", Want("gpt-oss-120b", tier="standby"), Want("qwen3-32b", tier="standby")
    )
    out = Console(file=io.StringIO(), width=200)
    out.print(chart(found, 0.92, RUN), soft_wrap=True)
    text = out.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    bars = [line for line in text.splitlines() if line.startswith("n0 gpu")]
    assert "AAAA" in bars[0] and "in turn: C" in bars[0] and "in turn: B C" in bars[1]
    assert all("▒" in bar and "░" in bar for bar in bars)
    assert "asleep: ▒ kept by all, ░ taken by the one that is awake" in text
    host = sum(p.sleep.host * p.gpus for p in found.placements if p.sleep) / GIB
    assert f"host of n0: {host:.1f} of 460.8 GiB" in text


def test_json_and_launch_line_say_that_it_sleeps() -> None:
    found = plan("1x1xH200", "qwen3-8b", Want("gpt-oss-20b", tier="standby"))
    told = document(found, 0.92, RUN)
    first, second = told["placements"]
    assert (first["tier"], first["asleep"]) == ("resident", None)
    assert second["tier"] == "standby" and second["spec"]["can_sleep"]
    assert (
        second["asleep"]["host_bytes"]
        == told["nodes"][0]["host_usable_bytes"] - told["nodes"][0]["host_free_bytes"]
    )
    (line,) = launch_lines(found.placements[1], RUN)
    assert dict(line.environment)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in dict(launch_lines(found.placements[0], RUN)[0].environment)


def test_residents_are_spread_where_a_standby_model_needs_every_gpu() -> None:
    needs = {f"r{i}": small(f"r{i}", 12) for i in range(4)} | {"wide": dense("wide", 370, attention_heads=64)}
    wants = [Want(name, tier="standby" if name == "wide" else "resident", context=2048) for name in needs]
    found = make_plan(needs, wants, parse_nodes("1x4xH200"))
    assert not found.refusals
    assert len({p.places for p in found.placements if p.sleep is None}) == 4
    assert_within_budget(found)
    # Without it they stand together and leave whole GPUs free.
    alone = make_plan(needs, wants[:-1], parse_nodes("1x4xH200"))
    assert len({p.places for p in alone.placements}) == 1


def test_fifty_models_stand_on_eight_h200_and_a_usual_host() -> None:
    fifty = load_profile("fifty")
    (host,) = nodes_of(fifty)
    smallest = replace(host, host_room=int(fifty.needs.memory_bytes * HOST_SHARE))
    found = make_plan(catalog(), wants_of(fifty), [smallest])
    assert len(fifty.models) == len(found.placements) == 50 and not found.refusals
    assert_within_budget(found)
    awake = [p for p in found.placements if p.sleep is None]
    assert {p.needs.category for p in awake} == {
        "chat", "code", "vision", "image", "audio", "embedding", "detection"
    } - {"image"}  # fmt: skip
    r1 = next(p for p in found.placements if p.needs.id == "deepseek-r1")
    assert r1.sleep is not None and r1.gpus == 8
    # Awake all at once they would take nearly twice the memory that there is.
    everything = sum(p.footprint.total * p.gpus for p in found.placements)
    assert everything > 1.8 * 8 * capacity(host.kind, 0.92)
    known = load_catalog()
    assert not any(known.find(model.id).gated for model in fifty.models)
