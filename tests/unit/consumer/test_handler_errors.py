"""The events and errors that handlers raise."""

import asyncio
import contextlib

import pytest

from diator.container import Container
from diator.events import EventEmitter, EventHandler, Events
from diator.exceptions import (
    BrokerUnavailable,
)
from diator.middlewares import BaseMiddleware
from tests.unit.consumer.helpers import JOIN, ONCE, consume, quick, reason_of
from tests.unit.doubles import (
    Api,
    Greeted,
    MeetingChanged,
    Noticed,
    Scripted,
    UserJoined,
    body_of,
    events_of,
)


async def raising(event: UserJoined, events: Events) -> None:
    events += [Noticed(), MeetingChanged()]


async def test_raised_events_are_handled_and_sent_before_the_acknowledgement():
    async def on_noticed(event: Noticed, events: Events) -> None:
        broker.log.append("noticed")
        events.append(Greeted())

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising, on_noticed)

    assert broker.log == ["noticed", ("send", "MeetingChanged"), ("ack",)]


class OnJoined(EventHandler[UserJoined]):
    """A class. Alone and without middlewares it is called in one coroutine, otherwise in several."""

    error: Exception | None = None

    async def handle(self, event: UserJoined) -> None:
        self.events.extend([Noticed(), MeetingChanged()])
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("middlewares", [[], [BaseMiddleware()]], ids=["alone", "with a middleware"])
async def test_a_handler_class_raises_events_too(middlewares):
    async def on_noticed(event: Noticed, events: Events) -> None:
        broker.log.append("noticed")
        events.append(Greeted())

    broker = Scripted(body_of(JOIN))
    await consume(broker, OnJoined, on_noticed, middlewares=middlewares)

    assert broker.log == ["noticed", ("send", "MeetingChanged"), ("ack",)]


@pytest.mark.parametrize("middlewares", [[], [BaseMiddleware()]], ids=["alone", "with a middleware"])
async def test_a_handler_class_that_fails_is_named_and_sends_nothing(middlewares):
    class Failing(OnJoined):
        error = LookupError()

    broker = Scripted(body_of(JOIN))
    [handled] = await consume(broker, Failing, retry=ONCE, middlewares=middlewares)

    assert [what for what, *_ in broker.log] == ["dead_letter"]
    assert handled.error is Failing.error
    [note] = handled.error.__notes__
    assert "Failing, which handles UserJoined" in note


@pytest.mark.parametrize("middlewares", [[], [BaseMiddleware()]], ids=["alone", "with a middleware"])
async def test_if_sending_what_a_handler_class_raised_fails_the_delivery_is_retried(middlewares):
    broker = Scripted(body_of(JOIN), failing={"send": BrokerUnavailable("it is away")})
    [handled] = await consume(broker, OnJoined, retry=quick(delayed_retries=1), middlewares=middlewares)

    assert (broker.log, reason_of(handled)) == ([("retry",)], "failed: BrokerUnavailable")


async def test_raised_events_go_through_the_emitter_that_is_passed():
    async def on_noticed(event: Noticed) -> None: ...

    elsewhere, broker = Scripted(), Scripted(body_of(JOIN))
    await consume(broker, raising, event_emitter=EventEmitter(events_of(on_noticed), message_broker=elsewhere))

    assert (elsewhere.log, broker.log) == ([("send", "MeetingChanged")], [("ack",)])


@pytest.mark.parametrize("middlewares", [[], [BaseMiddleware()]], ids=["alone", "with a middleware"])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
async def test_events_of_a_failed_handler_are_not_sent_with_a_later_message(middlewares, at_once, error):
    """Even if the container returns one object for several messages, without saying so."""

    class FailsAtFirst(EventHandler[UserJoined]):
        async def handle(self, event: UserJoined) -> None:
            self.events.append(MeetingChanged())
            if event.user_id == 1:
                raise error

    class Singletons:
        def __init__(self):
            self.made = {}
            if at_once:
                self.factory = lambda type_: lambda shared: self.made.setdefault(type_, type_())

        async def resolve(self, type_):
            return self.made.setdefault(type_, type_())

    broker = Scripted(*(body_of(UserJoined(user_id=number)) for number in (1, 2)))
    await consume(broker, FailsAtFirst, count=2, container=Singletons(), middlewares=middlewares, retry=ONCE)

    assert [call[0] for call in broker.log].count("send") == 1


async def test_a_container_receives_one_state_for_all_handlers_of_a_delivery():
    """And another one for the next delivery."""
    states = []

    class LooksAtState:
        def factory(self, type_):
            def build(shared):
                states.append(shared)
                return type_()

            return build

        async def resolve(self, type_):
            raise AssertionError("`factory` is enough")

    class RaisesNoticed(EventHandler[UserJoined]):
        async def handle(self, event: UserJoined) -> None:
            self.events.append(Noticed())

    class OnNoticed(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None: ...

    await consume(Scripted(*[body_of(JOIN)] * 2), RaisesNoticed, OnNoticed, container=LooksAtState(), count=2)

    first, second, third, fourth = states
    assert isinstance(first, dict)
    assert first is second is not third
    assert third is fourth


@pytest.mark.parametrize("scoped", [True, False])
async def test_after_a_swallowed_error_no_event_is_sent(scoped):
    """A middleware calls the handler twice, and swallows the error of the second call."""
    calls = []

    async def twice(event, handle):
        await handle(event)
        with contextlib.suppress(LookupError):
            await handle(event)

    async def fails_at_last(event: UserJoined, api: Api, events: Events) -> None:
        calls.append(event)
        events.append(MeetingChanged())
        if len(calls) > 1:
            raise LookupError

    container = Container()
    container.register(Api, lifetime="scoped" if scoped else "transient")
    await consume(broker := Scripted(body_of(JOIN)), fails_at_last, container=container, middlewares=[twice])

    assert (len(calls), broker.log) == (2, [("ack",)])


async def test_an_emitter_without_a_container_uses_that_of_the_consumer():
    given = []

    async def on_noticed(event: Noticed, api: Api) -> None:
        given.append(api)

    container = Container()
    container.register_instance(Api, api := Api())
    emitter = EventEmitter(events_of(on_noticed), message_broker=Scripted())
    await consume(Scripted(body_of(JOIN)), raising, event_emitter=emitter, container=container)

    assert given == [api]


async def test_if_sending_fails_the_delivery_is_retried():
    broker = Scripted(body_of(JOIN), failing={"send": BrokerUnavailable("it is away")})
    [handled] = await consume(broker, raising, retry=quick(immediate_retries=1, delayed_retries=1))

    assert (broker.log, reason_of(handled)) == ([("retry",)], "failed: BrokerUnavailable")


async def test_a_failed_handler_sends_nothing():
    async def failing(event: UserJoined) -> None:
        raise LookupError

    async def raising_and_failing(event: UserJoined, events: Events) -> None:
        await raising(event, events)
        await failing(event)

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising_and_failing, retry=ONCE)

    assert [what for what, *_ in broker.log] == ["dead_letter"]


async def swallowing(message, handle):
    with contextlib.suppress(Exception):
        await handle(message)


@pytest.mark.parametrize(("middlewares", "outcome"), [([], "dead_letter"), ([swallowing], "ack")])
async def test_after_a_commit_that_failed_no_event_is_sent(middlewares, outcome):
    """Otherwise other services would act on events that never happened, again with every retry."""

    async def make_api():
        yield Api()
        raise OSError("the commit failed")

    async def storing(event: UserJoined, api: Api, events: Events) -> None:
        events.append(MeetingChanged())

    container = Container()
    container.register(Api, make_api, lifetime="scoped")
    broker = Scripted(body_of(JOIN))
    await consume(broker, storing, container=container, middlewares=middlewares, retry=ONCE)

    assert [what for what, *_ in broker.log] == [outcome]


async def test_if_a_middleware_fails_after_the_handler_no_event_is_sent():
    class Failing(BaseMiddleware):
        async def process_response(self, response):
            raise LookupError

    broker = Scripted(body_of(JOIN))
    await consume(broker, raising, middlewares=[Failing()], retry=ONCE)

    assert [what for what, *_ in broker.log] == ["dead_letter"]
