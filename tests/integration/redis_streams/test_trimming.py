"""Entries that are trimmed, before and after they are handled, and what a broker keeps."""

import asyncio
import gc

import pytest

from diator.brokers.base import Delivery, Topic
from tests.integration.redis_streams.helpers import (
    LEASE,
    LONG,
    acked,
    eventually,
    message,
    nothing_comes,
    nothing_left,
    number_of,
    pending,
    send,
    subscribed,
    take,
)


async def test_a_message_trimmed_before_it_was_handled(*, make, proxy, proxied_url, broker, admin, stream, caplog):
    """Another program's XTRIM on a lagging group is logged as an error, and the subscription goes on."""
    gone = await make(proxied_url, extra_prefetch=0)
    async with subscribed(gone, prefetch=5) as deliveries:
        await send(broker, *range(20))
        await take(deliveries, 5)
        proxy.refuse()
        proxy.cut()
        await admin.xtrim(stream, maxlen=2, approximate=False)

        async with subscribed(broker) as others:
            assert await acked(others, 2) == [18, 19]
            await asyncio.sleep(LEASE + 1.2)
            await send(broker, 20)
            assert await acked(others, 1) == [20]
            await asyncio.sleep(0.05)
            assert await pending(admin, stream) == 0

    removed = [record for record in caplog.records if record.levelname == "ERROR" and "removed" in record.message]
    assert removed
    assert "5 messages" in removed[0].message


@pytest.mark.usefixtures("quick")
async def test_retention_removes_messages_that_every_group_has_finished(make, redis_url, admin, stream) -> None:
    """It removes nothing else: neither unread nor pending messages."""
    broker = await make(redis_url, lease=LONG, retention=0.2)
    await admin.xgroup_create(stream, "slow", "0", mkstream=True)
    await send(broker, *range(10))

    async def length(expected) -> None:
        async def holds() -> bool:
            return await admin.xlen(stream) == expected

        await eventually(holds)
        await asyncio.sleep(0.3)
        assert await holds()

    async with subscribed(broker) as deliveries:
        fast = await take(deliveries, 10)
        for delivery in fast[:4] + fast[5:]:
            await delivery.ack()
        await asyncio.sleep(0.5)
        await length(10)
        entries = await admin.xreadgroup("slow", "one", {stream: ">"})
        await admin.xack(stream, "slow", *[entry for entry, _ in entries[0][1]])
        await length(6)
        await fast[4].ack()
        await length(1)


@pytest.mark.usefixtures("quick")
async def test_retention_is_about_retries_too(make, redis_url, admin, stream) -> None:
    broker = await make(redis_url, lease=LONG, retention=0.1)
    async with subscribed(broker) as deliveries:
        await send(broker, *range(10))
        for delivery in await take(deliveries, 10):
            await delivery.retry()
        await acked(deliveries, 10)

        async def trimmed() -> bool:
            return await admin.xlen(f"{stream}:billing:again") <= 1

        await eventually(trimmed)


async def test_without_retention_nothing_is_removed(broker, admin, stream) -> None:
    async with subscribed(broker) as deliveries:
        await send(broker, *range(10))
        await acked(deliveries, 10)
        await asyncio.sleep(1.2)

    assert await admin.xlen(stream) == 10


@pytest.mark.parametrize(("prefetch", "ahead"), [(1, 0), (5, 10)])
async def test_prefetch_is_bounded(*, make, redis_url, admin, stream, prefetch, ahead) -> None:
    """Redis has delivered that many and not one more, so that other consumers of the group have work."""
    broker = await make(redis_url, lease=LONG, extra_prefetch=ahead)
    await send(broker, *range(200))
    async with subscribed(broker, prefetch=prefetch) as deliveries:
        for _ in range(10):
            await asyncio.sleep(0.05)
            assert await pending(admin, stream) <= prefetch + ahead
            await acked(deliveries, 1)
        assert await acked(deliveries, 150) == [*range(10, 160)]


async def test_prefetch_is_bounded_over_all_topics(make, redis_url, admin, prefix) -> None:
    broker = await make(redis_url, lease=LONG, extra_prefetch=2)
    topics = [Topic("notification_event", f"topic-{n}") for n in range(5)]
    for topic in topics:
        await broker.send_messages([message(n, topic) for n in range(20)])
    async with subscribed(broker, *topics, prefetch=2) as deliveries:
        await asyncio.sleep(0.1)
        held = [await pending(admin, f"{prefix}:{topic.message_type}:{topic.message_name}") for topic in topics]
        assert sum(held) <= 4
        assert len(await acked(deliveries, 100)) == 100


async def test_no_more_than_prefetch_are_given_out_and_not_settled(patient) -> None:
    await send(patient, *range(20))
    async with subscribed(patient, prefetch=3) as deliveries:
        first, *_ = await take(deliveries, 3)
        await nothing_comes(deliveries)
        await first.ack()
        assert [number_of(each) for each in await take(deliveries, 1)] == [3]
        await nothing_comes(deliveries)


@pytest.mark.usefixtures("quick")
async def test_settled_deliveries_leave_nothing_behind(broker, admin, stream) -> None:
    """Each way of settling counts."""

    def deliveries_there() -> int:
        gc.collect()
        return sum(type(each) is Delivery for each in gc.get_objects())

    before = deliveries_there()  # the traceback of a test that failed keeps some
    async with subscribed(broker) as deliveries:
        await send(broker, *range(300))
        async with asyncio.timeout(60):
            for _ in range(400):
                delivery = await anext(deliveries)
                if number_of(delivery) % 3 == 0 and delivery.attempt == 1:
                    await delivery.retry()
                elif number_of(delivery) % 3 == 1:
                    await delivery.dead_letter("bad")
                else:
                    await delivery.ack()
        await nothing_left(admin, stream)
        del delivery

        async def nothing_is_kept() -> bool:
            return deliveries_there() <= before

        await eventually(nothing_is_kept)
