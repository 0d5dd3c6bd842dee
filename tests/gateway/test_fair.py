"""The fair line in the gateway: who waits, who is refused and with what words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engine.config import Config
from engine.gateway.fair.gate import Gate
from engine.metering import keys
from engine.metering.opening import opened
from tests.gateway.dummy import DummyRunner, House, open_house, route, until

CHAT = "/v1/chat/completions"
ASK = {"model": "dummy", "messages": [{"role": "user", "content": "hello"}]}
OTHER = "hearth-test-key-of-another-0123456789"


def gate_of(house: House) -> Gate:
    return house.gateway._gate


def nothing_left(gate: Gate) -> bool:
    return gate._bytes == 0 and all(queue.line.is_idle for queue in gate._queues.values())


@contextlib.asynccontextmanager
async def busy_house(
    folder: Path, runner: DummyRunner, *, max_batch: int = 1, **fairness: Any
) -> AsyncIterator[House]:
    """A gateway with two keys whose runner answers when it is told to go on."""
    async with opened(Config(state_dir=folder)) as database:
        await keys.create(database, key=OTHER, name="other")
    runner.behaviour = "slow"
    async with open_house(folder, route("dummy", runner, max_batch=max_batch), fairness=fairness) as house:
        yield house
        runner.go_on.set()
        await until(lambda: nothing_left(gate_of(house)))


def send(house: House, text: str = "hello", *, key: str | None = None, **more: Any) -> asyncio.Task[Any]:
    body = {**ASK, "messages": [{"role": "user", "content": text}], **more}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return asyncio.create_task(house.post(CHAT, body, headers=headers))


def texts(runner: DummyRunner) -> list[str]:
    """What the runner has been sent, in its order."""
    return [json.loads(body)["messages"][0]["content"] for _, _, body in runner.seen]


async def test_no_more_than_the_window_are_at_a_replica(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner, max_batch=2) as house:
        tasks = [send(house) for _ in range(5)]
        await until(lambda: gate_of(house).waiting("dummy") == 3)
        await until(lambda: len(runner.seen) == 2)
        assert house.gateway._usage.report()["models"]["dummy"]["waiting"] == 3
        _, metrics, _ = await house.get("/metrics")
        assert 'hearth_queue_waiting{model="dummy"} 3.0' in metrics
        runner.go_on.set()
        assert {(await task)[0] for task in tasks} == {200}
        _, metrics, _ = await house.get("/metrics")
        assert 'hearth_queue_waiting{model="dummy"} 0.0' in metrics
        assert 'hearth_queue_wait_seconds_count{model="dummy"} 3.0' in metrics


async def test_the_window_is_divided_among_workers_and_counts_all_replicas(
    short: Path, tmp_path: Path, runner: DummyRunner, second: DummyRunner
) -> None:
    runner.behaviour = second.behaviour = "slow"
    row = route("dummy", runner, second, max_batch=3)
    async with open_house(tmp_path, row, gateway={"workers": 4}, fairness={"window_factor": 2}) as house:
        tasks = [send(house) for _ in range(5)]
        await until(lambda: gate_of(house).waiting("dummy") == 2)
        await until(lambda: len(runner.seen) + len(second.seen) == 3)
        runner.go_on.set()
        second.go_on.set()
        assert {(await task)[0] for task in tasks} == {200}


async def test_without_fairness_all_go_at_once(short: Path, tmp_path: Path, runner: DummyRunner) -> None:
    async with busy_house(tmp_path, runner, enabled=False) as house:
        tasks = [send(house) for _ in range(5)]
        await until(lambda: len(runner.seen) == 5)
        runner.go_on.set()
        assert {(await task)[0] for task in tasks} == {200}


async def test_another_key_passes_a_flood(short: Path, tmp_path: Path, runner: DummyRunner) -> None:
    async with busy_house(tmp_path, runner) as house:
        flood = [send(house, f"flood{i}") for i in range(5)]
        await until(lambda: gate_of(house).waiting("dummy") == 4)
        guest = send(house, "guest", key=OTHER)
        await until(lambda: gate_of(house).waiting("dummy") == 5)
        runner.go_on.set()
        await asyncio.gather(guest, *flood)
        assert texts(runner)[1] == "guest"


@pytest.mark.parametrize("how", ["header", "flex"])
async def test_batch_comes_after_interactive(
    short: Path, tmp_path: Path, runner: DummyRunner, how: str
) -> None:
    async with busy_house(tmp_path, runner) as house:
        first = send(house, "first")
        await until(lambda: len(runner.seen) == 1)
        if how == "header":
            body = {**ASK, "messages": [{"role": "user", "content": "batch"}]}
            batch = asyncio.create_task(house.post(CHAT, body, headers={"x-hearth-priority": "batch"}))
        else:
            batch = send(house, "batch", service_tier="flex")
        await until(lambda: gate_of(house).waiting("dummy") == 1)
        late = send(house, "late")
        await until(lambda: gate_of(house).waiting("dummy") == 2)
        runner.go_on.set()
        assert {status for status, _, _ in await asyncio.gather(first, batch, late)} == {200}
        assert texts(runner) == ["first", "late", "batch"]


async def test_a_full_line_refuses_with_a_true_retry_after(
    short: Path, tmp_path: Path, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_house(tmp_path, runner, most_waiting=8) as house:

        async def pause(*_: object) -> web.Response:
            await asyncio.sleep(0.2)
            return web.json_response({})

        monkeypatch.setattr(runner, "_fixed", pause)
        runner.behaviour = "fixed"
        for _ in range(2):
            assert (await send(house))[0] == 200
        tasks = [send(house) for _ in range(9)]
        await until(lambda: gate_of(house).waiting("dummy") == 8)
        status, body, headers = await send(house)
        assert status == 429
        assert body["error"]["code"] == "queue_full"
        assert body["error"]["type"] == "rate_limit_error"
        assert "'dummy' is busy: 8 requests wait" in body["error"]["message"]
        # Eight wait, each takes 0.2 s: until they are let in it takes about 1.6 s.
        promised_s = int(headers["retry-after-ms"]) / 1000
        assert 1.3 <= promised_s <= 3.0
        assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000)
        await asyncio.sleep(promised_s)
        assert gate_of(house).waiting("dummy") <= 2
        assert (await send(house))[0] == 200
        assert {(await task)[0] for task in tasks} == {200}


async def test_who_fills_the_line_gives_way_to_another_key(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner, most_waiting=3) as house:
        flood = []
        for i in range(4):
            flood.append(send(house, f"flood{i}"))
            await until(lambda i=i: gate_of(house).waiting("dummy") + len(runner.seen) == i + 1)
        guest = send(house, "guest", key=OTHER)
        status, body, headers = await flood[-1]
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        runner.go_on.set()
        assert (await guest)[0] == 200
        assert [(await task)[0] for task in flood[:-1]] == [200, 200, 200]


async def test_a_model_may_bound_its_own_line(short: Path, tmp_path: Path, runner: DummyRunner) -> None:
    runner.behaviour = "slow"
    settings = {"models": {"dummy": {"max_queue": 1, "queue_wait_s": 0.05}}}
    async with open_house(tmp_path, route("dummy", runner, max_batch=1), **settings) as house:
        first = send(house)
        await until(lambda: len(runner.seen) == 1)
        second = send(house)
        await until(lambda: gate_of(house).waiting("dummy") == 1)
        assert (await send(house))[1]["error"]["code"] == "queue_full"
        assert (await second)[1]["error"]["code"] == "queue_timeout"
        runner.go_on.set()
        assert (await first)[0] == 200


async def test_who_has_waited_too_long_is_told_when_to_come_again(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner, wait_s=0.05) as house:
        first = send(house)
        await until(lambda: len(runner.seen) == 1)
        batch = send(house, service_tier="flex")
        status, body, headers = await send(house)
        assert status == 503
        assert (body["error"]["code"], body["error"]["type"]) == (
            "queue_timeout",
            "service_unavailable_error",
        )
        assert int(headers["retry-after"]) >= 1 and int(headers["retry-after-ms"]) >= 1000
        # A batch request waits on.
        assert gate_of(house).waiting("dummy") == 1
        runner.go_on.set()
        assert (await first)[0] == (await batch)[0] == 200


async def test_a_batch_request_waits_no_longer_than_any_request_may(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    runner.behaviour = "slow"
    row = route("dummy", runner, max_batch=1)
    async with open_house(tmp_path, row, gateway={"request_timeout_s": 0.2}) as house:
        first = send(house)
        await until(lambda: len(runner.seen) == 1)
        assert (await send(house, service_tier="flex"))[0] == 504
        assert (await first)[0] == 504
        await until(lambda: nothing_left(gate_of(house)))


async def test_a_client_that_leaves_gives_up_its_place_at_once(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner) as house:
        first = send(house, "first")
        await until(lambda: len(runner.seen) == 1)
        gone, stays = send(house, "gone"), send(house, "stays")
        await until(lambda: gate_of(house).waiting("dummy") == 2)
        gone.cancel()
        await until(lambda: gate_of(house).waiting("dummy") == 1)
        runner.go_on.set()
        assert {(await first)[0], (await stays)[0]} == {200}
        assert texts(runner) == ["first", "stays"]


async def test_a_client_that_leaves_in_mid_answer_lets_the_next_in(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner) as house:
        first = send(house, "first")
        await until(lambda: len(runner.seen) == 1)
        second = send(house, "second")
        await until(lambda: gate_of(house).waiting("dummy") == 1)
        first.cancel()
        await until(lambda: len(runner.seen) == 2)
        runner.go_on.set()
        assert (await second)[0] == 200


async def test_a_lost_runner_lets_the_waiting_go(short: Path, tmp_path: Path, runner: DummyRunner) -> None:
    """Nobody waits for their turn at a replica that is not there."""
    async with busy_house(tmp_path, runner) as house:
        tasks = [send(house)]
        await until(lambda: len(runner.seen) == 1)
        tasks += [send(house) for _ in range(3)]
        await until(lambda: gate_of(house).waiting("dummy") == 3)
        house.serve(route("dummy", max_batch=1, state="backoff", reason="it fell over", eta_s=3.0))
        answers = await asyncio.wait_for(asyncio.gather(*tasks[1:]), 2)
        assert {(status, body["error"]["code"]) for status, body, _ in answers} <= {(503, "model_not_ready")}
        await until(lambda: gate_of(house).waiting("dummy") == 0)
        runner.go_on.set()
        await asyncio.gather(*tasks)


async def test_a_model_that_leaves_the_table_lets_the_waiting_go(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with busy_house(tmp_path, runner) as house:
        tasks = [send(house)]
        await until(lambda: len(runner.seen) == 1)
        tasks += [send(house) for _ in range(2)]
        await until(lambda: gate_of(house).waiting("dummy") == 2)
        house.serve(route("another", runner))
        answers = await asyncio.wait_for(asyncio.gather(*tasks[1:]), 2)
        assert {(status, body["error"]["code"]) for status, body, _ in answers} == {(404, "model_not_found")}
        runner.go_on.set()
        assert (await tasks[0])[0] == 200
        # The line is kept no longer than what is in it.
        house.serve(route("another", runner))
        assert not gate_of(house)._queues


async def test_a_new_replica_lets_more_in(
    short: Path, tmp_path: Path, runner: DummyRunner, second: DummyRunner
) -> None:
    second.behaviour = "slow"
    async with busy_house(tmp_path, runner) as house:
        tasks = [send(house) for _ in range(3)]
        await until(lambda: gate_of(house).waiting("dummy") == 2)
        house.serve(route("dummy", runner, second, max_batch=1))
        await until(lambda: len(second.seen) == 1)
        assert gate_of(house).waiting("dummy") == 1
        second.go_on.set()
        runner.go_on.set()
        assert {(await task)[0] for task in tasks} == {200}


async def test_no_place_is_lost_or_given_twice_whatever_clients_do(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    """Clients that come, wait, leave at any moment; runners that refuse and break off."""
    chance = random.Random(7)
    async with busy_house(tmp_path, runner, max_batch=3, most_waiting=12, wait_s=0.05) as house:
        runner.behaviour = "brief"
        statuses: list[int] = []
        most = 0

        async def client(key: str | None) -> None:
            nonlocal most
            for _ in range(20):
                task = send(house, key=key, **({"service_tier": "flex"} if chance.random() < 0.2 else {}))
                if chance.random() < 0.4:
                    await asyncio.sleep(chance.random() * 0.02)
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                    statuses.append((await task)[0])
                runner.behaviour = chance.choice(["brief"] * 15 + ["break_bytes"] * 4 + ["die"])
                upstreams = list(house.gateway.directory.upstreams())
                most = max(most, *(each.in_flight for each in upstreams))

        await asyncio.gather(*(client(OTHER if i % 4 == 0 else None) for i in range(16)))
        runner.behaviour = "brief"
        await until(lambda: nothing_left(gate_of(house)))
        assert most == 3
        assert statuses.count(200) > 20
        assert set(statuses) <= {200, 429, 503}
        assert {(await send(house))[0] for _ in range(4)} == {200}
