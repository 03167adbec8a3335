"""`PostgresMessageBroker`: how a message gets into the table, and who may read it there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Any
from uuid import uuid4

import asyncpg

from diator.brokers import Message
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.batching import BatchSender
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.supervisor import ReconnectPolicy, ResilientSubscription
from diator.exceptions import ConfigurationError
from diator_postgres._link import Link
from diator_postgres._member import Member

_LONGEST_NAME = 200
"""Letters of a topic or group in a table. An index takes no more than 2,700 bytes, a notification 8,000."""

# A commit waits for the disk, whatever this database's default is; other settings than off wait for more.
_PREPARE = """
SELECT to_regclass('dead_letters') IS NULL, set_config('synchronous_commit', replace(now, 'off', 'on'), false)
FROM current_setting('synchronous_commit') AS now
"""
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('diator'))"


class PostgresMessageBroker(ServiceBroker[Link]):
    """
    Messages in a table of PostgreSQL: at least once to each group, and to each subscription without one.

    What is given to a group is one row of its own, deleted when the group is done with it. Concurrent sends of one
    broker share a transaction. A send that returned is committed (`synchronous_commit` is never off).

    Arguments:
        dsn: Where the database is, as asyncpg takes it.
        schema: Where the tables are, in letters of a to z, digits and `_`. What is not there is created.
        timeout: Seconds within which every call ends.
        lease: Seconds after which a member that gives no sign of life loses what it holds.
        absence: Seconds for which a subscription without a group is kept while its reader cannot be heard. Should it
            come back later than that, `on_gap` is told.
        options: What else `asyncpg.connect` takes: `ssl`, `password`, `host`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "diator",
        timeout: float = 10.0,
        lease: float = 60.0,
        absence: float = 300.0,
        reconnect: ReconnectPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        **options: Any,
    ) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise ConfigurationError(f"{schema!r} is no name for a schema: use a to z, digits and _")
        settings = {
            **options.pop("server_settings", {}),
            "search_path": f'"{schema}"',
            "default_transaction_isolation": "read committed",  # as the functions of the schema need it
        }
        connect = partial(asyncpg.connect, dsn, server_settings=settings, **options)
        self._schema, self._timeout, self._lease, self._absence = schema, timeout, lease, absence
        self._reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout, idle_timeout=2 * timeout)
        self._max_message_bytes = max_message_bytes
        super().__init__(Link(connect, self._prepare, timeout=timeout))
        self._reader = Link(connect, self._prepare_to_read, timeout=timeout)
        self._batches = BatchSender(self._send, timeout=timeout)
        self._members: set[Member] = set()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash", "deadline"}),
            redelivery_bound=self._lease + self._timeout,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact",
            ordering="destination",
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            durability="crash",
            unroutable="retained",
            headers="native",
            backpressure="pull",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    # -- sending -------------------------------------------------------------------------------------------------

    async def send_message(self, message: Message, /) -> None:
        body = encode(message, max_bytes=self._max_message_bytes)
        headers = json.dumps(headers_with_key(message))
        row = (_written(message.message_type, message.message_name), body, headers)
        await self._batches.send(row, size=len(body), message_id=message.message_id)

    async def _send(self, rows: Sequence[tuple[str, bytes, str]], until: float) -> None:
        await self._service.run("SELECT send($1, $2, $3)", *zip(*rows, strict=True), until=until)

    # -- reading -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        member = Member(
            link=self._reader,
            group=group or "",
            written=_written("", uuid4().hex) if group is None else _written(group),
            topics={_written(*topic): topic for topic in topics},
            lease=timedelta(seconds=self._lease),
            kept=timedelta(seconds=self._absence) if group is None else None,
        )
        member.supervised = ResilientSubscription(
            member.connected,
            topics,
            group,
            lossy=False,  # what is sent meanwhile waits in the table. That it waited in vain is told by the member
            prefetch=prefetch,
            buffer_size=min(prefetch, 32),  # the other members want some, too
            reconnect=self._reconnect,
            on_gap=on_gap,
            registry=self._reader.subscriptions,
            unsettled=lambda: len(member.held),
            leave=member.leave,
        )
        self._members.add(member)
        try:
            async with member.supervised as deliveries:
                yield deliveries
        finally:
            self._members.discard(member)

    # -- connections ---------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        await asyncio.gather(super().aclose(), self._reader.aclose())
        await self._batches.wait()

    async def _prepare(self, connection: Any) -> None:
        if await connection.fetchval(_PREPARE):
            schema = files(__package__).joinpath("schema.sql").read_text()
            await connection.execute(f'{_ONE_AT_A_TIME}; CREATE SCHEMA IF NOT EXISTS "{self._schema}"; {schema}')

    async def _prepare_to_read(self, connection: Any) -> None:
        def wake(group: str | None) -> None:
            for member in self._members:
                if group in {None, member.written}:
                    member.woken.set()

        await self._prepare(connection)
        await connection.add_listener(self._schema, lambda _, __, ___, group: wake(group))
        connection.add_termination_listener(lambda _: wake(None))  # they notice, and connect again


def _written(*names: str) -> str:
    """Write *names* so that no two become one, in ASCII."""
    text = json.dumps(names)
    return text if len(text) <= _LONGEST_NAME else f"{text[:150]}...{hashlib.sha256(text.encode()).hexdigest()[:40]}"
