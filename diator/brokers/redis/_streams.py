"""The broker of Redis Streams: what a program constructs."""

from __future__ import annotations

from typing import Any, Self

from diator._options import check_counts, check_numbers, check_texts, check_times
from diator.brokers.audit import Finding
from diator.brokers.capabilities import Capabilities, Durability, require
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.connecting import ServiceBroker
from diator.brokers.message import Message
from diator.brokers.redis._audit import durability as durability_of
from diator.brokers.redis._audit import findings
from diator.brokers.redis._client import Client, client_of, options_of, sends_by_itself
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._names import encoded, stream
from diator.brokers.redis._subscription import BODY, SCAN_EVERY, ReadOptions, Subscription
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import ConfigurationError


class RedisStreamMessageBroker(ServiceBroker[CommandConnection]):
    """
    Appends each message to a Redis stream, and reads streams as a consumer of a group.

    At least once: a message belongs to the group until one of its consumers has acknowledged it. If a consumer dies,
    others take over its messages when its *lease* (seconds) is over; a consumer that lives renews its lease, however
    long a handler takes. A group starts at the oldest message, and collects messages while it has no consumer.

    The configuration of Redis decides whether confirmed messages survive: with `appendonly yes` they survive a crash of
    the Redis process. *durability* states this configuration, and becomes one of the capabilities. The broker checks
    the server before it sends or receives. If the server keeps less, the broker raises `UnsupportedCapability`.

    No level covers a failover: Redis confirms a message before a replica has it. With *replicas*, a send returns when
    so many replicas have the message, and raises `OutcomeUnknown` if they do not confirm it within 0.4 *timeout*. Then
    a failover keeps confirmed messages, as long as a replica that has them is promoted.

    Without *retention* (seconds), the broker removes nothing from a stream. With *retention*, it removes an entry that
    is older and that every group has acknowledged.

    *client* and the other options are those of `RedisMessageBroker`; *extra_prefetch* is the number of messages that
    are prefetched, under this consumer's lease, beyond those that are being handled.

    Raises:
        ConfigurationError: *client* is neither an asynchronous client nor a URL, or an option is out of its range.
    """

    messaging_system = "redis"

    def __init__(
        self,
        client: Client | str,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        durability: Durability = "none",
        replicas: int = 0,
        lease: float = 60.0,
        retention: float | None = None,
        extra_prefetch: int = 100,
        reconnect: ReconnectPolicy | None = None,
    ) -> None:
        check_counts(0, extra_prefetch=extra_prefetch, replicas=replicas)
        check_counts(1, max_in_flight=max_in_flight, max_message_bytes=max_message_bytes)
        check_times(timeout=timeout, lease=lease)
        check_numbers(0, retention=0 if retention is None else retention)
        check_texts(prefix=prefix)
        self._client, owned = client_of(client, timeout=timeout)
        if replicas and sends_by_itself(self._client):
            raise ConfigurationError(
                f"replicas needs the client's own connections, and a {type(client).__name__} sends by itself; pass a "
                "redis.asyncio.Redis"
            )
        self._replicas = replicas
        self._prefix = prefix
        encoded(prefix)
        self._max_message_bytes = max_message_bytes
        self._durability: Durability = Capabilities(durability=durability).durability  # refuses an unknown level
        self._is_verified = durability == "none"
        self._options = ReadOptions(lease=lease, retention=retention, extra_prefetch=extra_prefetch)
        service = CommandConnection(
            self._client,
            owns_client=owned,
            timeout=timeout,
            max_in_flight=max_in_flight,
            reconnect=ReconnectPolicy(connect_timeout=timeout) if reconnect is None else reconnect,
        )
        super().__init__(service)

    _alternative = "Redis Pub/Sub"

    @classmethod
    @options_of(__init__)
    def from_url(cls, url: str, /, *args: Any, **options: Any) -> Self:
        """Return a broker that makes its own client from *url*, and closes it. The options are those of the class."""
        return cls(url, *args, **options)

    @property
    def capabilities(self) -> Capabilities:
        """The promises of Redis Streams. The durability is the argument of the constructor."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="accepted",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash", "deadline"}),
            redelivery_bound=self._options.lease + 2 * SCAN_EVERY,
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
        if not self._is_verified:
            await self._verify()
        key = self._stream((message.message_type, message.message_name))
        command = (b"XADD", key, b"*", *fields)
        await self._service.execute(*command, message_id=message.message_id, replicas=self._replicas)

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        streams = {self._stream(topic): topic for topic in settings.topics}
        return Subscription(settings, self._service, self._client, streams, self._options, verify=self._verify)

    async def audit(self) -> list[Finding]:
        """See `Auditable.audit`. It needs permission for INFO; without CONFIG GET it cannot check every setting."""
        return await findings(self._service.execute, self._replicas)

    async def _verify(self) -> None:
        """Check that the server keeps what this broker promises of it. UnsupportedCapability if it keeps less."""
        if not self._is_verified:
            kept = Capabilities(durability=await durability_of(self._service.execute))
            promised = Capabilities(durability=self._durability)
            remedy = "set appendonly yes on the server, or promise less"
            require(self, kept, promised, for_=f"durability={self._durability!r} on this server", remedy=remedy)
            self._is_verified = True

    def _stream(self, topic: tuple[str, str]) -> bytes:
        return stream(self._prefix, topic)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._verify()
        return self
