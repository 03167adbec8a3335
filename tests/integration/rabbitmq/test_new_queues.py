"""New queues: what a kill of RabbitMQ loses of them, and many of them at once."""

import asyncio

import pytest

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _retained, _subscription
from diator.brokers.rabbitmq._channel import SAFE_AFTER
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerUnavailable
from tests.integration.rabbitmq.helpers import COUNTED, OTHER, SLACK, counted, number_of, numbers

PATIENT = ReconnectPolicy(connect_timeout=20.0, idle_timeout=1.0, probe_timeout=2.0, max_delay=0.5)
"""After a kill, RabbitMQ answers before its queues are available."""


@pytest.mark.timeout(180)
async def test_a_kill_loses_nothing_that_was_confirmed_or_requeued_before(private_rabbitmq, monkeypatch):
    """The group, the delay bucket and the queue of retained messages are declared just before it."""
    for module in (_subscription, _retained):
        monkeypatch.setattr(module, "SAFE_AFTER", SAFE_AFTER)
    async with (
        RabbitMQMessageBroker(private_rabbitmq.url, reconnect=PATIENT) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
    ):
        await broker.send_messages([counted(number, topic=OTHER) for number in range(10)])
        await broker.send_messages([counted(number) for number in range(10)])
        for _ in range(8):
            await (await anext(deliveries)).retry(after=3.0)
        await asyncio.to_thread(private_rabbitmq.kill)
    private_rabbitmq.let_go()
    await asyncio.to_thread(private_rabbitmq.start)

    async with (
        RabbitMQMessageBroker(private_rabbitmq.url, reconnect=PATIENT) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
        broker.subscribe([OTHER], group="readers") as others,
    ):
        assert await asyncio.wait_for(numbers(others, 10), 3 * SLACK) == [*range(10)]
        came = set()
        while len(came) < 10:
            came |= {*await asyncio.wait_for(numbers(deliveries, 1), 3 * SLACK)}
    private_rabbitmq.let_go()


async def test_many_topics_have_more_time_and_are_declared_at_once(rabbitmq_url, prefix, plain):
    topics = [Topic("notification_event", f"Many{number}") for number in range(100)]
    quick = ReconnectPolicy(connect_timeout=1.0)
    async with (
        RabbitMQMessageBroker(rabbitmq_url, prefix, reconnect=quick) as broker,
        broker.subscribe(topics, group="readers") as deliveries,
    ):
        await broker.send_messages([counted(number, topic=topic) for number, topic in enumerate(topics)])
        assert sorted(await numbers(deliveries, 100)) == [*range(100)]
    for topic in topics:
        for end in ("readers", "readers:dead"):
            await plain.queue_delete(f"{prefix}:{':'.join(topic)}:{end}")


async def test_an_error_says_what_rabbitmq_has_not_done_in_time(rabbitmq_url, prefix, monkeypatch):
    monkeypatch.setattr(_subscription, "SAFE_AFTER", 60.0)
    monkeypatch.setattr(_subscription, "_EACH_TOPIC", -59.5)
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, timeout=1.0) as broker:
        with pytest.raises(BrokerUnavailable, match=r"has not declared the queues of 1 topic within 1\.5 s"):
            await broker.subscribe([COUNTED], group="readers").__aenter__()


@pytest.mark.timeout(180)
async def test_a_restart_delivers_what_was_held_before_later_messages(private_rabbitmq, monkeypatch):
    """A restarted queue takes back what lost consumers held only after it has started new ones."""
    for module in (_subscription, _retained):
        monkeypatch.setattr(module, "SAFE_AFTER", SAFE_AFTER)
    async with (
        RabbitMQMessageBroker(private_rabbitmq.url, reconnect=PATIENT, extra_prefetch=0) as broker,
        broker.subscribe([COUNTED], group="readers", prefetch=50) as deliveries,
    ):
        await broker.send_messages([counted(number) for number in range(500)])
        for _ in range(3):
            held = [await anext(deliveries) for _ in range(10)]
            await asyncio.to_thread(private_rabbitmq.kill)
            await asyncio.to_thread(private_rabbitmq.start)
            came = await asyncio.wait_for(numbers(deliveries, 100), 3 * SLACK)
            assert came == [*range(came[0], came[0] + 100)]
            assert came[0] <= number_of(held[0])  # the last acknowledgements may not have arrived before the kill
