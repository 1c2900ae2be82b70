"""Servers whose VMM is to be replaced in place. Adds one column that may be empty; the release before does
not look at it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("servers", sa.Column("replace_by", sa.String(), nullable=True))
