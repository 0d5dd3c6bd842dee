"""Whose requests the kill test sends: keys under plans, and what each of them was told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.metering import keys, planstore
from engine.metering.database import Database
from engine.metering.plans import PlanSpec, read_spec

if TYPE_CHECKING:
    from benchmarks.crash.clients import Outcome


@dataclass
class Operation:
    """What was tried under one Idempotency-Key."""

    #: Ids and charges of the whole answers.
    answers: list[tuple[str, int | None]] = field(default_factory=list)
    #: Digests of whole answers that were not streamed.
    digests: set[str] = field(default_factory=set)
    #: Tries without a whole answer.
    cut: int = 0


@dataclass
class Customer:
    """One key, its plan, and a book of what its client was told."""

    name: str
    key: str
    key_id: str
    spec: PlanSpec
    #: Each request bears an Idempotency-Key and is sent again until it is answered.
    retries: bool
    #: Whole answers: what their heads said of the charge, by x-request-id.
    answered: dict[str, int | None] = field(default_factory=dict)
    #: Whole answers whose x-request-id another one had.
    same_id: int = 0
    #: Errors, by x-request-id.
    refused: dict[str, int] = field(default_factory=dict)
    #: Requests without a whole answer: the client may have been charged or not.
    cut: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    operations: dict[str, Operation] = field(default_factory=dict)
    tries: int = 0

    @property
    def most(self) -> int | None:
        """Requests that its limits let through in all; None = any number."""
        budget = self.spec.budget
        if self.spec.requests_per_day is not None:
            return self.spec.requests_per_day
        if budget is None:
            return None
        return budget.limit if budget.of == "requests" else budget.limit // self.spec.price

    def note(self, found: Outcome) -> None:
        self._count(found)
        if found.answered:
            self.same_id += found.request_id in self.answered
            self.answered[found.request_id] = found.charge

    def note_try(self, operation: str, found: Outcome, *, stream: bool) -> None:
        self._count(found)
        book = self.operations.setdefault(operation, Operation())
        book.cut += found.sent and not found.whole
        if found.answered:
            book.answers.append((found.request_id, found.charge))
            if not stream:
                book.digests.add(found.digest)

    def _count(self, found: Outcome) -> None:
        self.tries += found.sent
        if not found.whole:
            self.cut += found.sent
        elif not found.answered:
            self.refused[found.request_id] = found.status
            self.codes[f"{found.status} {found.code}"] += 1


def terms(requests: int) -> list[tuple[str, dict[str, Any], bool]]:
    """Names, plans and whether to retry, for about so many requests in all.

    Each kind of limit runs out when about half of the requests have been made.
    """
    each = max(4, requests // 12)
    return [
        ("hard", {"price": 3, "budget": {"limit": each, "of": "requests"}}, False),
        # No multiple of the price: the last request that fits leaves some of it.
        ("charge", {"price": 3, "budget": {"limit": 3 * each + 1}}, False),
        ("included", {"price": 5, "included": each}, False),
        ("daily", {"price": 1, "requests_per_day": each}, False),
        ("open", {"price": 7}, False),
        ("retrying", {"price": 2, "budget": {"limit": 10**9, "of": "requests"}}, True),
    ]


async def make_customers(
    database: Database, era: int, wanted: list[tuple[str, dict[str, Any], bool]]
) -> list[Customer]:
    """New keys, each under a plan of its own; gateways know them within a second."""
    made = []
    for name, plan, retries in wanted:
        spec = read_spec(plan)
        title = f"{name}-{era}"
        await planstore.create(database, title, spec, unit="minor", currency="EUR")
        text, key = await keys.create(database, name=title, plan=title)
        made.append(Customer(title, text, key.id, spec, retries))
    return made
