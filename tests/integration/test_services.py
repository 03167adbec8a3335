"""Every service of the test suite is the real one and does its work."""

import asyncio
from uuid import uuid4

import aio_pika
import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.services import BACKENDS, MissingService, Service, Services, wait_for


async def test_redis_answers(redis_url: str) -> None:
    """Redis answers a ping."""
    async with Redis.from_url(redis_url) as client:
        assert await client.ping()


async def test_rabbitmq_delivers_a_published_message(rabbitmq_url: str) -> None:
    """RabbitMQ confirms a message and delivers it."""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)

        await channel.default_exchange.publish(aio_pika.Message(b"hello"), queue.name)

        message = await queue.get(no_ack=True)
        assert message.body == b"hello"


async def test_kafka_returns_a_produced_record(kafka_servers: str) -> None:
    """Kafka acknowledges a record and returns it at its offset."""
    topic = f"test-services-{uuid4()}"
    async with AIOKafkaProducer(bootstrap_servers=kafka_servers, acks="all") as producer:
        sent = await producer.send_and_wait(topic, b"hello")

    async with AIOKafkaConsumer(bootstrap_servers=kafka_servers) as consumer:
        place = TopicPartition(topic, sent.partition)
        consumer.assign([place])
        consumer.seek(place, sent.offset)
        record = await consumer.getone()
    assert record.value == b"hello"


async def test_postgres_keeps_what_was_inserted(postgres_url: str) -> None:
    """PostgreSQL stores a row and returns it."""
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("create temporary table greetings (text text)")
        await connection.execute("insert into greetings values ($1)", "hello")

        assert await connection.fetchval("select text from greetings") == "hello"
    finally:
        await connection.close()


async def test_a_private_redis_comes_back_at_its_address(private_redis: Service) -> None:
    """A service that was killed has its old address and its data when it is started again."""
    async with Redis.from_url(private_redis.url, retry=None) as client:
        await client.set("greeting", "hello")

        await asyncio.to_thread(private_redis.kill)
        with pytest.raises(RedisConnectionError):
            await client.ping()
        await asyncio.to_thread(private_redis.start)

        assert await client.get("greeting") == b"hello"


async def test_a_private_redis_can_be_frozen(private_redis: Service) -> None:
    """A frozen service keeps its connections and responds after it is resumed."""
    async with Redis.from_url(private_redis.url, socket_timeout=None) as client:
        await client.ping()

        await asyncio.to_thread(private_redis.pause)
        answer = asyncio.create_task(client.ping())
        await asyncio.wait([answer], timeout=0.2)
        assert not answer.done()
        await asyncio.to_thread(private_redis.unpause)

        assert await answer


def test_services_end_by_themselves(redis_url: str) -> None:
    """Closing one set of services removes its containers and no others."""
    services = Services()
    try:
        own = services.private("redis").url
    except MissingService as missing:
        pytest.skip(str(missing))
    services.close()

    with pytest.raises(TimeoutError):
        wait_for(BACKENDS["redis"], own, within=0.5)
    wait_for(BACKENDS["redis"], redis_url, within=5)
