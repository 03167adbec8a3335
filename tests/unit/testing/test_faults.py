"""The broker that fails as it is told to."""

import asyncio
from time import monotonic

import pytest

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.consumer import Consumer
from diator.events import DomainEvent, EventMap
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
    UnsupportedCapability,
)
from diator.retrying import RetryPolicy
from diator.testing import FaultyMessageBroker
from diator.testing.faults import (
    crashed,
    duplicated,
    held,
    lost,
    no_fault,
    rejected,
    reordered,
    unavailable,
    unknown_and_lost,
    unknown_but_sent,
    unroutable,
)
from tests.unit.doubles import MeetingChanged, UserJoined

TOPIC = Topic("notification_event", "UserJoined")
ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)


def message(number=0, **options):
    return Message.create(message_name="UserJoined", payload={"number": number}, **options)


async def send(broker, *numbers):
    for number in numbers:
        await broker.send_message(message(number))


async def arrived(broker):
    """What is there, in its order."""
    return [(await broker.receive()).payload["number"] for _ in range(len(broker))]


class Handled:
    """A handler that keeps the numbers of its events."""

    def __init__(self, broker, *, fails=(), **options):
        self.numbers = []
        events = EventMap()

        async def handle(event: UserJoined) -> None:
            self.numbers.append(event.user_id)
            if event.user_id in fails:
                raise LookupError("it fails")

        events.bind(UserJoined, handle)
        self.consumer = Consumer(broker, event_map=events, **{"retry": ONCE, **options})


async def joined(broker, *user_ids):
    for user_id in user_ids:
        await broker.send_message(Message.create(message_name="UserJoined", payload=payload(user_id)))


def payload(user_id):
    return {
        "event_id": "9f62e977-73f7-462b-92cb-8ea658d3bcb5",
        "event_timestamp": "2026-03-07T09:26:02Z",
        "user_id": user_id,
    }


# -- sending -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "verdict", "arrives"),
    [
        (unavailable, BrokerUnavailable, 0),
        (rejected, MessageRejected, 0),
        (unroutable, MessageUnroutable, 0),
        (unknown_and_lost, OutcomeUnknown, 0),
        (unknown_but_sent, OutcomeUnknown, 1),
    ],
    ids=repr,
)
async def test_a_verdict_is_raised_and_the_message_is_there_or_not(fault, verdict, arrives):
    broker, sent = FaultyMessageBroker(), message()
    broker.on_send(fault)

    with pytest.raises(verdict, match=repr(fault)) as caught:
        await broker.send_message(sent)

    assert type(caught.value) is verdict
    assert caught.value.message_id == sent.message_id
    assert (len(broker), len(broker.sent)) == (arrives, 0)


@pytest.mark.parametrize(
    ("fault", "there"), [(lost, [1]), (duplicated, [0, 0, 1]), (reordered, [1, 0]), (held, [1])], ids=repr
)
async def test_a_message_that_is_confirmed_and_yet_goes_astray(fault, there):
    broker = FaultyMessageBroker()
    broker.on_send(fault)

    await send(broker, 0, 1)

    assert await arrived(broker) == there
    assert len(broker.sent) == 2


async def test_what_is_held_comes_when_it_is_released():
    broker = FaultyMessageBroker()
    broker.on_send(held, held)
    await send(broker, 0, 1, 2)

    await broker.release()

    assert await arrived(broker) == [2, 0, 1]


async def test_a_repeat_has_the_same_id():
    broker = FaultyMessageBroker()
    broker.on_send(duplicated)
    await send(broker, 0)

    assert (await broker.receive()).message_id == (await broker.receive()).message_id


async def test_a_closed_broker_refuses_whatever_is_scripted():
    broker, sent = FaultyMessageBroker(), message()
    broker.on_send(lost)
    await broker.aclose()

    with pytest.raises(BrokerClosed) as caught:
        await broker.send_message(sent)

    assert caught.value.message_id == sent.message_id


# -- scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "options", "there"),
    [
        ([], {}, None),
        ([no_fault, lost], {}, [0, 2, 3, 4, 5]),
        ([lost, lost], {}, [2, 3, 4, 5]),
        ([no_fault, lost], {"cycle": True}, [0, 2, 4]),
        ([lost], {"when": lambda each: each.payload["number"] > 3}, [0, 1, 2, 3, 5]),
        ([lost], {"of": UserJoined}, [1, 2, 3, 4, 5]),
        ([lost], {"of": MeetingChanged}, [0, 1, 2, 3, 4, 5]),
    ],
)
async def test_which_messages_meet_a_fault(faults, options, there):
    broker = FaultyMessageBroker()
    if faults:
        broker.on_send(*faults, **options)

    await send(broker, *range(6))

    assert await arrived(broker) == (there or [*range(6)])


async def test_one_seed_means_one_outcome():
    async def outcome(seed):
        broker = FaultyMessageBroker()
        broker.on_send(lost, no_fault, seed=seed)
        await send(broker, *range(50))
        return tuple(await arrived(broker))

    outcomes = {seed: await outcome(seed) for seed in range(5)}

    assert outcomes == {seed: await outcome(seed) for seed in range(5)}
    assert len({*outcomes.values()}) == 5
    assert all(0 < len(each) < 50 for each in outcomes.values())


async def test_the_first_script_that_has_something_for_a_message_decides():
    broker = FaultyMessageBroker()
    broker.on_send(lost)
    broker.on_send(duplicated, duplicated)

    await send(broker, 0, 1, 2, 3)

    assert await arrived(broker) == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(("faults", "options"), [((), {}), ((lost,), {"cycle": True, "seed": 1})])
def test_a_script_that_makes_no_sense_is_refused(faults, options):
    with pytest.raises(ValueError, match="either cycle or seed"):
        FaultyMessageBroker().on_send(*faults, **options)


@pytest.mark.parametrize("call", ["on_send", "on_delivery"])
def test_an_event_that_never_travels_cannot_be_meant(call):
    with pytest.raises(TypeError, match="DomainEvent is no event that travels"):
        getattr(FaultyMessageBroker(), call)(no_fault, of=DomainEvent)


async def test_what_was_scripted_has_to_happen():
    broker = FaultyMessageBroker()
    broker.on_send(lost, no_fault, duplicated, of=UserJoined)
    broker.on_delivery(crashed)
    await send(broker, 0)

    with pytest.raises(AssertionError) as caught:
        broker.verify()

    told = "duplicated of on_send(lost, no_fault, duplicated, of=UserJoined); crashed of on_delivery(crashed)"
    assert str(caught.value) == f"what was scripted has not happened: {told}"


@pytest.mark.parametrize("options", [{}, {"cycle": True}, {"seed": 1}])
async def test_what_was_scripted_and_has_happened_is_no_error(options):
    broker = FaultyMessageBroker()
    broker.on_send(lost, duplicated, **options)
    with pytest.raises(AssertionError):
        broker.verify()

    await send(broker, 0, 1)

    broker.verify()


# -- handling ----------------------------------------------------------------------------------------------------


async def test_draining_handles_all_there_is_and_stops():
    broker = FaultyMessageBroker()
    handled = Handled(broker)
    await joined(broker, 1, 2, 3)

    await broker.drain(handled.consumer)

    assert handled.numbers == [1, 2, 3]
    assert [each.outcome for each in broker.deliveries] == ["ack"] * 3
    assert not handled.consumer.health().receiving


async def test_draining_nothing_returns():
    broker = FaultyMessageBroker()

    await broker.drain(Handled(broker).consumer)

    assert broker.deliveries == []


async def test_draining_follows_what_handlers_send():
    broker, events, seen = FaultyMessageBroker(), EventMap(), []

    @events.handler
    async def handle(event: UserJoined) -> None:
        seen.append(event.user_id)
        await asyncio.sleep(0.01)  # nothing waits meanwhile, and yet it is not over
        if event.user_id < 5:
            await joined(broker, event.user_id + 1)

    await joined(broker, 1)

    await broker.drain(Consumer(broker, event_map=events))

    assert seen == [1, 2, 3, 4, 5]


async def test_two_groups_are_drained_together():
    broker = FaultyMessageBroker()
    one, two = Handled(broker, group="one"), Handled(broker, group="two")
    await broker.drain(Handled(broker, group="one").consumer, Handled(broker, group="two").consumer)  # now they collect
    await joined(broker, 1, 2)

    await broker.drain(one.consumer, two.consumer)

    assert one.numbers == two.numbers == [1, 2]


async def test_what_is_overtaken_by_nothing_comes_at_last():
    broker = FaultyMessageBroker()
    handled = Handled(broker)
    broker.on_send(no_fault, reordered)
    await joined(broker, 1, 2)

    await broker.drain(handled.consumer)

    assert handled.numbers == [1, 2]


async def test_after_a_crash_it_is_handled_again():
    broker = FaultyMessageBroker()
    handled = Handled(broker)
    broker.on_delivery(crashed, of=UserJoined)
    await joined(broker, 1, 2)

    await broker.drain(handled.consumer)

    assert sorted(handled.numbers) == [1, 1, 2]
    assert sorted(each.attempt for each in broker.deliveries) == [1, 1, 2]


async def test_after_a_crash_it_is_put_aside_again():
    broker = FaultyMessageBroker()
    broker.on_delivery(crashed)
    await joined(broker, 1)

    await broker.drain(Handled(broker, fails=[1]).consumer)

    assert [each.outcome for each in broker.deliveries] == ["dead_letter"] * 2
    assert len(broker.dead_letters) == 1


async def test_a_message_that_crashes_every_consumer_is_put_aside():
    broker = FaultyMessageBroker()
    handled = Handled(broker, retry=RetryPolicy(immediate_retries=0, delayed_retries=0, max_crashes=2))
    broker.on_delivery(crashed, when=lambda delivery: delivery.attempt < 4, cycle=True)
    await joined(broker, 1)

    await broker.drain(handled.consumer)

    assert handled.numbers == [1, 1, 1]
    assert broker.dead_letters[0].reason.startswith("poison-message")


async def test_a_retry_does_not_wait():
    broker = FaultyMessageBroker()
    handled = Handled(broker, fails=[1], retry=RetryPolicy(immediate_retries=0, delayed_retries=3, first_delay=600))
    await joined(broker, 1)
    began = monotonic()

    await broker.drain(handled.consumer)

    assert monotonic() - began < 5
    assert [each.outcome for each in broker.deliveries] == ["retry"] * 3 + ["dead_letter"]
    assert broker.dead_letters[0].attempts == 4


async def test_foreign_bytes_are_delivered():
    broker = FaultyMessageBroker()
    handled = Handled(broker)
    broker.inject(UserJoined, b"{")
    broker.inject(TOPIC, b"[]")

    await broker.drain(handled.consumer)

    assert [letter.body for letter in broker.dead_letters] == [b"{", b"[]"]


async def test_shuffling_keeps_what_is_there():
    async def order(seed):
        broker = FaultyMessageBroker()
        await send(broker, *range(10))
        broker.shuffle(seed=seed)
        return await arrived(broker)

    orders = [await order(seed) for seed in range(3)]

    assert all(sorted(each) == [*range(10)] for each in orders)
    assert len({*map(tuple, orders)}) == 3
    assert orders == [await order(seed) for seed in range(3)]


async def test_a_gap_is_told():
    broker, gaps = FaultyMessageBroker(), []
    async with broker.subscribe([TOPIC], on_gap=gaps.append), broker.subscribe([TOPIC]):
        broker.gap(seconds=5, reason="the cable")
    broker.gap()

    assert [(gap.until - gap.since).total_seconds() for gap in gaps] == [5]
    assert gaps[0].reason == "the cable"


async def test_work_that_never_ends_is_told_and_cut_off():
    broker, events = FaultyMessageBroker(), EventMap()

    @events.handler
    async def handle(event: UserJoined) -> None:
        await asyncio.Event().wait()

    await joined(broker, 1, 2)
    began = monotonic()

    with pytest.raises(TimeoutError, match=r"after 0\.05 s 1 messages wait, and 1 are not settled"):
        await broker.drain(Consumer(broker, event_map=events), within=0.05)

    assert monotonic() - began < 5


async def test_what_ends_a_consumer_comes_out():
    class Lame(FaultyMessageBroker):
        def subscribe(self, topics, /, **options):
            raise UnsupportedCapability("Lame", ["legs"], why="walking", remedy="sit")

    broker = Lame()

    with pytest.raises(UnsupportedCapability, match="legs"):
        await broker.drain(Handled(broker).consumer)


async def test_a_subscription_that_ends_leaves_nothing_to_wait_for():
    broker = FaultyMessageBroker()
    await joined(broker, 1)
    async with broker.subscribe([TOPIC], group="diator") as deliveries:
        await anext(deliveries)
    handled = Handled(broker)

    await broker.drain(handled.consumer)

    assert handled.numbers == [1]
    assert [each.attempt for each in broker.deliveries] == [1, 2]
