"""Alembic makes the tables, and keeps them up to date."""

import asyncio

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from diator.exceptions import ConfigurationError
from diator.outbox.sqlalchemy import SqlAlchemyStore
from tests.integration.outbox.databases import engine_of
from tests.integration.outbox.helpers import add, claim, message, names

ENVIRONMENT = """
import asyncio

from alembic import context

engine, metadata = (context.config.attributes[name] for name in ("engine", "metadata"))


def migrate(connection):
    context.configure(
        connection=connection, target_metadata=metadata, include_schemas=metadata.schema is not None,
        compare_server_default=True, render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


async def main():
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()


asyncio.run(main())
"""


class Alembic:
    """Runs the commands of Alembic for a program with this engine and metadata."""

    def __init__(self, folder, url, metadata):
        self.folder, self._url, self._metadata = folder, url, metadata
        command.init(self._config(), str(folder), template="async")
        folder.joinpath("env.py").write_text(ENVIRONMENT)

    def _config(self):
        config = Config(self.folder.parent / "alembic.ini", attributes={"configure_logger": False})
        config.set_main_option("script_location", str(self.folder))
        config.attributes.update(engine=engine_of(self._url), metadata=self._metadata)
        return config

    async def __call__(self, name, *arguments, **options):
        await asyncio.to_thread(getattr(command, name), self._config(), *arguments, **options)


@pytest.fixture
def alembic(tmp_path, url, metadata):
    return Alembic(tmp_path / "migrations", url, metadata)


async def test_a_migration_makes_the_tables_of_the_metadata(alembic, engine, metadata, sessions):
    store = SqlAlchemyStore(engine, metadata)
    await alembic("revision", "add the outbox", autogenerate=True)
    await alembic("upgrade", "head")
    await alembic("check")
    await store.check()

    keyed = [message(f"E{number}", key="a") for number in range(3)]
    await add(store, sessions, *keyed)
    claimed = await claim(store)
    assert [row.message for row in claimed.rows] == keyed
    with pytest.raises(sa.exc.IntegrityError):  # the CHECK constraints were made, too
        async with engine.begin() as connection:
            await connection.execute(sa.text("UPDATE diator_outbox SET attempts = 0"))

    await alembic("downgrade", "base")
    with pytest.raises(ConfigurationError, match="diator_outbox does not exist"):
        await store.check()


async def test_a_migration_brings_older_tables_up_to_date(alembic, engine, metadata, sessions):
    store = SqlAlchemyStore(engine, metadata)
    await store.create_tables()
    await add(store, sessions, message("Stored"))
    async with engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE diator_outbox DROP COLUMN last_error"))
        await connection.execute(sa.text("DROP INDEX diator_outbox_tried"))
    with pytest.raises(ConfigurationError, match="last_error is missing, the index diator_outbox_tried is missing"):
        await store.check()
    with pytest.raises(CommandError, match="last_error"):
        await alembic("check")

    await alembic("revision", "bring it up to date", autogenerate=True)
    await alembic("upgrade", "head")
    await alembic("check")
    await store.check()
    assert await names(store) == ["Stored"]


async def test_the_tables_of_a_schema(alembic, engine, metadata, driver):
    if driver.startswith("sqlite"):
        pytest.skip("a schema of SQLite is another file")
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE SCHEMA shop"))
    metadata.schema = "shop"
    store = SqlAlchemyStore(engine, metadata, outbox_table="mail_outbox", inbox_table="mail_inbox")
    await alembic("revision", "add the outbox", autogenerate=True)
    await alembic("upgrade", "head")
    await store.check()
