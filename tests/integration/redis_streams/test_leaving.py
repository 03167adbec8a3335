"""A consumer that leaves, or has lost its connection, while Redis or the network still has its last read."""

import asyncio

import pytest
from redis.asyncio import Redis

from diator.brokers.redis import _subscription
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import MessageRejected
from diator.testing.fault_proxy import Flow
from tests.integration.redis_streams.helpers import LONG, SLACK, acked, eventually, number_of, send, subscribed, take


@pytest.fixture
async def leaving(make, proxy, redis_url, prefix):
    """A broker whose commands go straight to Redis, and whose subscriptions read through the proxy."""
    async with Redis.from_url(redis_url, protocol=2, client_name=prefix) as client:
        broker = await make(client, lease=LONG, reconnect=ReconnectPolicy(idle_timeout=LONG, max_delay=0.1))
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


async def test_a_lost_connection_that_redis_still_has(*, leaving, patient, proxy, admin, prefix, monkeypatch) -> None:
    """Redis gives a message to the read that waits there, though the consumer has another connection by then."""
    monkeypatch.setattr(_subscription, "SCAN_EVERY", 3.0)  # so long does a read wait
    async with subscribed(leaving) as deliveries:
        await eventually(lambda: is_blocked(admin, prefix))
        proxy.black_hole_existing()
        for link in proxy._links.values():  # of the client alone: Redis does not notice it
            link.writers[0].transport.abort()
        await eventually(lambda: is_blocked(admin, prefix, times=2))

        await send(patient, 1)
        assert await acked(deliveries, 1, within=SLACK) == [1]
        await send(patient, 2)
        assert await acked(deliveries, 1, within=SLACK) == [2]


async def test_what_is_acknowledged_just_now_is_not_lost(patient, stream) -> None:
    """A new connection asks what the last one lost; the acknowledgement waits for others to be sent with."""
    async with subscribed(patient) as deliveries:
        await send(patient, 1)
        [delivery] = await take(deliveries, 1)
        await delivery.ack()

        assert await deliveries.lost_on_the_way(stream.encode()) == []


async def is_blocked(admin, name, *, times=1) -> bool:
    return sum(each["name"] == name and "b" in each["flags"] for each in await admin.client_list()) == times


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
