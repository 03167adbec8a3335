"""Concurrent handling, in order by key."""

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
async def test_concurrency_deliveries_are_handled_at_once(concurrency, held_back):
    running_now, most = 0, 0

    async def slow(event: UserJoined) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        running_now -= 1

    broker = await holding(*[JOIN] * 40) if held_back else Scripted(*[body_of(JOIN)] * 40)
    reports = await consume(broker, slow, concurrency=concurrency, count=40)

    assert (most, outcomes(reports)) == (concurrency, ["acked"] * 40)


async def test_messages_with_the_same_key_are_handled_in_order_one_at_a_time():
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
    reports = await consume(broker, slow, concurrency=8, count=60, retry=ONCE)

    assert outcomes(reports) == ["acked"] * 60
    for room in "ABC":
        assert [number for of, number in handled if of == room] == [*range("ABC".index(room), 60, 3)]
    assert most > 1


async def test_a_key_that_waits_does_not_block_other_keys():
    gate, handled = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            await gate.wait()
        handled.append(event.number)

    rooms = "AAABBB"
    broker = await holding(*[Moved(room=room, number=number) for number, room in enumerate(rooms)])
    consumer, reports = consumer_of(broker, on_moved, concurrency=4)
    async with running(consumer):
        await until(lambda: len(handled) == 3)
        assert handled == [3, 4, 5]
        gate.set()
        await until(lambda: len(reports) == 6)

    assert handled == [3, 4, 5, 0, 1, 2]


async def test_what_waits_for_a_slow_key_occupies_no_handler():
    gate, handled = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        if event.room == "slow":
            await gate.wait()
        handled.append(event.number)

    events = [Moved(room="slow" if number % 2 == 0 else "others", number=number) for number in range(100)]
    consumer, reports = consumer_of(await holding(*events), on_moved, concurrency=2)
    async with running(consumer):
        await until(lambda: len(handled) == 50)
        assert handled == [*range(1, 100, 2)]
        gate.set()
        await until(lambda: len(reports) == 100)

    assert handled[50:] == [*range(0, 100, 2)]


@pytest.mark.parametrize(("limit", "most"), [("messages", 5), ("bytes", 4)])
async def test_what_waits_is_bounded(monkeypatch, limit, most):
    """Behind each slow message, and not only behind the first one."""
    gates, handled = {number: asyncio.Event() for number in (10, 11, 40)}, []

    async def on_moved(event: Moved) -> None:
        if event.number in gates:
            await gates[event.number].wait()
        handled.append(event.number)

    events = [Moved(number=number) for number in range(10, 70)]  # bodies of one size
    broker = Scripted()
    broker.script.extend(broker.delivery(body_of(event), headers={"key": "A"}) for event in events)
    if limit == "bytes":
        monkeypatch.setattr("diator.consumer._MAX_WAITING_BYTES", 4 * (len(body_of(events[0])) + len("keyA")))
    consumer, reports = consumer_of(broker, on_moved, concurrency=8, **{"prefetch": 5} if limit == "messages" else {})
    async with running(consumer):
        for number, gate in gates.items():
            await asyncio.sleep(0.1)
            assert (len(handled), broker.given) == (number - 10, number - 10 + 1 + most)
            gate.set()
        await until(lambda: len(reports) == 60)

    assert handled == [*range(10, 70)]


async def test_16_mib_may_wait_and_headers_count():
    gate = asyncio.Event()

    async def on_moved(event: Moved) -> None:
        await gate.wait()

    broker = Scripted()
    body = body_of(Moved())
    headers = {"key": "A", "large": "x" * (1024 * 1024 - len(body) - len("keyAlarge"))}
    broker.script.extend(broker.delivery(body, headers=headers) for _ in range(20))
    consumer, reports = consumer_of(broker, on_moved, concurrency=8)
    async with running(consumer):
        await asyncio.sleep(0.01)
        assert broker.given == 1 + 16
        gate.set()
        await until(lambda: len(reports) == 20)


async def test_what_was_withdrawn_while_it_waited_is_not_handled():
    """Such as by a lost connection. The service delivers it again."""
    gate, handled, withdrawn = asyncio.Event(), [], []

    async def on_moved(event: Moved) -> None:
        await gate.wait()
        handled.append(event.number)

    broker = Scripted()
    broker.script.extend(broker.delivery(body_of(Moved(number=n)), headers={"key": "A"}) for n in range(5))
    broker.postpone = withdrawn.append
    broker.resume = lambda delivery: delivery not in withdrawn[:3]
    consumer, reports = consumer_of(broker, on_moved, concurrency=2)
    async with running(consumer):
        await until(lambda: broker.given == 5)
        gate.set()
        await until(lambda: len(reports) == 2)

    assert handled == [0, 4]


async def test_a_key_continues_after_a_failure():
    async def on_moved(event: Moved) -> None:
        if event.number == 0:
            raise LookupError

    broker = await holding(*[Moved(number=number) for number in range(3)])
    reports = await consume(broker, on_moved, concurrency=2, count=3, retry=ONCE)

    assert sorted(outcomes(reports)) == ["acked", "acked", "dead_lettered"]


async def test_messages_without_a_key_do_not_block_others():
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
async def test_it_receives_no_more_than_it_can_handle_without_backpressure(concurrency):
    """A hundred thousand queued messages would fill the memory and be lost when the process dies."""
    gate = asyncio.Event()

    async def slow(event: UserJoined) -> None:
        await gate.wait()

    broker = Scripted(*[body_of(JOIN)] * 500, capabilities=WEAK)
    consumer, _ = consumer_of(broker, slow, concurrency=concurrency)
    async with running(consumer):
        await asyncio.sleep(0.01)
        given = broker.given
        gate.set()

    assert given == concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_it_does_not_receive_more_later_either(concurrency):
    """After many messages that were handled at once: each of them has made room for one, and no more."""
    gate, begun = asyncio.Event(), []

    async def slow_at_last(event: UserJoined) -> None:
        begun.append(event)
        if len(begun) > 40:
            await gate.wait()

    broker = Scripted(*[body_of(JOIN)] * 500, capabilities=WEAK)
    consumer, _ = consumer_of(broker, slow_at_last, concurrency=concurrency)
    async with running(consumer):
        await asyncio.sleep(0.1)
        given = broker.given
        gate.set()

    assert given == 40 + concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_each_delivery_that_was_handled_makes_room_for_one(concurrency):
    gates, begun = [asyncio.Event() for _ in range(20)], []

    async def slow(event: UserJoined) -> None:
        begun.append(event)
        await gates[len(begun) - 1].wait()

    broker = Scripted(*[body_of(JOIN)] * 20, capabilities=WEAK)
    consumer, _ = consumer_of(broker, slow, concurrency=concurrency)
    given = []
    async with running(consumer):
        for gate in gates[: 20 - concurrency]:
            await asyncio.sleep(0.01)
            given.append(broker.given)
            gate.set()
        for gate in gates:
            gate.set()

    assert given == [*range(concurrency, 20)]


async def test_what_is_there_is_received_without_waiting():
    class Ready(Scripted):
        def receive_nowait(self):
            return self.delivery(self.script.popleft()) if self.script else None

        async def __anext__(self):
            assert not self.script
            return await super().__anext__()

    assert outcomes(await consume(Ready(*[body_of(JOIN)] * 5), on_joined, count=5)) == ["acked"] * 5


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_backlog_does_not_starve_the_event_loop(concurrency):
    """Neither the handler nor the transport waits here, but signals, health checks and timers still run."""
    broker = await holding(*[UserJoined() for _ in range(3_000)])
    consumer, reports = consumer_of(broker, on_joined, concurrency=concurrency)

    async def rest_of_the_program() -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        consumer.stop()

    rest = asyncio.create_task(rest_of_the_program())
    began = asyncio.get_running_loop().time()
    await consumer.run(signals=False)

    assert asyncio.get_running_loop().time() == began
    assert len(reports) < 3_000
    assert rest.done()


@pytest.mark.parametrize(
    ("groups", "each"), [((None, None), 1), (("billing", "mailing"), 2), (("billing", "billing"), 1)]
)
async def test_several_consumers_in_one_process(groups, each):
    """Consumers of one group share the messages; every other group receives all of them too."""
    broker, reports = MemoryMessageBroker(), []
    consumers = [consumer_of(broker, on_joined, group=group, on_handled=reports.append)[0] for group in groups]
    async with running(consumers[0]), running(consumers[1]):
        await asyncio.sleep(0)
        for _ in range(10):
            await EventEmitter(message_broker=broker).emit(UserJoined())
        await until(lambda: len(reports) == 10 * each)

    assert outcomes(reports) == ["acked"] * 10 * each
