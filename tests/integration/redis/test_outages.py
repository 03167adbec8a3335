"""Redis is away, restarts, freezes, is busy, or breaks connections."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker
from diator.exceptions import (
    BrokerUnavailable,
    OutcomeUnknown,
)
from diator.testing.fault_proxy import BOTH, FaultProxy, Flow
from tests.integration.redis.helpers import SLACK, TIMEOUT, Ears, listening, message, promised, send_all
from tests.services import Service


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_redis_restarts_between_two_messages(private_redis: Service, prefix: str, end: str) -> None:
    async with RedisMessageBroker.from_url(private_redis.url, prefix) as broker:
        await broker.send_message(message(1))

        await asyncio.to_thread(getattr(private_redis, end))
        await asyncio.to_thread(private_redis.start)

        async with listening(private_redis.url, prefix) as ears:
            await broker.send_message(message(2))
            assert await ears.numbers() == [2]


async def test_redis_is_down_for_a_while(private_redis: Service, prefix: str) -> None:
    """Sends fail in time while Redis is down, and are not sent later; a program can start without Redis."""
    async with RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT) as broker:
        await asyncio.to_thread(private_redis.kill)
        sent = message()
        async with promised():
            with pytest.raises(BrokerUnavailable) as raised:
                await broker.send_message(sent)
        assert raised.value.message_id == sent.message_id
        async with promised():
            assert await send_all(broker, *range(100)) == {BrokerUnavailable: 100}
        another = RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT)
        with pytest.raises(BrokerUnavailable):
            await another.__aenter__()

        await asyncio.to_thread(private_redis.start)

        async with listening(private_redis.url, prefix) as ears, another:
            await broker.send_message(message(1))
            await another.send_message(message(2))
            assert await ears.numbers() == [1, 2]


async def test_a_frozen_redis(private_redis: Service, prefix: str) -> None:
    async with RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT) as broker:
        await asyncio.to_thread(private_redis.pause)
        async with promised():
            assert await send_all(broker, 1, 2, 3) == {OutcomeUnknown: 3}
        async with promised():
            assert await send_all(broker, 4, 5, 6) == {BrokerUnavailable: 3}
        await asyncio.to_thread(private_redis.unpause)

        assert await send_all(broker, 7, 8, 9) == {None: 3}


@pytest.mark.parametrize("flows", [(Flow.TO_SERVER,), (Flow.TO_CLIENT,), BOTH])
async def test_a_half_open_connection(
    proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears, flows: tuple[Flow, ...]
) -> None:
    """The network loses all data: on the open connection, then on each new one, until it heals."""
    proxy.black_hole(*flows)
    async with promised():
        assert await send_all(proxied, *range(10)) == {OutcomeUnknown: 10}
    async with promised():
        assert await send_all(proxied, *range(10, 20)) == {BrokerUnavailable: 10}
    await proxy.heal()

    async with promised(0):
        assert await send_all(proxied, *range(20, 30)) == {None: 10}

    arrived = [] if Flow.TO_SERVER in flows else list(range(10))
    assert await ears.numbers() == arrived + list(range(20, 30))


async def test_refused_connections(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(0.05)
    async with promised(0):
        assert await send_all(proxied, *range(10)) == {BrokerUnavailable: 10}
    await proxy.heal()

    assert await send_all(proxied, *range(10)) == {None: 10}


@pytest.mark.parametrize("end", [FaultProxy.cut, FaultProxy.reset])
async def test_a_connection_ends_with_messages_in_flight(
    *, proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears, end: Callable[[FaultProxy], None]
) -> None:
    """All callers get OutcomeUnknown at once, and nothing is sent twice."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, timeout=3 * SLACK) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        sends = asyncio.create_task(send_all(broker, *range(100)))
        await asyncio.sleep(0.1)
        assert await ears.numbers() == list(range(100))

        end(proxy)
        async with asyncio.timeout(SLACK):
            assert await sends == {OutcomeUnknown: 100}
        await proxy.heal()

        assert await send_all(broker, 100) == {None: 1}
        assert await ears.numbers() == [100]


async def test_an_unwritten_message_is_not_sent(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    """The connection is lost in the same iteration of the event loop in which messages are sent."""
    proxy.withhold(Flow.TO_CLIENT)
    first = asyncio.create_task(send_all(proxied, 0))
    await asyncio.sleep(0.1)
    link = proxied._service._link
    assert link is not None

    link._connection._writer.transport.abort()
    others = await send_all(proxied, *range(1, 100))
    await proxy.heal()

    assert await first == {OutcomeUnknown: 1}
    assert others == {BrokerUnavailable: 99}
    assert await ears.numbers() == [0]


async def test_every_result_is_true(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    """Connections break at random: confirmed messages arrive once, unsent ones never, unknown ones at most once."""
    moments = random.Random(7)  # the same moments in each run
    results: dict[int, type | None] = {}

    async def work(worker: int) -> None:
        for n in range(worker * 1000, worker * 1000 + 60):
            ((results[n],),) = [await send_all(proxied, n)]
            await asyncio.sleep(moments.random() / 100)

    async def trouble() -> None:
        while True:
            await asyncio.sleep(moments.random() / 20)
            moments.choice([proxy.cut, proxy.reset])()

    troublemaker = asyncio.create_task(trouble())
    await asyncio.gather(*map(work, range(20)))
    troublemaker.cancel()
    proxy.cut()
    await asyncio.sleep(0.1)

    times = Counter(await ears.numbers())
    assert Counter(results.values()).keys() >= {None, OutcomeUnknown}
    assert results.keys() == {worker * 1000 + n for worker in range(20) for n in range(60)}
    assert {times[n] for n, result in results.items() if result is None} == {1}
    assert {times[n] for n, result in results.items() if result is BrokerUnavailable} <= {0}
    assert {times[n] for n, result in results.items() if result is OutcomeUnknown} <= {0, 1}


async def test_redis_closes_an_idle_connection(broker: RedisMessageBroker, ears: Ears, prefix: str) -> None:
    for n in range(3):
        (own,) = [each["id"] for each in await ears.client.client_list() if each["name"] == prefix]
        await ears.client.client_kill_filter(_id=own)
        await asyncio.sleep(0.05)

        await broker.send_message(message(n))

    assert await ears.numbers() == [0, 1, 2]


async def test_an_idle_connection_is_reset(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    for n in range(3):
        proxy.reset()
        await asyncio.sleep(0.05)

        await proxied.send_message(message(n))

    assert await ears.numbers() == [0, 1, 2]


async def test_a_script_keeps_redis_busy(private_redis: Service, prefix: str) -> None:
    """The refusal is temporary and not about the message."""
    async with Redis.from_url(private_redis.url, socket_timeout=None) as client:
        await client.config_set("busy-reply-threshold", 50)
        async with RedisMessageBroker.from_url(private_redis.url, prefix) as broker:
            script = asyncio.create_task(client.eval("while true do end", 0))
            await asyncio.sleep(0.3)

            results = await send_all(broker, 1)

            await client.script_kill()
            assert isinstance((await asyncio.gather(script, return_exceptions=True))[0], Exception)
            assert results == {BrokerUnavailable: 1}
            assert await send_all(broker, 2) == {None: 1}


async def test_redis_takes_no_more_clients(private_redis: Service, prefix: str) -> None:
    async with Redis.from_url(private_redis.url, single_connection_client=True) as client:
        await client.config_set("maxclients", 1)
        async with promised():
            with pytest.raises(BrokerUnavailable):
                await RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT).send_message(message())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_dead_connection_is_dropped_with_its_unwritten_bytes(
    proxy: FaultProxy, proxied_url: str, prefix: str
) -> None:
    """A closed connection and its unwritten bytes are released, even if the service no longer reads."""

    def established() -> int:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
        return sum(row[2].endswith(f":{proxy.port:04X}") and row[3] == "01" for row in rows)

    large = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 24_000_000})
    broker = RedisMessageBroker.from_url(proxied_url, prefix, timeout=TIMEOUT, max_message_bytes=32_000_000)
    async with broker:
        proxy.withhold()
        with pytest.raises(OutcomeUnknown):
            await broker.send_message(large)
        await asyncio.sleep(0.1)
        assert established() == 0
