"""Sending, and what the subscriptions share."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode
from diator.brokers.connecting import ServiceBroker
from diator.brokers.pipelining import PipelinedConnection
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import BrokerError, BrokerUnavailable, ConfigurationError
from diator_nats._link import Headers, Link, Refused
from diator_nats._names import subject_of
from diator_nats._subscription import Subscription

_ROOM_FOR_HEADERS = 16_384  # of a dead letter: NATS counts them with the body, up to its max_payload of 1 MiB
_EXISTS = 10058  # the stream exists with other settings


class Stored(NamedTuple):  # see the arguments of `NatsMessageBroker`
    stream: str
    room: int
    lease: float
    absence: float


class Service(PipelinedConnection[Link]):
    """The connection that sends and settles."""

    service = "NATS"

    def __init__(self, url: str, stored: Stored, timeout: float, reconnect: ReconnectPolicy, **options: Any) -> None:
        super().__init__(url.rpartition("//")[2].rpartition("@")[2], timeout=timeout, reconnect=reconnect)
        self.url, self.options = url, options
        self.stream, self.room, self.lease, self.absence = stored

    def subject(self, topic: Topic) -> str:
        return subject_of(f"{self.stream}.m", *topic)

    def dead_subject(self, topic: Topic, group: str | None) -> str:
        return subject_of(f"{self.stream}.dead", "" if group is None else f"g{group}", *topic)

    async def request(
        self, subject: str, body: bytes = b"", headers: Headers = None, message_id: UUID | None = None
    ) -> Any:
        deadline = self._bind_to_running_loop().time() + self.timeout
        link = await self._ready(deadline, message_id)
        return await link.request(deadline, subject, body, headers, message_id)

    async def publish(self, subject: str, body: bytes, headers: Headers = None, message_id: UUID | None = None) -> None:
        try:
            await self.request(subject, body, headers, message_id)
        except BrokerUnavailable:
            if self._link is not None:  # then the stream is missing: not for the next message
                with suppress(BrokerError):
                    await self.declare(self._link)
            raise

    async def declare(self, link: Link) -> None:
        """Make the streams, unless they exist. A message leaves its stream when all groups have settled it."""
        limits = {"max_msgs_per_subject": self.room, "discard_new_per_subject": self.room > 0}
        for name, subjects, settings in (
            (self.stream, f"{self.stream}.m.>", {"retention": "interest", **limits}),
            (f"{self.stream}-dead", f"{self.stream}.dead.>", {"retention": "limits"}),
        ):
            config = {"name": name, "subjects": [subjects], "storage": "file", "discard": "new", **settings}
            try:
                await link.api(f"STREAM.CREATE.{name}", self.timeout, **config)
            except Refused as refused:
                if refused.err_code != _EXISTS:
                    raise
                existing = (await link.api(f"STREAM.INFO.{name}", self.timeout))["config"]
                if existing["retention"] != settings["retention"] or existing["storage"] != "file":
                    raise ConfigurationError(f"the stream {name} of NATS does not keep its promises") from refused

    async def _connect(self) -> Link:
        link = await Link.open(self.url, self._reconnect.connect_timeout, self.options, self.retire)
        try:
            await self.declare(link)
        except BaseException:
            await link.close()
            raise
        return link


class NatsMessageBroker(ServiceBroker[Service]):
    """
    Messages in a stream of NATS JetStream: at least once, to groups and to subscriptions without one.

    Args:
        url: The address, such as `nats://localhost:4222`.
        stream: The name of the stream. The subjects begin with it.
        timeout: The time limit for each call, in seconds.
        lease: How long JetStream waits for a sign of life of a consumer before it redelivers a message, in seconds.
        absence: How long JetStream collects messages for a subscription without a group that is away, in seconds.
        room: How many messages of a topic may wait for the slowest group; without limit by default.
        reconnect: The time limits and delays of connections.
        options: Passed on to `nats.connect`, such as `tls` or `user_credentials`.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str = "diator",
        timeout: float = 5.0,
        lease: float = 30.0,
        absence: float = 300.0,
        room: int = -1,
        reconnect: ReconnectPolicy | None = None,
        **options: Any,
    ) -> None:
        policy = reconnect or ReconnectPolicy(connect_timeout=timeout)
        super().__init__(Service(url, Stored(stream, room, lease, absence), timeout, policy, **options))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            guarantee="at_least_once",
            receipt="durable",
            durability="crash",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash", "deadline"}),
            redelivery_bound=self._service.lease + 1,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="deliveries",
            ordering="destination",
            distribution=frozenset({"competing", "broadcast"}),
            subscription="durable",
            backpressure="pull",
            max_message_bytes=MAX_MESSAGE_BYTES - _ROOM_FOR_HEADERS,
            multi_process=True,
            network=True,
        )

    async def send_message(self, message: Message, /) -> None:
        body = encode(message, max_bytes=self.capabilities.max_message_bytes, headers_in_body=True)
        subject = self._service.subject(Topic(message.message_type, message.message_name))
        await self._service.publish(subject, body, message_id=message.message_id)

    def _subscription(self, settings: SubscriptionSettings) -> Subscription:
        return Subscription(settings, self._service)
