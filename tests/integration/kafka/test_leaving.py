"""A consumer that leaves while it joins its group."""

import asyncio
from contextlib import suppress
from uuid import uuid4

import pytest
from aiokafka import ConsumerRebalanceListener
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.group import JoinGroupRequest

from diator.brokers.kafka._consumer import KafkaConsumer
from tests.integration.kafka.helpers import SLACK, acked, message, send, subscribed, take


@pytest.fixture
async def broker(make, kafka_servers):
    """A broker that forgives a dead consumer for longer than any test waits."""
    return await make(kafka_servers, session_timeout=50.0, drain_timeout=50.0)


async def join(broker, group) -> None:
    async with subscribed(broker, group=group):
        await asyncio.Event().wait()


async def test_a_consumer_that_waits_for_the_others_leaves_at_once(broker, admin, prefix) -> None:
    """Kafka answers nothing else on the connection of the join, until the others have settled what they hold."""
    group = f"group-{uuid4().hex}"

    async def members() -> int:
        (answer,) = await admin.describe_consumer_groups([f"{prefix}.{group}"])
        return len(answer.groups[0][5])

    await send(broker, 1)
    async with subscribed(broker, group=group) as one:
        (held,) = await take(one, 1)
        joining = asyncio.create_task(join(broker, group))
        async with asyncio.timeout(SLACK):
            while await members() < 2:  # noqa: ASYNC110  # Kafka sends no event for it
                await asyncio.sleep(0.02)
        joining.cancel()
        await asyncio.wait({joining})

        assert await members() == 1
        await held.ack()


async def test_a_consumer_leaves_before_it_has_its_name_in_the_group(broker, monkeypatch) -> None:
    """Kafka keeps a place for the name that it has given, and the group waits for it until its session ends."""
    group, answered, arrives = f"group-{uuid4().hex}", asyncio.Event(), asyncio.Event()
    send_request = AIOKafkaClient.send

    async def late(client, node, request, **options):
        answer = await send_request(client, node, request, **options)
        if type(request) is JoinGroupRequest and not answered.is_set():
            answered.set()
            await arrives.wait()
        return answer

    async with subscribed(broker, group=group) as one:
        monkeypatch.setattr(AIOKafkaClient, "send", late)
        joining = asyncio.create_task(join(broker, group))
        await answered.wait()
        joining.cancel()
        await asyncio.wait({joining}, timeout=0.5)
        arrives.set()
        await asyncio.wait({joining})

        async with subscribed(broker, group=group) as two:
            await broker.send_messages([message(number, key=str(number)) for number in range(40)])
            first = [asyncio.create_task(acked(each, 1, within=SLACK)) for each in (one, two)]
            await asyncio.gather(*first)


async def test_what_the_client_starts_while_it_ends_is_ended_too(broker, name) -> None:
    """The client swallows a cancellation while it waits for a task of its own, and goes on until the next one."""
    joined = asyncio.Event()

    class Listener(ConsumerRebalanceListener):
        async def on_partitions_revoked(self, revoked) -> None:
            pass

        async def on_partitions_assigned(self, assigned) -> None:
            joined.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    await send(broker, 1)
    before = asyncio.all_tasks()
    consumer = KafkaConsumer(broker._cluster, broker._options, f"group-{uuid4().hex}")
    await consumer.start()
    consumer.join([name], Listener(), member_id="")
    await joined.wait()

    await consumer.end()

    assert asyncio.all_tasks() <= before
    assert not consumer.is_connected
