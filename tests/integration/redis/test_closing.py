"""Cancelled calls, and the closing of a broker."""

import asyncio

import pytest
from redis.asyncio import Redis

from diator.brokers.redis import RedisMessageBroker
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    OutcomeUnknown,
)
from diator.testing.fault_proxy import FaultProxy, Flow
from tests.integration.redis.helpers import Ears, eventually, listening, message, no_connections, promised, send_all


async def test_a_cancelled_send_affects_no_other(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    """The cancelled call ends at once, and later replies still reach the right callers."""
    async with listening(proxied_url, prefix), RedisMessageBroker.from_url(proxied_url, prefix) as broker:

        def publish(n: int) -> asyncio.Task[int]:
            kind = "notification_event" if n % 2 else "unheard_event"
            return asyncio.create_task(broker.publish(message(n, message_type=kind)))

        proxy.withhold(Flow.TO_CLIENT)
        sends = [publish(n) for n in range(10)]
        await asyncio.sleep(0.1)
        sends[4].cancel()
        await asyncio.wait([sends[4]], timeout=0.1)
        assert sends[4].cancelled()
        await proxy.heal()

        assert await asyncio.gather(*sends[:4], *sends[5:]) == [0, 1, 0, 1, 1, 0, 1, 0, 1]
        assert await asyncio.gather(*map(publish, range(20))) == [0, 1] * 10


async def test_cancelling_the_call_that_connects(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """Callers that wait for the same connection do not depend on the one that makes it."""
    proxy.withhold(Flow.TO_CLIENT)
    broker = RedisMessageBroker.from_url(proxied_url, prefix, timeout=5)
    sends = [asyncio.create_task(broker.send_message(message(n))) for n in range(3)]
    await asyncio.sleep(0.1)
    sends[0].cancel()
    await proxy.heal()

    async with promised(0):
        await asyncio.gather(*sends[1:])

    assert await ears.numbers() == [1, 2]
    await broker.aclose()


async def test_a_cancelled_caller_leaves_its_room_to_the_next(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    """A call that is cancelled just when it gets a slot releases the slot."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=1) as broker:

        async def send_and_cancel_second() -> None:
            await broker.send_message(message(1))
            second.cancel()

        proxy.withhold(Flow.TO_CLIENT)
        first = asyncio.create_task(send_and_cancel_second())
        await asyncio.sleep(0)
        second = asyncio.create_task(broker.send_message(message(2)))
        third = asyncio.create_task(broker.send_message(message(3)))
        await asyncio.sleep(0.1)
        await proxy.heal()

        async with promised(0):
            await asyncio.wait([first, second, third])
        assert (first.exception(), second.cancelled(), third.exception()) == (None, True, None)
        assert await ears.numbers() == [1, 3]


async def test_a_closed_broker_sends_nothing(redis_url: str, prefix: str, ears: Ears) -> None:
    broker = RedisMessageBroker.from_url(redis_url, prefix)
    async with broker:
        await broker.send_message(message(1))
    await broker.aclose()
    sent = message(2)

    with pytest.raises(BrokerClosed) as raised:
        await broker.send_message(sent)
    with pytest.raises(BrokerClosed):
        await broker.__aenter__()

    assert raised.value.message_id == sent.message_id
    assert await send_all(broker, *range(10)) == {BrokerClosed: 10}
    assert await ears.numbers() == [1]


async def test_a_broker_closed_before_its_use(redis_url: str, prefix: str) -> None:
    broker = RedisMessageBroker.from_url(redis_url, prefix)
    await broker.aclose()

    assert await send_all(broker, 1) == {BrokerClosed: 1}


@pytest.mark.parametrize("calls", [1, 2])
async def test_closing_waits_for_the_answers_that_are_due(
    proxy: FaultProxy, proxied: RedisMessageBroker, calls: int
) -> None:
    """Every call of `aclose` does, also the second of two at once."""
    proxy.withhold(Flow.TO_CLIENT)
    sends = asyncio.create_task(send_all(proxied, *range(10)))
    await asyncio.sleep(0.05)
    closing = [asyncio.create_task(proxied.aclose()) for _ in range(calls)]
    await asyncio.sleep(0.1)
    done = [task for task in (sends, *closing) if task.done()]
    await proxy.heal()
    await asyncio.gather(*closing)

    assert done == []
    assert await sends == {None: 10}


async def test_closing_refuses_those_who_wait_for_room(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    broker = RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=4)
    async with broker:
        proxy.withhold(Flow.TO_CLIENT)
        sends = asyncio.create_task(send_all(broker, *range(10)))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(broker.aclose())
        await asyncio.sleep(0.1)
        await proxy.heal()
        await closing

        assert await sends == {None: 4, BrokerClosed: 6}
        assert await ears.numbers() == [0, 1, 2, 3]


async def test_closing_while_redis_is_dead(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.black_hole()
    sends = asyncio.create_task(send_all(proxied, *range(10)))
    await asyncio.sleep(0.1)

    async with promised():
        await proxied.aclose()

    assert await sends == {OutcomeUnknown: 10}


async def test_closing_an_idle_broker_while_redis_is_dead(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.black_hole()

    async with promised():
        await proxied.aclose()


async def test_closing_while_connecting(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """A connection that is established late is closed, and its callers get the right error."""
    proxy.withhold(Flow.TO_CLIENT)
    async with Redis.from_url(proxied_url, max_connections=2) as client:
        brokers = RedisMessageBroker.from_url(proxied_url, prefix), RedisMessageBroker(client, prefix)
        sends = [asyncio.create_task(send_all(broker, n)) for n, broker in enumerate(brokers)]
        await asyncio.sleep(0.1)
        closing = [asyncio.create_task(broker.aclose()) for broker in brokers]
        await asyncio.sleep(0.1)
        await proxy.heal()
        await asyncio.gather(*closing)

        results = [result for send in sends for result in await send]
        assert await asyncio.gather(client.ping(), client.ping())

    await eventually(lambda: no_connections(ears.client, prefix))
    assert set(results) <= {None, BrokerClosed, BrokerUnavailable}
    assert await ears.numbers() == [n for n, result in enumerate(results) if result is None]


async def test_a_cancelled_closing_can_be_done_again(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    """The cancelled call has not released the connection; the second call does."""
    async with Redis.from_url(proxied_url, max_connections=2) as client, RedisMessageBroker(client, prefix) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        send = asyncio.create_task(send_all(broker, 1))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(broker.aclose())
        await asyncio.sleep(0.05)
        closing.cancel()
        await asyncio.wait([closing])
        await proxy.heal()
        assert await send == {None: 1}

        await broker.aclose()

        assert await asyncio.gather(client.ping(), client.ping())


async def test_nothing_is_left_of_a_hundred_brokers(redis_url: str, prefix: str, ears: Ears) -> None:
    tasks = asyncio.all_tasks()
    for n in range(100):
        async with RedisMessageBroker.from_url(f"{redis_url}?client_name={prefix}", prefix) as broker:
            await broker.send_message(message(n))
        assert asyncio.all_tasks() == tasks

    await eventually(lambda: no_connections(ears.client, prefix))
    assert len(await ears.heard()) == 100
