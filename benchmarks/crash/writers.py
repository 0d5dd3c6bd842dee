"""The ledger alone, without gateways, under kill -9.

Writer processes lease from one key's budget, "answer" requests and record them; a request counts as answered
once `record` has returned (the writer then tells this process, as a gateway then sends its last byte). Each
round kills one of them with SIGKILL at a random moment or, with PostgreSQL in every fifth round, the database
with all its processes. A new writer recovers what the dead left. At the end every answered request must be in
the ledger once, no row twice, and the budget exactly used.

    python -m benchmarks.ledger_crash --writers 8 --rounds 200 --database postgresql
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import func, select

from benchmarks.crash.databases import PostgreSQL, database
from engine.metering import schema
from engine.metering.database import Database, DatabaseError
from engine.metering.lease_store import LeaseStore, read_budget
from engine.metering.leases import Purse, block
from engine.metering.ledger import LedgerWriter
from engine.metering.recovery import begin_life, end_life, recover
from engine.metering.rows import LedgerRow

KEY, PERIOD, JOURNAL_BYTES = "key-crash", "2026-11", 64 * 1024 * 1024
#: Mean pause of each of a writer's 16 callers: so the budget lasts for the rounds.
PACE_S = 0.1


@dataclass
class Figures:
    """What one run found; `missing`, `twice`, `over` and `lost_budget` must be 0."""

    database: str
    rounds: int
    writers: int
    limit: int
    killed_writers: int = 0
    killed_databases: int = 0
    answered: int = 0
    rows: int = 0
    #: Rows whose writer was killed between their being durable and its saying so.
    unanswered: int = 0
    missing: int = 0
    twice: int = 0
    over: int = 0
    lost_budget: int = 0
    used: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.missing or self.twice or self.over or self.lost_budget)


async def _write(url: str, folder: Path, limit: int, writers: int) -> None:
    """One writer process: prints each request's id once its row is durable, until the budget is used up."""
    database = Database(url)
    worker, journal = begin_life(folder, most_bytes=JOURNAL_BYTES)
    with suppress(DatabaseError):
        await recover(database, folder, most_bytes=JOURNAL_BYTES)
    writer = LedgerWriter(database, journal, worker=worker, retry_s=0.05, patience_s=2.0)
    store, purse = LeaseStore(database, worker), Purse(time.monotonic)
    leasing = asyncio.Lock()
    numbers = iter(range(10**9))
    out = sys.stdout.fileno()
    writer.start()

    async def more() -> bool:
        async with leasing:
            if purse.spare > 0:
                return True
            try:
                budget = await read_budget(database, KEY, PERIOD)
                wish = block(limit, budget.used + budget.leased, writers, 1)
                units = await store.lease(KEY, PERIOD, wish, limit)
            except DatabaseError:
                await asyncio.sleep(0.05)
                return True
            purse.credit(units, time.monotonic() + store.lasts_s / 2)
            return units > 0

    async def caller() -> None:
        while True:
            if not purse.take(1):
                if not await more():
                    return
                continue
            request = f"{worker}-{next(numbers)}"
            writer.reserve()
            await writer.record(_row(request, worker), reserved=True)
            purse.spend(1)
            # One write of a short line to a pipe is whole or not at all.
            os.write(out, f"{request}\n".encode())
            await asyncio.sleep(random.uniform(0, 2 * PACE_S))

    await asyncio.gather(*(caller() for _ in range(16)))
    await writer.close()
    with suppress(DatabaseError):
        await end_life(database, worker, journal)
    await database.close()


def _row(request: str, worker: str) -> LedgerRow:
    return LedgerRow(
        request_id=request,
        key_id=KEY,
        tenant_id="ten-crash",
        model="tiny",
        category="chat",
        charge=1,
        at=time.time_ns() // 1_000_000,
        period=PERIOD,
        worker=worker,
    )


def run(
    kind: str,
    *,
    rounds: int,
    writers: int,
    limit: int,
    seed: int,
    between_s: tuple[float, float] = (0.1, 0.5),
) -> Figures:
    """Kills `rounds` times at random moments, then lets writers use the budget up, and counts."""
    chance = random.Random(seed)
    figures = Figures(kind, rounds, writers, limit)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="hearth-crash-"))
    answers: list[Path] = []
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store = stack.enter_context(database(kind, folder))
        url = store.url
        stack.callback(lambda: _end(running))
        asyncio.run(_make_tables(url))

        def begin() -> None:
            answers.append(folder / f"answers-{len(answers)}")
            with answers[-1].open("wb") as out:
                running.append(_start(url, folder / "journal", limit, writers, out))

        for _ in range(writers):
            begin()
        for number in range(rounds):
            time.sleep(chance.uniform(*between_s))
            if isinstance(store, PostgreSQL) and number % 5 == 2:
                store.hurt(0)
                figures.killed_databases += 1
                continue
            victim = running.pop(chance.randrange(len(running)))
            victim.send_signal(signal.SIGKILL)
            figures.killed_writers += victim.wait() == -signal.SIGKILL
            begin()
        for process in running:
            if process.wait(300) != 0:
                raise RuntimeError("a writer failed; see its lines above.")
        running.clear()
        # One more life: what the last victims held is settled and can be used by it.
        for _ in range(2):
            begin()
            if running.pop().wait(300) != 0:
                raise RuntimeError("the last writer failed; see its lines above.")
        answered = [line for file in answers for line in file.read_text().split()]
        asyncio.run(_count(url, answered, figures))
    figures.seconds = time.monotonic() - began
    return figures


def _start(url: str, folder: Path, limit: int, writers: int, out: IO[Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.crash.writers", url, str(folder), str(limit), str(writers)]
    return subprocess.Popen(command, stdout=out)


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
        process.wait()


async def _make_tables(url: str) -> None:
    database = Database(url)
    async with database.writing() as connection:
        await connection.run_sync(schema.metadata.create_all)
    await database.close()


async def _count(url: str, answered: list[str], figures: Figures) -> None:
    database = Database(url)
    async with database.reading() as connection:
        found = [request for (request,) in await connection.execute(select(schema.ledger.c.request_id))]
        charge = await connection.scalar(select(func.sum(schema.ledger.c.charge)))
    budget = await read_budget(database, KEY, PERIOD)
    await database.close()
    figures.answered, figures.rows, figures.used = len(answered), len(found), budget.used
    figures.unanswered = len(set(found) - set(answered))
    figures.missing = len(set(answered) - set(found))
    figures.twice = (len(found) - len(set(found))) + (len(answered) - len(set(answered)))
    figures.over = max(0, int(charge or 0) - figures.limit)
    # All that was not written can be used: the budget ends fully used, and nothing stays leased.
    figures.lost_budget = (
        abs(figures.limit - budget.used) + budget.leased + abs(int(charge or 0) - budget.used)
    )


if __name__ == "__main__":
    _url, _folder, _limit, _writers = sys.argv[1:]
    asyncio.run(_write(_url, Path(_folder), int(_limit), int(_writers)))
