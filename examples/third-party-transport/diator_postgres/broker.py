"""`PostgresMessageBroker`: how a message gets into the table, and who may read it there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Any, Self
from uuid import UUID, uuid4

import asyncpg

from diator.brokers import Message
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.sending import send_together
from diator.brokers.supervisor import Patience, Source, Supervised, close_all
from diator.exceptions import BrokerClosed, BrokerError, WiringError
from diator_postgres._link import Link
from diator_postgres._member import Member

_MOST_MESSAGES, _MOST_BYTES = 500, 4 * 1024 * 1024
"""What one exchange holds: it is one transaction."""

_LONGEST_NAME = 200
"""Letters of a topic or group in a table. An index takes no more than 2,700 bytes, a notification 8,000."""

_SEND = "SELECT send($1, $2, $3)"

# A commit waits for the disk, whatever this database's default is; other settings than off wait for more.
_PREPARE = """
SELECT to_regclass('dead_letters') IS NULL, set_config('synchronous_commit', replace(now, 'off', 'on'), false)
FROM current_setting('synchronous_commit') AS now
"""
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('diator'))"


class PostgresMessageBroker:
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
        patience: Patience | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        **options: Any,
    ) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise WiringError(f"{schema!r} is no name for a schema: use a to z, digits and _")
        self._dsn, self._schema, self._options = dsn, schema, options
        self._timeout, self._lease, self._absence = timeout, lease, absence
        self._patience = patience or Patience(connect=timeout, idle=2 * timeout)
        self._max_message_bytes = max_message_bytes
        self._sender = Link(self._connect, self._prepare, timeout=timeout)
        self._reader = Link(self._connect, self._prepare, self._listen, timeout=timeout)
        self._waiting: deque[_Sending] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._subscriptions: set[Supervised] = set()
        self._members: set[Member] = set()
        self._closing: asyncio.Task[None] | None = None

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
        if self._closing is not None:
            raise BrokerClosed("this broker is closed", message_id=message.message_id)
        loop = asyncio.get_running_loop()
        topic = _written(message.message_type, message.message_name)
        sending = _Sending(topic, body, headers, message.message_id, loop.time() + self._timeout, loop.create_future())
        self._waiting.append(sending)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="diator: sending")
        await sending.verdict

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        await send_together(self.send_message, messages)

    async def _write(self) -> None:
        """Send what is waiting, and what comes meanwhile. An exchange ends before the first of it is overdue."""
        while batch := self._taken():
            refusal: BrokerError | None = None
            try:
                columns = ([s.topic for s in batch], [s.body for s in batch], [s.headers for s in batch])
                await self._sender.run(_SEND, *columns, until=batch[0].until)
            except BrokerError as error:
                refusal = error
            for sending in batch:
                sending.settle(refusal)

    def _taken(self) -> list[_Sending]:
        batch: list[_Sending] = []
        room = _MOST_BYTES
        while self._waiting and room > 0 and len(batch) < _MOST_MESSAGES:
            sending = self._waiting.popleft()
            if not sending.verdict.done():  # its caller was cancelled
                batch.append(sending)
                room -= len(sending.body)
        return batch

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
            timeout=self._timeout,
            on_gap=on_gap,
        )
        supervised = Supervised(
            lambda: self._connected(member),
            lossy=False,  # what is sent meanwhile waits in the table. That it waited in vain is told by the member
            prefetch=prefetch,
            patience=self._patience,
            on_gap=None,
            siblings=self._subscriptions,
            unsettled=lambda: len(member.held),
            leave=member.leave,
        )
        member.on_settled = supervised.look_again
        self._members.add(member)
        try:
            async with supervised as deliveries:
                yield deliveries
        finally:
            self._members.discard(member)

    @asynccontextmanager
    async def _connected(self, member: Member) -> AsyncGenerator[Source, None]:
        if self._closing is not None:
            raise BrokerClosed("this broker is closed")
        await member.ready()
        yield member

    # -- connections ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._sender.run("SELECT")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="diator: closing")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        closed = BrokerClosed("this broker is closed")
        while self._waiting:  # nothing was written of these
            self._waiting.popleft().settle(closed)
        await close_all(self._subscriptions)
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await asyncio.gather(self._sender.close(), self._reader.close())

    async def _connect(self) -> Any:
        settings = {
            **self._options.get("server_settings", {}),
            "search_path": f'"{self._schema}"',
            "default_transaction_isolation": "read committed",  # as the functions of the schema need it
        }
        return await asyncpg.connect(self._dsn, **{**self._options, "server_settings": settings})

    async def _prepare(self, connection: Any) -> None:
        if await connection.fetchval(_PREPARE):
            schema = files(__package__).joinpath("schema.sql").read_text()
            await connection.execute(f'{_ONE_AT_A_TIME}; CREATE SCHEMA IF NOT EXISTS "{self._schema}"; {schema}')

    async def _listen(self, connection: Any) -> None:
        def wake(group: str | None) -> None:
            for member in self._members:
                if group in {None, member.written}:
                    member.woken.set()

        await connection.add_listener(self._schema, lambda _, __, ___, group: wake(group))
        connection.add_termination_listener(lambda _: wake(None))  # they connect again, and look


@dataclass(eq=False, slots=True)
class _Sending:
    """A message on its way."""

    topic: str
    body: bytes
    headers: str
    message_id: UUID
    until: float
    verdict: asyncio.Future[None]

    def settle(self, refusal: BrokerError | None) -> None:
        if self.verdict.done():
            return
        if refusal is None:
            self.verdict.set_result(None)
        else:
            verdict = type(refusal)(str(refusal), message_id=self.message_id)
            verdict.__cause__ = refusal.__cause__
            self.verdict.set_exception(verdict)


def _written(*names: str) -> str:
    """Write *names* so that no two become one, in ASCII."""
    text = json.dumps(names)
    return text if len(text) <= _LONGEST_NAME else f"{text[:150]}...{hashlib.sha256(text.encode()).hexdigest()[:40]}"
