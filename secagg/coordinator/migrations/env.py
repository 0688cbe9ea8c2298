"""What Alembic runs: on the connection, and in the transaction, of whoever asked for it."""

from __future__ import annotations

import logging

from alembic import context

logging.getLogger("alembic").setLevel(logging.WARNING)
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
