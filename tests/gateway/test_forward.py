"""Bytes through the gateway: untouched, at once, cancelled with their client."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from pathlib import Path

import aiohttp
import openai
import pytest

from engine.gateway.exchange import Exchange
from engine.routes import Replica
from tests.gateway.dummy import KEY, DummyRunner, House, chunk, open_house, route, until

CHAT = "/v1/chat/completions"
ASK = {"model": "dummy", "messages": [{"role": "user", "content": "hello"}]}


async def test_the_openai_client_gets_an_answer(house: House, runner: DummyRunner) -> None:
    answer = await house.openai.chat.completions.create(
        model="dummy", messages=[{"role": "user", "content": "hello"}]
    )
    assert answer.choices[0].message.content == "hi"
    assert answer._request_id is not None and answer._request_id.startswith("req_")


async def test_a_body_arrives_byte_for_byte_and_the_key_stays_here(house: House, runner: DummyRunner) -> None:
    odd = b'{ "x": 1e2,"model" :"dummy",\n"messages":[{"role":"user","content":"gr\xc3\xbc\\u00df"}] }'
    await house.post(CHAT, data=odd, headers={"content-type": "application/json; charset=utf-8"})
    path, headers, body = runner.seen[0]
    assert (path, body) == (CHAT, odd)
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert "authorization" not in headers and "cookie" not in headers


async def test_a_long_body_arrives_byte_for_byte(house: House, runner: DummyRunner) -> None:
    body = json.dumps({"messages": ["word " * 1_000_000], "model": "dummy"}).encode()
    status, _, _ = await house.post(CHAT, data=body, headers={"content-type": "application/json"})
    assert status == 200
    assert runner.seen[0][2] == body
    assert runner.seen[0][1]["content-length"] == str(len(body))


async def test_a_chunked_body_is_forwarded(house: House, runner: DummyRunner) -> None:
    async def pieces():  # type: ignore[no-untyped-def]  # an async generator of bytes
        yield b'{"model": "dum'
        yield b'my"}'

    status, _, _ = await house.post(CHAT, data=pieces(), headers={"content-type": "application/json"})
    assert status == 200
    assert runner.seen[0][2] == b'{"model": "dummy"}'


async def test_events_come_as_they_are_made(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "stream"
    stream = await house.openai.chat.completions.create(
        model="dummy", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    events = aiter(stream)
    first = await asyncio.wait_for(anext(events), 2)
    # The runner has not been let go on: the first event came alone.
    assert first.choices[0].delta.content == "one "
    runner.go_on.set()
    rest = [event.choices[0].delta.content async for event in events]
    assert rest == ["two ", "three"]


async def test_a_stream_is_passed_on_byte_for_byte(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "quick_stream"
    runner.body = b": ping\r\n\r\n" + chunk("gr\u00fc\u00df") + b"data: [DONE]\n\n" + b"event: no end"
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    async with house.http.post(house.base + CHAT, data=json.dumps(ASK), headers=headers) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert await response.read() == runner.body


async def test_answer_headers_pass_but_those_of_the_connection(house: House, runner: DummyRunner) -> None:
    runner.headers = {"x-from-runner": "yes", "server": "secret/1", "keep-alive": "timeout=3"}
    _, _, headers = await house.post(CHAT, ASK, headers={"x-request-id": "mine-1"})
    assert headers["x-from-runner"] == "yes"
    assert headers["x-request-id"] == "mine-1"
    assert int(headers["openai-processing-ms"]) >= 0
    assert "server" not in headers and "keep-alive" not in headers
    assert runner.seen[0][1]["x-request-id"].startswith("mine-1-")


@pytest.mark.parametrize("bad", ["has space", "x" * 200, "új"])
async def test_a_request_id_that_is_not_sane_is_replaced(house: House, bad: str) -> None:
    _, _, headers = await house.post(CHAT, ASK, headers={"x-request-id": bad})
    assert headers["x-request-id"].startswith("req_")


async def test_a_client_that_leaves_cancels_the_work(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "slow"
    asking = asyncio.create_task(house.post(CHAT, ASK))
    await asyncio.wait_for(runner.arrived.wait(), 2)
    asking.cancel()
    await until(lambda: runner.cancelled == 1)
    _, text, _ = await house.get("/metrics")
    assert 'hearth_gateway_in_flight{model="dummy"} 0.0' in text
    assert 'status="499"' in text


async def test_a_client_that_leaves_a_stream_cancels_the_work(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "endless_stream"
    stream = await house.openai.chat.completions.create(
        model="dummy", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: runner.cancelled == 1)


async def test_a_stream_that_breaks_off_ends_with_an_error_event(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "break_stream"
    stream = await house.openai.chat.completions.create(
        model="dummy", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    words = []
    with pytest.raises(openai.APIError) as caught:
        async for event in stream:
            words.append(event.choices[0].delta.content)
    assert words == ["one "]
    assert "dummy" in caught.value.message
    assert caught.value.code == "runner_lost"


async def test_a_long_answer_that_breaks_off_never_looks_whole(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "break_bytes"
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)):
        await house.post("/v1/chat/completions", ASK)


async def test_a_runner_that_dies_before_it_answers_is_a_503(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "die"
    status, body, headers = await house.post(CHAT, ASK)
    assert status == 503
    assert body["error"]["type"] == "service_unavailable_error"
    assert body["error"]["code"] == "runner_lost"
    assert "dummy" in body["error"]["message"]
    assert 1 <= int(headers["retry-after"]) <= 120
    # It may have begun the work: the request was not sent twice.
    assert len(runner.seen) == 1


async def test_a_connection_grown_stale_is_tried_once_more(house: House, runner: DummyRunner) -> None:
    await house.post(CHAT, ASK)
    await runner.stop()
    await runner.start()
    status, _, _ = await house.post(CHAT, ASK)
    assert status == 200
    assert len(runner.seen) == 2


async def test_a_reused_connection_that_closes_at_once_is_tried_once_more(
    house: House, runner: DummyRunner
) -> None:
    await house.post(CHAT, ASK)
    runner.behaviour = "die"
    status, body, _ = await house.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (503, "runner_lost")
    assert len(runner.seen) == 3


async def test_another_replica_takes_over_from_one_that_is_away(
    tmp_path: Path, runner: DummyRunner, second: DummyRunner
) -> None:
    async with open_house(tmp_path, route("dummy", runner, second)) as house:
        await runner.stop()
        for _ in range(3):
            status, body, _ = await house.post(CHAT, ASK)
            assert (status, body["model"]) == (200, "second")


async def test_the_replica_with_fewest_in_flight_is_chosen(
    tmp_path: Path, runner: DummyRunner, second: DummyRunner
) -> None:
    runner.behaviour = second.behaviour = "slow"
    async with open_house(tmp_path, route("dummy", runner, second)) as house:
        asking = [asyncio.create_task(house.post(CHAT, ASK)) for _ in range(6)]
        await until(lambda: len(runner.seen) + len(second.seen) == 6)
        assert (len(runner.seen), len(second.seen)) == (3, 3)
        runner.go_on.set()
        second.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 6


async def test_more_than_a_model_takes_is_a_429(tmp_path: Path, runner: DummyRunner) -> None:
    runner.behaviour = "slow"
    async with open_house(tmp_path, route("dummy", runner, max_in_flight=1)) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await asyncio.wait_for(runner.arrived.wait(), 2)
        status, body, headers = await house.post(CHAT, ASK)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert body["error"]["type"] == "rate_limit_error"
        assert headers["retry-after"] == "1"
        runner.go_on.set()
        assert (await asking)[0] == 200


async def test_a_request_that_takes_too_long_is_a_504(tmp_path: Path, runner: DummyRunner) -> None:
    runner.behaviour = "slow"
    async with open_house(tmp_path, route("dummy", runner), gateway={"request_timeout_s": 0.05}) as house:
        status, body, _ = await house.post(CHAT, ASK)
        assert (status, body["error"]["code"]) == (504, "request_timeout")
        await until(lambda: runner.cancelled == 1)


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    tmp_path: Path, runner: DummyRunner
) -> None:
    runner.behaviour = "endless_stream"
    async with open_house(tmp_path, route("dummy", runner), gateway={"request_timeout_s": 0.1}) as house:
        stream = await house.openai.chat.completions.create(
            model="dummy", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "request_timeout"


async def test_a_stop_that_cannot_wait_longer_answers_in_the_envelope(
    house: House, runner: DummyRunner
) -> None:
    runner.behaviour = "slow"
    asking = asyncio.create_task(house.post(CHAT, ASK))
    await asyncio.wait_for(runner.arrived.wait(), 2)
    house.server.config.timeout_graceful_shutdown = 0
    await house.server.shutdown()
    status, body, headers = await asking
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "server_stopping", "5")
    await until(lambda: runner.cancelled == 1)


async def test_a_replica_out_of_the_table_finishes_its_request(house: House, runner: DummyRunner) -> None:
    runner.behaviour = "slow"
    asking = asyncio.create_task(house.post(CHAT, ASK))
    await asyncio.wait_for(runner.arrived.wait(), 2)
    house.serve(route("dummy", state="draining"))
    assert (await house.post(CHAT, ASK))[0] == 503
    runner.go_on.set()
    assert (await asking)[0] == 200


async def test_a_runner_on_another_machine_is_reached_by_its_url(house: House, runner: DummyRunner) -> None:
    port = await runner.listen_on_tcp()
    row = route("far")
    row.replicas = [Replica(id="far-0", url=f"http://127.0.0.1:{port}/")]
    house.serve(row)
    status, body, _ = await house.post(CHAT, {"model": "far"})
    assert (status, body["model"]) == (200, "dummy")
    assert runner.seen[0][0] == CHAT


async def test_clients_that_come_and_go_leave_no_count_behind(
    tmp_path: Path, runner: DummyRunner, second: DummyRunner
) -> None:
    chance = random.Random(7)
    async with open_house(tmp_path, route("dummy", runner, second)) as house:

        async def one(i: int) -> int:
            try:
                async with asyncio.timeout(chance.choice([0.005, 0.02, 1])):
                    return (await house.post(CHAT, ASK))[0]
            except TimeoutError:
                return 0

        for behaviour in ("slow", "endless_stream", "die", "break_bytes"):
            runner.behaviour, second.behaviour = behaviour, "echo"
            runner.go_on.set()
            statuses = await asyncio.gather(*(one(i) for i in range(30)), return_exceptions=True)
            assert 200 in statuses
        served = house.gateway.directory.find("dummy")
        await until(lambda: [each.in_flight for each in served.upstreams] == [0, 0])
        _, text, _ = await house.get("/metrics")
        assert 'hearth_gateway_in_flight{model="dummy"} 0.0' in text


async def test_what_a_request_needed_is_freed_at_once(house: House, runner: DummyRunner) -> None:
    def kept() -> int:
        return sum(isinstance(each, Exchange) for each in gc.get_objects())

    await house.post(CHAT, ASK)
    gc.collect()
    gc.disable()
    try:
        before = kept()
        for _ in range(20):
            assert (await house.post(CHAT, ASK))[0] == 200
            assert (await house.post(CHAT, {**ASK, "model": "unknown"}))[0] == 404
        # The last one's may still be in the server's hands.
        assert kept() <= before + 2
    finally:
        gc.enable()
