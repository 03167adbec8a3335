"""What a consumer commits, and what it does when a commit fails."""

import asyncio
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from tests.integration.kafka.helpers import (
    SLACK,
    TIMEOUT,
    acked,
    committed,
    number_of,
    send,
    subscribed,
    take,
    within,
)
from tests.records import fields


async def nothing_comes(deliveries, *, within=0.4) -> None:
    with pytest.raises(TimeoutError):
        await take(deliveries, 1, within=within)


async def test_the_commit_is_the_lowest_unfinished_offset(broker, kafka_servers, name) -> None:
    group = f"group-{uuid4().hex}"
    await send(broker, *range(10), key="k")
    async with subscribed(broker, group=group) as deliveries:
        taken = await take(deliveries, 10)
        for delivery in [*taken[:4], *taken[5:]]:
            await delivery.ack()
        await asyncio.sleep(0.5)

        told = await committed(kafka_servers, broker._names.group(group))
        (offset,) = [each.offset for each in told.values() if each.offset > 0]

    assert offset == 4
    async with subscribed(broker, group=group) as deliveries:
        assert [number_of(each) for each in await take(deliveries, 1)] == [4]
        await nothing_comes(deliveries)


async def test_offsets_are_committed_where_kafka_refuses_their_metadata(
    make, kafka_servers, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("diator.brokers.kafka._offsets.MAX_COMMIT_METADATA", 100_000)  # more than Kafka accepts
    broker, group = await make(kafka_servers, max_unacked_per_partition=2000), f"group-{uuid4().hex}"
    await send(broker, *range(2000), key="k")
    async with subscribed(broker, group=group, prefetch=2000) as deliveries:
        taken = await take(deliveries, 2000)
        for delivery in [*taken[:5], *taken[6::2]]:
            await delivery.ack()
    [record] = [each for each in caplog.records if "Kafka refuses the metadata of a commit" in each.getMessage()]
    assert fields(record)["group"] == group
    assert max(each.offset for each in (await committed(kafka_servers, broker._names.group(group))).values()) == 5
    async with subscribed(broker, group=group) as deliveries:
        assert (await acked(deliveries, 1995)) == [*range(5, 2000)]


async def test_a_subscription_ends_when_kafka_is_frozen(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    async with AsyncExitStack() as stack:
        deliveries = await stack.enter_async_context(subscribed(broker))
        (delivery,) = await take(deliveries, 1)
        await asyncio.to_thread(private_kafka.pause)
        await delivery.ack()
        async with within(TIMEOUT + SLACK):
            await stack.aclose()
    await asyncio.to_thread(private_kafka.unpause)

    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        while await acked(deliveries, 1, within=20) != [1]:
            pass  # the commit may have waited in the frozen service's buffers, or not
