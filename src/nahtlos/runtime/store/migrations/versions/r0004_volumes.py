"""Volumes apart from servers: attachments, lost copies, snapshots and how they are read from outside, backups
and where they go, what was asked to be done. Adds tables only; the release before does not look at them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "attachments",
        sa.Column("volume", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["volume"], ["volumes.id"], name=op.f("fk_attachments_volume")),
        sa.PrimaryKeyConstraint("volume", name=op.f("pk_attachments")),
    )
    op.create_index("ix_attachments_server", "attachments", ["server"], unique=False)
    op.create_table(
        "replica_losses",
        sa.Column("volume", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("volume", "host", name=op.f("pk_replica_losses")),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("volume", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
    )
    op.create_index("ix_snapshots_volume", "snapshots", ["volume"], unique=False)
    op.create_table(
        "snapshot_exports",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("snapshot", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["snapshot"], ["snapshots.id"], name=op.f("fk_snapshot_exports_snapshot")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshot_exports")),
    )
    op.create_table(
        "backups",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("volume", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backups")),
    )
    op.create_table(
        "backup_targets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("place", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_backup_targets")),
    )
    op.create_table(
        "volume_wishes",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.Float(), nullable=False),
        sa.Column("cancelled", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_volume_wishes")),
        sqlite_autoincrement=True,
    )
