"""How the API tells of a plan and where it stands in its present period."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from engine.metering.moments import shown_moment
from engine.metering.plans import Budget
from engine.metering.standing import Standing


class Included(BaseModel):
    """Requests of each period that cost nothing."""

    limit: int
    used: int
    left: int


class BudgetStanding(Budget):
    """The most of a period, and where it stands."""

    used: int
    left: int


class PlanStanding(BaseModel):
    """The caller's plan and where it stands in the present period."""

    id: str
    name: str
    unit: str = Field(description="What charges are in: 'credits' or a currency's smallest unit.")
    counts: Literal["key", "tenant"] = Field(description="Whose requests count together.")
    period: str = Field(description="'2026-11' or '2026-11-24'.")
    period_ends: str
    requests: int = Field(description="Answered in this period, of all that count together.")
    charge: int
    included: Included | None = Field(description="null where the plan includes none.")
    budget: BudgetStanding | None = Field(description="null where the plan has no bound.")


def plan_standing(standing: Standing) -> PlanStanding:
    """As the API tells of it."""
    plan, spec = standing.plan, standing.plan.spec
    included = budget = None
    if spec.included:
        included = Included(limit=spec.included, used=standing.included, left=standing.included_left)
    if spec.budget is not None and standing.budget_left is not None:
        budget = BudgetStanding(
            **spec.budget.model_dump(), used=standing.budget_used, left=standing.budget_left
        )
    return PlanStanding(
        id=plan.id,
        name=plan.name,
        unit=plan.charged_in,
        counts=spec.counts,
        period=standing.period,
        period_ends=shown_moment(standing.ends),
        requests=standing.requests,
        charge=standing.charge,
        included=included,
        budget=budget,
    )
