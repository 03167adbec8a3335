"""
Programs whose messages other libraries trace: `traced_peer.py send|receive faststream|aio_pika ADDRESS NAME`.

NAME is `exchange/routing key` of RabbitMQ. A receiver prints the trace that each message belongs to, a sender the trace
in which it sends the one line of its standard input.
"""

import asyncio
import json
import sys

import aio_pika
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.opentelemetry import RabbitTelemetryMiddleware
from opentelemetry import trace
from opentelemetry.instrumentation.aio_pika import AioPikaInstrumentor
from opentelemetry.sdk.trace import TracerProvider

tracers = TracerProvider()


def current_trace() -> str:
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


def faststream(address: str) -> RabbitBroker:
    return RabbitBroker(address, logger=None, middlewares=[RabbitTelemetryMiddleware(tracer_provider=tracers)])


async def receive(library: str, address: str, name: str) -> None:
    exchange, _, routing_key = name.partition("/")
    arguments = {"alternate-exchange": f"{exchange}:retained"}
    if library == "faststream":
        broker = faststream(address)
        topics = RabbitExchange(exchange, type=ExchangeType.TOPIC, durable=True, arguments=arguments)

        @broker.subscriber(RabbitQueue(f"{name}.faststream", routing_key=routing_key, durable=True), topics)
        async def handle(body: object) -> None:
            print(current_trace(), flush=True)

        async with broker:
            await broker.start()
            print("ready", flush=True)
            await asyncio.Event().wait()

    async def handle_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        await message.ack()
        print(current_trace(), flush=True)

    async with await aio_pika.connect(address) as connection:
        channel = await connection.channel()
        topics = await channel.declare_exchange(exchange, "topic", durable=True, arguments=arguments)
        queue = await channel.declare_queue(f"{name}.aio_pika", durable=True)
        await queue.bind(topics, routing_key)
        await queue.consume(handle_message)
        print("ready", flush=True)
        await asyncio.Event().wait()


async def send(library: str, address: str, name: str) -> None:
    exchange, _, routing_key = name.partition("/")
    body = json.loads(sys.stdin.readline())
    with tracers.get_tracer("peer").start_as_current_span("send"):
        if library == "faststream":
            async with faststream(address) as broker:
                existing = RabbitExchange(exchange, type=ExchangeType.TOPIC, durable=True, declare=False)
                await broker.publish(body, routing_key=routing_key, exchange=existing)
        else:
            async with await aio_pika.connect(address) as connection:
                channel = await connection.channel()
                topics = await channel.get_exchange(exchange)
                await topics.publish(aio_pika.Message(json.dumps(body).encode()), routing_key)
        print(current_trace(), flush=True)


what, library, *where = sys.argv[1:]
if library == "aio_pika":
    AioPikaInstrumentor().instrument(tracer_provider=tracers)
asyncio.run({"send": send, "receive": receive}[what](library, *where))
