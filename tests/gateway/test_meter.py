"""What a gateway charges, limits and records, on real sockets and a real database."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from sqlalchemy import select

from engine.metering import keys, planstore, schema, tenants
from engine.metering.journal import JournalFullError
from engine.metering.plans import PlanSpec, read_spec
from engine.metering.rows import Form
from tests.gateway.dummy import DummyRunner, House, chunk, open_house, route, until

CHAT = {"model": "dummy", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"
ANSWER = {"object": "chat.completion", "usage": {"prompt_tokens": 12, "completion_tokens": 3}}


async def key_under(house: House, spec: dict[str, Any], *, unit: str = "minor", currency: str = "EUR") -> str:
    """A new key of a new tenant under a new plan, known to the gateway."""
    database = house.gateway.database
    await planstore.create(database, "plan", read_spec(spec), unit=unit, currency=currency)
    await tenants.create(database, "acme", plan="plan")
    token, _ = await keys.create(database, name="acme-key", tenant="acme")
    await house.gateway.ring.refresh()
    return token


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **more}


async def rows(house: House) -> list[Any]:
    """The whole ledger, by time, with what is still in the journal."""
    assert house.gateway.books is not None
    assert await house.gateway.books.flush()
    async with house.gateway.database.reading() as connection:
        found = await connection.execute(select(schema.ledger).order_by(schema.ledger.c.at))
        return list(found.mappings())


async def test_an_answered_request_is_in_the_ledger_with_its_charge_and_tokens(
    house: House, runner: DummyRunner
) -> None:
    token = await key_under(house, {"price": 3, "budget": {"limit": 100}})
    runner.behaviour, runner.body = "fixed", json.dumps(ANSWER).encode()
    status, _, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert status == 200
    assert headers["x-hearth-charge"] == "3"
    assert headers["x-hearth-charge-unit"] == "EUR"
    assert headers["x-hearth-budget-remaining"] == "97"
    [row] = await rows(house)
    assert (row["charge"], row["unit"], row["status"], row["model"]) == (3, "EUR", "answered", "dummy")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (12, 3)


async def test_a_key_without_a_plan_is_recorded_and_costs_nothing(house: House) -> None:
    status, _, headers = await house.post(PATH, CHAT)
    assert status == 200
    assert headers["x-hearth-charge"] == "0"
    [row] = await rows(house)
    assert (row["charge"], row["plan_id"], row["tenant_id"]) == (0, None, "default")


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_what_is_not_answered_is_not_charged(house: House, runner: DummyRunner, status: int) -> None:
    token = await key_under(house, {"price": 3, "budget": {"limit": 100}})
    runner.behaviour, runner.status = "fixed", status
    runner.body = b'{"error": {"message": "no", "type": "x", "code": "y", "param": null}}'
    said, _, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert said == status
    assert headers["x-hearth-charge"] == "0"
    assert await rows(house) == []
    runner.behaviour = "echo"
    _, _, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert headers["x-hearth-budget-remaining"] == "97"


async def test_a_stream_is_recorded_before_its_last_event(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"price": 2})
    runner.behaviour = "quick_stream"
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'
    runner.body = chunk("one ") + usage + b"data: [DONE]\n\n"
    async with house.http.post(
        house.base + PATH, json={**CHAT, "stream": True}, headers=bearer(token)
    ) as answer:
        assert answer.headers["x-hearth-charge"] == "2"
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                assert house.gateway.books is not None
                assert house.gateway.books.writer.counters.recorded == 1
    [row] = await rows(house)
    assert (row["charge"], row["prompt_tokens"], row["completion_tokens"]) == (2, 5, 7)


async def test_a_client_that_leaves_after_the_first_byte_is_charged(
    house: House, runner: DummyRunner
) -> None:
    token = await key_under(house, {"price": 2})
    runner.behaviour = "endless_stream"
    answer = await house.http.post(house.base + PATH, json=CHAT, headers=bearer(token))
    await answer.content.readany()
    answer.close()
    books = house.gateway.books
    assert books is not None
    await until(lambda: books.writer.counters.recorded == 1)
    [row] = await rows(house)
    assert (row["status"], row["charge"]) == ("left", 2)


async def test_a_client_that_leaves_before_is_not(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"price": 2, "concurrent": 1})
    runner.behaviour = "slow"
    asking = asyncio.create_task(house.post(PATH, CHAT, headers=bearer(token)))
    await runner.arrived.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: runner.cancelled == 1)
    runner.behaviour = "echo"
    # Its place among those at once is free again.
    status, _, _ = await house.post(PATH, CHAT, headers=bearer(token))
    assert status == 200
    assert [row["status"] for row in await rows(house)] == ["answered"]


@pytest.mark.parametrize("behaviour", ["break_stream", "break_bytes", "die"])
async def test_an_answer_that_the_runner_breaks_off_is_not_charged(
    house: House, runner: DummyRunner, behaviour: str
) -> None:
    token = await key_under(house, {"price": 2})
    runner.behaviour = behaviour
    try:
        async with house.http.post(house.base + PATH, json=CHAT, headers=bearer(token)) as answer:
            await answer.read()
    except Exception as error:
        assert behaviour == "break_bytes", error
    assert await rows(house) == []


async def test_a_stream_with_an_error_inside_is_not_charged(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"price": 2})
    runner.behaviour = "quick_stream"
    runner.body = chunk("one ") + b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
    runner.body += b"data: [DONE]\n\n"
    async with house.http.post(house.base + PATH, json=CHAT, headers=bearer(token)) as answer:
        assert b"out of memory" in await answer.read() or answer.status == 200
    assert await rows(house) == []


async def test_requests_per_minute(house: House) -> None:
    token = await key_under(house, {"requests_per_minute": 2})
    told = [await house.post(PATH, CHAT, headers=bearer(token)) for _ in range(3)]
    assert [status for status, _, _ in told] == [200, 200, 429]
    assert [headers["x-ratelimit-limit-requests"] for _, _, headers in told] == ["2"] * 3
    assert [headers["x-ratelimit-remaining-requests"] for _, _, headers in told] == ["1", "0", "0"]
    _, body, headers = told[2]
    assert body["error"]["code"] == "rate_limit_exceeded"
    # Two a minute: the next may come half a minute after the first.
    assert 28_000 < int(headers["retry-after-ms"]) <= 30_000
    assert int(headers["retry-after"]) in (29, 30)
    assert headers["x-ratelimit-reset-requests"].endswith("s")


async def test_requests_at_once(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"concurrent": 1})
    runner.behaviour = "slow"
    first = asyncio.create_task(house.post(PATH, CHAT, headers=bearer(token)))
    await runner.arrived.wait()
    status, body, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after-ms"]) > 0
    runner.go_on.set()
    assert (await first)[0] == 200
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 200


async def test_requests_per_day(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"requests_per_day": 2})
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 200
    runner.behaviour, runner.status = "fixed", 500
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 500
    runner.behaviour = "echo"
    status, _, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "0")
    status, body, headers = await house.post(PATH, CHAT, headers=bearer(token))
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(headers["retry-after"]) <= 86_400


async def test_included_requests_are_free_and_then_the_price_holds(house: House) -> None:
    token = await key_under(house, {"price": 5, "included": 2})
    charges = [(await house.post(PATH, CHAT, headers=bearer(token)))[2]["x-hearth-charge"] for _ in range(4)]
    assert charges == ["0", "0", "5", "5"]
    assert [(row["charge"], row["included"]) for row in await rows(house)] == [
        (0, True),
        (0, True),
        (5, False),
        (5, False),
    ]


async def test_a_hard_budget_is_never_gone_over(house: House) -> None:
    token = await key_under(house, {"price": 4, "budget": {"limit": 10}})
    told = [await house.post(PATH, CHAT, headers=bearer(token)) for _ in range(3)]
    assert [status for status, _, _ in told] == [200, 200, 429]
    _, body, headers = told[2]
    assert body["error"]["code"] == body["error"]["type"] == "insufficient_quota"
    assert "0.10 EUR" in body["error"]["message"]
    assert headers["x-hearth-budget-remaining"] == "2"
    assert headers["x-should-retry"] == "false"
    assert int(headers["retry-after"]) > 0
    assert sum(row["charge"] for row in await rows(house)) == 8


async def test_a_soft_budget_is_served_and_told(house: House) -> None:
    token = await key_under(house, {"price": 4, "budget": {"limit": 6, "hard": False}})
    told = [await house.post(PATH, CHAT, headers=bearer(token)) for _ in range(2)]
    assert [status for status, _, _ in told] == [200, 200]
    assert [headers["x-hearth-budget-remaining"] for _, _, headers in told] == ["2", "-2"]


async def test_two_keys_of_a_tenant_share_what_is_counted_by_tenant(house: House) -> None:
    token = await key_under(house, {"budget": {"limit": 2, "of": "requests"}, "counts": "tenant"})
    other, _ = await keys.create(house.gateway.database, name="other", tenant="acme")
    await house.gateway.ring.refresh()
    told = [(await house.post(PATH, CHAT, headers=bearer(each)))[0] for each in (token, other, token)]
    assert told == [200, 200, 429]


async def test_a_lowered_budget_holds_at_once(house: House) -> None:
    token = await key_under(house, {"price": 1, "budget": {"limit": 100}})
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 200
    database = house.gateway.database
    await planstore.change(database, "plan", PlanSpec.model_validate({"price": 1, "budget": {"limit": 1}}))
    await house.gateway.ring.refresh()
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 429


async def test_a_retry_with_its_idempotency_key_is_answered_from_the_record(
    house: House, runner: DummyRunner
) -> None:
    token = await key_under(house, {"price": 4, "budget": {"limit": 100}})
    given = bearer(token, **{"idempotency-key": "order-1"})
    first = await house.post(PATH, CHAT, headers=given)
    again = await house.post(PATH, CHAT, headers=given)
    assert (first[0], first[1]) == (again[0], again[1]) == (200, first[1])
    assert (first[2]["x-hearth-charge"], again[2]["x-hearth-charge"]) == ("4", "0")
    assert again[2]["x-hearth-budget-remaining"] == "96"
    assert len(runner.seen) == 1
    assert len(await rows(house)) == 1
    other = {**CHAT, "temperature": 0.5}
    status, body, _ = await house.post(PATH, other, headers=given)
    assert (status, body["error"]["code"]) == (422, "idempotency_key_reused")
    # Another key's requests have names of their own.
    assert (await house.post(PATH, other, headers={"idempotency-key": "order-1"}))[0] == 200


async def test_a_retry_of_a_stream_is_served_again_and_not_charged_again(
    house: House, runner: DummyRunner
) -> None:
    token = await key_under(house, {"price": 4})
    runner.behaviour, runner.body = "quick_stream", chunk("one ") + b"data: [DONE]\n\n"
    given = bearer(token, **{"idempotency-key": "order-2"})
    charges = []
    for _ in range(2):
        async with house.http.post(house.base + PATH, json=CHAT, headers=given) as answer:
            assert b"[DONE]" in await answer.read()
            charges.append(answer.headers["x-hearth-charge"])
    assert charges == ["4", "0"]
    assert len(await rows(house)) == 1


async def test_a_retry_while_the_first_is_answered_and_after_it_failed(
    house: House, runner: DummyRunner
) -> None:
    token = await key_under(house, {"price": 4})
    given = bearer(token, **{"idempotency-key": "order-3"})
    runner.behaviour = "slow"
    first = asyncio.create_task(house.post(PATH, CHAT, headers=given))
    await runner.arrived.wait()
    status, body, _ = await house.post(PATH, CHAT, headers=given)
    assert (status, body["error"]["code"]) == (409, "idempotency_key_in_use")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: runner.cancelled == 1)
    runner.behaviour = "echo"
    for _ in range(300):
        if (await house.post(PATH, CHAT, headers=given))[0] != 409:
            break
        await asyncio.sleep(0.01)
    assert len(await rows(house)) == 1


async def test_a_client_that_goes_while_its_row_is_written_can_ask_again(
    house: House, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await key_under(house, {"price": 4})
    given = bearer(token, **{"idempotency-key": "order-4"})
    assert house.gateway.books is not None
    writer, reached = house.gateway.books.writer, asyncio.Event()
    record = writer.record_encoded

    async def slow(data: bytes, charge: int, *, reserved: bool = False) -> None:
        await record(data, charge, reserved=reserved)
        reached.set()
        await asyncio.sleep(3)

    monkeypatch.setattr(writer, "record_encoded", slow)
    asking = asyncio.create_task(house.post(PATH, CHAT, headers=given))
    await reached.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    monkeypatch.setattr(writer, "record_encoded", record)
    for _ in range(300):
        status, _, headers = await house.post(PATH, CHAT, headers=given)
        if status != 409:
            break
        await asyncio.sleep(0.01)
    assert (status, headers["x-hearth-charge"]) == (200, "0")
    assert len(runner.seen) == 1
    assert len(await rows(house)) == 1


async def test_a_row_that_cannot_be_written_down_keeps_no_room_in_the_journal(
    house: House, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await key_under(house, {"price": 4, "budget": {"limit": 4}, "concurrent": 1})
    assert house.gateway.books is not None

    def fail(*_: Any, **__: Any) -> bytes:
        raise ValueError("this is no row")

    with monkeypatch.context() as broken:
        broken.setattr(Form, "encode", fail)
        for _ in range(2):
            status, answer, _ = await house.post(PATH, CHAT, headers=bearer(token))
            assert (status, answer["error"]["code"]) == (503, "ledger_unavailable")
    assert house.gateway.books.writer._reserved == 0
    assert (await house.post(PATH, CHAT, headers=bearer(token)))[0] == 200
    assert len(await rows(house)) == 1


async def test_without_keys_requests_are_recorded_as_anonymous(
    short: Any, tmp_path: Any, runner: DummyRunner
) -> None:
    async with open_house(tmp_path, route("dummy", runner), auth=False) as house:
        assert (await house.post(PATH, CHAT))[0] == 200
        [row] = await rows(house)
        assert (row["key_id"], row["tenant_id"]) == ("anonymous", "default")


async def test_with_metering_off_nothing_is_recorded(short: Any, tmp_path: Any, runner: DummyRunner) -> None:
    async with open_house(tmp_path, route("dummy", runner), metering={"enabled": False}) as house:
        status, _, headers = await house.post(PATH, CHAT)
        assert status == 200
        assert "x-hearth-charge" not in headers
        assert house.gateway.books is None


async def test_a_full_journal_refuses_new_requests(short: Any, tmp_path: Any, runner: DummyRunner) -> None:
    async with open_house(tmp_path, route("dummy", runner), metering={"journal_bytes": 1 << 20}) as house:
        books = house.gateway.books
        assert books is not None
        runner.behaviour = "slow"
        # What a thousand requests in hand would take.
        held = 0
        with pytest.raises(JournalFullError):
            while held < 1000:
                books.writer.reserve()
                held += 1
        status, body, headers = await house.post(PATH, CHAT)
        assert (status, body["error"]["code"]) == (503, "ledger_unavailable")
        assert headers["retry-after"] == "5"
        assert runner.seen == []
        for _ in range(held):
            books.writer.release()
        runner.behaviour = "echo"
        assert (await house.post(PATH, CHAT))[0] == 200
        assert len(await rows(house)) == 1


async def test_every_answer_tells_the_limits(house: House) -> None:
    token = await key_under(house, {"requests_per_minute": 9, "budget": {"limit": 50}, "price": 1})
    for path in ("/v1/models", "/v1/models/unknown"):
        _, _, headers = await house.get(path, **bearer(token))
        assert headers["x-request-id"]
        assert headers["x-hearth-charge"] == "0"
        assert headers["x-ratelimit-remaining-requests"] == "9"
        assert headers["x-hearth-budget-remaining"] == "50"


async def test_the_sdk_meets_a_used_up_budget(house: House) -> None:
    token = await key_under(house, {"price": 1, "budget": {"limit": 1}})
    client = openai.AsyncOpenAI(base_url=f"{house.base}/v1", api_key=token, max_retries=2, timeout=5)
    async with client:
        raw = await client.chat.completions.with_raw_response.create(**CHAT)  # type: ignore[call-overload]
        assert raw.headers["x-hearth-charge"] == "1"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert caught.value.code == "insufficient_quota"


async def test_the_callers_own_usage_has_its_last_request(house: House) -> None:
    token = await key_under(house, {"price": 7})
    await house.post(PATH, CHAT, headers=bearer(token))
    status, text, _ = await house.get("/v1/usage", **bearer(token))
    assert status == 200
    assert json.loads(text)["total"]["requests"] == 1
    assert json.loads(text)["total"]["charge"] == 7


async def test_the_metrics_tell_how_the_ledger_stands(house: House) -> None:
    _, text, _ = await house.get("/metrics")
    assert "hearth_ledger_backlog_rows 0.0" in text
    assert "hearth_ledger_database_away 0.0" in text
