"""The broker of RabbitMQ: what a program constructs."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from diator.brokers.audit import Finding
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.rabbitmq._audit import inspect
from diator.brokers.rabbitmq._channel import Address, Lost
from diator.brokers.rabbitmq._frames import Publication, header_of
from diator.brokers.rabbitmq._names import UNUSUAL, routing_key
from diator.brokers.rabbitmq._publisher import Publisher
from diator.brokers.rabbitmq._subscription import OF_THE_SERVICE, Connection, QueueType, Subscription
from diator.brokers.supervisor import CallbackSubscription, ReconnectPolicy, Source
from diator.exceptions import BrokerClosed, ConfigurationError, EncodingError

_ROUTING = frozenset({"CC", "BCC"})
"""Headers that RabbitMQ routes by."""


class RabbitMQMessageBroker(ServiceBroker[Publisher]):
    """
    Publishes to a topic exchange of RabbitMQ, and reads queues.

    At least once: a send has returned when RabbitMQ has stored the message in every queue that wants it, and a message
    is its group's until a member has acknowledged it. A group begins when it first subscribes, and collects from then
    on. Without a group, a subscription has a queue of its own, that is gone two minutes after its subscriber.

    A message that no queue wants raises `MessageUnroutable`, unless *mandatory* is switched off; then it is dropped.

    *url* is `amqp://user:password@host:port/vhost`, or `amqps://…` for TLS, with *ssl_context* if yours is not the
    system's. *queue_type* `classic` is for services without quorum queues; they do not count deliveries, so that a
    message which kills its consumers is not found out. *timeout* is in seconds, for each send and for connecting; at
    most *max_in_flight* messages wait for their confirms. *extra_prefetch* is the number of messages that are
    prefetched beyond those that are being handled; where a poison message may kill the process, 0
    protects its neighbours.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "diator",
        *,
        ssl_context: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        mandatory: bool = True,
        queue_type: QueueType = "quorum",
        extra_prefetch: int = 100,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        if extra_prefetch < 0 or max_in_flight < 1 or timeout <= 0:
            raise ConfigurationError("extra_prefetch is at least 0, max_in_flight at least 1, and timeout above 0")
        if queue_type not in {"quorum", "classic"}:
            raise ConfigurationError(f"queue_type is quorum or classic, not {queue_type!r:.80}")
        if not prefix or prefix.startswith("amq.") or UNUSUAL.search(prefix):
            raise ConfigurationError(
                "the prefix names an exchange: letters, digits and _./@,+- and not 'amq.' at its beginning"
            )
        self._address = Address(url, ssl_context)
        self._prefix = prefix
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._mandatory = mandatory
        self._queue_type: QueueType = queue_type
        self._extra_prefetch = extra_prefetch
        self._reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout)
        super().__init__(Publisher(self._address, prefix, timeout=timeout, max_in_flight=max_in_flight))
        self._subscriptions: set[Subscription] = set()

    @property
    def capabilities(self) -> Capabilities:
        """What RabbitMQ promises, on one node or with quorum queues on several."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=2.0 * self._address.heartbeat,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact" if self._queue_type == "quorum" else "retries",
            ordering="destination",
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            durability="crash",
            unroutable="reported" if self._mandatory else "dropped",
            headers="native",
            backpressure="prefetch",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        body = encode(message, max_bytes=self._max_message_bytes)
        headers = headers_with_key(message)
        if headers:
            _check_headers(message, headers)
        message_id = str(message.message_id)
        header = header_of(message.message_name, message_id, headers, len(body))
        key = routing_key(message.message_type, message.message_name)
        await self._service.publish(Publication(self._prefix, key, header, body, message_id, self._mandatory))

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
        """
        See `ReadableBroker.subscribe`. Each subscription has a connection of its own.

        Raises:
            ConfigurationError: A queue is there with other settings.
            AccessRefused: The user may not declare or read it.
        """
        subscription = Subscription(self._service, self._prefix, topics, group, self._queue_type)
        subscription.supervised = CallbackSubscription(
            lambda: self._reading(subscription, prefetch),
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
        self._subscriptions.add(subscription)
        try:
            async with subscription.supervised as deliveries:
                yield deliveries
        finally:
            self._subscriptions.discard(subscription)

    @asynccontextmanager
    async def _reading(self, subscription: Subscription, prefetch: int) -> AsyncGenerator[Source, None]:
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        for tries_left in (2, 1, 0):
            reading = Connection(subscription, min(prefetch + self._extra_prefetch // len(subscription.queues), 65_535))
            try:
                await reading.open(*await self._address.dial("consuming"))
                try:
                    await reading.begin()
                except Lost:
                    # Of several that create a quorum queue at once, RabbitMQ can fail one with an INTERNAL_ERROR.
                    if tries_left:
                        continue
                    raise
                yield reading
                return
            finally:
                subscription.release(reading)

    async def audit(self) -> Sequence[Finding]:
        """
        See `Auditable.audit`. It compares what this broker and its subscriptions use with what is declared.

        AMQP shows neither policies nor the server's configuration: a policy with `max-length`, `message-ttl` or
        `expires` can drop messages (`rabbitmqctl list_policies`), and a handler that takes longer than the server's
        `consumer_timeout` loses its delivery.
        """
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        findings = await inspect(self._address, self._prefix, self._subscriptions, timeout=self._timeout)
        return [*self._service.blocked(), *findings]


def _check_headers(message: Message, headers: Mapping[str, str]) -> None:
    for name in headers:
        if name in _ROUTING or name.startswith(OF_THE_SERVICE):
            raise EncodingError(f"{message.message_name}.headers", f"{name!r} means something to RabbitMQ or to diator")
