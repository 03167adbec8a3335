"""Other libraries read what diator sends, and diator consumes what they send in the documented form."""

import asyncio
import json
from dataclasses import dataclass
from uuid import uuid4

import aio_pika
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis

from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent
from tests import peers
from tests.integration.transports import broker_for

pytestmark = pytest.mark.timeout(180)  # the first test installs the other libraries


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


@pytest.fixture(scope="session")
def install(pytestconfig):
    """Return a function that returns the command of a peer."""
    cache = pytestconfig.cache.mkdir("peers")
    return lambda peer: peers.command(peer, cache)


@pytest.fixture
def prefix():
    return f"interoperation-{uuid4().hex[:12]}"


class Receiver:
    """A consumer, and the users of the events that it received."""

    def __init__(self, broker, *, count=3):
        self.users: list[int] = []
        self.reports = []
        self._count = count
        event_map = EventMap()
        event_map.bind(UserJoined, self._handle)
        self.consumer = Consumer(broker, event_map=event_map, on_handled=self.reports.append)

    async def _handle(self, event: UserJoined) -> None:
        self.users.append(event.user_id)
        if len(self.users) == self._count:
            self.consumer.stop()


async def emit(broker, *users):
    emitter = EventEmitter(message_broker=broker)
    for user_id in users:
        await emitter.emit(UserJoined(user_id=user_id))


async def listening(client, channel, count=1):
    """Wait until the channel has so many subscribers."""
    while sum(number for _, number in await client.pubsub_numsub(channel)) < count:  # noqa: ASYNC110  # Redis sends no event for it
        await asyncio.sleep(0.01)


# -- older diator ------------------------------------------------------------------------------------------------


async def test_an_older_diator_receives_from_this_version(redis_url, prefix, install):
    """The older version subscribes to a pattern, which matches the message's name as it matched its id."""
    async with (
        RedisMessageBroker.from_url(redis_url, prefix) as broker,
        peers.running(*install("older_diator"), "receive", redis_url, prefix) as older,
    ):
        assert await peers.next_line(older) == ["ready"]
        await emit(broker, 1, 2, 3)
        received = [await peers.next_line(older) for _ in range(3)]

    assert received == [["UserJoined", str(user_id)] for user_id in (1, 2, 3)]


async def test_this_version_receives_from_an_older_diator(redis_url, prefix, install):
    """With `older_senders=True`: the channels of older senders end in the message's id."""
    async with RedisMessageBroker.from_url(redis_url, prefix, older_senders=True) as broker:
        received = Receiver(broker, count=4)
        consuming = asyncio.create_task(received.consumer.run(signals=False))
        await received.consumer.ready()
        async with Redis.from_url(redis_url) as client:
            await client.publish(f"{prefix}:notification_event:{uuid4()}", b"garbage")
            await client.publish(f"{prefix}:notification_event:{uuid4()}", body("SomethingElse", 9))
        async with peers.running(*install("older_diator"), "send", redis_url, prefix) as older:
            await peers.finished(older)
        await emit(broker, 3)  # an event of this version is received too, once
        await asyncio.wait_for(consuming, 60)

    assert received.users == [0, 1, 2, 3]
    assert [handled.outcome for handled in received.reports] == ["acked"] * 4


def body(name: str, user_id: int) -> str:
    """Return a message as docs/brokers.md describes it."""
    event_id = str(uuid4())
    payload = {"event_id": event_id, "event_timestamp": "2026-03-07T09:26:02Z", "user_id": user_id}
    message = {"message_type": "notification_event", "message_name": name, "message_id": event_id, "payload": payload}
    return json.dumps(message)


# -- plain clients -----------------------------------------------------------------------------------------------


async def test_a_plain_client_of_redis(redis_url, prefix):
    async with (
        RedisMessageBroker.from_url(redis_url, prefix) as broker,
        Redis.from_url(redis_url) as client,
        client.pubsub() as subscription,
    ):
        channel = f"{prefix}:notification_event:UserJoined"
        await subscription.subscribe(channel)
        assert (await subscription.get_message(timeout=5))["type"] == "subscribe"
        await emit(broker, 1)
        assert json.loads((await subscription.get_message(timeout=5))["data"])["payload"]["user_id"] == 1

        received = Receiver(broker, count=1)
        consuming = asyncio.create_task(received.consumer.run(signals=False))
        await listening(client, channel, count=2)
        await client.publish(channel, body("UserJoined", 2))
        await asyncio.wait_for(consuming, 60)

    assert received.users == [2]


async def test_a_plain_client_of_redis_streams(redis_url, prefix):
    stream = f"{prefix}:notification_event:UserJoined"
    async with RedisStreamMessageBroker.from_url(redis_url, prefix) as broker, Redis.from_url(redis_url) as client:
        await emit(broker, 1)
        [(_, entry)] = await client.xrange(stream)
        assert json.loads(entry[b"body"])["payload"]["user_id"] == 1

        await client.xadd(stream, {"body": body("UserJoined", 2), "tenant": "7"})
        received = Receiver(broker, count=2)
        await asyncio.wait_for(received.consumer.run(signals=False), 60)

        assert received.users == [1, 2]
        await client.delete(stream)


async def test_a_plain_client_of_rabbitmq(rabbitmq_url, prefix):
    """Another queue of the exchange receives all messages; messages published to the exchange are consumed."""
    async with RabbitMQMessageBroker(rabbitmq_url, prefix) as broker, await aio_pika.connect(rabbitmq_url) as client:
        channel = await client.channel()
        exchange = await channel.get_exchange(prefix)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "notification_event.UserJoined")
        await emit(broker, 1)
        received = await queue.get(timeout=5)
        assert json.loads(received.body)["payload"]["user_id"] == 1
        assert (received.content_type, received.type) == ("application/json", "UserJoined")
        assert received.message_id == json.loads(received.body)["message_id"]

        consumer = Receiver(broker, count=1)
        consuming = asyncio.create_task(consumer.consumer.run(signals=False))
        await consumer.consumer.ready()
        await exchange.publish(
            aio_pika.Message(body("UserJoined", 2).encode(), headers={"tenant": "7"}), "notification_event.UserJoined"
        )
        await asyncio.wait_for(consuming, 60)
        assert consumer.users == [2]
        await exchange.delete()
        for name in ("", ":dead"):
            await channel.queue_delete(f"{prefix}:notification_event:UserJoined:diator{name}")


async def test_a_plain_client_of_kafka(kafka_servers, prefix):
    topic = f"{prefix}.notification_event.UserJoined"
    async with KafkaMessageBroker(kafka_servers, prefix) as broker:
        await emit(broker, 1)
        reader = AIOKafkaConsumer(topic, bootstrap_servers=kafka_servers, auto_offset_reset="earliest")
        async with reader:
            record = await asyncio.wait_for(anext(reader), 60)
        assert json.loads(record.value)["payload"]["user_id"] == 1

        async with AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
            await producer.send_and_wait(topic, body("UserJoined", 2).encode(), headers=[("tenant", b"7")])
        consumer = Receiver(broker, count=2)
        await asyncio.wait_for(consumer.consumer.run(signals=False), 60)
        assert sorted(consumer.users) == [1, 2]


# -- FastStream --------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "redis": lambda prefix: f"{prefix}:notification_event:UserJoined",
    "redis-streams": lambda prefix: f"{prefix}:notification_event:UserJoined",
    "rabbitmq": lambda prefix: f"{prefix}/notification_event.UserJoined",
    "kafka": lambda prefix: f"{prefix}.notification_event.UserJoined",
}
"""Where FastStream finds diator's messages."""


@pytest.fixture
def addresses(redis_url, rabbitmq_url, kafka_servers):
    """Addresses in diator's form and in FastStream's."""
    return {
        "redis": (redis_url, redis_url),
        "redis-streams": (redis_url.replace("redis", "redis-streams", 1), redis_url),
        "rabbitmq": (rabbitmq_url, rabbitmq_url),
        "kafka": (f"kafka://{kafka_servers}", kafka_servers),
    }


@pytest.mark.parametrize("transport", ELSEWHERE)
async def test_faststream_receives_from_this_version(addresses, prefix, install, transport):
    ours, theirs = addresses[transport]
    name = ELSEWHERE[transport](prefix)
    command = install("faststream_peer")
    async with broker_for(ours, prefix) as broker:
        if transport == "kafka":
            await emit(broker, 0)  # creates the topic
        async with peers.running(*command, "receive", transport, theirs, name) as faststream:
            assert await peers.next_line(faststream) == ["ready"]
            if transport == "redis":
                async with Redis.from_url(theirs) as client:
                    await listening(client, name)
            await emit(broker, 1, 2, 3)
            count = 4 if transport == "kafka" else 3
            received = [await peers.next_line(faststream) for _ in range(count)]

    assert {name for name, _ in received} == {"UserJoined"}
    assert sorted(json.loads(payload)["user_id"] for _, payload in received)[-3:] == [1, 2, 3]


@pytest.mark.parametrize("transport", ["redis", "rabbitmq", "kafka"])
async def test_this_version_receives_from_faststream(addresses, prefix, install, transport):
    """Over Redis it sends without its envelope. To a stream FastStream writes only its own field."""
    ours, theirs = addresses[transport]
    name = ELSEWHERE[transport](prefix)
    command = install("faststream_peer")
    async with broker_for(ours, prefix) as broker:
        received = Receiver(broker)
        consuming = asyncio.create_task(received.consumer.run(signals=False))
        await received.consumer.ready()
        async with peers.running(*command, "send", transport, theirs, name) as faststream:
            await peers.finished(faststream, "\n".join(body("UserJoined", user_id) for user_id in range(3)))
        await asyncio.wait_for(consuming, 60)

    assert sorted(received.users) == [0, 1, 2]
