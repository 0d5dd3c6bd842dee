"""What one request costs under a plan, and when a plan's periods begin. Pure functions of their arguments."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Literal

from engine.metering.plans import Plan, PlanSpec

#: Currencies (ISO 4217) whose smallest unit is the whole, or a thousandth; that of all others is a hundredth.
_WHOLE = frozenset(
    (
        *("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW"),
        *("PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF"),
    )
)
_THOUSANDTHS = frozenset(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"))


def list_price(spec: PlanSpec, model: str, category: str) -> int:
    """The price of a request beyond those included: the model's, else its category's, else the default."""
    if model in spec.models:
        return spec.models[model]
    for name, price in spec.categories.items():
        if name == category:
            return price
    return spec.price


def charge(spec: PlanSpec, model: str, category: str, *, before: int) -> int:
    """What an answered request costs.

    Args:
        spec: the plan's terms.
        model: its name in the catalog, not an alias.
        category: the model's.
        before: requests of the same period and counting (key or tenant) that were answered before this one.

    Raises:
        ValueError: `before` is negative.
    """
    if before < 0:
        raise ValueError(f"{before} requests before this one: a count is not negative")
    return 0 if before < spec.included else list_price(spec, model, category)


def budget_cost(spec: PlanSpec, model: str, category: str, *, before: int) -> int:
    """What an answered request takes from the plan's budget: 1 of a budget of requests, else its charge."""
    if spec.budget is not None and spec.budget.of == "requests":
        return 1
    return charge(spec, model, category, before=before)


def period_name(kind: Literal["month", "day"], at_ms: int) -> str:
    """The period that a moment lies in, in UTC: '2026-11' or '2026-11-24'."""
    return _moment(at_ms).strftime("%Y-%m" if kind == "month" else "%Y-%m-%d")


def period_end_ms(name: str) -> int:
    """When the period of this name is over and the next begins, unix milliseconds.

    Raises:
        ValueError: it is no period's name.
    """
    if re.fullmatch(r"\d{4}-\d\d", name):
        begin = datetime.strptime(name, "%Y-%m").replace(tzinfo=UTC)
        end = (begin + timedelta(days=31)).replace(day=1)
    elif re.fullmatch(r"\d{4}-\d\d-\d\d", name):
        end = datetime.strptime(name, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    else:
        raise ValueError(f"'{name}' is no period: write 2026-11 or 2026-11-24.")
    return round(end.timestamp() * 1000)


def money(amount: int, plan: Plan) -> str:
    """An amount for a person: '1.20 EUR', '300 JPY', '15 credits'."""
    return money_in(amount, plan.charged_in)


def money_in(amount: int, charged_in: str) -> str:
    """As `money`, of an amount in what the ledger names: 'credits' or a currency's code."""
    if charged_in == "credits":
        return f"{amount} credit{'' if amount == 1 else 's'}"
    return f"{decimal(amount, charged_in)} {charged_in}"


def decimal(amount: int, charged_in: str) -> str:
    """The amount alone, in whole euros and the like: '1.20', '300', '15' (credits)."""
    digits = 2
    if charged_in == "credits" or charged_in in _WHOLE:
        digits = 0
    elif charged_in in _THOUSANDTHS:
        digits = 3
    sign, whole = "-" if amount < 0 else "", str(abs(amount)).rjust(digits + 1, "0")
    return sign + (f"{whole[:-digits]}.{whole[-digits:]}" if digits else whole)


def _moment(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms // 1000, UTC)
