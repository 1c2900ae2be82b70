"""What projects may have in all. Adds one table; the release before does not look at it. What servers are
given of processors and memory is in their documents.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "project_limits",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("project", name=op.f("pk_project_limits")),
    )
