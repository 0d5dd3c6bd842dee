"""`/admin/v1`, and what keys of all kinds may do at the door; over sockets, with the database beneath."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from engine.config import Config
from engine.gateway.app import Gateway
from engine.metering import keys, tenants
from engine.metering.database import DatabaseError
from engine.metering.ledger import write_rows
from engine.metering.opening import opened
from engine.metering.pricing import period_name
from engine.metering.rows import LedgerRow
from tests.gateway.dummy import KEY, DummyRunner, House, open_house, route

ADMIN = "hearth-admin-key-0123456789abcdef"
CHAT = "/v1/chat/completions"


class Admin:
    """The admin API of a house, by an administrator's key unless another is given."""

    def __init__(self, house: House) -> None:
        self.house = house

    async def __call__(
        self, method: str, path: str, body: Any = None, *, key: str | None = ADMIN
    ) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        address = f"{self.house.base}/admin/v1{path}"
        async with self.house.http.request(method, address, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def ask(self, key: str, path: str = CHAT, model: str = "dummy") -> tuple[int, Any]:
        """A request for a model with this key."""
        given = {"authorization": f"Bearer {key}"}
        status, answer, _ = await self.house.post(path, {"model": model, "messages": []}, headers=given)
        return status, answer


@pytest.fixture
async def admin(house: House, tmp_path: Path) -> AsyncIterator[Admin]:
    async with opened(house.config) as database:
        await keys.create(database, key=ADMIN, admin=True, name="admin")
    await house.gateway.ring.refresh()
    yield Admin(house)


def code_of(answer: Any) -> str:
    """The error's code, of a whole envelope."""
    assert set(answer["error"]) >= {"message", "type", "param", "code"}
    return str(answer["error"]["code"])


async def test_a_key_made_here_works_at_once_and_revoked_no_more(admin: Admin) -> None:
    status, made = await admin("POST", "/keys", {"name": "app"})
    assert status == 201 and made["key"].startswith("hearth-") and "sha256" not in made
    assert (await admin.ask(made["key"]))[0] == 200
    status, shown = await admin("GET", f"/keys/{made['id']}")
    told = {name: value for name, value in made.items() if name != "key"}
    assert status == 200 and shown == {**told, "plan": None, "standing": None}
    status, listed = await admin("GET", "/keys")
    assert [key["name"] for key in listed["data"]] == ["default", "admin", "app"]
    assert made["key"] not in json.dumps(listed)
    status, ended = await admin("POST", "/keys/app/revoke")
    assert (status, ended["state"]) == (200, "revoked")
    status, answer = await admin.ask(made["key"])
    assert status == 401 and "revoked" in answer["error"]["message"]


async def test_rotating_ends_the_old_key_at_the_time_asked(admin: Admin) -> None:
    _, old = await admin("POST", "/keys", {"name": "app"})
    status, new = await admin("POST", f"/keys/{old['id']}/rotate", {"keep_s": 60})
    assert status == 201 and new["key"] != old["key"]
    assert (await admin.ask(old["key"]))[0] == (await admin.ask(new["key"]))[0] == 200
    status, newest = await admin("POST", f"/keys/{new['id']}/rotate", {"keep_s": 0})
    assert (await admin.ask(new["key"]))[0] == 401 and (await admin.ask(newest["key"]))[0] == 200


async def test_a_key_revoked_elsewhere_is_refused_within_a_second(admin: Admin) -> None:
    _, made = await admin("POST", "/keys", {"name": "app"})
    async with opened(admin.house.config) as database:
        await keys.revoke(database, "app")
    began = time.monotonic()
    while (await admin.ask(made["key"]))[0] == 200:
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.02)


async def test_a_tenant_is_made_planned_closed_and_opened(admin: Admin) -> None:
    status, plan = await admin("POST", "/plans", {"name": "gold", "spec": {"price": 5}})
    assert status == 201
    status, acme = await admin("POST", "/tenants", {"name": "acme"})
    assert (status, acme["plan_id"]) == (201, None)
    _, key = await admin("POST", "/keys", {"tenant": "acme"})
    status, acme = await admin("PATCH", "/tenants/acme", {"plan": "gold"})
    assert (status, acme["plan_id"]) == (200, plan["id"])
    assert (await admin.ask(key["key"]))[0] == 200
    status, acme = await admin("PATCH", "/tenants/acme", {"closed": True})
    assert acme["plan_id"] == plan["id"] and acme["closed_at"] is not None
    status, answer = await admin.ask(key["key"])
    assert status == 401 and "closed" in answer["error"]["message"]
    assert code_of((await admin("POST", "/keys", {"tenant": "acme"}))[1]) == "conflict"
    await admin("PATCH", "/tenants/acme", {"closed": False, "plan": None})
    changed = {**acme, "closed_at": None, "plan_id": None}
    assert (await admin("GET", "/tenants/acme"))[1] == {**changed, "plan": None, "standing": None}
    assert (await admin.ask(key["key"]))[0] == 200
    assert [each["name"] for each in (await admin("GET", "/tenants"))[1]["data"]] == ["default", "acme"]


async def test_a_key_and_a_tenant_tell_of_their_plan_and_what_is_left(admin: Admin) -> None:
    spec = {"price": 5, "included": 2, "budget": {"limit": 100}, "requests_per_minute": 9, "counts": "tenant"}
    _, plan = await admin("POST", "/plans", {"name": "gold", "spec": spec})
    await admin("POST", "/tenants", {"name": "acme", "plan": "gold"})
    _, key = await admin("POST", "/keys", {"tenant": "acme"})
    now = int(time.time() * 1000)
    row = LedgerRow(
        request_id="r1",
        key_id=key["id"],
        tenant_id=key["tenant_id"],
        model="dummy",
        category="chat",
        charge=5,
        unit="credits",
        at=now,
        period=period_name("month", now),
        worker="w",
    )
    async with opened(admin.house.config) as database:
        await write_rows(database, [row])
    for path in (f"/keys/{key['id']}", "/tenants/acme"):
        status, shown = await admin("GET", path)
        assert status == 200 and shown["plan"] == plan
        standing = shown["standing"]
        assert (standing["requests"], standing["charge"]) == (1, 5)
        assert standing["included"] == {"limit": 2, "used": 0, "left": 2}
        assert (standing["budget"]["used"], standing["budget"]["left"]) == (5, 95)
    # Where each key counts by itself, a tenant has no standing.
    await admin("PUT", "/plans/gold", {**spec, "counts": "key"})
    assert (await admin("GET", "/tenants/acme"))[1]["standing"] is None
    assert (await admin("GET", f"/keys/{key['id']}"))[1]["standing"]["charge"] == 5


async def test_a_plan_is_made_changed_and_removed(admin: Admin) -> None:
    asked = {"name": "gold", "unit": "minor", "currency": "EUR", "spec": {"price": 5, "models": {"dummy": 7}}}
    status, made = await admin("POST", "/plans", asked)
    assert status == 201 and made["spec"]["models"] == {"dummy": 7}
    status, changed = await admin("PUT", "/plans/gold", {"price": 6})
    assert (changed["spec"]["price"], changed["spec"]["models"], changed["currency"]) == (6, {}, "EUR")
    assert (await admin("GET", "/plans"))[1]["data"] == [changed]
    await admin("PATCH", "/tenants/default", {"plan": "gold"})
    status, answer = await admin("DELETE", "/plans/gold")
    assert (status, code_of(answer)) == (409, "conflict")
    await admin("PATCH", "/tenants/default", {"plan": None})
    assert (await admin("DELETE", "/plans/gold")) == (200, changed)
    assert (await admin("GET", "/plans/gold"))[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("GET", "/keys/nobody", None, 404, "There is no key 'nobody'"),
        ("GET", "/keys?tenant=nobody", None, 404, "There is no tenant 'nobody'"),
        ("GET", "/tenants/defualt", None, 404, "Did you mean 'default'"),
        ("POST", "/tenants", {"name": "default"}, 409, "already"),
        ("POST", "/tenants", {"name": " "}, 400, "1 to 200"),
        ("POST", "/tenants", {"nam": "x"}, 400, "name"),
        ("POST", "/keys", {"expires_at": 1}, 400, "yet to come"),
        ("POST", "/keys", {"plan": "none"}, 404, "There is no plan 'none'"),
        ("POST", "/keys", {"allowed": {"addresses": ["1.2.3"]}}, 400, "addresses"),
        ("POST", "/keys", {"sha256": "0"}, 400, "sha256"),
        ("POST", "/keys/admin/rotate", {"keep_s": -1}, 400, "keep_s"),
        ("POST", "/plans", {"name": "x", "spec": {"price": -1}}, 400, "spec.price"),
        ("POST", "/plans", {"name": "x", "spec": {"price": 2**80}}, 400, "spec.price"),
        ("POST", "/plans", {"name": "x", "spec": {"price": 1.5}}, 400, "spec.price"),
        ("POST", "/plans", {"name": "x", "unit": "minor", "spec": {}}, 400, "ISO 4217"),
        ("POST", "/plans", {"name": "x", "spec": {"price": True}}, 400, "spec.price"),
        ("POST", "/plans", {"name": "x", "spec": {"budget": {"limit": -1}}}, 400, "spec.budget.limit"),
        ("POST", "/plans", {"name": "x", "spec": {"categories": {"art": 1}}}, 400, "spec.categories.art: "),
        (
            "POST",
            "/plans",
            {"name": "x", "spec": {"models": {" a": 1}}},
            400,
            "spec: ' a' is no model's name",
        ),
        ("POST", "/plans", {"name": "x", "unit": "euros", "spec": {}}, 400, "unit: "),
        ("POST", "/plans", {"name": "x", "unit": "minor", "currency": "E" * 5000, "spec": {}}, 400, "EEE…'"),
        ("POST", "/plans", {"name": "x"}, 400, "spec is missing"),
        ("PUT", "/plans/x", {"prise": 1}, 400, "prise is no field here"),
        ("PUT", "/plans/x", {}, 404, "There is no plan 'x'"),
        ("PATCH", "/tenants/default", {"plan": "gold"}, 404, "There is no plan 'gold'"),
        ("PATCH", "/tenants/default", {"closed": "perhaps"}, 400, "closed: "),
        ("POST", "/keys", [], 400, "no JSON object"),
        ("POST", "/keys", {"name": None}, 400, "name: "),
        ("POST", "/keys", {"name": "\ud800"}, 400, "1 to 200"),
        ("POST", "/keys", {"tenant": "a\0b"}, 404, r"There is no tenant 'a\x00b'"),
        ("POST", "/keys", {"expires_at": 10**30}, 400, "the last time that can be kept"),
        ("POST", "/keys", {"expires_at": -1}, 400, "yet to come"),
        ("POST", "/keys", {"expires_at": 1.5}, 400, "expires_at: "),
        ("POST", "/keys", {"allowed": {"models": [""]}}, 400, "models: '' is no model's name"),
        ("POST", "/keys", {"allowed": {"colours": ["red"]}}, 400, "colours"),
        ("GET", "/keys/%00", None, 404, "There is no key"),
        ("GET", "/keys/%FF", None, 404, "There is no key"),
        ("GET", "/keys?tenant=", None, 404, "There is no tenant ''"),
        ("GET", "/nothing", None, 404, "There is no GET /admin/v1/nothing"),
        ("DELETE", "/keys", None, 405, "does not take DELETE"),
    ],
)
async def test_what_cannot_be_is_told_in_the_envelope(
    admin: Admin, method: str, path: str, body: Any, status: int, told: str
) -> None:
    got, answer = await admin(method, path, body)
    assert got == status, answer
    code_of(answer)
    assert told in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (b"", None, "The body is missing"),
        (b"null", None, "The body is missing"),
        (b"{", "invalid_json", "The body is no JSON"),
        (b"\xff\xfe", "invalid_json", "The body is no JSON"),
        (b'"app"', None, "no JSON object"),
        (b'{"expires_at": ' + b"9" * 6000 + b"}", None, "body"),
    ],
)
async def test_a_body_that_is_none_is_told(admin: Admin, body: bytes, code: str | None, told: str) -> None:
    address = f"{admin.house.base}/admin/v1/keys"
    headers = {"authorization": f"Bearer {ADMIN}", "content-type": "application/json"}
    async with admin.house.http.post(address, data=body, headers=headers) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, code) and told in error["message"]
    assert len((await admin("GET", "/keys"))[1]["data"]) == 2


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic abc", f"Bearer {ADMIN} x", "Bearer \xe9", "Bearer " + "x" * 5000, ADMIN],
)
async def test_a_malformed_key_is_refused_and_not_repeated(admin: Admin, header: str) -> None:
    for path in ("/admin/v1/keys", "/v1/models"):
        async with admin.house.http.get(admin.house.base + path, headers={"authorization": header}) as answer:
            text = await answer.text()
            assert answer.status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert ADMIN not in text and "xxx" not in text


@pytest.mark.parametrize(
    ("setting", "told"),
    [("query_only = ON", "attempt to write a readonly database"), ("max_page_count = 1", "is full")],
)
async def test_a_database_that_takes_nothing_is_told_and_what_is_known_goes_on(
    admin: Admin, setting: str, told: str
) -> None:
    engine = admin.house.gateway.database.engine
    await engine.dispose()

    def connect(connection: Any, _record: object) -> None:
        connection.cursor().execute(f"PRAGMA {setting}")

    event.listen(engine.sync_engine, "connect", connect)
    for number in range(50):
        status, answer = await admin("POST", "/tenants", {"name": f"{number:0200}"})
        if status != 201:
            break
    assert (status, code_of(answer)) == (503, "database_away")
    assert told in answer["error"]["message"] and "nothing was written" in answer["error"]["message"]
    assert (await admin.ask(KEY))[0] == 200 and (await admin("GET", "/tenants"))[0] == 200
    event.remove(engine.sync_engine, "connect", connect)
    await engine.dispose()
    assert (await admin("POST", "/tenants", {"name": "later"}))[0] == 201


async def test_a_gateway_does_not_start_on_a_newer_schema(short: Path, tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    async with opened(config) as database, database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    gateway = Gateway(config)
    with pytest.raises(
        DatabaseError, match=r"schema 9999, newer than this Hearth knows.*nothing was changed"
    ):
        await gateway.start()
    await gateway.database.close()


async def test_only_administrators_keys_are_let_in(admin: Admin) -> None:
    for path in ("/keys", "/tenants", "/plans", "/nothing"):
        assert (await admin("GET", path, key=None))[0] == 401
        assert (await admin("GET", path, key="wrong"))[0] == 401
        status, answer = await admin("GET", path, key=KEY)
        assert (status, code_of(answer)) == (403, "admin_key_required")
    status, _ = await admin("POST", "/keys", {"admin": True}, key=KEY)
    assert status == 403
    assert len((await admin("GET", "/keys"))[1]["data"]) == 2


async def test_an_administrators_key_is_asked_for_even_where_others_are_not(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with open_house(tmp_path, route("dummy", runner), auth=False) as house:
        async with house.http.get(house.base + "/v1/models") as answer:
            assert answer.status == 200
        assert (await Admin(house)("GET", "/keys", key=None))[0] == 401


async def test_a_key_is_held_to_its_models_categories_and_addresses(
    admin: Admin, runner: DummyRunner
) -> None:
    admin.house.serve(route("dummy", runner, aliases=["gpt-4"]), route("other", runner))

    async def made(**allowed: list[str]) -> str:
        status, key = await admin("POST", "/keys", {"allowed": allowed})
        assert status == 201
        return str(key["key"])

    one_model = await made(models=["dummy"])
    assert (await admin.ask(one_model))[0] == (await admin.ask(one_model, model="gpt-4"))[0] == 200
    before = len(runner.seen)
    status, answer = await admin.ask(one_model, model="other")
    assert (status, code_of(answer)) == (403, "model_not_allowed") and "dummy" in answer["error"]["message"]
    images = await made(categories=["image"])
    status, answer = await admin.ask(images)
    assert (status, code_of(answer)) == (403, "model_not_allowed") and len(runner.seen) == before
    assert (await admin.ask(await made(addresses=["127.0.0.0/8"])))[0] == 200
    status, answer = await admin.ask(await made(addresses=["10.0.0.0/8"]))
    assert (status, code_of(answer)) == (403, "address_not_allowed")
    assert "127.0.0.1" in answer["error"]["message"]


async def test_an_expired_key_is_told_when(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = admin.house.gateway.ring
    _, made = await admin("POST", "/keys", {"expires_at": ring.now_ms() + 3_600_000})
    assert (await admin.ask(made["key"]))[0] == 200
    monkeypatch.setattr(ring, "_clock", lambda: time.time() + 3_600)
    status, answer = await admin.ask(made["key"])
    assert status == 401 and "expired on 20" in answer["error"]["message"]


async def test_requests_wait_for_no_database(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the database gone, known keys go on and administrators are told."""
    _, made = await admin("POST", "/keys", {})

    def gone(*_: object) -> None:
        raise ConnectionRefusedError("gone")

    engine = admin.house.gateway.database.engine
    await engine.dispose()
    monkeypatch.setattr(type(engine), "begin", gone)
    assert (await admin.ask(made["key"]))[0] == 200
    assert (await admin.ask("unknown"))[0] == 401
    status, answer = await admin("GET", "/keys")
    assert (status, code_of(answer)) == (503, "database_away")


async def test_before_the_keys_are_read_nobody_is_called_unknown(
    short: Path, tmp_path: Path, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(tmp_path, route("dummy", runner)) as house:
        await house.gateway.ring.close()  # follows nothing any more
        monkeypatch.setattr(house.gateway.ring, "_read_at", None)
        monkeypatch.setattr(house.gateway.ring, "_callers", {})
        status, answer, headers = await house.post(CHAT, {"model": "dummy", "messages": []})
        assert (status, code_of(answer)) == (503, "keys_unavailable") and headers["retry-after"]


async def test_closing_a_tenant_ends_its_administrators_too(admin: Admin) -> None:
    async with opened(admin.house.config) as database:
        await tenants.close(database, "default")
    await admin.house.gateway.ring.refresh()
    assert (await admin("GET", "/keys"))[0] == 401


async def test_the_documentation_tells_of_it(house: House) -> None:
    async with house.http.get(house.base + "/openapi.json") as answer:
        document = await answer.json()
    operations = [
        (path, operation)
        for path, methods in document["paths"].items()
        if path.startswith("/admin/v1/")
        for operation in methods.values()
    ]
    assert len(operations) == 15
    for path, operation in operations:
        assert operation["security"] == [{"key": []}], path
        assert {"401", "403", "404"} <= set(operation["responses"])
