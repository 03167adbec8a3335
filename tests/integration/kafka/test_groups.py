"""Consumers of a group: rebalances, leaving, ending."""

import asyncio
from collections import Counter
from uuid import uuid4

from tests.integration.kafka.helpers import SLACK, acked, all_that_comes, message, number_of, send, subscribed, take


async def test_running_handlers_finish_before_their_partition_is_reassigned(broker) -> None:
    group = f"group-{uuid4().hex}"
    await send(broker, *range(40))
    async with subscribed(broker, group=group, prefetch=40) as one:
        held = await take(one, 40)
        joining = asyncio.create_task(take_from_new_member(broker, group))
        await asyncio.sleep(0.6)
        assert not joining.done()  # it waits for the handlers of the other consumer

        for delivery in held:
            await delivery.ack()
        # With keys the messages are in all partitions; without keys the client may put all into one.
        await broker.send_messages([message(number, key=str(number)) for number in range(40, 80)])
        mine = asyncio.create_task(acked_until_cancelled(one))
        others = await joining
        mine.cancel()
        await asyncio.wait({mine})

    assert not {*others} & {*range(40)}


async def take_from_new_member(broker, group) -> list[int]:
    async with subscribed(broker, group=group) as deliveries:
        return await acked(deliveries, 1)


async def acked_until_cancelled(deliveries) -> None:
    while True:
        await acked(deliveries, 1, within=60)


async def test_no_message_is_lost_while_consumers_join_and_leave(make, kafka_servers) -> None:
    """Eight rebalances under traffic: prefetched messages that were not handed out are redelivered."""
    group, broker = f"group-{uuid4().hex}", await make(kafka_servers, drain_timeout=1.0)
    handled: Counter[int] = Counter()

    async def handle(deliveries) -> None:
        async for delivery in deliveries:
            await asyncio.sleep(0.001)
            handled[number_of(delivery)] += 1
            await delivery.ack()

    async def send_all() -> None:
        for number in range(0, 1_000, 20):
            await send(broker, *range(number, number + 20))
            await asyncio.sleep(0.1)

    async with subscribed(broker, group=group) as staying, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(handle(staying))
        sending = tasks.create_task(send_all())
        for _ in range(4):
            async with subscribed(broker, group=group) as coming:
                other = asyncio.create_task(handle(coming))
                await asyncio.sleep(1.0)
                other.cancel()
                await asyncio.wait({other})
        await sending
        async with asyncio.timeout(60):
            while len(handled) < 1_000:  # noqa: ASYNC110  # several consumers handle them
                await asyncio.sleep(0.1)
        reading.cancel()

    assert {*handled} == {*range(1_000)}
    assert sum(handled.values()) - 1_000 <= 4  # each cancellation may leave one handled message unacknowledged


async def test_settling_after_the_partition_is_lost_has_no_effect(make, kafka_servers) -> None:
    """The partition belongs to another consumer by then, which may be at another offset."""
    group, broker = f"group-{uuid4().hex}", await make(kafka_servers, drain_timeout=0.3)
    await asyncio.gather(*(send(broker, number, key=str(number)) for number in range(40)))
    async with subscribed(broker, group=group, prefetch=40) as one:
        held = await take(one, 40)
        async with subscribed(broker, group=group, prefetch=40) as two:
            other = await take(two, 1)
            lost = {number_of(each) for each in [*other, *await take(two, 9)]}
            late = [each for each in held if number_of(each) in lost]
            for delivery in late:
                await delivery.ack()
                assert delivery.outcome == "ack"
            await asyncio.sleep(0.5)
        async with subscribed(broker, group=group, prefetch=40) as three:
            again = {number_of(each) for each in await take(three, 10)}

    assert late
    assert again <= {*range(40)}


async def test_prefetch_ends_at_a_window_beyond_the_oldest_unfinished(make, kafka_servers) -> None:
    """It stays paused after a rebalance, in which aiokafka forgets the paused partitions."""
    group = f"group-{uuid4().hex}"
    broker = await make(kafka_servers, max_unacked_per_partition=20, extra_prefetch=10, partitions=1, drain_timeout=0.2)
    await send(broker, *range(200))
    async with subscribed(broker, group=group, prefetch=10) as deliveries:
        (oldest,) = await take(deliveries, 1)
        assert 0 < len(await all_that_comes(deliveries)) <= 20 + 10 + 10

        await oldest.ack()
        assert await acked(deliveries, 1)
        async with subscribed(broker, group=group):
            pass
        await asyncio.sleep(1.0)  # two rebalances are over
        (oldest,) = await take(deliveries, 1)
        assert 0 < len(await all_that_comes(deliveries)) <= 20 + 10 + 10


async def test_a_connection_that_is_being_opened_is_closed_too(make, proxy, proxied, monkeypatch) -> None:
    """The client forgets a connection if the task that opens it is cancelled during the metadata request."""
    monkeypatch.setattr("diator.brokers.kafka._client._LEAVING_THE_START", SLACK)
    proxy.delay(0.02)
    for steps in range(10):
        broker = await make(proxied)
        entering = asyncio.create_task(send(broker, 1))
        await asyncio.sleep(0.02 * steps)
        entering.cancel()
        await asyncio.wait({entering})
        await broker.aclose()


async def test_ending_while_kafka_is_away_cancels_no_caller(make, private_kafka) -> None:
    broker, ended = await make(private_kafka.url), []
    await send(broker, 0)

    async def read() -> None:
        async with subscribed(broker) as deliveries:
            await take(deliveries, 1)
            await asyncio.to_thread(private_kafka.kill)
            await asyncio.sleep(1.0)
        ended.append(True)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        await asyncio.sleep(0)

    assert ended


async def test_a_reader_without_a_group_misses_nothing_while_it_has_no_connection(make, proxy, proxied, private_kafka):
    reader, sender, gaps = await make(proxied), await make(private_kafka.url), []
    async with subscribed(reader, group=None, on_gap=gaps.append) as deliveries:
        await send(sender, 0)
        assert await acked(deliveries, 1) == [0]
        proxy.refuse()
        proxy.reset()
        await send(sender, *range(1, 50))
        await asyncio.sleep(0.5)
        await proxy.heal()
        came = await acked(deliveries, 49)

    assert sorted(came) == [*range(1, 50)]
    assert gaps == []
