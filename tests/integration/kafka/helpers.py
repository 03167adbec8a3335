"""Helpers of the tests of Kafka."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from time import monotonic

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from diator.brokers import Message
from diator.brokers.base import Topic

COUNTED = Topic("notification_event", "Counted")

TIMEOUT = 3.0

SLACK = 20.0
"""Seconds that a busy machine may need in addition; a longer wait means that something hangs."""


def message(number, topic=COUNTED, **fields) -> Message:
    return Message.create(message_name=topic.message_name, payload={"number": number}, **fields)


async def send(broker, *numbers, **fields) -> None:
    await broker.send_messages([message(number, **fields) for number in numbers])


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


def subscribed(broker, *topics, group="billing", **options):
    return broker.subscribe(topics or [COUNTED], group=group, **options)


async def take(deliveries, count, *, within=30.0) -> list:
    async with asyncio.timeout(within):
        return [await anext(deliveries) for _ in range(count)]


async def acked(deliveries, count, *, within=30.0) -> list[int]:
    taken = []
    for _ in range(count):
        (delivery,) = await take(deliveries, 1, within=within)
        taken.append(number_of(delivery))
        await delivery.ack()
    return taken


async def all_that_comes(deliveries, *, within=1.0) -> list[int]:
    """Take and acknowledge deliveries until none arrives for *within* seconds."""
    taken: list[int] = []
    with suppress(TimeoutError):
        while True:
            taken += await acked(deliveries, 1, within=within)
    return taken


async def on_its_way(broker) -> None:
    """Wait until every batch is in flight, so that later messages are in another batch."""
    await asyncio.sleep(0)
    while not all(batch.is_sent for batch in broker._service._calls.batches):  # noqa: ASYNC110  # no event reports it
        await asyncio.sleep(0.01)


def client_of(broker) -> AIOKafkaProducer:
    """Return the current aiokafka producer of *broker*."""
    return broker._service._link._producer


async def stored(servers, name) -> list:
    """Return all records of the topic *name*, read by plain aiokafka."""
    async with AIOKafkaConsumer(name, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        return [await consumer.getone() for _ in range(sum(ends.values()))]


async def committed(servers, group) -> dict:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        return await admin.list_consumer_group_offsets(group)
    finally:
        await admin.close()


@asynccontextmanager
async def within(seconds):
    began = monotonic()
    yield
    assert monotonic() - began < seconds


def number_in(record) -> int:
    return json.loads(record.value)["payload"]["number"]


def number_of_each(records) -> set[int]:
    return {number_in(record) for record in records}


async def place_of_everything(admin, name) -> TopicPartition:
    """Return the partition that contains the messages."""
    consumer = AIOKafkaConsumer(bootstrap_servers=admin._client._bootstrap_servers)
    await consumer.start()
    try:
        places = [TopicPartition(name, number) for number in range(4)]
        await consumer._client._wait_on_metadata(name)
        ends = await consumer.end_offsets(places)
    finally:
        await consumer.stop()
    (place,) = [place for place, end in ends.items() if end]
    return place
