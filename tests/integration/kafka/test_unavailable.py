"""Kafka is unreachable, is frozen, or refuses connections."""

import asyncio
import json

import pytest

from diator.brokers.kafka import KafkaMessageBroker
from diator.exceptions import (
    BrokerUnavailable,
    OutcomeUnknown,
)
from diator.testing.fault_proxy import Flow
from tests.integration.kafka.helpers import (
    COUNTED,
    SLACK,
    TIMEOUT,
    message,
    number_of_each,
    on_its_way,
    send,
    stored,
    subscribed,
    within,
)


async def test_every_call_ends_when_kafka_freezes(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)

    async with within(TIMEOUT + SLACK):
        results = await asyncio.gather(*(broker.send_message(message(n)) for n in range(20)), return_exceptions=True)
    async with within(TIMEOUT + SLACK):
        (refused,) = await asyncio.gather(broker.send_message(message(99)), return_exceptions=True)
    async with within(TIMEOUT + SLACK):
        await broker.aclose()

    assert {type(result) for result in results} == {OutcomeUnknown}
    place = f"{broker._names.topic(COUNTED)}, partition "
    assert all(f"{place}" in str(result) and "all in-sync replicas" in str(result) for result in results)
    assert isinstance(refused, BrokerUnavailable)
    await asyncio.to_thread(private_kafka.unpause)


async def test_closing_takes_no_longer_than_the_calls_that_it_waits_for(make, private_kafka) -> None:
    broker = await make(private_kafka.url, partitions=1)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    sending = [asyncio.create_task(broker.send_message(message(1)))]
    await on_its_way(broker)
    sending.append(asyncio.create_task(broker.send_message(message(2))))  # it is not in flight
    await asyncio.sleep(0)
    async with within(TIMEOUT + SLACK):
        await broker.aclose()
    results = await asyncio.gather(*sending, return_exceptions=True)
    await asyncio.to_thread(private_kafka.unpause)
    assert [type(each) for each in results] == [OutcomeUnknown, BrokerUnavailable]


async def test_a_broken_producer_is_replaced(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    with pytest.raises(OutcomeUnknown):
        await broker.send_message(message(1))
    await asyncio.to_thread(private_kafka.unpause)

    await send(broker, 2)

    assert number_of_each(await stored(private_kafka.url, broker._names.topic(COUNTED))) >= {0, 2}


async def test_a_message_whose_confirmation_is_lost_is_stored_once(make, proxy, proxied, name, private_kafka) -> None:
    """The client resends it by itself. Kafka recognises the duplicate by its sequence number."""
    broker = await make(proxied, timeout=5.0)
    await send(broker, 0, key="k")
    proxy.withhold(Flow.TO_CLIENT)
    sending = asyncio.create_task(broker.send_message(message(1, key="k")))
    while len(await stored(private_kafka.url, name)) == 1:  # noqa: ASYNC110  # until it is stored; its confirmation is withheld
        await asyncio.sleep(0.05)
    proxy.reset()
    await proxy.heal()

    await sending

    assert [json.loads(each.value)["payload"]["number"] for each in await stored(private_kafka.url, name)] == [0, 1]


async def test_an_address_that_refuses_connections_fails_at_once(prefix) -> None:
    broker = KafkaMessageBroker("127.0.0.1:1", prefix)

    async with within(SLACK):
        with pytest.raises(BrokerUnavailable):
            await broker.send_message(message(0))
    async with within(SLACK):
        with pytest.raises(BrokerUnavailable):
            await subscribed(broker).__aenter__()
    await broker.aclose()


async def test_the_second_address_does_for_the_first(make, kafka_servers) -> None:
    broker = await make(f"127.0.0.1:1,{kafka_servers}")

    await send(broker, 0)
