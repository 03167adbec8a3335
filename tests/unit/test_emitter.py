"""What `EventEmitter.emit` does with each kind of event, without a mediator."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from uuid import uuid4

import pytest

from diator.brokers.codec import decode, encode
from diator.container import Container
from diator.events import DomainEvent, EventEmitter, EventHandler, Events, NotificationEvent
from diator.exceptions import (
    BindingError,
    BrokerNotConfigured,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    EventHandlersFailed,
    MessagesNotSent,
    NotAnEvent,
)
from diator.mediator import Mediator
from diator.requests import RequestMap
from tests.unit.doubles import (
    Api,
    BatchRecorder,
    Greeted,
    MeetingChanged,
    Noticed,
    Outbox,
    Recorder,
    Unencodable,
    UserJoined,
    events_of,
)

# -- integration events ----------------------------------------------------------------------------------------------


async def test_an_integration_event_becomes_a_message():
    broker, event = Recorder(), UserJoined(user_id=7)

    await EventEmitter(message_broker=broker).emit(event)

    [message] = broker.sent
    assert (message.message_type, message.message_name) == ("notification_event", "UserJoined")
    assert message.message_id == event.event_id
    assert message.payload == {
        "event_id": str(event.event_id),
        "event_timestamp": event.event_timestamp.isoformat().replace("+00:00", "Z"),
        "user_id": 7,
    }
    assert (message.key, message.headers) == (None, {})


async def test_a_copy_of_a_message_under_another_name_has_its_own_body():
    """As a broker that wraps another one makes it. Messages of one class share the beginning of their bodies."""
    await EventEmitter(message_broker=(broker := Recorder())).emit(UserJoined())
    (message,) = broker.sent

    copied = replace(message, message_name="Renamed")

    assert decode(encode(message)) == message
    assert decode(encode(copied)) == copied


async def test_an_ecst_event_has_its_message_type():
    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(MeetingChanged())

    assert broker.sent[0].message_type == "ecst_event"


async def test_an_event_class_may_set_name_type_and_key():
    @dataclass(frozen=True, kw_only=True)
    class Renamed(NotificationEvent):
        message_type: ClassVar[str] = "audit_event"
        message_name: ClassVar[str] = "meeting.renamed"
        message_key: ClassVar[str] = "meeting_id"
        meeting_id: int

    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(Renamed(meeting_id=7))

    [message] = broker.sent
    assert (message.message_type, message.message_name, message.key) == ("audit_event", "meeting.renamed", "7")
    assert message.payload.keys() == {"event_id", "event_timestamp", "meeting_id"}


async def test_a_key_of_none_means_no_key():
    @dataclass(frozen=True, kw_only=True)
    class Moved(NotificationEvent):
        message_key: ClassVar[str] = "room"
        room: str | None = None

    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(Moved())

    assert broker.sent[0].key is None


async def test_a_field_may_have_the_name_of_a_setting():
    @dataclass(frozen=True, kw_only=True)
    class Logged(NotificationEvent):
        message_name: str = "a field"
        message_key: str = "another"

    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(Logged())

    [message] = broker.sent
    assert (message.message_name, message.key) == ("Logged", None)
    assert message.payload["message_name"] == "a field"


async def test_a_notification_never_becomes_a_domain_event():
    """`message_type` is a field here: the class is refused or its events are sent; none is dropped silently."""

    @dataclass(frozen=True, kw_only=True)
    class Audited(NotificationEvent):
        message_type: str = "audit_event"

    broker = Recorder()

    try:
        await EventEmitter(message_broker=broker).emit(Audited())
    except NotAnEvent:
        return

    assert broker.names == ["Audited"]


async def test_a_key_must_be_a_field():
    @dataclass(frozen=True, kw_only=True)
    class Moved(NotificationEvent):
        message_key: ClassVar[str] = "room"

    with pytest.raises(NotAnEvent, match=r"message_key is 'room', which is not a field"):
        await EventEmitter(message_broker=Recorder()).emit(Moved())


async def test_an_integration_event_without_a_broker_is_refused():
    with pytest.raises(BrokerNotConfigured, match="UserJoined is an integration event, and no message"):
        await EventEmitter().emit(UserJoined())


async def test_an_event_that_json_cannot_represent_is_not_sent():
    broker = Recorder()

    with pytest.raises(EncodingError, match=r"Unencodable\.thing: values of object cannot be written as JSON"):
        await EventEmitter(message_broker=broker).emit(Unencodable())

    assert broker.sent == []


async def test_the_send_error_of_the_broker_is_raised_unchanged():
    with pytest.raises(BrokerUnavailable):
        await EventEmitter(message_broker=Recorder(down_for={"UserJoined"})).emit(UserJoined())


async def test_unbound_classes_cannot_share_a_wire_name():
    @dataclass(frozen=True, kw_only=True)
    class Other(NotificationEvent):
        message_name: ClassVar[str] = "userjoined"

    emitter = EventEmitter(message_broker=Recorder())
    await emitter.emit(UserJoined())

    with pytest.raises(BindingError, match="have the same wire name"):
        await emitter.emit(Other())


@pytest.mark.parametrize("thing", [object(), "a text", {"message_type": "notification_event"}, None])
async def test_an_object_that_cannot_be_an_event_is_refused(thing):
    with pytest.raises(NotAnEvent, match=r"is neither an Event nor bound to a handler; derive it from an event class$"):
        await EventEmitter(message_broker=Recorder()).emit(thing)


async def test_a_class_instead_of_an_event_is_refused():
    with pytest.raises(NotAnEvent, match=r"^a class was raised; raise an instance of the class$"):
        await EventEmitter(message_broker=Recorder()).emit(UserJoined)


# -- domain events ---------------------------------------------------------------------------------------------------


async def test_a_domain_event_is_handled_in_the_process():
    handled = []

    async def on_noticed(event: Noticed) -> None:
        handled.append(event)

    await EventEmitter(events_of(on_noticed), message_broker=(broker := Recorder())).emit(Noticed(user_id=7))

    assert (handled, broker.sent) == ([Noticed(user_id=7)], [])


async def test_a_plain_event_is_a_domain_event():
    class Happened(DomainEvent): ...

    await EventEmitter().emit(Happened())


async def test_handlers_are_built_by_the_emitters_container():
    api, given = Api(), []

    class OnNoticed(EventHandler[Noticed]):
        def __init__(self, api: Api) -> None:
            self.api = api

        async def handle(self, event: Noticed) -> None:
            given.append(self.api)

    container = Container()
    container.register_instance(Api, api)

    await EventEmitter(events_of(OnNoticed), container).emit(Noticed())

    assert given == [api]


async def test_without_a_container_handlers_are_built_by_diators_own():
    handled = []

    class OnNoticed(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None:
            handled.append(event)

    await EventEmitter(events_of(OnNoticed)).emit(Noticed(user_id=7))

    assert handled == [Noticed(user_id=7)]


async def test_a_container_that_is_false_is_used():
    class Registry(dict):
        async def resolve(self, type_):
            resolved.append(type_)
            return type_()

    class OnNoticed(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None: ...

    resolved = []

    await EventEmitter(events_of(OnNoticed), Registry()).emit(Noticed())

    assert resolved == [OnNoticed]


async def test_events_that_handlers_raise_are_sent_too():
    async def on_noticed(event: Noticed, raised: Events) -> None:
        raised += [MeetingChanged(), Greeted()]

    async def on_greeted(event: Greeted, raised: Events) -> None:
        raised.append(UserJoined())

    broker = Recorder()

    await EventEmitter(events_of(on_noticed, on_greeted), message_broker=broker).emit(Noticed())

    assert broker.names == ["MeetingChanged", "UserJoined"]


@dataclass
class Chain(DomainEvent):
    """A domain event whose handler raises other events."""

    raises: list[Any] = field(default_factory=list)


async def on_chain(event: Chain, raised: Events) -> None:
    raised += event.raises


async def test_failures_of_further_events_are_collected_too():
    async def on_noticed(event: Noticed) -> None:
        raise LookupError

    emitter = EventEmitter(events_of(on_chain, on_noticed), message_broker=(broker := Recorder()))

    with pytest.raises(EventHandlersFailed) as caught:
        await emitter.emit(Chain([Noticed(), UserJoined(), Noticed()]))

    assert caught.value.message == "handlers of domain events failed; no integration event was sent"

    assert [type(error) for error in caught.value.exceptions] == [LookupError, LookupError]
    assert broker.sent == []


async def test_events_of_a_failed_handler_are_not_sent():
    handled = []

    async def failing(event: Noticed, raised: Events) -> None:
        raised.append(Greeted())
        raise LookupError

    async def on_greeted(event: Greeted) -> None:
        handled.append(event)

    with pytest.raises(EventHandlersFailed):
        await EventEmitter(events_of(failing, on_greeted)).emit(Noticed())

    assert handled == []


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
async def test_events_of_a_failed_handler_are_not_sent_with_a_later_event_either(at_once, error):
    """Even if the container returns one object for several events, without saying so."""

    class OnNoticed(EventHandler[Noticed]):
        async def handle(self, event: Noticed) -> None:
            self.events.append(UserJoined(user_id=event.user_id))
            if event.user_id == 1:
                raise error

    class Singletons:
        def __init__(self):
            self.made = {}
            if at_once:
                self.factory = lambda type_: lambda shared: self.made.setdefault(type_, type_())

        async def resolve(self, type_):
            return self.made.setdefault(type_, type_())

    emitter = EventEmitter(events_of(OnNoticed), Singletons(), message_broker=(broker := Recorder()))
    with pytest.raises(EventHandlersFailed if error is LookupError else error):
        await emitter.emit(Noticed(user_id=1))
    await emitter.emit(Noticed(user_id=2))

    assert [message.payload["user_id"] for message in broker.sent] == [2]


async def test_a_handler_that_needs_a_scope_may_stand_beside_one_that_does_not():
    handled, container = [], Container()

    async def make_api():
        yield Api()
        handled.append("closed")

    async def plain(event: Noticed) -> None:
        handled.append("plain")

    async def scoped(event: Noticed, api: Api) -> None:
        handled.append("scoped")

    container.register(Api, make_api)
    await EventEmitter(events_of(plain, scoped), container).emit(Noticed())

    assert handled == ["plain", "scoped", "closed"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("event_map", RequestMap()),
        ("event_map", {}),
        ("container", Api()),
        ("container", Container),
        ("message_broker", Api()),
        ("message_broker", Recorder),
    ],
    ids=["request-map", "dict", "no-container", "container-class", "no-broker", "broker-class"],
)
def test_an_argument_of_the_wrong_type_is_named(name, wrong):
    with pytest.raises(ConfigurationError, match=f"^{name} must be"):
        EventEmitter(**{name: wrong})
    with pytest.raises(ConfigurationError, match=f"^{name} must be"):
        Mediator(RequestMap(), **{name: wrong})


# -- several messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Recorder, Outbox])
async def test_the_first_unconfirmed_message_stops_the_rest(kind):
    first, second, third = UserJoined(), MeetingChanged(), UserJoined()
    emitter = EventEmitter(events_of(on_chain), message_broker=(broker := kind(down_for={"MeetingChanged"})))

    with pytest.raises(MessagesNotSent) as caught:
        await emitter.emit(Chain([first, second, third]))

    assert caught.value.message_ids == (second.event_id, third.event_id)
    assert isinstance(caught.value.__cause__, BrokerUnavailable)
    assert [message.message_id for message in broker.sent] == [first.event_id]


async def test_a_batch_broker_receives_all_messages_at_once():
    batches = []

    class Batches(BatchRecorder):
        async def send_messages(self, messages, /):
            batches.append([message.message_id for message in messages])

    events = [UserJoined(event_id=uuid4()) for _ in range(3)]

    await EventEmitter(events_of(on_chain), message_broker=Batches()).emit(Chain(events))

    assert batches == [[event.event_id for event in events]]


async def test_an_outbox_receives_each_message_once():
    """It is called inside of the unit of work, and not again after it."""
    broker = Outbox()

    await EventEmitter(events_of(on_chain), message_broker=broker).emit(Chain([UserJoined(), MeetingChanged()]))

    assert broker.names == ["UserJoined", "MeetingChanged"]


async def test_a_batch_broker_is_not_called_without_messages():
    class Batches(Recorder):
        async def send_messages(self, messages, /):
            raise AssertionError("there is nothing to send")

    await EventEmitter(events_of(on_chain), message_broker=Batches()).emit(Chain())
