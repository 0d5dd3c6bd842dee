"""Admission: may this key send this request now, and what will it cost? Nothing is charged before an answer.

In order: requests per minute and at once (this machine's workers together), room in the journal, requests
of the day, included requests, budget. What is taken of them is held by the request's ticket until it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from engine.errors import ApiError
from engine.gateway.exchange import Exchange
from engine.gateway.terms import Headers, Terms, terms_of
from engine.gateway.ticket import Attempt, Ticket, unavailable
from engine.metering.accounts import Account
from engine.metering.books import Books
from engine.metering.database import DatabaseError
from engine.metering.journal import JournalFullError
from engine.metering.keyring import Caller
from engine.metering.limits import Admitted, Limits
from engine.metering.plans import Plan, PlanSpec
from engine.metering.pricing import money, period_end_ms
from engine.routes import ModelRoute

#: Callers whose terms are kept.
_MOST_TERMS = 100_000


class Meter:
    """One gateway worker's admission."""

    def __init__(self, books: Books, limits: Limits, *, now_ms: Callable[[], int]) -> None:
        self._books = books
        self._limits = limits
        self._now_ms = now_ms
        #: By key: dropped as a whole when there are many, so that those of old keys do not stay.
        self._known: dict[str, Terms] = {}

    async def admit(
        self,
        exchange: Exchange,
        caller: Caller,
        route: ModelRoute,
        *,
        request_id: str,
        attempt: Attempt | None = None,
        charged: bool = True,
    ) -> Ticket:
        """Takes what the request needs of the caller's limits; the ticket gives it back or spends it.

        Args:
            exchange: the request, with its body read.
            caller: whose key.
            route: the model it goes to.
            request_id: the ledger's name of it: the same for every try under one Idempotency-Key.
            attempt: the try, where the request bears an Idempotency-Key.
            charged: False where an earlier try was charged already: limits hold, budgets are not touched.

        Raises:
            ApiError: 429 `rate_limit_exceeded` or `insufficient_quota` with the true time after which a
                retry makes sense; 503 `ledger_unavailable` while a request could not be recorded, or
                `budget_unavailable` while nobody can say what is left of a budget.
        """
        now = self._now_ms()
        terms = self._terms(caller, now)
        spec, subject = terms.spec, caller.subject
        admitted = self._within_rate(subject, spec)
        leave = _nothing if spec.concurrent is None else partial(self._limits.leave, subject)
        reserved = False
        taken: list[tuple[Account, int]] = []
        try:
            self._books.writer.reserve()
            reserved = True
            tariff, included = terms.tariff(route, self._books.worker), False
            if charged and caller.plan is not None:
                included = await self._take(terms, caller.plan, tariff.price, now, taken)
            price = 0 if included or not charged else tariff.price
        except BaseException as error:
            if reserved:
                self._books.writer.release()
            for account, cost in taken:
                self._books.wallet.put_back(account, cost)
            leave()
            if isinstance(error, JournalFullError):
                raise unavailable() from error
            raise
        return Ticket(
            books=self._books,
            form=tariff.form,
            request_id=request_id,
            at=now,
            charge=price,
            included=included,
            taken=taken,
            headers=partial(self._lines, terms, now, price, admitted),
            on_end=leave,
            charged=charged,
            attempt=attempt,
            bytes_in=exchange.bytes_in,
            began=exchange.started,
        )

    def headers(self, caller: Caller, status: int) -> Headers:
        """The lines of an answer that no ticket was drawn for: it cost nothing."""
        now = self._now_ms()
        terms = self._terms(caller, now)
        rate = self._limits.look(caller.subject, per_minute=terms.spec.requests_per_minute)
        return self._lines(terms, now, 0, rate, status)

    def _terms(self, caller: Caller, now: int) -> Terms:
        found = self._known.get(caller.key.id)
        if found is None or found.caller is not caller or not found.since <= now < found.until:
            if len(self._known) >= _MOST_TERMS:
                self._known.clear()
            found = self._known[caller.key.id] = terms_of(caller, now)
        return found

    def _within_rate(self, subject: str, spec: PlanSpec) -> Admitted | None:
        """Counts the request among those of the minute and those at once.

        Raises:
            ApiError: 429.
        """
        if spec.requests_per_minute is None and spec.concurrent is None:
            return None
        found = self._limits.admit(subject, per_minute=spec.requests_per_minute, concurrent=spec.concurrent)
        if isinstance(found, Admitted):
            return found
        if found.reason == "per_minute":
            raise limited(
                f"The plan allows {found.limit} requests per minute, and they are used. "
                f"The next may come in {_seconds(found.retry_after_s)}.",
                "rate_limit_exceeded",
                found.retry_after_s,
            )
        raise limited(
            f"The plan allows {found.limit} requests at once, and as many are being answered. "
            "Wait until one of them has ended.",
            "rate_limit_exceeded",
            found.retry_after_s,
        )

    async def _take(
        self, terms: Terms, plan: Plan, price: int, now: int, taken: list[tuple[Account, int]]
    ) -> bool:
        """Takes the request's cost of the plan's accounts; whether it is one of those included.

        What was taken is in `taken` at once, so that a failure in mid-way gives it back.
        """
        spec, day, budget = plan.spec, terms.day, terms.budget
        take = self._books.wallet.take
        if day is not None:
            had = take(day, 1)
            if not (had or (had is None and await self._acquired(day, 1))):
                raise limited(
                    f"The plan allows {spec.requests_per_day} requests a day, and they are used. "
                    "The next day begins at 00:00 UTC.",
                    "rate_limit_exceeded",
                    (terms.until - now) / 1000,
                )
            taken.append((day, 1))
        included = False
        if terms.included is not None:
            had = take(terms.included, 1)
            included = had or (had is None and await self._acquired(terms.included, 1))
            if included:
                taken.append((terms.included, 1))
        if budget is None or spec.budget is None:
            return included
        cost = 1 if spec.budget.of == "requests" else 0 if included else price
        if not cost:
            return included
        had = take(budget, cost)
        if had or (had is None and await self._acquired(budget, cost)):
            taken.append((budget, cost))
        elif spec.budget.hard:
            whole = (
                f"{spec.budget.limit} requests"
                if spec.budget.of == "requests"
                else money(spec.budget.limit, plan)
            )
            raise limited(
                f"The budget of {whole} for {budget.period} is used up: this request would go over it. "
                f"A new {spec.period} begins at 00:00 UTC after it ends; the operator can raise the budget.",
                "insufficient_quota",
                (period_end_ms(budget.period) - now) / 1000,
            )
        return included

    async def _acquired(self, account: Account, cost: int) -> bool:
        """Whether the account has it after all; it is then held.

        Raises:
            ApiError: 503 `budget_unavailable`.
        """
        try:
            return await self._books.wallet.acquire(account, cost)
        except DatabaseError as error:
            if not account.hard:
                return False
            raise ApiError(
                503,
                "What is left of the plan's limits cannot be read at this moment: the server's database "
                "is away. Nothing was charged; try again in a few seconds.",
                code="budget_unavailable",
                headers={"retry-after": "2", "retry-after-ms": "2000"},
            ) from error

    def _lines(self, terms: Terms, now: int, charge: int, rate: Admitted | None, status: int) -> Headers:
        """The lines about limits and charge in the head of an answer with this status."""
        told = charge if status < 400 else 0
        lines: Headers = [(b"x-hearth-charge", b"%d" % told), *terms.unit_line]
        budget, day = terms.budget, terms.day
        if budget is not None:
            lines.append((b"x-hearth-budget-remaining", b"%d" % self._books.wallet.remaining(budget)))
        if rate is not None:
            limit, remaining, reset_s = rate.limit, rate.remaining, rate.reset_s
        else:
            limit = remaining = None
        if day is not None:
            left = self._books.wallet.remaining(day)
            if remaining is None or left < remaining:
                limit, remaining, reset_s = day.limit, left, (terms.until - now) / 1000
        if limit is not None and remaining is not None:
            lines += (
                (b"x-ratelimit-limit-requests", b"%d" % limit),
                (b"x-ratelimit-remaining-requests", b"%d" % remaining),
                (b"x-ratelimit-reset-requests", duration(reset_s).encode()),
            )
        return lines


def limited(message: str, code: str, retry_after_s: float) -> ApiError:
    """A 429 whose `retry-after` is never early."""
    ms = max(1, math.ceil(retry_after_s * 1000))
    headers = {"retry-after": str(math.ceil(ms / 1000)), "retry-after-ms": str(ms)}
    if code == "insufficient_quota":
        # Clients try a 429 again within seconds; this one lasts until the period ends.
        headers["x-should-retry"] = "false"
    kind = "insufficient_quota" if code == "insufficient_quota" else None
    return ApiError(429, message, type=kind, code=code, headers=headers)


def duration(seconds: float) -> str:
    """A time as OpenAI's headers write it: 120ms, 1.5s, 6m0s, 23h5m0s."""
    ms = math.ceil(max(0.0, seconds) * 1000)
    if ms < 1000:
        return f"{ms}ms"
    if ms < 60_000:
        return f"{ms / 1000:g}s"
    whole = math.ceil(ms / 1000)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}h{minutes}m{whole % 60}s" if hours else f"{minutes}m{whole % 60}s"


def _seconds(seconds: float) -> str:
    return f"{max(seconds, 0.001):.3g} s"


def _nothing() -> None:
    """No place was taken."""
