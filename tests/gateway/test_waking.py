"""Requests for a sleeping model: they wait together, bounded, and leave no demand behind."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.gateway.control import ControlClient
from engine.gateway.exchange import Exchange
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.routing import Directory, Served
from engine.gateway.upstream import Upstream
from engine.gateway.waking import Waking, refusal
from engine.routes import ModelRoute, Replica, RouteTable
from tests.gateway.dummy import KEY, DummyRunner, House, open_house, route, until
from tests.gateway.scheduler import FakeScheduler

CHAT = "/v1/chat/completions"
ASK = {"model": "dummy", "messages": [{"role": "user", "content": "hello"}]}


def asleep(name: str = "dummy", **more: Any) -> ModelRoute:
    return route(name, **{"state": "asleep", "tier": "standby", "wake_wait_s": 5.0, **more})


def awake(name: str, *runners: DummyRunner, **more: Any) -> ModelRoute:
    return route(name, *runners, **{"tier": "standby", "wake_wait_s": 5.0, **more})


async def metric(house: House, name: str, model: str = "dummy") -> float:
    _, text, _ = await house.get("/metrics")
    lines = [line for line in text.splitlines() if line.startswith(f'{name}{{model="{model}"}}')]
    return float(lines[0].split()[-1]) if lines else 0.0


async def waiting(house: House, count: int, model: str = "dummy") -> None:
    """Waits until so many requests wait."""
    await until(lambda: house.gateway._waking.waiting(model) == count)


async def test_a_hundred_requests_join_one_call(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with (
        open_house(tmp_path, asleep()) as house,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as house.http,
    ):
        asking = [asyncio.create_task(house.post(CHAT, ASK)) for _ in range(100)]
        await waiting(house, 100)
        assert await metric(house, "hearth_gateway_waiting") == 100
        await until(lambda: scheduler.held)
        assert scheduler.wakes == [{"model": "dummy", "worker": os.getpid()}]
        assert scheduler.held == ["dummy"]
        scheduler.wake_up("dummy")
        # The answer alone sends nobody off: the table does.
        await until(lambda: not scheduler.held)
        assert not runner.seen
        house.serve(awake("dummy", runner))
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 100
        assert len(runner.seen) == 100
        assert await metric(house, "hearth_gateway_waiting") == 0
        assert await metric(house, "hearth_gateway_wake_wait_seconds_count") == 100


async def test_the_table_alone_ends_the_wait_and_the_call(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        house.serve(asleep(state="waking", eta_s=3))
        await asyncio.sleep(0.02)
        assert not asking.done() and scheduler.given_up == 0
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200
        await until(lambda: scheduler.given_up == 1)
        assert len(scheduler.wakes) == 1


async def test_the_last_to_leave_takes_the_demand_along(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep()) as house:
        first, second = (asyncio.create_task(house.post(CHAT, ASK)) for _ in range(2))
        await waiting(house, 2)
        first.cancel()
        await waiting(house, 1)
        await until(lambda: scheduler.held)
        assert (scheduler.held, scheduler.given_up) == (["dummy"], 0)
        second.cancel()
        await until(lambda: scheduler.given_up == 1)
        assert scheduler.held == [] and await metric(house, "hearth_gateway_waiting") == 0
        _, text, _ = await house.get("/metrics")
        assert f'hearth_gateway_requests_total{{endpoint="{CHAT}",model="dummy",status="499"}} 2.0' in text
        # Whoever comes after asks anew.
        third = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: len(scheduler.wakes) == 2)
        house.serve(awake("dummy", runner))
        assert (await third)[0] == 200


async def test_over_the_bound_a_client_hears_how_it_stands(tmp_path: Path, scheduler: FakeScheduler) -> None:
    async with open_house(tmp_path, asleep(wake_wait_s=0.05)) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        house.serve(asleep(wake_wait_s=0.05, state="waking", reason="making room for it", eta_s=7.5))
        status, body, headers = await asking
        error = body["error"]
        assert (status, error["code"], error["param"]) == (503, "model_not_ready", "model")
        loading = error["loading"]
        assert (loading["state"], loading["reason"]) == ("waking", "making room for it")
        assert 7 < loading["expected_s"] <= 7.5 and 0 < loading["elapsed_s"] < 5
        assert headers["retry-after"] == "8" and 7000 < int(headers["retry-after-ms"]) <= 7500
        assert "waking up (making room for it)" in error["message"]
        assert "waited for it as long as it may, 0.05 s" in error["message"]
        await until(lambda: scheduler.given_up == 1)


async def test_more_than_may_wait_are_refused_at_once(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep(most_waiting=2, eta_s=30)) as house:
        asking = [asyncio.create_task(house.post(CHAT, ASK)) for _ in range(2)]
        await waiting(house, 2)
        status, body, headers = await house.post(CHAT, ASK)
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert "2 requests wait for it already" in body["error"]["message"]
        assert 29 <= int(headers["retry-after"]) <= 30
        house.serve(awake("dummy", runner))
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200, 200]


async def test_bodies_that_wait_are_bounded_together(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.gateway.waking._MOST_BYTES", 1000)
    long = {**ASK, "user": "x" * 2000}
    async with open_house(tmp_path, asleep()) as house:
        # One may always wait, however long it is.
        asking = asyncio.create_task(house.post(CHAT, long))
        await until(lambda: scheduler.held)
        status, body, _ = await house.post(CHAT, long)
        assert status == 503 and "bodies of waiting requests" in body["error"]["message"]
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200
        house.serve(asleep())
        asking = asyncio.create_task(house.post(CHAT, long))
        await waiting(house, 1)
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200


async def test_a_model_that_cannot_be_woken_says_why_at_once(
    tmp_path: Path, scheduler: FakeScheduler
) -> None:
    scheduler.answers["dummy"] = (409, {"reason": "every device that it needs is pinned"})
    async with open_house(tmp_path, asleep()) as house:
        status, body, headers = await house.post(CHAT, ASK)
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert "every device that it needs is pinned" in body["error"]["message"]
        assert body["error"]["loading"]["reason"] == "every device that it needs is pinned"
        assert headers["retry-after"] == "10"
        # It is asked anew for the next request: things may have changed.
        scheduler.answers["dummy"] = (404, {"error": {"message": "no such model"}})
        _, body, _ = await house.post(CHAT, ASK)
        assert "no such model" in body["error"]["message"]
        assert len(scheduler.wakes) == 2


async def test_a_server_that_stops_keeps_nobody_waiting(tmp_path: Path, scheduler: FakeScheduler) -> None:
    scheduler.answers["dummy"] = (503, {"error": {"message": "Hearth is stopping."}})
    async with open_house(tmp_path, asleep()) as house:
        status, body, _ = await house.post(CHAT, ASK)
        assert (status, body["error"]["loading"]["reason"]) == (503, "Hearth is stopping")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"reason": "is pinned"}', "is pinned"),
        (b'{"error": {"message": "is gone"}}', "is gone"),
        (b"409: not standby\n", "409: not standby"),
        (b"", "the scheduler does not say why"),
        (b"[1]", "the scheduler does not say why"),
        (b"\xff{", "�{"),
    ],
)
def test_a_refusal_is_read_whatever_its_shape(body: bytes, reason: str) -> None:
    assert refusal(body) == reason


@pytest.mark.parametrize("state", ["planned", "starting", "warming", "asleep", "waking", "draining"])
async def test_a_model_that_comes_back_is_waited_for(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, state: str
) -> None:
    async with open_house(tmp_path, asleep(state=state)) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200


@pytest.mark.parametrize("state", ["preparing", "failed", "backoff", "stopped"])
async def test_a_model_that_does_not_is_a_503_at_once_also_for_those_who_wait(
    tmp_path: Path, scheduler: FakeScheduler, state: str
) -> None:
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        house.serve(asleep(state=state, reason="out of memory"))
        for status, body, _ in (await asking, await house.post(CHAT, ASK)):
            assert (status, body["error"]["loading"]["state"]) == (503, state)
            assert body["error"]["loading"]["reason"] == "out of memory"
        assert len(scheduler.wakes) == 1


async def test_a_model_taken_out_of_service_is_a_404_for_those_who_wait(
    tmp_path: Path, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        house.serve(asleep("other"))
        status, body, _ = await asking
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_resident_model_is_not_waited_for(tmp_path: Path, scheduler: FakeScheduler) -> None:
    async with open_house(tmp_path, route("dummy", state="warming", eta_s=4)) as house:
        await asyncio.sleep(0.06)
        status, body, headers = await house.post(CHAT, ASK)
        loading = body["error"]["loading"]
        assert (status, loading["state"], headers["retry-after"]) == (503, "warming", "4")
        assert 0 < loading["elapsed_s"] < 5
        assert scheduler.wakes == []


async def test_two_models_are_waited_for_each_by_itself(
    tmp_path: Path, runner: DummyRunner, second: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep("a"), asleep("b")) as house:
        one, other = (asyncio.create_task(house.post(CHAT, {**ASK, "model": name})) for name in "ab")
        await until(lambda: sorted(scheduler.held) == ["a", "b"])
        house.serve(asleep("a"), awake("b", second))
        status, body, _ = await other
        assert (status, body["model"]) == (200, "second")
        await until(lambda: scheduler.held == ["a"])
        assert not one.done()
        house.serve(awake("a", runner), asleep("b"))
        status, body, _ = await one
        assert (status, body["model"]) == (200, "dummy")


async def test_a_runner_that_sleeps_after_all_is_no_answer(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "asleep"
    async with open_house(tmp_path, awake("dummy", runner)) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        # The table that was in force when it said so is not believed, however long it is.
        await asyncio.sleep(0.1)
        assert runner.asleep == 1 and not asking.done()
        runner.behaviour = "echo"
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200
        assert [body for _, _, body in runner.seen] == [json.dumps(ASK).encode()] * 2
        assert await metric(house, "hearth_gateway_in_flight") == 0


async def test_the_schedulers_word_ends_the_wait_for_one_that_slept_after_all(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "asleep"
    async with open_house(tmp_path, awake("dummy", runner)) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: scheduler.held)
        runner.behaviour = "echo"
        scheduler.wake_up("dummy")
        assert (await asking)[0] == 200


async def test_another_replica_takes_over_from_one_that_sleeps(
    tmp_path: Path, runner: DummyRunner, second: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "asleep"
    async with open_house(tmp_path, awake("dummy", runner, second)) as house:
        for _ in range(4):
            status, body, _ = await house.post(CHAT, ASK)
            assert (status, body["model"]) == (200, "second")
        assert runner.asleep > 0 and scheduler.wakes == []


async def test_one_that_sleeps_on_costs_the_bound_once(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    """The scheduler says "ready" to every call, the runner "asleep" to every request."""
    runner.behaviour = "asleep"
    scheduler.wake_up("dummy")
    async with open_house(tmp_path, awake("dummy", runner, wake_wait_s=0.3)) as house:
        began = asyncio.get_running_loop().time()
        status, body, headers = await house.post(CHAT, ASK)
        took = asyncio.get_running_loop().time() - began
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert int(headers["retry-after"]) >= 1
        assert 0.3 <= took < 2
        # Sent again, but with longer and longer waits between.
        assert 2 <= runner.asleep <= 8


async def test_all_waits_of_a_request_are_bounded_together(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "asleep"
    async with open_house(tmp_path, asleep(wake_wait_s=0.6)) as house:
        began = asyncio.get_running_loop().time()
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await asyncio.sleep(0.4)
        house.serve(awake("dummy", runner, wake_wait_s=0.6))
        assert (await asking)[0] == 503
        assert 0.6 <= asyncio.get_running_loop().time() - began < 0.95
        assert runner.asleep == 1


async def test_a_sleeping_runner_of_a_model_not_to_be_waited_for_is_a_503(
    house: House, runner: DummyRunner
) -> None:
    runner.behaviour = "asleep"
    status, body, _ = await house.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (503, "model_not_ready")


async def test_the_scheduler_may_be_away_and_come_back(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    await scheduler.stop()
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await waiting(house, 1)
        await scheduler.start()
        await until(lambda: scheduler.held)
        await scheduler.stop()
        await until(lambda: not scheduler.held)
        assert not asking.done()
        await scheduler.start()
        await until(lambda: scheduler.held)
        assert len(scheduler.wakes) == 2
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200


async def test_without_a_scheduler_the_bound_holds_too(tmp_path: Path, short: Path) -> None:
    async with open_house(tmp_path, asleep(wake_wait_s=0.1)) as house:
        status, body, _ = await house.post(CHAT, ASK)
        assert (status, body["error"]["loading"]["state"]) == (503, "asleep")


async def test_a_scheduler_that_stumbles_is_asked_again(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    scheduler.answers["dummy"] = (500, {})
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: len(scheduler.wakes) == 2)
        del scheduler.answers["dummy"]
        await until(lambda: scheduler.held)
        house.serve(awake("dummy", runner))
        assert (await asking)[0] == 200


async def test_a_stream_waits_for_its_model(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "stream"
    runner.go_on.set()
    async with open_house(tmp_path, asleep()) as house:

        async def words() -> list[str | None]:
            stream = await house.openai.chat.completions.create(
                model="dummy", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            found = []
            async for event in stream:
                found.append(event.choices[0].delta.content)
                runner.go_on.set()
            return found

        asking = asyncio.create_task(words())
        await until(lambda: scheduler.held)
        house.serve(awake("dummy", runner))
        assert await asking == ["one ", "two ", "three"]


async def test_a_recording_waits_for_its_model(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep("ears", category="audio")) as house:
        form = aiohttp.FormData({"model": "ears"})
        form.add_field("file", b"RIFF" * 1000, filename="a.wav")
        asking = asyncio.create_task(house.post("/v1/audio/transcriptions", data=form))
        await until(lambda: scheduler.held)
        house.serve(awake("ears", runner, category="audio"))
        assert (await asking)[0] == 200
        assert b"RIFF" * 1000 in runner.seen[0][2]


async def test_a_picture_to_paint_waits_for_its_model(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with open_house(tmp_path, asleep("brush", category="image")) as house:
        asking = asyncio.create_task(
            house.post("/v1/images/generations", {"model": "brush", "prompt": "a hearth"})
        )
        await until(lambda: scheduler.held)
        house.serve(awake("brush", runner, category="image"))
        assert (await asking)[0] == 200


async def test_pictures_are_fetched_after_the_wait(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[bytes] = []

    async def settle(body: bytes, endpoint: str) -> bytes:
        settled.append(body)
        return body

    async with open_house(tmp_path, asleep("eyes", category="detection")) as house:
        monkeypatch.setattr(house.gateway._pictures, "settle", settle)
        body = {"model": "eyes", "image": "https://pictures.example/cat.png"}
        asking = asyncio.create_task(house.post("/v1/detections", body))
        await waiting(house, 1, "eyes")
        assert settled == []
        house.serve(awake("eyes", runner, category="detection"))
        assert (await asking)[0] == 200
        assert len(settled) == 1


async def test_a_request_that_the_model_cannot_take_wakes_nobody(
    tmp_path: Path, scheduler: FakeScheduler
) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://pictures.example/cat.png"}}
    async with open_house(tmp_path, asleep()) as house:
        body = {"model": "dummy", "messages": [{"role": "user", "content": [picture]}]}
        assert (await house.post(CHAT, body))[0] == 400
        assert scheduler.wakes == []


async def test_the_openai_client_comes_back_when_it_was_told_to(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    async with (
        open_house(tmp_path, asleep(wake_wait_s=0.05, eta_s=1)) as house,
        openai.AsyncOpenAI(base_url=f"{house.base}/v1", api_key=KEY, max_retries=1, timeout=10) as client,
    ):
        began = asyncio.get_running_loop().time()
        asking = asyncio.create_task(
            client.chat.completions.create(model="dummy", messages=[{"role": "user", "content": "hello"}])
        )
        await until(lambda: scheduler.given_up == 1)
        house.serve(awake("dummy", runner))
        assert (await asking).choices[0].message.content == "hi"
        # The SDK's own first retry would come after half a second.
        assert asyncio.get_running_loop().time() - began >= 1


async def test_sleeping_and_waking_models_are_served_models(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    rows = [asleep("a"), asleep("b", state="waking", eta_s=2), asleep("c", state="draining")]
    async with open_house(tmp_path, route("dummy", runner), *rows) as house:
        assert (await house.get("/ready"))[0] == 200
        models = {model.id: model.to_dict() async for model in house.openai.models.list()}
        assert [models[name]["state"] for name in "abc"] == ["asleep", "waking", "draining"]
        loading = models["b"]["loading"]
        assert isinstance(loading, dict) and loading["elapsed_s"] is not None
        assert models["a"]["loading"] == {
            "state": "asleep",
            "reason": "",
            "elapsed_s": None,
            "expected_s": None,
        }
        _, text, _ = await house.get("/metrics")
        assert 'hearth_model_state{category="chat",model="b",state="waking"} 1.0' in text
        # A resident on its way out is not fine, and neither is a standby model that has failed.
        house.serve(route("dummy", state="draining"), asleep("a", state="backoff"))
        _, text, _ = await house.get("/ready")
        assert [row["id"] for row in json.loads(text)["error"]["models"]] == ["dummy", "a"]


class HeldCalls(ControlClient):
    """Holds every call until it is cancelled or told what to answer."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.held: dict[str, asyncio.Future[tuple[int, bytes]]] = {}

    async def post(self, path: str, message: Any, *, within_s: float | None) -> tuple[int, bytes]:
        model = message["model"]
        assert path == "/wake" and model not in self.held, "one call for a model at a time"
        self.held[model] = asyncio.get_running_loop().create_future()
        try:
            return await self.held[model]
        finally:
            del self.held[model]


_MODELS = st.sampled_from("ab")
_STEPS = st.one_of(
    st.tuples(st.just("come"), _MODELS),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["ready", "sleep", "fail", "answer", "refuse"]), _MODELS),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_STEPS, max_size=25))
def test_a_call_is_held_exactly_while_somebody_waits(steps: list[tuple[str, Any]]) -> None:
    asyncio.run(_walk(steps))


async def _walk(steps: list[tuple[str, Any]]) -> None:
    directory = Directory(lambda id, address: Upstream(id, address, connect_timeout_s=1))
    calls = HeldCalls()
    waking = Waking(directory, GatewayMetrics(), calls, worker=1)
    rows = {name: asleep(name, most_waiting=3) for name in "ab"}
    waiters: list[tuple[str, asyncio.Task[Any]]] = []
    every: list[asyncio.Task[Any]] = []
    answered: set[str] = set()

    def publish() -> None:
        directory.replace(RouteTable(version=directory.version + 1, models=list(rows.values())))

    publish()
    for what, which in steps:
        if what == "come":
            exchange = Exchange({"headers": []}, _nobody)
            every.append(asyncio.create_task(waking.until_ready(exchange, which)))
            waiters.append((which, every[-1]))
        elif what == "leave" and which < len(waiters):
            waiters.pop(which)[1].cancel()
        elif what == "ready":
            replica = Replica(id=f"{which}-0", socket=f"/{which}")
            rows[which] = awake(which).model_copy(update={"replicas": [replica], "state": "ready"})
            publish()
        elif what in ("sleep", "fail"):
            rows[which] = asleep(which, most_waiting=3, state="asleep" if what == "sleep" else "failed")
            publish()
        elif what in ("answer", "refuse") and which in calls.held and not calls.held[which].done():
            status, body = (200, b"{}") if what == "answer" else (409, b"no")
            calls.held[which].set_result((status, body))
            answered.add(which)
        # A few turns of the loop: whatever follows from the step has happened.
        for _ in range(6):
            await asyncio.sleep(0)
        for model, row in rows.items():
            left = [task for name, task in waiters if name == model and not task.done()]
            assert waking.waiting(model) == len(left) <= 3
            assert not left or row.state == "asleep", "whoever need not wait has been answered"
            if not left:
                answered.discard(model)
            # After an answer nothing is held for a moment.
            assert (model in calls.held) == bool(left) or (left and model in answered)
    for _, task in waiters:
        task.cancel()
    for ended in await asyncio.gather(*every, return_exceptions=True):
        if isinstance(ended, ApiError):
            assert ended.code == "model_not_ready"
        else:
            assert isinstance(ended, Served | asyncio.CancelledError)
    await waking.close()
    assert not calls.held and waking.waiting("a") == waking.waiting("b") == 0


async def _nobody(message: Any) -> None:
    raise AssertionError("nothing is sent while waiting")
