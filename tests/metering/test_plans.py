"""Plans: bad ones are refused with the field's name; prices and periods are whole numbers and exact."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.metering.plans import MOST, Plan, PlanError, PlanSpec, check_unit, read_spec
from engine.metering.pricing import budget_cost, charge, list_price, money, period_end_ms, period_name

#: 2026-11-30T23:59:59.999Z
LATE = 1_796_083_199_999


def plan(unit: str = "minor", currency: str = "EUR") -> Plan:
    return Plan.model_validate(
        {"id": "plan_1", "name": "x", "unit": unit, "currency": currency, "spec": {}, "created_at": 0}
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"price": -1}, "price is -1: it must be at least 0"),
        ({"models": {"flux": -5}}, "models.flux is -5"),
        ({"price": 2**63}, f"price is {2**63}: more than {MOST} could not be added up"),
        ({"categories": {"image": MOST + 1}}, "categories.image is"),
        ({"price": 1.5}, "amounts are whole numbers"),
        ({"price": "12"}, "amounts are whole numbers"),
        ({"price": True}, "amounts are whole numbers"),
        ({"categories": {"pictures": 1}}, "categories.pictures is 'pictures': write one of 'chat', 'code'"),
        ({"prise": 1}, "prise is no field of a plan: known are price"),
        ({"budget": {"limit": -1}}, "budget.limit is -1"),
        ({"budget": {"limit": 1, "of": "tokens"}}, "budget.of is 'tokens': write one of"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0: it must be at least 1"),
        ({"models": {" flux": 5}}, "is no model's name"),
        ([], "the plan"),
    ],
)
def test_a_bad_plan_is_refused_by_its_field(spec: Any, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_spec(spec)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("unit", "currency"),
    [("euros", ""), ("credits", "EUR"), ("minor", ""), ("minor", "eur"), ("minor", "EURO")],
)
def test_a_unit_and_its_currency_belong_together(unit: str, currency: str) -> None:
    with pytest.raises(PlanError):
        check_unit(unit, currency)
    check_unit("minor", "EUR")
    check_unit("credits", "")


def test_a_models_price_wins_over_its_categorys_over_the_default() -> None:
    spec = read_spec({"price": 2, "categories": {"image": 10}, "models": {"flux": 25, "free": 0}})
    assert list_price(spec, "flux", "image") == 25
    assert list_price(spec, "other", "image") == 10
    assert list_price(spec, "other", "chat") == 2
    assert list_price(spec, "free", "image") == 0


prices = st.integers(0, MOST)
specs = st.builds(
    PlanSpec,
    price=prices,
    categories=st.dictionaries(st.sampled_from(("chat", "image")), prices),
    models=st.dictionaries(st.sampled_from(("a", "b")), prices),
    included=st.integers(0, 20),
)


@given(specs, st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("chat", "image"))), max_size=40))
def test_a_bill_is_the_number_of_requests_beyond_the_included_at_their_prices(
    spec: PlanSpec, asked: list[tuple[str, str]]
) -> None:
    bill = sum(charge(spec, model, category, before=n) for n, (model, category) in enumerate(asked))
    assert bill == sum(list_price(spec, model, category) for model, category in asked[spec.included :])
    assert read_spec(spec.model_dump(mode="json")) == spec


def test_a_budget_counts_requests_or_their_charge() -> None:
    by_charge = read_spec({"price": 7, "included": 1, "budget": {"limit": 70}})
    assert [budget_cost(by_charge, "a", "chat", before=n) for n in (0, 1, 2)] == [0, 7, 7]
    by_request = read_spec({"price": 7, "included": 1, "budget": {"limit": 70, "of": "requests"}})
    assert [budget_cost(by_request, "a", "chat", before=n) for n in (0, 1)] == [1, 1]
    with pytest.raises(ValueError, match="not negative"):
        charge(by_charge, "a", "chat", before=-1)


def test_periods_begin_and_end_in_utc() -> None:
    assert period_name("month", LATE) == "2026-11" and period_name("day", LATE) == "2026-11-30"
    assert period_end_ms("2026-11") == period_end_ms("2026-11-30") == LATE + 1
    assert period_name("month", LATE + 1) == "2026-12"
    assert period_end_ms("2026-12") - period_end_ms("2026-11") == 31 * 86_400_000
    assert period_name("day", period_end_ms("2028-02-28")) == "2028-02-29"
    for bad in ("2026", "2026-13", "2026-02-30", "november"):
        with pytest.raises(ValueError):
            period_end_ms(bad)


@given(st.sampled_from(("month", "day")), st.integers(0, 4_000_000_000_000))
def test_a_period_ends_after_each_of_its_moments(kind: Any, at: int) -> None:
    end = period_end_ms(period_name(kind, at))
    assert at < end
    assert period_name(kind, end) != period_name(kind, at) == period_name(kind, end - 1)


@pytest.mark.parametrize(
    ("unit", "currency", "amount", "shown"),
    [
        ("minor", "EUR", 120, "1.20 EUR"),
        ("minor", "EUR", 5, "0.05 EUR"),
        ("minor", "EUR", -5, "-0.05 EUR"),
        ("minor", "JPY", 300, "300 JPY"),
        ("minor", "KWD", 1500, "1.500 KWD"),
        ("credits", "", 1, "1 credit"),
        ("credits", "", 15, "15 credits"),
    ],
)
def test_money_is_written_as_people_write_it(unit: str, currency: str, amount: int, shown: str) -> None:
    assert money(amount, plan(unit, currency)) == shown


def test_what_the_ledger_calls_the_unit() -> None:
    assert plan().charged_in == "EUR" and plan("credits", "").charged_in == "credits"
