"""The broker of Kafka: what a program constructs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from functools import partial

from diator._options import check_counts, check_numbers, check_texts, check_times, check_type
from diator.brokers.audit import Finding
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.kafka._audit import inspect
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._consumer import ReadOptions
from diator.brokers.kafka._errors import CLIENT_ERRORS, send_error
from diator.brokers.kafka._group import connected
from diator.brokers.kafka._names import Names
from diator.brokers.kafka._producer import Producer
from diator.brokers.kafka._subscription import Subscription
from diator.brokers.kafka._topics import MAX_HEADERS_BYTES, MAX_KAFKA_BYTES, TopicPolicy
from diator.brokers.message import Message
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import BrokerClosed, ConfigurationError, EncodingError, MessageRejected

# What Kafka's protocol can hold, less some room.
_MAX_SECONDS = 1_000_000
_MAX_BYTES = 1024**3
_MAX_PARTITIONS = 1_000_000
_MAX_REPLICAS = 1_000


class KafkaMessageBroker(ServiceBroker[Producer]):
    """
    A message broker on Apache Kafka.

    It sends each message to the Kafka topic `<prefix>.<message_type>.<message_name>`. A message is confirmed when all
    in-sync replicas have stored it. Its key selects the partition, and messages of one key keep their order. Messages
    without a key have no order.

    A subscription with a group is a consumer of a Kafka consumer group. A new group begins at the oldest message, and
    messages wait for it while it has no consumer. A subscription without a group receives every message from its entry
    on. It commits nothing, but remembers its position: a lost connection loses no message.

    Delivery is at least once. The group commits the offset of the oldest unfinished message of each partition, and, in
    the metadata, the later messages that are finished. Kafka notices a crashed consumer after *session_timeout*.
    Whenever a consumer joins, leaves or crashes, the group rebalances: each consumer finishes its deliveries in flight,
    within *drain_timeout*, and Kafka assigns the partitions anew.

    A requeued message waits in a topic of its group, `….<group>-retry`, and later messages are handled meanwhile. With
    *retry_in_place* the message waits in its partition, and later messages with its key wait behind it.

    Args:
        bootstrap_servers: `host:port`, or several, separated by commas.
        prefix: The first part of all topic names and group names.
        timeout: Seconds within which every call ends. The default outlasts the failover of a Kafka broker (up to 10 s).
        max_message_bytes: The size limit of an encoded message. With headers, the default fits Kafka's own default.
        max_in_flight: How many messages may be unconfirmed. Further sends wait.
        ssl_context: For TLS. None connects without TLS.
        sasl_mechanism: `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`, with *username* and *password*.
        username: For *sasl_mechanism*.
        password: For *sasl_mechanism*.
        create_topics: Whether to create missing topics. If not, an error shows the command that creates them.
        partitions: How many partitions a created topic has. At most as many consumers of a group can share the topic.
        replication_factor: How many replicas a created topic has. None is one for each Kafka broker, at most three.
            With three, a message is confirmed only if at least two have stored it (`min.insync.replicas`).
        session_timeout: Seconds without a heartbeat after which a consumer counts as dead.
        heartbeat_interval: Seconds between two heartbeats of a consumer. A heartbeat also detects a rebalance.
        drain_timeout: How many seconds a rebalance waits for deliveries in flight.
        max_unacked_per_partition: How many messages a partition is read beyond its oldest unfinished message.
        extra_prefetch: How many deliveries a subscription prefetches beyond those that are being handled.
        retry_in_place: Whether a requeued message keeps its place among the messages with its key.
        metadata_max_age: Seconds between two searches for new topics and partitions.
        reconnect: The time limits and delays of reconnecting. By default, a connection has *timeout* to connect.

    Raises:
        ConfigurationError: An option is out of its range, or options contradict each other.
    """

    messaging_system = "kafka"

    def __init__(
        self,
        bootstrap_servers: str,
        prefix: str = "diator",
        *,
        timeout: float = 30.0,
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
        times = {
            "timeout": timeout,
            "session_timeout": session_timeout,
            "heartbeat_interval": heartbeat_interval,
            "metadata_max_age": metadata_max_age,
        }
        check_times(**times)
        check_numbers(0, drain_timeout=drain_timeout)
        if max(drain_timeout, *times.values()) > _MAX_SECONDS:
            raise ConfigurationError(f"drain_timeout, {', '.join(times)} must be at most {_MAX_SECONDS:,} s")
        if session_timeout < 2 * heartbeat_interval:
            raise ConfigurationError("session_timeout must be at least twice heartbeat_interval")
        check_counts(
            1,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            partitions=partitions,
            max_unacked_per_partition=max_unacked_per_partition,
            replication_factor=1 if replication_factor is None else replication_factor,
        )
        check_counts(0, extra_prefetch=extra_prefetch)
        check_texts(prefix=prefix)
        if max_message_bytes > _MAX_BYTES or partitions > _MAX_PARTITIONS:
            raise ConfigurationError(
                f"max_message_bytes must be at most {_MAX_BYTES:,}, and partitions at most {_MAX_PARTITIONS:,}"
            )
        if replication_factor is not None and replication_factor > _MAX_REPLICAS:
            raise ConfigurationError(
                f"replication_factor must be from 1 to {_MAX_REPLICAS:,}; None means one for each broker, at most 3"
            )
        check_type("reconnect", reconnect, ReconnectPolicy)
        reconnect = reconnect or ReconnectPolicy(connect_timeout=timeout)
        self._cluster = Cluster(
            bootstrap_servers=tuple(each.strip() for each in str(bootstrap_servers).split(",")),
            timeout=timeout,
            reconnect=reconnect,
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
        self._options = ReadOptions(
            session_timeout=session_timeout,
            heartbeat_interval=heartbeat_interval,
            drain_timeout=drain_timeout,
            max_unacked_per_partition=max_unacked_per_partition,
            extra_prefetch=extra_prefetch,
            in_place=retry_in_place,
            metadata_max_age=metadata_max_age,
            max_message_bytes=max_message_bytes,
            assignment_timeout=reconnect.connect_timeout / 3,
        )
        self._max_message_bytes = max_message_bytes
        super().__init__(Producer(self._cluster, self._policy, max_in_flight=max_in_flight))

    @property
    def capabilities(self) -> Capabilities:
        """The promises of this transport."""
        options = self._options
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            settlement="cumulative",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=options.session_timeout + options.heartbeat_interval + options.drain_timeout,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="retries",
            ordering="key",
            ordered_retry=options.in_place,
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

    def check_message(self, message: Message, /) -> None:
        """See `CheckingMessageBroker.check_message`. Kafka limits the lengths of names, and of keys with headers."""
        self._record(message)

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        topic, body, key, headers = self._record(message)
        await self._service.send(topic, body, key=key, headers=headers, message_id=message.message_id)

    def _record(self, message: Message) -> tuple[str, bytes, bytes | None, list[tuple[str, bytes | None]] | None]:
        body = encode(message, max_bytes=self._max_message_bytes)
        headers: list[tuple[str, bytes | None]] | None = None
        key = None
        try:
            if message.key is not None:
                key = message.key.encode()
            if key is not None or message.headers or message.codec is not None:
                headers = _encoded(headers_with_key(message), key or b"")
            topic = self._names.topic(Topic(message.message_type, message.message_name))
        except UnicodeEncodeError as error:
            raise EncodingError(f"{message.message_name}.headers", str(error)) from error
        except MessageRejected as error:
            raise MessageRejected(str(error), message_id=message.message_id) from None
        return topic, body, key, headers

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        connect = partial(connected, cluster=self._cluster, policy=self._policy)
        return Subscription(settings, self._options, self._names, self._service, connect)

    async def audit(self) -> Sequence[Finding]:
        """See `Auditable.audit`. It reads the settings of the cluster and of every topic of this prefix."""
        if self._service.is_closed:
            raise BrokerClosed("this broker is closed")
        try:
            async with asyncio.timeout(self._cluster.timeout):
                return await inspect(self._cluster, self._policy, self._names.prefix)
        except CLIENT_ERRORS as error:
            raise send_error(error, None, handed_over=False) from error


def _encoded(headers: dict[str, str], key: bytes) -> list[tuple[str, bytes | None]]:
    """Refuse headers here that Kafka would refuse with their whole batch: invalid Unicode, and too many bytes."""
    encoded = [(name, value.encode()) for name, value in headers.items()]
    size = len(key) + sum(len(name.encode()) + len(value) for name, value in encoded)
    if size > MAX_HEADERS_BYTES:
        raise MessageRejected(
            f"its key and headers have {size:,} bytes; at most {MAX_HEADERS_BYTES:,} are possible: send less in them"
        )
    return [*encoded]
