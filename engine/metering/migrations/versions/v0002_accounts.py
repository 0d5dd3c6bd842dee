"""Included requests in the ledger, the worker of an idempotency key, longer subjects of accounts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("ledger", sa.Column("included", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("idempotency", sa.Column("worker", sa.String(64), nullable=True))
    # Made anew rather than altered, which SQLite cannot: no Hearth of schema 0001 wrote rows of these two.
    op.drop_table("leases")
    op.drop_table("budgets")
    op.create_table(
        "budgets",
        sa.Column("subject", sa.String(80), nullable=False),
        sa.Column("period", sa.String(16), nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.Column("leased", sa.BigInteger, nullable=False),
        sa.CheckConstraint("used >= 0 AND leased >= 0", name=op.f("ck_budgets_amounts")),
        sa.PrimaryKeyConstraint("subject", "period", name="pk_budgets"),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(80), nullable=False),
        sa.Column("period", sa.String(16), nullable=False),
        sa.Column("worker", sa.String(64), nullable=False),
        sa.Column("granted", sa.BigInteger, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("settled_at", sa.BigInteger, nullable=True),
        sa.CheckConstraint("used >= 0 AND granted >= used", name=op.f("ck_leases_amounts")),
        sa.PrimaryKeyConstraint("id", name="pk_leases"),
    )
    op.create_index("ix_leases_subject_period", "leases", ["subject", "period"])
    op.create_index("ix_leases_worker", "leases", ["worker"])
