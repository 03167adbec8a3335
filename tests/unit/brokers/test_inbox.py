"""What a client pushes waits in the inbox of its connection until the subscription asks for it."""

import asyncio

import pytest

from diator.brokers.base import Delivery, Topic
from diator.brokers.inbox import Inbox


def delivery(number):
    return Delivery(topic=Topic("event", "counted"), body=b"%d" % number, headers={}, attempt=1, settler=None)


async def received(inbox, limit=10):
    async with asyncio.timeout(1):
        return [int(each.body) for each in await inbox.receive(limit)]


async def test_what_was_pushed_is_received_in_its_order_up_to_the_limit():
    inbox = Inbox()
    for number in range(5):
        inbox.put(delivery(number))

    assert [await received(inbox, 2), await received(inbox, 2), await received(inbox, 2)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(TimeoutError):
        await received(inbox)


async def test_a_waiting_call_receives_what_is_pushed_then():
    inbox = Inbox()
    waiting = asyncio.create_task(received(inbox))
    await asyncio.sleep(0)
    inbox.put(delivery(1))

    assert await waiting == [1]


async def test_a_cancelled_call_has_taken_nothing():
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.receive(10))
    await asyncio.sleep(0)
    inbox.put(delivery(1))
    waiting.cancel()
    await asyncio.wait([waiting])

    assert waiting.cancelled()
    assert await received(inbox) == [1]


async def test_the_answer_to_a_probe_is_one_empty_list_after_all_that_came_before_it():
    """Otherwise a lossy subscription would not know what the answer proves."""
    inbox = Inbox()
    inbox.put(delivery(1))
    inbox.put(delivery(2))
    inbox.note_answer()
    inbox.put(delivery(3))

    assert [await received(inbox, 1), await received(inbox, 5)] == [[1], [2]]
    assert [await received(inbox), await received(inbox)] == [[], [3]]
    inbox.note_answer()
    assert await received(inbox) == []
    with pytest.raises(TimeoutError):
        await received(inbox)


async def test_a_lost_connection_is_an_error_at_once_and_nothing_is_received_any_more():
    inbox = Inbox()
    waiting = asyncio.create_task(received(inbox))
    await asyncio.sleep(0)
    inbox.fail(ConnectionError("lost"))
    with pytest.raises(ConnectionError):
        await waiting
    inbox.put(delivery(1))
    for _ in range(2):
        with pytest.raises(ConnectionError, match="lost"):
            await received(inbox)


async def test_what_was_never_received_can_be_taken_out():
    inbox = Inbox()
    inbox.put(delivery(1))
    inbox.note_answer()
    inbox.put(delivery(2))

    assert [each.body for each in inbox.take_all()] == [b"1", b"2"]
    assert await received(inbox) == []
    with pytest.raises(TimeoutError):
        await received(inbox)
