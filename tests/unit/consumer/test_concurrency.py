"""Several messages at once, in the order of their keys."""

import asyncio

import pytest

from diator.brokers.memory import MemoryMessageBroker
from diator.events import EventEmitter
from tests.unit.consumer.helpers import JOIN, ONCE, consume, consumer_of, on_joined, outcomes
from tests.unit.doubles import (
    WEAK,
    Moved,
    Scripted,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


@pytest.mark.parametrize("held_back", [True, False])
@pytest.mark.parametrize("concurrency", [1, 5])
async def test_as_many_are_handled_at_once_as_is_allowed(concurrency, held_back):
    running_now, most = 0, 0

    async def slow(event: UserJoined) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        running_now -= 1

    broker = await holding(*[JOIN] * 40) if held_back else Scripted(*[body_of(JOIN)] * 40)
    told = await consume(broker, slow, concurrency=concurrency, count=40)

    assert (most, outcomes(told)) == (concurrency, ["acked"] * 40)


async def test_those_of_one_key_are_handled_in_order_one_after_the_other():
    now, most, handled = [], 0, []

    async def slow(event: Moved) -> None:
        nonlocal most
        assert event.room not in now
        now.append(event.room)
        most = max(most, len(now))
        for _ in range(1 + event.number % 3):
            await asyncio.sleep(0)
        now.remove(event.room)
        handled.append((event.room, event.number))

    broker = await holding(*[Moved(room="ABC"[number % 3], number=number) for number in range(60)])
    told = await consume(broker, slow, concurrency=8, count=60, retry=ONCE)

    assert outcomes(told) == ["acked"] * 60
    for room in "ABC":
        assert [number for of, number in handled if of == room] == [*range("ABC".index(room), 60, 3)]
    assert most > 1


async def test_one_key_that_waits_does_not_hold_the_others():
    gate, handled = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            await gate.wait()
        handled.append(event.number)

    rooms = "AAABBB"
    broker = await holding(*[Moved(room=room, number=number) for number, room in enumerate(rooms)])
    consumer, told = consumer_of(broker, on_moved, concurrency=4)
    async with running(consumer):
        await until(lambda: len(handled) == 3)
        assert handled == [3, 4, 5]
        gate.set()
        await until(lambda: len(told) == 6)

    assert handled == [3, 4, 5, 0, 1, 2]


async def test_the_lane_goes_on_after_a_failure():
    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            raise LookupError

    broker = await holding(*[Moved(number=number) for number in range(3)])
    told = await consume(broker, on_moved, concurrency=2, count=3, retry=ONCE)

    assert outcomes(told) == ["dead_lettered", "acked", "acked"]


async def test_messages_without_a_key_are_in_nobodys_way():
    gate, handled = asyncio.Event(), []

    async def on_user(event: UserJoined) -> None:
        if not event.user_id:
            await gate.wait()
        handled.append(event.user_id)

    broker = await holding(*[UserJoined(user_id=number) for number in range(4)])
    consumer, _ = consumer_of(broker, on_user, concurrency=2)
    async with running(consumer):
        await until(lambda: handled == [1, 2, 3])
        gate.set()


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_it_takes_no_more_than_it_can_handle_where_the_transport_does_not_hold_back(concurrency):
    """A hundred thousand messages that wait in here are memory, and lost when the process dies."""
    gate = asyncio.Event()

    async def slow(event: UserJoined) -> None:
        await gate.wait()

    broker = Scripted(*[body_of(JOIN)] * 500, capabilities=WEAK)
    consumer, _ = consumer_of(broker, slow, concurrency=concurrency)
    async with running(consumer):
        await asyncio.sleep(0.01)
        given = broker.given
        gate.set()

    assert given <= 2 * concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_backlog_does_not_keep_the_loop_from_the_rest_of_the_program(concurrency):
    """Neither handler nor transport wait here, and yet signals, health checks and timers have their turn."""
    broker = await holding(*[UserJoined() for _ in range(3_000)])
    consumer, told = consumer_of(broker, on_joined, concurrency=concurrency)
    asyncio.get_running_loop().call_later(0.005, consumer.stop)

    async with asyncio.timeout(3):
        await consumer.run(signals=False)

    assert len(told) < 3_000


@pytest.mark.parametrize(
    ("groups", "each"), [((None, None), 1), (("billing", "mailing"), 2), (("billing", "billing"), 1)]
)
async def test_several_consumers_in_one_process(groups, each):
    """Those of one group share; other groups get everything too."""
    broker, told = MemoryMessageBroker(), []
    consumers = [consumer_of(broker, on_joined, group=group, on_handled=told.append)[0] for group in groups]
    async with running(consumers[0]), running(consumers[1]):
        await asyncio.sleep(0)
        for _ in range(10):
            await EventEmitter(message_broker=broker).emit(UserJoined())
        await until(lambda: len(told) == 10 * each)

    assert outcomes(told) == ["acked"] * 10 * each
