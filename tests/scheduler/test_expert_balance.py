"""How the balance of experts comes from a runner's /metrics into status and routes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console

from engine.cli import tables
from engine.routes import ExpertBalance
from engine.runners.expert_load import metrics_text
from engine.scheduler.expert_balance import parse_balance, worst_of
from engine.scheduler.probe import HttpProber
from engine.scheduler.publish import is_news, make_routes
from engine.scheduler.status import SchedulerStatus, make_status
from models.facts import Experts
from tests.runners.test_expert_load import write

from .support import entry
from .test_supervisor import Stage, playing

UNEVEN = ExpertBalance(over="ranks", overall=0.75, worst=0.5, worst_layer=1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for comes from a thread
            await asyncio.sleep(0.001)


def page(tmp_path: Path, ranks: int) -> str:
    """What a runner with these counts tells, after metrics of the engine's own."""
    write(tmp_path / "experts", 0, [[6, 2, 4, 4], [8, 0, 0, 0]])
    return 'vllm:x{a="b"} 1.0\n' + metrics_text(tmp_path / "experts", ranks).decode()


def test_ranks_are_told_where_there_are_several(tmp_path: Path) -> None:
    assert parse_balance(page(tmp_path, 2)) == UNEVEN
    alone = parse_balance(page(tmp_path, 1))
    assert alone == ExpertBalance(over="experts", overall=0.429, worst=0.25, worst_layer=1)


def test_what_the_engine_reports_itself_has_no_layers() -> None:
    text = 'hearth_expert_balancedness_overall{over="ranks"} 0.61234\n'
    assert parse_balance(text) == ExpertBalance(over="ranks", overall=0.612)


@pytest.mark.parametrize(
    "text", ["", "vllm:x 1.0\n", "hearth_expert_balancedness{ broken", "hearth_expert_balancedness 1.0\n"]
)
def test_a_page_without_it_tells_nothing(text: str) -> None:
    assert parse_balance(text) is None


def test_the_least_even_replica_stands_for_the_model() -> None:
    better = ExpertBalance(over="ranks", overall=0.9)
    assert worst_of([None, better, UNEVEN]) == UNEVEN
    assert worst_of([None]) is None


async def test_a_runner_is_asked_over_its_socket(tmp_path: Path) -> None:
    text = page(tmp_path, 2)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    server = web.AppRunner(app)
    await server.setup()
    socket = tmp_path / "r.sock"
    await web.UnixSite(server, str(socket)).start()
    prober = HttpProber(health_timeout_s=2)
    try:
        assert await prober.expert_balance(socket) == UNEVEN
    finally:
        await server.cleanup()
        assert await prober.expert_balance(tmp_path / "nobody.sock") is None
        await prober.close()


async def test_only_mixtures_of_experts_are_asked(tmp_path: Path) -> None:
    stage = Stage(tmp_path, entry("moe", experts=Experts(count=4, per_token=2)), entry("dense"))
    stage.prober.balances = {"moe-0": UNEVEN, "dense-0": UNEVEN}
    async with playing(stage):
        await stage.until_ready()
        # Measured after the first request, in a thread.
        await until(lambda: stage.world.units["moe-0"].expert_balance is not None)
        now = stage.clock.now()
        about = SchedulerStatus(pid=1, started=0.0)
        status = make_status(stage.world, now, scheduler=about, profile="p", base_url="")
        found = {model.id: model.expert_balance for model in status.models}
        assert found == {"moe": UNEVEN, "dense": None}
        routes = make_routes(stage.world, now, 5.0, 1)
        assert {row.id: row.expert_balance for row in routes} == found
        other = [row.model_copy(update={"expert_balance": None}) for row in routes]
        assert is_news(other, routes)
    screen = Console(file=io.StringIO(), width=150)
    screen.print(tables.full(status))
    assert isinstance(screen.file, io.StringIO)
    assert "balance of ranks 0.75 (layer 1: 0.50)" in screen.file.getvalue()
