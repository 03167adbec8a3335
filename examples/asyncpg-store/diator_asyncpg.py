"""A store of an outbox and an inbox in PostgreSQL, over asyncpg alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from diator.brokers.message import Message
from diator.brokers.sending import Due
from diator.exceptions import ConfigurationError, EncodingError
from diator.outbox.store import Claim, DeadRow, Failure, OnDead, Order, Row, Status

SCHEMA = """
CREATE TABLE outbox (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id uuid NOT NULL, message_type text NOT NULL, message_name text NOT NULL,
    key text COLLATE "C", headers json NOT NULL, payload json NOT NULL, time text,
    stored_at timestamptz NOT NULL DEFAULT clock_timestamp(), due_at timestamptz NOT NULL,
    attempts int NOT NULL DEFAULT 0, lease uuid, leased_until timestamptz, reason text, died_at timestamptz);
CREATE INDEX outbox_due ON outbox (due_at, position) WHERE reason IS NULL;
CREATE INDEX outbox_key ON outbox (key, position) WHERE attempts > 0;
CREATE INDEX outbox_id ON outbox (message_id);
CREATE TABLE inbox (
    group_name text, handler text, message_id uuid, noted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (group_name, handler, message_id));
CREATE INDEX inbox_noted ON inbox (noted_at);
"""
CLAIMING, WRITERS, PRUNING = 7_001, 7_002, 7_003  # classes of advisory locks, all in one database
LAST, LONGEST = 2**62, 2_000  # an index of PostgreSQL takes no longer texts
ROW = ("position", "attempts", "stored_at")

# A transaction that stores takes a shared lock first, whose number is the last position before its own. It has the lock
# until it ends. So the smallest number of all such locks is the position up to which no row can be committed any more.
ADD = f"""
    WITH writing AS MATERIALIZED (
        SELECT pg_advisory_xact_lock_shared({WRITERS}, (last_value - (NOT is_called)::int)::int) AS locked
        FROM outbox_position_seq)
    INSERT INTO outbox (message_id, message_type, message_name, key, headers, payload, time, due_at)
    SELECT m.id, m.type, m.name, m.key, m.headers::json, m.payload::json, m.time,
        coalesce(m.at, clock_timestamp() + m.after, clock_timestamp())
    FROM writing, unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
        $8::timestamptz[], $9::interval[]) WITH ORDINALITY m(id, type, name, key, headers, payload, time, at, after, n)
    WHERE writing.locked IS NOT NULL ORDER BY m.n
"""
WRITER = f"""
    SELECT pid, objid::bigint AS position FROM pg_locks WHERE locktype = 'advisory' AND classid = {WRITERS}
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY objid LIMIT 1
"""
FREE = "o.reason IS NULL AND greatest(o.due_at, o.leased_until) <= statement_timestamp()"
BLOCKED = """
    EXISTS (SELECT FROM outbox e WHERE e.key = o.key AND e.position < o.position AND e.attempts > 0 AND (
        e.reason IS NOT NULL AND $5 OR e.reason IS NULL AND (
            e.leased_until > statement_timestamp() OR e.lease IS NULL AND e.due_at > statement_timestamp())))
"""
# It waits for a row that is locked, because the program may be cancelling it: to skip it would let others overtake it.
CLAIM = f"""
    WITH free AS MATERIALIZED (
        SELECT position FROM outbox o
        WHERE {FREE} AND (NOT $4 OR o.key IS NULL OR o.position <= $6 AND NOT {BLOCKED})
        ORDER BY position LIMIT $1 FOR UPDATE)
    UPDATE outbox o SET lease = $2, leased_until = statement_timestamp() + $3, attempts = attempts + 1
    FROM free WHERE free.position = o.position RETURNING o.*
"""
NEXT_DUE = "SELECT extract(epoch FROM min(due_at) - now())::float FROM outbox WHERE reason IS NULL AND due_at > now()"
FAIL = """
    UPDATE outbox o SET lease = NULL, leased_until = NULL, reason = CASE WHEN f.after IS NULL THEN f.reason END,
        died_at = CASE WHEN f.after IS NULL THEN clock_timestamp() END,
        due_at = coalesce(clock_timestamp() + f.after, o.due_at)
    FROM unnest($2::bigint[], $3::text[], $4::interval[]) f(position, reason, after)
    WHERE f.position = o.position AND lease = $1
"""
GONE = "DELETE FROM outbox WHERE lease = $1 AND position = ANY($2)"
RELEASE = GONE.replace(
    "DELETE FROM outbox", "UPDATE outbox SET lease = NULL, leased_until = NULL, attempts = attempts - 1"
)
DEAD = """
    SELECT *, (SELECT count(*) FROM outbox b WHERE b.key = o.key AND b.position > o.position AND b.reason IS NULL)
    AS blocked FROM outbox o WHERE reason IS NOT NULL AND position > $1 ORDER BY position LIMIT $2
"""
REDRIVE = """
    UPDATE outbox SET reason = NULL, died_at = NULL, attempts = 0, due_at = clock_timestamp()
    WHERE reason IS NOT NULL AND ($1::bigint[] IS NULL OR position = ANY($1))
"""
DISCARD = "DELETE FROM outbox WHERE reason IS NOT NULL AND position = ANY($1)"
OLD = "SELECT ctid FROM inbox WHERE noted_at < clock_timestamp() - $1::interval ORDER BY noted_at LIMIT $2"
PRUNE = f"DELETE FROM inbox WHERE ctid IN ({OLD})"
NOTE = "INSERT INTO inbox (group_name, handler, message_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING 1"
STATUS = """
    SELECT count(*) FILTER (WHERE due) AS pending, count(*) FILTER (WHERE reason IS NULL AND NOT due) AS scheduled,
        coalesce(extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE due)), 0)::float AS oldest,
        count(*) FILTER (WHERE leased_until > clock_timestamp()) AS leased,
        count(*) FILTER (WHERE reason IS NOT NULL) AS dead,
        count(*) FILTER (WHERE reason IS NULL AND EXISTS (SELECT FROM outbox d
            WHERE d.key = o.key AND d.position < o.position AND d.reason IS NOT NULL)) AS blocked,
        count(DISTINCT key) FILTER (WHERE reason IS NOT NULL) AS blocked_keys,
        count(*) FILTER (WHERE due AND lease IS NULL AND key IS NOT NULL AND position > $1) AS held_back
    FROM (SELECT *, reason IS NULL AND due_at <= clock_timestamp() AS due FROM outbox) o
"""
SINCE = "SELECT extract(epoch FROM clock_timestamp() - xact_start)::float FROM pg_stat_activity WHERE pid = $1"


class AsyncpgStore:
    """Keeps an outbox and an inbox in PostgreSQL. The relay has connections of its own, which `close` closes."""

    session_type = asyncpg.Connection

    def __init__(self, url: str, **connecting: Any) -> None:
        self._url, self._connecting = url, connecting
        self._pool: Any = None
        self._listening: Any = None
        self._stored = asyncio.Event()

    async def add(self, messages: Sequence[Message], due: Sequence[Due], session: Any, /) -> None:
        for message in messages:
            texts = (message.message_type, message.message_name, message.key or "")
            if any("\0" in each or each != each.encode(errors="replace").decode() for each in texts):
                raise EncodingError(f"message {message.message_id}", "a name or the key is not valid text")
            if max(len(each.encode()) for each in texts) > LONGEST:
                raise EncodingError(f"message {message.message_id}", "a name or the key is too long for an index")
        names = ("message_id", "message_type", "message_name", "key")
        fields = [[getattr(each, name) for each in messages] for name in names]
        fields.append([json.dumps(dict(each.headers)) for each in messages])
        fields.append([each.payload_json.decode() for each in messages])
        fields.append([each.time and each.time.isoformat() for each in messages])
        at = [each if isinstance(each, datetime) else None for each in due]
        after = [each if isinstance(each, timedelta) else None for each in due]
        await session.execute(ADD, *fields, at, after)
        await session.execute("NOTIFY outbox")

    async def cancel(self, message_id: UUID, session: Any, /) -> bool:
        deleted = "DELETE FROM outbox WHERE message_id = $1 AND attempts = 0 AND reason IS NULL RETURNING 1"
        return bool(await session.fetch(deleted, message_id))

    async def first_time(self, message_id: UUID, group: str, handler: str, session: Any, /) -> bool:
        noted = (
            "INSERT INTO inbox (group_name, handler, message_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING 1"
        )
        return bool(await session.fetch(noted, group, handler, message_id))

    async def check(self) -> None:
        async with self._connected() as connection:
            try:
                await connection.fetch("SELECT due_at, attempts, reason, died_at, noted_at FROM outbox, inbox LIMIT 0")
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
                raise ConfigurationError(f"{error}; make the tables with diator_asyncpg.SCHEMA") from error

    async def claim(self, *, limit: int, lease: float, order: Order, on_dead: OnDead) -> Claim:
        self._stored.clear()
        token = uuid4()
        async with self._connected() as connection, connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({CLAIMING}, 0)")  # one claim after the other
            writer = await connection.fetchrow(WRITER)  # before the statement that reads the rows
            settled = writer["position"] if writer else LAST
            arguments = (limit, token, timedelta(seconds=lease), order == "key", on_dead == "block", settled)
            rows = sorted(await connection.fetch(CLAIM, *arguments), key=lambda row: row["position"])
            next_due = None if rows else await connection.fetchval(NEXT_DUE)
        claimed = [Row(message=_message(row), **_only(row, *ROW)) for row in rows]
        return Claim(lease=token, rows=claimed, next_due=next_due)

    async def finish(
        self, lease: UUID, /, *, sent: Collection[int], untried: Collection[int], failed: Collection[Failure]
    ) -> int:
        failures = [[each.position for each in failed], [each.reason for each in failed]]
        retries = [None if each.retry_after is None else timedelta(seconds=each.retry_after) for each in failed]
        async with self._connected() as connection, connection.transaction():
            done = [
                await connection.execute(GONE, lease, [*sent]),
                await connection.execute(RELEASE, lease, [*untried]),
                await connection.execute(FAIL, lease, *failures, retries),
            ]
        return len(sent) + len(untried) + len(failed) - sum(map(_count, done))

    async def wait(self, timeout: float, /) -> None:
        until = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(until):
                if self._listening is None or self._listening.is_closed():
                    self._listening = await asyncpg.connect(self._url, **self._connecting)
                    await self._listening.add_listener("outbox", lambda *_: self._stored.set())
                    return  # something may have been stored before it listened
                await self._stored.wait()
        except TimeoutError:
            pass
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await asyncio.sleep(until - asyncio.get_running_loop().time())

    async def close(self) -> None:
        pool, listening, self._pool, self._listening = self._pool, self._listening, None, None
        for each in (listening, pool):
            if each is not None:
                await each.close()

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Any]:
        if self._pool is None:
            self._pool = asyncpg.create_pool(self._url, min_size=0, **self._connecting)
        async with (await self._pool).acquire() as connection:
            yield connection

    async def status(self) -> Status:
        async with self._connected() as connection:
            writer = await connection.fetchrow(WRITER)
            found = dict(await connection.fetchrow(STATUS, writer["position"] if writer else LAST))
            holds = writer if found["held_back"] else None
            since = await connection.fetchval(SINCE, holds["pid"]) if holds else None
        return Status(**found, held_back_by=holds and holds["pid"], held_back_for=since or 0.0)

    async def dead(self, *, limit: int = 100, after: int = 0) -> Sequence[DeadRow]:
        async with self._connected() as connection:
            rows = await connection.fetch(DEAD, after, limit)
        return [DeadRow(message=_message(row), **_only(row, *ROW, "reason", "died_at", "blocked")) for row in rows]

    async def redrive(self, positions: Collection[int] | None = None, /) -> int:
        async with self._connected() as connection:
            return _count(await connection.execute(REDRIVE, None if positions is None else [*positions]))

    async def discard(self, positions: Collection[int], /) -> int:
        async with self._connected() as connection:
            return _count(await connection.execute(DISCARD, [*positions]))

    async def prune(self, *, keep: timedelta, limit: int = 5_000) -> int:
        async with self._connected() as connection, connection.transaction():
            if not await connection.fetchval(f"SELECT pg_try_advisory_xact_lock({PRUNING}, 0)"):
                return 0
            return _count(await connection.execute(PRUNE, keep, limit))


def _only(row: Any, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _count(status: str) -> int:
    return int(status.rsplit(maxsplit=1)[-1])


def _message(row: Any) -> Message:
    return Message(
        **_only(row, "message_type", "message_name", "message_id", "key"),
        payload_json=row["payload"].encode(),
        headers=json.loads(row["headers"]),
        time=row["time"] and datetime.fromisoformat(row["time"]),
    )
