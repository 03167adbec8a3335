"""A consumer that leaves while Redis, or the network, still has its last read."""

import asyncio

import pytest
from redis.asyncio import Redis

from diator.brokers.redis import _subscription
from diator.exceptions import MessageRejected
from diator.testing.fault_proxy import Flow
from tests.integration.redis_streams.helpers import LONG, SLACK, acked, eventually, number_of, send, subscribed, take


@pytest.fixture
async def leaving(make, proxy, redis_url, prefix):
    """A broker whose commands go straight to Redis, and whose subscriptions read through the proxy."""
    async with Redis.from_url(redis_url, protocol=2, client_name=prefix) as client:
        broker = await make(client, lease=LONG)
        client.connection_pool.connection_kwargs.update(host=proxy.host, port=proxy.port)
        yield broker


async def has_left(proxy) -> bool:
    return proxy.clients == 0


async def test_a_read_that_arrives_when_its_consumer_leaves(leaving, patient, proxy, monkeypatch) -> None:
    """The commands that return messages go another way, and may overtake the one that takes them."""
    reading, send_command = asyncio.Event(), _subscription.send_command

    async def note(*command) -> None:
        await send_command(*command)
        reading.set()

    monkeypatch.setattr(_subscription, "send_command", note)
    async with subscribed(patient):
        pass  # now there is a group
    await send(patient, 1, 2)
    subscription = subscribed(leaving)
    await subscription.__aenter__()
    proxy.withhold(Flow.TO_SERVER)
    await reading.wait()
    end = asyncio.create_task(subscription.__aexit__(None, None, None))
    await eventually(lambda: has_left(proxy))
    await asyncio.wait({end}, timeout=0.5)
    await proxy.heal()
    await end

    async with subscribed(patient) as others:
        assert await acked(others, 2, within=SLACK) == [1, 2]


async def test_a_message_that_comes_while_its_consumer_leaves(leaving, patient, proxy, admin, prefix) -> None:
    """Redis gives it to the read that waits, unless it knows of the end."""
    async with subscribed(patient):
        pass
    subscription = subscribed(leaving)
    await subscription.__aenter__()
    await eventually(lambda: is_blocked(admin, prefix))
    proxy.withhold(Flow.TO_SERVER)
    end = asyncio.create_task(subscription.__aexit__(None, None, None))
    await eventually(lambda: has_left(proxy))
    await send(patient, 1, 2)
    await asyncio.wait({end}, timeout=0.5)
    await proxy.heal()
    await end

    async with subscribed(patient) as others:
        assert await acked(others, 2, within=SLACK) == [1, 2]


async def is_blocked(admin, name) -> bool:
    return any(each["name"] == name and "b" in each["flags"] for each in await admin.client_list())


async def test_a_message_that_could_not_be_settled_was_delivered(patient, admin, stream) -> None:
    """It is charged an attempt, as one that was not settled at all."""
    async with subscribed(patient) as deliveries:
        await send(patient, 1)
        [delivery] = await take(deliveries, 1)
        await admin.set(f"{stream}:billing:delayed", "not a sorted set")
        with pytest.raises(MessageRejected):
            await delivery.retry(after=5.0)
    await admin.delete(f"{stream}:billing:delayed")

    async with subscribed(patient) as others:
        [again] = await take(others, 1)
        assert (number_of(again), again.attempt) == (1, 2)
        await again.ack()
