"""What an instrument sees, and that its errors reach nobody."""

import asyncio
import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import pytest

from diator.brokers.codec import decode, encode, headers_with_key
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.context import MessageContext, current_message
from diator.events import EventEmitter, EventMap, Events, NotificationEvent
from diator.exceptions import BrokerUnavailable, ConfigurationError, EventsNotSent, HandlerNotFound
from diator.instruments import Instrument
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from diator.testing import Recorder
from tests.records import fields
from tests.unit.consumer.helpers import consumer_of, quick
from tests.unit.doubles import FULL, Scripted, UserJoined, body_of, events_of, running, until


class Ask(Request[str]): ...


inside: ContextVar[str] = ContextVar("inside", default="nothing")


class Tracing(Instrument):
    """Notes what it observes, and in which of its contexts."""

    def __init__(self):
        self.seen = []

    @contextmanager
    def _around(self, what, *about):
        self.seen.append((f"{what} begins in {inside.get()}", *about))
        token = inside.set(what)
        try:
            yield
        except BaseException as error:
            self.seen.append((f"{what} fails", type(error)))
            raise
        finally:
            inside.reset(token)
            self.seen.append((f"{what} ends",))

    def handling(self, request):
        return self._around("handling", type(request))

    def headers(self, event):
        return {"traceparent": inside.get()}

    def sending(self, messages, broker):
        return self._around("sending", len(messages), type(broker))

    def processing(self, context, broker):
        assert current_message() is context
        return self._around("processing", context.group, context.attempt, type(broker))

    def settled(self, handled, broker):
        self.seen.append((f"settled in {inside.get()}", handled.outcome, handled.group, type(broker)))


def requests_of(handler):
    requests = RequestMap()
    requests.bind(Ask, handler)
    return requests


async def ask(request: Ask, events: Events) -> str:
    events.append(UserJoined(user_id=1))
    events.append(UserJoined(user_id=2))
    return inside.get()


class AskHandler(RequestHandler[Ask, str]):
    async def handle(self, request: Ask) -> str:
        self.events.extend([UserJoined(user_id=1), UserJoined(user_id=2)])
        return inside.get()


@pytest.mark.parametrize("handler", [ask, AskHandler])
async def test_a_send_surrounds_the_handler_and_the_sending_of_its_events(handler):
    tracing, recorder = Tracing(), Recorder()
    mediator = Mediator(requests_of(handler), message_broker=recorder, instrument=tracing)

    assert await mediator.send(Ask()) == "handling"

    assert tracing.seen == [
        ("handling begins in nothing", Ask),
        ("sending begins in handling", 2, Recorder),
        ("sending ends",),
        ("handling ends",),
    ]
    assert [each.headers["traceparent"] for each in recorder.messages] == ["handling", "handling"]


async def test_an_emitter_surrounds_what_it_sends():
    tracing, recorder = Tracing(), Recorder()

    await EventEmitter(message_broker=recorder, instrument=tracing).emit(UserJoined(user_id=1))

    assert tracing.seen == [("sending begins in nothing", 1, Recorder), ("sending ends",)]
    assert [each.headers["traceparent"] for each in recorder.messages] == ["nothing"]


class Refusing(Recorder):
    async def send_message(self, message):
        raise BrokerUnavailable("no")


async def test_a_context_receives_the_error_and_the_caller_too():
    tracing = Tracing()
    mediator = Mediator(requests_of(ask), message_broker=Refusing(), instrument=tracing)

    with pytest.raises(EventsNotSent):
        await mediator.send(Ask())

    assert [each[0] for each in tracing.seen] == [
        "handling begins in nothing",
        "sending begins in handling",
        "sending fails",
        "sending ends",
        "handling fails",
        "handling ends",
    ]


async def test_a_request_without_a_handler_is_not_handled():
    tracing = Tracing()

    with pytest.raises(HandlerNotFound):
        await Mediator(RequestMap(), instrument=tracing).send(Ask())

    assert tracing.seen == []


async def consumed(*handlers, sent=1, count=1, **options):
    broker, outcomes = MemoryMessageBroker(), []
    emitter = EventEmitter(message_broker=broker)
    for number in range(sent):
        await emitter.emit(UserJoined(user_id=number))
    consumer, _ = consumer_of(broker, *handlers, group="g", on_handled=outcomes.append, **options)
    async with running(consumer):
        await until(lambda: len(outcomes) == count)
    return outcomes


class Welcomed(NotificationEvent):
    """Followed by nothing."""


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_processing_surrounds_the_handlers_what_they_send_and_the_settlement(concurrency):
    tracing, where = Tracing(), []

    async def welcome(event: UserJoined, events: Events) -> None:
        where.append(inside.get())
        await asyncio.create_task(note())
        events.append(Welcomed())

    async def note():
        where.append(inside.get())

    [outcome] = await consumed(welcome, instrument=tracing, concurrency=concurrency)

    assert (outcome.outcome, outcome.group) == ("acked", "g")
    assert where == ["processing", "processing"]
    assert tracing.seen == [
        ("processing begins in nothing", "g", 1, MemoryMessageBroker),
        ("sending begins in processing", 1, MemoryMessageBroker),
        ("sending ends",),
        ("settled in processing", "acked", "g", MemoryMessageBroker),
        ("processing ends",),
    ]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_processing_is_called_as_the_message_of_its_context(concurrency):
    """An instrument may log, or send something."""
    seen = []

    class Asking(Instrument):
        @contextmanager
        def processing(self, context, broker):
            seen.append((context, current_message()))
            yield

    async def welcome(event: UserJoined) -> None: ...

    await consumed(welcome, sent=3, count=3, instrument=Asking(), concurrency=concurrency)

    assert len({context.message_id for context, _ in seen}) == 3
    assert all(context == current for context, current in seen)


class Counting:
    """A codec that counts the messages it decodes."""

    def __init__(self):
        self.decoded = 0

    def encode(self, message, /, *, headers_in_body):
        return encode(replace(message, codec=None), headers_in_body=headers_in_body)

    def headers(self, message, /, *, attribute_prefix):
        return headers_with_key(replace(message, codec=None))

    def decode(self, body, headers, topic, /):
        self.decoded += 1
        return decode(body, headers=headers)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_message_is_decoded_once_for_the_instrument_and_its_handler(concurrency):
    codec, contexts, broker = Counting(), [], MemoryMessageBroker()

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        contexts.append(context)

    emitter = EventEmitter(message_broker=broker, codec=codec, headers=[lambda _: {"tenant": "7"}])
    await emitter.emit(UserJoined(user_id=1))
    consumer, _ = consumer_of(broker, welcome, concurrency=concurrency, codec=codec, instrument=Tracing())
    async with running(consumer):
        await until(lambda: contexts)

    assert codec.decoded == 1
    assert contexts[0].headers["tenant"] == "7"


async def test_processing_receives_the_error_of_the_handlers():
    tracing = Tracing()

    async def welcome(event: UserJoined) -> None:
        raise LookupError

    await consumed(welcome, count=2, instrument=tracing, retry=quick(immediate_retries=1, delayed_retries=1))

    of_one = [("processing fails", LookupError), ("processing ends",)]
    assert tracing.seen[:4] == [
        ("processing begins in nothing", "g", 1, MemoryMessageBroker),
        ("settled in processing", "retried", "g", MemoryMessageBroker),
        *of_one,
    ]
    assert tracing.seen[4] == ("processing begins in nothing", "g", 2, MemoryMessageBroker)
    assert [each for each in tracing.seen[5:] if "settled" not in each[0]] == of_one
    assert [each[1:] for each in tracing.seen[5:] if "settled" in each[0]] == [
        ("dead_lettered", "g", MemoryMessageBroker)
    ]


async def test_a_healed_failure_is_not_an_error():
    tracing, fails = Tracing(), [True]

    async def welcome(event: UserJoined) -> None:
        if fails.pop():
            fails.append(False)
            raise LookupError

    await consumed(welcome, instrument=tracing, retry=quick(immediate_retries=1))

    assert [each[0] for each in tracing.seen] == [
        "processing begins in nothing",
        "settled in processing",
        "processing ends",
    ]


async def test_a_cancelled_handling_ends_its_processing():
    tracing, begun = Tracing(), asyncio.Event()

    async def welcome(event: UserJoined) -> None:
        begun.set()
        await asyncio.Event().wait()

    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker).emit(UserJoined(user_id=1))
    consumer = Consumer(broker, event_map=events_of(welcome), instrument=tracing)
    run = asyncio.create_task(consumer.run(signals=False))
    await begun.wait()
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)

    assert ("processing fails", asyncio.CancelledError) in tracing.seen
    assert tracing.seen[-1] == ("processing ends",)


async def test_what_cannot_be_decoded_is_only_settled():
    tracing, outcomes = Tracing(), []

    async def welcome(event: UserJoined) -> None: ...

    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker).emit(UserJoined(user_id=1))
    broker._kept.waiting[0].body = b"garbage"
    consumer, _ = consumer_of(broker, welcome, instrument=tracing, on_handled=outcomes.append)
    async with running(consumer):
        await until(lambda: outcomes)

    assert [each[:2] for each in tracing.seen] == [("settled in nothing", "dead_lettered")]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_what_has_a_context_and_is_refused_is_only_settled_too(concurrency):
    """Otherwise an instrument that keeps something of it until it is settled would not find that: it has no id then."""
    tracing, outcomes = Tracing(), []

    async def welcome(event: UserJoined) -> None: ...

    body = body_of(UserJoined(user_id=1))
    broker = Scripted(body + b" ", capabilities=replace(FULL, max_message_bytes=len(body)))
    broker.script.append(broker.delivery(body, unreadable="its compression is unknown"))
    consumer, _ = consumer_of(broker, welcome, instrument=tracing, on_handled=outcomes.append, concurrency=concurrency)
    async with running(consumer):
        await until(lambda: len(outcomes) == 2)

    assert [handled.message_id for handled in outcomes] == [None, None]
    assert {each[:2] for each in tracing.seen} == {("settled in nothing", "dead_lettered")}


# -- instruments that fail -------------------------------------------------------------------------------------------


def fail(*_):
    raise ZeroDivisionError("canary")


class EntersBadly:
    def __enter__(self):
        fail()

    def __exit__(self, *_):
        raise AssertionError("it was never entered")


class LeavesBadly:
    def __enter__(self): ...

    def __exit__(self, *_):
        fail()


class Swallows(LeavesBadly):
    def __exit__(self, *_):
        return True


@contextmanager
def yields_nothing():
    return
    yield


@contextmanager
def yields_twice():
    yield
    yield


def instrument(name, method):
    return type("Broken", (Instrument,), {name: method})()


BROKEN = {
    "raises": fail,
    "returns None": lambda *_: None,
    "returns a number": lambda *_: 7,
    "returns no texts": lambda *_: {7: "7", "7": 7},
    "enters badly": lambda *_: EntersBadly(),
    "leaves badly": lambda *_: LeavesBadly(),
    "swallows": lambda *_: Swallows(),
    "yields nothing": lambda *_: yields_nothing(),
    "yields twice": lambda *_: yields_twice(),
}


async def test_the_log_of_an_instrument_that_fails_after_a_handler_does_not_quote_the_handler(caplog):
    class Broken(Instrument):
        @contextmanager
        def processing(self, context, broker):
            try:
                yield
            finally:
                fail()

    async def welcome(event: UserJoined) -> None:
        raise LookupError("swordfish")

    broker = MemoryMessageBroker()
    await EventEmitter(message_broker=broker).emit(UserJoined(user_id=1))
    consumer, reports = consumer_of(broker, welcome, instrument=Broken(), retry=quick())
    async with running(consumer):
        await until(lambda: reports)

    assert "ZeroDivisionError: canary" in caplog.text
    assert "swordfish" not in caplog.text


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["handling", "headers", "sending", "processing", "settled"])
async def test_an_instrument_that_fails_is_logged_once_and_changes_nothing(caplog, name, broken):
    failing = instrument(name, broken)
    recorder, contexts = Recorder(), []
    mediator = Mediator(requests_of(ask), message_broker=recorder, instrument=failing)

    async def welcome(event: UserJoined, context: MessageContext) -> None:
        contexts.append(context)
        assert current_message() == context
        assert await mediator.send(Ask()) == "nothing"

    outcomes = await consumed(welcome, sent=3, count=3, instrument=failing)

    assert [each.outcome for each in outcomes] == ["acked"] * 3
    assert len(contexts) == 3
    assert recorder.names == ["UserJoined"] * 6
    logged = [each for each in caplog.records if each.name == "diator.instruments"]
    assert {each.levelno for each in logged} <= {logging.ERROR}
    of_kind = {(each.getMessage(), each.threadName) for each in logged}
    assert len(logged) <= 2 * len(of_kind)  # once for the mediator, once for the consumer
    if broken is fail:
        assert logged
        assert f"Broken.{name} failed with ZeroDivisionError" in logged[0].getMessage()
        assert "canary" not in logged[0].getMessage()
        of_all = {"instrument": "Broken", "method": name, "error_type": "ZeroDivisionError"}
        assert fields(logged[0]).items() > of_all.items()
        assert "message_id" in fields(logged[0])


@pytest.mark.parametrize("name", ["handling", "sending"])
async def test_an_instrument_swallows_no_error(name):
    mediator = Mediator(requests_of(ask), message_broker=Refusing(), instrument=instrument(name, lambda *_: Swallows()))

    with pytest.raises(EventsNotSent):
        await mediator.send(Ask())


@pytest.mark.parametrize("wrong", [Tracing, object(), "opentelemetry", 7])
def test_what_is_not_an_instrument_is_refused_at_once(wrong):
    for make in (
        lambda: Mediator(RequestMap(), instrument=wrong),
        lambda: EventEmitter(instrument=wrong),
        lambda: Consumer(MemoryMessageBroker(), event_map=events_of(ask_nothing), instrument=wrong),
    ):
        with pytest.raises(
            ConfigurationError, match=r"instrument must be .* derives from diator\.instruments\.Instrument"
        ):
            make()


def test_an_asynchronous_method_is_refused_at_once():
    class Waiting(Instrument):
        async def settled(self, handled, broker, /): ...

    with pytest.raises(ConfigurationError, match=r"Waiting\.settled is asynchronous; write it without `async`$"):
        Mediator(RequestMap(), instrument=Waiting())


async def ask_nothing(event: UserJoined) -> None: ...


async def test_an_emitter_of_the_program_has_an_instrument_of_its_own():
    of_mediator, of_emitter, recorder = Tracing(), Tracing(), Recorder()
    emitter = EventEmitter(EventMap(), message_broker=recorder, instrument=of_emitter)

    await Mediator(requests_of(ask), event_emitter=emitter, instrument=of_mediator).send(Ask())

    assert [each[0] for each in of_mediator.seen] == ["handling begins in nothing", "handling ends"]
    assert [each[0] for each in of_emitter.seen] == ["sending begins in handling", "sending ends"]
