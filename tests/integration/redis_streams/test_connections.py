"""Connections of a reader: idle ones, broken ones, and streams that are deleted."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from time import monotonic

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from diator.brokers.base import Topic
from diator.brokers.codec import encode
from diator.brokers.redis._connection import CommandConnection
from diator.exceptions import BrokerClosed, BrokerUnavailable, OutcomeUnknown
from diator.testing.fault_proxy import Flow
from tests.integration.redis_streams.helpers import (
    COUNTED,
    LEASE,
    LONG,
    SLACK,
    TIMEOUT,
    acked,
    message,
    nothing_left,
    number_of,
    send,
    subscribed,
    take,
)


async def test_a_quiet_stream_is_not_a_broken_connection(make, redis_url, admin, prefix, broker) -> None:
    """No read fails, whether the client's timeout is shorter or longer than a blocking read."""

    async def connections() -> set[str]:
        return {each["id"] for each in await admin.client_list() if each["name"] == prefix}

    name = {"client_name": prefix}
    async with (
        Redis.from_url(redis_url, socket_timeout=0.5, **name) as hasty,
        Redis.from_url(redis_url, socket_timeout=0.5, retry=Retry(ConstantBackoff(0.01), 5), **name) as stubborn,
        Redis.from_url(redis_url, socket_timeout=None, protocol=3, **name) as patient,
        AsyncExitStack() as stack,
    ):
        everyone = []
        for number, address in enumerate([hasty, stubborn, patient, f"{redis_url}?client_name={prefix}"]):
            subscription = subscribed(await make(address, timeout=0.8), group=f"group-{number}")
            everyone.append(await stack.enter_async_context(subscription))
        await asyncio.sleep(0.1)
        before = await connections()
        await asyncio.sleep(8)

        assert await connections() == before
        assert len(before) == 8  # each broker has one that reads and one for commands
        await send(broker, 1)
        for deliveries in everyone:
            assert await acked(deliveries, 1) == [1]


@pytest.mark.parametrize("what", ["the stream", "all of it", "everything"])
async def test_the_stream_is_deleted_while_it_is_read(*, make, private_redis, prefix, caplog, what) -> None:
    """The broker creates the group again and reports a gap. Settling the held deliveries has no effect."""
    gaps = []
    async with Redis.from_url(private_redis.url) as admin:
        broker = await make(private_redis.url)
        async with subscribed(broker, on_gap=gaps.append) as deliveries:
            await send(broker, 1)
            [held] = await take(deliveries, 1)
            await asyncio.sleep(0.1)
            if what == "everything":
                await admin.flushdb()
            else:
                await admin.delete(*await admin.keys(f"{prefix}*{'' if what == 'all of it' else ':Counted'}"))
            await send(broker, 2)

            assert await acked(deliveries, 1) == [2]
            await held.ack()
            await asyncio.sleep(0.1)
            await send(broker, 3)
            assert await acked(deliveries, 1) == [3]

    assert 0 < len([record for record in caplog.records if "reconnecting" in record.message]) < 10
    assert len(gaps) == 1


@pytest.mark.parametrize("fault", ["cut", "reset", "silence"])
@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_loses_nothing(
    *, make, proxy, proxied_url, broker, admin, stream, fault
) -> None:
    """Connections break in the middle of replies too. Messages in flight are redelivered when their lease expires."""
    got = Counter()
    reader = await make(proxied_url)

    async def break_it() -> None:
        for _ in range(4):
            await asyncio.sleep(random.uniform(0.02, 0.1))
            match fault:
                case "cut":
                    proxy.withhold(Flow.TO_CLIENT)
                    await asyncio.sleep(0.02)
                    proxy.cut()
                case "reset":
                    proxy.reset()
                case "silence":
                    proxy.black_hole(Flow.TO_CLIENT)
                    await asyncio.sleep(0.5)
            await proxy.heal()

    async with subscribed(reader, prefetch=10) as deliveries:
        breaking = asyncio.create_task(break_it())
        for first in range(0, 500, 50):
            await send(broker, *range(first, first + 50))
            await asyncio.sleep(0.02)
        async with asyncio.timeout(60):
            while len(got) < 500:
                delivery = await anext(deliveries)
                got[number_of(delivery)] += 1
                await delivery.ack()
        await breaking
        while True:  # messages whose acknowledgement was lost
            try:
                await acked(deliveries, 1, within=LEASE + SLACK)
            except TimeoutError:
                break
        await nothing_left(admin, stream)

    assert got.keys() == {*range(500)}


async def test_messages_in_flight_are_delivered_by_the_next_connection(make, proxy, proxied_url, broker) -> None:
    """The message is pending for this consumer already, so it is not delayed by its lease."""
    reader = await make(proxied_url, lease=LONG)
    async with subscribed(reader) as deliveries:
        await asyncio.sleep(0.1)
        proxy.withhold(Flow.TO_CLIENT)
        await send(broker, 1, 2)
        await asyncio.sleep(0.1)
        proxy.cut()
        await proxy.heal()

        assert sorted(await acked(deliveries, 2, within=2 + SLACK)) == [1, 2]


async def test_messages_in_flight_are_delivered_although_claiming_them_fails_once(
    *, make, proxy, proxied_url, admin, stream, monkeypatch
) -> None:
    """The next connection breaks too, after it claimed the first of two, which must not occupy a slot forever."""
    execute, claims = CommandConnection.execute, 0

    async def fail_once(self, *command, **options):
        nonlocal claims
        if command[0] == b"XCLAIM" and b"JUSTID" not in command:
            claims += 1
            if claims == 2:
                raise OutcomeUnknown("the connection to Redis failed")
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", fail_once)
    reader = await make(proxied_url, lease=LONG)
    async with subscribed(reader, prefetch=1) as deliveries:
        await asyncio.sleep(0.1)
        proxy.withhold(Flow.TO_CLIENT)
        async with admin.pipeline(transaction=True) as both:  # so that both are in one reply
            for number in (1, 2):
                both.xadd(stream, {"body": encode(message(number), max_bytes=1000)})
            await both.execute()
        await asyncio.sleep(0.1)
        proxy.cut()
        await proxy.heal()

        assert sorted(await acked(deliveries, 2)) == [1, 2]
    assert claims > 2


async def test_entering_has_a_time_limit(make, proxy, proxied_url) -> None:
    broker = await make(proxied_url)
    proxy.black_hole()
    async with asyncio.timeout(TIMEOUT + SLACK):
        with pytest.raises(BrokerUnavailable):
            async with subscribed(broker):
                pass


@pytest.mark.parametrize("outage", ["refuse", "black_hole"])
async def test_the_end_is_bounded_in_an_outage(make, proxy, proxied_url, broker, outage) -> None:
    """One timeout limits all remaining commands."""
    reader = await make(proxied_url)
    topics = [COUNTED, *(Topic("notification_event", f"other-{n}") for n in range(5))]
    async with subscribed(reader, *topics) as deliveries:
        await send(broker, *range(10))
        first, *_ = await take(deliveries, 5)
        getattr(proxy, outage)()
        if outage == "refuse":
            proxy.cut()
        await first.ack()
        ending = monotonic()

    assert monotonic() - ending < TIMEOUT + SLACK


async def test_closing_the_broker_ends_the_subscription(broker) -> None:
    async with subscribed(broker) as deliveries:
        await broker.aclose()
        with pytest.raises(BrokerClosed):
            await take(deliveries, 1)
