"""Brings a database to the schema of this release. Revisions are package data and run at every start.

Expand, then contract: a revision adds what the new release needs in a form the old one ignores; what
the old one needed is dropped one release later. So a database that a newer release has already expanded
is left as it is.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

MIGRATIONS = Path(__file__).parent / "migrations"


def configuration(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade_to_head(connection: Connection) -> None:
    config = configuration(connection)
    if not _is_of_a_newer_release(connection, config):
        command.upgrade(config, "head")


def _is_of_a_newer_release(connection: Connection, config: Config) -> bool:
    revision = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    return revision is not None and revision not in known
