"""aio-pika as its documentation uses it: a quorum queue, confirms, persistent messages."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Self

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from by_hand import decoded, encoded
from measuring import Finished, Handle, Settled, end, nothing


class RabbitMQ:
    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect_robust(self._url)
        self._channel = await self._connection.channel()
        self._queue = await self._channel.declare_queue(self._name, durable=True, arguments={"x-queue-type": "quorum"})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def send(self, number: int) -> None:
        message = aio_pika.Message(encoded(number), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self._channel.default_exchange.publish(message, routing_key=self._name)

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        async def run(message: AbstractIncomingMessage) -> None:
            async with message.process():
                await handle(decoded(message.body))
            settled()

        async def iterate() -> None:
            async with self._queue.iterator() as messages:
                async for message in messages:
                    await run(message)

        if concurrency == 1:
            await self._channel.set_qos(prefetch_count=100)
            async with asyncio.TaskGroup() as tasks:
                iterating = tasks.create_task(iterate())
                yield nothing
                await end(iterating)
        else:
            await self._channel.set_qos(prefetch_count=concurrency)
            tag = await self._queue.consume(run)
            yield nothing
            await self._queue.cancel(tag)
