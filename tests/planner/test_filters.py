"""Each filter by itself: one case that it refuses, with the reason, and one that it lets through."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.planner.filters import FILTERS, Case, first_reason
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import GIB
from engine.planner.needs import ModelNeeds
from tests.planner.support import dense, moe, node, small

BY_NAME = {each.name: each for each in FILTERS}


def case(needs: ModelNeeds, layout: Layout, nodes: str = "1x8xH200", **want: Any) -> Case:
    return Case(needs, Want(needs.id, **want), layout, node(nodes), Policy())


REFUSED: list[tuple[str, Case, str]] = [
    ("known figures", case(dense(weights_bytes=None), Layout()), "unknown: weight bytes"),
    ("known figures", case(dense(kv=None, context=None), Layout()), "KV bytes per token, context length"),
    ("known figures", case(moe(expert_bytes=None), Layout()), "unknown: expert bytes"),
    ("context", case(dense(), Layout(), context=40_000), "40000 tokens asked; the model's context is 32768"),
    ("engine", case(small("picture", 4), Layout(tp=2)), "diffusers runs a replica on one GPU"),
    ("engine", case(dense(), Layout(dp=2)), "a dense model takes more replicas"),
    ("capability", case(dense(), Layout(kv_dtype="fp8"), "1x1xA100-80"), "capability 8.9; A100-80 has 8.0"),
    ("split", case(dense(attention_heads=28), Layout(tp=8)), "28 attention heads are not divisible by TP8"),
    ("reach", case(dense(), Layout(tp=8), "2x4xL40S"), "TP8 would leave its node of 4 GPUs"),
    ("reach", case(moe(), Layout(dp=8, ep=True), "2x4xL40S"), "need RDMA between them"),
    ("EPLB", case(moe(dtype="int4"), Layout(dp=8, ep=True, eplb=True)), "raises NotImplementedError"),
    (
        "memory",
        case(dense(weights_gib=130), Layout()),
        r"1 GPU needs \d+\.\d GiB of each H200 for 1 x 32768 tok",
    ),
    (
        "host memory",
        case(dense(weights_gib=100), Layout(), "1x1xH200:64", tier="standby"),
        r"asleep, its weights take 100\.0 GiB of the host's memory; 57\.6 GiB of each node are for that",
    ),
    ("memory", case(small("picture", 200), Layout()), r"needs 200\.0 GiB .*128\.7 GiB of 140\.4 are usable"),
]
PASSED: list[tuple[str, Case]] = [
    ("known figures", case(small("picture", 4), Layout())),
    ("context", case(dense(), Layout(), context=32_768)),
    ("engine", case(moe(), Layout(dp=8, ep=True))),
    ("capability", case(dense(), Layout(kv_dtype="fp8"), "1x1xL40S")),
    ("split", case(dense(), Layout(tp=8))),
    ("reach", case(moe(), Layout(dp=16, ep=True), "2x8xH200")),
    ("EPLB", case(moe(), Layout(dp=8, ep=True, eplb=True))),
    ("EPLB", case(moe(dtype="int4"), Layout(tp=8))),
    ("memory", case(dense(weights_gib=100), Layout())),
    ("host memory", case(dense(weights_gib=100), Layout(), "1x1xH200:64")),
    ("host memory", case(dense(weights_gib=100), Layout(), "1x1xH200", tier="standby")),
]


@pytest.mark.parametrize(("name", "question", "says"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_it_refuses_and_says_why(name: str, question: Case, says: str) -> None:
    assert re.search(says, BY_NAME[name].reason(question) or "")
    assert first_reason(question) is not None


@pytest.mark.parametrize(("name", "question"), PASSED)
def test_it_lets_through(name: str, question: Case) -> None:
    assert BY_NAME[name].reason(question) is None


def test_every_filter_has_both_kinds_of_case() -> None:
    assert {name for name, _, _ in REFUSED} == {name for name, _ in PASSED} == BY_NAME.keys()


def test_the_memory_reason_shows_every_term() -> None:
    reason = BY_NAME["memory"].reason(case(dense(weights_gib=300), Layout(tp=2))) or ""
    for term in ("weights 150.0", "unsplit 3.0", "KV cache", "activations", "CUDA context", "communication"):
        assert term in reason


def test_the_first_filter_speaks() -> None:
    both = case(dense(weights_gib=500), Layout(), context=99_999)
    assert first_reason(both) == ("context", "99999 tokens asked; the model's context is 32768")
    assert both.node.kind.memory_bytes < 500 * GIB
