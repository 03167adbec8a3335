"""What a client pushes waits in the arrivals of its connection until the subscription asks for it."""

import asyncio

import pytest

from diator.brokers.arrivals import Arrivals
from diator.brokers.base import Delivery, Topic


def delivery(number):
    return Delivery(topic=Topic("event", "counted"), body=b"%d" % number, headers={}, attempt=1, settler=None)


async def received(arrivals, limit=10):
    async with asyncio.timeout(1):
        return [int(each.body) for each in await arrivals.receive(limit)]


async def test_what_was_pushed_is_received_in_its_order_up_to_the_limit():
    arrivals = Arrivals()
    for number in range(5):
        arrivals.put(delivery(number))

    assert [await received(arrivals, 2), await received(arrivals, 2), await received(arrivals, 2)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    with pytest.raises(TimeoutError):
        await received(arrivals)


async def test_what_an_earlier_connection_has_left_comes_first():
    arrivals = Arrivals()
    for number in range(3):
        arrivals.put(delivery(number))
    arrivals.note_answer()
    arrivals.fail(OSError("lost"))

    arrivals = Arrivals(arrivals.take_all())
    arrivals.put(delivery(3))

    assert [await received(arrivals, 2), await received(arrivals, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(TimeoutError):
        await received(arrivals)
    assert await received(Arrivals(iter([delivery(4)]))) == [4]


async def test_a_waiting_call_receives_what_is_pushed_then():
    arrivals = Arrivals()
    waiting = asyncio.create_task(received(arrivals))
    await asyncio.sleep(0)
    arrivals.put(delivery(1))

    assert await waiting == [1]


async def test_a_cancelled_call_has_taken_nothing():
    arrivals = Arrivals()
    waiting = asyncio.create_task(arrivals.receive(10))
    await asyncio.sleep(0)
    arrivals.put(delivery(1))
    waiting.cancel()
    await asyncio.wait([waiting])

    assert waiting.cancelled()
    assert await received(arrivals) == [1]


async def test_the_answer_to_a_probe_is_one_empty_list_after_all_that_came_before_it():
    """Otherwise a lossy subscription would not know what the answer proves."""
    arrivals = Arrivals()
    arrivals.put(delivery(1))
    arrivals.put(delivery(2))
    arrivals.note_answer()
    arrivals.put(delivery(3))

    assert [await received(arrivals, 1), await received(arrivals, 5)] == [[1], [2]]
    assert [await received(arrivals), await received(arrivals)] == [[], [3]]
    arrivals.note_answer()
    assert await received(arrivals) == []
    with pytest.raises(TimeoutError):
        await received(arrivals)


async def test_a_lost_connection_is_an_error_at_once_and_nothing_is_received_any_more():
    arrivals = Arrivals()
    waiting = asyncio.create_task(received(arrivals))
    await asyncio.sleep(0)
    arrivals.fail(ConnectionError("lost"))
    with pytest.raises(ConnectionError):
        await waiting
    arrivals.put(delivery(1))
    for _ in range(2):
        with pytest.raises(ConnectionError, match="lost"):
            await received(arrivals)


async def test_what_was_never_received_can_be_taken_out():
    arrivals = Arrivals()
    arrivals.put(delivery(1))
    arrivals.note_answer()
    arrivals.put(delivery(2))

    assert [each.body for each in arrivals.take_all()] == [b"1", b"2"]
    assert await received(arrivals) == []
    with pytest.raises(TimeoutError):
        await received(arrivals)
