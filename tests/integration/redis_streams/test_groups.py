"""Consumer groups, and what they read."""

import asyncio
import gc
import random
from collections import Counter

import pytest

from diator.brokers.base import Topic
from diator.brokers.redis import _subscription
from diator.brokers.redis._scripts import FORGET
from diator.brokers.redis._subscription import Subscription
from diator.exceptions import UnsupportedCapability
from tests.integration.redis_streams.helpers import (
    LONG,
    SLACK,
    acked,
    eventually,
    message,
    nothing_left,
    number_of,
    pending,
    send,
    subscribed,
    take,
)


async def test_without_a_group_no_progress_is_stored(broker) -> None:
    with pytest.raises(UnsupportedCapability, match="group"):
        async with subscribed(broker, group=None):
            pass


async def test_who_comes_after_the_first_message_gets_it(broker) -> None:
    await send(broker, 1, 2)
    async with subscribed(broker) as deliveries, subscribed(broker, group="mailing") as others:
        await send(broker, 3)

        assert await acked(deliveries, 3) == [1, 2, 3]
        assert await acked(others, 3) == [1, 2, 3]
    async with subscribed(broker) as deliveries:
        await send(broker, 4)
        assert await acked(deliveries, 1) == [4]


async def test_consumers_share_messages_and_groups_do_not(make, redis_url, broker) -> None:
    got = {name: Counter() for name in ("billing 1", "billing 2", "mailing")}

    async def read(broker, name) -> None:
        async with subscribed(broker, group=name.split()[0], prefetch=4) as deliveries:
            ready.release()
            async for delivery in deliveries:
                got[name][number_of(delivery)] += 1
                await asyncio.sleep(0.001)
                await delivery.ack()

    ready = asyncio.Semaphore(0)
    reading = [asyncio.create_task(read(await make(redis_url, extra_prefetch=0, lease=LONG), name)) for name in got]
    for _ in reading:
        await ready.acquire()
    for number in range(200):
        await broker.send_message(message(number))

    async def all_there() -> bool:
        return got["mailing"].total() >= 200 and (got["billing 1"] + got["billing 2"]).total() >= 200

    await eventually(all_there)
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    every = Counter(range(200))
    assert got["billing 1"] + got["billing 2"] == every == got["mailing"]
    assert min(got["billing 1"].total(), got["billing 2"].total()) > 20


async def test_one_consumer_receives_in_order(*, make, proxy, proxied_url, broker) -> None:
    """The order holds for first deliveries, over broken connections too."""
    reader = await make(proxied_url, lease=LONG)
    order = []
    async with subscribed(reader) as deliveries:
        for first in range(0, 500, 100):
            await send(broker, *range(first, first + 100))
            order += await acked(deliveries, 50)
            if first in (100, 300):
                await asyncio.sleep(0.1)
                proxy.cut()
                await asyncio.sleep(0.1)  # messages that Redis sent to a dead connection arrive later
        order += await acked(deliveries, 250)

    assert order == [*range(500)]


async def test_leaving_with_pending_work_loses_nothing(patient, admin, stream) -> None:
    """Others get the messages before the lease expires. A consumer that held none is removed at once, others later."""
    await send(patient, *range(20))
    async with subscribed(patient) as others:
        async with subscribed(patient) as deliveries:
            await send(patient, *range(20, 40))
            await asyncio.sleep(0.3)
            mine = await acked(deliveries, 1) if deliveries._received else []
        theirs = await acked(others, 40 - len(mine), within=2 + SLACK)

    assert sorted(mine + theirs) == [*range(40)]
    await nothing_left(admin, stream)


async def test_a_broker_that_is_closed_leaves_first(make, redis_url, patient, admin, stream) -> None:
    """The last acknowledgements are sent, and others get the rest at once, although the context goes on."""
    other = await make(redis_url, lease=LONG)
    await send(patient, *range(10))
    async with subscribed(other, prefetch=2) as deliveries:
        [first, _] = await take(deliveries, 2)
        await first.ack()
        await other.aclose()
        assert await pending(admin, stream) == 9

        async with subscribed(patient) as others:
            rest = await take(others, 9, within=2 + SLACK)
            assert [(number_of(each), each.attempt) for each in rest] == [(1, 2), *((n, 1) for n in range(2, 10))]
            for each in rest:
                await each.ack()
    await nothing_left(admin, stream)


async def test_consumers_that_left_are_removed(patient, admin, stream, monkeypatch) -> None:
    async with subscribed(patient) as deliveries:
        await send(patient, 1)
        await take(deliveries, 1)
    assert [each["pending"] for each in await admin.xinfo_consumers(stream, "billing")] == [1]  # or it would be lost

    monkeypatch.setattr(_subscription, "_FORGOTTEN_AFTER", 0.5)
    async with subscribed(patient) as deliveries:
        assert await acked(deliveries, 1) == [1]
        await asyncio.sleep(0.6)

    for each in (stream, f"{stream}:billing:again"):
        assert await admin.xinfo_consumers(each, "billing") == []


async def test_a_prefetched_message_does_not_count_as_an_attempt(patient, admin, stream) -> None:
    """Ten restarts with a prefetched message must not make it a poison message."""
    await send(patient, 1)
    for _ in range(3):
        async with subscribed(patient) as deliveries:
            async with asyncio.timeout(30):
                while not deliveries._received:  # noqa: ASYNC110  # nothing is received
                    await asyncio.sleep(0.01)
    async with subscribed(patient) as deliveries:
        [delivery] = await take(deliveries, 1)

        assert delivery.attempt == 1
        await delivery.ack()


async def test_leaving_under_traffic_strands_nothing(make, redis_url, patient, admin, stream) -> None:
    """Messages that Redis sends to a leaving consumer are not lost either."""
    got, sent, stop = Counter(), 0, asyncio.Event()

    async def publish() -> None:
        nonlocal sent
        while not stop.is_set():
            await patient.send_message(message(sent))
            sent += 1

    publishing = asyncio.create_task(publish())
    for _ in range(30):
        async with subscribed(await make(redis_url, lease=LONG, timeout=SLACK)) as deliveries:
            await asyncio.sleep(random.uniform(0.005, 0.03))
            got.update(await acked(deliveries, 1))
    stop.set()
    await publishing
    async with subscribed(patient) as deliveries:
        try:
            async with asyncio.timeout(3 + SLACK):
                while len(got) < sent:
                    got.update(await acked(deliveries, 1))
        except TimeoutError:
            stranded = await pending(admin, stream)
            pytest.fail(f"{sent - len(got)} of {sent} did not come; {stranded} are somebody's who is gone")

    await nothing_left(admin, stream)


async def test_leaving_one_topic_that_is_gone_leaves_the_others_too(patient, admin, prefix) -> None:
    """A deleted stream does not delay the pending messages of another."""
    gone, kept = Topic("notification_event", "gone"), Topic("notification_event", "kept")
    async with subscribed(patient, gone, kept) as deliveries:
        await patient.send_message(message(1, kept))
        await take(deliveries, 1)
        await asyncio.sleep(0.05)
        subscriptions = [each for each in gc.get_objects() if type(each) is Subscription]
        (group,) = [each.group for each in subscriptions if prefix.encode() in each.streams[0]]
        execute = group.execute

        async def deleted_first(*command, **options):
            if command[0] == b"EVAL" and command[1] is FORGET:
                await admin.delete(f"{prefix}:notification_event:gone")
            return await execute(*command, **options)

        group.execute = deleted_first
    async with subscribed(patient, kept) as deliveries:
        assert await acked(deliveries, 1, within=2 + SLACK) == [1]
