"""docs/metering.md: the worked example is what its plan's own arithmetic gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from engine.config import MeteringConfig
from engine.metering.idempotency import MOST_BODY_BYTES
from engine.metering.plans import Plan
from engine.metering.pricing import charge, list_price, money
from models.catalog import load_catalog
from tests.engine.test_cli_metering import Hearth

PAGE = (Path(__file__).parents[2] / "docs" / "metering.md").read_text()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The plan that the page's command makes."""
    found = re.search(r"hearth (plans create .*?)\nhearth", PAGE, re.DOTALL)
    assert found is not None
    arguments = shlex.split(found[1].replace("\\\n", " "))
    return Plan.model_validate(Hearth(tmp_path).json(*arguments))


def lines() -> list[tuple[int, str, str, str, str]]:
    """The example's table: requests, model, category, each, together."""
    found = re.findall(
        r"^\| ([\d,]+) \| (\S+) \| (\S+) \| ([\d.]+ EUR) \| ([\d.]+ EUR) \|$", PAGE, re.MULTILINE
    )
    return [(int(count.replace(",", "")), *rest) for count, *rest in found]


def test_the_examples_bill(plan: Plan) -> None:
    before = total = 0
    assert len(lines()) == 7
    for count, model, category, each, together in lines():
        charges = [charge(plan.spec, model, category, before=before + n) for n in range(count)]
        assert {money(one, plan) for one in charges} == {each}
        assert money(sum(charges), plan) == together
        before, total = before + count, total + sum(charges)
    assert f"**The bill: {before:,} requests, {money(total, plan)}.**" in PAGE
    budget = plan.spec.budget
    assert budget is not None and budget.hard and total <= budget.limit
    # What the page says about the end of the budget.
    left = budget.limit - total
    assert f"Then {money(left, plan)} was\nleft" in PAGE and left < list_price(
        plan.spec, "qwen3-0.6b", "chat"
    )
    after_sixth = left + 7 * list_price(plan.spec, "qwen3-0.6b", "chat")
    assert f"After the sixth line {money(after_sixth, plan)} of the budget were left" in PAGE
    assert after_sixth < list_price(plan.spec, "sd-turbo", "image")


def test_the_steps_of_the_bill() -> None:
    steps = re.findall(r"([\d,]+) \u00d7 ([\d.]+) = ([\d.]+) EUR", PAGE)
    assert len(steps) == 3
    cents = [int(product.replace(".", "")) for *_, product in steps]
    for (count, price, _), product in zip(steps, cents, strict=True):
        assert int(count.replace(",", "")) * int(price.replace(".", "")) == product
    assert f"Together {sum(cents) / 100:.2f} EUR" in PAGE
    beyond = sum(int(count.replace(",", "")) for count, *_ in steps)
    assert f"Of the {beyond:,} others" in PAGE
    assert sum(count for count, *_ in lines()) == beyond + 1000


def test_the_examples_models_are_in_the_catalog() -> None:
    catalog = load_catalog()
    for _, model, category, *_ in lines():
        assert catalog.find(model).category == category


def test_the_numbers_of_the_settings() -> None:
    assert f"`metering.keep_months` whole months ({MeteringConfig().keep_months}; 0 = for ever)" in PAGE
    assert MOST_BODY_BYTES == 1024 * 1024 and "no larger than 1 MiB" in PAGE
