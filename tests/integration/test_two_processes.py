"""One process sends and another consumes: what happens to messages when the consumer or its connection ends."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from time import time
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker
from tests.integration.consuming import asked_to_end, consuming, until
from tests.integration.transports import broker_for

MANY = 10_000


@pytest.fixture
async def admin(redis_url) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
async def prefix(admin) -> AsyncIterator[str]:
    prefix = f"test-{uuid4()}"
    yield prefix
    if keys := await admin.keys(f"{prefix}*"):
        await admin.delete(*keys)


def message(number) -> Message:
    return Message.create(message_name="Counted", payload={"number": number})


@pytest.mark.parametrize("scheme", ["redis", "redis-streams"])
async def test_a_consumer_is_asked_to_end(admin, redis_url, prefix, tmp_path, scheme) -> None:
    """It finishes the running handlers, and nothing else; the next consumer of a stream gets the rest at once."""
    address = f"{redis_url.replace('redis', scheme, 1)}?client_name={prefix}"
    async with broker_for(address, prefix) as broker, AsyncExitStack() as stack:
        first, before = await stack.enter_async_context(consuming(address, prefix, tmp_path, seconds=0.5))
        await listening(admin, prefix, 3)
        await broker.send_messages([message(number) for number in range(100)])
        await until(lambda: len(before.read().begun) >= 16)
        await asked_to_end(first)
        done = before.read().handled
        assert Counter(number for number, _ in before.begun) == done
        assert 16 <= done.total() < 100
        if scheme == "redis-streams":
            second, after = await stack.enter_async_context(consuming(address, prefix, tmp_path))
            await until(lambda: after.read().handled.total() >= 100 - done.total())
            await asked_to_end(second)
            assert after.read().handled + done == Counter(range(100))


async def test_a_subscriber_is_cut_off_under_load(admin, redis_url, prefix, tmp_path) -> None:
    """Missed messages are lost: the log and `on_gap` report the time of the gap."""
    times: dict[int, tuple[float, float]] = {}
    address = f"{redis_url}?client_name={prefix}"
    async with (
        RedisMessageBroker.from_url(redis_url, prefix) as broker,
        consuming(address, prefix, tmp_path, seconds=0) as (process, ledger),
    ):
        await listening(admin, prefix, 2)
        number = cut = 0
        while cut < 3 or not ledger.gaps[2:] or number < MANY:
            ledger.read()
            for _ in range(100):
                sent = time()
                await broker.send_message(message(number))
                times[number] = sent, time()
                number += 1
            if cut < 3 and number >= (cut + 1) * MANY / 4 and len(ledger.gaps) == cut:
                for client in await admin.client_list(_type="pubsub"):
                    if client["name"] == prefix:
                        await admin.client_kill_filter(_id=client["id"])
                        cut += 1
        await until(lambda: number - 1 in ledger.read().handled)
        log = await asked_to_end(process)

    gaps, heard = ledger.gaps, Counter(number for number, _ in ledger.ended)
    missed = times.keys() - heard.keys()
    assert len(gaps) == 3 == log.count("may have been missed")
    assert missed
    assert max(heard.values()) == 1
    for number in missed:
        sent, confirmed = times[number]
        assert any(since <= confirmed and sent <= until for since, until in gaps)
    assert len(missed) < MANY / 2


async def listening(admin, prefix, count) -> None:
    """Wait for *count* connections: each broker with this prefix has one that sends and one that reads."""
    async with asyncio.timeout(60):
        while sum(each["name"] == prefix for each in await admin.client_list()) < count:  # noqa: ASYNC110  # Redis shows no more
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
