"""The harnesses of the in-memory broker, and of an in-memory broker that promises little."""

from contextlib import asynccontextmanager

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker, _Entry
from diator.exceptions import UnsupportedCapability
from diator.testing.conformance import DeadLettered, Harness, Limits
from tests.integration.harnesses.service import SCALE, foreign_bodies


class MemoryHarness(Harness):
    """The in-memory broker. Each broker is its own service."""

    name = "memory"
    facilities = frozenset({"raw", "foreign", "dead_letters", "full", "retention"})
    limits = Limits(quiet=0.05, redelivery=1.0, lag=SCALE)

    def transport(self):
        return MemoryMessageBroker()

    def full(self, room):
        return MemoryMessageBroker(capacity=room)

    def retaining(self, room):
        return MemoryMessageBroker(capacity=room)

    async def send_raw(self, transport: MemoryMessageBroker, topic: Topic, body: bytes) -> None:
        for queue in transport._queues:
            if topic in queue.topics:
                queue.put(_Entry(topic, body))

    async def send_foreign(self, transport, topic, group, kind, body):
        """The memory has nothing beside the body. The envelope has headers, and whoever stores it may compress it."""
        bodies = foreign_bodies(kind, body, transport.capabilities.max_message_bytes)
        for each in bodies:
            await self.send_raw(transport, topic, each)
        return len(bodies)

    async def dead_letters(self, transport: MemoryMessageBroker, topic: Topic, group: str | None):
        return [
            DeadLettered(body=letter.body, reason=letter.reason)
            for letter in transport.dead_letters
            if letter.topic == topic
        ]


class PlainHarness(Harness):
    """The in-memory broker without any capability that can be missing: at most once, broadcast only."""

    name = "memory, at most once"
    limits = MemoryHarness.limits

    def transport(self):
        return PlainMessageBroker()


class PlainMessageBroker(MemoryMessageBroker):
    """Promises little and refuses the rest, so that each capability has a transport with it and one without it."""

    @property
    def capabilities(self):
        return Capabilities(
            receipt="accepted",
            ordering="destination",
            distribution=frozenset({"broadcast"}),
            backpressure="pull",
            max_message_bytes=super().capabilities.max_message_bytes,
        )

    async def send_message(self, message, /):
        await super().send_message(message)
        self._kept.take_all([Topic(message.message_type, message.message_name)])

    @asynccontextmanager
    async def subscribe(self, topics, /, *, group=None, prefetch=64, on_gap=None):
        if group is not None:
            raise UnsupportedCapability("PlainMessageBroker", ["groups"], why="a group", remedy="leave it out")
        async with super().subscribe(topics, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield _PlainDeliveries(deliveries)


class _PlainDeliveries:
    # Not a generator: a cancelled wait would end it.

    def __init__(self, deliveries):
        self._deliveries = deliveries
        self.postpone, self.resume = deliveries.postpone, deliveries.resume

    def __aiter__(self):
        return self

    async def __anext__(self):
        delivery = await anext(self._deliveries)
        delivery.settler = _Plain(delivery.settler)
        return delivery


class _Plain:
    def __init__(self, settler):
        self._settler = settler

    async def ack(self, delivery, /):
        await self._settler.ack(delivery)

    async def retry(self, delivery, after, /):
        raise UnsupportedCapability("PlainMessageBroker", ["retry"], why="retry", remedy="do not")

    async def dead_letter(self, delivery, reason, /):
        raise UnsupportedCapability("PlainMessageBroker", ["dead_letter"], why="dead_letter", remedy="do not")
