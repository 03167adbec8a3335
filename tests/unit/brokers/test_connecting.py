"""A client connection serves many callers of one event loop at a time, and closes once."""

import asyncio
import threading
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar

import pytest

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.connecting import BackgroundTasks, ClientConnection, ServiceBroker
from diator.brokers.supervisor import ReconnectPolicy, ResilientSubscription, SubscriptionSettings
from diator.exceptions import BrokerClosed, MessageRejected, MessagesNotSent, UnsupportedCapability, UsageError


class Connection(ClientConnection):
    def __init__(self):
        super().__init__("the-service:1", timeout=10.0, reconnect=ReconnectPolicy())
        self.events = []
        self.may_end = asyncio.Event()

    def use(self):
        return self._bind_to_running_loop()

    async def open(self):
        self.events.append("open")

    async def _connect(self):
        raise NotImplementedError

    def _reset(self):
        self.events.append("reset")

    async def _close(self):
        self.events.append("closing")
        await self.may_end.wait()
        self.events.append("closed")


async def test_it_closes_once_even_if_a_caller_is_cancelled():
    connection = Connection()
    assert not connection.is_closed
    first, second = asyncio.create_task(connection.aclose()), asyncio.create_task(connection.aclose())
    await asyncio.sleep(0)
    assert connection.is_closed

    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    connection.may_end.set()
    await second
    await connection.aclose()

    assert connection.events == ["closing", "closed"]


async def test_an_attempt_has_no_context_variable_of_its_caller():
    """Its tasks live longer than what the caller handles, which would stay in memory and in log lines."""
    variable, seen = ContextVar("variable", default="none"), []

    class Asking(Connection):
        async def _connect(self):
            seen.append(variable.get())
            return object()

    connection = Asking()
    connection.use()
    variable.set("of the caller")
    async with connection._lock:
        await connection._connected(0)

    assert (seen, variable.get()) == (["none"], "of the caller")


def test_a_new_event_loop_resets_the_connection():
    connection = Connection()

    async def use():
        assert connection.use() is connection.use() is asyncio.get_running_loop()

    asyncio.run(use())
    assert connection.events == []
    asyncio.run(use())
    assert connection.events == ["reset"]


def test_it_can_be_closed_on_a_new_event_loop():
    connection = Connection()

    async def use():
        connection.use()

    async def close():
        connection.may_end.set()
        await connection.aclose()

    asyncio.run(use())
    asyncio.run(close())
    assert connection.events == ["reset", "closing", "closed"]


async def test_a_second_running_event_loop_is_refused():
    connection, errors = Connection(), []
    connection.use()

    def in_another_thread():
        async def use():
            with pytest.raises(UsageError) as caught:
                connection.use()
            errors.append(caught.value)

        asyncio.run(use())

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    await asyncio.to_thread(thread.join)

    assert "another event loop that is still running" in str(errors[0])
    assert connection.events == []


async def test_background_tasks_continue_if_the_wait_for_them_is_cancelled():
    background, may_end, done = BackgroundTasks(), asyncio.Event(), []

    async def work():
        await may_end.wait()
        done.append(True)

    background.start(work(), "working")
    waiting = asyncio.create_task(background.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert not done

    may_end.set()
    await background.wait()
    assert done
    await background.wait()  # all tasks have ended


class Broker(ServiceBroker[Connection]):
    capabilities = Capabilities(distribution=frozenset({"broadcast", "competing"}))

    async def send_message(self, message, /):
        self._service.events.append(message)

    def _subscription(self, settings):
        return Subscription(settings, lossy=False)


class Subscription(ResilientSubscription):
    @asynccontextmanager
    async def connect(self):
        yield self

    async def receive(self, limit, /):
        await asyncio.Event().wait()

    async def probe(self): ...


TOPICS = [Topic("notification_event", "Happened")]


async def test_a_subscription_gets_what_the_program_asked_for_and_what_the_broker_has():
    connection = Connection()
    async with Broker(connection).subscribe(TOPICS, group="g", prefetch=3, on_gap=print) as subscription:
        assert subscription.settings == SubscriptionSettings(
            topics=TOPICS,
            group="g",
            broker="Broker",
            prefetch=3,
            on_gap=print,
            reconnect=ReconnectPolicy(),  # whose delays are longer than those of the sending connection
            registry=connection.subscriptions,
        )
        assert connection.subscriptions == {subscription}
        assert connection.broker == "Broker"  # for logs
    assert not connection.subscriptions


@pytest.mark.parametrize(
    ("promised", "group", "refusal"),
    [
        ("competing", None, "subscribe() without a group.*name a group"),
        ("broadcast", "g", "subscribe(group='g').*leave the group out"),
    ],
)
async def test_a_subscription_that_the_broker_does_not_promise_is_refused(promised, group, refusal):
    broker = Broker(Connection())
    broker.capabilities = Capabilities(distribution=frozenset({promised}))

    with pytest.raises(UnsupportedCapability, match=refusal.replace("(", r"\(").replace(")", r"\)")):
        async with broker.subscribe(TOPICS, group=group):
            pass
    async with broker.subscribe(TOPICS, group=None if group else "g"):
        pass


async def test_a_closed_broker_makes_no_subscription():
    connection = Connection()
    connection.may_end.set()
    broker = Broker(connection)
    await broker.aclose()

    with pytest.raises(BrokerClosed):
        async with broker.subscribe(TOPICS):
            pass


async def test_a_broker_opens_and_closes_its_connection():
    connection = Connection()
    connection.may_end.set()
    async with Broker(connection) as broker:
        assert isinstance(broker, Broker)
        assert connection.events == ["open"]
    assert connection.events == ["open", "closing", "closed"]
    await broker.aclose()
    assert connection.is_closed


async def test_a_broker_sends_several_messages_and_lists_those_that_were_not_sent():
    connection = Connection()
    good, bad = (Message.create(message_name=name, payload={}) for name in ("Good", "Bad"))
    await Broker(connection).send_messages([good, good])
    assert connection.events == [good, good]

    class Refusing(Broker):
        async def send_message(self, message, /):
            if message is bad:
                raise MessageRejected("it is bad", message_id=message.message_id)

    with pytest.raises(MessagesNotSent) as failed:
        await Refusing(connection).send_messages([good, bad])
    assert failed.value.message_ids == (bad.message_id,)
