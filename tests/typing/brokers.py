"""The brokers: right programs, and wrong lines with the error of each type checker."""

from typing import assert_type

import aio_pika
from redis.asyncio import Redis
from yarl import URL

from diator.brokers import Message
from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker


class OwnRedisBroker(RedisMessageBroker): ...


def construct(client: Redis) -> None:
    """`from_url` has the options of the constructor, and the type of the class that it is called on."""
    RedisMessageBroker(client, "prefix", timeout=1.0, require_receiver=True)
    RedisMessageBroker("redis://localhost", channel_prefix="prefix")
    RedisStreamMessageBroker(client=client, durability="crash", retention=3600)
    RedisStreamMessageBroker("redis://localhost", "prefix", lease=30)
    assert_type(RedisMessageBroker.from_url("redis://localhost", "prefix", older_senders=True), RedisMessageBroker)
    assert_type(RedisStreamMessageBroker.from_url("redis://localhost", lease=30), RedisStreamMessageBroker)
    assert_type(OwnRedisBroker.from_url("redis://localhost", channel_prefix="prefix", timeout=1), OwnRedisBroker)

    RedisMessageBroker()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RedisMessageBroker(6379)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisMessageBroker(client, lease=30)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RedisMessageBroker.from_url()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RedisMessageBroker.from_url(client)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisMessageBroker.from_url("redis://localhost", lease=30)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RedisMessageBroker.from_url("redis://localhost", timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisStreamMessageBroker.from_url("redis://localhost", durability="forever")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisStreamMessageBroker.from_url("redis://localhost", "prefix", 30)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def construct_rabbitmq(url: URL) -> None:
    """It takes an address, or what aio-pika returns."""
    RabbitMQMessageBroker("amqp://localhost", "prefix", queue_type="classic")
    RabbitMQMessageBroker(url)
    RabbitMQMessageBroker(aio_pika.Connection(url), timeout=1.0)
    RabbitMQMessageBroker(await aio_pika.connect(url))
    robust: aio_pika.abc.AbstractRobustConnection = await aio_pika.connect_robust(url)
    RabbitMQMessageBroker(robust)
    RabbitMQMessageBroker(b"amqp://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RabbitMQMessageBroker(object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def construct_others(message: Message) -> None:
    KafkaMessageBroker("localhost:9092")
    KafkaMessageBroker(bootstrap_servers="localhost:9092,localhost:9093", timeout=5.0)
    assert_type(len(MemoryMessageBroker(capacity=10)), int)
    async with RedisMessageBroker("redis://localhost") as broker:
        assert_type(broker, RedisMessageBroker)
        await broker.send_message(message=message)

    KafkaMessageBroker()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    KafkaMessageBroker(9092)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    KafkaMessageBroker("localhost:9092", retry_in_place="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MemoryMessageBroker(capacity="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MemoryMessageBroker("memory://")  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
