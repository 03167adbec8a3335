"""Helpers of the tests of RabbitMQ."""

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from diator.brokers import Message
from diator.brokers.base import Topic
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


async def numbers(deliveries, count) -> list[int]:
    taken = []
    for _ in range(count):
        delivery = await anext(deliveries)
        taken.append(json.loads(delivery.body)["payload"]["number"])
        await delivery.ack()
    return taken
