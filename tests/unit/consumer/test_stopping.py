"""A consumer's graceful shutdown."""

import asyncio
import contextlib

import pytest

from diator.brokers.base import Topic
from diator.brokers.memory import MemoryMessageBroker
from diator.events import EventEmitter
from diator.exceptions import (
    BrokerUnavailable,
    UsageError,
)
from tests.records import fields
from tests.unit.consumer.helpers import (
    JOIN,
    ONCE,
    Slow,
    cancelling,
    consumer_of,
    is_drained,
    left_in,
    on_joined,
    outcomes,
    quick,
    reason_of,
)
from tests.unit.doubles import (
    Moved,
    Scripted,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


class Instant(Slow):
    """A handler without a cleanup."""

    async def __call__(self, event: UserJoined) -> None:
        self.begun.append(event.user_id)
        await self.gate.wait()


async def waiting_at(slow, concurrency=1, messages=1, **options):
    """Run a consumer until *slow* waits with as many messages as it may handle at once."""
    broker = await holding(*[UserJoined(user_id=number) for number in range(messages)])
    consumer, reports = consumer_of(broker, slow, concurrency=concurrency, **options)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: len(slow.begun) == min(concurrency, messages))
    return broker, consumer, reports, run


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_stopping_finishes_the_running_handlers_and_starts_no_others(concurrency):
    before = asyncio.all_tasks()
    broker, consumer, reports, run = await waiting_at(slow := Slow(), concurrency, messages=5)

    consumer.stop()
    await asyncio.sleep(0.005)
    assert not run.done()
    slow.gate.set()
    await run

    assert asyncio.all_tasks() == before
    assert slow.begun == slow.done == [*range(concurrency)]
    assert outcomes(reports) == ["acked"] * concurrency
    assert await left_in(broker, 5 - concurrency) == [1] * (5 - concurrency)


async def test_stopping_finishes_a_handler_whose_delivery_was_not_waited_for():
    class Prefetched(Scripted):
        def receive_nowait(self):
            return self.delivery(self.script.popleft()) if self.script else None

    slow, broker = Slow(), Prefetched(body_of(UserJoined()), body_of(UserJoined()))
    consumer, reports = consumer_of(broker, slow)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: slow.begun)

    consumer.stop()
    await asyncio.sleep(0.005)
    slow.gate.set()
    await run

    assert (slow.done, outcomes(reports), len(broker.script)) == ([1], ["acked"], 1)


async def test_prefetched_messages_return_to_the_group():
    """None of them counts as delivered, also not what waited for an earlier message of its key."""
    gate, begun = asyncio.Event(), []

    async def on_moved(event: Moved) -> None:
        begun.append(event.number)
        await gate.wait()

    broker = await holding(*[Moved(number=number) for number in range(4)])
    consumer, reports = consumer_of(broker, on_moved, concurrency=3)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: begun)

    consumer.stop()
    await asyncio.sleep(0.005)
    gate.set()
    await run

    assert (begun, outcomes(reports)) == ([0], ["acked"])
    assert await left_in(broker, 3, topic=Topic("notification_event", "Moved")) == [1, 1, 1]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_stops_the_consumer_is_the_last_one(concurrency):
    handled = []

    async def stopping(event: Moved) -> None:
        handled.append(event.number)
        consumer.stop()

    broker = await holding(*[Moved(number=number) for number in range(3)])
    consumer, reports = consumer_of(broker, stopping, concurrency=concurrency)
    await consumer.run(signals=False)

    assert (handled, outcomes(reports)) == ([0], ["acked"])


@pytest.mark.parametrize("how", ["time is over", "no time at all", "second stop"])
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_after_the_drain_timeout_running_handlers_are_cancelled_and_unsettled(concurrency, how):
    timeout = {"time is over": 0.01, "no time at all": 0.0, "second stop": 20.0}[how]
    broker, consumer, reports, run = await waiting_at(slow := Slow(), concurrency, messages=2, drain_timeout=timeout)

    consumer.stop()
    if how == "second stop":
        await asyncio.sleep(0.005)
        assert not slow.cancelled
        consumer.stop()
    async with asyncio.timeout(1):
        await run

    assert sorted(slow.cancelled) == slow.begun
    assert outcomes(reports) == ["unsettled"] * concurrency
    assert {each.reason for each in reports} == {"cancelled"}
    assert sorted(await left_in(broker, 2)) == ([1, 2] if concurrency == 1 else [2, 2])


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_unsettled_deliveries_are_logged_at_the_end(concurrency, caplog):
    _, consumer, _, run = await waiting_at(Slow(), concurrency, messages=2, drain_timeout=0)

    consumer.stop()
    await run

    what = "1 delivery was handled; it stays" if concurrency == 1 else "2 deliveries were handled; they stay"
    assert caplog.messages == [f"stopped before {what} unsettled"]
    assert caplog.records[0].messages == concurrency
    assert [(each.group, each.concurrency) for each in caplog.records] == [("diator", concurrency)]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_ignores_its_cancellation_is_left_behind_and_logged(concurrency, caplog):
    gate, begun = asyncio.Event(), []

    async def stubborn(event: UserJoined) -> None:
        begun.append(event)
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    before = asyncio.all_tasks()
    broker = await holding(*[UserJoined() for _ in range(concurrency)])
    consumer, _ = consumer_of(broker, stubborn, concurrency=concurrency, drain_timeout=0)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: len(begun) == concurrency)
    stopped = asyncio.get_running_loop().time()
    consumer.stop()
    async with asyncio.timeout(60):
        await run

    assert asyncio.get_running_loop().time() - stopped == 5
    what = "1 handler ignored its" if concurrency == 1 else "2 handlers ignored their"
    are = "is" if concurrency == 1 else "are"
    assert caplog.messages[-1] == f"{what} cancellation and {are} still running"
    assert fields(caplog.records[-1])["broker"] == "MemoryMessageBroker"
    gate.set()
    await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_cancelled_run_leaves_its_deliveries_unsettled(concurrency):
    before = asyncio.all_tasks()
    broker, _, reports, run = await waiting_at(slow := Slow(), concurrency, messages=2)

    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    assert asyncio.all_tasks() == before
    assert sorted(slow.cancelled) == slow.begun
    assert outcomes(reports) == ["unsettled"] * concurrency
    assert sorted(await left_in(broker, 2)) == ([1, 2] if concurrency == 1 else [2, 2])


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_loop_that_cancels_every_task_leaves_deliveries_unsettled(concurrency):
    """`asyncio.run` does so at its end, in any order: the handlers may be cancelled before the run is."""
    before = asyncio.all_tasks()
    broker, _, reports, run = await waiting_at(Instant(), concurrency, messages=2, retry=ONCE)

    for task in [*(asyncio.all_tasks() - before - {run}), run]:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    assert (outcomes(reports), broker.dead_letters) == (["unsettled"] * concurrency, [])


async def test_a_message_that_no_handler_has_seen_is_charged_no_attempt_if_run_is_cancelled():
    """It has arrived at that moment, and waits for a worker."""
    consumer, reports = consumer_of(broker := MemoryMessageBroker(), on_joined, concurrency=2)
    run = asyncio.create_task(consumer.run(signals=False))
    await consumer.ready()
    await asyncio.sleep(0.1)
    await EventEmitter(message_broker=broker).emit(JOIN)
    run.cancel()
    await asyncio.wait({run})

    assert (reports, await left_in(broker, 1)) == ([], [1])


async def test_a_subscription_that_swallows_the_stop_leaves_no_cancellation_behind():
    """Clients swallow one now and then. The task of `run` goes on after it, so it must not look cancelled."""

    class Deaf(Scripted):
        @contextlib.asynccontextmanager
        async def subscribe(self, topics, /, **options):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            yield self

    consumer, _ = consumer_of(Deaf(body_of(JOIN)), on_joined)
    asyncio.get_running_loop().call_later(1, consumer.stop)
    await consumer.run(signals=False)

    assert not asyncio.current_task().cancelling()


@pytest.mark.parametrize("swallows", [False, True], ids=["turns it into an error", "swallows it"])
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_swallows_its_cancellation_neither_fails_nor_blocks_the_stop(concurrency, swallows):
    before, begun = asyncio.all_tasks(), []

    async def hiding(event: UserJoined) -> None:
        begun.append(event)
        if len(begun) <= concurrency:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not swallows:
                    raise LookupError from None

    broker = await holding(*[UserJoined() for _ in range(4)])
    consumer, reports = consumer_of(
        broker, hiding, concurrency=concurrency, retry=quick(immediate_retries=2, delayed_retries=2)
    )
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: len(begun) == concurrency)

    run.cancel()
    ended, _ = await asyncio.wait({run}, timeout=0.2)
    for task in (left := asyncio.all_tasks() - before):
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)

    assert ended
    assert len(begun) == concurrency
    assert outcomes(reports) == ["unsettled"] * concurrency or swallows


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_cancellation_that_a_handler_leaves_behind_does_not_end_the_run(concurrency):
    """Some libraries cancel their own task for a timeout, and never call `uncancel`."""

    async def untidy(event: UserJoined) -> None:
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)

    consumer, reports = consumer_of(
        broker := await holding(*[UserJoined() for _ in range(8)]), untidy, concurrency=concurrency
    )
    async with running(consumer) as run:
        await until(lambda: len(reports) == 8 or run.done())
        assert not run.done()

    assert outcomes(reports) == ["acked"] * 8
    assert await is_drained(broker)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_subscription_that_cancels_itself_does_not_look_like_a_stop(concurrency):
    class Cancelled(Scripted):
        async def __anext__(self):
            await cancelling()

    run = asyncio.create_task(consumer_of(Cancelled(), on_joined, concurrency=concurrency)[0].run(signals=False))
    await asyncio.wait({run}, timeout=1)

    assert isinstance(run.exception(), BrokerUnavailable)
    assert str(run.exception()) == (
        "the subscription was cancelled, perhaps by the client library; create another Consumer"
    )


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_delivery_that_arrives_after_the_cancellation_is_not_handled(concurrency):
    """`asyncio.wait_for` does so on Python 3.11: it already has a result, and drops the cancellation."""

    class Late(Scripted):
        async def __anext__(self):
            if not self.script:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                self.script.append(body_of(JOIN))
            return await super().__anext__()

    consumer, reports = consumer_of(broker := Late(body_of(JOIN)), on_joined, concurrency=concurrency)
    async with running(consumer):
        await until(lambda: reports)

    assert (outcomes(reports), broker.log, broker.given) == (["acked"], [("ack",)], 2)


class Fatal(BaseException):
    """An error that `except Exception` does not catch."""


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("when", ["running", "stopping"])
async def test_a_base_exception_ends_the_run_and_settles_nothing(when, concurrency):
    gate = asyncio.Event()

    async def dying(event: UserJoined) -> None:
        await gate.wait()
        raise Fatal

    broker = await holding(UserJoined())
    consumer, reports = consumer_of(broker, dying, concurrency=concurrency)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: consumer.health().in_flight)
    if when == "stopping":
        consumer.stop()
        await asyncio.sleep(0.005)
    gate.set()

    with pytest.raises(Fatal) as caught:
        await run

    assert [(each.outcome, each.reason, each.error) for each in reports] == [
        ("unsettled", "ended by Fatal", caught.value)
    ]
    assert await left_in(broker, 1) == [2]


async def test_a_base_exception_is_raised_and_not_replaced_by_a_cancellation():
    async def dying(event: UserJoined) -> None:
        raise Fatal

    consumer, reports = consumer_of(Scripted(body_of(JOIN)), dying)
    with pytest.raises(Fatal):
        await consumer.run(signals=False)

    assert reports[0].reason != "cancelled"
    assert isinstance(reports[0].error, Fatal)


async def test_an_error_of_the_subscription_ends_the_run():
    class Broken(Scripted):
        async def __anext__(self):
            raise BrokerUnavailable("it is away for good")

    with pytest.raises(BrokerUnavailable, match="away for good"):
        await consumer_of(Broken(), on_joined)[0].run(signals=False)


async def test_a_consumer_that_is_stopped_before_its_run_handles_nothing():
    consumer, reports = consumer_of(broker := await holding(UserJoined()), on_joined)
    consumer.stop()

    async with asyncio.timeout(1):
        await consumer.run(signals=False)

    assert (reports, await left_in(broker, 1)) == ([], [1])


async def test_stopping_ends_a_run_that_is_still_connecting():
    class Away(Scripted):
        @contextlib.asynccontextmanager
        async def subscribe(self, topics, /, **_):
            await asyncio.Event().wait()
            yield self

    consumer, _ = consumer_of(Away(), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0.005)

    consumer.stop()
    ended, _ = await asyncio.wait({run}, timeout=0.2)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)

    assert ended


async def test_a_consumer_runs_once():
    consumer, _ = consumer_of(MemoryMessageBroker(), on_joined)
    async with running(consumer):
        with pytest.raises(UsageError, match="runs once"):
            await consumer.run(signals=False)
    with pytest.raises(UsageError) as refused:
        await consumer.run(signals=False)

    assert str(refused.value) == "this consumer was run before, and a consumer runs once; create another Consumer"


async def test_two_stops_in_one_moment_end_an_idle_run():
    consumer, _ = consumer_of(MemoryMessageBroker(), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0.1)
    consumer.stop()
    consumer.stop()
    async with asyncio.timeout(1):
        await run


async def test_stopping_at_any_moment_neither_loses_nor_duplicates():
    """Many runs on one queue, each stopped a little later: exactly one of them acknowledges each message."""
    handled = []

    async def on_user(event: UserJoined) -> None:
        await asyncio.sleep(0)
        handled.append(event.user_id)

    broker = await holding(*[UserJoined(user_id=number) for number in range(200)])
    moment = 0
    while len(handled) < 200:
        moment += 1
        consumer, reports = consumer_of(broker, on_user, concurrency=1 + moment % 3)
        run = asyncio.create_task(consumer.run(signals=False))
        for _ in range(moment % 40):
            await asyncio.sleep(0)
        consumer.stop()
        await run
        assert {*outcomes(reports)} <= {"acked"}

    assert sorted(handled) == [*range(200)]
    assert broker.dead_letters == []


@pytest.mark.usefixtures("loop_clock")
async def test_by_default_a_handler_has_300_seconds_and_a_shutdown_waits_for_20():
    begun, ended = [], []

    async def hangs(event: UserJoined) -> None:
        begun.append(asyncio.get_running_loop().time())
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(asyncio.get_running_loop().time())

    consumer, reports = consumer_of(Scripted(*[body_of(UserJoined())] * 2), hangs, retry=ONCE)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(310)
    consumer.stop()
    stopping = asyncio.get_running_loop().time()
    await run

    assert [reason_of(each) for each in reports] == ["retries-exhausted: TimeoutError", "cancelled"]
    assert [ended[0] - begun[0], ended[1] - stopping] == pytest.approx([300, 20], abs=1.5)
