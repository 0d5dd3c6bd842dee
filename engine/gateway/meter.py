"""Admission: may this key send this request now, and what will it cost? Nothing is charged before an answer.

In order: requests per minute and at once (this machine's workers together), room in the journal, requests
of the day, included requests, budget. What is taken of them is held by the request's ticket until it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.errors import ApiError
from engine.gateway.exchange import Exchange
from engine.gateway.ticket import Attempt, Headers, Terms, Ticket, unavailable
from engine.metering.books import Books
from engine.metering.database import DatabaseError
from engine.metering.journal import JournalFullError
from engine.metering.keyring import Caller
from engine.metering.keys import Key
from engine.metering.limits import Admitted, Limits
from engine.metering.plans import Plan, PlanSpec
from engine.metering.pricing import list_price, money, period_end_ms, period_name
from engine.metering.tenants import Tenant
from engine.metering.wallet import Account
from engine.routes import ModelRoute

#: Whose requests are recorded where no key is asked for.
ANONYMOUS = Caller(
    key=Key(id="anonymous", tenant_id="default", name="anonymous", prefix="", sha256="0" * 64, created_at=0),
    tenant=Tenant(id="default", name="default", created_at=0),
    plan=None,
)

_NO_LIMIT = PlanSpec()
#: The unit of rows under no plan, which cost nothing.
_FREE_UNIT = "credits"
_DAY_MS = 86_400_000
#: Callers whose standing is kept.
_MOST_STANDINGS = 100_000


@dataclass(frozen=True)
class Standing:
    """What a plan means for one caller on one day: worked out once, not for each request."""

    caller: Caller
    #: From when to when it holds, Unix milliseconds.
    since: int
    until: int
    period: str
    #: The day's requests, the period's included ones and its budget; None where the plan has none.
    day: Account | None
    included: Account | None
    budget: Account | None
    unit: str
    #: Lines of every answer.
    unit_line: Headers


def standing_of(caller: Caller, now_ms: int) -> Standing:
    """The caller's accounts at a moment."""
    spec, subject = _spec(caller), caller.subject
    today, period = period_name("day", now_ms), period_name(spec.period, now_ms)
    until = period_end_ms(today)
    budget = None
    if spec.budget is not None:
        name = f"{subject}#requests" if spec.budget.of == "requests" else subject
        budget = Account(name, period, spec.budget.limit, hard=spec.budget.hard)
    plan = caller.plan
    return Standing(
        caller=caller,
        since=until - _DAY_MS,
        until=until,
        period=period,
        day=None
        if spec.requests_per_day is None
        else Account(f"{subject}#day", today, spec.requests_per_day),
        included=Account(f"{subject}#included", period, spec.included) if spec.included else None,
        budget=budget,
        unit=_FREE_UNIT if plan is None else plan.charged_in,
        unit_line=[] if plan is None else [(b"x-hearth-charge-unit", plan.charged_in.encode())],
    )


class Meter:
    """One gateway worker's admission."""

    def __init__(self, books: Books, limits: Limits, *, now_ms: Callable[[], int]) -> None:
        self._books = books
        self._limits = limits
        self._now_ms = now_ms
        #: By key: dropped as a whole when there are many, so that those of old keys do not stay.
        self._standings: dict[str, Standing] = {}

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
        standing = self._standing(caller, now)
        spec, subject = _spec(caller), caller.subject
        admitted = self._within_rate(subject, spec)
        leave = _nothing if spec.concurrent is None else partial(self._limits.leave, subject)
        reserved = False
        taken: list[tuple[Account, int]] = []
        try:
            self._reserve()
            reserved = True
            price, included = list_price(spec, route.id, route.category), False
            if charged and caller.plan is not None:
                included = await self._take(standing, caller.plan, price, now, taken)
            price = 0 if included or not charged else price
        except BaseException:
            if reserved:
                self._books.writer.release()
            for account, cost in taken:
                self._books.wallet.put_back(account, cost)
            leave()
            raise
        terms = Terms(
            request_id=request_id,
            key_id=caller.key.id,
            tenant_id=caller.tenant.id,
            plan_id=None if caller.plan is None else caller.plan.id,
            model=route.id,
            category=route.category,
            charge=price,
            unit=standing.unit,
            included=included,
            at=now,
            period=standing.period,
        )
        return Ticket(
            books=self._books,
            terms=terms,
            taken=taken,
            describe=partial(self._lines, standing, now, price, admitted),
            on_end=leave,
            charged=charged,
            attempt=attempt,
            bytes_in=exchange.bytes_in,
            began=exchange.started,
        )

    def headers(self, caller: Caller, status: int) -> Headers:
        """The lines of an answer that no ticket was drawn for: it cost nothing."""
        now = self._now_ms()
        rate = self._limits.look(caller.subject, per_minute=_spec(caller).requests_per_minute)
        return self._lines(self._standing(caller, now), now, 0, rate, False)

    def _standing(self, caller: Caller, now: int) -> Standing:
        found = self._standings.get(caller.key.id)
        if found is None or found.caller is not caller or not found.since <= now < found.until:
            if len(self._standings) >= _MOST_STANDINGS:
                self._standings.clear()
            found = self._standings[caller.key.id] = standing_of(caller, now)
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

    def _reserve(self) -> None:
        try:
            self._books.writer.reserve()
        except JournalFullError as error:
            raise unavailable() from error

    async def _take(
        self, standing: Standing, plan: Plan, price: int, now: int, taken: list[tuple[Account, int]]
    ) -> bool:
        """Takes the request's cost of the plan's accounts; whether it is one of those included.

        What was taken is in `taken` at once, so that a failure in mid-way gives it back.
        """
        spec, day, budget = plan.spec, standing.day, standing.budget
        if day is not None and not await self._had(day, 1, taken):
            raise limited(
                f"The plan allows {spec.requests_per_day} requests a day, and they are used. "
                "The next day begins at 00:00 UTC.",
                "rate_limit_exceeded",
                (standing.until - now) / 1000,
            )
        included = standing.included is not None and await self._had(standing.included, 1, taken)
        if budget is None or spec.budget is None:
            return included
        cost = 1 if spec.budget.of == "requests" else 0 if included else price
        if cost and not await self._had(budget, cost, taken) and spec.budget.hard:
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

    async def _had(self, account: Account, cost: int, taken: list[tuple[Account, int]]) -> bool:
        """Whether the account has it; it is then held.

        Raises:
            ApiError: 503 `budget_unavailable`.
        """
        wallet = self._books.wallet
        if not wallet.take(account, cost):
            try:
                if not await wallet.acquire(account, cost):
                    return False
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
        taken.append((account, cost))
        return True

    def _lines(
        self, standing: Standing, now: int, charge: int, rate: Admitted | None, answered: bool
    ) -> Headers:
        """The lines about limits and charge."""
        lines: Headers = [(b"x-hearth-charge", b"%d" % (charge if answered else 0)), *standing.unit_line]
        wallet, day = self._books.wallet, standing.day
        if standing.budget is not None:
            lines.append((b"x-hearth-budget-remaining", b"%d" % wallet.remaining(standing.budget)))
        limit = remaining = reset_s = None
        if rate is not None and rate.limit is not None:
            limit, remaining, reset_s = rate.limit, rate.remaining, rate.reset_s
        if day is not None:
            left = max(0, wallet.remaining(day))
            if remaining is None or left < remaining:
                limit, remaining, reset_s = day.limit, left, (standing.until - now) / 1000
        if limit is not None and remaining is not None and reset_s is not None:
            lines += [
                (b"x-ratelimit-limit-requests", b"%d" % limit),
                (b"x-ratelimit-remaining-requests", b"%d" % remaining),
                (b"x-ratelimit-reset-requests", duration(reset_s).encode()),
            ]
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


def _spec(caller: Caller) -> PlanSpec:
    return _NO_LIMIT if caller.plan is None else caller.plan.spec


def _nothing() -> None:
    """No place was taken."""
