"""Helpers of the tests of Redis Pub/Sub."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker

TIMEOUT = 1.0
"""The timeout of brokers whose Redis is in trouble, in seconds."""

SLACK = 20.0
"""Seconds that a busy machine may need in addition; a longer wait means that something hangs."""


@dataclass(frozen=True)
class Ears:
    """A plain subscriber to all notification events below one prefix."""

    client: Redis
    pubsub: PubSub
    prefix: str

    async def heard(self) -> list[tuple[str, bytes]]:
        """Return all messages published since the last call, in order: channel and body."""
        mark = f"{self.prefix}:notification_event:{uuid4()}"
        await self.client.publish(mark, b"")
        heard: list[tuple[str, bytes]] = []
        while True:
            found = await self.pubsub.get_message(ignore_subscribe_messages=True, timeout=30)
            assert found is not None, "the subscriber hears nothing any more"
            channel = found["channel"].decode()
            if channel == mark:
                return heard
            heard.append((channel, found["data"]))

    async def numbers(self) -> list[int]:
        """Return the numbers of the messages that `heard` returns."""
        return [json.loads(body)["payload"]["n"] for _, body in await self.heard()]


@asynccontextmanager
async def listening(url: str, prefix: str) -> AsyncIterator[Ears]:
    async with Redis.from_url(url, protocol=2) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(f"{prefix}:notification_event:*")
        assert await pubsub.get_message(timeout=30)
        yield Ears(client, pubsub, prefix)


def message(n: int = 0, **fields: Any) -> Message:
    return Message.create(message_name="user_joined", payload={"n": n}, **fields)


async def send_all(broker: RedisMessageBroker, *numbers: int) -> Counter[type | None]:
    """Send these at once. Count the results by type: None is a success. Each send error names its message."""
    sent = [message(n) for n in numbers]
    results = await asyncio.gather(*map(broker.send_message, sent), return_exceptions=True)
    for result, about in zip(results, sent, strict=True):
        assert result is None or result.message_id == about.message_id
    return Counter(result and type(result) for result in results)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await holds():  # noqa: ASYNC110  # Redis sends no event for it
            await asyncio.sleep(0.01)


async def connections(client: Redis, name: str) -> int:
    """Return how many connections of this name Redis has."""
    return sum(each["name"] == name for each in await client.client_list())


def promised(timeout: float = TIMEOUT) -> asyncio.Timeout:
    """Fail if the body does not end within its promised time."""
    return asyncio.timeout(timeout + SLACK)


async def no_connections(client: Redis, name: str) -> bool:
    return await connections(client, name) == 0
