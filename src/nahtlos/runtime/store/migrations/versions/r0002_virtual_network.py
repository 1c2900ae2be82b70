"""The virtual network: subnets, security groups, routers, floating IPs, load balancers, and what only one
may have. Adds tables only; the release before does not look at them.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for name in ("security_groups", "routers", "floating_ips"):
        op.create_table(
            name,
            sa.Column("id", sa.String(), nullable=False),
            sa.Column("document", sa.Text(), nullable=False),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
        )
    for name in ("subnets", "load_balancers"):
        op.create_table(
            name,
            sa.Column("id", sa.String(), nullable=False),
            sa.Column("network", sa.String(), nullable=False),
            sa.Column("document", sa.Text(), nullable=False),
            sa.ForeignKeyConstraint(["network"], ["networks.id"], name=op.f(f"fk_{name}_network")),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
        )
    claims = op.create_table(
        "claims",
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "scope", "value", name=op.f("pk_claims")),
    )
    op.create_index("ix_claims_holder", "claims", ["holder"], unique=False)
    op.bulk_insert(claims, _held_already())


def _held_already() -> list[dict[str, str]]:
    """By what the release before has made: networks with a number and one subnet each, and ports with one
    address. Where two networks have the same number, the first keeps it."""
    rows = op.get_bind().execute(sa.text("SELECT id, document FROM networks ORDER BY id"))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        vni = str(json.loads(row.document)["vni"])
        for kind, value in (("vni", vni), ("subnet", row.id)):
            claim = {"kind": kind, "scope": "", "value": value, "holder": f"network/{row.id}"}
            found.setdefault((kind, value), claim)
    ports = op.get_bind().execute(sa.text("SELECT id, network, ip FROM ports"))
    return [
        *found.values(),
        *(
            {"kind": "address", "scope": port.network, "value": port.ip, "holder": f"port/{port.id}"}
            for port in ports
        ),
    ]
