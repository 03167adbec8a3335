"""Subscriptions of the in-memory broker keep every promise of `ReadableBroker`: it is the reference transport."""

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
    """Take and acknowledge *count* deliveries; return their numbers."""
    taken = await take(deliveries, count)
    for delivery in taken:
        await delivery.ack()
    return [number_of(delivery) for delivery in taken]


async def nothing_comes(deliveries):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(deliveries)


# -- who receives which messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "billing"])
async def test_a_subscription_is_ready_on_entry(group):
    broker = MemoryMessageBroker()

    async with broker.subscribe({COUNTED}, group=group) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)

    assert (delivery.topic, number_of(delivery), delivery.attempt, delivery.headers) == (COUNTED, 1, 1, {})
    assert len(broker) == 0


async def test_every_group_and_every_subscription_without_a_group_receives_each_message():
    broker = MemoryMessageBroker()
    async with AsyncExitStack() as stack:
        everyone = [
            await stack.enter_async_context(broker.subscribe({COUNTED}, group=group))
            for group in (None, None, "billing", "mailing")
        ]
        await send(broker, 1, 2, 3)

        assert [await numbers(each, 3) for each in everyone] == [[1, 2, 3]] * 4


async def test_the_consumers_of_a_group_share_the_messages():
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


async def test_a_group_collects_messages_while_it_has_no_consumer():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing"):
        pass
    async with broker.subscribe({COUNTED}):
        await send(broker, 1, 2)

    async with broker.subscribe({COUNTED}, group="billing") as billing, broker.subscribe({COUNTED}) as alone:
        assert await numbers(billing, 2) == [1, 2]
        await nothing_comes(alone)
    assert len(broker) == 0


async def test_topics_are_added_to_a_group_and_stay():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing"), broker.subscribe({OTHER}, group="billing"):
        pass
    await send(broker, 1)
    await send(broker, 2, name="other")

    async with broker.subscribe({COUNTED, OTHER}, group="billing") as deliveries:
        assert [(each.topic, number_of(each)) for each in await take(deliveries, 2)] == [(COUNTED, 1), (OTHER, 2)]


async def test_a_message_without_a_subscription_goes_to_the_first_one_for_its_topic():
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


# -- order and prefetch ----------------------------------------------------------------------------------------------


async def test_deliveries_keep_the_order():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=1_000) as deliveries:
        await send(broker, *range(1_000))

        assert await numbers(deliveries, 1_000) == [*range(1_000)]


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
async def test_at_most_prefetch_deliveries_are_unsettled(settle):
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
async def test_a_prefetch_below_one_is_refused(prefetch):
    """Otherwise the iterator would wait for ever."""
    broker = MemoryMessageBroker()
    await send(broker, 1)

    with pytest.raises(ConfigurationError, match=r"^prefetch must be a whole number of at least 1"):
        async with broker.subscribe({COUNTED}, prefetch=prefetch):
            pass


def handed_out(deliveries):
    """Take whatever may be handed out now."""
    return [*iter(deliveries.receive_nowait, None)]


async def test_by_default_64_deliveries_may_be_unsettled():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, *range(70))
        assert len(handed_out(deliveries)) == 64


async def test_postponed_deliveries_take_no_place_until_they_are_resumed():
    """Two of them: as a subscription with a connection counts them, see `test_supervisor.py`."""
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=2) as deliveries:
        await send(broker, *range(1, 9))
        postponed = handed_out(deliveries)
        for each in postponed:
            deliveries.postpone(each)
        third, fourth = handed_out(deliveries)
        deliveries.make_room(1)
        [fifth] = handed_out(deliveries)
        deliveries.make_room(0)
        assert [number_of(each) for each in (*postponed, third, fourth, fifth)] == [1, 2, 3, 4, 5]

        await third.ack()
        assert handed_out(deliveries) == []
        assert [deliveries.resume(each) for each in postponed] == [True, True]
        for each in (fourth, fifth):
            await each.ack()
        assert handed_out(deliveries) == []
        await postponed[0].ack()
        assert [number_of(each) for each in handed_out(deliveries)] == [6]


async def test_making_room_wakes_the_wait_for_a_delivery():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=1) as deliveries:
        await send(broker, 1, 2)
        await take(deliveries, 1)
        waiting = asyncio.create_task(numbers(deliveries, 1))
        await asyncio.sleep(0)

        deliveries.make_room(1)

        assert await waiting == [2]


async def test_a_delivery_that_is_postponed_at_the_end_does_not_count_as_an_attempt():
    """Nobody has handled it, at any attempt; the others were handled."""
    broker = MemoryMessageBroker()
    attempts = []
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1, 2)
    for _ in range(4):
        async with broker.subscribe({COUNTED}, group="billing") as deliveries:
            _, second = taken = await take(deliveries, 2)
            attempts.append([each.attempt for each in taken])
            if len(attempts) == 3:
                deliveries.postpone(second)

    assert attempts == [[1, 1], [2, 2], [3, 3], [4, 3]]


async def test_a_full_queue_of_one_group_rejects_the_message_for_all():
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


async def test_a_requeued_message_fits_into_a_full_queue():
    broker = MemoryMessageBroker(capacity=1)
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        await take(deliveries, 1)
        await send(broker, 2)

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        assert await numbers(deliveries, 2) == [1, 2]


# -- settling --------------------------------------------------------------------------------------------------------


async def test_a_retry_is_redelivered_at_once_as_the_next_attempt():
    broker = MemoryMessageBroker()
    attempts = []
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        for _ in range(4):
            [delivery] = await take(deliveries, 1)
            attempts.append(delivery.attempt)
            await delivery.retry()
        assert deliveries.receive_nowait() is not None  # there is no delay of a turn
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        [delivery] = await take(deliveries, 1)

    assert [*attempts, delivery.attempt] == [1, 2, 3, 4, 6]


async def test_a_delayed_retry_is_redelivered_when_it_is_due_and_does_not_hold_up_others():
    loop, broker = asyncio.get_running_loop(), MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, prefetch=1) as deliveries:
        await send(broker, 1, 2)
        [delivery] = await take(deliveries, 1)
        requeued_at = loop.time()
        await delivery.retry(after=0.05)

        assert await numbers(deliveries, 1) == [2]
        [delivery] = await take(deliveries, 1)

    assert loop.time() - requeued_at >= 0.049
    assert (number_of(delivery), delivery.attempt) == (1, 2)


async def test_a_delayed_retry_outlives_the_subscription_that_requeued_it():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1)
        await (await take(deliveries, 1))[0].retry(after=0.01)

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        [delivery] = await take(deliveries, 1)
        await nothing_comes(deliveries)

    assert delivery.attempt == 2


async def test_a_dead_letter_is_kept_with_its_reason():
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


async def test_unsettled_messages_are_requeued_in_order_before_later_ones():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing", prefetch=4) as deliveries:
        await send(broker, *range(6))
        for delivery in (await take(deliveries, 4))[1:3]:
            await delivery.ack()

    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        again = await take(deliveries, 4)
        await nothing_comes(deliveries)

    assert [(number_of(each), each.attempt) for each in again] == [(0, 2), (3, 2), (4, 1), (5, 1)]


async def test_a_requeued_message_wakes_another_consumer():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as staying:
        async with broker.subscribe({COUNTED}, group="billing") as leaving:
            await send(broker, 1)
            await take(leaving, 1)
            waiting = asyncio.create_task(take(staying, 1))
            await asyncio.sleep(0)

        assert [(number_of(each), each.attempt) for each in await waiting] == [(1, 2)]


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
async def test_settling_after_the_end_has_no_effect(settle):
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
async def test_a_delivery_is_settled_once(first, second):
    """The same outcome again does nothing. Another outcome raises an error, and the first one stays."""
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
async def test_the_same_outcome_again_is_not_reported_to_the_service(how):
    broker = Scripted()
    delivery = broker.delivery(b"")

    for _ in range(3):
        await SETTLE[how](delivery)

    assert [what for what, *_ in broker.log] == [how]


class Refusing:
    """A transport that refuses the first settlement."""

    def __init__(self):
        self.refused, self.settled = False, []

    async def settle(self, delivery, *_):
        if not self.refused:
            self.refused = True
            raise UnsupportedCapability("Refusing", ["that"], why="it", remedy="ask again")
        self.settled.append(delivery.outcome)

    ack = retry = dead_letter = settle


@pytest.mark.parametrize("first", SETTLE)
async def test_a_failed_settlement_settles_nothing(first):
    """A program that cannot requeue a message must still be able to dead-letter it."""
    delivery = Delivery(topic=COUNTED, body=b"", headers={}, attempt=1, settler=(transport := Refusing()))
    with pytest.raises(UnsupportedCapability):
        await SETTLE[first](delivery)

    assert delivery.outcome is None
    await delivery.dead_letter("another way")
    assert transport.settled == ["dead_letter"]


async def test_the_repr_of_a_delivery_does_not_contain_its_body():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, "canary")
        [delivery] = await take(deliveries, 1)

    assert "canary" not in repr(delivery)


# -- waiting, ending and closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 64])
async def test_cancelling_a_wait_loses_nothing(prefetch):
    """A thousand times: before, while and after a message arrives."""
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
    """If it continued, it would take messages that nobody returns to the queue."""
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


async def test_the_iterator_serves_a_loop():
    broker, got = MemoryMessageBroker(), []
    async with broker.subscribe({COUNTED}) as deliveries:
        await send(broker, 1, 2)
        async for delivery in deliveries:
            got.append((number_of(delivery), delivery.attempt))
            if len(got) == 2:
                break

    assert got == [(1, 1), (2, 1)]


async def test_a_subscription_without_a_group_that_has_ended_collects_nothing():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}):
        pass

    await send(broker, 1)

    assert len(broker) == 1  # it is retained for the first group that subscribes
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        assert await numbers(deliveries, 1) == [1]


async def test_a_closed_broker_refuses_subscriptions_and_still_settles_deliveries():
    broker = MemoryMessageBroker()
    async with broker.subscribe({COUNTED}, group="billing") as deliveries:
        await send(broker, 1, 2)
        one, two = await take(deliveries, 2)

        await broker.aclose()

        await one.ack()
        await two.dead_letter("late")
    assert len(broker.dead_letters) == 1
    with pytest.raises(BrokerClosed, match=r"^this broker is closed$"):
        async with broker.subscribe({COUNTED}):
            pass


@pytest.mark.parametrize("wait", ["receive", "subscription"])
async def test_closing_ends_every_wait(wait):
    """`MemoryMessageBroker` does not promise how a wait ends, only that it does."""
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


def test_the_repr_of_a_delivery_contains_nothing_of_the_message():
    delivery = Delivery(
        topic=COUNTED, body=b"hunter2", headers={"hunter2": "hunter2"}, attempt=1, settler=None, token=[b"hunter2"]
    )

    assert "hunter2" not in repr(delivery)


async def test_a_transport_receives_a_reason_of_one_bounded_printable_line():
    class Keeping:
        async def dead_letter(self, delivery, reason, /):
            reasons.append(reason)

    reasons = []
    for reason in ("line\nforged: \x1b[2J", "x" * 5_000, "short"):
        delivery = Delivery(topic=COUNTED, body=b"", headers={}, attempt=1, settler=Keeping())
        await delivery.dead_letter(reason)

    assert reasons == [r"line\nforged: \x1b[2J", "x" * 1_023 + "…", "short"]


async def test_consumers_of_one_group_receive_only_their_topics():
    """Two services that share a group name by mistake do not receive each other's messages."""
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
