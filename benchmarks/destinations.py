"""The messages in the services, to check that no measurement lost a message or left one unacknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

GROUP = "benchmark"
PARTITIONS = 4
SOON = 5.0
"""Seconds until a service must show the right count."""


class Destination(Protocol):
    """The destination of one measurement, seen by the plain client. On exit it is removed."""

    async def stored(self) -> int:
        """Return the number of messages."""

    async def left(self) -> int:
        """Return the number of unacknowledged messages."""

    async def held(self) -> int | None:
        """Return the number of unsettled deliveries, or None if the service does not report it."""


@asynccontextmanager
async def memory(_url: str, _name: str) -> AsyncGenerator[Destination, None]:
    """Another process cannot see into the in-memory broker."""
    yield _Nothing()


@asynccontextmanager
async def pubsub(_url: str, _name: str) -> AsyncGenerator[Destination, None]:
    """Redis Pub/Sub stores no messages."""
    yield _Nothing()


class _Nothing:
    async def stored(self) -> int:
        return 0

    async def left(self) -> int:
        return 0

    async def held(self) -> None:
        return None


@asynccontextmanager
async def heard(url: str, channel: str) -> AsyncGenerator[list[bytes], None]:
    """Collect the messages of a Redis Pub/Sub channel, until a moment after the body."""
    from redis.asyncio import Redis  # noqa: PLC0415  # each client is imported only for its service

    bodies: list[bytes] = []

    async def read() -> None:
        async for message in subscription.listen():
            bodies.extend([message["data"]] if message["type"] == "message" else [])

    async with Redis.from_url(url) as client, client.pubsub() as subscription:
        await subscription.subscribe(channel)
        reading = asyncio.create_task(read())
        try:
            yield bodies
            await asyncio.sleep(0.2)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def streams(url: str, name: str) -> AsyncGenerator[Destination, None]:
    from redis.asyncio import Redis  # noqa: PLC0415  # as above

    async with Redis.from_url(url) as client:
        # Start at the oldest message; FastStream would start at the newest.
        await client.xgroup_create(name, GROUP, id="0", mkstream=True)
        try:
            yield _Stream(client, name)
        finally:
            await client.delete(name, *[key async for key in client.scan_iter(f"{name}:benchmark:*", count=10_000)])


class _Stream:
    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    async def stored(self) -> int:
        length: int = await self._client.xlen(self._name)
        return length

    async def left(self) -> int:
        groups = await self._client.xinfo_groups(self._name)
        return sum(group["pending"] + group["lag"] for group in groups)

    async def held(self) -> int:
        groups = await self._client.xinfo_groups(self._name)
        return sum(group["pending"] for group in groups)


@asynccontextmanager
async def rabbitmq(url: str, name: str) -> AsyncGenerator[Destination, None]:
    import aio_pika  # noqa: PLC0415  # as above

    async with await aio_pika.connect(url) as connection:
        try:
            yield _Queue(connection, name)
        finally:
            async with connection.channel() as channel:
                await channel.queue_delete(name)
                await channel.queue_delete(f"{name}:dead")  # only diator has one
                await channel.exchange_delete(name.partition(":")[0])


class _Queue:
    """A queue without a consumer, to which unacknowledged messages have returned."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection, self._name = connection, name

    async def stored(self) -> int:
        async with self._connection.channel() as channel:
            queue = await channel.get_queue(self._name)
            count: int = queue.declaration_result.message_count
            return count

    left = stored

    async def held(self) -> None:
        return None


@asynccontextmanager
async def kafka(servers: str, name: str) -> AsyncGenerator[Destination, None]:
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # noqa: PLC0415  # as above

    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, PARTITIONS, 1)])
        yield _Topic(servers, name)
    finally:
        await admin.delete_topics([each for each in await admin.list_topics() if each.startswith(name)])
        await admin.close()


class _Topic:
    def __init__(self, servers: str, name: str) -> None:
        self._servers, self._name = servers, name

    async def stored(self) -> int:
        return await self._count(committed=False)

    async def left(self) -> int:
        return await self._count(committed=True)

    async def held(self) -> None:
        return None

    async def _count(self, *, committed: bool) -> int:
        from aiokafka import AIOKafkaConsumer, TopicPartition  # noqa: PLC0415  # as above

        # The names of diator's groups begin with the prefix, as those of its topics do.
        prefix, dot, _ = self._name.partition(".")
        group = f"{prefix}{dot}{GROUP}" if dot else GROUP
        async with AIOKafkaConsumer(
            bootstrap_servers=self._servers, group_id=group if committed else None, enable_auto_commit=False
        ) as looking:
            partitions = [TopicPartition(self._name, number) for number in range(PARTITIONS)]
            ends = await looking.end_offsets(partitions)
            if not committed:
                return sum(ends.values())
            return sum([ends[each] - (await looking.committed(each) or 0) for each in partitions])


async def soon(count: Callable[[], Awaitable[int]], expected: int) -> int:
    """Wait until *count* returns *expected*, and return the last count."""
    loop = asyncio.get_running_loop()
    end = loop.time() + SOON
    while (found := await count()) != expected and loop.time() < end:  # noqa: ASYNC110  # the service sends no event for it
        await asyncio.sleep(0.05)
    return found
