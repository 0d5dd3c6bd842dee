"""Keys: kept as digests, found again, ended for good; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.metering import keys, planstore, tenants
from engine.metering.database import Database
from engine.metering.keys import Allowed, digest_of, make_key, now_ms, read_allowed
from engine.metering.lookup import AccessError, ConflictError, NotFoundError
from engine.metering.migrations import migrate
from engine.metering.opening import import_file


@pytest.fixture
async def store(url: str) -> AsyncIterator[Database]:
    """A database as it is at the first start."""
    made = Database(url)
    await migrate(made)
    yield made
    await made.close()


def test_made_keys_differ_and_are_long() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("hearth-") and len(key) == 50 for key in made)


async def test_a_key_is_kept_by_its_digest_and_found_by_all_its_names(store: Database) -> None:
    text, made = await keys.create(store, name="for a test", allowed=Allowed(categories=("chat",)))
    assert made.sha256 == digest_of(text) and made.prefix == text[:11] and made.tenant_id == "default"
    for named in (made.id, "for a test", made.prefix, text):
        assert await keys.find(store, named) == made
    assert await keys.list_keys(store) == [made]
    with pytest.raises(NotFoundError, match="Did you mean 'for a test'"):
        await keys.find(store, "for a tset")
    stranger = make_key()
    with pytest.raises(NotFoundError) as caught:
        await keys.find(store, stranger)
    assert stranger not in str(caught.value)


async def test_a_short_key_shows_no_prefix_and_is_not_found_by_none(store: Database) -> None:
    _, made = await keys.create(store, key="short")
    assert made.prefix == ""
    with pytest.raises(NotFoundError):
        await keys.find(store, "")


async def test_adding_a_key_again_changes_nothing(store: Database) -> None:
    _, first = await keys.create(store, key="same-key", name="first")
    _, again = await keys.create(store, key="same-key", name="another")
    assert again == first and await keys.list_keys(store) == [first]


@pytest.mark.parametrize("bad", ["", "has space", "new\nline", "ümlaut"])
async def test_a_key_that_no_header_can_carry_is_refused(store: Database, bad: str) -> None:
    with pytest.raises(AccessError, match="printable ASCII"):
        await keys.create(store, key=bad)
    assert await keys.list_keys(store) == []


@pytest.mark.parametrize(
    ("expires", "told"), [(0, "yet to come"), (-5, "yet to come"), (10**18, "after 9999-12-31")]
)
async def test_a_key_that_would_end_at_once_or_at_no_time_is_refused(
    store: Database, expires: int, told: str
) -> None:
    with pytest.raises(AccessError, match=told):
        await keys.create(store, expires_at=expires)


async def test_keys_made_at_once_are_all_kept(store: Database) -> None:
    made = await asyncio.gather(*(keys.create(store, name=f"n{i}") for i in range(8)))
    assert {key.sha256 for key in await keys.list_keys(store)} == {digest_of(text) for text, _ in made}


async def test_revoking_is_for_good_and_twice_is_once(store: Database) -> None:
    text, made = await keys.create(store)
    ended = await keys.revoke(store, made.id)
    assert ended.state(now_ms()) == "revoked"
    assert await keys.revoke(store, made.id) == ended
    _, again = await keys.create(store, key=text)
    assert again == ended, "giving it anew must not bring it back"


async def test_rotating_keeps_the_terms_and_ends_the_old_key(store: Database) -> None:
    ends = now_ms() + 10**9
    allowed = Allowed(models=("a",), addresses=("10.0.0.0/8",))
    _, first = await keys.create(store, name="app", admin=True, expires_at=ends, allowed=allowed)
    text, second, old = await keys.rotate(store, "app", keep_ms=60_000)
    assert (second.name, second.admin, second.expires_at, second.allowed) == ("app", True, ends, allowed)
    assert second.sha256 == digest_of(text) != first.sha256
    assert old.state(now_ms()) == "valid" and old.state(now_ms() + 60_000) == "expired"
    with pytest.raises(ConflictError, match="2 keys are called 'app'"):
        await keys.rotate(store, "app")
    _, third, gone = await keys.rotate(store, second.id)
    assert gone.state(now_ms()) == "revoked" and third.state(now_ms()) == "valid"
    with pytest.raises(ConflictError, match="is revoked: only a valid key is rotated"):
        await keys.rotate(store, second.id)
    with pytest.raises(AccessError, match="in the past"):
        await keys.rotate(store, third.id, keep_ms=-1)


async def test_rotating_never_lengthens_a_keys_life(store: Database) -> None:
    ends = now_ms() + 5_000
    _, first = await keys.create(store, expires_at=ends)
    _, second, old = await keys.rotate(store, first.id, keep_ms=10**9)
    assert old.expires_at == second.expires_at == ends


@pytest.mark.parametrize("odd", ["", "\0", "a\0b", "\udcff\udcfe", "\ud800", "x" * 5000, "'; --", "%"])
async def test_whatever_is_asked_for_is_found_or_told_of(store: Database, odd: str) -> None:
    await keys.create(store)
    for finding in (keys.find(store, odd), keys.revoke(store, odd), keys.rotate(store, odd)):
        with pytest.raises(NotFoundError, match="There is no key") as caught:
            await finding
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()
    others = (tenants.find(store, odd), keys.list_keys(store, tenant=odd), planstore.find(store, odd))
    for other in others:
        with pytest.raises(NotFoundError, match=r"There is no (tenant|plan)") as caught:
            await other
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


async def test_a_clock_that_jumps_leaves_keys_as_they_are(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made while the clock was an hour ahead: valid at once, and rotated and revoked like any other."""
    ahead = now_ms() + 3_600_000
    monkeypatch.setattr(keys, "now_ms", lambda: ahead)
    text, made = await keys.create(store, expires_at=ahead + 60_000)
    monkeypatch.undo()
    assert made.created_at > now_ms() and made.state(now_ms()) == "valid"
    _, second, old = await keys.rotate(store, text, keep_ms=1000)
    assert old.state(now_ms()) == "valid" and second.expires_at == made.expires_at
    assert second.created_at < made.created_at
    ended = await keys.revoke(store, second.id)
    # Revoked is revoked, wherever the clock goes; expired is as the clock says.
    assert ended.state(0) == ended.state(ahead) == "revoked"
    assert old.state(ahead) == "expired" and old.state(now_ms()) == "valid"


async def test_a_key_needs_an_open_tenant_and_a_plan_that_is_there(store: Database) -> None:
    with pytest.raises(NotFoundError, match="no tenant 'acme'"):
        await keys.create(store, tenant="acme")
    acme = await tenants.create(store, "acme")
    _, key = await keys.create(store, tenant="acme")
    assert key.tenant_id == acme.id
    assert await keys.list_keys(store, tenant="acme") == [key]
    assert await keys.list_keys(store, tenant="default") == []
    with pytest.raises(NotFoundError, match="no plan 'gold'"):
        await keys.create(store, plan="gold")
    await tenants.close(store, "acme")
    with pytest.raises(ConflictError, match="closed"):
        await keys.create(store, tenant="acme")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"addresses": ["300.1.1.1"]}, "addresses: '300.1.1.1' is neither an address nor a network"),
        ({"addresses": [""]}, "addresses: ''"),
        ({"models": [""]}, "models: '' is no model's name"),
        ({"models": [" smol"]}, "models: ' smol' is no model's name"),
        ({"models": ["a\nb"]}, r"models: 'a\\nb' is no model's name"),
        ({"models": ["x" * 201]}, "models: 'x{80}…' is no model's name"),
        ({"categories": ["pictures"]}, "categories"),
        ({"colours": ["red"]}, "colours"),
    ],
)
def test_what_a_key_allows_is_checked(given: dict[str, list[str]], told: str) -> None:
    with pytest.raises(AccessError, match=told):
        read_allowed(given)


def old_file(folder: Path, *texts: str) -> Path:
    file = folder / "keys.json"
    rows = [
        {
            "id": f"key_{i}",
            "prefix": "hearth-",
            "sha256": digest_of(text),
            "created": 1_700_000_000,
            "name": "old",
        }
        for i, text in enumerate(texts)
    ]
    file.write_text(json.dumps(rows))
    return file


async def test_an_old_keys_file_is_taken_in_once_and_kept(
    store: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = old_file(tmp_path, "one", "two")
    before = file.read_bytes()
    assert await import_file(store, file) == 2
    assert "took in 2 keys" in caplog.text
    assert await import_file(store, file) == 0
    one, two = await keys.list_keys(store)
    assert (one.id, one.name, one.created_at) == ("key_0", "old", 1_700_000_000_000)
    assert file.read_bytes() == before
    await keys.revoke(store, two.id)
    assert await import_file(store, file) == 0
    assert (await keys.find(store, two.id)).state(now_ms()) == "revoked"


async def test_an_old_keys_file_is_taken_in_by_several_at_once(store: Database, tmp_path: Path) -> None:
    file = old_file(tmp_path, "one", "two")
    taken = await asyncio.gather(*(import_file(store, file) for _ in range(4)))
    assert sum(taken) == 2 and len(await keys.list_keys(store)) == 2


async def test_a_broken_keys_file_is_an_error_and_changes_nothing(store: Database, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert await import_file(store, file) == 0
    file.write_text("{}")
    with pytest.raises(AccessError, match=r"keys\.json is no list of keys"):
        await import_file(store, file)
    assert file.read_text() == "{}" and await keys.list_keys(store) == []


async def test_no_file_holds_a_key(tmp_path: Path) -> None:
    from engine.config import Config
    from engine.metering.opening import opened

    async with opened(Config(state_dir=tmp_path / "deep")) as store:
        text, _ = await keys.create(store)
        files = [file for file in (tmp_path / "deep").iterdir() if file.is_file()]
        assert {file.name for file in files} >= {"hearth.db", "hearth.db-wal"}
        assert not any(text.encode() in file.read_bytes() for file in files)
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
