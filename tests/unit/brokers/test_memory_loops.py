"""A broker that is made when a module is imported serves one event loop after the other, and never two at once."""

import asyncio
import threading

import pytest

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.batching import BatchSender
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.container import Container
from diator.events import EventEmitter, EventMap
from diator.exceptions import UsageError
from diator.mediator import Mediator
from diator.testing import FaultyMessageBroker
from tests.unit.doubles import Api, Join, UserJoined, requests_of

pytestmark = pytest.mark.real_time

COUNTED = Topic("notification_event", "counted")


def message(number=0):
    return Message.create(message_name="counted", payload={"number": number})


@pytest.fixture(params=[MemoryMessageBroker, FaultyMessageBroker])
def broker(request):
    return request.param()


async def wait_for_nothing(broker, group="g"):
    async with broker.subscribe([COUNTED], group=group) as deliveries:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(deliveries), 0.01)


async def attempts(broker, count):
    """Return the attempt of each of *count* deliveries, and leave nothing."""
    found = []
    async with broker.subscribe([COUNTED], group="g") as deliveries, asyncio.timeout(5):
        while len(found) < count:
            delivery = await anext(deliveries)
            found.append(delivery.attempt)
            await delivery.ack()
    await wait_for_nothing(broker)
    return found


@pytest.mark.parametrize("group", ["g", None])
def test_a_subscription_of_each_event_loop_waits_and_receives(broker, group):
    async def use():
        await wait_for_nothing(broker, group)
        async with broker.subscribe([COUNTED], group=group) as deliveries:
            waiting = asyncio.create_task(anext(deliveries))
            await asyncio.sleep(0)
            await broker.send_message(message())
            await (await asyncio.wait_for(waiting, 1)).ack()

    for _ in range(3):
        asyncio.run(use())


def test_receive_waits_in_each_event_loop(broker):
    async def use():
        receiving = asyncio.create_task(broker.receive())
        await asyncio.sleep(0)
        await broker.send_message(sent := message())
        assert await asyncio.wait_for(receiving, 1) == sent

    for _ in range(3):
        asyncio.run(use())


def test_messages_outlive_the_event_loop(broker):
    """Those that wait, and those that a cancelled consumer has not settled."""

    async def take_one():
        await wait_for_nothing(broker)
        for number in range(2):
            await broker.send_message(message(number))
        async with broker.subscribe([COUNTED], group="g") as deliveries:
            await anext(deliveries)

    asyncio.run(take_one())

    assert asyncio.run(attempts(broker, 2)) == [2, 1]


def test_a_delayed_retry_outlives_the_event_loop():
    broker = MemoryMessageBroker()

    async def requeue():
        await wait_for_nothing(broker)
        await broker.send_message(message())
        async with broker.subscribe([COUNTED], group="g") as deliveries:
            await (await anext(deliveries)).retry(after=0.02)

    asyncio.run(requeue())

    assert asyncio.run(attempts(broker, 1)) == [2]


def test_an_event_loop_that_was_closed_with_its_subscriptions_open_leaves_nothing_behind(broker):
    """The service redelivers what a process that died had not settled."""
    left = []

    async def leave_open():
        for group in ("g", None):
            context = broker.subscribe([COUNTED], group=group)
            left.extend([context, deliveries := await context.__aenter__()])
            await broker.send_message(message())
            await anext(deliveries)
            left.append(asyncio.ensure_future(anext(deliveries)))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_open())
    loop.close()

    assert asyncio.run(attempts(broker, 2)) == [2, 2]  # the task that waited had received the second one
    assert [len(queue) for queue in broker._queues] == [0]


def test_two_event_loops_can_take_turns(broker):
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    for loop in (first, second, first, second):
        loop.run_until_complete(broker.send_message(message()))
        assert loop.run_until_complete(broker.receive()).payload == {"number": 0}
    first.close()
    second.close()


async def subscribe(broker):
    async with broker.subscribe([COUNTED]):
        pass


@pytest.mark.parametrize(
    "call",
    [lambda broker: broker.send_message(message()), lambda broker: broker.receive(), subscribe],
    ids=["send", "receive", "subscribe"],
)
async def test_a_second_running_event_loop_is_refused(broker, call):
    await wait_for_nothing(broker)
    errors = []

    def in_a_thread():
        try:
            asyncio.run(call(broker))
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    await asyncio.to_thread(thread.join)

    assert "in use in another event loop that is still running" in str(errors[0])


async def test_a_batch_sender_refuses_a_second_running_event_loop():
    """It would forget the callers of the first one."""
    ends = asyncio.Event()

    async def send_batch(items, deadline):
        await ends.wait()

    sender = BatchSender(send_batch, timeout=5)
    first = asyncio.create_task(sender.send(1, size=1, message_id=message().message_id))
    await asyncio.sleep(0)

    with pytest.raises(UsageError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, sender.send(2, size=1, message_id=message().message_id))

    ends.set()
    await asyncio.wait_for(first, 1)


def test_a_whole_program_can_be_made_before_its_event_loops():
    """Mediator, container, emitter, maps and broker: everything but the consumer, which runs once."""
    broker, events, handled = MemoryMessageBroker(), EventMap(), []

    @events.handler
    async def on_joined(event: UserJoined) -> None:
        handled.append(event)

    async def connect() -> Api:
        await asyncio.sleep(0)
        return Api()

    container = Container()
    container.register(Api, connect, lifetime="singleton")
    emitter = EventEmitter(events, container, broker)

    async def join(command: Join, api: Api) -> str:
        await emitter.emit(UserJoined(user_id=command.user_id))
        return "joined"

    mediator = Mediator(requests_of(join), container, emitter)

    async def program(turn):
        def on_handled(_):
            if len(handled) == 2 * turn:
                consumer.stop()

        consumer = Consumer(broker, event_map=events, concurrency=2, on_handled=on_handled, event_emitter=emitter)
        running = asyncio.create_task(consumer.run(signals=False))
        assert await asyncio.gather(*(mediator.send(Join(user_id=turn)) for _ in range(2))) == ["joined"] * 2
        await asyncio.wait_for(running, 5)

    for turn in (1, 2, 3):
        asyncio.run(program(turn))

    assert [event.user_id for event in handled] == [1, 1, 2, 2, 3, 3]


def test_a_delayed_retry_is_redelivered_once_when_an_earlier_event_loop_runs_again(broker, caplog):
    """Both event loops have a timer for it."""

    async def requeue():
        async with broker.subscribe([COUNTED], group="g") as deliveries:
            await broker.send_message(message())
            await (await anext(deliveries)).retry(after=0.05)

    async def later(count):
        await asyncio.sleep(0.1)
        return await attempts(broker, count)

    with asyncio.Runner() as earlier:
        earlier.run(requeue())
        with asyncio.Runner() as other:
            assert other.run(later(1)) == [2]
        assert earlier.run(later(0)) == []
    assert not [each for each in caplog.messages if each.startswith("Exception in callback")]
