"""Tests of the in-memory broker with scripted faults."""

import asyncio

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
    """Return the numbers of the waiting messages, in order."""
    return [(await broker.receive()).payload["number"] for _ in range(len(broker))]


class Program:
    """A consumer whose handler records the numbers of its events."""

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
    ("fault", "error", "arrives"),
    [
        (unavailable, BrokerUnavailable, 0),
        (rejected, MessageRejected, 0),
        (unroutable, MessageUnroutable, 0),
        (unknown_and_lost, OutcomeUnknown, 0),
        (unknown_but_sent, OutcomeUnknown, 1),
    ],
    ids=repr,
)
async def test_a_send_error_is_raised_and_the_message_is_sent_or_not(fault, error, arrives):
    broker, sent = FaultyMessageBroker(), message()
    broker.on_send(fault)

    with pytest.raises(error, match=repr(fault)) as caught:
        await broker.send_message(sent)

    assert type(caught.value) is error
    assert caught.value.message_id == sent.message_id
    assert (len(broker), len(broker.sent)) == (arrives, 0)


@pytest.mark.parametrize(
    ("fault", "queued"), [(lost, [1]), (duplicated, [0, 0, 1]), (reordered, [1, 0]), (held, [1])], ids=repr
)
async def test_a_confirmed_message_is_lost_duplicated_reordered_or_held(fault, queued):
    broker = FaultyMessageBroker()
    broker.on_send(fault)

    await send(broker, 0, 1)

    assert await arrived(broker) == queued
    assert len(broker.sent) == 2


async def test_held_messages_arrive_when_they_are_released():
    broker = FaultyMessageBroker()
    broker.on_send(held, held)
    await send(broker, 0, 1, 2)

    await broker.release()

    assert await arrived(broker) == [2, 0, 1]


async def test_a_duplicate_has_the_same_id():
    broker = FaultyMessageBroker()
    broker.on_send(duplicated)
    await send(broker, 0)

    assert (await broker.receive()).message_id == (await broker.receive()).message_id


async def test_a_closed_broker_refuses_despite_its_script():
    broker, sent = FaultyMessageBroker(), message()
    broker.on_send(lost)
    await broker.aclose()

    with pytest.raises(BrokerClosed) as caught:
        await broker.send_message(sent)

    assert caught.value.message_id == sent.message_id


# -- scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "options", "queued"),
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
async def test_which_messages_meet_a_fault(faults, options, queued):
    broker = FaultyMessageBroker()
    if faults:
        broker.on_send(*faults, **options)

    await send(broker, *range(6))

    assert await arrived(broker) == (queued or [*range(6)])


async def test_the_same_seed_has_the_same_outcome():
    async def outcome(seed):
        broker = FaultyMessageBroker()
        broker.on_send(lost, no_fault, seed=seed)
        await send(broker, *range(50))
        return tuple(await arrived(broker))

    outcomes = {seed: await outcome(seed) for seed in range(5)}

    assert outcomes == {seed: await outcome(seed) for seed in range(5)}
    assert len({*outcomes.values()}) == 5
    assert all(0 < len(each) < 50 for each in outcomes.values())


async def test_the_first_script_with_a_fault_left_decides():
    broker = FaultyMessageBroker()
    broker.on_send(lost)
    broker.on_send(duplicated, duplicated)

    await send(broker, 0, 1, 2, 3)

    assert await arrived(broker) == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(("faults", "options"), [((), {}), ((lost,), {"cycle": True, "seed": 1})])
def test_an_invalid_script_is_refused(faults, options):
    with pytest.raises(ValueError, match="either cycle or seed"):
        FaultyMessageBroker().on_send(*faults, **options)


@pytest.mark.parametrize("call", ["on_send", "on_delivery"])
def test_a_domain_event_cannot_be_scripted(call):
    with pytest.raises(TypeError, match="DomainEvent is not an integration event"):
        getattr(FaultyMessageBroker(), call)(no_fault, of=DomainEvent)


async def test_verify_fails_while_a_scripted_fault_has_not_happened():
    broker = FaultyMessageBroker()
    broker.on_send(lost, no_fault, duplicated, of=UserJoined)
    broker.on_delivery(crashed)
    await send(broker, 0)

    with pytest.raises(AssertionError) as caught:
        broker.verify()

    unused = "duplicated of on_send(lost, no_fault, duplicated, of=UserJoined); crashed of on_delivery(crashed)"
    assert str(caught.value) == f"scripted faults have not happened: {unused}"


@pytest.mark.parametrize("options", [{}, {"cycle": True}, {"seed": 1}])
async def test_verify_succeeds_once_the_scripted_faults_have_happened(options):
    broker = FaultyMessageBroker()
    broker.on_send(lost, duplicated, **options)
    with pytest.raises(AssertionError):
        broker.verify()

    await send(broker, 0, 1)

    broker.verify()


# -- handling ----------------------------------------------------------------------------------------------------


async def test_draining_handles_every_message_and_stops():
    broker = FaultyMessageBroker()
    program = Program(broker)
    await joined(broker, 1, 2, 3)

    await broker.drain(program.consumer)

    assert program.numbers == [1, 2, 3]
    assert [each.outcome for each in broker.deliveries] == ["ack"] * 3
    assert not program.consumer.health().receiving


async def test_draining_nothing_returns():
    broker = FaultyMessageBroker()

    await broker.drain(Program(broker).consumer)

    assert broker.deliveries == []


async def test_draining_handles_messages_that_handlers_send():
    broker, events, seen = FaultyMessageBroker(), EventMap(), []

    @events.handler
    async def handle(event: UserJoined) -> None:
        seen.append(event.user_id)
        await asyncio.sleep(0.01)  # no message waits meanwhile, but one delivery is not settled
        if event.user_id < 5:
            await joined(broker, event.user_id + 1)

    await joined(broker, 1)

    await broker.drain(Consumer(broker, event_map=events))

    assert seen == [1, 2, 3, 4, 5]


async def test_two_groups_are_drained_together():
    broker = FaultyMessageBroker()
    one, two = Program(broker, group="one"), Program(broker, group="two")
    await broker.drain(
        Program(broker, group="one").consumer, Program(broker, group="two").consumer
    )  # now the groups exist and collect messages
    await joined(broker, 1, 2)

    await broker.drain(one.consumer, two.consumer)

    assert one.numbers == two.numbers == [1, 2]


async def test_a_reordered_message_without_a_next_one_is_delivered_at_last():
    broker = FaultyMessageBroker()
    program = Program(broker)
    broker.on_send(no_fault, reordered)
    await joined(broker, 1, 2)

    await broker.drain(program.consumer)

    assert program.numbers == [1, 2]


async def test_a_message_is_redelivered_after_a_crash():
    broker = FaultyMessageBroker()
    program = Program(broker)
    broker.on_delivery(crashed, of=UserJoined)
    await joined(broker, 1, 2)

    await broker.drain(program.consumer)

    assert sorted(program.numbers) == [1, 1, 2]
    assert sorted(each.attempt for each in broker.deliveries) == [1, 1, 2]


async def test_a_message_is_dead_lettered_again_after_a_crash():
    broker = FaultyMessageBroker()
    broker.on_delivery(crashed)
    await joined(broker, 1)

    await broker.drain(Program(broker, fails=[1]).consumer)

    assert [each.outcome for each in broker.deliveries] == ["dead_letter"] * 2
    assert len(broker.dead_letters) == 1


async def test_a_poison_message_is_dead_lettered():
    broker = FaultyMessageBroker()
    program = Program(broker, retry=RetryPolicy(immediate_retries=0, delayed_retries=0, max_crashes=2))
    broker.on_delivery(crashed, when=lambda delivery: delivery.attempt < 4, cycle=True)
    await joined(broker, 1)

    await broker.drain(program.consumer)

    assert program.numbers == [1, 1, 1]
    assert broker.dead_letters[0].reason.startswith("poison-message")


async def test_a_retry_does_not_wait():
    broker = FaultyMessageBroker()
    program = Program(broker, fails=[1], retry=RetryPolicy(immediate_retries=0, delayed_retries=3, first_delay=600))
    await joined(broker, 1)
    began = asyncio.get_running_loop().time()

    await broker.drain(program.consumer)

    assert asyncio.get_running_loop().time() - began < 1
    assert [each.outcome for each in broker.deliveries] == ["retry"] * 3 + ["dead_letter"]
    assert broker.dead_letters[0].attempts == 4


async def test_foreign_bytes_are_delivered():
    broker = FaultyMessageBroker()
    program = Program(broker)
    broker.inject(UserJoined, b"{")
    broker.inject(TOPIC, b"[]")

    await broker.drain(program.consumer)

    assert [letter.body for letter in broker.dead_letters] == [b"{", b"[]"]


async def test_shuffling_keeps_every_message():
    async def order(seed):
        broker = FaultyMessageBroker()
        await send(broker, *range(10))
        broker.shuffle(seed=seed)
        return await arrived(broker)

    orders = [await order(seed) for seed in range(3)]

    assert all(sorted(each) == [*range(10)] for each in orders)
    assert len({*map(tuple, orders)}) == 3
    assert orders == [await order(seed) for seed in range(3)]


async def test_a_gap_is_reported():
    broker, gaps = FaultyMessageBroker(), []
    async with broker.subscribe([TOPIC], on_gap=gaps.append), broker.subscribe([TOPIC]):
        broker.gap(seconds=5, reason="the cable")
    broker.gap()

    assert [(gap.until - gap.since).total_seconds() for gap in gaps] == [5]
    assert gaps[0].reason == "the cable"


async def test_draining_reports_and_cancels_work_that_never_ends():
    broker, events = FaultyMessageBroker(), EventMap()

    @events.handler
    async def handle(event: UserJoined) -> None:
        await asyncio.Event().wait()

    await joined(broker, 1, 2)
    began = asyncio.get_running_loop().time()

    with pytest.raises(TimeoutError, match=r"after 0\.05 s, 1 message is waiting and 1 is not settled"):
        await broker.drain(Consumer(broker, event_map=events), within=0.05)

    assert asyncio.get_running_loop().time() - began < 1


async def test_draining_raises_the_error_of_a_consumer():
    class Lame(FaultyMessageBroker):
        def subscribe(self, topics, /, **options):
            raise UnsupportedCapability("Lame", ["legs"], why="walking", remedy="sit")

    broker = Lame()

    with pytest.raises(UnsupportedCapability, match="legs"):
        await broker.drain(Program(broker).consumer)


async def test_draining_ignores_the_deliveries_of_an_ended_subscription():
    broker = FaultyMessageBroker()
    await joined(broker, 1)
    async with broker.subscribe([TOPIC], group="diator") as deliveries:
        await anext(deliveries)
    program = Program(broker)

    await broker.drain(program.consumer)

    assert program.numbers == [1]
    assert [each.attempt for each in broker.deliveries] == [1, 2]
