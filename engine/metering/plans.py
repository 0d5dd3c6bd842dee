"""Plans: what a request costs and how many there may be. Pure data, validated; no database here.

All amounts are integers in the plan's unit. A token never has a price: tokens are recorded for information.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.metering.lookup import AccessError, shown
from engine.runners.spec import Category

#: Highest price of one request: nine thousand million of them still add up within 64 bits.
MOST = 10**9
#: Most requests that a limit may name, and the highest budget.
MOST_COUNT = 10**12

Unit = Literal["minor", "credits"]
Price = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Count = Annotated[int, Field(ge=1, le=MOST_COUNT, strict=True)]


class PlanError(AccessError):
    """A plan cannot be as it is written; the message names the field, the reason and the next step."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(_Part):
    """The most that may be spent in a period."""

    limit: Annotated[int, Field(ge=0, le=MOST_COUNT, strict=True)] = Field(
        description="Requests, or the sum of their charges in the plan's unit."
    )
    of: Literal["requests", "charge"] = Field(default="charge", description="What is counted.")
    hard: bool = Field(
        default=True,
        description="True: what would go over it is answered 429; false: it is served and told.",
    )


class PlanSpec(_Part):
    """The terms of a plan."""

    price: Price = Field(default=0, description="One answered request, in the plan's unit.")
    categories: dict[Category, Price] = Field(
        default_factory=dict, description="Another price for a category's models."
    )
    models: dict[str, Price] = Field(
        default_factory=dict, description="Another price for a model, by its name; wins over its category's."
    )
    period: Literal["month", "day"] = Field(
        default="month", description="When included requests and budget begin anew, in UTC."
    )
    included: Annotated[int, Field(ge=0, le=MOST_COUNT, strict=True)] = Field(
        default=0, description="The first requests of each period that cost nothing."
    )
    budget: Budget | None = Field(default=None, description="None = no bound.")
    counts: Literal["key", "tenant"] = Field(
        default="key", description="Whose requests count together: each key's, or all of its tenant's."
    )
    requests_per_minute: Count | None = Field(default=None, description="None = no limit.")
    requests_per_day: Count | None = Field(default=None, description="None = no limit.")
    concurrent: Count | None = Field(default=None, description="Requests in hand at once; None = no limit.")
    max_context: Count | None = Field(
        default=None,
        description="Most tokens of input and output that a request may ask for; None = the model's.",
    )
    weight: Annotated[int, Field(ge=1, le=1000, strict=True)] = Field(
        default=1, description="Share of a busy model, against that of other keys."
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.models:
            if not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
                raise ValueError(
                    f"'{shown(name)}' is no model's name: those have 1 to 200 printable characters, none of "
                    "them a space at an end"
                )
        return self


class Plan(BaseModel):
    """A plan with its name."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str = Field(description="Begins with 'plan_'.")
    name: str
    unit: Unit = Field(description="'minor' = the currency's smallest unit (cents), 'credits' = points.")
    currency: str = Field(description="ISO 4217 code for 'minor', empty for 'credits'.")
    spec: PlanSpec
    created_at: int = Field(description="Unix time, milliseconds.")

    @property
    def charged_in(self) -> str:
        """The unit as the ledger and headers write it."""
        return self.currency if self.unit == "minor" else "credits"


def check_unit(unit: str, currency: str) -> None:
    """Holds a unit to its currency.

    Raises:
        PlanError: the unit is unknown, or its currency is missing, no ISO 4217 code or one too many.
    """
    if unit not in get_args(Unit):
        raise PlanError(f"unit '{shown(unit)}' is unknown: write 'minor' (cents and the like) or 'credits'.")
    if unit == "credits" and currency:
        raise PlanError(f"credits have no currency: leave '{shown(currency)}' out, or make the unit 'minor'.")
    if unit == "minor" and not re.fullmatch("[A-Z]{3}", currency):
        raise PlanError(
            f"currency '{shown(currency)}' is no ISO 4217 code: write three capitals, for instance EUR."
        )


def read_spec(data: Any) -> PlanSpec:
    """The terms from JSON-able data, for a person's eyes.

    Raises:
        PlanError: a field is unknown, negative, not a whole number or too large.
    """
    try:
        return PlanSpec.model_validate(data)
    except ValidationError as error:
        raise PlanError("; ".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    where = ".".join(shown(str(part)) for part in item["loc"] if part != "[key]") or "the plan"
    kind, given = item["type"], shown(str(item.get("input")))
    if kind == "extra_forbidden":
        return f"{where} is no field of a plan: known are {', '.join(PlanSpec.model_fields)}"
    if kind == "greater_than_equal":
        return f"{where} is {given}: it must be at least {item['ctx']['ge']}"
    if kind == "less_than_equal":
        return f"{where} is {given}: more than {item['ctx']['le']} could not be added up"
    if kind in ("int_type", "int_from_float"):
        return f"{where} is '{given}': amounts are whole numbers (of cents, not euros)"
    if kind == "literal_error":
        return f"{where} is '{given}': write one of {item['ctx']['expected']}"
    if kind == "value_error":
        return f"{where}: {item['ctx']['error']}"
    return f"{where}: {item['msg']}"
