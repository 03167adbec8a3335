"""The harnesses of the store for SQLAlchemy: PostgreSQL by two drivers, and SQLite."""

import asyncio
import sqlite3
import tempfile
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from diator.outbox.sqlalchemy import SqlAlchemyStore, configure_sqlite
from diator.testing.outbox import Database, StoreHarness
from tests.integration.private_services import PrivateServices


class SqlAlchemyTables(Database):
    """The tables in a schema that nobody else uses. Each store has an engine of its own, as in another process."""

    schema = None

    def __init__(self, url, **connecting):
        self.url = url
        self.engines = []
        self._connecting = connecting
        self._sessions = self.engine()

    def engine(self):
        engine = create_async_engine(self.url, connect_args=self._connecting)
        if self.url.get_backend_name() == "sqlite":
            configure_sqlite(engine)
        self.engines.append(engine)
        return engine

    def store_of(self, engine):
        return SqlAlchemyStore(engine, sa.MetaData(schema=self.schema))

    async def create(self):
        await self.store_of(self._sessions).create_tables()

    async def dispose(self):
        for engine in self.engines:
            await engine.dispose()

    def store(self):
        return self.store_of(self.engine())

    @asynccontextmanager
    async def session(self):
        async with AsyncSession(self._sessions, expire_on_commit=False) as session, session.begin():
            yield session

    def savepoint(self, session):
        return session.begin_nested()

    async def spoil(self, how):
        outbox, inbox = (f"{self.schema}.{each}" if self.schema else each for each in ("diator_outbox", "diator_inbox"))
        statement = {
            "outbox missing": f"DROP TABLE {outbox}",
            "inbox missing": f"DROP TABLE {inbox}",
            "column missing": f"ALTER TABLE {outbox} DROP COLUMN last_error",
        }[how]
        async with self._sessions.begin() as connection:
            await connection.execute(sa.text(statement))


class PostgresTables(SqlAlchemyTables):
    def __init__(self, url, schema):
        self.schema = schema
        self.name = f"{url.render_as_string(hide_password=False)}#{schema}"
        named = {"application_name": schema}
        super().__init__(url, **({"server_settings": named} if "asyncpg" in url.drivername else named))

    @asynccontextmanager
    async def admin(self):
        plain = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        connection = await asyncpg.connect(plain)
        try:
            yield connection
        finally:
            await connection.close()

    async def ask(self, query):
        async with self.admin() as connection:
            return await connection.fetchval(query)

    @asynccontextmanager
    async def made(self):
        await self.ask(f"CREATE SCHEMA {self.schema}")
        try:
            await self.create()
            yield self
        finally:
            await self.dispose()
            await self.disconnect()
            await self.ask(f"DROP SCHEMA {self.schema} CASCADE")

    async def pid(self, session):
        return await session.scalar(sa.text("SELECT pg_backend_pid()"))

    async def disconnect(self):
        own = f"FROM pg_stat_activity WHERE application_name = '{self.schema}'"
        await self.ask(f"SELECT count(pg_terminate_backend(pid, 1000)) {own}")

    async def transactions(self):
        own = f"FROM pg_stat_activity WHERE application_name = '{self.schema}'"
        in_use = sum(engine.pool.checkedout() for engine in self.engines)
        return in_use + await self.ask(f"SELECT count(*) {own} AND xact_start IS NOT NULL")

    async def cost(self, doing):
        """Return how many rows and entries of indexes the server has read. It counts when a connection has ended."""
        store = self.store()
        await doing(store)
        before = await self._read()
        await doing(store)
        await store.close()
        return await self._read() - before

    async def _read(self):
        await self.dispose()
        own = f"FROM pg_stat_activity WHERE application_name = '{self.schema}'"
        while await self.ask(f"SELECT count(*) {own}"):  # noqa: ASYNC110  # the server does not notify
            await asyncio.sleep(0.01)
        return await self.ask(
            f"SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = '{self.schema}')::bigint"
            f" + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = '{self.schema}')::bigint"
        )


class SqlAlchemyPostgresHarness(StoreHarness):
    """A server of PostgreSQL that nobody else writes to: what others store would hold back rows here."""

    facilities = frozenset(
        {
            *("savepoints", "connections", "transactions", "pids", "tables", "cost"),
            *("processes", "writers", "wakes", "clock"),
        }
    )
    drivername = "postgresql"

    def __init__(self):
        self._services = PrivateServices()

    def start(self):
        self.url = sa.make_url(self._services.get("database", "postgres").url).set(drivername=self.drivername)
        made = "CREATE DATABASE diator ENCODING 'UTF8' TEMPLATE template0"  # that of the service may be another one
        asyncio.run(PostgresTables(self.url, "nobody").ask(made))
        self.url = self.url.set(database="diator")

    def stop(self):
        self._services.close()

    def service(self):
        version_ = asyncio.run(PostgresTables(self.url, "nobody").ask("SHOW server_version"))
        return f"PostgreSQL {version_.split()[0]}"

    def driver(self):
        driver = self.drivername.partition("+")[2]
        return f"{driver} {version(driver)}, SQLAlchemy {sa.__version__}"

    def database(self):
        return PostgresTables(self.url, f"diator_{uuid4().hex}").made()

    @asynccontextmanager
    async def reach(self, name):
        url, _, schema = name.partition("#")
        tables = PostgresTables(sa.make_url(url), schema)
        yield tables
        await tables.dispose()


class AsyncpgHarness(SqlAlchemyPostgresHarness):
    name = "SqlAlchemyStore, PostgreSQL, asyncpg"
    drivername = "postgresql+asyncpg"


class PsycopgHarness(SqlAlchemyPostgresHarness):
    name = "SqlAlchemyStore, PostgreSQL, psycopg"
    drivername = "postgresql+psycopg"


class SqliteTables(SqlAlchemyTables):
    def __init__(self, name):
        self.name = name
        super().__init__(sa.make_url(f"sqlite+aiosqlite:///{name}"))

    async def transactions(self):
        return sum(engine.pool.checkedout() for engine in self.engines)

    async def cost(self, doing):
        """Return how many steps the virtual machine of SQLite has done."""
        engine, steps = self.engine(), 0

        def count():
            nonlocal steps
            steps += 1

        @sa.event.listens_for(engine.sync_engine, "connect")
        def connect(connection, _):
            connection.driver_connection._conn.set_progress_handler(count, 1)

        store = self.store_of(engine)
        await doing(store)
        steps = 0
        await doing(store)
        return steps


class SqliteHarness(StoreHarness):
    """A file of SQLite. It has one writer at a time, and the clock of the machine."""

    name = "SqlAlchemyStore, SQLite, aiosqlite"
    facilities = frozenset({"savepoints", "transactions", "tables", "cost", "processes"})

    def service(self):
        return f"SQLite {sqlite3.sqlite_version}"

    def driver(self):
        return f"aiosqlite {version('aiosqlite')}, SQLAlchemy {sa.__version__}"

    @asynccontextmanager
    async def database(self):
        with tempfile.TemporaryDirectory() as folder:
            async with self.reach(str(Path(folder) / "outbox.db")) as tables:
                await tables.create()
                yield tables

    @asynccontextmanager
    async def reach(self, name):
        tables = SqliteTables(name)
        try:
            yield tables
        finally:
            await tables.dispose()
