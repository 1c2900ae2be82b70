"""Snapshots of whole servers, with their memory. Adds one table; the release before does not look at it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "server_snapshots",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_server_snapshots")),
    )
