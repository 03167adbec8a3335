"""The broker of RabbitMQ: what a program constructs."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

from diator._options import check_counts, check_texts, check_times, word
from diator.brokers.audit import Finding
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.capabilities import Unroutable as Level
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.rabbitmq._audit import inspect
from diator.brokers.rabbitmq._client import URL, Address, AioPikaConnection
from diator.brokers.rabbitmq._content import CONTENT_TYPE, JSON, RESERVED, ROUTING
from diator.brokers.rabbitmq._frames import Publication, header_of
from diator.brokers.rabbitmq._names import UNUSUAL, retained_queue_name, routing_key
from diator.brokers.rabbitmq._publisher import Publisher
from diator.brokers.rabbitmq._retained import RetainingPublisher
from diator.brokers.rabbitmq._subscription import QueueType, ReadOptions, Subscription
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import BrokerClosed, ConfigurationError, EncodingError, MessageRejected

Unroutable: TypeAlias = Literal["retain", "raise", "drop"]

_MAX_PREFIX = 100
_CAPABILITY: dict[Unroutable, Level] = {"retain": "retained", "raise": "reported", "drop": "dropped"}


class RabbitMQMessageBroker(ServiceBroker[Publisher]):
    """
    Publishes to a topic exchange of RabbitMQ, and reads queues.

    At least once: `send_message` returns when RabbitMQ has stored the message in every queue that is bound for it. A
    message belongs to its group until one of the group's consumers has acknowledged it. A group starts when it first
    subscribes, and collects messages from then on. A subscription without a group has a queue of its own. The queue is
    deleted when the subscription ends, or two minutes after its connection was lost.

    *unroutable* is what happens to a message while nobody has subscribed to its topic. With `retain`, RabbitMQ retains
    it, and the first group that subscribes receives it, before all later ones. At most *max_retained* messages of a
    topic are retained, and at most 1 GiB; one more raises `MessageRejected`. With `raise`, the send raises
    `MessageUnroutable`. With `drop`, RabbitMQ drops the message. All programs with one prefix choose the same.

    *url* is a URL, `amqp://user:password@host:port/vhost` or `amqps://…` for TLS, as a str or a `yarl.URL`. Or it is a
    connection of aio-pika: the broker opens connections of its own, with the URL, TLS context and client properties of
    that connection, and never closes it. *ssl_context* replaces the system's TLS context for a URL with `amqps://`.

    *queue_type* `classic` is for services without quorum queues. Classic queues do not count deliveries, so a poison
    message is not recognised. *timeout* is in seconds, for each send and for connecting. At most *max_in_flight*
    messages wait for their confirms. *extra_prefetch* is the number of messages that are prefetched beyond those that
    are being handled; with 0, a poison message does not charge an attempt to other messages.

    Raises:
        ConfigurationError: *url* is neither a URL nor a connection of aio-pika, or an option is out of its range.
    """

    messaging_system = "rabbitmq"

    def __init__(
        self,
        url: str | URL | AioPikaConnection,
        prefix: str = "diator",
        *,
        ssl_context: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        unroutable: Unroutable = "retain",
        max_retained: int = 100_000,
        queue_type: QueueType = "quorum",
        extra_prefetch: int = 100,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        check_counts(0, extra_prefetch=extra_prefetch)
        check_counts(1, max_in_flight=max_in_flight, max_retained=max_retained, max_message_bytes=max_message_bytes)
        check_times(timeout=timeout)
        check_texts(prefix=prefix)
        if unroutable not in [*_CAPABILITY]:
            raise ConfigurationError(f"unroutable must be retain, raise or drop, not {word(unroutable)}")
        if queue_type not in ("quorum", "classic"):
            raise ConfigurationError(f"queue_type must be quorum or classic, not {word(queue_type)}")
        if not 0 < len(prefix) <= _MAX_PREFIX or prefix.startswith("amq.") or UNUSUAL.search(prefix):
            raise ConfigurationError(
                f"the prefix names an exchange: it has 1 to {_MAX_PREFIX} letters, digits and _./@,+-, and does not "
                "start with 'amq.'"
            )
        self._address = Address(url, ssl_context)
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._unroutable: Unroutable = unroutable
        reconnect = ReconnectPolicy(connect_timeout=timeout) if reconnect is None else reconnect
        self._options = ReadOptions(prefix=prefix, queue_type=queue_type, extra_prefetch=extra_prefetch)
        publisher: Callable[..., Publisher] = Publisher
        if unroutable == "retain":
            publisher = partial(RetainingPublisher, queue_type=queue_type, max_retained=max_retained)
        super().__init__(
            publisher(self._address, prefix, timeout=timeout, max_in_flight=max_in_flight, reconnect=reconnect)
        )

    @property
    def capabilities(self) -> Capabilities:
        """The promises of RabbitMQ, on one node, or with quorum queues on several nodes."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=2.0 * self._address.heartbeat,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="deliveries" if self._options.queue_type == "quorum" else "retries",
            ordering="destination",
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            durability="crash",
            unroutable=_CAPABILITY[self._unroutable],
            headers="native",
            backpressure="prefetch",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    def check_message(self, message: Message, /) -> None:
        """See `CheckingMessageBroker.check_message`. RabbitMQ limits the lengths of names."""
        self._publication(message)
        if self._unroutable == "retain":
            try:
                retained_queue_name(self._options.prefix, Topic(message.message_type, message.message_name))
            except ValueError as error:
                raise _too_long(message, error) from error

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        await self._service.send(self._publication(message), (message.message_type, message.message_name))

    def _publication(self, message: Message) -> Publication:
        body = encode(message, max_bytes=self._max_message_bytes)
        headers = headers_with_key(message, attribute_prefix="ce-")
        content_type = JSON if message.codec is None else headers.pop(CONTENT_TYPE, JSON)
        if headers:
            _check_headers(message, headers)
        try:
            key = routing_key(message.message_type, message.message_name)
        except ValueError as error:
            raise _too_long(message, error) from error
        known_as = str(message.message_id)
        header = header_of(message.message_name, known_as, headers, len(body), content_type)
        mandatory = self._unroutable != "drop"
        return Publication(self._options.prefix, key, header, body, known_as, message.message_id, mandatory)

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        return Subscription(settings, self._service, self._address, self._options)

    async def audit(self) -> Sequence[Finding]:
        """
        See `Auditable.audit`. It compares the exchange and the queues of open subscriptions with their declarations.

        AMQP shows neither policies nor the server's configuration. A policy with `max-length`, `message-ttl` or
        `expires` can drop messages (`rabbitmqctl list_policies`), and a handler that takes longer than the server's
        `consumer_timeout` loses its delivery.
        """
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        subscriptions = [each for each in self._service.subscriptions if isinstance(each, Subscription)]
        retains = self._unroutable == "retain"
        findings = await inspect(
            self._address, self._options.prefix, subscriptions, retains=retains, timeout=self._timeout
        )
        return [*self._service.blocked(), *findings]


def _too_long(message: Message, error: ValueError) -> MessageRejected:
    text = f"{message.message_name:.80}: {error}; give it a shorter name"
    return MessageRejected(text, message_id=message.message_id)


def _check_headers(message: Message, headers: Mapping[str, str]) -> None:
    for name in headers:
        if name in ROUTING or name.startswith(RESERVED):
            raise EncodingError(f"{message.message_name}.headers", f"{name!r} is reserved for RabbitMQ or diator")
