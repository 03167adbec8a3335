"""Exchanges and queues: other settings, deletion, and the audit."""

import asyncio
import gc
import logging
from time import monotonic

import pytest
from aiormq.connection import Connection

from diator.brokers.audit import audit
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _subscription
from diator.brokers.rabbitmq._client import Address
from diator.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    MessageUnroutable,
)
from tests.integration.rabbitmq.helpers import COUNTED, RECONNECT, SLACK, become, collect, counted, numbers
from tests.records import fields


async def test_a_queue_with_other_settings_is_a_clear_error(broker, plain, queue):
    await plain.declare_queue(queue, durable=True, arguments={"x-queue-type": "classic"})

    with pytest.raises(ConfigurationError, match=r"inequivalent arg 'x-.*delete the queue"):
        await collect(broker)


async def test_a_queue_that_gets_other_settings_while_it_is_read_ends_the_subscription(broker, plain, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:

        async def replace():
            await plain.queue_delete(queue)
            await plain.declare_queue(queue, durable=True, arguments={"x-queue-type": "classic"})

        waiting = asyncio.create_task(anext(deliveries))
        await replace()
        with pytest.raises(ConfigurationError, match="delete the queue"):
            await asyncio.wait_for(waiting, RECONNECT.max_delay + SLACK)


async def test_a_deleted_queue_is_declared_again_and_reported_as_a_gap(broker, plain, queue):
    gaps = []
    async with broker.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        await broker.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]

        await plain.queue_delete(queue)

        await become(gaps.__len__, 1)
        await broker.send_message(counted(2))
        assert await numbers(deliveries, 1) == [2]
    assert "queue is gone" in gaps[0].reason


async def test_a_deleted_exchange_is_declared_again_and_reported_as_a_gap(rabbitmq_url, brokers, plain, prefix):
    """RabbitMQ does not notify the consumers whose queues were bound to it. They notice it long before they probe."""
    gaps = []
    broker = await brokers.enter_async_context(RabbitMQMessageBroker(rabbitmq_url, prefix))
    async with broker.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        await plain.exchange_delete(prefix)

        await become(gaps.__len__, 1)
        await broker.send_message(counted(2))
        assert await numbers(deliveries, 1) == [2]


async def test_a_binding_that_somebody_removed_is_made_again(broker, plain, prefix, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await (await plain.get_queue(queue)).unbind(prefix, "notification_event.Counted")
        await asyncio.sleep(2 * RECONNECT.idle_timeout)

        await broker.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]


async def test_a_queue_lost_while_no_consumer_was_connected_is_a_gap(behind_proxy, proxy, plain, queue):
    gaps = []
    async with behind_proxy.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        proxy.refuse()
        proxy.reset()
        await plain.queue_delete(queue)
        await proxy.heal()

        await become(gaps.__len__, 1)
        await behind_proxy.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]


async def test_a_lost_connection_alone_is_not_a_gap(behind_proxy, proxy):
    gaps = []
    async with behind_proxy.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
        before = proxy.accepted
        proxy.reset()
        await become(lambda: proxy.accepted, before + 1)
        await behind_proxy.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]
    assert gaps == []


async def test_a_subscription_without_a_group_takes_its_queue_along(reporting):
    async with reporting.subscribe([COUNTED]):
        await reporting.send_message(counted())
    with pytest.raises(MessageUnroutable):
        await reporting.send_message(counted())


async def test_an_audit_of_declared_queues_reports_nothing(broker):
    async with broker.subscribe([COUNTED], group="readers"):
        await broker.send_message(counted())
        assert await audit(broker) == []


async def test_an_audit_reports_missing_and_different_queues(broker, plain, queue, prefix):
    async with broker.subscribe([COUNTED], group="readers"):
        await plain.queue_delete(f"{queue}:dead")
        await plain.declare_queue(f"{queue}:dead", durable=True, arguments={"x-queue-type": "classic"})
        otherwise = await audit(broker)
        await plain.queue_delete(f"{queue}:dead")
        gone = await audit(broker)
    assert [(each.capability, "x-queue-type" in each.problem) for each in otherwise] == [("dead_letter", True)]
    assert [(each.capability, "is gone" in each.problem) for each in gone] == [("dead_letter", True)]


async def test_a_secret_is_in_no_error_log_or_repr(caplog, prefix):
    caplog.set_level(logging.DEBUG)
    broker = RabbitMQMessageBroker(f"amqp://guest:swordfish-{prefix}@127.0.0.1:1/", prefix, timeout=1.0)
    texts = [repr(broker), repr(vars(broker))]
    for doing in (broker.send_message(counted()), broker.subscribe([COUNTED]).__aenter__()):
        with pytest.raises(BrokerUnavailable) as caught:
            await doing
        texts += [repr(caught.value), repr(caught.value.__cause__)]
    await broker.aclose()

    assert not [text for text in [*texts, caplog.text] if f"swordfish-{prefix}" in text]


async def test_nothing_is_left_when_it_is_closed(rabbitmq_url, prefix):
    tasks = len(asyncio.all_tasks())
    async with (
        RabbitMQMessageBroker(rabbitmq_url, prefix) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
    ):
        await broker.send_message(counted(1))
        await numbers(deliveries, 1)
    await asyncio.sleep(0.05)
    gc.collect()

    assert len(asyncio.all_tasks()) == tasks


async def test_cancelled_when_it_has_just_connected_it_leaves_no_connection(rabbitmq_url, monkeypatch):
    """The client connects in its own task, which may finish just when the waiting caller is cancelled."""
    connect, tasks = Connection.connect, asyncio.all_tasks()

    async def connect_and_cancel(connection):
        await connect(connection)
        raise asyncio.CancelledError

    monkeypatch.setattr(Connection, "connect", connect_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await Address(rabbitmq_url, None).dial("testing")

    async with asyncio.timeout(30):
        await asyncio.wait(asyncio.all_tasks() - tasks)


async def test_cancelled_as_it_begins_to_consume_it_ends_at_once(broker, monkeypatch):
    """RabbitMQ does not answer a close of a channel on which it has not yet confirmed a consumer."""
    ask, consuming = _subscription.Connection.ask_now, asyncio.Event()

    def noticed(reading, frame):
        if isinstance(frame, _subscription.commands.Basic.Consume):
            consuming.set()
        return ask(reading, frame)

    monkeypatch.setattr(_subscription.Connection, "ask_now", noticed)
    async with broker.subscribe([COUNTED], group="readers"):
        pass
    await broker.send_messages([counted(number) for number in range(10)])
    for _ in range(10):
        consuming.clear()
        entering = asyncio.create_task(broker.subscribe([COUNTED], group="readers").__aenter__())
        await consuming.wait()
        began = monotonic()
        entering.cancel()
        await asyncio.wait({entering})
        assert monotonic() - began < 1


async def test_a_dead_letter_survives_any_number_of_looks(broker, plain, queue):
    """The management page returns a message to its queue at each look; RabbitMQ 4 counts that."""
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_message(counted(1))
        await (await anext(deliveries)).dead_letter("no good")
    dead = await plain.get_queue(f"{queue}:dead")
    for _ in range(30):
        await (await dead.get()).nack(requeue=True)

    assert await dead.get(no_ack=True)


async def test_a_dead_letter_queue_of_before_is_used_and_the_audit_names_it(broker, plain, queue, caplog):
    """It has RabbitMQ's limit of deliveries."""
    await plain.declare_queue(f"{queue}:dead", durable=True, arguments={"x-queue-type": "quorum"})

    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_message(counted(1))
        await (await anext(deliveries)).dead_letter("no good")
        (finding,) = await audit(broker)

    assert (await plain.get_queue(f"{queue}:dead")).declaration_result.message_count == 1
    assert finding.capability == "dead_letter"
    assert "x-delivery-limit" in finding.problem
    assert f"{queue}:dead" in finding.problem
    [line, *_] = [each for each in caplog.records if "x-delivery-limit" in each.message and "as it is" in each.message]
    of_all = {"broker": "RabbitMQMessageBroker", "group": "readers", "message_names": ["Counted"]}
    assert fields(line) == {**of_all, "source": queue, "error_type": "Refused"}


async def test_a_channel_for_one_question_is_forgotten(raw):
    assert not await raw.is_there(_subscription.passively("nowhere"))

    assert [*raw.connection.channels] == [raw.number]
