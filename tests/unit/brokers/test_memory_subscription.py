"""The in-memory broker is read from: it keeps every promise of `ReadableBroker`, as the reference for all others."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from diator.brokers import Message
from diator.brokers.base import Delivery, Topic
from diator.brokers.memory import DeadLetter, MemoryMessageBroker
from diator.exceptions import (
    AlreadySettled,
    BrokerClosed,
    ConfigurationError,
    MessageRejected,
    UnsupportedCapability,
)
from tests.unit.doubles import Scripted

COUNTED, OTHER = Topic("notification_event", "counted"), Topic("notification_event", "other")
SETTLE = {"ack": Delivery.ack, "retry": Delivery.retry, "dead_letter": lambda delivery: delivery.dead_letter("bad")}


async def send(broker, *numbers, name="counted"):
    for number in numbers:
        await broker.send_message(Message.create(message_name=name, payload={"number": number}))


def number_of(delivery):
    return json.loads(delivery.body)["payload"]["number"]


async def take(deliveries, count):
    async with asyncio.timeout(1):
        return [await anext(deliveries) for _ in range(count)]


async def numbers(deliveries, count):
    """Take and acknowledge *count* deliveries; what they say."""
    taken = await take(deliveries, count)
    for delivery in taken:
        await delivery.ack()
    return [number_of(delivery) for delivery in taken]


async def nothing_comes(deliveries):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(deliveries)


# -- who gets what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "billing"])
async def test_on_entry_it_is_ready(group):
    broker = MemoryMessageBroker()

    async with broker.subscribe({COUNTED}, group=group) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)

    assert (delivery.topic, number_of(delivery), delivery.attempt, delivery.headers) == (COUNTED, 1, 1, {})
    assert len(broker) == 0


async def test_every_group_and_every_subscription_without_one_gets_each_message():
    broker = MemoryMessageBroker()
    async with AsyncExitStack() as stack:
        everyone = [
            await stack.enter_async_context(broker.subscribe({COUNTED}, group=group))
            for group in (None, None, "billing", "mailing")
        ]
        await send(broker, 1, 2, 3)

        assert [await numbers(each, 3) for each in everyone] == [[1, 2, 3]] * 4


async def test_the_members_of_a_group_share():
    broker = MemoryMessageBroker()
    async with (
        broker.subscribe({COUNTED}, group="billing") as one,
        broker.subscribe({COUNTED}, group="billing") as two,
    ):
        waiting = [asyncio.create_task(numbers(each, 5)) for each in (one, two)]
        await asyncio.sleep(0)
        await send(broker, *range(10))
        one_share, other_share = await asyncio.gather(*waiting)

        assert sorted(one_share + other_share) == [*range(10)]
        assert (one_share, other_share) == (sorted(one_share), sorted(other_share))
        await nothing_comes(one)


async def test_a_group_collects_while_nobody_is_there():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing"):
        pass
    async with broker.subscribe({COUNTED}):
        await send(broker, 1, 2)

    async with broker.subscribe({COUNTED}, group="billing") as members, broker.subscribe({COUNTED}) as alone:
        assert await numbers(members, 2) == [1, 2]
        await nothing_comes(alone)
    assert len(broker) == 0


async def test_the_topics_of_a_group_grow_and_stay():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing"), broker.subscribe({OTHER}, group="billing"):
        pass
    await send(broker, 1)
    await send(broker, 2, name="other")

    async with broker.subscribe({COUNTED, OTHER}, group="billing") as deliveries:
        assert [(each.topic, number_of(each)) for each in await take(deliveries, 2)] == [(COUNTED, 1), (OTHER, 2)]


async def test_what_no_subscription_wanted_goes_to_the_first_that_does():
    broker = MemoryMessageBroker()
    await send(broker, 1, 2)
    await send(broker, 9, name="other")

    async with (
        broker.subscribe({COUNTED}, group="billing") as first,
        broker.subscribe({COUNTED}, group="mailing") as second,
    ):
        await send(broker, 3)

        assert (await numbers(first, 3), await numbers(second, 1)) == ([1, 2, 3], [3])
    assert [(await broker.receive()).payload["number"] for _ in range(len(broker))] == [9]


# -- in which order, and how many ------------------------------------------------------------------------------------


async def test_keeps_the_order():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=1_000) as deliveries:
        await send(broker, *range(1_000))

        assert await numbers(deliveries, 1_000) == [*range(1_000)]


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
async def test_no_more_than_prefetch_are_given_out_and_not_settled(settle):
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=2) as deliveries:
        await send(broker, 1, 2, 3)
        first, _ = await take(deliveries, 2)
        await nothing_comes(deliveries)
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0)

        await settle(first)

        assert number_of(*await waiting) in (1, 3)
        await nothing_comes(deliveries)


@pytest.mark.parametrize("prefetch", [0, -1])
async def test_a_prefetch_that_gives_out_nothing_is_refused(prefetch):
    """Else it waits for ever."""
    broker = MemoryMessageBroker()
    await send(broker, 1)

    with pytest.raises(ConfigurationError):
        async with broker.subscribe({COUNTED}, prefetch=prefetch):
            pass


async def test_a_full_queue_rejects_for_all():
    broker = MemoryMessageBroker(capacity=2)
    async with broker.subscribe({COUNTED}, group="slow") as slow, broker.subscribe({COUNTED}) as quick:
        await send(broker, 1, 2)
        assert await numbers(quick, 2) == [1, 2]

        with pytest.raises(MessageRejected, match="is full, 2 messages are waiting"):
            await send(broker, 3)

        await nothing_comes(quick)
        assert await numbers(slow, 1) == [1]
        await send(broker, 4)
        assert (await numbers(slow, 2), await numbers(quick, 1)) == ([2, 4], [4])


async def test_what_comes_back_finds_room_in_a_full_queue():
    broker = MemoryMessageBroker(capacity=1)
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        await take(deliveries, 1)
        await send(broker, 2)

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        assert await numbers(deliveries, 2) == [1, 2]


# -- settling --------------------------------------------------------------------------------------------------------


async def test_a_retry_comes_at_once_as_the_next_attempt():
    broker = MemoryMessageBroker()
    attempts = []
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        for _ in range(4):
            [delivery] = await take(deliveries, 1)
            attempts.append(delivery.attempt)
            await delivery.retry()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        [delivery] = await take(deliveries, 1)

    assert [*attempts, delivery.attempt] == [1, 2, 3, 4, 5]


async def test_a_delayed_retry_comes_when_it_is_due_and_others_meanwhile():
    loop, broker = asyncio.get_running_loop(), MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=1) as deliveries:
        await send(broker, 1, 2)
        [delivery] = await take(deliveries, 1)
        given_back = loop.time()
        await delivery.retry(after=0.05)

        assert await numbers(deliveries, 1) == [2]
        [delivery] = await take(deliveries, 1)

    assert loop.time() - given_back >= 0.049
    assert (number_of(delivery), delivery.attempt) == (1, 2)


async def test_a_delayed_retry_outlives_the_member_that_asked_for_it():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        await (await take(deliveries, 1))[0].retry(after=0.01)

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        [delivery] = await take(deliveries, 1)
        await nothing_comes(deliveries)

    assert delivery.attempt == 2


async def test_a_dead_letter_is_put_aside_with_its_reason():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, 1)
        await (await take(deliveries, 1))[0].retry()
        [delivery] = await take(deliveries, 1)

        await delivery.dead_letter("undecodable: it is nothing")

        await nothing_comes(deliveries)
    assert broker.dead_letters == [
        DeadLetter(topic=COUNTED, body=delivery.body, attempts=2, reason="undecodable: it is nothing")
    ]


async def test_what_is_not_settled_goes_back_in_its_order_before_what_came_later():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing", prefetch=4) as deliveries:
        await send(broker, *range(6))
        for delivery in (await take(deliveries, 4))[1:3]:
            await delivery.ack()

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        again = await take(deliveries, 4)
        await nothing_comes(deliveries)

    assert [(number_of(each), each.attempt) for each in again] == [(0, 2), (3, 2), (4, 1), (5, 1)]


async def test_what_goes_back_wakes_another_member():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as staying:
        async with broker.subscribe({COUNTED}, group="billing") as leaving:
            await send(broker, 1)
            await take(leaving, 1)
            waiting = asyncio.create_task(take(staying, 1))
            await asyncio.sleep(0)

        assert [(number_of(each), each.attempt) for each in await waiting] == [(1, 2)]


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
async def test_settling_after_leaving_is_harmless(settle):
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        [late] = await take(deliveries, 1)

    await settle(late)

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        [delivery] = await take(deliveries, 1)
        await settle(late)
        await nothing_comes(deliveries)
    assert (number_of(delivery), delivery.attempt, broker.dead_letters) == (1, 2, [])


@pytest.mark.parametrize("second", SETTLE)
@pytest.mark.parametrize("first", SETTLE)
async def test_it_is_settled_once(first, second):
    """The same again does nothing; another way is an error, and the first one holds."""
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        await SETTLE[first](delivery)

        if first == second:
            await SETTLE[second](delivery)
        else:
            with pytest.raises(AlreadySettled, match=rf"settled by {first}\(\); .* again by {second}\(\)"):
                await SETTLE[second](delivery)

        assert delivery.outcome == first
        assert len(broker.dead_letters) == (first == "dead_letter")
        assert [each.attempt for each in (await take(deliveries, 1) if first == "retry" else [])] in ([], [2])
        await nothing_comes(deliveries)


@pytest.mark.parametrize("how", SETTLE)
async def test_the_same_again_tells_the_service_nothing(how):
    broker = Scripted()
    delivery = broker.delivery(b"")

    for _ in range(3):
        await SETTLE[how](delivery)

    assert [what for what, *_ in broker.log] == [how]


class Refusing:
    """A transport that cannot do what it is asked first."""

    def __init__(self):
        self.refused, self.settled = False, []

    async def settle(self, delivery, *_):
        if not self.refused:
            self.refused = True
            raise UnsupportedCapability("Refusing", ["that"], why="it", remedy="ask again")
        self.settled.append(delivery.outcome)

    ack = retry = dead_letter = settle


@pytest.mark.parametrize("first", SETTLE)
async def test_what_failed_has_settled_nothing(first):
    """A program that cannot give it back has to be able to put it aside."""
    delivery = Delivery(topic=COUNTED, body=b"", headers={}, attempt=1, settler=(transport := Refusing()))
    with pytest.raises(UnsupportedCapability):
        await SETTLE[first](delivery)

    assert delivery.outcome is None
    await delivery.dead_letter("another way")
    assert transport.settled == ["dead_letter"]


async def test_a_delivery_shows_nothing_of_its_body():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, "canary")
        [delivery] = await take(deliveries, 1)

    assert "canary" not in repr(delivery)


# -- waiting, leaving and closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 64])
async def test_cancelling_a_wait_loses_nothing(prefetch):
    """A thousand times, at each moment before, while and after a message comes."""
    broker, got = MemoryMessageBroker(), []
    async with broker.subscribe({COUNTED}, group="billing", prefetch=prefetch) as deliveries:
        for number in range(1_000):
            waiting = asyncio.create_task(anext(deliveries))
            for _ in range(number % 3):
                await asyncio.sleep(0)
            await send(broker, number)
            for _ in range(number // 3 % 3):
                await asyncio.sleep(0)
            waiting.cancel()
            for delivery in await asyncio.gather(waiting, return_exceptions=True):
                if isinstance(delivery, Delivery):
                    got.append((number_of(delivery), delivery.attempt))
                    await delivery.ack()
        in_between = len(got)
        while len(got) < 1_000:
            [delivery] = await take(deliveries, 1)
            got.append((number_of(delivery), delivery.attempt))
            await delivery.ack()
        await nothing_comes(deliveries)

    assert got == [(number, 1) for number in range(1_000)]
    assert 0 < in_between < 1_000


async def test_the_iterator_ends_with_its_context():
    """One that goes on takes messages which nobody gives back."""
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0)
    await send(broker, 1, 2)

    with pytest.raises(StopAsyncIteration):
        await anext(deliveries)
    assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], BaseException)
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        assert await numbers(deliveries, 2) == [1, 2]


async def test_closed_it_takes_no_subscription_and_settles_what_is_out():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1, 2)
        one, two = await take(deliveries, 2)

        await broker.aclose()

        await one.ack()
        await two.dead_letter("late")
    assert len(broker.dead_letters) == 1
    with pytest.raises(BrokerClosed):
        async with broker.subscribe({COUNTED}):
            pass


@pytest.mark.parametrize("wait", ["receive", "subscription"])
async def test_closing_ends_all_waiting(wait):
    """So says `MemoryMessageBroker`; with what is not said, but a wait without an end it is not."""
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        waiting = asyncio.ensure_future(broker.receive() if wait == "receive" else anext(deliveries))
        await asyncio.sleep(0)

        await broker.aclose()

        try:
            async with asyncio.timeout(0.5):
                await waiting
        except (BrokerClosed, StopAsyncIteration):
            pass


def test_a_delivery_shows_neither_its_body_nor_what_its_transport_knows_of_it():
    delivery = Delivery(topic=COUNTED, body=b"hunter2", headers={}, attempt=1, settler=None, token=[b"hunter2"])

    assert "hunter2" not in repr(delivery)


async def test_members_of_one_group_take_what_they_want():
    """Two services that share a group by mistake do not take each other's messages."""
    joined, left = Topic("notification_event", "Joined"), Topic("notification_event", "Left")
    broker = MemoryMessageBroker()
    async with (
        broker.subscribe({joined}, group="diator") as first,
        broker.subscribe({left}, group="diator") as second,
    ):
        for topic in (left, joined, joined, left):
            await broker.send_message(Message.create(message_name=topic.message_name, payload={}))

        assert [(await anext(first)).topic for _ in range(2)] == [joined] * 2
        assert [(await anext(second)).topic for _ in range(2)] == [left] * 2
