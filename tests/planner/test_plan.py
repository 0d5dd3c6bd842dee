"""Whole plans of catalog models: where they stand, what is told, what is refused and what would help."""

from __future__ import annotations

import pytest

from engine.planner.catalog import nodes_of, wants_of
from engine.planner.layout import Policy, Want
from engine.planner.memory import capacity
from engine.planner.outcome import Placement, Plan
from engine.planner.plan import make_plan
from models.catalog import load_profile, load_profiles
from models.profile import Profile
from tests.planner.support import catalog, dense, moe, node, plan, small


def of(found: Plan, name: str) -> Placement:
    return next(each for each in found.placements if each.id == name)


def change(nodes: str, *wants: str | Want) -> str:
    return plan(nodes, *wants).refusals[-1].change


def test_r1_and_whisper_share_a_node_of_eight_h200() -> None:
    found = plan("1x8xH200", "deepseek-r1", "whisper-large-v3")
    assert not found.refusals
    r1, whisper = of(found, "deepseek-r1-0"), of(found, "whisper-large-v3-0")
    assert r1.layout.name() == "DP8+EP" and r1.places[0][1] == tuple(range(8))
    assert len(whisper.places[0][1]) == 1
    assert any("cache of its own" in why for why in r1.why)


def test_small_models_share_one_gpu_and_the_caches_grow_into_the_rest() -> None:
    found = plan("1x8xH100", "qwen3-8b", "qwen2.5-coder-7b", "whisper-large-v3", "bge-m3", "yolo26x")
    gpus = {placement.places[0][1] for placement in found.placements}
    assert len(gpus) == 1
    (gpu,) = next(iter(gpus))
    room = capacity(found.nodes[0].kind, 0.92)
    assert 0 <= found.free[0][gpu] < room // 20
    asked = plan(
        "1x8xH100", "qwen3-8b", "qwen2.5-coder-7b", "whisper-large-v3", "bge-m3", "yolo26x", grow=False
    )
    assert of(found, "qwen3-8b-0").footprint.kv_bytes > of(asked, "qwen3-8b-0").footprint.kv_bytes


def test_a_cache_grows_no_further_than_it_can_be_used() -> None:
    found = plan("1x1xH200", Want("qwen3-0.6b", context=1024, max_batch=4))
    assert found.placements[0].footprint.kv_tokens == pytest.approx(4 * 1024, rel=0.35)
    assert found.free[0][0] > 100 << 30


def test_what_is_free_is_what_the_placements_leave() -> None:
    for profile in ("flagship", "flagship-2", "l40s-4"):
        chosen = load_profile(profile)
        found = make_plan(catalog(), wants_of(chosen), nodes_of(chosen))
        left = {(n.name, g): capacity(n.kind, 0.92) for n in found.nodes for g in range(n.gpus)}
        for placement in found.placements:
            for node_, gpus in placement.places:
                for gpu in gpus:
                    left[node_.name, gpu] -= placement.footprint.total
        assert left == {
            (n.name, g): f[g] for n, f in zip(found.nodes, found.free, strict=True) for g in range(n.gpus)
        }
        assert min(left.values()) >= 0


def test_r1_on_eight_h100_is_refused_with_every_term_and_two_ways_out() -> None:
    (refusal,) = plan("1x8xH100", "deepseek-r1").refusals
    assert refusal.step == "memory"
    assert "weights 78.4" in refusal.reason and "72.8 GiB of 79.6 are usable" in refusal.reason
    assert refusal.change == "It fits with 1 more node of 8xH100, or 8xH200 instead."
    assert not plan("2x8xH100", "deepseek-r1").refusals


@pytest.mark.parametrize(
    ("model", "reason"),
    [("gpt-oss-120b", "without a word"), ("kimi-k2-6", "NotImplementedError"), ("qwen3-32b", "has none")],
)
def test_eplb_where_vllm_ignores_it_or_crashes_is_refused(model: str, reason: str) -> None:
    (refusal,) = plan("1x8xH200", Want(model, eplb=True)).refusals
    assert refusal.step == "EPLB" and reason in refusal.reason
    assert refusal.change == "Leave EPLB out for this model (`eplb = false`)."
    assert not plan("1x8xH200", Want(model)).refusals


def test_eplb_where_it_works_is_laid_out_with_experts() -> None:
    found = plan("1x8xH200", Want("deepseek-r1", eplb=True))
    assert found.placements[0].layout.eplb and found.placements[0].layout.ep
    assert found.placements[0].footprint.of("redundant experts") > 0


@pytest.mark.parametrize(
    ("nodes", "want", "says"),
    [
        ("1x8xH200", Want("deepseek-r1", context=163840, concurrency=64), "(`concurrency = "),
        ("1x1xH100", Want("qwen3-32b", context=40960, concurrency=1), 'kv_dtype = "fp8"'),
        ("1x1xA100-80", Want("qwen3-32b", context=40960), "Shorten its context from 40960 to "),
        ("1x8xH200", Want("qwen3-8b", context=99_999), "Ask for at most 40960 tokens"),
        ("1x8xH200", Want("mystery"), "Add an entry to models/catalog/."),
        ("1x8xH200", Want("tiny-vision"), "to its entry in models/catalog/, with the source"),
    ],
)
def test_the_smallest_change_is_named(nodes: str, want: Want, says: str) -> None:
    assert says in change(nodes, want)


def test_the_change_that_is_named_does_make_it_fit() -> None:
    text = change("1x8xH200", Want("deepseek-r1", context=163840, concurrency=64))
    best = int(text.partition("`concurrency = ")[2].partition("`")[0])
    assert not plan("1x8xH200", Want("deepseek-r1", context=163840, concurrency=best)).refusals
    assert plan("1x8xH200", Want("deepseek-r1", context=163840, concurrency=best + 1)).refusals
    text = change("1x1xA100-80", Want("qwen3-32b", context=40960))
    shorter = int(text.partition("to ")[2].partition(" tokens")[0])
    assert not plan("1x1xA100-80", Want("qwen3-32b", context=shorter)).refusals
    assert plan("1x1xA100-80", Want("qwen3-32b", context=shorter + 1024)).refusals


def test_who_is_in_the_way_is_named() -> None:
    found = plan("1x1xH100", Want("gpt-oss-120b", priority=1), "qwen3-8b")
    (refusal,) = found.refusals
    assert refusal.step == "room" and "after gpt-oss-120b-0" in refusal.reason
    assert refusal.change == (
        'Make gpt-oss-120b and qwen3-8b standby (`tier = "standby"`): they take turns. '
        "Or leave gpt-oss-120b out."
    )
    both = [Want(name, tier="standby") for name in ("gpt-oss-120b", "qwen3-8b")]
    assert not plan("1x1xH100", *both).refusals


def test_replicas_stand_on_different_nodes() -> None:
    found = plan("2x8xH100", Want("qwen3-8b", replicas=2))
    assert {p.places[0][0].name for p in found.placements} == {"n0", "n1"}
    assert [p.id for p in found.placements] == ["qwen3-8b-0", "qwen3-8b-1"]
    on_one = plan("1x8xH100", Want("qwen3-8b", replicas=2))
    assert len({p.places[0][1] for p in on_one.placements}) == 2


def test_no_gpus_is_a_reason_not_a_crash() -> None:
    found = make_plan(catalog(), [Want("qwen3-8b")], [])
    assert found.refusals[0].reason == "there are no GPUs"


def test_equal_arguments_give_equal_plans() -> None:
    asked = ["deepseek-r1", "kimi-k2-6", "gpt-oss-120b", "qwen3-32b", "qwen3-8b"]
    assert plan("2x8xH200", *asked) == plan("2x8xH200", *asked)


def test_the_plan_knows_nothing_but_its_arguments() -> None:
    needs = {"d": dense("d"), "m": moe("m"), "p": small("p", 5)}
    found = make_plan(needs, [Want("d"), Want("m"), Want("p")], [node("1x4xA100-80")], Policy())
    assert {p.needs.id for p in found.placements} == {"d", "m", "p"}


GPU_PROFILES = [p for p in load_profiles() if p.needs.nodes]


def test_profiles_for_every_promised_machine_are_shipped() -> None:
    assert {p.needs.nodes for p in GPU_PROFILES} >= {
        "1x1xH200",
        "1x8xH100",
        "1x8xH200",
        "2x8xH200",
        "1x4xL40S",
    }
    # What one `hearth serve` cannot start, it never chooses.
    assert [p.name for p in GPU_PROFILES if p.plan_only] == [
        p.name for p in GPU_PROFILES if len(nodes_of(p)) > 1
    ]


@pytest.mark.parametrize("profile", GPU_PROFILES, ids=lambda p: p.name)
def test_each_shipped_profile_fits_its_machine_with_all_seven_categories(profile: Profile) -> None:
    nodes = nodes_of(profile)
    found = make_plan(catalog(), wants_of(profile), nodes)
    assert not found.refusals
    assert {p.needs.category for p in found.placements} == {
        "chat", "code", "vision", "image", "audio", "embedding", "detection"
    }  # fmt: skip
    assert sum(n.gpus for n in nodes) == profile.needs.gpus
    assert nodes[0].kind.memory_bytes == profile.needs.gpu_memory_bytes
