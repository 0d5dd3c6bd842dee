"""How far each life of a gateway worker is settled, so that old rows become sums exactly once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "lives",
        sa.Column("worker", sa.String(64), nullable=False),
        sa.Column("settled_until", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_lives"),
    )
