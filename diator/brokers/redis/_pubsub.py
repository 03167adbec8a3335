"""Redis Pub/Sub. Needs the extra `redis`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities, require
from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, encode
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.redis._client import (
    CLIENT_ERRORS,
    Client,
    RedisConnection,
    check_client,
    client_from_url,
    give_back,
    send_error,
)
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.supervisor import CallbackSubscription, ReconnectPolicy, Source
from diator.exceptions import BrokerClosed, ConfigurationError, DecodingError, MessageUnroutable, UnsupportedCapability

logger: logging.Logger = logging.getLogger(__name__)


class RedisMessageBroker(ServiceBroker[CommandConnection]):
    """
    Sends each message to the channel `<channel_prefix>:<message_type>:<message_name>` of Redis Pub/Sub.

    At most once: Redis gives a message to those who listen at that moment and keeps nothing. That Redis confirmed a
    message says that it has passed it on, not that anybody heard it.

    *client* stays its owner's: one connection of its pool is held while the broker is in use, and given back by
    `aclose`; the client is never closed. `from_url` makes a broker with a client of its own.

    *timeout* bounds every call, in seconds. *max_message_bytes* bounds the encoded message. *max_in_flight* bounds the
    messages that wait for Redis's answer; further ones wait for room. With *require_receiver* a message that nobody
    received raises `MessageUnroutable`; Redis counts those on the node that it was sent to.

    A subscription takes a connection of its own from the pool, prefetches at most *extra_prefetch* messages, and
    reconnects as *reconnect* says. With *older_senders* it also hears diator 0.1, whose channels end in
    the id of the message instead of its name: every message of that kind is then looked into, for its name.
    """

    def __init__(  # one transport, all its options
        self,
        client: Client,
        channel_prefix: str = "python_diator_channel",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        require_receiver: bool = False,
        older_senders: bool = False,
        extra_prefetch: int = 1_000,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        check_client(client)
        if extra_prefetch < 1 or max_in_flight < 1 or timeout <= 0:
            raise ConfigurationError("extra_prefetch and max_in_flight are at least 1, and timeout is above 0")
        self._client = client
        self._prefix = channel_prefix
        self._max_message_bytes = max_message_bytes
        self._require_receiver = require_receiver
        self._older_senders = older_senders
        self._extra_prefetch = extra_prefetch
        self._reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout)
        super().__init__(CommandConnection(client, timeout=timeout, max_in_flight=max_in_flight))

    @classmethod
    def from_url(
        cls,
        url: str,
        channel_prefix: str = "python_diator_channel",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        require_receiver: bool = False,
        older_senders: bool = False,
        extra_prefetch: int = 1_000,
        reconnect: ReconnectPolicy | None = None,
    ) -> Self:
        """Make a broker with a client of its own for `redis://…`, `rediss://…` or `unix://…`; `aclose` closes it."""
        broker = cls(
            client_from_url(url, timeout=timeout),
            channel_prefix,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            require_receiver=require_receiver,
            older_senders=older_senders,
            extra_prefetch=extra_prefetch,
            reconnect=reconnect,
        )
        broker._service.owns_client = True
        return broker

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`. MessageUnroutable only with *require_receiver*."""
        await self.publish(message)

    async def publish(self, message: Message, /) -> int:
        """Send *message*, with the promises of `send_message`, and give the number of its receivers on Redis's node."""
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        channel = self._channel(Topic(message.message_type, message.message_name))
        receivers: int = await self._service.execute(b"PUBLISH", channel, body, message_id=message.message_id)
        if self._require_receiver and not receivers:
            raise MessageUnroutable("nobody is subscribed to its channel", message_id=message.message_id)
        return receivers

    @property
    def capabilities(self) -> Capabilities:
        """What Redis Pub/Sub promises: little, and all of it at once."""
        return Capabilities(
            guarantee="at_most_once",
            receipt="accepted",
            ordering="destination",
            distribution=frozenset({"broadcast"}),
            unroutable="reported" if self._require_receiver else "dropped",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,  # nothing is settled here, so nothing can be held back by it
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """
        See `ReadableBroker.subscribe`. Every subscription gets every message; whoever is away misses it.

        Redis drops a subscriber that is too slow (`client-output-buffer-limit pubsub`). That, like every other loss of
        the connection, is told to *on_gap* once there is a new one.
        """
        if group is not None:
            remedy = "leave the group out, or use Redis Streams"
            competing = Capabilities(distribution=frozenset({"competing"}))
            require(self, self.capabilities, competing, for_=f"subscribe(group={group!r})", remedy=remedy)
        channels = {self._channel(topic): topic for topic in topics}
        patterns = {self._channel_of_any(topic) for topic in topics} if self._older_senders else ()
        subscription = CallbackSubscription(
            lambda: self._subscribed(channels, patterns),
            topics,
            lossy=True,
            prefetch=prefetch,
            buffer_size=prefetch + self._extra_prefetch,
            reconnect=self._reconnect,
            on_gap=on_gap,
            registry=self._service.subscriptions,
        )
        async with subscription as deliveries:
            yield deliveries

    @asynccontextmanager
    async def _subscribed(
        self, channels: Mapping[bytes, Topic], patterns: Collection[bytes]
    ) -> AsyncGenerator[Source, None]:
        """Take a connection of the client's pool, and wait until Redis has confirmed every channel."""
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            source = _Connection(connection, channels, patterns)
            try:
                if patterns:
                    await connection.send_command("PSUBSCRIBE", *patterns, check_health=False)
                await connection.send_command("SUBSCRIBE", *channels, check_health=False)
                while not source.is_ready:
                    await source.receive(0)
            except CLIENT_ERRORS as error:
                raise send_error(error, None, written=False) from error
            yield source
        finally:
            await give_back(self._client, connection)

    def _channel(self, topic: Topic) -> bytes:
        return f"{self._prefix}:{topic.message_type}:{topic.message_name}".encode()

    def _channel_of_any(self, topic: Topic) -> bytes:
        return re.sub(rb"([*?\[\]\\])", rb"\\\1", f"{self._prefix}:{topic.message_type}:".encode()) + b"*"


class _Connection:
    """
    One connection that is subscribed. It also is the settler of its deliveries: Pub/Sub has nothing to settle.

    Not redis-py's `PubSub`: that connects and subscribes again by itself, and nobody learns what was missed.
    """

    def __init__(
        self, connection: RedisConnection, channels: Mapping[bytes, Topic], patterns: Collection[bytes]
    ) -> None:
        self._connection = connection
        self._topics = channels
        self._wanted = {*channels, *patterns}
        self._confirmed: set[bytes] = set()

    @property
    def is_ready(self) -> bool:
        return self._confirmed >= self._wanted

    async def receive(self, most: int, /) -> Sequence[Delivery]:  # Redis sends them one by one
        # Never cancelled half-way through a reply: its parts stay in the parser.
        reply: Any = await self._connection.read_response(
            disable_decoding=True, timeout=math.inf, disconnect_on_error=False, push_request=True
        )
        kind, *rest = reply if isinstance(reply, list) else [reply]
        if kind == b"message":
            channel, body = rest
            return [Delivery(topic=self._topics[channel], body=body, headers={}, attempt=1, settler=self)]
        if kind == b"pmessage":
            _, channel, body = rest
            topic = None if channel in self._topics else self._topic_of(body)  # or it came by its channel, too
            return [Delivery(topic=topic, body=body, headers={}, attempt=1, settler=self)] if topic else []
        if kind in {b"subscribe", b"psubscribe"}:
            self._confirmed.add(rest[0])
        return []

    def _topic_of(self, body: bytes) -> Topic | None:
        """Find out what an older sender's message is about; None if nobody here asked for it."""
        try:
            message = decode(body, max_bytes=len(body))
        except DecodingError as error:
            logger.warning("a message on the channel of an older sender cannot be read: %s", error)
            return None
        topic = Topic(message.message_type, message.message_name)
        return topic if topic in self._topics.values() else None

    async def probe(self) -> None:
        await self._connection.send_command("PING", check_health=False)  # its reply comes with the others

    async def ack(self, delivery: Delivery, /) -> None:
        pass  # there is nothing to acknowledge

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        raise _refused("retry()")

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        raise _refused("dead_letter()")


def _refused(what: str) -> UnsupportedCapability:
    return UnsupportedCapability("RedisMessageBroker", ["redelivery"], why=what, remedy="use Redis Streams")
