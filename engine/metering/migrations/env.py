"""What Alembic runs: the migrations, on the connection that `upgrade_through` hands it."""

from __future__ import annotations

from alembic import context

from engine.metering.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite alters a table by making it anew.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
