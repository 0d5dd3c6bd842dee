"""Retries with an Idempotency-Key, on both databases, with workers that live, die or are elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering.database import Database, DatabaseAwayError
from engine.metering.idempotency import MOST_BODY_BYTES, Claimed, Idempotency, InProgress, Mismatch, Recorded
from engine.metering.ledger import write_rows
from engine.metering.recovery import begin_life
from engine.metering.rows import encode
from engine.metering.schema import idempotency as table
from tests.metering.test_ledger import row

HEADERS = [(b"content-type", b"application/json"), (b"x-name", b"caf\xe9")]
DAY = 86_400
FRESH = Claimed("req_2", charged=False)
AGAIN = Claimed("req_1", charged=True)


class Worker:
    """A worker of a machine (a folder of journals), with a clock that can be set."""

    def __init__(self, database: Database, folder: Path, clock: list[float]) -> None:
        self.name, self.journal = begin_life(folder, most_bytes=100_000)
        self.retries = Idempotency(database, self.name, folder=folder, stale_s=600, clock=lambda: clock[0])

    async def claim(self, request_id: str, *, digest: str = "a", key: str = "retry") -> object:
        return await self.retries.claim("key_1", key, digest, request_id)

    async def complete(self, body: bytes | None, *, key: str = "retry") -> None:
        await self.retries.complete("key_1", key, 200, HEADERS, body)

    def die(self) -> None:
        self.journal.close()


class House:
    """Two machines with a common database."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.clock = url, folder, [1_000_000_000.0]
        self.databases: list[Database] = []
        self.workers: list[Worker] = []

    def worker(self, machine: str = "here") -> Worker:
        self.databases.append(Database(self.url))
        self.workers.append(Worker(self.databases[-1], self.folder / machine, self.clock))
        return self.workers[-1]


@pytest.fixture
async def house(url: str, database: Database, tmp_path: Path) -> AsyncIterator[House]:
    made = House(url, tmp_path)
    yield made
    for worker in made.workers:
        worker.die()
    for each in made.databases:
        await each.close()


async def count(database: Database) -> int:
    async with database.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def test_an_answer_is_given_again_on_every_worker(house: House) -> None:
    one, two = house.worker(), house.worker()
    assert await one.claim("req_1") == Claimed("req_1", charged=False)
    await one.complete(b"{}")
    for worker in (one, two):
        assert await worker.claim("req_2") == Recorded(200, tuple(HEADERS), b"{}", "req_1")
    assert await two.claim("req_2", key="other") == FRESH
    assert await two.retries.claim("key_2", "retry", "a", "req_3") == Claimed("req_3", charged=False)


async def test_an_empty_answer_is_one(house: House) -> None:
    one = house.worker()
    await one.claim("req_1")
    await one.complete(b"")
    assert await one.claim("req_2") == Recorded(200, tuple(HEADERS), b"", "req_1")


@pytest.mark.parametrize("body", [None, bytes(MOST_BODY_BYTES + 1)])
async def test_an_answer_that_is_not_kept_is_made_again_and_not_charged_again(
    house: House, body: bytes | None
) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    await one.complete(body)
    assert await two.claim("req_2") == AGAIN
    # Nor once its second try has failed.
    await two.retries.drop("key_1", "retry")
    assert await two.claim("req_2") == AGAIN
    assert await one.claim("req_2") == AGAIN


async def test_the_longest_answer_is_kept(house: House) -> None:
    one = house.worker()
    await one.claim("req_1")
    await one.complete(bytes(MOST_BODY_BYTES))
    assert isinstance(await one.claim("req_2"), Recorded)


async def test_a_request_that_was_not_answered_is_forgotten(house: House) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    await one.retries.drop("key_1", "retry")
    assert await two.claim("req_2") == FRESH


async def test_while_it_is_being_answered_a_retry_is_told_so(house: House) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    house.clock[0] += 3
    assert await one.claim("req_2") == InProgress(3.0)
    assert await two.claim("req_2") == InProgress(3.0)


async def test_another_request_with_the_same_key_is_told(house: House) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    for _ in range(2):
        assert await one.claim("req_2", digest="b") == Mismatch()
        assert await two.claim("req_2", digest="b") == Mismatch()
        await one.complete(b"{}")


async def test_of_claims_at_once_one_wins(house: House) -> None:
    workers = [house.worker() for _ in range(4)]
    for number in range(5):
        outcomes = await asyncio.gather(
            *(worker.claim(f"req_{place}", key=f"k{number}") for place, worker in enumerate(workers * 3))
        )
        assert sum(isinstance(each, Claimed) for each in outcomes) == 1
        assert sum(isinstance(each, InProgress) for each in outcomes) == 11


async def test_what_a_dead_worker_left_is_taken_over_once(house: House) -> None:
    one, two, three = house.worker(), house.worker(), house.worker()
    await one.claim("req_1")
    assert isinstance(await two.claim("req_2"), InProgress)
    one.die()
    assert await two.claim("req_2") == Claimed("req_1", charged=False)
    assert isinstance(await three.claim("req_3"), InProgress)
    await two.complete(b"two")
    assert await three.claim("req_3") == Recorded(200, tuple(HEADERS), b"two", "req_1")


async def test_a_dead_worker_whose_journal_is_gone_is_dead(house: House) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    one.journal.remove()
    assert await two.claim("req_2") == Claimed("req_1", charged=False)


@pytest.mark.parametrize("where", ["ledger", "journal"])
async def test_what_a_dead_worker_had_charged_is_not_charged_again(
    house: House, database: Database, where: str
) -> None:
    one, two = house.worker(), house.worker()
    charged = row(1, worker=one.name)
    await one.retries.claim("key_1", "retry", "a", charged.request_id)
    if where == "ledger":
        await write_rows(database, [charged])
    else:
        one.journal.append([encode(row(2, worker=one.name)), encode(charged)])
    one.die()
    expected = Claimed(charged.request_id, charged=True)
    assert await two.claim("req_2") == expected
    # A second try that fails does not make it a new request.
    await two.retries.drop("key_1", "retry")
    assert await two.claim("req_2") == expected
    await two.complete(b"now")
    assert await two.claim("req_2") == Recorded(200, tuple(HEADERS), b"now", charged.request_id)


async def test_another_machines_worker_is_believed_until_its_claim_is_stale(house: House) -> None:
    one, other = house.worker(), house.worker("elsewhere")
    await one.claim("req_1")
    one.die()
    house.clock[0] += 599
    assert await other.claim("req_2") == InProgress(599.0)
    house.clock[0] += 2
    assert await other.claim("req_2") == Claimed("req_1", charged=False)
    # What the first one still says of it (it was slow, not dead) is not heard.
    await one.complete(b"late")
    assert isinstance(await one.claim("req_3"), InProgress)
    await other.complete(b"{}")
    assert await one.claim("req_3") == Recorded(200, tuple(HEADERS), b"{}", "req_1")


@pytest.mark.parametrize("jump", [DAY + 1, -DAY - 1])
async def test_it_is_forgotten_after_a_day_and_where_a_clock_jumped(house: House, jump: float) -> None:
    one = house.worker()
    await one.claim("req_1")
    await one.complete(b"{}")
    house.clock[0] += jump
    assert await one.claim("req_2", digest="another") == FRESH
    await one.complete(b"new")
    # The clock is set right: the old answer does not come back.
    house.clock[0] -= jump
    outcome = await one.claim("req_3")
    assert outcome == Claimed("req_3", charged=False)


async def test_within_a_day_it_is_remembered_by_clocks_that_differ(house: House) -> None:
    one = house.worker()
    await one.claim("req_1")
    await one.complete(b"{}")
    for seconds in (-5, DAY - 1):
        house.clock[0] = 1_000_000_000.0 + seconds
        assert isinstance(await one.claim("req_2"), Recorded)


@pytest.mark.parametrize("jump", [DAY + 1, -DAY - 1])
async def test_no_clock_ends_what_a_living_worker_is_at(
    house: House, database: Database, jump: float
) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    house.clock[0] += jump
    assert isinstance(await one.claim("req_2"), InProgress)
    assert isinstance(await two.claim("req_2"), InProgress)
    assert await one.retries.purge() == await two.retries.purge() == 0
    assert await count(database) == 1
    one.die()
    assert await two.claim("req_2") == FRESH


async def test_purge_deletes_what_is_old(house: House, database: Database) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1", key="dead")
    one.die()
    await two.claim("req_2", key="answered")
    await two.complete(b"{}", key="answered")
    await two.claim("req_3", key="in hand")
    assert await two.retries.purge() == 0
    house.clock[0] += DAY + 1
    await two.claim("req_4", key="young")
    await two.complete(b"{}", key="young")
    assert await two.retries.purge() == 2
    assert await count(database) == 2


async def test_a_purge_takes_as_many_turns_as_it_needs(
    house: House, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.metering.idempotency_store._PURGED_AT_ONCE", 2)
    one = house.worker()
    for number in range(5):
        await one.claim(f"req_{number}", key=f"k{number}")
        await one.complete(None, key=f"k{number}")
    house.clock[0] += DAY + 1
    assert await one.retries.purge() == 5
    assert await count(database) == 0


@pytest.mark.parametrize("who", [0, 1])
async def test_a_cancelled_claim_does_not_hold_its_key(house: House, who: int) -> None:
    workers = one, _ = house.worker(), house.worker()
    for moment in range(12):
        key = f"k{moment}"
        task = asyncio.create_task(one.claim("req_1", key=key))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        # Its own next claim comes after what it has still to say.
        await one.claim("req_2", key=f"other {moment}")
        again = await workers[who].claim("req_3", key=key)
        if isinstance(outcome, Claimed):
            assert isinstance(again, InProgress)
        else:
            assert again == Claimed("req_3", charged=False)
            assert isinstance(await workers[1 - who].claim("req_4", key=key), InProgress)


async def test_of_a_claim_and_a_cancelled_one_before_it_one_wins(house: House) -> None:
    one, two = house.worker(), house.worker()
    for moment in range(6):
        key = f"k{moment}"
        task = asyncio.create_task(one.claim("req_1", key=key))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        outcomes = await asyncio.gather(*(one.claim(f"req_{number}", key=key) for number in range(5)))
        outcomes.append(await two.claim("req_9", key=key))
        assert sum(isinstance(each, Claimed) for each in outcomes) == 1


async def test_a_claim_whose_commit_failed_does_not_hold_its_key(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = house.worker(), house.worker()
    writing = house.databases[0].writing

    @contextlib.asynccontextmanager
    async def lost() -> AsyncIterator[AsyncConnection]:
        async with writing() as connection:
            yield connection
        # It is written, and the answer does not come.
        raise DatabaseAwayError("gone fishing")

    with monkeypatch.context() as patched:
        patched.setattr(house.databases[0], "writing", lost)
        with pytest.raises(DatabaseAwayError):
            await one.claim("req_1")
    assert isinstance(await two.claim("req_2"), InProgress)
    await one.retries.close()
    assert await two.claim("req_2") == FRESH


async def test_a_client_that_leaves_does_not_keep_its_answer_from_being_kept(house: House) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1")
    task = asyncio.create_task(one.complete(b"{}"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Its own next claim comes after what it has still to say.
    await one.claim("req_3", key="other")
    outcome = await two.claim("req_2")
    assert isinstance(outcome, Recorded) and outcome.body == b"{}"


async def test_what_could_not_be_said_is_said_once_the_database_is_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = house.worker(), house.worker()
    await one.claim("req_1", key="answered")
    await one.claim("req_2", key="failed")
    with monkeypatch.context() as patched:

        def away() -> None:
            raise DatabaseAwayError("gone fishing")

        patched.setattr(house.databases[0], "writing", away)
        await one.complete(b"{}", key="answered")
        await one.retries.drop("key_1", "failed")
        with pytest.raises(DatabaseAwayError):
            await one.claim("req_3", key="answered")
    assert isinstance(await two.claim("req_3", key="answered"), InProgress)
    assert isinstance(await one.claim("req_3", key="answered"), Recorded)
    assert await two.claim("req_3", key="failed") == Claimed("req_3", charged=False)


async def test_a_row_of_an_older_hearth_belongs_to_nobody(house: House, database: Database) -> None:
    one = house.worker()
    values = {
        "key_id": "key_1", "idem_key": "retry", "request_hash": "a", "request_id": "req_1",
        "created_at": round(house.clock[0] * 1000),
    }  # fmt: skip
    async with database.writing() as connection:
        await connection.execute(table.insert().values(**values))
    assert await one.claim("req_2") == Claimed("req_1", charged=False)


async def test_the_mark_of_a_folder_stays(house: House, tmp_path: Path) -> None:
    one = house.worker()
    await one.claim("req_1")
    (mark,) = (tmp_path / "here").glob("home*")
    before = mark.read_text()
    house.worker()
    assert mark.read_text() == before
    assert sorted(file.suffix for file in (tmp_path / "here").iterdir()) == ["", ".journal", ".journal"]
