"""redis-py as its documentation uses it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Self

from by_hand import decoded, encoded
from measuring import Finished, Handle, Settled, end, nothing
from redis.asyncio import BlockingConnectionPool, Redis

GROUP = "benchmark"


class PubSub:
    def __init__(self, url: str, name: str) -> None:
        # The default pool opens a connection for each concurrent call and fails at its limit.
        self._client = Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=100))
        self._name = name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def send(self, number: int) -> None:
        await self._client.publish(self._name, encoded(number))

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        free = asyncio.Semaphore(concurrency)

        async def run(body: bytes) -> None:
            await handle(decoded(body))
            settled()
            free.release()

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] == "subscribe":
                    subscribed.set()
                elif concurrency == 1:
                    await handle(decoded(message["data"]))
                    settled()
                else:
                    await free.acquire()
                    tasks.create_task(run(message["data"]))

        subscribed = asyncio.Event()
        async with self._client.pubsub() as pubsub, asyncio.TaskGroup() as tasks:
            await pubsub.subscribe(self._name)
            listening = tasks.create_task(listen())
            await subscribed.wait()
            yield nothing
            await end(listening)


class Streams:
    def __init__(self, url: str, name: str) -> None:
        self._client = Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=100))
        self._name = name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def send(self, number: int) -> None:
        await self._client.xadd(self._name, {"body": encoded(number)})

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        async def run(entry: bytes, fields: dict[bytes, bytes]) -> None:
            await handle(decoded(fields[b"body"]))
            await self._client.xack(self._name, GROUP, entry)
            settled()

        async def read() -> None:
            while True:
                streams = {self._name: ">"}
                most = 100 if concurrency == 1 else concurrency
                answer = await self._client.xreadgroup(GROUP, "member", streams, count=most, block=1000)
                for _, entries in answer:
                    if concurrency == 1:
                        for entry, fields in entries:
                            await run(entry, fields)
                    else:
                        await asyncio.gather(*(run(*each) for each in entries))

        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            yield nothing
            await end(reading)
