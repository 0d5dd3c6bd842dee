"""docs/planning.md's worked example is what the planner reckons."""

from __future__ import annotations

import re

import pytest

from engine.cli.plan import plan as command
from engine.config import ROOT
from engine.planner.hardware import KINDS
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import GIB, capacity, footprint
from tests.planner.support import catalog, node, plan

TEXT = (ROOT / "docs" / "planning.md").read_text()
EXAMPLE = TEXT.partition("## Worked example")[2].partition("## How far")[0]


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


@pytest.mark.parametrize(("layout", "column"), [(Layout(dp=8, ep=True), 0), (Layout(tp=8), 1)])
def test_the_example_of_r1_on_eight_h200(layout: Layout, column: int) -> None:
    needs, kind = catalog()["deepseek-r1"], node("1x8xH200").kind
    foot = footprint(needs, Want("r1", context=131_072, concurrency=8), layout, kind, Policy())
    rows = dict(re.findall(r"^\| \**([\w ,]+?)\** \|(.+)\|$", EXAMPLE, flags=re.MULTILINE))
    cells = {name: row.split("|")[column] for name, row in rows.items()}
    assert gib(foot.of("weights")) in cells["weights"]
    assert gib(foot.kv_bytes) in next(
        cell for name, cell in cells.items() if name.startswith("KV cache asked")
    )
    assert gib(foot.of("activations")) in cells["activations"]
    assert gib(foot.total) in cells["sum"]
    assert gib(capacity(kind, 0.92)) in EXAMPLE
    most = foot.kv_bytes + capacity(kind, 0.92) - foot.total
    assert f"{foot.with_kv(most).kv_tokens:,}".replace(",", " ") in EXAMPLE


def test_every_kind_and_option_is_told() -> None:
    assert all(kind in TEXT for kind in KINDS)
    told = set(re.findall(r"`(--[a-z-]+)", TEXT))
    own = {f"--{name.replace('_', '-')}" for name in command.__annotations__} - {
        "--return",
        "--as-json",
        "--rdma",
    }
    assert own - {"--nodes", "--models", "--profile"} <= told


def test_the_example_of_the_tiers() -> None:
    names = ("qwen3-32b", "gpt-oss-120b", "gemma-3-27b-it")
    found = plan("1x2xH100", *(Want(name, context=8192, tier="standby") for name in names))
    for placement in found.placements:
        assert placement.sleep is not None
        sizes = placement.footprint.total, placement.sleep.kept, placement.sleep.host
        cells = [placement.needs.id, *(f"{size / GIB:.1f}" for size in sizes)]
        assert f"| {' | '.join(cells)} | gpu{placement.places[0][1][0]} |" in TEXT
    room = capacity(node("1x2xH100").kind, 0.92)
    assert f"{(room - found.free[0][1]) / GIB:.1f} of {gib(room)}" in TEXT
