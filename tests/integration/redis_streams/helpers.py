"""Helpers of the tests of Redis Streams."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import pytest

from diator.brokers import Message
from diator.brokers.base import Delivery, Topic
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent

COUNTED = Topic("notification_event", "Counted")

LEASE = 0.6

LONG = 60.0
"""A lease that no test waits for."""

TIMEOUT = 2.0

SLACK = 20.0
"""Seconds that a busy machine may need in addition; a longer wait means that something hangs."""


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


def message(number, topic=COUNTED, **fields) -> Message:
    return Message.create(message_name=topic.message_name, payload={"number": number}, **fields)


async def send(broker, *numbers) -> None:
    await broker.send_messages([message(number) for number in numbers])


class Pace:
    """Whether the machine kept pace: the longest time for which this process or Redis stood still, in seconds."""

    def __init__(self, admin) -> None:
        self.worst = 0.0
        self._admin = admin

    async def __aenter__(self):
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_) -> None:
        self._watching.cancel()
        await asyncio.wait([self._watching])

    async def _watch(self) -> None:
        while True:
            before = monotonic()
            await asyncio.sleep(0.02)
            await self._admin.ping()
            self.worst = max(self.worst, monotonic() - before - 0.02)


async def attempts(admin):
    """Yield up to ten times, until this machine kept pace: it did not stand still for what is left of a lease."""
    for _ in range(10):
        yield (pace := Pace(admin))
        if pace.worst < LEASE / 3:
            return
    pytest.skip("this machine is too slow to keep a lease")


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


def subscribed(broker, *topics, group="billing", **options):
    return broker.subscribe(topics or [COUNTED], group=group, **options)


async def take(deliveries, count, *, within=30.0) -> list[Delivery]:
    async with asyncio.timeout(within):
        return [await anext(deliveries) for _ in range(count)]


async def acked(deliveries, count, *, within=30.0) -> list[int]:
    """Take and acknowledge *count* deliveries, and return their numbers."""
    numbers = []
    async with asyncio.timeout(within):
        for _ in range(count):
            delivery = await anext(deliveries)
            await delivery.ack()
            numbers.append(number_of(delivery))
    return numbers


async def nothing_comes(deliveries, *, within=0.5) -> None:
    with pytest.raises(TimeoutError):
        await take(deliveries, 1, within=within)


@asynccontextmanager
async def consuming(broker, handle, **options):
    """A consumer that has subscribed, and whose handlers call *handle* with each event."""

    async def handler(event: Counted) -> None:
        if (waiting := handle(event)) is not None:
            await waiting

    event_map = EventMap()
    event_map.bind(Counted, handler)
    async with Consumer(broker, event_map=event_map, group="billing", **options) as consumer:
        yield consumer


async def eventually(holds, *, within=30.0) -> None:
    async with asyncio.timeout(within):
        while not await holds():  # noqa: ASYNC110  # Redis sends no event for it
            await asyncio.sleep(0.01)


async def pending(admin, stream, group="billing") -> int:
    return (await admin.xpending(stream, group))["pending"]


async def nothing_left(admin, stream, group="billing") -> None:
    """Of this group, wait until nothing is pending, unread or delayed."""

    async def holds() -> bool:
        for each in (stream, f"{stream}:{group}:again"):
            (about,) = [about for about in await admin.xinfo_groups(each) if about["name"] == group.encode()]
            if about["pending"] or about["lag"]:
                return False
        return not await admin.zcard(f"{stream}:{group}:delayed")

    await eventually(holds)


async def dead_letters(admin, stream, group="billing") -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await admin.xrange(f"{stream}:{group}:dead")]
