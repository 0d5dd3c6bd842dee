"""Keys of a worker that starts while the database is away: from the file that workers before it kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.metering import keys, planstore, schema, tenants
from engine.metering.database import Database, DatabaseAwayError, sqlite_url
from engine.metering.keyring import KeyRing, _shown_age
from engine.metering.keys import Allowed
from engine.metering.migrations import migrate
from engine.metering.plans import PlanSpec
from engine.metering.snapshot import (
    Snapshot,
    SnapshotError,
    SnapshotKeeper,
    database_digest,
    read_snapshot,
    write_snapshot,
)


@pytest.fixture
async def store(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await migrate(made)
    yield made
    await made.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.snapshot"


class Gone(Database):
    """A database of the same name that does not answer until it is told to."""

    away = True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        if self.away:
            raise DatabaseAwayError(f"The database {self.name} cannot be reached.")
        with super()._explained():
            yield


async def until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < within_s, "the condition did not come true"
        await asyncio.sleep(0.01)


async def kept(store: Database, file: Path) -> None:
    """A worker's life that leaves a snapshot."""
    ring = KeyRing(store, snapshot=file, every_s=0.01)
    await ring.start()
    await until(lambda: file.exists() and read_snapshot(file, database_digest(store.name)) is not None)
    await until(lambda: read_snapshot(file, database_digest(store.name)).version == ring._version)  # type: ignore[union-attr]
    await ring.close()


async def test_a_worker_that_starts_without_its_database_knows_the_keys(
    store: Database, url: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await planstore.create(store, "gold", PlanSpec(price=5, counts="tenant"))
    acme = await tenants.create(store, "acme", plan="gold")
    text, made = await keys.create(store, tenant="acme", allowed=Allowed(addresses=("10.0.0.0/8",)))
    ended, _ = await keys.create(store, name="ended")
    await keys.revoke(store, "ended")
    await kept(store, file)
    away = Gone(url)
    ring = KeyRing(away, snapshot=file, every_s=0.01)
    await ring.start()
    caller = ring.find(text)
    assert caller is not None and caller.key == made and caller.subject == acme.id
    assert caller.plan is not None and caller.plan.spec.price == 5
    assert caller.may_call_from("10.1.1.1") and not caller.may_call_from("11.1.1.1")
    assert ring.find(ended).state(ring.now_ms()) == "revoked"  # type: ignore[union-attr]
    assert ring.loaded and "are in use, as they were 0 seconds ago" in caplog.text
    away.away = False
    late, _ = await keys.create(store, name="late")
    await until(lambda: ring.find(late) is not None)
    await ring.close()
    await away.close()


async def test_a_key_revoked_since_the_snapshot_ends_when_the_database_answers(
    store: Database, url: str, file: Path
) -> None:
    text, made = await keys.create(store)
    await kept(store, file)
    await keys.revoke(store, made.id)
    away = Gone(url)
    ring = KeyRing(away, snapshot=file, every_s=0.01)
    await ring.start()
    assert ring.find(text).state(ring.now_ms()) == "valid"  # type: ignore[union-attr]
    away.away = False
    await until(lambda: ring.find(text).state(ring.now_ms()) == "revoked")  # type: ignore[union-attr]
    # And in the file, too: the next worker without a database does not know it as valid.
    await until(lambda: b'"revoked_at":null' not in _row(file, made.id))
    await ring.close()
    await away.close()


def _row(file: Path, id: str) -> bytes:
    return next(line for line in _content(file).splitlines() if f'"{id}"'.encode() in line)


def _content(file: Path) -> bytes:
    return file.read_bytes()


def _status(file: Path) -> os.stat_result:
    return file.stat()


async def test_what_a_restored_database_does_not_know_goes_with_the_snapshot(
    store: Database, url: str, file: Path
) -> None:
    text, _ = await keys.create(store)
    await kept(store, file)
    async with store.writing() as connection:
        await connection.execute(schema.keys.delete())
    away = Gone(url)
    ring = KeyRing(away, snapshot=file, every_s=0.01)
    await ring.start()
    assert ring.find(text) is not None
    away.away = False
    await until(lambda: ring.find(text) is None)
    assert ring.loaded and len(ring) == 0
    await ring.close()
    await away.close()


async def test_no_key_lies_in_the_file_and_nobody_else_may_read_it(store: Database, file: Path) -> None:
    text, made = await keys.create(store)
    await kept(store, file)
    content = _content(file)
    assert text.encode() not in content and text[12:].encode() not in content
    assert made.sha256.encode() in content
    assert stat.S_IMODE(_status(file).st_mode) == 0o600
    assert [each.name for each in file.parent.iterdir()] == ["keys.snapshot"]


async def test_it_is_written_only_when_something_changed(store: Database, file: Path) -> None:
    await keys.create(store)
    ring = KeyRing(store, snapshot=file, every_s=0.01)
    await ring.start()
    await until(file.exists)
    first = _status(file).st_ino
    await asyncio.sleep(0.2)
    assert _status(file).st_ino == first
    await keys.create(store, name="another")
    await until(lambda: _status(file).st_ino != first)
    await ring.close()


def _damage(file: Path, how: str) -> None:
    file.write_bytes(_damaged(file.read_bytes(), how))


def _damaged(content: bytes, how: str) -> bytes:
    head, _, rows = content.partition(b"\n")
    if how == "half":
        return content[: len(content) // 2]
    if how == "head":
        return content[:20]
    if how == "empty":
        return b""
    if how == "a bit":
        return head + b"\n" + rows[:-5] + bytes([rows[-5] ^ 1]) + rows[-4:]
    if how == "a row":
        return head + b"\n" + rows.rpartition(b"\n")[0]
    known = json.loads(head)
    if how == "format":
        return json.dumps({**known, "format": known["format"] + 1}).encode() + b"\n" + rows
    assert how == "field"
    return json.dumps({**known, "more": 1}).encode() + b"\n" + rows


@pytest.mark.parametrize("how", ["half", "head", "empty", "a bit", "a row", "format", "field"])
async def test_a_damaged_file_is_as_none(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    url = sqlite_url(tmp_path / "hearth.db")
    store = Database(url)
    await migrate(store)
    text, _ = await keys.create(store)
    await kept(store, file)
    _damage(file, how)
    away = Gone(url)
    ring = KeyRing(away, snapshot=file, every_s=0.01)
    await ring.start()
    assert not ring.loaded and ring.find(text) is None
    assert "it is not used" in caplog.text and "no key is known" in caplog.text
    away.away = False
    await until(lambda: ring.find(text) is not None)
    # And a whole one takes its place.
    await until(lambda: _whole(file, store))
    await ring.close()
    await away.close()
    await store.close()


def _whole(file: Path, store: Database) -> bool:
    try:
        return read_snapshot(file, database_digest(store.name)) is not None
    except SnapshotError:
        return False


async def test_without_a_file_nobody_is_told_known_from_unknown(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = Gone(f"sqlite+aiosqlite:///{tmp_path}/hearth.db")
    ring = KeyRing(away, snapshot=file)
    await ring.start()
    assert not ring.loaded and "no key is known" in caplog.text
    await ring.close()
    assert _content(tmp_path / "hearth.db") == b"", "opened, but not one page was written"
    await away.close()


async def test_a_snapshot_of_another_database_is_not_used(
    store: Database, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, _ = await keys.create(store)
    await kept(store, file)
    other = Database("postgresql://nobody:secret@127.0.0.1:1/none")
    ring = KeyRing(other, snapshot=file)
    await ring.start()
    assert not ring.loaded and ring.find(text) is None
    assert "is of another database: it is not used" in caplog.text and "secret" not in caplog.text
    await ring.close()
    await other.close()


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (-5000, "0 seconds"),
        (119_999, "119 seconds"),
        (120_000, "2 minutes"),
        (7_200_000, "2 hours"),
        (20 * 86_400_000, "20 days"),
    ],
)
def test_its_age_is_told_for_a_person(ms: int, shown: str) -> None:
    assert _shown_age(ms) == shown


def test_another_password_is_the_same_database() -> None:
    names = [Database(f"postgresql://hearth:{word}@db/hearth").name for word in ("one", "two")]
    assert database_digest(names[0]) == database_digest(names[1])


def test_a_file_that_others_may_write_is_not_believed(file: Path) -> None:
    write_snapshot(file, _snapshot(), now_ms=1000)
    file.chmod(0o622)
    with pytest.raises(SnapshotError, match="written by others"):
        read_snapshot(file, "d")


def _snapshot(version: int = 1, read_at: int = 1000) -> Snapshot:
    return Snapshot("d", version, read_at, plans=(), tenants=(), keys=())


@pytest.mark.parametrize(
    ("there", "new", "now", "written"),
    [
        (_snapshot(5, 1000), _snapshot(6, 1500), 2000, True),
        # A worker that was held up between reading and writing.
        (_snapshot(6, 1500), _snapshot(5, 1400), 2000, False),
        (_snapshot(6, 1500), _snapshot(5, 1600), 2000, False),
        (_snapshot(6, 90_000), _snapshot(5, 1000), 90_000, False),
        (_snapshot(6, 1500), _snapshot(6, 1600), 2000, False),
        # A backup was restored: fewer changes, read later.
        (_snapshot(6, 1000), _snapshot(4, 90_000), 90_000, True),
        # The clock was set back by an hour.
        (_snapshot(6, 3_700_000), _snapshot(7, 100_000), 100_000, True),
        (_snapshot(6, 3_700_000), replace(_snapshot(2, 100_000), database="e"), 100_000, True),
    ],
)
def test_of_two_readings_the_later_stays(
    file: Path, there: Snapshot, new: Snapshot, now: int, written: bool
) -> None:
    assert write_snapshot(file, there, now_ms=there.read_at)
    assert write_snapshot(file, new, now_ms=now) is written
    stays = new if written else there
    assert read_snapshot(file, stays.database).version == stays.version  # type: ignore[union-attr]


def _write_often(file: Path, first: int) -> None:
    for version in range(first, first + 200, 4):
        write_snapshot(file, _snapshot(version), now_ms=1000)


def test_workers_write_the_same_file_without_harm(file: Path) -> None:
    file.parent.mkdir(parents=True)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_write_often, args=(file, first)) for first in range(4)]
    for worker in workers:
        worker.start()
    seen = 0
    while any(worker.is_alive() for worker in workers):
        found = read_snapshot(file, "d")
        if found is not None:
            assert found.version >= seen, "an older reading came back"
            seen = found.version
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert read_snapshot(file, "d").version == 199  # type: ignore[union-attr]
    assert [each.name for each in file.parent.iterdir()] == ["keys.snapshot"]


async def test_a_folder_that_cannot_be_written_is_told_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file, no folder")
    keeper = SnapshotKeeper(tmp_path / "state" / "keys.snapshot", lambda: 1000)
    assert keeper.due(1)
    await keeper.keep(_snapshot(1))
    assert "cannot be written" in caplog.text and not keeper.due(1) and keeper.due(2)


def _remove(file: Path) -> None:
    file.unlink()


async def test_an_unchanged_file_is_marked_and_a_lost_one_made_anew(file: Path) -> None:
    keeper = SnapshotKeeper(file, lambda: 1000, mark_s=0)
    await keeper.keep(_snapshot(1))
    inode = _status(file).st_ino
    os.utime(file, (0, 0))
    await keeper.keep(_snapshot(1))
    assert _status(file).st_ino == inode and time.time() - _status(file).st_mtime < 60
    found = read_snapshot(file, "d")
    assert found is not None and time.time() * 1000 - found.read_at < 60_000, "its age is since the mark"
    _remove(file)
    await keeper.keep(_snapshot(1))
    assert read_snapshot(file, "d") is not None


async def test_a_state_that_was_held_back_is_tried_again_later(file: Path) -> None:
    """Workers that read within seconds of each other go by the count; were that wrong, it would not last."""
    write_snapshot(file, _snapshot(9, 1000), now_ms=1000)
    keeper = SnapshotKeeper(file, lambda: 90_000, mark_s=0)
    await keeper.keep(_snapshot(4, 2000))
    assert read_snapshot(file, "d").version == 9  # type: ignore[union-attr]
    assert keeper.due(4)
    await keeper.keep(_snapshot(4, 90_000))
    assert read_snapshot(file, "d").version == 4  # type: ignore[union-attr]
