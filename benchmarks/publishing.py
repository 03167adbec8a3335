"""What publishing through Redis reaches, as ratios to redis-py's `publish` as it is documented."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import orjson
from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.reports import marked, show
from diator.brokers import Message
from diator.brokers.codec import payload_encoder
from diator.brokers.redis import RedisMessageBroker
from diator.events import EventEmitter, EventMap, NotificationEvent

PREFIX = "diator_benchmark"
CALLERS = (1, 64, 512)
TARGETS = {1: 1.0, 64: 4.5}
"""The lowest ratios that are good enough, by the number of callers."""

Send = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    meeting_id: int
    user_id: int
    nickname: str


def event() -> UserJoined:
    return UserJoined(meeting_id=17, user_id=4_711, nickname="Ada")


async def measure(url: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure, print the table, and give what was measured: messages a second, and ratios."""
    async with senders(url) as by_name:
        async with subscription(url) as arrived:
            for name, send in by_name.items():
                await verify(name, send, arrived)

        rates: dict[tuple[str, int], list[float]] = defaultdict(list)
        for _ in range(rounds):
            for callers in random.sample(CALLERS, k=len(CALLERS)):
                for name in random.sample(list(by_name), k=len(by_name)):
                    rates[name, callers].append(await rate(by_name[name], callers, seconds))

    rows, results = [], {}
    for callers in CALLERS:
        bare = rates["publish", callers]
        row = [str(callers), f"{statistics.median(bare):,.0f}/s"]
        results[str(callers)] = {"publish": {"per_second": statistics.median(bare)}}
        for name in ("send_message", "emit"):
            ratios = [ours / theirs for ours, theirs in zip(rates[name, callers], bare, strict=True)]
            per_second, ratio = statistics.median(rates[name, callers]), statistics.median(ratios)
            target = TARGETS.get(callers)
            met = ratio >= target if target else None
            text = f"{per_second:,.0f}/s {ratio:.2f}x"
            row.append(marked(text, target=f"{target}", met=met) if target else text)
            results[str(callers)][name] = {
                "per_second": per_second,
                "ratio": ratio,
                "ratios": ratios,
                "target": target,
                "met": met,
            }
        rows.append(row)
    show(
        "messages confirmed, and how many times as many as redis-py's publish",
        ["callers", "redis-py publish", "RedisMessageBroker.send_message", "EventEmitter.emit"],
        rows,
    )
    return results


@asynccontextmanager
async def senders(url: str) -> AsyncIterator[dict[str, Send]]:
    """Three ways to publish an event that is made anew each time."""
    channel = f"{PREFIX}:notification_event:UserJoined"
    payload_of = payload_encoder(UserJoined)
    # The default pool opens a connection for each concurrent call and fails when it has too many.
    bare = Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=100))
    client = Redis.from_url(url)
    async with bare, client, RedisMessageBroker(client, channel_prefix=PREFIX) as broker:
        emitter = EventEmitter(event_map=EventMap(), message_broker=broker)

        async def publish() -> None:
            joined = event()
            message = {
                "message_type": "notification_event",
                "message_name": "UserJoined",
                "message_id": joined.event_id,
                "payload": joined,
            }
            await bare.publish(channel, orjson.dumps(message))

        async def send_message() -> None:
            joined = event()
            message = Message(
                message_type="notification_event",
                message_name="UserJoined",
                message_id=joined.event_id,
                payload_json=payload_of(joined),
            )
            await broker.send_message(message)

        async def emit() -> None:
            await emitter.emit(event())

        yield {"publish": publish, "send_message": send_message, "emit": emit}


@asynccontextmanager
async def subscription(url: str) -> AsyncIterator[asyncio.Queue[bytes]]:
    """What arrives, for as long as verification takes it; measuring is done without a reader."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    async with Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(f"{PREFIX}:*")

        async def read() -> None:
            async for message in pubsub.listen():
                if message["type"] == "pmessage":
                    arrived.put_nowait(message["data"])

        reading = asyncio.create_task(read())
        try:
            yield arrived
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def verify(name: str, send: Send, arrived: asyncio.Queue[bytes]) -> None:
    """Raise unless each of many concurrent messages arrives once, with what was sent in it."""
    sent = 512
    await asyncio.gather(*(send() for _ in range(sent)))
    async with asyncio.timeout(5):
        bodies = [orjson.loads(await arrived.get()) for _ in range(sent)]
    ids = {body["message_id"] for body in bodies}
    if len(ids) != sent or not arrived.empty():
        raise AssertionError(f"{name}: {len(ids)} of {sent} messages arrived once")
    if any(body["payload"]["user_id"] != event().user_id for body in bodies):
        raise AssertionError(f"{name}: other payloads arrived than were sent")


async def rate(send: Send, callers: int, seconds: float) -> float:
    """Messages a second of so many callers, each awaiting its own receipt before it goes on."""
    sent, started = 0, perf_counter()
    end = started + seconds

    async def call() -> None:
        nonlocal sent
        while perf_counter() < end:
            await send()
            sent += 1

    await asyncio.gather(*(call() for _ in range(callers)))
    return sent / (perf_counter() - started)
