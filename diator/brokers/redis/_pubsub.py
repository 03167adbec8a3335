"""Redis Pub/Sub. Needs the extra `redis`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from diator._hints import name_of
from diator._log import RepeatedLines
from diator._options import check_counts, check_texts, check_times
from diator._text import printable
from diator.brokers.base import Delivery, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, encode
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.redis._client import (
    CLIENT_ERRORS,
    Client,
    RedisConnection,
    client_of,
    close_connection,
    options_of,
    read_reply,
    require_pool,
    send_command,
    send_error,
    subscribing_connection,
)
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._names import channel, channels_of, encoded
from diator.brokers.supervisor import ReconnectPolicy, ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import (
    DecodingError,
    MessageUnroutable,
    OutcomeUnknown,
    UnsupportedCapability,
)

logger: logging.Logger = logging.getLogger(__name__)


class RedisMessageBroker(ServiceBroker[CommandConnection]):
    """
    Sends each message to the channel `<channel_prefix>:<message_type>:<message_name>` of Redis Pub/Sub.

    If the type or the name contains a colon, all three parts are percent-encoded, as in a URL, and joined by `/`.

    At most once: Redis passes a message to the subscribers of that moment and keeps nothing. A confirmed message was
    passed on by Redis; it may still not have reached a subscriber.

    *client* is a `redis.asyncio.Redis`, or a URL: `redis://…`, `rediss://…` or `unix://…`. The broker uses one
    connection of a client's pool, and `aclose` returns this connection; the broker never closes the client. From a URL
    the broker makes a client of its own, which `aclose` closes.

    *channel_prefix* is `python_diator_channel` by default. *timeout* bounds every call, in seconds. *max_message_bytes*
    bounds the encoded message. *max_in_flight* bounds the messages that wait for Redis's reply; further sends wait for
    room. With *require_receiver* a message that nobody received raises `MessageUnroutable`; Redis counts the receivers
    on the node to which the message was sent.

    A subscription takes a connection of its own from the pool, prefetches at most *extra_prefetch* messages, and
    reconnects as *reconnect* specifies. With *older_senders* it also receives the messages of diator 0.1, whose
    channels end in the id of the message instead of its name: the subscription then looks for the name in every message
    of that type.

    Every subscription receives every message that is sent while it is connected. Redis closes the connection of a
    subscriber that is too slow (`client-output-buffer-limit pubsub`). As after any other lost connection, *on_gap* is
    called when the subscription has reconnected.

    Raises:
        ConfigurationError: *client* is neither an asynchronous client nor a URL, or an option is out of its range.
    """

    messaging_system = "redis"

    def __init__(
        self,
        client: Client | str,
        channel_prefix: str | None = None,
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        require_receiver: bool = False,
        older_senders: bool = False,
        extra_prefetch: int = 1_000,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        check_counts(1, extra_prefetch=extra_prefetch, max_in_flight=max_in_flight, max_message_bytes=max_message_bytes)
        check_times(timeout=timeout)
        self._client, owned = client_of(client, timeout=timeout)
        self._prefix = "python_diator_channel" if channel_prefix is None else channel_prefix
        check_texts(channel_prefix=self._prefix)
        encoded(self._prefix)
        self._max_message_bytes = max_message_bytes
        self._require_receiver = require_receiver
        self._older_senders = older_senders
        self._extra_prefetch = extra_prefetch
        service = CommandConnection(
            self._client,
            owns_client=owned,
            timeout=timeout,
            max_in_flight=max_in_flight,
            reconnect=ReconnectPolicy(connect_timeout=timeout) if reconnect is None else reconnect,
        )
        super().__init__(service)

    _alternative = "Redis Streams"

    @classmethod
    @options_of(__init__)
    def from_url(cls, url: str, /, *args: Any, **options: Any) -> Self:
        """Return a broker that makes its own client from *url*, and closes it. The options are those of the class."""
        return cls(url, *args, **options)

    async def send_message(self, message: Message) -> None:  # older programs pass it by name
        """See `MessageBroker.send_message`. MessageUnroutable only with *require_receiver*."""
        await self.publish(message)

    async def publish(self, message: Message, /) -> int:
        """Send *message* as `send_message` does, and return the number of its receivers on Redis's node."""
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        channel = self._channel((message.message_type, message.message_name))
        receivers: int = await self._service.execute(b"PUBLISH", channel, body, message_id=message.message_id)
        if self._service.is_replica():
            raise OutcomeUnknown(
                "Redis has become a replica, which passes a message to its own clients only; the broker connects anew",
                message_id=message.message_id,
            )
        if self._require_receiver and not receivers:
            raise MessageUnroutable("nobody is subscribed to its channel", message_id=message.message_id)
        return receivers

    @property
    def capabilities(self) -> Capabilities:
        """The promises of Redis Pub/Sub."""
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

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        topics = settings.topics
        patterns = {
            pattern: (begin, message_type)
            for message_type in {topic.message_type for topic in topics if self._older_senders}
            for pattern, begin in [channels_of(self._prefix, message_type)]
        }
        channels = {self._channel(topic): topic for topic in topics}
        return Subscription(settings, self._client, channels, patterns, self._extra_prefetch)

    def _channel(self, topic: tuple[str, str]) -> bytes:
        return channel(self._prefix, topic)


class Subscription(ResilientSubscription):
    """The channels and patterns that are read, on one connection after another."""

    def __init__(
        self,
        settings: SubscriptionSettings,
        client: Client,
        channels: Mapping[bytes, Topic],
        patterns: Mapping[bytes, tuple[bytes, str]],
        extra_prefetch: int,
    ) -> None:
        super().__init__(settings, lossy=True, buffer_size=settings.prefetch + extra_prefetch)
        require_pool(client)
        self._client = client
        self._channels = channels
        self._patterns = patterns

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Source, None]:
        """Take a connection of the client's pool, and wait until Redis has confirmed every channel."""
        connection = await subscribing_connection(self._client, within=self.settings.reconnect.connect_timeout)
        try:
            source = Connection(connection, self._channels, self._patterns, self.lines)
            try:
                if self._patterns:
                    await send_command(connection, "PSUBSCRIBE", *self._patterns)
                await send_command(connection, "SUBSCRIBE", *self._channels)
                while not source.is_ready:
                    await source.receive(0)
            except CLIENT_ERRORS as error:
                raise send_error(error, None, written=False) from error
            yield source
        finally:
            await close_connection(self._client, connection)


class Connection:
    """
    One connection that is subscribed. It is also the settler of its deliveries: Pub/Sub has nothing to settle.

    It does not use redis-py's `PubSub`, which reconnects by itself and does not report the missed messages.
    """

    def __init__(
        self,
        connection: RedisConnection,
        channels: Mapping[bytes, Topic],
        patterns: Mapping[bytes, tuple[bytes, str]],
        lines: RepeatedLines,
    ) -> None:
        self._connection = connection
        self._topics = channels
        self._patterns = patterns
        self._lines = lines
        self._wanted = {*channels, *patterns}
        self._confirmed: set[bytes] = set()

    @property
    def is_ready(self) -> bool:
        return self._confirmed >= self._wanted

    async def receive(self, most: int, /) -> Sequence[Delivery]:  # Redis sends messages one by one
        while True:
            reply = await read_reply(self._connection, push=True)
            kind, *rest = reply if isinstance(reply, list) else [reply]
            if kind == b"message":
                channel, body = rest
                return [Delivery(topic=self._topics[channel], body=body, headers={}, attempt=1, settler=self)]
            if kind != b"pmessage":
                break
            pattern, channel, body = rest
            # What ends in an id has no further colon: another one belongs to another prefix. And what is subscribed to
            # by its channel is delivered from there.
            begin, message_type = self._patterns[pattern]
            foreign = b":" in channel[len(begin) :] or channel in self._topics
            topic = None if foreign else self._topic_of(body, message_type)
            if topic is not None:
                return [Delivery(topic=topic, body=body, headers={}, attempt=1, settler=self)]
        if kind in {b"subscribe", b"psubscribe"}:
            self._confirmed.add(rest[0])
        return []

    def _topic_of(self, body: bytes, message_type: str) -> Topic | None:
        """Return the topic of an older sender's message; None if the subscription does not read it on this channel."""
        try:
            message = decode(body, max_bytes=len(body))
        except DecodingError as error:
            what = "a message on the channel of an older sender cannot be decoded"
            kind, problem = name_of(type(error)), printable(str(error))
            self._lines.log(logging.WARNING, what, "%s: %s", what, problem, fields=lambda: {"error_type": kind})
            return None
        topic = Topic(message.message_type, message.message_name)
        return topic if topic.message_type == message_type and topic in self._topics.values() else None

    async def probe(self) -> None:
        await send_command(self._connection, "PING")  # `receive` reads the reply

    async def ack(self, delivery: Delivery, /) -> None:
        pass  # there is nothing to acknowledge

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        raise _unsupported("retry()")

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        raise _unsupported("dead_letter()")


def _unsupported(what: str) -> UnsupportedCapability:
    return UnsupportedCapability("RedisMessageBroker", ["redelivery"], why=what, remedy="use Redis Streams")
