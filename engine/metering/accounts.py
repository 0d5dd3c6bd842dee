"""Accounts: what is counted for whom, and what one worker holds of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import cached_property

from engine.metering.budget_rows import Name
from engine.metering.leases import Purse


@dataclass(frozen=True)
class Account:
    """What is counted for whom, when, and how far.

    subject: the id of a key or tenant: its charges are counted; with "#requests" behind it its requests, with
    "#included" those that were included, with "#day" those of a day.
    period: a name of `pricing.period_name`; a day's for "#day". A ledger row counts where its `period` says,
    for "#day" where its `at` lies.
    """

    subject: str
    period: str
    limit: int
    hard: bool = True

    @cached_property
    def name(self) -> Name:
        return (self.subject, self.period)


@dataclass(slots=True)
class Held:
    """What this worker holds of one budget."""

    purse: Purse
    #: As it was last asked for, with its limit.
    account: Account
    #: Whether the store was asked before.
    known: bool = False
    #: The budget without this worker's share, as it was last seen.
    others: int = 0
    #: With fewer spare units the next block is leased: a third of the last one.
    low: float = 0.0
    #: With the next trade: whether the spare units go back, and the cost of a request that waits.
    giving: bool = False
    wanted: int = 0
    #: Tells when the trade that is under way for it has ended.
    trade: asyncio.Future[None] | None = None
    #: A trade's answer was lost: the next one tells what this worker holds.
    doubt: bool = False
    #: Until when the store is known to have nothing, and what other workers had to spare then.
    nothing_until: float = float("-inf")
    elsewhere: int = 0
    #: What they had to spare when waiting for it was in vain.
    vain: int = 0
    used_at: float = 0.0
    looked_at: float = 0.0

    def is_of(self, account: Account) -> bool:
        """Whether the limit is that of this account, which may be another object."""
        if self.account.limit != account.limit or self.account.hard != account.hard:
            return False
        self.account = account
        return True
