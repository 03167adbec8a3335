"""The in-memory broker as a bounded queue of encoded messages."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from diator.brokers import Message
from diator.brokers.codec import MAX_MESSAGE_BYTES
from diator.brokers.memory import MemoryMessageBroker
from diator.exceptions import BrokerClosed, ConfigurationError, MessageRejected, MessageTooLarge


def message(number=0, **options):
    return Message.create(message_name="counted", payload={"number": number}, **options)


def test_it_promises_what_its_report_says():
    """The report was written for these promises. If this fails, run `nox -s conformance` again."""
    promised = asdict(MemoryMessageBroker().capabilities)

    report = json.loads((Path(__file__).parents[3] / "docs" / "conformance" / "memory.json").read_text())
    sets = {name: sorted(each) for name, each in promised.items() if isinstance(each, frozenset)}
    assert promised | sets == report["capabilities"]


async def test_receive_returns_the_message_that_was_sent():
    broker = MemoryMessageBroker()
    sent = message(key="7", headers={"trace": "x"})

    await broker.send_message(sent)

    assert await broker.receive() == sent


async def test_messages_keep_their_order():
    broker = MemoryMessageBroker()
    for number in range(10):
        await broker.send_message(message(number))

    received = [await broker.receive() for _ in range(10)]

    assert [each.payload["number"] for each in received] == [*range(10)]


async def test_receive_waits_for_a_message():
    broker = MemoryMessageBroker()
    receiving = asyncio.create_task(broker.receive())
    await asyncio.sleep(0)

    await broker.send_message(sent := message())

    assert await receiving == sent


async def test_its_length_is_the_number_of_waiting_messages():
    broker = MemoryMessageBroker()
    await broker.send_message(message())
    await broker.send_message(message())

    await broker.receive()

    assert len(broker) == 1


async def test_a_message_beyond_the_capacity_is_rejected_and_none_is_dropped():
    broker = MemoryMessageBroker(capacity=2)
    await broker.send_message(message(1))
    await broker.send_message(message(2))

    with pytest.raises(
        MessageRejected, match=r"is full, 2 messages are waiting; start a consumer or raise capacity"
    ) as caught:
        await broker.send_message(third := message(3))

    assert caught.value.message_id == third.message_id
    assert [(await broker.receive()).payload["number"] for _ in range(2)] == [1, 2]


async def test_by_default_10_000_messages_may_wait():
    broker, sent = MemoryMessageBroker(), message()
    for _ in range(10_000):
        await broker.send_message(sent)

    with pytest.raises(MessageRejected, match="is full, 10,000 messages are waiting"):
        await broker.send_message(sent)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity):
    """At once, and not only when a message is sent."""
    with pytest.raises(ConfigurationError, match=r"^capacity must be a whole number of at least 1"):
        MemoryMessageBroker(capacity=capacity)


async def test_a_message_that_is_too_large_is_rejected():
    broker = MemoryMessageBroker(max_message_bytes=100)

    with pytest.raises(MessageTooLarge) as caught:
        await broker.send_message(sent := message())

    assert (caught.value.message_id, caught.value.limit) == (sent.message_id, 100)
    assert len(broker) == 0


async def test_a_message_up_to_its_own_limit_is_received():
    broker = MemoryMessageBroker(max_message_bytes=2 * MAX_MESSAGE_BYTES)
    sent = Message.create(message_name="counted", payload={"text": "x" * (MAX_MESSAGE_BYTES + 1)})
    await broker.send_message(sent)

    assert await broker.receive() == sent


async def test_a_closed_broker_refuses_messages_and_still_returns_the_waiting_ones():
    broker = MemoryMessageBroker()
    await broker.send_message(sent := message())

    await broker.aclose()
    await broker.aclose()

    with pytest.raises(BrokerClosed, match=r": this broker is closed$") as caught:
        await broker.send_message(refused := message())
    assert caught.value.message_id == refused.message_id
    assert await broker.receive() == sent
    with pytest.raises(BrokerClosed, match=r"^this broker is closed$"):
        await broker.receive()


async def test_the_end_of_its_context_closes_the_broker():
    async with MemoryMessageBroker() as broker:
        await broker.send_message(message())

    with pytest.raises(BrokerClosed):
        await broker.send_message(message())
