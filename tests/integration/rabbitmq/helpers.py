"""Helpers of the tests of RabbitMQ."""

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.rabbitmq._channel import Channel
from diator.brokers.rabbitmq._client import commands
from diator.brokers.rabbitmq._frames import Publication
from diator.brokers.supervisor import ReconnectPolicy
from diator.events import NotificationEvent

COUNTED = Topic("notification_event", "Counted")

OTHER = Topic("notification_event", "Other")

RECONNECT = ReconnectPolicy(connect_timeout=5.0, idle_timeout=1.0, probe_timeout=2.0, max_delay=0.5)

SLACK = 20.0
"""Seconds that a busy machine may need in addition; a longer wait means that something hangs."""


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


def counted(number=0, *, topic=COUNTED, message_id=None, **options) -> Message:
    event_id = message_id or uuid4()
    payload = {"event_id": str(event_id), "event_timestamp": datetime.now(UTC).isoformat(), "number": number}
    return Message.create(message_name=topic.message_name, payload=payload, message_id=event_id, **options)


async def collect(broker, topics=(COUNTED,)):
    """Declare the group's queue."""
    async with broker.subscribe(topics, group="readers"):
        pass


async def become(count, at_least):
    async with asyncio.timeout(10):
        while count() < at_least:  # noqa: ASYNC110  # no event reports it
            await asyncio.sleep(0.01)


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


async def numbers(deliveries, count) -> list[int]:
    taken = []
    for _ in range(count):
        delivery = await anext(deliveries)
        taken.append(number_of(delivery))
        await delivery.ack()
    return taken


# -- raw messages: what no client library writes -------------------------------------------------------------------


class Raw(Channel):
    """A channel that publishes and reads messages whose properties are any bytes: flags, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: asyncio.Queue[object] = asyncio.Queue()

    async def publish(self, exchange: str, routing_key: str, flags: int, properties: bytes, body: bytes) -> None:
        """Publish, and wait for the confirm."""
        header = (60).to_bytes(2) + bytes(2) + len(body).to_bytes(8) + flags.to_bytes(2) + properties
        self.write(Publication(exchange, routing_key, header, body, "", None, mandatory=False).frames(self.frame_max))
        answer = await asyncio.wait_for(self._answers.get(), SLACK)
        assert isinstance(answer, commands.Basic.Ack), answer

    async def get(self, queue: str) -> tuple[bytes, bytes]:
        """Wait for the next message of *queue* and remove it. Return its flags and properties, and its body."""
        await self.ask(commands.Basic.Consume(queue=queue, consumer_tag=queue, no_ack=True))
        try:
            header, body = await asyncio.wait_for(self._answers.get(), SLACK)
        finally:
            await self.ask(commands.Basic.Cancel(queue))
        return header[12:], body

    def take(self, frame: object) -> bool:
        if isinstance(frame, commands.Basic.Ack | commands.Basic.Nack):
            self._answers.put_nowait(frame)
            return True
        return False

    def take_content(self, method: object, header: bytes, body: bytes) -> None:
        self._answers.put_nowait((header, body))

    def lost(self, error: Exception) -> None:
        self._answers.put_nowait(error)
