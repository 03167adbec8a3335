"""The broker of Kafka: what a program constructs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from diator.brokers.audit import Finding
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.kafka._audit import inspect
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._errors import CLIENT_ERRORS, send_error
from diator.brokers.kafka._group import Connections
from diator.brokers.kafka._names import Names
from diator.brokers.kafka._producer import Producer
from diator.brokers.kafka._subscription import ReadOptions, Subscription
from diator.brokers.kafka._topics import MAX_HEADERS_BYTES, MAX_KAFKA_BYTES, TopicPolicy
from diator.brokers.message import Message
from diator.brokers.supervisor import CallbackSubscription, ReconnectPolicy
from diator.exceptions import BrokerClosed, ConfigurationError, EncodingError, MessageRejected


class KafkaMessageBroker(ServiceBroker[Producer]):
    """
    Sends each message to the Kafka topic `<prefix>.<message_type>.<message_name>`, and reads as a member of a group.

    A message is confirmed when every replica that is in sync has it. Its key decides on its partition, and messages of
    one key keep their order; those without one have none. A group begins at the oldest message, and collects while no
    member is there. A subscription without a group gets every message from now on; nothing of it is committed, and
    losing the connection loses nothing, for it knows where it was.

    At least once: what is committed of a partition is its lowest message that is not finished, and beside it what is
    finished above. A member that dies is noticed after *session* seconds. Then, and whenever a member comes or goes,
    all of them let the work that they have begun end, within *drain* seconds, and the partitions are shared out anew.
    No more than *window* messages of a partition are handled ahead of its oldest unfinished one.

    What is given back waits in a topic of its group, `….<group>-retry`, and others overtake it. With *retry_in_place*
    it waits in its place, and what has the same key waits behind it.

    Args:
        bootstrap_servers: `host:port`, or several of them with commas between.
        prefix: What the names of all topics begin with.
        timeout: Seconds within which every call ends.
        max_message_bytes: How large an encoded message may be. The default leaves room for headers in what Kafka takes.
        max_in_flight: How many messages wait for their confirmation; further ones wait for room.
        ssl_context: For TLS. None is no TLS.
        sasl_mechanism: `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`, with *username* and *password*.
        create_topics: Whether missing topics are created. If not, an error says which command does.
        partitions: How many a topic gets that is created: as many members of a group can share it.
        replication_factor: How many copies; None is as many as there are brokers, at most three. With three, two of
            them have to have a message before it is confirmed (`min.insync.replicas`).
        heartbeat_interval: How often, in seconds, a member says that it lives, and hears that others have come or gone.
        extra_prefetch: How many messages are received before they are asked for.
        metadata_max_age: After how many seconds new topics and partitions are looked for.
        patience: How long a subscription waits for what.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_KAFKA_BYTES,
        max_in_flight: int = 1024,
        ssl_context: ssl.SSLContext | None = None,
        sasl_mechanism: str | None = None,
        username: str | None = None,
        password: str | None = None,
        create_topics: bool = True,
        partitions: int = 4,
        replication_factor: int | None = None,
        session_timeout: float = 30.0,
        heartbeat_interval: float = 3.0,
        drain_timeout: float = 20.0,
        max_unacked_per_partition: int = 1_000,
        extra_prefetch: int = 500,
        retry_in_place: bool = False,
        metadata_max_age: float = 60.0,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        if (
            min(timeout, heartbeat_interval, metadata_max_age) <= 0
            or drain_timeout < 0
            or session_timeout < 2 * heartbeat_interval
        ):
            raise ConfigurationError(
                "timeout, heartbeat and metadata_max_age are above 0, and session is at least two heartbeats"
            )
        if min(max_message_bytes, max_in_flight, partitions, max_unacked_per_partition) < 1 or extra_prefetch < 0:
            raise ConfigurationError(
                "max_message_bytes, max_in_flight, partitions and max_unacked_per_partition must be at least 1, and "
                "extra_prefetch at least 0"
            )
        if replication_factor is not None and replication_factor < 1:
            raise ConfigurationError(
                "replication_factor must be at least 1; None means one replica for each broker, at most 3"
            )
        self._cluster = Cluster(
            bootstrap_servers=tuple(each.strip() for each in str(bootstrap_servers).split(",")),
            timeout=timeout,
            ssl_context=ssl_context,
            sasl_mechanism=sasl_mechanism,
            username=username,
            password=password,
        )
        self._names = Names(prefix)
        self._policy = TopicPolicy(
            create=create_topics,
            partitions=partitions,
            replication_factor=replication_factor,
            max_message_bytes=max_message_bytes,
        )
        self._reading = ReadOptions(
            session_timeout=session_timeout,
            heartbeat_interval=heartbeat_interval,
            drain_timeout=drain_timeout,
            max_unacked_per_partition=max_unacked_per_partition,
            in_place=retry_in_place,
            metadata_max_age=metadata_max_age,
            max_message_bytes=max_message_bytes,
            first_part=(reconnect or ReconnectPolicy(connect_timeout=timeout)).connect_timeout / 3,
        )
        self._max_message_bytes = max_message_bytes
        self._extra_prefetch = extra_prefetch
        self._reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout)
        super().__init__(Producer(self._cluster, self._policy, max_in_flight=max_in_flight))

    @property
    def capabilities(self) -> Capabilities:
        """What Kafka promises."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="cumulative",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=self._reading.session_timeout
            + self._reading.heartbeat_interval
            + self._reading.drain_timeout,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="retries",
            ordering="key",
            ordered_retry=self._reading.in_place,
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            replay="earliest",
            durability="crash",
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
        headers: list[tuple[str, bytes]] = []
        key = None
        try:
            if message.key is not None:
                key = message.key.encode()
            if key is not None or message.headers:
                headers = _encoded(headers_with_key(message), key or b"")
            topic = self._names.topic(Topic(message.message_type, message.message_name))
        except UnicodeEncodeError as error:
            raise EncodingError(f"{message.message_name}.headers", str(error)) from error
        except MessageRejected as error:
            raise MessageRejected(str(error), message_id=message.message_id) from None
        await self._service.send(topic, body, key=key, headers=headers, message_id=message.message_id)

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
        """See `ReadableBroker.subscribe`."""
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        subscription = Subscription(topics, group, reading=self._reading, names=self._names, producer=self._service)
        connections = Connections(subscription, self._cluster, self._policy)
        supervised = subscription.supervised = CallbackSubscription(
            connections.connected,
            topics,
            group,
            lossy=False,
            prefetch=prefetch,
            buffer_size=prefetch + self._extra_prefetch,
            reconnect=self._reconnect,
            on_gap=on_gap,
            registry=self._service.subscriptions,
            unsettled=lambda: subscription.unsettled,
            leave=connections.leave,
        )
        async with supervised as deliveries:
            yield deliveries

    async def audit(self) -> Sequence[Finding]:
        """See `Auditable.audit`: copies, retention and the like, of the cluster and of all topics of this prefix."""
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        try:
            async with asyncio.timeout(self._cluster.timeout):
                return await inspect(self._cluster, self._policy, self._names.prefix)
        except CLIENT_ERRORS as error:
            raise send_error(error, None, handed_over=False) from error


def _encoded(headers: dict[str, str], key: bytes) -> list[tuple[str, bytes]]:
    """Refuse here what would spoil a whole batch: what is no Unicode, and what is larger than Kafka takes."""
    encoded = [(name, value.encode()) for name, value in headers.items()]
    size = len(key) + sum(len(name.encode()) + len(value) for name, value in encoded)
    if size > MAX_HEADERS_BYTES:
        raise MessageRejected(f"its key and headers have {size:,} bytes, and at most {MAX_HEADERS_BYTES:,} find room")
    return encoded
