"""The transactions of the program: how SQLite begins them, their connection, and whether they were committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import PoolProxiedConnection, event
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn

from diator._hints import described
from diator.exceptions import ConfigurationError, UsageError

#: The event loop keeps no task alive.
_closing: set[asyncio.Task[None]] = set()

#: Where a session keeps what is watched in its transaction. The listeners below are for all sessions: to add them to
#: one session, and to remove them, would take longer than to store a message.
_WATCHED = "diator outbox"


def configure_sqlite(engine: AsyncEngine, *, timeout: float = 30.0) -> None:
    """
    Make the transactions of an engine of SQLite safe for several writers. Call it before the first connection.

    Each transaction begins with BEGIN IMMEDIATE: it waits for its turn at its begin, at most *timeout* seconds, and
    cannot fail because another one has written in between. A savepoint is part of it. Without this, Python's sqlite3
    begins a transaction at its first write, and so a savepoint that was opened before it commits by itself. The file
    has a write-ahead log. A session that stays open makes all others wait, even if it only reads.
    """

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # sqlite3 begins nothing by itself
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute(f"PRAGMA busy_timeout = {timeout * 1_000:.0f}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


async def connected(connecting: Coroutine[Any, Any, PoolProxiedConnection]) -> PoolProxiedConnection:
    """
    Return the connection that *connecting* makes. If the call is cancelled, close it as soon as it is there.

    SQLAlchemy and the drivers forget a connection if they are cancelled while they make it.
    """
    task = asyncio.create_task(connecting, name="diator: connecting to the database")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        closing = asyncio.create_task(_close(task), name="diator: closing a connection to the database")
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)
        raise


async def _close(connecting: asyncio.Task[PoolProxiedConnection]) -> None:
    with suppress(Exception):  # there is no connection
        connection = await connecting
        await greenlet_spawn(connection.close)


def has_stored(session: Session, table: str) -> bool:
    """Return whether messages were stored in *table* by the open transaction of *session*, and not rolled back."""
    watched: list[Fate] = session.info.get(_WATCHED, [])
    return any(fate.table == table and not fate.was_rolled_back() for fate in watched)


def session_of(session: object) -> AsyncSession:
    """Return *session*, which must be an `AsyncSession`."""
    if not isinstance(session, AsyncSession):
        raise ConfigurationError(
            f"SqlAlchemyStore works in the transaction of an AsyncSession of SQLAlchemy, and it was given "
            f"{described(session)}"
        )
    return session


def connection_of(session: Session, table: sa.Table, engine: sa.Engine) -> sa.Connection:
    """
    Return the connection on which *session* has, or begins, its transaction.

    Raises:
        ConfigurationError: It is one of another database than that of *engine*, where the relay looks for messages.
        UsageError: The handler has ended the transaction by itself.
    """
    try:
        bind = session.get_bind(clause=table)
    except UnboundExecutionError:  # a session that has an engine for each of its classes, and none for the others
        bind = engine
    if bind.engine is not engine:
        _check_same_database(bind.engine, engine)
    try:
        connection = session.connection(bind_arguments={"bind": bind})
    except PendingRollbackError:  # it says what to do
        raise
    except InvalidRequestError as error:
        raise UsageError(
            "the transaction of this unit of work has ended before it: its handler called commit, rollback or close of "
            "the session; what it committed stays, and its events are not stored; leave the commit to the resource or "
            "the middleware that gives the session"
        ) from error
    if _commits_each_statement(connection):
        raise ConfigurationError(
            "the session of this unit of work commits each statement by itself (isolation_level AUTOCOMMIT), so that a "
            "message could be stored without the work; use a session with transactions"
        )
    return connection


def _commits_each_statement(connection: sa.Connection) -> bool:
    """Return whether there is no transaction, by an option of the connection or by one of its engine."""
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return True
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "postgresql":
        return driver.autocommit is True
    # `configure_sqlite` sets this too, and then begins each transaction itself.
    return driver.isolation_level is None and not driver.driver_connection.in_transaction


def _check_same_database(used: sa.Engine, own: sa.Engine) -> None:
    databases = [_database(engine) for engine in (used, own)]
    if used.dialect.name != own.dialect.name or (None not in databases and databases[0] != databases[1]):
        raise ConfigurationError(
            f"the session of this unit of work uses another database ({_named(used)}) than the engine of the store "
            f"({_named(own)}), where the relay looks for messages; pass the same engine to both"
        )


def _database(engine: sa.Engine) -> str | None:
    database = engine.url.database
    if engine.dialect.name != "sqlite":
        return database  # the host may be that of a pooler
    if not database or database == ":memory:":
        return f"in memory of {id(engine.pool)}"
    return None if database.startswith("file:") else str(Path(database).absolute())


def _named(engine: sa.Engine) -> str:
    return f"{engine.dialect.name}, {engine.url.database or 'no name'}"


class Fate:
    """
    Whether the innermost open transaction of *session*, which has stored in *table*, is rolled back.

    That is a savepoint, or all of it. *committed* is called when all of it was committed.
    """

    __slots__ = ("_committed", "_open", "_was_rolled_back", "table")

    def __init__(self, session: Session, table: str, committed: Callable[[], None]) -> None:
        self.table, self._committed = table, committed
        self._open: set[SessionTransaction] = set()
        self._was_rolled_back = False
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            self._open.add(transaction)
            transaction = transaction.parent
        session.info.setdefault(_WATCHED, []).append(self)

    def was_rolled_back(self) -> bool:
        """Return whether it was rolled back; false while it is open."""
        return self._was_rolled_back

    def was_committed(self) -> bool | None:
        """Return whether it was committed; None while it is open."""
        return False if self._was_rolled_back else None if self._open else True

    def commit(self, transaction: SessionTransaction) -> None:
        """Take note that *transaction* was committed."""
        if transaction in self._open:
            self._open.remove(transaction)
            if not self._open and not self._was_rolled_back:
                self._committed()

    def end(self, transaction: SessionTransaction) -> None:
        """Take note that *transaction* has ended. If it was not committed, it was rolled back."""
        if transaction in self._open:
            self._open.remove(transaction)
            self._was_rolled_back = True


@event.listens_for(Session, "after_commit")
def _committed(session: Session) -> None:
    watched: list[Fate] | None = session.info.get(_WATCHED)
    transaction = (session.get_nested_transaction() or session.get_transaction()) if watched else None
    if watched and transaction is not None:
        for fate in watched:
            fate.commit(transaction)


@event.listens_for(Session, "after_transaction_end")
def _ended(session: Session, transaction: Any) -> None:
    watched: list[Fate] | None = session.info.get(_WATCHED)
    if watched:
        for fate in watched:
            fate.end(transaction)
        if transaction.parent is None:
            del session.info[_WATCHED]
