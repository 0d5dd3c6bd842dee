"""Plans and where one stands under them, in words: what the commands on keys, plans and tenants share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.metering.keyring import Caller
    from engine.metering.plans import Plan
    from engine.metering.standing import Standing

#: The limits of a plan, with their words.
_LIMITS = {
    "requests_per_minute": "requests a minute",
    "requests_per_day": "requests a day",
    "concurrent": "at once",
    "max_context": "tokens of context",
}


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """All of a plan's terms."""
    from engine.metering.pricing import money

    spec = plan.spec
    rows = [("a request", money(spec.price, plan))]
    for name, amount in [*spec.categories.items(), *spec.models.items()]:
        kind = "models" if name in spec.categories else ""
        rows.append((f"  {name} {kind}".rstrip(), money(amount, plan)))
    rows.append(("included", f"{spec.included} requests a {spec.period}" if spec.included else "none"))
    rows += [("budget", budget_of(plan)), ("counted", f"per {spec.counts}")]
    for name in _LIMITS:
        limit = getattr(spec, name)
        rows.append((name.replace("_", " "), "no limit" if limit is None else str(limit)))
    return [*rows, ("weight", str(spec.weight))]


def budget_of(plan: Plan) -> str:
    """A plan's budget."""
    budget = plan.spec.budget
    if budget is None:
        return "no bound"
    return f"{_amount(budget.limit, plan)} a {plan.spec.period}{'' if budget.hard else ', soft'}"


def in_short(caller: Caller) -> str:
    """Which plan applies to a key, in one sentence."""
    from engine.metering.pricing import money

    plan = caller.plan
    if plan is None:
        return (
            f"No plan applies to it: requests cost nothing and have no limit (`hearth tenants set-plan "
            f"{caller.tenant.name} PLAN` gives its tenant one)."
        )
    spec = plan.spec
    whose = "its own" if caller.key.plan_id is not None else f"that of its tenant '{caller.tenant.name}'"
    other = " (some models cost another price)" if spec.categories or spec.models else ""
    parts = [f"{money(spec.price, plan)} a request{other}"]
    if spec.included:
        parts.append(f"{spec.included} a {spec.period} included")
    if spec.budget is not None:
        parts.append(f"budget {budget_of(plan)}")
    parts += [
        f"at most {getattr(spec, name)} {words}"
        for name, words in _LIMITS.items()
        if getattr(spec, name) is not None
    ]
    return f"The plan '{plan.name}' applies to it ({whose}): {', '.join(parts)}."


def standing_rows(standing: Standing) -> list[tuple[str, str]]:
    """What is used of a plan in its present period, and what is left."""
    from engine.metering.pricing import money

    plan, spec = standing.plan, standing.plan.spec
    used = f"{standing.requests} request{'' if standing.requests == 1 else 's'}"
    rows = [(f"used in {standing.period}", f"{used}, {money(standing.charge, plan)}")]
    if spec.included:
        rows.append(("included left", f"{standing.included_left} of {spec.included}"))
    if spec.budget is not None:
        left, over = standing.budget_left or 0, standing.budget_used - spec.budget.limit
        text = f"{_amount(left, plan)} of {_amount(spec.budget.limit, plan)}"
        rows.append(("budget left", text + (f", over by {_amount(over, plan)}" if over > 0 else "")))
    return rows


def standing_data(standing: Standing | None) -> dict[str, Any] | None:
    """The same as JSON-able data; amounts in the plan's unit."""
    if standing is None:
        return None
    return {
        "period": standing.period,
        "ends": standing.ends,
        "requests": standing.requests,
        "charge": standing.charge,
        "unit": standing.plan.charged_in,
        "included_left": standing.included_left,
        "budget_left": standing.budget_left,
    }


def _amount(amount: int, plan: Plan) -> str:
    """Of a budget: requests, or money."""
    from engine.metering.pricing import money

    budget = plan.spec.budget
    in_requests = budget is not None and budget.of == "requests"
    return f"{amount} requests" if in_requests else money(amount, plan)
