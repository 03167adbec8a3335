"""
FastStream, in an environment of its own: `faststream_peer.py send|receive TRANSPORT ADDRESS NAME`.

NAME is a channel, a stream, a topic, or `exchange/routing key`. The program prints each message that it receives on a
line, and sends the lines of its standard input.
"""

import asyncio
import json
import sys
from typing import Any

from faststream.kafka import KafkaBroker
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from faststream.redis.parser import MessageFormat


class Plain(MessageFormat):
    """Read and write the plain body, without FastStream's envelope."""

    @classmethod
    async def encode(cls, **parts: Any) -> bytes:
        return (await cls.build(**parts)).data

    @classmethod
    def parse(cls, data: bytes) -> tuple[bytes, dict[str, Any]]:
        return data, {"content-type": "application/json"}


def topic_exchange(name: str) -> RabbitExchange:
    """Return diator's exchange: FastStream declares it with the same alternate exchange."""
    arguments = {"alternate-exchange": f"{name}:retained"}
    return RabbitExchange(name, type=ExchangeType.TOPIC, durable=True, arguments=arguments)


def hearing(transport: str, address: str, name: str) -> Any:
    match transport:
        case "redis":
            broker = RedisBroker(address, logger=None)
            return broker, broker.subscriber(name)
        case "redis-streams":
            broker = RedisBroker(address, logger=None)
            return broker, broker.subscriber(stream=StreamSub(name, last_id="0"))
        case "rabbitmq":
            exchange, _, routing_key = name.partition("/")
            broker = RabbitBroker(address, logger=None)
            queue = RabbitQueue(f"{name}.faststream", routing_key=routing_key, durable=True)
            return broker, broker.subscriber(queue, topic_exchange(exchange))
        case _:
            broker = KafkaBroker(address, logger=None)
            return broker, broker.subscriber(name, group_id=f"{name}.faststream", auto_offset_reset="earliest")


async def receive(transport: str, address: str, name: str) -> None:
    broker, subscriber = hearing(transport, address, name)

    @subscriber
    async def handle(body: dict[str, Any]) -> None:
        if "body" in body:  # a stream's entry, whose fields FastStream does not know
            body = json.loads(body["body"])
        print(body["message_name"], json.dumps(body["payload"]), flush=True)

    async with broker:
        await broker.start()
        print("ready", flush=True)
        await asyncio.Event().wait()


async def send(transport: str, address: str, name: str) -> None:
    bodies = [json.loads(line) for line in sys.stdin]
    match transport:
        case "redis":
            async with RedisBroker(address, logger=None, message_format=Plain) as broker:
                for body in bodies:
                    await broker.publish(body, name)
        case "rabbitmq":
            exchange, _, routing_key = name.partition("/")
            async with RabbitBroker(address, logger=None) as broker:
                for body in bodies:
                    await broker.publish(body, exchange=topic_exchange(exchange), routing_key=routing_key, persist=True)
        case "kafka":
            async with KafkaBroker(address, logger=None) as broker:
                for body in bodies:
                    await broker.publish(body, name, headers={"tenant": "7"})


asyncio.run({"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:]))
