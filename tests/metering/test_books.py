"""A worker's books from its first to its last moment, whatever that is."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from engine.config import Config
from engine.metering import schema
from engine.metering.accounts import Account
from engine.metering.books import Books
from engine.metering.counters import Tally, read_counters
from engine.metering.database import Database
from engine.metering.journal import JournalError, JournalFullError
from engine.metering.lease_store import read_budget
from engine.metering.leases import Budget
from engine.metering.pricing import period_name
from engine.metering.recovery import begin_life, sweep_counters
from engine.metering.rows import MOST_ROW_BYTES, LedgerRow
from engine.metering.verify import explain, gather
from tests.metering.test_ledger import Away, count, row, until

NOW = time.time_ns() // 1_000_000
PERIOD = period_name("month", NOW)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(state_dir=tmp_path)


def a_row(books: Books, request_id: str, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {"request_id": request_id, "at": NOW, "period": PERIOD, **changes}
    return row(0, worker=books.worker, **values)


async def kill(books: Books) -> None:
    """As SIGKILL: nothing is folded in or settled, and the locks are free."""
    # A transaction that a server got before the kill is carried out by it.
    await books.wallet.close()
    tasks = [*books._tasks, *books.writer._tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await books.writer._scribe.stop()
    books._journal.close()
    books._tally.close()


async def settled(database: Database, subject: str, budget: Budget) -> None:
    """Waits until a budget stands so."""
    for _ in range(1000):
        if await read_budget(database, subject, PERIOD) == budget:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{subject} was not settled within 10 s")


async def good(database: Database, config: Config) -> bool:
    report = explain(await gather(database, config.ledger_dir))
    assert report.good, report.findings
    return True


async def test_a_life_that_ends_in_order_leaves_only_the_ledger(database: Database, config: Config) -> None:
    books = await Books.open(config, database)
    account = Account("key-1", PERIOD, 100)
    assert await books.wallet.acquire(account, 3)
    books.writer.reserve()
    await books.writer.record(a_row(books, "r-1"), reserved=True)
    books.wallet.spend(account, 3)
    (counters,) = read_counters(config.ledger_dir)
    assert (counters.worker, counters.recorded, counters.charge) == (books.worker, 1, 3)
    assert await good(database, config)
    assert await books.flush()
    assert await count(database) == (1, 3)
    await books.close()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=3, leased=0)
    assert list(config.ledger_dir.iterdir()) == []


async def test_a_killed_life_is_settled_by_the_next(database: Database, config: Config) -> None:
    books = await Books.open(config, database)
    account = Account("key-1", PERIOD, 10)
    assert await books.wallet.acquire(account, 3)
    books._tasks[0].cancel()
    books.writer._folding = asyncio.Lock()
    await books.writer._folding.acquire()
    await books.writer.record(a_row(books, "r-1"))
    await kill(books)
    assert await count(database) == (0, 0)
    assert await good(database, config)
    following = await Books.open(config, database, recover_s=0.05)
    # Two of its living neighbours may come to it at once.
    third = await Books.open(config, database, recover_s=0.05)
    await settled(database, "key-1", Budget(used=3))
    assert await count(database) == (1, 3)
    await until(lambda: not list(config.ledger_dir.glob(f"{books.worker}*")))
    assert sum([await following.wallet.acquire(account, 3) for _ in range(4)]) == 2
    await following.close()
    await third.close()


async def test_a_database_that_is_away_changes_nothing_but_the_place(
    url: str, database: Database, config: Config
) -> None:
    """From the first moment to the last: the rows wait on the disk."""
    away = Away(url)
    away.away = True
    books = await Books.open(config, away)
    soft = Account("key-1", PERIOD, 5, hard=False)
    for number in range(8):
        assert books.wallet.take(soft, 3) or await books.wallet.acquire(soft, 3)
        await books.writer.record(a_row(books, f"r-{number}"))
        books.wallet.spend(soft, 3)
    assert not await books.flush()
    await books.close()
    assert await count(database) == (0, 0)
    assert await good(database, config)
    following = await Books.open(config, database, recover_s=0.05)
    await until(lambda: len(list(config.ledger_dir.glob("*.journal"))) == 1)
    await following.close()
    assert await count(database) == (8, 24)
    assert await good(database, config)
    await away.close()


async def test_a_database_that_comes_back_gets_what_waited(
    url: str, database: Database, config: Config
) -> None:
    away = Away(url)
    books = await Books.open(config, away)
    account = Account("key-1", PERIOD, 1000)
    assert await books.wallet.acquire(account, 3)
    away.away = True
    for number in range(20):
        await books.writer.record(a_row(books, f"r-{number}"))
    away.away = False
    await until(lambda: books.writer.backlog == 0)
    assert await count(database) == (20, 60)
    await books.close()
    await away.close()


async def test_a_sqlite_file_that_is_moved_away_and_back(tmp_path: Path) -> None:
    """Its folder is gone, as with a disk that is not mounted."""
    from engine.metering.database import sqlite_url
    from engine.metering.opening import prepare

    folder, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    folder.mkdir()
    database = Database(sqlite_url(folder / "hearth.db"))
    config = Config(state_dir=tmp_path / "state")
    await prepare(database, config)
    await database.close()
    folder.rename(elsewhere)
    books = await Books.open(config, database)
    await books.writer.record(a_row(books, "r-1"))
    assert not await books.flush()
    elsewhere.rename(folder)
    assert await books.flush()
    await books.close()
    assert await count(database) == (1, 3)
    await database.close()


async def test_a_full_journal_refuses_new_requests_and_keeps_the_old(
    url: str, database: Database, tmp_path: Path
) -> None:
    config = Config.model_validate({"state_dir": tmp_path, "metering": {"journal_bytes": 1024 * 1024}})
    away = Away(url)
    away.away = True
    books = await Books.open(config, away)
    served = 0
    large = {"text": "x" * (MOST_ROW_BYTES - 400)}
    with pytest.raises(JournalFullError, match="journal_bytes"):
        while True:
            books.writer.reserve()
            await books.writer.record(a_row(books, f"r-{served}", work=large), reserved=True)
            served += 1
    assert 120 < served < 140
    away.away = False
    await until(lambda: books.writer.backlog == 0)
    await until(lambda: books._journal.size == 0)
    books.writer.reserve()
    books.writer.release()
    await books.close()
    assert await count(database) == (served, 3 * served)
    await away.close()


async def test_a_failing_disk_is_replaced_by_the_database(
    url: str, database: Database, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(url)
    books = await Books.open(config, away)

    def fails(records: object) -> None:
        raise JournalError("the disk is broken.")

    with monkeypatch.context() as broken:
        broken.setattr(books._journal, "append", fails)
        await books.writer.record(a_row(books, "r-1"))
        assert await count(database) == (1, 3)
        await until(lambda: read_counters(config.ledger_dir)[0].recorded == 1)
        away.away = True
        with pytest.raises(JournalError, match="disk is broken"):
            await books.writer.record(a_row(books, "r-2"))
        with pytest.raises(JournalFullError, match="neither"):
            books.writer.reserve()
        away.away = False
    await until(lambda: read_counters(config.ledger_dir)[0].waiting == 0)
    await books.writer.record(a_row(books, "r-3"))
    assert await good(database, config)
    await books.close()
    assert await count(database) == (2, 6)
    await away.close()


async def test_write_through_waits_for_the_database(url: str, database: Database, tmp_path: Path) -> None:
    config = Config.model_validate({"state_dir": tmp_path, "metering": {"write_through": True}})
    away = Away(url)
    books = await Books.open(config, away)
    await asyncio.gather(*(books.writer.record(a_row(books, f"r-{number}")) for number in range(50)))
    assert await count(database) == (50, 150)
    away.away = True
    await books.writer.record(a_row(books, "r-away"))
    away.away = False
    await books.close()
    assert await count(database) == (51, 153)
    await away.close()


async def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, database: Database) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be opened"):
        await Books.open(Config(state_dir=tmp_path / "file"), database)


async def test_a_journal_that_cannot_be_read_is_kept_and_the_others_are_settled(
    database: Database, config: Config
) -> None:
    strange, journal = begin_life(config.ledger_dir, most_bytes=100_000)
    journal.append([b"no row"])
    journal.close()
    foreign = config.ledger_dir / "w-foreign.journal"
    foreign.write_bytes(b"something that is no journal at all")
    dead = await Books.open(config, database)
    await dead.writer.record(a_row(dead, "r-1"))
    await kill(dead)
    books = await Books.open(config, database, recover_s=0.02)
    await until(lambda: not list(config.ledger_dir.glob(f"{dead.worker}.journal")))
    await asyncio.sleep(0.1)
    await books.close()
    assert (config.ledger_dir / f"{strange}.journal").exists()
    assert foreign.exists()
    assert await count(database) == (1, 3)


async def test_counters_that_do_not_agree_are_kept_for_a_week(
    database: Database, config: Config, tmp_path: Path
) -> None:
    folder = config.ledger_dir
    folder.mkdir()
    tally = Tally(folder, "w-liar")
    tally.begin(1)
    tally.end(1, 3, durable=True)
    tally.close()
    assert await sweep_counters(database, folder) == []
    assert await sweep_counters(database, folder, keep_s=0) == ["w-liar"]
    assert read_counters(folder) == []


@dataclass
class Town:
    """Workers that come and go over one database, and what their clients saw."""

    database: Database
    config: Config
    chance: random.Random
    limit: int
    included: int
    answered: dict[str, tuple[int, bool]] = field(default_factory=dict)
    number: int = 0

    async def client(self, books: Books) -> None:
        """Sends requests until the budget is used up, as `meter` and `ticket` do."""
        free = Account("key-1#included", PERIOD, self.included)
        budget = Account("key-1", PERIOD, self.limit)
        wallet = books.wallet
        while True:
            self.number += 1
            request = f"r-{self.number}"
            books.writer.reserve()
            included = wallet.take(free, 1) or await wallet.acquire(free, 1)
            account, cost = (free, 1) if included else (budget, 2)
            if not included and not (wallet.take(budget, 2) or await wallet.acquire(budget, 2)):
                books.writer.release()
                return
            await asyncio.sleep(self.chance.uniform(0, 0.004))
            if self.chance.random() < 0.1:
                wallet.put_back(account, cost)
                books.writer.release()
                continue
            charge = 0 if included else 2
            await books.writer.record(a_row(books, request, charge=charge, included=included), reserved=True)
            self.answered[request] = (charge, included)
            wallet.spend(account, cost)


@pytest.mark.parametrize("seed", range(2))
async def test_workers_that_die_at_any_moment_spend_a_budget_exactly(
    url: str, database: Database, config: Config, seed: int
) -> None:
    """Requests, included ones and money over several lives: all used, none over, none lost or doubled."""
    town = Town(database, config, random.Random(seed), limit=900, included=150)
    databases: list[Database] = []
    living: dict[Books, list[asyncio.Task[None]]] = {}

    async def begin() -> None:
        databases.append(Database(url))
        books = await Books.open(config, databases[-1], recover_s=0.1)
        living[books] = [asyncio.create_task(town.client(books)) for _ in range(4)]

    async with asyncio.timeout(120):
        for _ in range(3):
            await begin()
        for _ in range(4):
            await asyncio.sleep(town.chance.uniform(0.02, 0.2))
            victim = town.chance.choice(list(living))
            for task in living.pop(victim):
                task.cancel()
            await kill(victim)
            assert await good(database, config)
            await begin()
        for tasks in living.values():
            await asyncio.gather(*tasks)
        # What the last victims held comes back; the others still live.
        last = next(iter(living))
        used = 0
        while used < 900:
            await town.client(last)
            await last.flush()
            used = (await count(database))[1]
            assert used <= 900
        # Who is closed while it takes a victim's journal in leaves that to the next.
        for _ in range(1000):
            if len(list(config.ledger_dir.glob("*.journal"))) <= len(living):
                break
            await asyncio.sleep(0.01)
        for books in living:
            await books.close()
    async with database.reading() as connection:
        rows = {
            request: (charge, included)
            for request, charge, included in await connection.execute(
                select(schema.ledger.c.request_id, schema.ledger.c.charge, schema.ledger.c.included)
            )
        }
        free = await connection.scalar(
            select(func.count()).select_from(schema.ledger).where(schema.ledger.c.included)
        )
    assert town.answered.items() <= rows.items()
    # A killed worker's rows may be durable without its client having heard so.
    assert len(rows) - len(town.answered) <= 4 * 4
    assert sum(charge for charge, _ in rows.values()) == 900
    assert free == 150
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=900)
    assert await read_budget(database, "key-1#included", PERIOD) == Budget(used=150)
    assert await good(database, config)
    assert list(config.ledger_dir.iterdir()) == []
    for each in databases:
        await each.close()
