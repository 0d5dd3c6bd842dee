"""`/v1/usage` and `/admin/v1/usage`: the sums, the plan's standing, and what cannot be asked for."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from engine.metering import keys, planstore, tenants
from engine.metering.database import Database
from engine.metering.ledger import write_rows
from engine.metering.moments import shown_moment
from engine.metering.opening import opened
from engine.metering.plans import read_spec
from engine.metering.pricing import period_end_ms, period_name
from engine.metering.rows import LedgerRow
from tests.gateway.dummy import DummyRunner, House, open_house, route

ADMIN = "hearth-admin-key-0123456789abcdef"
OWN = "hearth-own-key-0123456789abcdef"
FRESH = "hearth-fresh-key-0123456789abcdef"
SECOND = "hearth-second-key-0123456789abcdef"
DAY_MS = 86_400_000


def row(number: int, key: keys.Key, at: int, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "key_id": key.id,
        "tenant_id": key.tenant_id,
        "model": "dummy",
        "category": "chat",
        "charge": 2,
        "unit": "EUR",
        "at": at,
        "period": period_name("month", at),
        "worker": "w-1",
    }
    return LedgerRow(**(values | changes))


class Books:
    """A house whose tenant 'acme' has a plan, two keys and rows of now and of long ago."""

    def __init__(self, house: House, database: Database, own: keys.Key, second: keys.Key) -> None:
        self.house, self.database, self.own, self.second = house, database, own, second
        self.now = int(time.time() * 1000)

    async def get(self, path: str, key: str = OWN) -> tuple[int, Any]:
        status, body, _ = await self.house.get(path, authorization=f"Bearer {key}")
        return status, json.loads(body)


@pytest.fixture
async def books(house: House, tmp_path: Path) -> AsyncIterator[Books]:
    async with opened(house.config) as database:
        spec = read_spec({"price": 2, "included": 2, "budget": {"limit": 10}, "counts": "tenant"})
        await planstore.create(database, "team", spec, unit="minor", currency="EUR")
        await tenants.create(database, "acme", plan="team")
        await keys.create(database, key=ADMIN, admin=True, name="admin")
        _, own = await keys.create(database, key=OWN, tenant="acme", name="own")
        _, second = await keys.create(database, key=SECOND, tenant="acme", name="second")
        made = Books(house, database, own, second)
        old = made.now - 400 * DAY_MS
        await write_rows(
            database,
            [
                row(1, own, made.now, charge=0, included=True),
                row(2, own, made.now, model="painter", category="image", charge=5),
                row(3, second, made.now, charge=0, included=True),
                row(4, own, old, unit="credits", charge=100),
            ],
        )
        await house.gateway.ring.refresh()
        yield made


async def test_a_callers_own_key_in_the_present_period(books: Books) -> None:
    status, answer = await books.get("/v1/usage")
    assert status == 200 and answer["object"] == "usage"
    assert answer["total"] == {"requests": 2, "charge": 5, "unit": "EUR"}
    assert answer["by_day"] == [
        {"day": period_name("day", books.now), "requests": 2, "charge": 5, "unit": "EUR"}
    ]
    assert {part["model"]: part["charge"] for part in answer["by_model"]} == {"dummy": 0, "painter": 5}
    assert {part["category"]: part["requests"] for part in answer["by_category"]} == {"chat": 1, "image": 1}
    assert (answer["scope"], answer["key"]) == ("key", books.own.id)
    period = period_name("month", books.now)
    assert answer["since"] == f"{period}-01T00:00:00Z"
    assert answer["until"] == shown_moment(period_end_ms(period))


async def test_a_callers_last_request_is_in_the_sums_at_once(books: Books) -> None:
    await tenants.create(books.database, "fresh", plan="team")
    await keys.create(books.database, key=FRESH, tenant="fresh")
    await books.house.gateway.ring.refresh()
    given, body = {"authorization": f"Bearer {FRESH}"}, {"model": "dummy", "messages": []}
    charged = 0
    for number in range(1, 5):
        status, _, headers = await books.house.post("/v1/chat/completions", body, headers=given)
        assert (status, headers["x-hearth-charge"]) == (200, "0" if number <= 2 else "2")
        charged += int(headers["x-hearth-charge"])
        status, answer = await books.get("/v1/usage", key=FRESH)
        assert answer["total"] == {"requests": number, "charge": charged, "unit": "EUR"}
        assert answer["plan"]["included"] == {
            "limit": 2,
            "used": min(number, 2),
            "left": max(0, 2 - number),
        }
        assert str(answer["plan"]["budget"]["left"]) == headers["x-hearth-budget-remaining"]


async def test_the_plans_standing_counts_the_whole_tenant(books: Books) -> None:
    plan = (await books.get("/v1/usage"))[1]["plan"]
    assert (plan["name"], plan["unit"], plan["counts"]) == ("team", "EUR", "tenant")
    assert plan["period"] == period_name("month", books.now)
    assert (plan["requests"], plan["charge"]) == (3, 5)
    assert plan["included"] == {"limit": 2, "used": 2, "left": 0}
    assert plan["budget"] == {"limit": 10, "of": "charge", "hard": True, "used": 5, "left": 5}


async def test_the_whole_tenant_and_other_times(books: Books) -> None:
    status, answer = await books.get("/v1/usage?scope=tenant")
    assert status == 200 and answer["total"]["requests"] == 3 and answer["key"] is None
    assert "by_key" not in answer
    for since in ("2020-01-01", "2020-01-01T00:00:00%2B02:00", "2020-01-01T00:00:00+02:00", "1577836800"):
        status, answer = await books.get(f"/v1/usage?since={since}")
        assert status == 200, answer
        assert answer["total"] == {"requests": 3, "charge": {"EUR": 5, "credits": 100}, "unit": None}
        assert answer["since"] == ("2019-12-31T22:00:00Z" if "2:00" in since else "2020-01-01T00:00:00Z")
    # Without `since`: the period that ends there.
    status, answer = await books.get("/v1/usage?until=2026-03-01")
    assert (answer["since"], answer["until"]) == ("2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z")


async def test_a_key_without_a_plan_has_no_standing(books: Books) -> None:
    status, answer = await books.get("/v1/usage", key=ADMIN)
    assert status == 200 and answer["plan"] is None
    assert answer["total"] == {"requests": 0, "charge": 0, "unit": None}


@pytest.mark.parametrize(
    ("query", "param", "told"),
    [
        ("since=yesterday", "since", "2026-11-01"),
        ("until=2026-13-01", "until", "month"),
        ("since=20261101", "since", "is no time"),
        ("since=1793491200000", "since", "is no time"),
        ("since=2026-11-02&until=2026-11-01", "since", "not before until"),
        ("since=9999-12-31T23:59:59-23:59", "since", "1970 and 9999"),
        ("scope=everybody", "scope", "'key' or 'tenant'"),
    ],
)
async def test_what_cannot_be_asked_for(books: Books, query: str, param: str, told: str) -> None:
    status, answer = await books.get(f"/v1/usage?{query}")
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and told in error["message"]


async def test_an_administrator_sees_all_a_tenant_or_a_key(books: Books) -> None:
    status, answer = await books.get("/admin/v1/usage", key=ADMIN)
    assert status == 200 and answer["total"]["requests"] == 3
    assert {part["key"]: part["requests"] for part in answer["by_key"]} == {
        books.own.id: 2,
        books.second.id: 1,
    }
    assert [part["tenant"] for part in answer["by_tenant"]] == [books.own.tenant_id]
    status, answer = await books.get("/admin/v1/usage?tenant=acme&key=second&since=2020-01-01", key=ADMIN)
    assert status == 200 and answer["total"]["requests"] == 1
    assert (answer["key"], answer["tenant"]) == (books.second.id, books.own.tenant_id)
    status, answer = await books.get("/admin/v1/usage?tenant=acne", key=ADMIN)
    assert status == 404 and "Did you mean 'acme'?" in answer["error"]["message"]
    status, answer = await books.get("/admin/v1/usage")
    assert status == 403 and answer["error"]["code"] == "admin_key_required"


async def test_what_is_no_more_is_found_by_its_id(books: Books) -> None:
    async with books.database.writing() as connection:
        await connection.execute(text("DELETE FROM keys WHERE id = :id"), {"id": books.second.id})
    status, answer = await books.get(f"/admin/v1/usage?key={books.second.id}", key=ADMIN)
    assert status == 200 and answer["total"]["requests"] == 1


async def test_it_needs_a_key_and_is_in_the_documentation(books: Books) -> None:
    async with books.house.http.get(f"{books.house.base}/v1/usage") as answer:
        assert answer.status == 401
    status, document, _ = await books.house.get("/openapi.json")
    paths = json.loads(document)["paths"]
    for path in ("/v1/usage", "/admin/v1/usage"):
        assert paths[path]["get"]["security"] == [{"key": []}]
        assert "400" in paths[path]["get"]["responses"]
    status, body, _ = await books.house.get("/v1/usages")
    assert status == 404 and "/v1/usage" in body


async def test_a_database_that_is_away_is_told_without_its_name(books: Books) -> None:
    async with books.database.writing() as connection:
        await connection.execute(text("ALTER TABLE ledger RENAME TO elsewhere"))
    status, answer = await books.get("/v1/usage")
    assert status == 500 and answer["error"]["code"] == "usage_failed"
    assert "hearth.db" not in answer["error"]["message"]


async def test_without_keys_all_is_anonymous(short: Path, tmp_path: Path, runner: DummyRunner) -> None:
    async with open_house(tmp_path, route("dummy", runner), auth=False) as house:
        async with opened(house.config) as database:
            now = int(time.time() * 1000)
            other = {"key_id": "anonymous", "tenant_id": "default", "unit": "credits", "charge": 0}
            _, key = await keys.create(database)
            await write_rows(database, [row(1, key, now, **other), row(2, key, now)])
        status, body, _ = await house.get("/v1/usage")
        answer = json.loads(body)
        assert status == 200 and answer["total"] == {"requests": 1, "charge": 0, "unit": "credits"}
        assert (answer["key"], answer["tenant"], answer["plan"]) == ("anonymous", "default", None)
