"""The keys that a gateway worker holds in memory, with their tenants and plans.

Nothing here is asked of the database while a request waits: a task reads everything again when the `changes`
counter has moved, looked at twice a second, so that a revoked key is refused within a second everywhere.
While the database is away the keys read last stay good; a worker that starts then takes them from the
snapshot that the workers before it kept (`snapshot.py`), until the database answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hmac import compare_digest
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError
from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.changes import ACCESS, version_of
from engine.metering.database import Database, DatabaseError
from engine.metering.keys import Key, digest_of
from engine.metering.migrations import migrate
from engine.metering.plans import Plan
from engine.metering.snapshot import (
    Snapshot,
    SnapshotError,
    SnapshotKeeper,
    database_digest,
    read_snapshot,
)
from engine.metering.tenants import Tenant

log = logging.getLogger("hearth.keys")

#: Time between two looks at the counter; with the reading it stays within the second that is promised.
EVERY_S = 0.5
#: Rows that are read before other work has its turn: under 10 ms.
_AT_ONCE = 200

_Row = TypeVar("_Row", Plan, Tenant, Key)


@dataclass(frozen=True)
class Caller:
    """Whose key it is and under which terms."""

    key: Key
    tenant: Tenant
    plan: Plan | None
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @cached_property
    def subject(self) -> str:
        """Whose requests count together under the plan: the key's id, or its tenant's."""
        by_tenant = self.plan is not None and self.plan.spec.counts == "tenant"
        return self.tenant.id if by_tenant else self.key.id

    @cached_property
    def weight(self) -> int:
        """The key's share of a busy model, against that of others."""
        return 1 if self.plan is None else self.plan.spec.weight

    @cached_property
    def valid_until(self) -> float:
        """From when on no request is taken, Unix milliseconds: `state` says why."""
        if self.key.revoked_at is not None or self.tenant.closed_at is not None:
            return -math.inf
        return math.inf if self.key.expires_at is None else self.key.expires_at

    @cached_property
    def may_use_all(self) -> bool:
        """Whether the key allows every model."""
        return not self.key.allowed.models and not self.key.allowed.categories

    def state(self, now_ms: int) -> Literal["valid", "expired", "revoked", "closed"]:
        """Whether requests are taken; 'closed': its tenant is."""
        state = self.key.state(now_ms)
        return "closed" if state == "valid" and self.tenant.closed_at is not None else state

    def may_call_from(self, address: str | None) -> bool:
        """Whether the key allows this address of a caller (None where it has none: a Unix socket)."""
        if not self.networks:
            return True
        try:
            found = ip_address(address or "")
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None)
        return any((mapped or found) in network for network in self.networks)

    def may_use(self, model: str, category: str) -> bool:
        """Whether the key allows this model (by its own name) of this category."""
        allowed = self.key.allowed
        by_model = not allowed.models or model in allowed.models
        return by_model and (not allowed.categories or category in allowed.categories)


class KeyRing:
    """Finds callers by their keys; `start` begins to follow the database."""

    def __init__(
        self,
        database: Database,
        *,
        snapshot: Path | None = None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        #: Where what is held is kept for a worker that starts while the database is away; None = nowhere.
        self._file = snapshot
        self._keeper = None if snapshot is None else SnapshotKeeper(snapshot, self.now_ms)
        #: When what is held was read, by this worker or, while `_version` is -1, by one before it; unix ms.
        self._read_at: int | None = None
        self._every_s = every_s
        self._clock = clock
        self._version = -1
        self._plans: dict[str, Plan] = {}
        self._tenants: dict[str, Tenant] = {}
        self._callers: dict[str, Caller] = {}
        self._by_id: dict[str, Caller] = {}
        self._task: asyncio.Task[None] | None = None
        self._away = False

    @property
    def loaded(self) -> bool:
        """Whether the keys have been read once: before that nobody can be told known from unknown."""
        return self._read_at is not None

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, token: str) -> Caller | None:
        """Whose key it is, or None; also of a key that is no longer valid (`Caller.state`).

        The look-up is by the digest, whose bytes a caller cannot steer; the hit is then compared in
        constant time.
        """
        digest = digest_of(token)
        caller = self._callers.get(digest)
        return caller if caller is not None and compare_digest(caller.key.sha256, digest) else None

    def by_id(self, key_id: str) -> Caller | None:
        """Whose key has this id."""
        return self._by_id.get(key_id)

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    async def start(self) -> None:
        """Reads the keys and begins to follow changes; a database that is away is tried again."""
        await self._try()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def refresh(self) -> None:
        """Reads again what was changed.

        Raises:
            DatabaseError: the database fails; what was read before stays.
        """
        read_at = self.now_ms()
        async with self._database.reading() as connection:
            # Read first: what is committed while the rows are read is read again at the next look.
            version = await version_of(connection, ACCESS)
            if version == self._version:
                self._read_at = read_at
                return
            # A smaller count: the database is another one, restored from a backup.
            since = self._version if version > self._version else -1
            plans = await _rows(connection, schema.plans, Plan, since)
            tenants = await _rows(connection, schema.tenants, Tenant, since)
            keys = await _rows(connection, schema.keys, Key, since)
        if since < 0:
            # Also what a snapshot held, which may be older than the database in anything.
            self._plans, self._tenants, self._by_id = {}, {}, {}
        self._plans |= {plan.id: plan for plan in plans}
        self._tenants |= {tenant.id: tenant for tenant in tenants}
        known = {id: caller.key for id, caller in self._by_id.items()}
        fresh = {key.id: key for key in keys}
        if plans or tenants:
            fresh = known | fresh
        by_id = self._by_id | {key.id: self._caller(key) for key in fresh.values()}
        self._by_id = by_id
        self._callers = {caller.key.sha256: caller for caller in by_id.values()}
        self._version, self._read_at = version, read_at

    def _caller(self, key: Key) -> Caller:
        tenant = self._tenants[key.tenant_id]
        plan_id = key.plan_id or tenant.plan_id
        return Caller(
            key=key,
            tenant=tenant,
            plan=None if plan_id is None else self._plans[plan_id],
            networks=tuple(ip_network(each) for each in key.allowed.addresses),
        )

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._try()
            await self._keep()

    async def _try(self) -> None:
        try:
            if self._version < 0:
                # Also what was away at the start is brought up to date before it is read.
                await migrate(self._database)
            await self.refresh()
        except (DatabaseError, ValidationError) as error:
            if not self._away:
                if not self.loaded and self._file is not None:
                    await asyncio.to_thread(self._take_snapshot, self._file)
                log.error("%s Until then %s.", error, self._meanwhile())
            self._away = True
            return
        if self._away:
            log.info("the keys can be read again; %d are known", len(self))
        self._away = False

    def _take_snapshot(self, file: Path) -> None:
        """Holds what the snapshot says, until the database answers."""
        try:
            found = read_snapshot(file, database_digest(self._database.name))
        except SnapshotError as error:
            log.error("%s: it is not used.", error)
            return
        if found is None:
            return
        self._plans = {plan.id: plan for plan in found.plans}
        self._tenants = {tenant.id: tenant for tenant in found.tenants}
        self._by_id = {key.id: self._caller(key) for key in found.keys}
        self._callers = {caller.key.sha256: caller for caller in self._by_id.values()}
        # The count of changes stays unknown: all is read again once the database answers.
        self._read_at = found.read_at

    def _meanwhile(self) -> str:
        """What holds while the database is away."""
        if self._read_at is None:
            return "no key is known"
        if self._version >= 0:
            return f"the keys read before ({len(self)}) stay in use"
        age = _shown_age(self.now_ms() - self._read_at)
        return f"the keys of {self._file} ({len(self)}) are in use, as they were {age} ago"

    async def _keep(self) -> None:
        """Brings the snapshot up to date."""
        if self._keeper is None or self._away or self._read_at is None:
            return
        if not self._keeper.due(self._version):
            return
        await self._keeper.keep(
            Snapshot(
                database=database_digest(self._database.name),
                version=self._version,
                read_at=self._read_at,
                plans=tuple(self._plans.values()),
                tenants=tuple(self._tenants.values()),
                keys=tuple(caller.key for caller in self._by_id.values()),
            )
        )


def _shown_age(ms: int) -> str:
    """A length of time for a person; a clock set back makes it 0."""
    seconds = max(0, ms) // 1000
    for length, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds // length} {name}"
    return f"{seconds} seconds"


async def _rows(connection: AsyncConnection, table: Table, kind: type[_Row], since: int) -> list[_Row]:
    """The rows that were written after the change `since`; other work goes on between each few of them."""
    wanted = select(table).where(table.c.version > since)
    found: list[_Row] = []
    for number, row in enumerate((await connection.execute(wanted)).mappings()):
        found.append(kind.model_validate(dict(row)))
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
    return found
