"""Every table of the store, in one place.

What is asked for by key, order or state has a column of its own; the rest of a value is its `document`
(JSON of the model's struct), which older and newer releases both can read because unknown fields are
ignored and new ones have defaults. Whatever changes here needs a revision in `migrations/versions`, and
expands before it contracts: two neighbouring releases of the orchestrator share one database.
"""

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# --- intent ------------------------------------------------------------------------------------------

hosts = Table(
    "hosts",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("intent", String, nullable=False),
    Column("joined_at", Float, nullable=False),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("hash", String, primary_key=True),
    Column("host", String, nullable=False),
    Column("role", String, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float, nullable=True),
)

releases = Table(
    "releases",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("registered_at", Float, nullable=False),
)

networks = Table(
    "networks",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
)

volumes = Table(
    "volumes",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("removed", Boolean, nullable=False),
)

attachments = Table(
    "attachments",
    metadata,
    Column("volume", String, ForeignKey("volumes.id"), primary_key=True),
    Column("server", String, nullable=False),
    Index("ix_attachments_server", "server"),
)
"""Which server has a volume beside its system disk; where it has it is in the server's document."""

replica_losses = Table(
    "replica_losses",
    metadata,
    Column("volume", String, primary_key=True),
    Column("host", String, primary_key=True),
    Column("times", Integer, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String, primary_key=True),
    Column("volume", String, nullable=False),
    Column("document", Text, nullable=False),
    Column("removed", Boolean, nullable=False),
    Index("ix_snapshots_volume", "volume"),
)

server_snapshots = Table(
    "server_snapshots",
    metadata,
    Column("id", String, primary_key=True),
    Column("server", String, nullable=False),
    Column("document", Text, nullable=False),
)

snapshot_exports = Table(
    "snapshot_exports",
    metadata,
    Column("id", String, primary_key=True),
    Column("snapshot", String, ForeignKey("snapshots.id"), nullable=False),
    Column("document", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)

backups = Table(
    "backups",
    metadata,
    Column("id", String, primary_key=True),
    Column("volume", String, nullable=False),
    Column("document", Text, nullable=False),
)

backup_targets = Table(
    "backup_targets",
    metadata,
    Column("name", String, primary_key=True),
    Column("place", String, nullable=False),
)

volume_wishes = Table(
    "volume_wishes",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("document", Text, nullable=False),
    Column("asked_at", Float, nullable=False),
    Column("cancelled", Boolean, nullable=False),
    sqlite_autoincrement=True,
)

servers = Table(
    "servers",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("volume", String, ForeignKey("volumes.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("removed_at", Float, nullable=True),
    Column("placement", String, nullable=True),
    Column("move_requested", Boolean, nullable=False),
    Column("move_to", String, nullable=True),
    Column("replace_by", String, nullable=True),
    Column("server_group", String, nullable=True),
    Column("pinned_to", String, nullable=True),
)

server_groups = Table(
    "server_groups",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
)

ports = Table(
    "ports",
    metadata,
    Column("id", String, primary_key=True),
    Column("server", String, ForeignKey("servers.id"), nullable=False),
    Column("network", String, ForeignKey("networks.id"), nullable=False),
    Column("ip", String, nullable=False),
    Column("mac", String, nullable=False),
    UniqueConstraint("network", "ip"),
    UniqueConstraint("mac"),
)

subnets = Table(
    "subnets",
    metadata,
    Column("id", String, primary_key=True),
    Column("network", String, ForeignKey("networks.id"), nullable=False),
    Column("document", Text, nullable=False),
)
"""Those beyond a network's first one, which is in the network's document."""

security_groups = Table(
    "security_groups",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
)

routers = Table(
    "routers",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
)

floating_ips = Table(
    "floating_ips",
    metadata,
    Column("id", String, primary_key=True),
    Column("document", Text, nullable=False),
)

load_balancers = Table(
    "load_balancers",
    metadata,
    Column("id", String, primary_key=True),
    Column("network", String, ForeignKey("networks.id"), nullable=False),
    Column("document", Text, nullable=False),
)

claims = Table(
    "claims",
    metadata,
    Column("kind", String, primary_key=True),
    Column("scope", String, primary_key=True),
    Column("value", String, primary_key=True),
    Column("holder", String, nullable=False),
    Index("ix_claims_holder", "holder"),
)
"""What only one may have: a number or a name in the cloud, an address in a network, one outside, a subnet's
gateway. A port's first address and its MAC are unique in `ports`."""

campaigns = Table(
    "campaigns",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("document", Text, nullable=False),
    Column("ended_at", Float, nullable=True),
    Column("capacity_floor", Float, nullable=False),
    Column("moves_forecast", Integer, nullable=False),
    Column("hosts_upgraded", Integer, nullable=False),
)

project_limits = Table(
    "project_limits",
    metadata,
    Column("project", String, primary_key=True),
    Column("document", Text, nullable=False),
)

settings = Table(
    "settings",
    metadata,
    Column("name", String, primary_key=True),
    Column("document", Text, nullable=False),
)

# --- decisions ---------------------------------------------------------------------------------------

blueprints = Table(
    "blueprints",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("parent", String, nullable=True),
    Column("decided_at", Float, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("document", Text, nullable=False),
)

target = Table(
    "target",
    metadata,
    Column("only", Integer, primary_key=True),
    Column("blueprint", String, ForeignKey("blueprints.id"), nullable=False),
)

host_configs = Table(
    "host_configs",
    metadata,
    Column("host", String, primary_key=True),
    Column("generation", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("document", Text, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("state", String, nullable=False),
    Column("campaign", String, nullable=True),
    Column("document", Text, nullable=False),
    Column("begun_at", Float, nullable=False),
    Column("ended_at", Float, nullable=True),
    Index("ix_operations_campaign", "campaign"),
    Index("ix_operations_ended_at", "ended_at"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
)

# --- observations ------------------------------------------------------------------------------------

inventories = Table(
    "inventories",
    metadata,
    Column("host", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("received_at", Float, nullable=False),
)

refusals = Table(
    "refusals",
    metadata,
    Column("operation", String, primary_key=True),
    Column("host", String, nullable=False),
    Column("document", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("text", Text, nullable=False),
    Column("data", Text, nullable=False),
    sqlite_autoincrement=True,
)
