"""A link to Kafka stalls or breaks, and the group rebalances."""

import asyncio
from time import monotonic
from uuid import uuid4

from aiokafka.admin import RecordsToDelete
from aiokafka.client import AIOKafkaClient, ConnectionGroup

from tests.integration.kafka.helpers import (
    SLACK,
    acked,
    all_that_comes,
    committed,
    number_of,
    place_of_everything,
    send,
    subscribed,
    take,
)


async def test_a_stall_that_is_shorter_than_the_session_costs_no_rebalance(make, proxy, proxied, private_kafka):
    reader, sender = await make(proxied), await make(private_kafka.url)  # the session is 6 s, and a probe takes 1 s
    async with subscribed(reader, group=f"group-{uuid4().hex}") as deliveries:
        await send(sender, 0)
        assert await acked(deliveries, 1) == [0]
        await asyncio.sleep(0.5)
        member, accepted = deliveries.member_id, proxy.accepted

        proxy.withhold()
        await send(sender, *range(1, 20))
        await asyncio.sleep(3.5)
        assert deliveries.connected
        await proxy.heal()

        assert sorted(await acked(deliveries, 19, within=2.0)) == [*range(1, 20)]
        assert await all_that_comes(deliveries) == []
        assert deliveries.member_id == member
        assert proxy.accepted == accepted


async def test_a_lost_link_does_not_cost_the_rest_of_the_session(make, proxy, proxied, private_kafka):
    reader, sender = await make(proxied, session_timeout=25.0), await make(private_kafka.url)
    async with subscribed(reader, group=f"group-{uuid4().hex}") as deliveries:
        await send(sender, 0)
        assert await acked(deliveries, 1) == [0]
        await asyncio.sleep(0.5)  # it is committed
        member = deliveries.member_id
        proxy.refuse()
        proxy.reset()
        while deliveries.connected:  # noqa: ASYNC110  # it polls, as a health check does
            await asyncio.sleep(0.05)
        await send(sender, *range(1, 20))
        healed = monotonic()
        await proxy.heal()

        assert {*await acked(deliveries, 19)} == {*range(1, 20)}
        assert monotonic() - healed < 12.0
        assert deliveries.member_id == member


async def test_a_half_open_connection_to_the_group_is_replaced(make, proxy, proxied, private_kafka, monkeypatch):
    """The other connections live, and the client would wait for an answer as long as for a join: 40 s."""
    clients, construct = [], AIOKafkaClient.__init__

    def note(client, **settings) -> None:
        construct(client, **settings)
        clients.append(client)

    monkeypatch.setattr(AIOKafkaClient, "__init__", note)
    reader, sender, group = await make(proxied), await make(private_kafka.url), f"group-{uuid4().hex}"

    async def is_committed(count) -> None:
        async with asyncio.timeout(SLACK):
            while await committed_count() != count:  # noqa: ASYNC110  # Kafka sends no event for it
                await asyncio.sleep(0.1)

    async def committed_count() -> int:
        offsets = await committed(private_kafka.url, reader._names.group(group))
        return sum(each.offset for each in offsets.values() if each.offset > 0)

    async with subscribed(reader, group=group) as deliveries:
        await send(sender, 0)
        assert await acked(deliveries, 1) == [0]
        await is_committed(1)
        ports = {
            connection._writer.get_extra_info("sockname")[1]
            for client in clients
            for (_, kind), connection in client._conns.items()
            if kind is ConnectionGroup.COORDINATION
        }
        for link in proxy._links.values():
            link.black_holed = link.writers[0].get_extra_info("peername")[1] in ports

        await send(sender, 1)
        assert 1 in await acked(deliveries, 1)
        await is_committed(2)


async def test_a_consumer_is_connected_when_it_knows_its_partitions(make, kafka_servers):
    broker, group = await make(kafka_servers, partitions=1), f"group-{uuid4().hex}"
    await send(broker, 0)
    async with subscribed(broker, group=group) as one:
        (held,) = await take(one, 1)
        assert one.connected
        async with subscribed(broker, group=group) as two:  # it waits for the other consumer, and for 2 s at most
            assert not one.connected
            assert not two.connected
            await held.ack()
            async with asyncio.timeout(20):
                while not (one.connected and two.connected):  # noqa: ASYNC110  # it polls, as a health check does
                    await asyncio.sleep(0.05)

            await send(broker, 1)
            first, *_ = await asyncio.wait(
                {asyncio.create_task(take(each, 1)) for each in (one, two)}, return_when=asyncio.FIRST_COMPLETED
            )
            assert [number_of(delivery) for task in first for delivery in task.result()] == [1]


async def test_a_new_group_begins_at_the_oldest_message_that_is_left(broker, name, admin):
    gaps = []
    await send(broker, *range(10), key="k")
    await admin.delete_records({await place_of_everything(admin, name): RecordsToDelete(4)})

    async with subscribed(broker, group=f"group-{uuid4().hex}", on_gap=gaps.append) as deliveries:
        assert await acked(deliveries, 6) == [*range(4, 10)]

    assert gaps == []
