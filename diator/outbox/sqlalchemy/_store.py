"""The store, on PostgreSQL and on SQLite."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import wraps
from hashlib import blake2b
from itertools import product
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from diator._hints import name_of
from diator.brokers.message import Message
from diator.brokers.sending import Due
from diator.exceptions import ConfigurationError, EncodingError
from diator.outbox.sqlalchemy._listening import Listener
from diator.outbox.sqlalchemy._sessions import Fate, connection_of, has_stored, session_of
from diator.outbox.sqlalchemy._statements import WINDOW, Locks, Statements
from diator.outbox.sqlalchemy._tables import check_table, dialect_of, make_inbox, make_outbox
from diator.outbox.store import Claim, DeadRow, Failure, OnDead, Order, Row, Status

_P = ParamSpec("_P")
_R = TypeVar("_R")

_log = logging.getLogger(__name__)

#: PostgreSQL can put no more into an index, and keys have one.
_MAX_KEY_BYTES = 2_000
_OLDEST_SQLITE = (3, 35)
#: In how many seconds a relay looks again for messages that an older transaction holds back.
_SHORTEST_LOOK, _LONGEST_LOOK = 0.02, 1.0
_ALL = 2**31


class _Hidden(str):
    """A text whose `repr` is not shown: errors and logs of SQLAlchemy contain the `repr` of parameters."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


def _in_own_task(
    call: Callable[Concatenate[SqlAlchemyStore, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[SqlAlchemyStore, _P], Coroutine[Any, Any, _R]]:
    """
    Run *call*, which has a transaction of the store's own, in a task that is not cancelled with its caller.

    SQLAlchemy and the drivers forget a connection, or leave it in a transaction, if they are cancelled while they open
    either. So the call goes on until it can roll back.
    """

    @wraps(call)
    async def run(self: SqlAlchemyStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        task = asyncio.create_task(call(self, *args, **kwargs), name=f"diator: {call.__name__} of SqlAlchemyStore")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._cancelled.add(task)
            task.add_done_callback(self._cancelled.discard)
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody waits for it
            raise
        return task.result()

    return run


class SqlAlchemyStore:
    """
    Keeps an outbox and an inbox in PostgreSQL (asyncpg or psycopg) or SQLite (aiosqlite).

    It keeps the promises of `diator.outbox.store.Store`. Its two tables are part of *metadata*, so that the migrations
    of the program make them. Without migrations, `create_tables` does.

    Args:
        engine: The engine of the program, by which its sessions use the same database.
        metadata: The metadata of the program. Its `schema` is that of the tables.
        outbox_table, inbox_table: The names of the tables.
        notify: Whether stored messages wake relays by LISTEN and NOTIFY of PostgreSQL. Pass False if the program
            commits many thousand transactions a second, which NOTIFY makes wait for each other. Through a pooler that
            shares connections between transactions, LISTEN has no effect: then a relay finds messages when it looks.

    Raises:
        ConfigurationError: The engine is of another database, or the metadata has other tables of these names.
    """

    session_type = AsyncSession

    def __init__(
        self,
        engine: AsyncEngine,
        metadata: sa.MetaData | None = None,
        *,
        outbox_table: str = "diator_outbox",
        inbox_table: str = "diator_inbox",
        notify: bool = True,
    ) -> None:
        if not isinstance(engine, AsyncEngine):
            raise ConfigurationError("SqlAlchemyStore needs an AsyncEngine, as create_async_engine returns it")
        metadata = sa.MetaData() if metadata is None else metadata
        if not isinstance(metadata, sa.MetaData):
            raise ConfigurationError("metadata must be a MetaData, such as Base.metadata of a declarative base")
        name = engine.dialect.name
        self._words = dialect_of(name)
        self._on_postgresql = name == "postgresql"
        self._engine = engine
        self.outbox_table: sa.Table = make_outbox(outbox_table, metadata, name)
        self.inbox_table: sa.Table = make_inbox(inbox_table, metadata, name)
        outbox, inbox = (self._in_statements(table) for table in (self.outbox_table, self.inbox_table))
        self._statements = Statements(self._words, outbox, inbox, on_postgresql=self._on_postgresql)
        self._locks = Locks(outbox, inbox)
        # The isolation of the program's own transactions may be another one.
        self._own = engine.execution_options(isolation_level="READ COMMITTED") if self._on_postgresql else engine
        #: By whether there are several messages, whether one is scheduled, and whether they are the first of their
        #: transaction.
        self._inserts = {
            (several, scheduled, first): self._insert(outbox, several=several, scheduled=scheduled, first=first)
            for several, scheduled, first in product((False, True), repeat=3)
        }
        channel = f"{self.outbox_table.fullname}_stored"
        if len(channel.encode()) > 63:  # noqa: PLR2004  # the longest name in PostgreSQL
            channel = f"diator_{blake2b(channel.encode(), digest_size=16).hexdigest()}"
        self._channel = channel
        self._notifies = notify and self._on_postgresql
        self._listener = Listener(engine, channel, self._wake)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stored = asyncio.Event()
        self._cannot_listen = False
        self._parks_for: tuple[Order, OnDead] | None = None
        #: The calls that were cancelled, until they have ended.
        self._cancelled: set[asyncio.Task[Any]] = set()

    def _schema(self, table: sa.Table) -> str | None:
        translated = self._engine.get_execution_options().get("schema_translate_map") or {}
        schema: str | None = translated.get(table.schema, table.schema)
        return schema

    def _in_statements(self, table: sa.Table) -> str:
        preparer, schema = self._engine.dialect.identifier_preparer, self._schema(table)
        quoted = preparer.quote(table.name)
        return f"{preparer.quote_schema(schema)}.{quoted}" if schema else quoted

    def _insert(self, outbox: str, *, several: bool, scheduled: bool, first: bool) -> sa.TextClause:
        words = self._words
        columns = "message_id, message_type, message_name, key, headers, payload, event_time"
        if not self._on_postgresql:
            values = ":id, :type, :name, :key, :headers, :payload, :time"
            if scheduled:
                columns, values = f"{columns}, available_at", f"{values}, coalesce(:at, {words.now} + :after, 0.0)"
            return sa.text(f"INSERT INTO {outbox} ({columns}) VALUES ({values})")
        types = {"id": "uuid", **dict.fromkeys(("type", "name", "key", "headers", "payload", "time"), "text")}
        values = "m.id, m.type, m.name, m.key, CAST(m.headers AS json), CAST(m.payload AS json), m.time"
        if scheduled:
            types |= dict.fromkeys(("at", "after"), "double precision")
            after = words.seconds.format("m.after")
            columns = f"{columns}, available_at"
            values = f"{values}, coalesce(to_timestamp(m.at), {words.now} + {after}, {words.at_once})"
        if several:
            arrays = ", ".join(f"CAST(:{name} AS {type_}[])" for name, type_ in types.items())
            source, order = f"unnest({arrays}) WITH ORDINALITY AS m({', '.join(types)}, place)", " ORDER BY m.place"
        else:  # psycopg takes longer to write arrays
            source, order = ", ".join(f"CAST(:{name} AS {type_}) AS {name}" for name, type_ in types.items()), ""
            source = f"(SELECT {source}) AS m"
        storing = f", {self._locks.storing} AS l" if first else ""
        inserted = f"INSERT INTO {outbox} ({columns}) SELECT {values} FROM {source}{storing}{order}"
        return sa.text(f"WITH stored AS ({inserted}) SELECT pg_notify(:channel, '') WHERE :notifies")

    @_in_own_task
    async def create_tables(self) -> None:
        """Create the tables that are missing, for a program without migrations. Several processes may do it."""
        async with self._begin() as connection:
            if self._on_postgresql:
                await connection.execute(self._locks.create)
            tables = [self.outbox_table, self.inbox_table]
            await connection.run_sync(lambda sync: tables[0].metadata.create_all(sync, tables=tables))

    # -- in the transaction of the program ---------------------------------------------------------------------------

    async def add(
        self, messages: Sequence[Message], due: Sequence[Due], session: AsyncSession, /
    ) -> Callable[[], bool]:
        """See `Store.add`. If the session flushes automatically, it writes what is pending before the messages."""
        rows = [self._values(message) for message in messages]
        scheduled = any(each is not None for each in due)
        if scheduled:
            for row, each in zip(rows, due, strict=True):
                row["at"] = row["after"] = None
                if isinstance(each, timedelta):
                    row["after"] = each.total_seconds()
                elif each is not None:
                    row["at"] = each.timestamp()
        return await session_of(session).run_sync(self._add, rows, scheduled)

    def _add(self, session: Session, rows: list[dict[str, Any]], scheduled: bool) -> Callable[[], bool]:  # noqa: FBT001
        connection = connection_of(session, self.outbox_table, self._engine.sync_engine)
        if session.autoflush:
            session.flush()
        statement = self._inserts[len(rows) > 1, scheduled, not has_stored(session, self.outbox_table.fullname)]
        fate = Fate(session, self.outbox_table.fullname, self._committed)
        if rows and self._on_postgresql:
            parameters = rows[0] if len(rows) == 1 else {name: [row[name] for row in rows] for name in rows[0]}
            connection.execute(statement, parameters | {"channel": self._channel, "notifies": self._notifies})
        elif rows:
            connection.execute(statement, rows)
        return fate.was_rolled_back

    def _values(self, message: Message) -> dict[str, Any]:
        source = f"message {message.message_id}"
        headers = json.dumps(dict(message.headers), ensure_ascii=False, separators=(",", ":"))
        texts = (message.message_type, message.message_name, message.key or "")
        try:
            payload, sizes = message.payload_json.decode(), [len(text.encode()) for text in (*texts, headers)]
        except UnicodeError:
            raise EncodingError(source, "the payload, the key, a name or a header is not valid Unicode") from None
        if self._on_postgresql:
            if any("\0" in text for text in texts):
                raise EncodingError(source, "PostgreSQL cannot hold a NUL character in a key, nor in a name")
            if sizes[2] > _MAX_KEY_BYTES:
                problem = f"the key has {sizes[2]:,} bytes, and the outbox has an index that takes {_MAX_KEY_BYTES:,}"
                raise EncodingError(source, f"{problem}; use a shorter key, such as a hash of it")
        return {
            "id": self._id(message.message_id),
            "type": message.message_type,
            "name": message.message_name,
            "key": None if message.key is None else _Hidden(message.key),
            "headers": _Hidden(headers),
            "payload": _Hidden(payload),
            "time": None if message.time is None else message.time.isoformat(),
        }

    def _id(self, message_id: UUID) -> UUID | str:
        return message_id if self._on_postgresql else str(message_id)

    async def cancel(self, message_id: UUID, session: AsyncSession, /) -> bool:
        """See `Store.cancel`."""
        return await session_of(session).run_sync(self._cancel, message_id)

    def _cancel(self, session: Session, message_id: UUID) -> bool:
        connection = connection_of(session, self.outbox_table, self._engine.sync_engine)
        found: list[Any] = []
        for statement in (self._statements.cancel_scheduled, self._statements.cancel_at_once):
            found += connection.execute(statement, {"message_id": self._id(message_id)}).all()
        for key in {row.key for row in found if row.has_parked}:
            connection.execute(self._statements.unpark_next, {"key": _Hidden(key)})
        return bool(found)

    async def first_time(self, message_id: UUID, group: str, handler: str, session: AsyncSession, /) -> bool:
        """See `Store.first_time`."""
        return await session_of(session).run_sync(self._first_time, message_id, group, handler)

    def _first_time(self, session: Session, message_id: UUID, group: str, handler: str) -> bool:
        connection = connection_of(session, self.inbox_table, self._engine.sync_engine)
        noted = {"message_id": self._id(message_id), "group": group, "handler": handler}
        return connection.execute(self._statements.note, noted).rowcount == 1

    def watch(self, session: AsyncSession, /) -> Callable[[], bool | None]:
        """Return what tells whether the open transaction of *session* was committed; see `Store.first_time`."""
        return Fate(session.sync_session, self.inbox_table.fullname, lambda: None).was_committed

    @asynccontextmanager
    async def _begin(self) -> AsyncGenerator[AsyncConnection]:
        """Return a context with a transaction of its own. It commits, unless there is an error or it was cancelled."""
        async with self._own.connect() as connection:
            yield connection
            if asyncio.current_task() not in self._cancelled:
                await connection.commit()

    # -- for the relay -----------------------------------------------------------------------------------------------

    @_in_own_task
    async def check(self) -> None:
        """See `Store.check`."""
        async with self._begin() as connection:
            await connection.run_sync(self._check)

    def _check(self, connection: sa.Connection) -> None:
        if not self._on_postgresql:
            version: str = connection.scalar(sa.text("SELECT sqlite_version()")) or ""
            if tuple(map(int, version.split("."))) < _OLDEST_SQLITE:
                raise ConfigurationError(f"SqlAlchemyStore needs SQLite 3.35 or later, and this one is {version}")
        elif (encoding := connection.scalar(sa.text("SHOW server_encoding"))) not in {"UTF8", "SQL_ASCII"}:
            raise ConfigurationError(
                f"the database {self._engine.url.database} has the encoding {encoding}, which cannot hold every "
                "message; create one with the encoding UTF8"
            )
        for table in (self.outbox_table, self.inbox_table):
            check_table(connection, table, self._schema(table))
        if self._on_postgresql and not connection.scalar(self._locks.may_read_sequence):
            raise ConfigurationError(
                f"the user {self._engine.url.username} may not read the sequence of {self.outbox_table.name}, which "
                "tells a relay what may be sent in order; grant USAGE on it"
            )

    @_in_own_task
    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        """See `Store.claim`."""
        self._bind_to_running_loop()
        self._stored.clear()
        token, statements, in_order = uuid4(), self._statements, order == "key"
        statement = statements.claim[order][on_dead]
        unpark = statements.unpark_free[on_dead] if in_order else statements.unpark_all
        parameters = {"lease": self._id(token), "seconds": lease, "limit": limit, "half": (limit + 1) // 2}
        next_due: float | None = None
        async with self._locked() as (connection, settled):
            if in_order and self._on_postgresql:
                parameters["settled"] = settled
            if self._parks_for != (order, on_dead):  # rows that a relay with another setting has parked
                await self._lock(connection, self._locks.park)
                await connection.execute(unpark, {"limit": _ALL})
            found = (await connection.execute(statement, parameters)).all()
            if not found:
                look = (await connection.execute(statements.look, {"settled": settled})).one()
                next_due = look.next_due
                if look.held_for is not None and in_order:  # look again after twice the time
                    next_due = min(next_due or _LONGEST_LOOK, max(look.held_for, _SHORTEST_LOOK), _LONGEST_LOOK)
                if look.is_parked or (look.is_long and in_order):
                    await self._lock(connection, self._locks.park)
                    # What they waited for may have been deleted by hand.
                    changed = (await connection.execute(unpark, {"limit": WINDOW})).rowcount
                    if look.is_long and in_order:
                        changed += (await connection.execute(statements.park[on_dead])).rowcount
                    if changed:
                        next_due = 0.0
                        found = (await connection.execute(statement, parameters)).all()
        self._parks_for = order, on_dead
        rows = sorted(map(self._row, found), key=lambda row: row.position)
        return Claim(lease=token, rows=rows, next_due=None if rows else next_due)

    @asynccontextmanager
    async def _locked(self) -> AsyncGenerator[tuple[AsyncConnection, int]]:
        """
        Return a context with a transaction in which no other relay claims, and the last settled position.

        One claim after the other: only then does each see what the others have leased.
        """
        async with self._begin() as connection:
            settled = await connection.scalar(self._locks.claim) if self._on_postgresql else 0
            yield connection, settled

    async def _lock(self, connection: AsyncConnection, lock: sa.TextClause) -> None:
        if self._on_postgresql:  # SQLite has one writer at a time
            await connection.execute(lock)

    def _message(self, row: sa.Row[Any]) -> Message:
        return Message(
            message_type=row.message_type,
            message_name=row.message_name,
            message_id=UUID(int=row.message_id.int) if self._on_postgresql else UUID(row.message_id),
            payload_json=row.payload.encode(),
            key=row.key,
            headers=json.loads(row.headers),
            time=None if row.event_time is None else datetime.fromisoformat(row.event_time),
        )

    def _row(self, row: sa.Row[Any]) -> Row:
        return Row(
            position=row.seq, message=self._message(row), attempts=row.attempts, stored_at=self._time(row.stored_at)
        )

    def _time(self, time: Any) -> datetime:
        found: datetime = time.astimezone(UTC) if self._on_postgresql else datetime.fromtimestamp(time, UTC)
        return found

    def _positions(self, positions: Collection[int]) -> list[int] | str:
        return [*positions] if self._on_postgresql else json.dumps([*positions])

    @_in_own_task
    async def finish(
        self, lease: UUID, /, *, sent: Collection[int], untried: Collection[int], failed: Collection[Failure]
    ) -> int:
        """See `Store.finish`."""
        statements, changed = self._statements, 0
        failures = [[failure.position, failure.reason, failure.retry_after] for failure in failed]
        done = {*sent, *(failure.position for failure in failed if failure.retry_after is None)}
        keys: set[str] = set()
        async with self._begin() as connection:
            await self._lock(connection, self._locks.finish)
            for statement, rows, parameters in (
                (statements.delete_sent, sent, {"positions": self._positions(sent)}),
                (statements.release, untried, {"positions": self._positions(untried)}),
                (statements.fail, failures, {"failed": json.dumps(failures)}),
            ):
                if rows:
                    found = (await connection.execute(statement, {**parameters, "lease": self._id(lease)})).all()
                    changed += len(found)
                    keys.update(row.key for row in found if row.has_parked and row.seq in done)
            for key in keys:
                await connection.execute(statements.unpark_next, {"key": _Hidden(key)})
        return len(sent) + len(untried) + len(failures) - changed

    async def wait(self, timeout: float, /) -> None:
        """See `Store.wait`."""
        self._bind_to_running_loop()
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        limit = asyncio.timeout_at(until)
        try:
            async with limit:
                if self._notifies and not self._listener.is_open:
                    await asyncio.shield(self._listener.open())
                    self._cannot_listen = False
                await self._stored.wait()
        except Exception as error:  # noqa: BLE001  # of the database, of the driver, or of the network
            if limit.expired():
                return
            if not self._cannot_listen:
                self._cannot_listen = True
                line = "the relay looks for messages from time to time, since it cannot listen: %r"
                _log.warning(line, type(error), extra={"error_type": name_of(type(error))})
            await asyncio.sleep(until - loop.time())

    def _bind_to_running_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._stored, self._cancelled = loop, asyncio.Event(), set()
            self._listener.forget()

    def _committed(self) -> None:
        if not self._notifies:
            self._wake()

    def _wake(self) -> None:
        self._stored.set()

    async def close(self) -> None:
        """See `Store.close`."""
        await self._listener.close()
        if self._cancelled:
            await asyncio.wait(self._cancelled)

    # -- for people --------------------------------------------------------------------------------------------------

    @_in_own_task
    async def status(self) -> Status:
        """See `Store.status`."""
        async with self._begin() as connection:
            settled = await connection.scalar(self._locks.settled) if self._on_postgresql else 0
            row = (await connection.execute(self._statements.status, {"settled": settled})).one()
            writer = (await connection.execute(self._locks.holder)).one_or_none() if row.held_back else None
        return Status(
            pending=row.pending,
            oldest=max(0.0, row.oldest or 0.0),
            scheduled=row.alive - row.pending,
            leased=row.leased,
            dead=row.dead,
            blocked=row.blocked,
            blocked_keys=row.blocked_keys,
            held_back=row.held_back,
            held_back_by=writer.pid if writer else None,
            held_back_for=(writer.open_for or 0.0) if writer else 0.0,
        )

    @_in_own_task
    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        """See `Store.dead`."""
        async with self._begin() as connection:
            rows = (await connection.execute(self._statements.dead, {"limit": limit, "after": after})).all()
        return [
            DeadRow(
                position=row.seq,
                message=self._message(row),
                attempts=row.attempts,
                stored_at=self._time(row.stored_at),
                reason=row.dead_reason,
                died_at=self._time(row.dead_at),
                blocked=row.blocked,
            )
            for row in rows
        ]

    async def redrive(self, positions: Collection[int] | None = None, /) -> int:
        """See `Store.redrive`."""
        chosen = {"all": positions is None, "positions": self._positions(positions or ())}
        return await self._revive(self._statements.redrive, chosen)

    async def discard(self, positions: Collection[int], /) -> int:
        """See `Store.discard`."""
        return await self._revive(self._statements.discard, {"positions": self._positions(positions)})

    @_in_own_task
    async def _revive(self, statement: sa.TextClause, parameters: Mapping[str, Any]) -> int:
        async with self._locked() as (connection, _):
            await self._lock(connection, self._locks.park)
            changed = (await connection.execute(statement, parameters)).all()
            for key in {row.key for row in changed if row.has_parked}:
                await connection.execute(self._statements.unpark_next, {"key": _Hidden(key)})
            if self._notifies:
                await connection.execute(sa.text("SELECT pg_notify(:channel, '')"), {"channel": self._channel})
        self._committed()
        return len(changed)

    @_in_own_task
    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        """See `Store.prune`."""
        async with self._begin() as connection:
            if self._on_postgresql and not await connection.scalar(self._locks.prune):
                return 0
            chosen = {"keep": keep.total_seconds(), "limit": limit}
            return (await connection.execute(self._statements.prune, chosen)).rowcount
