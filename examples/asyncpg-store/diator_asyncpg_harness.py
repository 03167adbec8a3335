"""The harness: how the conformance suite gets this store, and what it can do to PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import asyncpg
from diator_asyncpg import SCHEMA, AsyncpgStore

from diator.testing.outbox import Database, EnvironmentMissing, Spoiled, StoreHarness


class AsyncpgTables(Database):
    """The tables in a schema of their own. Each store has a pool of its own, as in another process."""

    def __init__(self, url: str, schema: str) -> None:
        self.name = f"{url}#{schema}"
        self._url, self._schema = url, schema
        self._connecting = {"server_settings": {"search_path": schema, "application_name": schema}}

    def store(self) -> Any:
        return AsyncpgStore(self._url, **self._connecting)

    @asynccontextmanager
    async def made(self) -> AsyncIterator[AsyncpgTables]:
        await self.ask(f"CREATE SCHEMA {self._schema}; SET search_path TO {self._schema}; {SCHEMA}")
        try:
            yield self
        finally:
            await self.ask(f"DROP SCHEMA {self._schema} CASCADE")

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self._url, **self._connecting)
        try:
            async with connection.transaction():
                yield connection
        finally:
            await connection.close()

    def savepoint(self, session: Any) -> Any:
        return session.transaction()

    async def pid(self, session: Any) -> int:
        return int(session.get_server_pid())

    async def disconnect(self) -> None:
        own = f"FROM pg_stat_activity WHERE application_name = '{self._schema}'"
        await self.ask(f"SELECT count(pg_terminate_backend(pid, 1000)) {own}")

    async def transactions(self) -> int:
        own = f"FROM pg_stat_activity WHERE application_name = '{self._schema}'"
        return int(await self.ask(f"SELECT count(*) {own} AND xact_start IS NOT NULL"))

    async def spoil(self, how: Spoiled) -> None:
        statements: dict[Spoiled, str] = {
            "outbox missing": "DROP TABLE outbox",
            "inbox missing": "DROP TABLE inbox",
            "column missing": "ALTER TABLE outbox DROP COLUMN due_at",
        }
        await self.ask(f"SET search_path TO {self._schema}; {statements[how]}")

    async def ask(self, query: str) -> Any:
        connection = await asyncpg.connect(self._url)
        try:
            return await (connection.execute(query) if ";" in query or "DROP" in query else connection.fetchval(query))
        finally:
            await connection.close()


class AsyncpgHarness(StoreHarness):
    """A server of PostgreSQL."""

    name = "asyncpg"
    facilities = frozenset(
        {"writers", "wakes", "clock", "processes", "savepoints", "pids", "connections", "transactions", "tables"}
    )

    def start(self) -> None:
        self._url = os.environ.get("DIATOR_TEST_POSTGRES_URL", "postgresql://127.0.0.1:5432/postgres")
        try:
            self._version = asyncio.run(AsyncpgTables(self._url, "nothing").ask("SHOW server_version"))
        except (OSError, asyncpg.PostgresError) as error:
            raise EnvironmentMissing("no PostgreSQL answers at DIATOR_TEST_POSTGRES_URL") from error

    def service(self) -> str:
        return f"PostgreSQL {self._version.split()[0]}"

    def driver(self) -> str:
        return f"asyncpg {version('asyncpg')}"

    def database(self) -> AbstractAsyncContextManager[Database]:
        return AsyncpgTables(self._url, f"diator_{uuid4().hex}").made()

    def reach(self, name: str) -> AbstractAsyncContextManager[Database]:
        return nullcontext(AsyncpgTables(*name.split("#")))
