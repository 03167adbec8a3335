"""Messages to an exchange: confirms, returns, alarms, outages."""

import asyncio
import json
from datetime import UTC, datetime
from time import monotonic
from uuid import uuid4

import aio_pika
import pytest

from diator.brokers.audit import audit
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.exceptions import (
    BrokerError,
    BrokerUnavailable,
    EncodingError,
    MessageRejected,
    MessagesNotSent,
    MessageUnroutable,
    OutcomeUnknown,
)
from tests.integration.rabbitmq.helpers import COUNTED, OTHER, RECONNECT, SLACK, collect, counted, numbers
from tests.records import fields


async def test_a_plain_client_reads_properties_headers_and_body(broker, plain, prefix):
    mine = await plain.declare_queue(exclusive=True)
    await mine.bind(prefix, "notification_event.*")
    message = counted(7, key="k", headers={"trace": "ä"})

    await broker.send_message(message)

    got = await mine.get()
    assert (got.message_id, got.type, got.content_type) == (str(message.message_id), "Counted", "application/json")
    assert got.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
    assert abs((datetime.now(UTC) - got.timestamp).total_seconds()) < 60
    assert got.headers == {"trace": "ä", "key": "k"}
    assert json.loads(got.body)["payload"]["number"] == 7


async def test_an_unroutable_message_is_reported_if_the_program_says_so(reporting):
    message = counted()

    with pytest.raises(MessageUnroutable, match=r"notification_event\.Counted") as caught:
        await reporting.send_message(message)

    assert caught.value.message_id == message.message_id


async def test_unroutable_messages_are_dropped_if_the_program_says_so(rabbitmq_url, prefix):
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, unroutable="drop") as broker:
        await broker.send_message(counted())

        assert broker.capabilities.unroutable == "dropped"


async def test_each_of_several_messages_with_one_id_has_its_own_send_error(reporting):
    """RabbitMQ returns a message without saying which of the messages with the same id it is."""
    await collect(reporting)
    one_id = uuid4()
    routed, unroutable = counted(message_id=one_id), counted(topic=OTHER, message_id=one_id)

    results = await asyncio.gather(
        *(reporting.send_message(each) for each in [unroutable, routed] * 20), return_exceptions=True
    )

    assert [type(result) for result in results] == [MessageUnroutable, type(None)] * 20


async def test_one_bad_message_among_many_is_named(reporting):
    await collect(reporting)
    messages = [counted(), counted(topic=OTHER), counted()]

    with pytest.raises(MessagesNotSent) as caught:
        await reporting.send_messages(messages)

    assert caught.value.message_ids == (messages[1].message_id,)
    assert isinstance(caught.value.__cause__, MessageUnroutable)


async def test_a_full_queue_refuses(broker, plain, prefix):
    """`reject-publish`: RabbitMQ answers with a nack."""
    full = await plain.declare_queue(exclusive=True, arguments={"x-max-length": 2, "x-overflow": "reject-publish"})
    await full.bind(prefix, "notification_event.Counted")

    results = await asyncio.gather(*(broker.send_message(counted(n)) for n in range(5)), return_exceptions=True)

    assert [type(result) for result in results] == [type(None)] * 2 + [MessageRejected] * 3


async def test_after_the_exchange_was_deleted_each_message_has_a_result_and_the_next_is_sent(broker, plain, prefix):
    await collect(broker)
    await broker.send_message(counted())
    await plain.exchange_delete(prefix)

    results = await asyncio.gather(*(broker.send_message(counted(n)) for n in range(50)), return_exceptions=True)
    await collect(broker)  # this binds the queue again
    await broker.send_message(counted())

    assert all(isinstance(result, BrokerError) for result in results)
    await plain.exchange_delete(prefix)
    with pytest.raises(BrokerUnavailable):
        await broker.send_message(counted())  # it is sent alone, so RabbitMQ's answer is about it: it was not sent


async def test_an_unavailable_service_raises_errors_of_diator(behind_proxy, proxy):
    await collect(behind_proxy)
    proxy.refuse()
    proxy.reset()
    await asyncio.sleep(0.1)

    with pytest.raises(BrokerUnavailable):
        await behind_proxy.send_message(counted())

    await proxy.heal()
    await behind_proxy.send_message(counted())


@pytest.mark.timeout(180)
async def test_an_alarm_is_reported_in_time_and_the_message_arrives_after_it(private_rabbitmq, caplog):
    async with (
        RabbitMQMessageBroker(private_rabbitmq.url, timeout=3.0, reconnect=RECONNECT) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
    ):
        await broker.send_message(counted(1))
        await asyncio.to_thread(private_rabbitmq.run, "rabbitmqctl set_vm_memory_high_watermark 0.000001")
        began = monotonic()

        with pytest.raises(OutcomeUnknown, match="alarm"):
            await broker.send_message(counted(2))

        assert monotonic() - began < 3.0 + SLACK
        assert await numbers(deliveries, 1) == [1]  # consumers still receive
        assert [finding.capability for finding in await audit(broker)] == ["receipt"]
        await asyncio.to_thread(private_rabbitmq.run, "rabbitmqctl set_vm_memory_high_watermark 0.6")
        assert await numbers(deliveries, 1) == [2]
        await broker.send_message(counted(3))
        assert await numbers(deliveries, 1) == [3]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("diator")]
    assert [message for message in messages if "stopped reading from publishers" in message]
    of_publisher = [each for each in caplog.records if "from publishers" in each.getMessage()]
    assert {each.levelname for each in of_publisher} == {"WARNING"}
    assert [*map(fields, of_publisher)] == [{"broker": "RabbitMQMessageBroker", "where": broker.where}] * 2
    private_rabbitmq.let_go()


async def test_headers_that_mean_something_to_rabbitmq_are_refused(broker):
    for name in ("CC", "BCC", "x-death", "x-delivery-count", "diator-attempt"):
        with pytest.raises(EncodingError, match=name):
            await broker.send_message(counted(headers={name: "1"}))


async def test_headers_that_are_too_large_are_refused_alone(broker):
    await collect(broker)
    sends = [broker.send_message(counted(headers={"h": "x" * 140_000})), broker.send_message(counted())]

    assert [type(each) for each in await asyncio.gather(*sends, return_exceptions=True)] == [
        MessageRejected,
        type(None),
    ]


async def test_a_thousand_callers_share_one_connection(behind_proxy, proxy):
    await collect(behind_proxy)
    before = proxy.accepted

    await asyncio.gather(*(behind_proxy.send_message(counted(n)) for n in range(1_000)))

    assert proxy.accepted <= before + 1
