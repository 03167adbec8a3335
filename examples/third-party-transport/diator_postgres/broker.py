"""`PostgresMessageBroker`: sends messages to a table, and makes the subscriptions that read it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Any
from uuid import uuid4

import asyncpg

from diator.brokers import Message
from diator.brokers.batching import BatchSender
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.names import shortened
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import ConfigurationError
from diator_postgres._connection import Connection
from diator_postgres._subscription import Subscription

# The characters of a topic or a group in the table. An index takes at most 2,700 bytes, a notification 8,000.
_MAX_NAME_LENGTH = 200

# A commit waits for the disk, whatever the default of this database is. Other settings than `off` wait for more.
_PREPARE = """
SELECT to_regclass('dead_letters') IS NULL, set_config('synchronous_commit', replace(now, 'off', 'on'), false)
FROM current_setting('synchronous_commit') AS now
"""
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('diator'))"


class PostgresMessageBroker(ServiceBroker[Connection]):
    """
    Messages in a table of PostgreSQL: at least once to each group, and to each subscription without one.

    Each group has its own row of a message, and deletes it when it has settled the message. Concurrent sends of one
    broker share a transaction. A send that has returned is committed (`synchronous_commit` is never off).

    Args:
        dsn: The address of the database, as asyncpg takes it.
        schema: The schema of the tables: only a to z, digits and `_`. Missing tables are created.
        timeout: The time limit of every call, in seconds.
        lease: After so many seconds without a sign of life, a consumer loses the messages that it holds.
        absence: How long messages wait for the reader of a subscription without a group, in seconds.
        reconnect: The time limits and delays of the subscriptions.
        max_message_bytes: The size limit of an encoded message, in bytes.
        options: Further arguments of `asyncpg.connect`, such as `ssl`, `password` or `host`.
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
            raise ConfigurationError(f"{schema!r} is not a valid schema name; use a to z, digits and _")
        settings = {
            **options.pop("server_settings", {}),
            "search_path": f'"{schema}"',
            "default_transaction_isolation": "read committed",  # the functions of the schema need this level
        }
        connect = partial(asyncpg.connect, dsn, server_settings=settings, **options)
        self._schema, self._timeout, self._lease, self._absence = schema, timeout, lease, absence
        reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout, idle_timeout=2 * timeout)
        self._max_message_bytes = max_message_bytes
        super().__init__(Connection(connect, self._prepare, timeout=timeout, reconnect=reconnect))
        self._reader = Connection(connect, self._prepare_to_read, timeout=timeout, reconnect=reconnect)
        self._batches = BatchSender(self._send, timeout=timeout)

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
        row = (_encoded(message.message_type, message.message_name), body, headers)
        await self._batches.send(row, size=len(body), message_id=message.message_id)

    async def _send(self, rows: Sequence[tuple[str, bytes, str]], until: float) -> None:
        await self._service.run("SELECT send($1, $2, $3)", *zip(*rows, strict=True), until=until)

    # -- reading -------------------------------------------------------------------------------------------------

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        group = settings.group
        return Subscription(
            settings,
            self._reader,
            _encoded("", uuid4().hex) if group is None else _encoded(group),
            {_encoded(*topic): topic for topic in settings.topics},
            lease=timedelta(seconds=self._lease),
            expires_after=timedelta(seconds=self._absence) if group is None else None,
        )

    # -- connections ---------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        await super().aclose()  # first, because it ends the subscriptions, which need the other connection
        await self._reader.aclose()
        await self._batches.wait()

    async def _prepare(self, connection: Any) -> None:
        if await connection.fetchval(_PREPARE):
            schema = files(__package__).joinpath("schema.sql").read_text()
            await connection.execute(f'{_ONE_AT_A_TIME}; CREATE SCHEMA IF NOT EXISTS "{self._schema}"; {schema}')

    async def _prepare_to_read(self, connection: Any) -> None:
        def notify(group: str | None) -> None:
            for subscription in self._service.subscriptions:
                if isinstance(subscription, Subscription) and group in {None, subscription.group_key}:
                    subscription.notified.set()

        await self._prepare(connection)
        await connection.add_listener(self._schema, lambda _, __, ___, group: notify(group))
        connection.add_termination_listener(lambda _: notify(None))  # the subscriptions detect the loss and reconnect


def _encoded(*names: str) -> str:
    """Return *names* as one text in ASCII. Different names never have the same text."""
    return shortened(json.dumps(names), _MAX_NAME_LENGTH, "...")  # a JSON list does not end in a hash
