"""Alembic runs this for every command: on the connection it was given, in the caller's transaction."""

from alembic import context
from sqlalchemy import Connection

from nahtlos.runtime.store.schema import metadata


def run() -> None:
    connection: object = context.config.attributes["connection"]
    if not isinstance(connection, Connection):
        raise TypeError("migrations run on an open connection only")
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()


run()
