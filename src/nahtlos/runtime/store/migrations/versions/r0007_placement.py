"""Server groups, and servers that are in one or are pinned to a host. Adds one table and two columns that may
be empty; the release before does not look at them, so it keeps no rule while it leads.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "server_groups",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_server_groups")),
    )
    op.add_column("servers", sa.Column("server_group", sa.String(), nullable=True))
    op.add_column("servers", sa.Column("pinned_to", sa.String(), nullable=True))
