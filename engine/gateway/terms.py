"""What a plan means for one caller on one day: worked out once, not for each request."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.metering.accounts import Account
from engine.metering.keyring import Caller
from engine.metering.keys import Key
from engine.metering.plans import PlanSpec
from engine.metering.pricing import list_price, period_end_ms, period_name
from engine.metering.rows import Form
from engine.metering.tenants import Tenant
from engine.routes import ModelRoute

Headers = list[tuple[bytes, bytes]]

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


@dataclass(frozen=True, slots=True)
class Tariff:
    """What requests to one model cost a caller, and what their rows have in common."""

    category: str
    price: int
    form: Form


@dataclass(frozen=True, slots=True)
class Terms:
    """A caller's limits and accounts on one day, and its tariffs."""

    caller: Caller
    spec: PlanSpec
    #: From when to when they hold, Unix milliseconds.
    since: int
    until: int
    period: str
    unit: str
    #: The day's requests, the period's included ones and its budget; None where the plan has none.
    day: Account | None
    included: Account | None
    budget: Account | None
    #: Lines of every answer.
    unit_line: Headers
    #: Of the models that were asked for, by id.
    tariffs: dict[str, Tariff] = field(default_factory=dict, compare=False)

    def tariff(self, route: ModelRoute, worker: str) -> Tariff:
        """A model's, in the books of this life of a worker."""
        found = self.tariffs.get(route.id)
        if found is None or found.category != route.category:
            form = Form(
                key_id=self.caller.key.id,
                tenant_id=self.caller.tenant.id,
                plan_id=None if self.caller.plan is None else self.caller.plan.id,
                model=route.id,
                category=route.category,
                unit=self.unit,
                period=self.period,
                worker=worker,
            )
            price = list_price(self.spec, route.id, route.category)
            found = self.tariffs[route.id] = Tariff(route.category, price, form)
        return found


def terms_of(caller: Caller, now_ms: int) -> Terms:
    """The caller's terms at a moment."""
    plan, subject = caller.plan, caller.subject
    spec = _NO_LIMIT if plan is None else plan.spec
    today, period = period_name("day", now_ms), period_name(spec.period, now_ms)
    until = period_end_ms(today)
    budget = None
    if spec.budget is not None:
        name = f"{subject}#requests" if spec.budget.of == "requests" else subject
        budget = Account(name, period, spec.budget.limit, hard=spec.budget.hard)
    return Terms(
        caller=caller,
        spec=spec,
        since=until - _DAY_MS,
        until=until,
        period=period,
        unit=_FREE_UNIT if plan is None else plan.charged_in,
        day=None
        if spec.requests_per_day is None
        else Account(f"{subject}#day", today, spec.requests_per_day),
        included=Account(f"{subject}#included", period, spec.included) if spec.included else None,
        budget=budget,
        unit_line=[] if plan is None else [(b"x-hearth-charge-unit", plan.charged_in.encode())],
    )
