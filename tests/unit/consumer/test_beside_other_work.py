"""A consumer beside the other work of a program: `async with consumer`, `ready()`, and who may stop it."""

import asyncio
import contextlib

import pytest

from diator.brokers.memory import MemoryMessageBroker
from diator.events import EventEmitter
from diator.exceptions import BrokerUnavailable, ConfigurationError, UsageError
from tests.unit.consumer.helpers import JOIN, Slow, consumer_of, left_in, on_joined, outcomes
from tests.unit.doubles import Scripted, UserJoined, body_of, holding, until


class Subscribing(Scripted):
    """A broker that takes a while to subscribe, or refuses it."""

    def __init__(self, *script, error=None, seconds=1.0):
        super().__init__(*script)
        self.error, self.seconds = error, seconds

    @contextlib.asynccontextmanager
    async def subscribe(self, topics, /, **options):
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries


class Broken(Scripted):
    """A broker whose subscription fails once its script is over."""

    async def __anext__(self):
        if not self.script:
            await asyncio.sleep(1)
            raise BrokerUnavailable("it is away for good")
        return await super().__anext__()


# -- ready -------------------------------------------------------------------------------------------------------


async def test_ready_returns_when_the_consumer_has_subscribed():
    consumer, _ = consumer_of(Subscribing(seconds=3), on_joined)
    waiting = asyncio.create_task(consumer.ready())  # even before the run begins
    await asyncio.sleep(1)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(2.9)
    assert not waiting.done()
    await asyncio.sleep(0.2)

    assert waiting.done()
    assert consumer.health().receiving
    await consumer.ready()
    consumer.stop()
    await run
    await consumer.ready()


async def test_what_is_sent_when_the_consumer_is_ready_is_handled():
    broker = MemoryMessageBroker()
    consumer, reports = consumer_of(broker, on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await consumer.ready()
    await EventEmitter(message_broker=broker).emit(JOIN)
    await until(lambda: reports)
    consumer.stop()
    await run

    assert outcomes(reports) == ["acked"]


@pytest.mark.parametrize("error", [BrokerUnavailable("it is away"), ConfigurationError("a queue differs")])
async def test_ready_raises_the_error_of_the_subscription(error):
    consumer, _ = consumer_of(Subscribing(error=error), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))

    with pytest.raises(type(error)) as raised:
        await consumer.ready()

    assert raised.value is error
    with pytest.raises(type(error)):
        await run


@pytest.mark.parametrize("how", ["stopped", "cancelled"])
async def test_ready_ends_if_the_consumer_is_stopped_before_it_has_subscribed(how):
    consumer, _ = consumer_of(Subscribing(seconds=60), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0)
    consumer.stop() if how == "stopped" else run.cancel()

    with pytest.raises(UsageError, match=r"^the consumer was stopped before it had subscribed$"):
        await consumer.ready()
    await asyncio.wait({run})


# -- async with --------------------------------------------------------------------------------------------------


async def test_a_consumer_consumes_during_its_block_and_ends_gracefully():
    before = asyncio.all_tasks()
    broker, slow = MemoryMessageBroker(), Slow()
    consumer, reports = consumer_of(broker, slow)
    async with consumer as entered:
        assert entered is consumer
        await EventEmitter(message_broker=broker).emit(UserJoined(user_id=7))
        await until(lambda: slow.begun)
        asyncio.get_running_loop().call_later(1, slow.gate.set)

    assert (slow.done, outcomes(reports)) == ([7], ["acked"])
    assert asyncio.all_tasks() == before


async def test_an_error_of_the_block_is_raised_unchanged_after_the_handlers_have_finished():
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)
    asyncio.get_running_loop().call_later(1, slow.gate.set)
    with pytest.raises(LookupError):  # noqa: PT012  # the block is what is tested
        async with consumer:
            await until(lambda: slow.begun)
            raise LookupError

    assert outcomes(reports) == ["acked"]


async def test_an_error_of_the_subscription_is_raised_at_the_entry():
    before = asyncio.all_tasks()
    consumer, _ = consumer_of(Subscribing(error=BrokerUnavailable("it is away")), on_joined)
    with pytest.raises(BrokerUnavailable, match="it is away"):
        async with consumer:
            pytest.fail("nothing can be consumed here")

    assert asyncio.all_tasks() == before


async def test_an_error_of_the_call_that_subscribes_is_raised_at_the_entry():
    """`subscribe` need not be a generator, and may check its arguments at once."""

    class Eager(Scripted):
        def subscribe(self, topics, /, **_):
            raise ConfigurationError("no such topic")

    consumer, _ = consumer_of(Eager(), on_joined)
    with pytest.raises(ConfigurationError, match="no such topic"):
        async with asyncio.timeout(1), consumer:
            pytest.fail("nothing can be consumed here")


async def test_a_consumer_that_fails_during_its_block_ends_it_with_its_error():
    """Otherwise the program would go on, and nobody would consume."""
    went_on = []
    consumer, _ = consumer_of(Broken(body_of(JOIN)), on_joined)
    with pytest.raises(BrokerUnavailable, match="for good"):  # noqa: PT012  # the block is what is tested
        async with consumer:
            await asyncio.sleep(60)
            went_on.append(True)

    assert not went_on
    assert not asyncio.current_task().cancelling()
    await asyncio.sleep(0)


async def test_a_consumer_that_fails_during_the_shutdown_raises_its_error_once(caplog):
    consumer, _ = consumer_of(Broken(), on_joined)
    with pytest.raises(BrokerUnavailable):  # noqa: PT012  # the block is what is tested
        async with consumer:
            await asyncio.sleep(0.5)
            consumer._shut_down = lambda: None  # it notices its stop too late

    assert not asyncio.current_task().cancelling()
    assert not caplog.messages[1:]  # after the line of its start


async def test_a_block_that_is_cancelled_shuts_the_consumer_down_gracefully():
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)

    async def body():
        try:
            async with consumer:
                await asyncio.sleep(60)
        finally:
            cancellations.append(asyncio.current_task().cancelling())

    cancellations = []
    task = asyncio.create_task(body())
    await until(lambda: slow.begun)
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    slow.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert outcomes(reports) == ["acked"]
    assert cancellations == [1]  # it is still that of the program


async def test_a_shutdown_that_is_cancelled_ends_at_once():
    before = asyncio.all_tasks()
    slow = Slow()
    consumer, reports = consumer_of(broker := await holding(JOIN), slow)

    async def body():
        async with consumer:
            await until(lambda: slow.begun)

    task = asyncio.create_task(body())
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (outcomes(reports), await left_in(broker, 1)) == (["unsettled"], [2])
    assert asyncio.all_tasks() == before


async def test_an_entry_that_is_cancelled_ends_the_subscription():
    before = asyncio.all_tasks()
    consumer, _ = consumer_of(Subscribing(seconds=60), on_joined)

    async def body():
        async with consumer:
            pytest.fail("it has not subscribed")

    task = asyncio.create_task(body())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert asyncio.all_tasks() == before


async def test_an_entry_that_is_cancelled_waits_until_its_subscription_has_ended():
    ended = []

    class Slow(Scripted):
        @contextlib.asynccontextmanager
        async def subscribe(self, topics, /, **_):
            try:
                await asyncio.sleep(60)
                yield self
            finally:
                await asyncio.sleep(1)
                ended.append(True)

    consumer, _ = consumer_of(Slow(), on_joined)
    entering = asyncio.create_task(consumer.__aenter__())
    await asyncio.sleep(0.1)
    entering.cancel()
    await asyncio.wait({entering})

    assert (entering.cancelled(), ended) == (True, [True])


async def test_an_entry_that_is_cancelled_is_not_replaced_by_an_error_of_its_end():
    class Untidy(Scripted):
        @contextlib.asynccontextmanager
        async def subscribe(self, topics, /, **_):
            try:
                await asyncio.sleep(60)
                yield self
            finally:
                raise LookupError

    consumer, _ = consumer_of(Untidy(), on_joined)
    entering = asyncio.create_task(consumer.__aenter__())
    await asyncio.sleep(0.1)
    entering.cancel()
    await asyncio.wait({entering})

    assert entering.cancelled()


async def test_a_consumer_whose_task_is_cancelled_leaves_the_block_alone(caplog):
    """As by a program that cancels all tasks at its end. The end of the block shows it."""
    went_on = []
    consumer, _ = consumer_of(Scripted(), on_joined)
    with pytest.raises(asyncio.CancelledError):  # noqa: PT012  # the block is what is tested
        async with consumer:
            [task] = [task for task in asyncio.all_tasks() if task.get_name() == "diator: consumer"]
            task.cancel()
            await asyncio.sleep(1)
            went_on.append(True)

    assert went_on
    assert not caplog.messages[1:]  # after the line of its start


@pytest.mark.parametrize("seconds", [0.5, 2])
async def test_a_consumer_that_is_stopped_in_its_block_leaves_the_block_alone(seconds):
    """Whether it has ended by then or not."""
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)
    async with consumer:
        await until(lambda: slow.begun)
        consumer.stop()
        asyncio.get_running_loop().call_later(1, slow.gate.set)
        await asyncio.sleep(seconds)

    assert outcomes(reports) == ["acked"]  # the end of the block is not a second `stop`


async def test_enter_and_exit_in_different_tasks():
    """As the fixtures of pytest do."""
    consumer, reports = consumer_of(await holding(JOIN), on_joined)
    await asyncio.create_task(consumer.__aenter__())
    await until(lambda: reports)
    await asyncio.create_task(consumer.__aexit__(None, None, None))

    assert not consumer.health().receiving


async def test_a_consumer_can_be_entered_or_run_once():
    consumer, _ = consumer_of(Scripted(), on_joined)
    async with consumer:
        with pytest.raises(UsageError, match="runs once"):
            await consumer.run(signals=False)
    with pytest.raises(UsageError, match="runs once"):
        async with consumer:
            pytest.fail("it was used before")


# -- who stops it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["signal", "stop"])
async def test_a_signal_and_a_stop_are_one_graceful_shutdown(first):
    """A web server calls `stop` in its shutdown, because of the same signal."""
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: slow.begun)
    both = [consumer._stop_on_signal, consumer.stop]
    for stop in both if first == "signal" else reversed(both):
        stop()
        await asyncio.sleep(0.1)
    assert not run.done()
    slow.gate.set()
    await run

    assert outcomes(reports) == ["acked"]


async def test_a_second_signal_ends_the_shutdown_at_once():
    slow = Slow()
    consumer, reports = consumer_of(await holding(JOIN), slow)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: slow.begun)
    consumer._stop_on_signal()
    await asyncio.sleep(0.1)
    consumer._stop_on_signal()
    await run

    assert outcomes(reports) == ["unsettled"]
