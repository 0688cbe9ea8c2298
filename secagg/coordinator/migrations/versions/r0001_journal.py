"""The journal's first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "journal",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("commits", sa.Integer, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "heads",
        sa.Column("session_id", sa.LargeBinary, primary_key=True),
        sa.Column("lasting", sa.Integer, primary_key=True),
        sa.Column("born", sa.Integer, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "records",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("session_id", sa.LargeBinary, nullable=False),
        sa.Column("lasting", sa.Integer, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["session_id", "lasting"], ["heads.session_id", "heads.lasting"]),
    )
    op.create_index("records_of", "records", ["session_id", "lasting"])
