"""The tables: one schema for SQLite and PostgreSQL.

Times are unix milliseconds, amounts integers in a plan's unit (a currency's minor units, or credits). The
ledger names keys, tenants, plans and models without foreign keys: its rows outlive what they name.
A change here needs a migration in `engine/metering/migrations/`; a test holds the two together.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

#: Names of constraints, so that a migration can name them on either database.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = MetaData(naming_convention=_NAMES)

plans = Table(
    "plans",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    # 'minor' (cents and the like, of `currency`) or 'credits'.
    Column("unit", String(16), nullable=False),
    # ISO 4217 for 'minor', empty for 'credits'.
    Column("currency", String(3), nullable=False),
    # engine.metering.plans.PlanSpec
    Column("spec", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # Count of the change that wrote the row last, so that gateways read what is new alone.
    Column("version", BigInteger, nullable=False, index=True),
    CheckConstraint("unit IN ('minor', 'credits')", name="unit"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    # None: no plan, requests cost nothing and have no limit.
    Column("plan_id", String(64), ForeignKey("plans.id"), nullable=True),
    # A closed tenant's keys are refused; its rows stay.
    Column("closed_at", BigInteger, nullable=True),
    Column("version", BigInteger, nullable=False, index=True),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False, index=True),
    # A plan of its own; None: its tenant's.
    Column("plan_id", String(64), ForeignKey("plans.id"), nullable=True),
    Column("name", String(200), nullable=False),
    # The key's first characters, for a person to tell it by.
    Column("prefix", String(16), nullable=False),
    # Hexadecimal digest of the key; the key itself is not kept.
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=True),
    Column("revoked_at", BigInteger, nullable=True),
    Column("admin", Boolean, nullable=False),
    # engine.metering.keys.Allowed: models, categories, addresses; an empty list allows all.
    Column("allowed", JSON, nullable=False),
    Column("version", BigInteger, nullable=False, index=True),
)

ledger = Table(
    "ledger",
    metadata,
    # The server's own id of the request, unique however a client names its requests.
    Column("request_id", String(64), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("tenant_id", String(64), nullable=False),
    Column("plan_id", String(64), nullable=True),
    Column("model", String(200), nullable=False),
    Column("category", String(32), nullable=False),
    Column("charge", BigInteger, nullable=False),
    # 'credits' or the code of the charge's currency.
    Column("unit", String(16), nullable=False),
    # Whether it used one of the plan's included requests.
    Column("included", Boolean, nullable=False, server_default=false()),
    # 'answered', or 'left': its client went away after the first byte.
    Column("status", String(16), nullable=False),
    Column("at", BigInteger, nullable=False),
    # For information, never charged; None where the engine told none.
    Column("prompt_tokens", BigInteger, nullable=True),
    Column("completion_tokens", BigInteger, nullable=True),
    # Images, audio seconds, steps … and whatever else the estimate of work is learnt from.
    Column("work", JSON, nullable=True),
    # Which gateway process wrote it: settles the leases of one that was killed.
    Column("worker", String(64), nullable=False),
    # The budget period that it counts in, as `Period.name`: '2026-11' or '2026-11-24'.
    Column("period", String(16), nullable=False),
    Index("ix_ledger_tenant_id_at", "tenant_id", "at"),
    Index("ix_ledger_key_id_at", "key_id", "at"),
    Index("ix_ledger_at", "at"),
    Index("ix_ledger_worker_period", "worker", "period"),
    CheckConstraint("charge >= 0", name="charge"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("key_id", String(64), primary_key=True),
    # The client's Idempotency-Key.
    Column("idem_key", String(255), primary_key=True),
    # Digest of path and body: the same key with another request is refused.
    Column("request_hash", String(64), nullable=False),
    Column("request_id", String(64), nullable=False),
    # HTTP status of the answer; None while it is being made.
    Column("status", BigInteger, nullable=True),
    # The answer; None for a stream or one too large to keep.
    Column("body", LargeBinary, nullable=True),
    Column("headers", JSON, nullable=True),
    Column("created_at", BigInteger, nullable=False, index=True),
    # The life of the worker that makes the answer; None where the row is of an older Hearth.
    Column("worker", String(64), nullable=True),
)

budgets = Table(
    "budgets",
    metadata,
    # Id of the tenant or key that the budget is of, with an ending that says what is counted.
    Column("subject", String(80), primary_key=True),
    Column("period", String(16), primary_key=True),
    # Requests or charge that are settled, and those that living leases may still use.
    Column("used", BigInteger, nullable=False),
    Column("leased", BigInteger, nullable=False),
    CheckConstraint("used >= 0 AND leased >= 0", name="amounts"),
)

leases = Table(
    "leases",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("subject", String(80), nullable=False),
    Column("period", String(16), nullable=False),
    Column("worker", String(64), nullable=False, index=True),
    Column("granted", BigInteger, nullable=False),
    Column("used", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("settled_at", BigInteger, nullable=True),
    Index("ix_leases_subject_period", "subject", "period"),
    CheckConstraint("used >= 0 AND granted >= used", name="amounts"),
)

#: How far each life of a gateway worker is settled: no journal holds a row of it from before that moment, so
#: that its rows may be replaced by sums without one of them turning up again.
lives = Table(
    "lives",
    metadata,
    Column("worker", String(64), primary_key=True),
    # engine.metering.retention.ENDED once the life is over and its journal is in the ledger.
    Column("settled_until", BigInteger, nullable=False),
)

rollups = Table(
    "rollups",
    metadata,
    # '2026-11', UTC.
    Column("month", String(7), primary_key=True),
    Column("tenant_id", String(64), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("category", String(32), primary_key=True),
    Column("unit", String(16), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("charge", BigInteger, nullable=False),
)

#: A counter for each kind of thing that gateways hold in memory: they read again what has a new version.
changes = Table(
    "changes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
)
