"""The broker of Redis Streams: what a program constructs, and one connection that reads."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Self

from diator.brokers.audit import Finding
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities, Durability, require
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.redis._audit import durability as durability_of
from diator.brokers.redis._audit import findings
from diator.brokers.redis._client import Client, RedisConnection, check_client, client_from_url, give_back
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._group import BODY, Subscription, ms
from diator.brokers.supervisor import CallbackSubscription, ReconnectPolicy, Source
from diator.exceptions import BrokerClosed, BrokerError, ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

_SCAN = 1.0
"""How often, in seconds, a member looks for what others left behind, and for what is due."""
_SCAN_AGAIN = 0.05
"""Likewise, while it takes over, as many at once as can begin."""


class RedisStreamMessageBroker(ServiceBroker[CommandConnection]):
    """
    Appends each message to a Redis stream, and reads streams as a member of a group.

    At least once: a message is the group's until a member has acknowledged it. A member that dies is noticed when its
    *lease* (seconds) is over, and others take what it held; a member that lives keeps its lease, however long a handler
    takes. A group begins at the oldest message, and collects while no member is there.

    What Redis keeps of confirmed messages is a matter of its configuration: with `appendonly yes` they survive the
    death of its process. *durability* says what you have set there; it becomes one of the capabilities, and is checked
    before anything is sent or read: where the server keeps less, `UnsupportedCapability` is raised.

    Nothing is removed from a stream unless *retention* (seconds) says so, and then only what is older and was
    acknowledged by every group.

    The other options are those of `RedisMessageBroker`; *extra_prefetch* is the number of messages that are held, under
    this member's lease, beyond those that are being handled.
    """

    def __init__(
        self,
        client: Client,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        durability: Durability = "none",
        lease: float = 60.0,
        retention: float | None = None,
        extra_prefetch: int = 100,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        check_client(client)
        if extra_prefetch < 0 or max_in_flight < 1 or timeout <= 0 or lease <= 0:
            raise ConfigurationError(
                "extra_prefetch is at least 0, max_in_flight at least 1, timeout and lease above 0"
            )
        self._client = client
        self._prefix = prefix
        self._max_message_bytes = max_message_bytes
        self._timeout = timeout
        self._durability: Durability = durability
        self._is_verified = durability == "none"
        self._lease = lease
        self._retention = retention
        self._extra_prefetch = extra_prefetch
        self._reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout)
        super().__init__(CommandConnection(client, timeout=timeout, max_in_flight=max_in_flight))

    @classmethod
    def from_url(
        cls,
        url: str,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        durability: Durability = "none",
        lease: float = 60.0,
        retention: float | None = None,
        extra_prefetch: int = 100,
        reconnect: ReconnectPolicy | None = None,
    ) -> Self:
        """Make a broker with a client of its own for `redis://…`, `rediss://…` or `unix://…`; `aclose` closes it."""
        broker = cls(
            client_from_url(url, timeout=timeout),
            prefix,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            durability=durability,
            lease=lease,
            retention=retention,
            extra_prefetch=extra_prefetch,
            reconnect=reconnect,
        )
        broker._service.owns_client = True
        return broker

    @property
    def capabilities(self) -> Capabilities:
        """What Redis Streams promise; of durability, what this broker was told."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="accepted",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash", "deadline"}),
            redelivery_bound=self._lease + 2 * _SCAN,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact",
            ordering="destination",
            distribution=frozenset({"competing"}),
            subscription="durable",
            replay="earliest",
            durability=self._durability,
            unroutable="retained",
            headers="native",
            backpressure="pull",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        body = encode(message, max_bytes=self._max_message_bytes)
        fields = [BODY, body]
        for name, value in headers_with_key(message).items():
            fields += [name.encode(), value.encode()]
        stream = self._stream(Topic(message.message_type, message.message_name))
        if not self._is_verified:
            await self._verify()
        await self._service.execute(b"XADD", stream, b"*", *fields, message_id=message.message_id)

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """See `ReadableBroker.subscribe`. *group* is needed: without one nobody knows what was handled."""
        if group is None:
            broadcast = Capabilities(distribution=frozenset({"broadcast"}))
            remedy = "name a group, one for each service, or use Redis Pub/Sub"
            require(self, self.capabilities, broadcast, for_="subscribe() without a group", remedy=remedy)
        streams = {self._stream(topic): topic for topic in topics}
        subscription = Subscription(
            self._service, streams, str(group), lease=self._lease, prefetch=prefetch, timeout=self._timeout
        )
        supervised = CallbackSubscription(
            lambda: self._connected(subscription),
            topics,
            group,
            lossy=False,
            prefetch=prefetch,
            buffer_size=prefetch + self._extra_prefetch,
            reconnect=self._reconnect,
            on_gap=on_gap,
            registry=self._service.subscriptions,
            unsettled=lambda: subscription.holds,
            leave=subscription.leave,
        )
        subscription.on_settled = supervised.notify_settled
        async with supervised as deliveries:
            yield deliveries

    @asynccontextmanager
    async def _connected(self, subscription: Subscription) -> AsyncGenerator[Source, None]:
        """Take a connection of the client's pool for blocking reads, and see that the groups are there."""
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        await self._verify()
        await subscription.create_groups()
        connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            yield _Connection(connection, subscription, self._retention)
        finally:
            await give_back(self._client, connection)

    async def audit(self) -> list[Finding]:
        """See `Auditable.audit`. It needs the permission for INFO, and CONFIG GET for the whole of it."""
        return await findings(self._service.execute)

    async def _verify(self) -> None:
        """Have the server keep what this broker promises of it."""
        if not self._is_verified:
            kept = Capabilities(durability=await durability_of(self._service.execute))
            promised = Capabilities(durability=self._durability)
            remedy = "set appendonly yes on the server, or promise less"
            require(self, kept, promised, for_=f"durability={self._durability!r} on this server", remedy=remedy)
            self._is_verified = True

    def _stream(self, topic: Topic) -> bytes:
        return f"{self._prefix}:{topic.message_type}:{topic.message_name}".encode()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._verify()
        return self


class _Connection:
    """One connection that waits for entries."""

    def __init__(self, connection: RedisConnection, subscription: Subscription, retention: float | None) -> None:
        self._connection = connection
        self._subscription = subscription
        self._retention = retention
        self._next_scan = 0.0
        self._empty = 0
        self._to_look_for_lost = [*subscription.topics]
        self._command = (b"XREADGROUP", b"GROUP", subscription.group, subscription.name, b"COUNT")
        self._streams = [*subscription.topics]
        self._busy: bytes | None = None
        """A stream that alone had as much as was asked for: there is more where that came from."""

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while self._to_look_for_lost:
            if lost := await self._subscription.unheld(self._to_look_for_lost.pop()):
                return lost
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next_scan:
            if found := await self._subscription.scan(most):
                return found  # and scan again at once
            self._next_scan = loop.time() + self._until_next_scan
            await self._trim()
        streams, block = self._to_ask(most)
        count = max(1, min(most, 100) // len(streams))  # for each stream
        await self._connection.send_command(
            *self._command, b"%d" % count, *block, b"STREAMS", *streams, *[b">"] * len(streams), check_health=False
        )
        # BLOCK ends after a second at the latest, so a peer that says nothing for longer is dead.
        reply = await self._connection.read_response(disable_decoding=True, timeout=math.inf, disconnect_on_error=False)
        self._empty = 0 if reply else self._empty + 1
        answered = [*(reply.items() if isinstance(reply, dict) else reply or ())]
        if len(streams) > 1 and len(answered) == 1 and len(answered[0][1]) == count:
            self._busy = answered[0][0]
        return [
            self._subscription.delivery(stream, id_, pairs or (), 1)
            for stream, entries in answered
            for id_, pairs in entries
        ]

    def _to_ask(self, most: int) -> tuple[list[bytes], tuple[bytes, ...]]:
        """
        Choose whom to ask, and for how long to wait there.

        A busy stream is asked alone every other time: of all of them, each would give but its part. Where there is room
        for fewer than one of each, some are asked, then others; when none of them has anything, all are waited for.
        """
        if self._busy is not None:
            streams, self._busy = [self._busy], None
            return streams, ()
        several = min(len(self._streams), most)
        if several == len(self._streams) or self._empty * several >= len(self._streams):
            return self._streams, (b"BLOCK", ms(self._until_next_scan))
        streams = self._streams[:several]
        self._streams = self._streams[several:] + streams
        return streams, ()

    @property
    def _until_next_scan(self) -> float:
        return _SCAN_AGAIN if self._subscription.is_taking_over else _SCAN

    async def _trim(self) -> None:
        if self._retention is not None:
            for stream in self._subscription.streams:
                try:
                    await self._subscription.trim(stream, self._retention)
                except BrokerError as error:
                    logger.warning("%s could not be trimmed: %s", stream, error)

    async def probe(self) -> None:
        """Nothing to ask: an answer is due anyway."""
