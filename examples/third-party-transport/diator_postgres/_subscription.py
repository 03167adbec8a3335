"""A subscription: it receives, holds and settles deliveries, and outlives its connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import uuid4

from diator.brokers.base import Delivery, Topic
from diator.brokers.leases import Leased, Leases
from diator.brokers.settling import Acknowledgements, dead_letter_headers
from diator.brokers.supervisor import ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import BrokerError
from diator_postgres._connection import Connection

# Redeliveries come first, because new messages could hold them up for ever. `ANY (ARRAY (…))` is always an index scan.
_CLAIM = """
WITH redelivered AS (
    SELECT id FROM messages WHERE grp = $2 AND topic = ANY ($3) AND due > '-infinity' AND due <= now()
    ORDER BY due LIMIT $4 FOR UPDATE SKIP LOCKED
), fresh AS (
    SELECT id FROM messages WHERE grp = $2 AND topic = ANY ($3) AND due = '-infinity'
    ORDER BY id LIMIT $4 - (SELECT count(*) FROM redelivered) FOR UPDATE SKIP LOCKED
)
UPDATE messages SET holder = $1, due = now() + $5, attempt = attempt + 1
WHERE id = ANY (ARRAY (SELECT id FROM redelivered UNION ALL SELECT id FROM fresh))
RETURNING id, attempt, topic, body, headers
"""
_NEXT_DUE = "SELECT min(due) - now() FROM messages WHERE grp = $1 AND topic = ANY ($2) AND due > '-infinity'"

_OURS = """
unnest($2::text[]::bigint[], $3::text[]::int[]) AS ours (id, n) WHERE holder = $1 AND m.id = ours.id AND attempt = n
"""
_DELETE = f"DELETE FROM messages AS m USING {_OURS}"
_RENEW = f"UPDATE messages AS m SET due = now() + $4 FROM {_OURS} RETURNING m.id, attempt"
_REQUEUE = f"""
WITH requeued AS (UPDATE messages AS m SET holder = NULL, due = now() + $4 FROM {_OURS} RETURNING grp)
SELECT pg_notify(current_schema, grp) FROM requeued
"""
# The headers stay as they are: the text of $4, an object with more of them, goes before the closing brace.
_DEAD_LETTER = f"""
WITH gone AS ({_DELETE} RETURNING m.id, topic, grp, body, left(rtrim(headers::text, E' \\n\\r\\t'), -1) AS headers)
INSERT INTO dead_letters SELECT id, topic, grp, body,
    (headers || CASE WHEN headers ~ '^\\s*{{\\s*$' THEN '' ELSE ', ' END || substr($4, 2))::json FROM gone
"""
# Release claimed messages. Those that were not handed out (not in $2, $3) are not charged an attempt. The others are
# released only when the consumer leaves ($5).
_RELEASE = """
WITH ours AS (SELECT * FROM unnest($2::text[]::bigint[], $3::text[]::int[])), back AS (
    UPDATE messages SET holder = NULL, due = '-infinity', attempt = attempt - ((id, attempt) NOT IN (TABLE ours))::int
    WHERE grp = $4 AND due > '-infinity' AND holder = $1 AND ($5 OR (id, attempt) NOT IN (TABLE ours)) RETURNING grp
)
SELECT pg_notify(current_schema, grp) FROM back LIMIT 1
"""


class Token(Leased):
    """The id of a row and the attempt. No two deliveries have the same, so none can settle what another one holds."""

    id: int
    attempt: int


class Subscription(ResilientSubscription):
    """
    One consumer of a group. A subscription without a group has a group of its own, which expires after a time.

    Attributes:
        group_key: The text of the group in the table.
        notified: Set when the group may have a new message, or when the connection is lost.
    """

    def __init__(
        self,
        settings: SubscriptionSettings,
        connection: Connection,
        group_key: str,
        topics: Mapping[str, Topic],
        *,
        lease: timedelta,
        expires_after: timedelta | None,
    ) -> None:
        # Messages that are sent meanwhile wait in the table; an expired group reports its gap itself. A small buffer
        # leaves some messages for the other consumers of the group.
        super().__init__(settings, lossy=False, buffer_size=min(settings.prefetch, 32))
        self.group_key, self.consumer = group_key, uuid4()
        self.notified = asyncio.Event()
        self._connection, self._topics = connection, topics
        self._lease, self._expires_after = lease, expires_after
        self._leases = Leases[Token](self, lease.total_seconds(), self._renew)
        self._claimed: set[Token] = set()  # held, or settled but not yet confirmed by the service
        self._acknowledgements = Acknowledgements[Token](self._settle, self.log_fields)
        self._has_left = False
        self._last_empty_at = datetime.now(UTC)
        self._gap_since: datetime | None = None

    # -- receiving -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Source, None]:
        """Join the group. Then release what was claimed by a request whose answer was lost."""
        await self._join()
        self._leases.begin()
        await self._release()
        self._raw: Any = self._connection.raw
        yield self

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        if self._raw is None or self._raw.is_closed():
            raise ConnectionError("the connection is lost, and perhaps the answer to a claim with it")
        self.notified.clear()
        began = datetime.now(UTC)
        claim = self._connection.run(_CLAIM, self.consumer, self.group_key, [*self._topics], limit, self._lease)
        rows = sorted(map(tuple, await claim))  # RETURNING does not keep the order
        deliveries = [self._delivery(*row) for row in rows]
        tokens = [cast(Token, delivery.token) for delivery in deliveries]
        self._leases.hold(tokens)
        self._claimed.update(tokens)
        if not rows:
            self._last_empty_at = began
            await self._wait()
        return deliveries

    async def probe(self) -> None:
        """Do nothing: `receive` asks the service more often than that."""

    async def _wait(self) -> None:
        """Wait for a notification or for a message that is due. Do not wait long: a notification can be lost."""
        [(due,)] = await self._connection.run(_NEXT_DUE, self.group_key, [*self._topics])
        longest = self._connection.timeout / 2
        with suppress(TimeoutError):
            async with asyncio.timeout(longest if due is None else min(longest, due.total_seconds())):
                await self.notified.wait()

    def _delivery(self, id_: int, attempt: int, topic_key: str, body: bytes, headers: str) -> Delivery:
        texts: dict[str, str] = {}
        unreadable = None
        try:
            for name, value in json.loads(headers).items():
                if value is not None:
                    texts[name] = value if isinstance(value, str) else json.dumps(value)
        except (ValueError, RecursionError):  # a number with thousands of digits, lists in lists in lists
            unreadable = "the headers cannot be decoded"
        return Delivery(
            topic=self._topics[topic_key],
            body=body,
            headers=texts,
            attempt=attempt,
            settler=self,
            token=Token(id_, attempt),
            unreadable=unreadable,
        )

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        self._acknowledgements.add(self._let_go(delivery))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        await self._settle([self._let_go(delivery)], _REQUEUE, timedelta(seconds=after))

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        source, group = delivery.topic.message_name, self.settings.group or ""
        origin = dead_letter_headers(delivery, reason, source=source, group=group)
        await self._settle([self._let_go(delivery)], _DEAD_LETTER, json.dumps(origin))

    def _let_go(self, delivery: Delivery) -> Token:
        token = cast(Token, delivery.token)
        self._leases.release(token)
        return token

    async def _settle(self, tokens: Sequence[Token], statement: str = _DELETE, *values: object) -> None:
        if not self._has_left:  # otherwise it is too late
            await self._connection.run(statement, self.consumer, *_columns(tokens), *values)
            self._claimed.difference_update(tokens)

    # -- the group, and the end ----------------------------------------------------------------------------------

    async def _renew(self, held: Collection[Token]) -> Collection[Token]:
        await self._join()
        renewed = {*map(tuple, await self._connection.run(_RENEW, self.consumer, *_columns(held), self._lease))}
        return [token for token in held if (token.id, token.attempt) not in renewed]

    async def _join(self) -> None:
        empty_at = self._last_empty_at
        join = "SELECT join_group($1, $2, $3)"
        [(existed,)] = await self._connection.run(join, self.group_key, [*self._topics], self._expires_after)
        if not existed and self._gap_since is not None:
            self.report_gap(self._gap_since, "the group was gone")
        self._gap_since = empty_at  # only now: a group that is gone has no messages either

    async def leave(self, prefetched: Collection[Delivery], /) -> None:
        """Send the last acknowledgements and release what is held. If this fails, the lease ends by itself."""
        if not self._leases.have_begun:
            return  # it never joined its group
        until = asyncio.get_running_loop().time() + self._connection.timeout
        await self._leases.end()
        await self._acknowledgements.flush()
        self._has_left = True
        with suppress(BrokerError):
            if self._expires_after is not None:
                await self._connection.run("SELECT drop_groups($1)", [self.group_key], until=until)
            else:
                await self._release({cast(Token, delivery.token) for delivery in prefetched}, until)

    async def _release(self, prefetched: Collection[Token] = (), until: float | None = None) -> None:
        handed_out = _columns(self._claimed.difference(prefetched))
        await self._connection.run(_RELEASE, self.consumer, *handed_out, self.group_key, self._has_left, until=until)


def _columns(tokens: Collection[Token]) -> tuple[list[str], list[str]]:
    """Return ids and attempts as text: asyncpg would have to look up the type of an array of numbers first."""
    return [str(token.id) for token in tokens], [str(token.attempt) for token in tokens]
