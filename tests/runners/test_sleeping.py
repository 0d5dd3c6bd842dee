"""Sleeping and waking: the rules alone in any order of events, then over HTTP without weights."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.errors import ApiError
from engine.runners.base import Runner, endpoint, make_app
from engine.runners.batching import Batcher, Work
from engine.runners.endpoints import EventStream, event
from engine.runners.sleeping import Sleeper
from engine.runners.spec import RunnerSpec
from tests.runners.asgi import Call
from tests.runners.conftest import StartRunner


class Machine:
    """A sleeper whose changes end when the test says so, and that checks every step it is led to."""

    def __init__(self) -> None:
        self.sleeper = Sleeper("m")
        self.has_memory = True
        self.under_way: asyncio.Future[None] | None = None
        self.visits: list[contextlib.ExitStack] = []
        self.left_work = False
        self.sleeper.stays_awake_while(lambda: self.left_work)
        self.asked: list[asyncio.Task[int]] = []

    async def _change(self, *, to_awake: bool) -> None:
        assert self.under_way is None, "two changes at once"
        assert self.has_memory is not to_awake, "asleep twice or awake twice"
        assert not self.visits and not self.left_work, "a change while a request is in hand"
        self.under_way = asyncio.get_running_loop().create_future()
        try:
            await self.under_way
        finally:
            self.under_way = None
        self.has_memory = to_awake

    async def _status(self, *, to_awake: bool) -> int:
        try:
            if to_awake:
                await self.sleeper.wake_up(lambda: self._change(to_awake=True))
            else:
                await self.sleeper.fall_asleep(lambda: self._change(to_awake=False))
        except ApiError as error:
            return error.status
        return 200

    async def step(self, what: str) -> None:
        if what in ("sleep", "wake"):
            self.asked.append(asyncio.create_task(self._status(to_awake=what == "wake")))
        elif what == "visit":
            stack = contextlib.ExitStack()
            refusal = stack.enter_context(self.sleeper.visit())
            assert (refusal is None) == (self.sleeper.phase == "awake")
            if refusal is None:
                assert self.has_memory and self.under_way is None
                self.visits.append(stack)
            else:
                assert refusal.status == 503 and refusal.headers["retry-after"]
                stack.close()
        elif what == "leave" and self.visits:
            self.visits.pop(0).close()
        elif what == "client goes" and self.visits:
            self.visits.pop(0).close()
            self.left_work = True
        elif what == "work ends":
            self.left_work = False
        elif what == "caller goes" and self.asked:
            self.asked.pop(0).cancel()
        elif what in ("done", "breaks") and self.under_way is not None and not self.under_way.done():
            if what == "done":
                self.under_way.set_result(None)
            else:
                self.under_way.set_exception(RuntimeError("no memory"))
        elif what == "loop":
            for _ in range(4):
                await asyncio.sleep(0)

    async def finish(self) -> None:
        """Everything that was asked for is answered once the changes end."""
        while any(not task.done() for task in self.asked) or self.under_way is not None:
            await self.step("done")
            await self.step("loop")
        assert {task.result() for task in self.asked if not task.cancelled()} <= {200, 409, 500}
        assert self.sleeper.phase in ("awake", "asleep", "failed")
        if self.sleeper.phase != "failed":
            assert self.has_memory is (self.sleeper.phase == "awake")


STEPS = ["sleep", "wake", "visit", "leave", "client goes", "work ends", "caller goes", "done", "loop"]


@given(st.lists(st.sampled_from([*STEPS, "loop", "done"]), max_size=40))
def test_no_order_of_events_takes_memory_from_under_a_request(steps: list[str]) -> None:
    async def run() -> None:
        machine = Machine()
        for step in steps:
            await machine.step(step)
        await machine.finish()
        assert machine.sleeper.phase != "failed"

    asyncio.run(run())


@given(st.lists(st.sampled_from([*STEPS, "breaks"]), max_size=40))
def test_a_failed_change_is_the_last_one(steps: list[str]) -> None:
    async def run() -> None:
        machine = Machine()
        failed = False
        for step in steps:
            await machine.step(step)
            if failed:
                assert machine.sleeper.phase == "failed" and machine.under_way is None
            failed = machine.sleeper.phase == "failed"
        await machine.finish()

    logging.disable(logging.ERROR)  # the traceback of each invented failure
    try:
        asyncio.run(run())
    finally:
        logging.disable(logging.NOTSET)


async def test_a_wake_waits_for_the_sleep_under_way_and_a_sleep_never_for_a_wake() -> None:
    machine = Machine()
    await machine.step("sleep")
    await machine.step("loop")
    await machine.step("wake")
    await machine.step("loop")
    assert machine.sleeper.phase == "falling_asleep"
    await machine.step("done")
    await machine.step("loop")
    assert machine.sleeper.phase == "waking" and machine.asked[0].result() == 200
    await machine.step("sleep")
    await machine.step("loop")
    assert machine.asked[2].result() == 409
    await machine.finish()
    assert machine.sleeper.phase == "awake" and machine.asked[1].result() == 200


class Napper:
    """An engine whose sleep and wake wait for the test's leave; it answers only with its memory."""

    def __init__(self) -> None:
        self.has_memory = True
        self.changes: list[str] = []
        self.gates = {name: threading.Event() for name in ("sleep", "wake", "work")}
        for gate in self.gates.values():
            gate.set()
        self.broken = False
        self.more = asyncio.Event()
        self.batcher: Batcher[str, str]

    def load(self) -> None:
        pass

    def sleep(self) -> None:
        assert self.has_memory
        self._change("sleep")
        self.has_memory = False

    def wake(self) -> None:
        assert not self.has_memory
        self._change("wake")
        if self.broken:
            raise RuntimeError("out of memory: secret detail")
        self.has_memory = True

    def _change(self, name: str) -> None:
        self.changes.append(name)
        assert self.gates[name].wait(10)

    def run(self, _: Any, works: list[Work[str]]) -> list[str | Exception]:
        assert self.gates["work"].wait(10)
        assert self.has_memory
        return ["done" for _ in works]

    def routes(self, runner: Runner) -> list[Route]:
        self.batcher = runner.batcher(self.run)

        async def work(_: Request) -> Response:
            return JSONResponse(await self.batcher.submit("", ""))

        async def stream(_: Request) -> Response:
            async def events() -> AsyncIterator[bytes]:
                yield event("first")
                await self.more.wait()
                assert self.has_memory
                yield event("last")

            return EventStream(events())

        return [
            Route("/v1/work", endpoint(work), methods=["POST"]),
            Route("/v1/stream", endpoint(stream), methods=["POST"]),
        ]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  (a thread changes it, and tells nobody)
            await asyncio.sleep(0.001)


class Served:
    """A runner's app around a napper."""

    def __init__(self, app: Starlette, engine: Napper) -> None:
        self.app, self.engine = app, engine

    def call(self, target: str, method: str = "POST") -> Call:
        return Call(self.app, method, target)

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.call(path, "GET").result()

    async def health(self, status: str) -> int:
        """The code of /health, once it says that the runner has this status."""
        async with asyncio.timeout(10):
            while True:
                code, body = await self.get("/health")
                if body["status"] == status:
                    return code
                await asyncio.sleep(0.001)

    async def metric(self, name: str) -> float:
        call = self.call("/metrics", "GET")
        await call.task
        lines = b"".join(call.parts).decode().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


@contextlib.asynccontextmanager
async def serving(folder: Path, **over: Any) -> AsyncIterator[Served]:
    facts: dict[str, Any] = {
        "model": "nap",
        "category": "embedding",
        "engine": "sentence-transformers",
        "model_dir": folder,
        "socket": folder / "s",
        "can_sleep": True,
        "max_wait_ms": 0,
    }
    spec = RunnerSpec.model_validate(facts | over)
    engine = Napper()
    app = make_app(engine, Runner(spec))
    async with app.router.lifespan_context(app):
        served = Served(app, engine)
        await served.health("ok")
        yield served
        for gate in engine.gates.values():
            gate.set()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as one:
        yield one


async def test_asleep_it_is_well_and_refuses_requests_and_awake_it_answers_again(served: Served) -> None:
    assert await served.get("/is_sleeping") == (200, {"is_sleeping": False})
    assert await served.call("/sleep?level=1&mode=wait").result() == (200, {"is_sleeping": True})
    assert not served.engine.has_memory
    assert await served.get("/is_sleeping") == (200, {"is_sleeping": True})
    assert await served.health("asleep") == 200
    assert await served.metric("hearth_runner_asleep") == 1
    refused = served.call("/v1/work")
    assert await refused.code() == (503, "model_asleep")
    assert int(refused.headers["retry-after"]) >= 1
    assert await served.call("/wake_up").result() == (200, {"is_sleeping": False})
    assert await served.health("ok") == 200
    assert await served.call("/v1/work").result() == (200, "done")
    assert await served.metric("hearth_runner_asleep") == 0
    assert await served.metric("hearth_runner_sleep_seconds_count") == 1
    assert await served.metric("hearth_runner_wake_seconds_count") == 1
    assert await served.metric('hearth_runner_requests_total{status="503"}') == 1


async def test_both_calls_may_be_repeated(served: Served) -> None:
    assert (await served.call("/wake_up").result())[0] == 200
    for _ in range(2):
        assert (await served.call("/sleep").result())[0] == 200
    for _ in range(2):
        assert (await served.call("/wake_up").result())[0] == 200
    assert served.engine.changes == ["sleep", "wake"]


async def test_a_request_in_hand_keeps_it_awake(served: Served) -> None:
    served.engine.gates["work"].clear()
    work = served.call("/v1/work")
    await until(lambda: served.engine.batcher.running == 1)
    assert await served.call("/sleep").code() == (409, "model_busy")
    assert await served.get("/is_sleeping") == (200, {"is_sleeping": False})
    # Its client goes; the thread is still at work with the weights.
    work.gone.set()
    await work.task
    assert await served.call("/sleep").code() == (409, "model_busy")
    served.engine.gates["work"].set()
    await until(lambda: served.engine.batcher.running == 0)
    assert (await served.call("/sleep").result())[0] == 200


async def test_a_stream_keeps_it_awake_to_its_last_byte(served: Served) -> None:
    stream = served.call("/v1/stream")
    await stream.first_part()
    assert await served.call("/sleep").code() == (409, "model_busy")
    served.engine.more.set()
    await stream.task
    assert stream.parts == [b'data: "first"\n\n', b'data: "last"\n\n']
    assert (await served.call("/sleep").result())[0] == 200
    assert served.engine.changes == ["sleep"]


async def test_who_asks_while_it_falls_asleep_or_wakes_joins_or_is_refused(served: Served) -> None:
    engine = served.engine
    engine.gates["sleep"].clear()
    sleeps = [served.call("/sleep") for _ in range(3)]
    assert await served.health("falling_asleep") == 200
    assert await served.call("/v1/work").code() == (503, "model_asleep")
    engine.gates["wake"].clear()
    wakes = [served.call("/wake_up")]
    engine.gates["sleep"].set()
    assert [(await call.result())[0] for call in sleeps] == [200] * 3
    assert await served.health("waking") == 200
    wakes += [served.call("/wake_up") for _ in range(3)]
    assert await served.get("/is_sleeping") == (200, {"is_sleeping": True})
    assert await served.call("/v1/work").code() == (503, "model_asleep")
    assert await served.call("/sleep").code() == (409, "model_busy")
    wakes[0].task.cancel()  # who has begun it may go: the others still get their answer
    engine.gates["wake"].set()
    assert [(await call.result())[0] for call in wakes[1:]] == [200] * 3
    assert engine.changes == ["sleep", "wake"]


async def test_a_wake_that_fails_is_told_without_its_reason_and_leaves_it_unwell(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.engine.broken = True
    await served.call("/sleep").result()
    first, second = served.call("/wake_up"), served.call("/wake_up")
    for call in (first, second):
        assert await call.code() == (500, "sleep_failed")
        assert b"secret" not in b"".join(call.parts)
    assert "out of memory: secret detail" in caplog.text
    assert await served.health("failed") == 503
    served.engine.broken = False
    assert await served.call("/wake_up").code() == (500, "sleep_failed")
    assert await served.call("/sleep").code() == (500, "sleep_failed")
    assert await served.call("/v1/work").code() == (503, "model_failed")
    assert served.engine.changes == ["sleep", "wake"]


async def test_other_levels_and_other_methods_are_refused(served: Served) -> None:
    for level in ("0", "2", "", "x"):
        assert await served.call(f"/sleep?level={level}").code() == (400, "invalid_value")
    assert await served.call("/sleep", "GET").code() == (404, "unknown_path")
    assert await served.call("/wake_up", "GET").code() == (404, "unknown_path")
    assert served.engine.changes == []


async def test_while_it_loads_it_neither_sleeps_nor_wakes(served: Served) -> None:
    served.app.state.runner.state = "loading"
    assert await served.call("/sleep").code() == (503, "model_loading")
    assert await served.call("/wake_up").code() == (503, "model_loading")
    served.app.state.runner.state = "ok"


async def test_a_resident_runner_has_no_such_paths(tmp_path: Path) -> None:
    async with serving(tmp_path, can_sleep=False) as served:
        assert await served.call("/sleep").code() == (404, "unknown_path")
        assert await served.call("/wake_up").code() == (404, "unknown_path")
        assert await served.call("/is_sleeping", "GET").code() == (404, "unknown_path")


async def test_a_runner_that_sleeps_is_as_private_as_any(start_runner: StartRunner) -> None:
    started = start_runner("tests.runners.dummy", can_sleep=True)
    await started.ready()
    assert stat.S_IMODE(started.socket.stat().st_mode) == 0o600
    async with started.session() as session, session.get("/is_sleeping") as answer:
        assert (answer.status, await answer.json()) == (200, {"is_sleeping": False})
