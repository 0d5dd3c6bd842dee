"""Rounds of load and killing: the load goes on, parts of Hearth are killed and come back, the books are held
to what clients were told."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.crash.audit import Counted, Faults, audit, audit_rest, settled, verify
from benchmarks.crash.clients import Connection, Load, serve_one
from benchmarks.crash.customers import Customer, make_customers, terms
from benchmarks.crash.databases import PostgreSQL, SQLite, database
from benchmarks.crash.house import House
from engine.metering.database import Database
from engine.metering.opening import opened

Victim = Literal["gateway", "scheduler", "database", "everything"]
_SHARES: dict[Victim, float] = {"gateway": 0.62, "scheduler": 0.2, "database": 0.15, "everything": 0.03}
#: Gateways hear of new keys within a second.
_NEWS_S = 1.5
_PAUSE_S = 60.0


@dataclass(frozen=True)
class Wanted:
    """What one run does."""

    database: str
    rounds: int
    workers: int = 4
    #: Hearths with state folders of their own on one PostgreSQL.
    machines: int = 1
    seed: int = 0
    #: Rounds between two audits; each era has new keys.
    era: int = 40
    clients: int = 32
    pace_s: float = 0.03
    #: Load between two kills, seconds.
    between_s: tuple[float, float] = (0.1, 0.6)
    #: Requests of an era that its limits are made for, a round.
    requests_a_round: int = 120
    #: One key whose hard budget has so many requests, instead of several kinds of limits; 0 = no.
    budget: int = 0
    #: No further era that would not end within so many seconds; 0 = no bound.
    seconds: float = 0
    #: Whom the first rounds kill; by chance where it is empty or used up.
    victims: tuple[Victim, ...] = ()


@dataclass
class Figures:
    """What one run found."""

    database: str
    machines: int
    workers: int
    rounds: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    tries: int = 0
    answered: int = 0
    rows: int = 0
    unanswered: int = 0
    cut: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: Faults = field(default_factory=Faults)
    #: Longest that the ledger took to have everything, once nothing was in flight.
    settled_s: float = 0.0
    seconds: float = 0.0
    left_processes: int = 0

    @property
    def good(self) -> bool:
        return self.faults.good and not self.left_processes

    def take(self, counted: Counted) -> None:
        self.answered += counted.answered
        self.rows += counted.rows
        self.unanswered += counted.unanswered
        self.cut += counted.cut
        self.tries += counted.tries
        self.refused += counted.codes

    def document(self) -> dict[str, Any]:
        # asdict() would take a Counter for a list of pairs.
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**told, "faults": asdict(self.faults), "good": self.good}


class Run:
    """One run, in a folder of its own."""

    def __init__(
        self,
        wanted: Wanted,
        houses: Sequence[House],
        store: SQLite | PostgreSQL,
        tell: Callable[[str], None],
    ) -> None:
        self._wanted, self._houses, self._store, self._tell = wanted, houses, store, tell
        self._chance = random.Random(wanted.seed)
        self._hurting: asyncio.Task[None] | None = None
        self.figures = Figures(wanted.database, wanted.machines, wanted.workers)

    async def all(self) -> None:
        """All rounds, era by era."""
        wanted, began = self._wanted, time.monotonic()
        async with opened(self._houses[0].config) as books:
            try:
                for house in self._houses:
                    house.begin()
                await self._ready()
                era = 0
                while self.figures.rounds < wanted.rounds:
                    since = time.monotonic()
                    await self._era(books, era, min(wanted.era, wanted.rounds - self.figures.rounds))
                    era += 1
                    self.figures.seconds = time.monotonic() - began
                    self._tell(summary(self.figures))
                    now = time.monotonic()
                    if wanted.budget or (wanted.seconds and 2 * now - since > began + wanted.seconds):
                        break
            finally:
                for house in self._houses:
                    await house.stop()
                    self.figures.left_processes += len(house.left())

    async def _era(self, books: Database, era: int, rounds: int) -> None:
        wanted, figures = self._wanted, self.figures
        plans = terms(wanted.requests_a_round * rounds)
        if wanted.budget:
            plans = [("hard", {"price": 3, "budget": {"limit": wanted.budget, "of": "requests"}}, False)]
        customers = await make_customers(books, era, plans)
        await asyncio.sleep(_NEWS_S)
        ports, seed = [house.port for house in self._houses], wanted.seed * 1000 + era
        load = Load(ports, customers, wanted.clients, wanted.pace_s, seed)
        load.start()
        try:
            load.going.set()
            for _ in range(rounds):
                await asyncio.sleep(self._chance.uniform(*wanted.between_s))
                load.check()
                for house in self._houses:
                    house.check()
                chosen = wanted.victims[figures.rounds : figures.rounds + 1]
                await self._kill(*(chosen or self._chance.choices(list(_SHARES), list(_SHARES.values()))))
                figures.rounds += 1
                for house in self._houses:
                    await house.serves(max(1, wanted.workers // 2))
                if wanted.budget and customers[0].codes["429 insufficient_quota"] > wanted.clients:
                    break
            await self._healed()
            await self._ready()
            async with asyncio.timeout(_PAUSE_S):
                await load.pause()
        finally:
            await load.close()
            await self._healed()
        await self._settled(books)
        limited = [each for each in customers if each.most is not None and not each.retries]
        await self._use_up(limited)
        await self._settled(books)
        kept = not figures.killed["database"]
        figures.take(await audit(books, customers, figures.faults, kept=kept))
        for customer in limited:
            await audit_rest(books, customer, figures.faults)
        for house in self._houses:
            await verify(house.config, figures.faults)

    async def _ready(self) -> None:
        for house in self._houses:
            await house.ready()

    def _is_hurt(self) -> bool:
        return self._hurting is not None and not self._hurting.done()

    async def _healed(self) -> None:
        """Waits until the database is there again."""
        if self._hurting is not None:
            await self._hurting
            self._hurting = None

    async def _settled(self, books: Database) -> None:
        for house in self._houses:
            took = await settled(books, house.config)
            self.figures.settled_s = max(self.figures.settled_s, round(took, 2))

    async def _use_up(self, customers: Sequence[Customer]) -> None:
        """Asks until each of them is told that its limit is reached, by several connections each."""

        async def caller(customer: Customer, seed: int) -> None:
            port = self._houses[seed % len(self._houses)].port
            connection, chance, refused = Connection(port), random.Random(seed), 0
            try:
                # A limit that does not hold is found by the audit.
                while refused < 2 and len(customer.answered) <= (customer.most or 0) + 50:
                    found = await serve_one(connection, customer, chance)
                    if found.status == 429:
                        refused += 1
                        # What another worker holds and does not need comes back meanwhile.
                        await asyncio.sleep(0.5)
            finally:
                connection.close()

        async with asyncio.timeout(_PAUSE_S * 4):
            await asyncio.gather(*(caller(each, seed) for each in customers for seed in range(8)))

    async def _kill(self, victim: Victim) -> None:
        """SIGKILL to the victim, begun again where Hearth does not do that itself."""
        house, chance, killed = self._chance.choice(self._houses), self._chance, self.figures.killed
        if victim == "gateway" or (victim == "database" and self._is_hurt()):
            killed["gateway"] += house.kill_gateway(chance)
        elif victim == "database":
            killed["database" if isinstance(self._store, PostgreSQL) else "database held"] += 1
            # The next rounds go on meanwhile: others die while it is away.
            hurting = asyncio.to_thread(self._store.hurt, chance.uniform(0, 1.5))
            self._hurting = asyncio.create_task(hurting)
        elif victim == "scheduler":
            house.kill_scheduler()
            killed["scheduler"] += 1
            await asyncio.sleep(chance.uniform(0, 0.3))
            if chance.random() < 0.3:
                # Nobody starts it again until the next scheduler is there.
                killed["gateway"] += house.kill_gateway(chance)
            house.begin()
        else:
            killed["gateway"] += house.kill_everything()
            killed["scheduler"] += 1
            house.begin()


async def run(wanted: Wanted, tell: Callable[[str], None] = lambda _: None) -> Figures:
    """Does what is wanted; leaves no process and no file.

    Raises:
        ValueError: several machines on SQLite.
        HouseError: a process ended that nobody killed.
        TimeoutError: rows are not in the ledger within a minute, or a request never ends.
    """
    if wanted.machines > 1 and wanted.database == "sqlite":
        raise ValueError("several machines need PostgreSQL: a SQLite file is one machine's.")
    folder = Path(tempfile.mkdtemp(prefix="hearth-crash-"))
    try:
        with database(wanted.database, folder) as store:
            url = store.url if isinstance(store, PostgreSQL) else ""
            houses = []
            for number in range(wanted.machines):
                # In the first one's state folder, SQLite's file is.
                place = folder if number == 0 else folder / f"machine-{number}"
                place.mkdir(exist_ok=True)
                houses.append(House(place, workers=wanted.workers, database_url=url))
            doing = Run(wanted, houses, store, tell)
            try:
                await doing.all()
            except Exception:
                for house in houses:
                    tell(house.last_words())
                raise
            return doing.figures
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(figures: Figures) -> str:
    """One line on how it stands."""
    killed = ", ".join(f"{number} {name}" for name, number in sorted(figures.killed.items()))
    faults = figures.faults
    zeros = " ".join(
        f"{name.replace('_', ' ')} {number}" for name, number in asdict(faults).items() if name != "examples"
    )
    told = (
        f"{figures.rounds} rounds, {figures.seconds:.0f} s; killed {killed}; {figures.tries} tries, "
        f"{figures.answered} answered, {figures.rows} rows ({figures.unanswered} of cut-off clients, "
        f"{figures.cut} cut off), refused {dict(figures.refused)}; "
        f"settled within {figures.settled_s} s; {zeros}"
    )
    return "\n  ".join([told, *faults.examples])
