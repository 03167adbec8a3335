"""What `Mediator.send` promises, also when things go wrong."""

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from diator._hints import name_of
from diator.container import Container
from diator.events import Event, EventEmitter, EventHandler, Events, NotificationEvent
from diator.exceptions import (
    BrokerNotConfigured,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    EventHandlersFailed,
    EventsNotSent,
    HandlerNotFound,
    NotAnEvent,
    ResolutionError,
    SharedHandler,
)
from diator.instruments import Instrument
from diator.mediator import Mediator
from diator.requests import RequestHandler
from tests.records import fields
from tests.unit.doubles import (
    Api,
    BatchRecorder,
    Greeted,
    Join,
    MeetingChanged,
    Noticed,
    Outbox,
    Recorder,
    Unencodable,
    UserJoined,
    Witness,
    events_of,
    mediator_of,
    requests_of,
)


class Singletons:
    """A container that returns the same object of each type every time."""

    def __init__(self):
        self._made = {}

    async def resolve(self, type_):
        return self._made.setdefault(type_, type_())


class SingletonsAtOnce(Singletons):
    """The same, without waiting."""

    def factory(self, type_):
        return lambda shared: self._made.setdefault(type_, type_())


@pytest.fixture(params=[Singletons, SingletonsAtOnce])
def sharing(request):
    """Make a container that returns the same object of each type, and has no `is_shared`."""
    return lambda *_: request.param()


class Newly:
    """A container that returns a new object each time, and has no `factory`."""

    async def resolve(self, type_):
        return type_()


async def through(message, handle):
    """A middleware that does nothing."""
    return await handle(message)


class Silent(Instrument):
    """An instrument that does nothing."""


#: The ways in which a handler is reached: as directly as can be, through middlewares, built by a container that waits,
#: and surrounded by an instrument.
WAYS = {
    "bare": {},
    "in a middleware": {"middlewares": [through]},
    "by a container": {"container": Newly()},
    "by an instrument": {"instrument": Silent()},
}


@pytest.fixture(params=WAYS)
def wire(request):
    """Make a mediator, for each code path to a handler."""
    return partial(mediator_of, **WAYS[request.param])


def function_raising(*events: Any):
    async def join(command: Join, raised: Events) -> str:
        raised.extend(events)
        return f"user {command.user_id}"

    return join


def class_raising(*events: Any):
    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.extend(events)
            return f"user {request.user_id}"

    return JoinHandler


@pytest.fixture(params=[function_raising, class_raising], ids=["function", "class"])
def raising(request):
    """Make a handler of `Join` that raises the given events and returns a response."""
    return request.param


# -- a request is handled --------------------------------------------------------------------------------------------


async def test_returns_the_response_of_the_handler(wire):
    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            return f"user {request.user_id}"

    mediator = wire(JoinHandler)

    answer = await mediator.send(Join(user_id=7))

    assert answer == "user 7"


async def test_an_unbound_request_is_refused_by_name(wire):
    mediator = wire()

    with pytest.raises(HandlerNotFound, match=r"RequestMap\.bind\(Join, …\)") as caught:
        await mediator.send(Join())

    assert caught.value.request_type is Join


async def test_a_subclass_of_a_bound_request_is_unbound(wire, raising):
    class JoinLoudly(Join):
        pass

    mediator = wire(raising())

    with pytest.raises(HandlerNotFound, match="JoinLoudly"):
        await mediator.send(JoinLoudly())


async def test_a_handler_may_be_bound_after_the_mediator_was_made(raising):
    requests = requests_of()
    mediator = Mediator(requests)
    requests.handler(raising())

    assert await mediator.send(Join(user_id=7)) == "user 7"


async def test_a_function_receives_its_dependencies():
    async def join(command: Join, prefix: str, suffix: bytes = b"!") -> str:
        return f"{prefix} {command.user_id}{suffix.decode()}"

    container = Container()
    container.register_instance(str, "user")

    assert await mediator_of(join, container=container).send(Join(user_id=7)) == "user 7!"


async def test_a_parameter_of_unknown_type_keeps_its_default():
    async def join(command: Join, answer="joined") -> str:
        return answer

    assert await mediator_of(join).send(Join()) == "joined"


# -- construction ----------------------------------------------------------------------------------------------------


def test_a_handler_that_can_never_be_built_is_refused_at_construction():
    class JoinHandler(RequestHandler[Join, str]):
        def __init__(self, api: Api):
            self.api = api

        async def handle(self, request: Join) -> str:
            return ""

    with pytest.raises(ResolutionError, match="Api is not registered"):
        mediator_of(JoinHandler)


def test_an_event_handler_that_can_never_be_built_is_refused_at_construction():
    async def greet(event: Noticed, api: Api) -> None: ...

    with pytest.raises(ResolutionError) as raised:
        mediator_of(on_events=[greet])
    problem = "Api is not registered; call register(Api, …) or register_instance"
    assert str(raised.value).splitlines()[0] == problem
    assert raised.value.path == (name_of(greet), "Api")


@pytest.mark.parametrize("name", ["api", "events"])
def test_a_parameter_without_a_hint_is_refused_at_construction(name):
    async def take_api(command: Join, api) -> str: ...
    async def take_events(command: Join, events) -> str: ...

    handler, remedy = {"api": (take_api, ""), "events": (take_events, "; annotate it as `events: Events`")}[name]
    with pytest.raises(ResolutionError) as raised:
        mediator_of(handler)
    assert str(raised.value).splitlines()[0] == f"parameter {name!r} of {name_of(handler)} has no type hint{remedy}"
    assert raised.value.path == (name_of(handler),)


async def test_a_dependency_after_a_parameter_with_a_default_is_passed():
    async def join(command: Join, limit: int = 3, *, api: Api) -> str:
        return f"{limit} {type(api).__name__}"

    container = Container()
    container.register_instance(Api, Api())
    assert await mediator_of(join, container=container).send(Join()) == "3 Api"


async def test_a_container_that_tells_nothing_is_not_asked_for_a_parameter_with_a_default():
    class Resolving:
        async def resolve(self, type_, /):
            raise AssertionError(f"asked for {type_}")

    async def join(command: Join, limit: int = 3) -> str:
        return f"{limit}"

    assert await mediator_of(join, container=Resolving()).send(Join()) == "3"


def test_a_parameter_that_cannot_be_passed_by_name_is_refused_at_construction():
    async def join(command: Join, api: Api, /) -> str: ...

    container = Container()
    container.register_instance(Api, Api())

    with pytest.raises(ResolutionError, match=r"^parameter 'api' is positional-only; remove the `/`\n.*join$"):
        mediator_of(join, container=container)


def test_a_dependency_whose_type_does_not_exist_is_refused_at_construction():
    async def join(command: Join, api: "Apy") -> str: ...  # noqa: F821

    requests = requests_of()
    requests.bind(Join, join)

    with pytest.raises(ResolutionError, match="name 'Apy', which its module does not define at run time") as caught:
        Mediator(requests)

    assert [step.rpartition(".")[2] for step in caught.value.path] == ["join"]


@pytest.mark.parametrize(
    ("name", "wrong", "what"),
    [
        ("request_map", None, "None"),
        ("request_map", events_of(), "an object of EventMap"),
        ("event_emitter", Recorder(), "an object of Recorder"),
        ("event_emitter", EventEmitter, "the class EventEmitter"),
        ("event_map", requests_of(), "an object of RequestMap"),
        ("container", Singletons, "the class Singletons"),
        ("message_broker", "redis://localhost", "an object of str"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(name, wrong, what):
    with pytest.raises(ConfigurationError, match=f"^{name} must be .*, and it is {what}$"):
        Mediator(**{"request_map": requests_of(), name: wrong})


@pytest.mark.parametrize("option", [{"event_map": events_of()}, {"message_broker": Recorder()}])
def test_an_emitter_and_its_parts_cannot_be_passed_together(option):
    problem = "event_emitter was passed together with event_map, message_broker, headers or codec"
    remedy = "pass these to the EventEmitter instead"
    with pytest.raises(ConfigurationError, match=f"^{problem}; {remedy}$"):
        Mediator(requests_of(), event_emitter=EventEmitter(), **option)


def test_mediators_with_different_containers_cannot_share_an_emitter():
    emitter = EventEmitter()
    Mediator(requests_of(), Container(), emitter)

    problem = "^mediators or consumers with different containers share this EventEmitter; pass a container to it$"
    with pytest.raises(ConfigurationError, match=problem):
        Mediator(requests_of(), Container(), emitter)


async def test_the_container_of_the_emitter_builds_the_handlers_of_its_events():
    given = []

    async def on_noticed(event: Noticed, api: Api) -> None:
        given.append(api)

    containers = [Container(), Container()]
    for container in containers:
        container.register_instance(Api, Api())
    emitter = EventEmitter(events_of(on_noticed), containers[0])
    mediator = Mediator(requests_of(function_raising(Noticed())), containers[1], emitter)

    await mediator.send(Join())

    assert given == [await containers[0].resolve(Api)]


def test_a_program_that_only_consumes_an_event_needs_no_broker_in_the_emitter(raising):
    async def on_joined(event: UserJoined) -> None: ...

    mediator_of(raising(), on_events=[on_joined])


# -- events are sent -------------------------------------------------------------------------------------------------


async def test_events_are_sent_in_the_order_in_which_they_were_raised(wire, raising):
    broker = Recorder()
    mediator = wire(raising(UserJoined(), MeetingChanged(), UserJoined()), message_broker=broker)

    await mediator.send(Join())

    assert broker.names == ["UserJoined", "MeetingChanged", "UserJoined"]


async def test_events_are_sent_after_the_middlewares_have_finished(raising):
    broker = Recorder()
    witness = Witness(broker)
    mediator = mediator_of(raising(UserJoined()), message_broker=broker, middlewares=[witness])

    await mediator.send(Join())

    assert (witness.sent_by_then, broker.names) == ([], ["UserJoined"])


async def test_a_transactional_broker_is_called_inside_the_middlewares(raising):
    broker = Outbox()
    witness = Witness(broker)
    mediator = mediator_of(raising(UserJoined()), message_broker=broker, middlewares=[witness])

    await mediator.send(Join())

    assert (witness.sent_by_then, broker.names) == (["UserJoined"], ["UserJoined"])


async def test_an_error_of_a_transactional_broker_ends_the_unit_of_work(raising):
    broker = Outbox(down_for={"UserJoined"})
    witness = Witness(broker)
    mediator = mediator_of(raising(UserJoined()), message_broker=broker, middlewares=[witness])

    with pytest.raises(BrokerUnavailable) as caught:
        await mediator.send(Join())

    assert witness.outcome is caught.value


class BySelfEvents(RequestHandler[Join, str]):
    async def handle(self, request: Join) -> str:
        self.events.append(UserJoined())
        return ""


class ByProperty(RequestHandler[Join, str]):
    """as in older programs."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> str:
        self._events.append(UserJoined())
        return ""


class WithoutBase:
    """A handler without a base class, with a list of events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def handle(self, request: Join) -> str:
        self.events.append(UserJoined())
        return ""


class WithSlots:
    __slots__ = ("events",)

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def handle(self, request: Join) -> str:
        self.events.append(UserJoined())
        return ""


class ByAddition(RequestHandler[Join, str]):
    async def handle(self, request: Join) -> str:
        self.events += [UserJoined()]
        return ""


class ByAssignment(RequestHandler[Join, str]):
    async def handle(self, request: Join) -> str:
        self.events.append(MeetingChanged())
        self.events = [UserJoined()]
        return ""


class FromItsConstructor(RequestHandler[Join, str]):
    def __init__(self) -> None:
        self.events = []

    async def handle(self, request: Join) -> str:
        self.events.append(UserJoined())
        return ""


async def by_addition(request: Join, events: Events) -> str:
    events += [UserJoined()]
    return ""


EVERY_KIND = [
    *(ByAddition, ByAssignment, FromItsConstructor, by_addition),
    *(BySelfEvents, ByProperty, WithoutBase, WithSlots, function_raising(UserJoined())),
]


@pytest.mark.parametrize("handler", EVERY_KIND, ids=lambda handler: handler.__name__)
async def test_every_kind_of_handler_can_raise_events(wire, handler):
    broker = Recorder()

    await wire(handler, message_broker=broker).send(Join())

    assert broker.names == ["UserJoined"]


class OfRodi:
    """A container that builds a *type_* as an object of another class, and shares it between no messages."""

    def __init__(self, type_, built):
        self._built = {type_: built}

    def factory(self, type_):
        return lambda _: self._built.get(type_, type_)()

    async def resolve(self, type_):
        return self.factory(type_)({})


def built_by_a_factory(handler, built):
    container = Container()
    container.register(handler, partial(built))
    return container


@pytest.mark.parametrize("container_of", [built_by_a_factory, OfRodi])
@pytest.mark.parametrize("handler", [BySelfEvents, ByProperty])
async def test_the_events_of_a_subclass_that_the_container_builds_are_sent(container_of, handler):
    """The property of the object counts: the bound class may have another one, or that of the base class."""

    class Built(handler):
        def __init__(self) -> None:
            self._own: list[Event] = []
            super().__init__()

        @property
        def events(self) -> list[Event]:
            return self._own

        async def handle(self, request: Join) -> str:
            self._own.append(UserJoined())
            return ""

    broker = Recorder()
    mediator = mediator_of(handler, container=container_of(handler, Built), message_broker=broker)

    for _ in range(2):
        await mediator.send(Join())

    assert broker.names == ["UserJoined", "UserJoined"]


@dataclass(frozen=True, kw_only=True)
class Tagged(NotificationEvent):
    tags: list[str]


async def test_a_later_change_to_an_event_does_not_change_its_message(raising):
    tags = ["first"]
    broker = Recorder()

    async def change_afterwards(message, handle):
        response = await handle(message)
        tags.append("second")
        return response

    mediator = mediator_of(raising(Tagged(tags=tags)), message_broker=broker, middlewares=[change_afterwards])

    await mediator.send(Join())

    assert broker.sent[0].payload["tags"] == ["first"]


async def test_a_thousand_concurrent_sends_keep_their_events_apart(wire):
    broker = Recorder()

    class JoinHandler(RequestHandler[Join, int]):
        async def handle(self, request: Join):
            self.events.append(UserJoined(user_id=request.user_id))
            await asyncio.sleep(0)
            self.events.append(Noticed(user_id=request.user_id))
            return request.user_id

    class NoticedHandler(EventHandler[Noticed]):
        async def handle(self, event: Noticed):
            await asyncio.sleep(0)
            self.events.append(UserJoined(user_id=-event.user_id))

    mediator = wire(JoinHandler, on_events=[NoticedHandler], message_broker=broker)

    answers = await asyncio.gather(*(mediator.send(Join(user_id=user)) for user in range(1, 1001)))

    assert answers == [*range(1, 1001)]
    assert sorted(message.payload["user_id"] for message in broker.sent) == [*range(-1000, 0), *range(1, 1001)]


# -- domain events ---------------------------------------------------------------------------------------------------


async def test_domain_events_are_handled_inside_the_middlewares(raising):
    handled = []

    async def on_noticed(event: Noticed) -> None:
        handled.append(event)

    async def look(message, handle):
        response = await handle(message)
        handled.append("middleware ends")
        return response

    await mediator_of(raising(Noticed()), on_events=[on_noticed], middlewares=[look]).send(Join())

    assert handled == [Noticed(), "middleware ends"]


async def test_events_of_event_handlers_are_sent_after_those_of_the_request(wire, raising):
    broker = Recorder()

    async def on_noticed(event: Noticed, raised: Events) -> None:
        raised += [Greeted(), MeetingChanged(title="by noticed")]

    class OnGreeted(EventHandler[Greeted]):
        async def handle(self, event: Greeted) -> None:
            self.events.append(MeetingChanged(title="by greeted"))

    mediator = wire(
        raising(Noticed(), MeetingChanged(title="by join")), on_events=[on_noticed, OnGreeted], message_broker=broker
    )

    await mediator.send(Join())

    assert [message.payload["title"] for message in broker.sent] == ["by join", "by noticed", "by greeted"]


async def test_domain_events_are_handled_one_after_another(wire, raising):
    steps = []

    async def first(event: Noticed) -> None:
        steps.append(f"first begins {event.user_id}")
        await asyncio.sleep(0)
        steps.append(f"first ends {event.user_id}")

    async def second(event: Noticed) -> None:
        steps.append(f"second {event.user_id}")

    await wire(raising(Noticed(user_id=1), Noticed(user_id=2)), on_events=[first, second]).send(Join())

    assert steps == [
        *("first begins 1", "first ends 1", "second 1"),
        *("first begins 2", "first ends 2", "second 2"),
    ]


async def test_nothing_outlives_a_send(wire, raising):
    async def on_noticed(event: Noticed) -> None:
        await asyncio.sleep(0.01)

    mediator = wire(raising(Noticed(), UserJoined()), on_events=[on_noticed], message_broker=Recorder())
    before = asyncio.all_tasks()

    await mediator.send(Join())

    assert asyncio.all_tasks() == before


async def test_a_domain_event_needs_no_handler(wire, raising):
    assert await wire(raising(Noticed())).send(Join()) == "user 1"


async def test_any_class_is_a_domain_event_once_it_is_bound(wire, raising):
    handled = []

    async def on_text(event: str) -> None:
        handled.append(event)

    await wire(raising("a text"), on_events=[on_text]).send(Join())

    assert handled == ["a text"]


# -- errors before anything is sent ----------------------------------------------------------------------------------


async def test_an_error_of_a_handler_is_raised_unchanged_and_its_events_are_not_sent(wire):
    broker, boom = Recorder(), RuntimeError("boom")

    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.append(UserJoined())
            raise boom

    with pytest.raises(RuntimeError) as caught:
        await wire(JoinHandler, message_broker=broker).send(Join())

    assert caught.value is boom
    assert broker.sent == []


async def test_a_failing_event_handler_does_not_stop_others_and_nothing_is_sent(wire, raising):
    broker, handled = Recorder(), []

    class Failing(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None:
            raise LookupError("no such user")

    async def failing_too(event: Noticed) -> None:
        raise OSError("no mail")

    async def after(event: Noticed) -> None:
        handled.append(event)

    async def on_greeted(event: Greeted) -> None:
        handled.append(event)

    mediator = wire(
        raising(UserJoined(), Noticed(), Greeted()),
        on_events=[Failing, failing_too, after, on_greeted],
        message_broker=broker,
    )

    with pytest.raises(EventHandlersFailed) as caught:
        await mediator.send(Join())

    assert [type(error) for error in caught.value.exceptions] == [LookupError, OSError]
    assert [error.__notes__ for error in caught.value.exceptions] == [
        [f"raised by {Failing.__qualname__}, which handles Noticed"],
        [f"raised by {failing_too.__qualname__}, which handles Noticed"],
    ]
    assert (handled, broker.sent) == ([Noticed(), Greeted()], [])


@pytest.mark.parametrize("broker", [Recorder(), Outbox()], ids=["sent afterwards", "transactional"])
async def test_an_event_that_cannot_be_encoded_ends_the_unit_of_work(raising, broker):
    witness = Witness()
    mediator = mediator_of(raising(UserJoined(), Unencodable()), message_broker=broker, middlewares=[witness])

    with pytest.raises(EncodingError) as caught:
        await mediator.send(Join())

    assert caught.value.path == "Unencodable.thing"
    assert witness.outcome is caught.value
    assert broker.sent == []


async def test_an_integration_event_without_a_broker_ends_the_unit_of_work(raising):
    witness = Witness()
    mediator = mediator_of(raising(UserJoined()), middlewares=[witness])

    with pytest.raises(BrokerNotConfigured, match="UserJoined") as caught:
        await mediator.send(Join())

    assert caught.value.event_type is UserJoined
    assert witness.outcome is caught.value


async def test_an_object_that_cannot_be_an_event_ends_the_unit_of_work(wire, raising):
    broker = Recorder()

    with pytest.raises(NotAnEvent, match="str was raised"):
        await wire(raising(UserJoined(), "a text"), message_broker=broker).send(Join())

    assert broker.sent == []


async def test_a_cancelled_handler_sends_nothing(wire):
    broker, started = Recorder(), asyncio.Event()

    class JoinHandler(RequestHandler[Join, str]):
        async def handle(self, request: Join) -> str:
            self.events.append(UserJoined())
            started.set()
            await asyncio.Event().wait()
            return ""

    sending = asyncio.create_task(wire(JoinHandler, message_broker=broker).send(Join()))
    await started.wait()
    sending.cancel()

    with pytest.raises(asyncio.CancelledError):
        await sending

    assert broker.sent == []


async def test_a_cancelled_event_handler_sends_nothing_and_is_not_a_failure(wire, raising):
    broker, started = Recorder(), asyncio.Event()

    async def on_noticed(event: Noticed) -> None:
        started.set()
        await asyncio.Event().wait()

    mediator = wire(raising(UserJoined(), Noticed()), on_events=[on_noticed], message_broker=broker)
    sending = asyncio.create_task(mediator.send(Join()))
    await started.wait()
    sending.cancel()

    with pytest.raises(asyncio.CancelledError):
        await sending

    assert broker.sent == []


# -- handlers that are shared between messages -----------------------------------------------------------------------


@pytest.mark.parametrize("handler", [ByProperty, WithoutBase])
async def test_a_shared_handler_that_keeps_its_events_is_refused(sharing, handler):
    """Otherwise the events of the first message would be sent again with the second."""
    broker = Recorder()
    mediator = mediator_of(handler, container=sharing(handler), message_broker=broker)
    await mediator.send(Join())

    with pytest.raises(SharedHandler, match=handler.__name__) as caught:
        await mediator.send(Join())

    assert caught.value.handler_type is handler
    assert len(broker.sent) == 1


async def test_a_shared_object_of_a_subclass_that_keeps_its_events_is_refused():
    """The bound class has the list of the base class, which forgets its events; the object has another one."""

    class Keeps(BySelfEvents):
        def __init__(self) -> None:
            self._own: list[Event] = []

        @property
        def events(self) -> list[Event]:
            return self._own

    container = Singletons()
    container._made[BySelfEvents] = Keeps()
    mediator = mediator_of(BySelfEvents, container=container, message_broker=(broker := Recorder()))
    await mediator.send(Join())

    with pytest.raises(SharedHandler) as caught:
        await mediator.send(Join())

    assert caught.value.handler_type is Keeps
    assert len(broker.sent) == 1


class OneObject(type):
    """A metaclass that makes one object of a class."""

    made = None

    def __call__(cls):
        cls.made = cls.made or super().__call__()
        return cls.made


class ByMetaclass(metaclass=OneObject):
    def __init__(self) -> None:
        self._events: list[Event] = []

    events = ByProperty.events
    handle = ByProperty.handle


class ByNew(ByProperty):
    made: Any = None

    def __new__(cls):
        cls.made = cls.made or super().__new__(cls)
        return cls.made

    def __init__(self) -> None:
        if not hasattr(self, "_events"):
            super().__init__()


@pytest.mark.parametrize("handler", [ByMetaclass, ByNew])
async def test_a_class_that_shares_one_object_is_refused_too(handler, monkeypatch):
    monkeypatch.setattr(handler, "made", None)
    broker = Recorder()
    mediator = mediator_of(handler, message_broker=broker)
    await mediator.send(Join())

    with pytest.raises(SharedHandler):
        await mediator.send(Join())

    assert len(broker.sent) == 1


@pytest.mark.parametrize("handler", [ByProperty, BySelfEvents])
@pytest.mark.parametrize("how", ["singleton", "instance"])
def test_a_singleton_that_raises_events_is_refused_at_construction(handler, how):
    """Two messages at once would mix their events in it."""
    container = Container()
    if how == "singleton":
        container.register(handler, lifetime="singleton")
    else:
        container.register_instance(handler, handler())

    with pytest.raises(ResolutionError) as refused:
        mediator_of(handler, container=container)

    name = handler.__name__
    problem = f"{name} raises events, so it must be transient; it is registered as a singleton"
    assert (str(refused.value).splitlines()[0], refused.value.path) == (problem, (name,))


async def test_a_shared_event_handler_that_keeps_its_events_is_refused(sharing, raising):
    class OnNoticed:
        def __init__(self):
            self._events = []

        @property
        def events(self):
            return self._events

        async def handle(self, event: Noticed):
            self._events.append(UserJoined())

    mediator = mediator_of(
        raising(Noticed(), Noticed()), on_events=[OnNoticed], container=sharing(OnNoticed), message_broker=Recorder()
    )

    with pytest.raises(EventHandlersFailed) as caught:
        await mediator.send(Join())

    assert isinstance(caught.value.exceptions[0], SharedHandler)


class PerSend:
    """A container that looks at the state of the send."""

    def __init__(self):
        self.states = []

    def factory(self, type_):
        def build(shared):
            self.states.append(shared)
            return type_()

        return build

    async def resolve(self, type_):
        raise AssertionError("`factory` is enough")


@pytest.mark.parametrize("middlewares", [[], [through]])
@pytest.mark.parametrize("kind", ["class", "function"])
async def test_a_container_receives_one_state_for_all_handlers_of_a_send(kind, middlewares):
    """And another one for the next send."""

    class OfClass:
        def __init__(self) -> None:
            self.events = [Noticed()]

        async def handle(self, request: Join) -> str:
            return ""

    async def of_function(command: Join, api: Api, events: Events) -> str:
        events.append(Noticed())
        return ""

    class OnNoticed:
        async def handle(self, event: Noticed) -> None: ...

    handler = OfClass if kind == "class" else of_function
    container = PerSend()
    mediator = mediator_of(handler, on_events=[OnNoticed], container=container, middlewares=middlewares)
    for _ in range(2):
        await mediator.send(Join())

    first, second, third, fourth = container.states
    assert isinstance(first, dict)
    assert first is second is not third
    assert third is fourth


async def test_a_shared_handler_without_events_is_allowed(sharing):
    class Quiet(ByProperty):
        async def handle(self, request: Join) -> str:
            return ""

    mediator = mediator_of(Quiet, container=sharing(Quiet))

    assert [await mediator.send(Join()) for _ in range(3)] == ["", "", ""]


async def test_a_shared_handler_with_the_list_of_the_base_class_forgets_its_events(sharing):
    broker = Recorder()
    mediator = mediator_of(BySelfEvents, container=sharing(BySelfEvents), message_broker=broker)

    for _ in range(3):
        await mediator.send(Join())

    assert len({message.message_id for message in broker.sent}) == len(broker.sent) == 3


@pytest.mark.parametrize("middlewares", [[], [through]])
@pytest.mark.parametrize("base", [BySelfEvents, ByProperty])
@pytest.mark.parametrize("error", [TimeoutError, asyncio.CancelledError])
async def test_a_shared_handler_that_failed_does_not_send_its_events_later(sharing, base, middlewares, error):
    """An event of a request that failed or was cancelled is never sent: the next one sends its own, or is refused."""
    broker = Recorder()

    class FailsAtFirst(base):
        failed = False

        async def handle(self, request: Join) -> str:
            answer = await super().handle(request)
            if not self.failed:
                self.failed = True
                raise error
            return answer

    mediator = mediator_of(
        FailsAtFirst, container=sharing(FailsAtFirst), message_broker=broker, middlewares=middlewares
    )
    with pytest.raises(error):
        await mediator.send(Join())

    with contextlib.suppress(SharedHandler):
        await mediator.send(Join())

    assert len(broker.sent) <= 1


# -- errors while sending --------------------------------------------------------------------------------------------


async def test_the_response_survives_a_send_error(wire, raising):
    """EventsNotSent contains the response, the unsent events, and the send error."""
    joined = UserJoined()
    mediator = wire(raising(joined), message_broker=Recorder(down_for={"UserJoined"}))

    with pytest.raises(EventsNotSent, match=f"UserJoined {joined.event_id}") as caught:
        await mediator.send(Join())

    assert caught.value.response == "user 1"
    assert caught.value.events == (joined,)
    assert isinstance(caught.value.__cause__, BrokerUnavailable)
    assert caught.value.__cause__.message_id == joined.event_id


async def test_the_first_unconfirmed_message_stops_the_rest(wire, raising):
    first, second, third = UserJoined(), MeetingChanged(), UserJoined()
    broker = Recorder(down_for={"MeetingChanged"})

    with pytest.raises(EventsNotSent) as caught:
        await wire(raising(first, second, third), message_broker=broker).send(Join())

    assert caught.value.response == "user 1"
    assert caught.value.events == (second, third)
    assert isinstance(caught.value.__cause__, BrokerUnavailable)
    assert [message.message_id for message in broker.sent] == [first.event_id]


async def test_the_unconfirmed_messages_of_a_batch_are_named(wire, raising):
    first, second, third = UserJoined(), MeetingChanged(), UserJoined()
    broker = BatchRecorder(down_for={"MeetingChanged"})

    with pytest.raises(EventsNotSent) as caught:
        await wire(raising(first, second, third), message_broker=broker).send(Join())

    assert caught.value.response == "user 1"
    assert caught.value.events == (second,)
    assert isinstance(caught.value.__cause__, BrokerUnavailable)


async def test_after_an_unexpected_error_all_events_count_as_unsent(wire, raising):
    class Broken:
        async def send_message(self, message):
            raise KeyError(message.message_name)

    joined = UserJoined()

    with pytest.raises(EventsNotSent) as caught:
        await wire(raising(joined), message_broker=Broken()).send(Join())

    assert caught.value.events == (joined,)
    assert isinstance(caught.value.__cause__, KeyError)


async def test_a_send_that_is_cancelled_while_sending_logs_the_message_ids(wire, raising, caplog):
    class Slow:
        async def send_message(self, message):
            started.set()
            await asyncio.Event().wait()

    joined, changed, started = UserJoined(), MeetingChanged(), asyncio.Event()
    sending = asyncio.create_task(wire(raising(joined, changed), message_broker=Slow()).send(Join()))
    await started.wait()
    sending.cancel()

    with pytest.raises(asyncio.CancelledError):
        await sending

    [line] = caplog.messages
    assert caplog.records[0].name == "diator.mediator"
    what, ids = "cancelled while sending the events of a handled request", f"{joined.event_id}, {changed.event_id}"
    assert line == f"{what}; messages may not be sent: {ids}"
    assert fields(caplog.records[0]) == {
        **dict.fromkeys(("message_id", "correlation_id", "attempt", "group")),  # of the message that is handled here
        "message_ids": ids.split(", "),
        "message_names": ["MeetingChanged", "UserJoined"],
    }
