"""Requests, responses and events that are dataclasses, attrs classes, or pydantic or msgspec models."""

import dataclasses
import datetime as dt
from typing import ClassVar
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest

from diator.brokers.codec import payload_decoder, payload_encoder
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.events import DomainEvent, ECSTEvent, Event, EventEmitter, NotificationEvent
from diator.exceptions import ConfigurationError, DecodingError, EncodingError, NotAnEvent
from diator.requests import Request
from diator.response import Response
from tests.unit.doubles import Recorder, events_of, mediator_of


def now():
    return dt.datetime.now(dt.UTC)


@dataclasses.dataclass
class TextTime:
    event_timestamp: str
    event_id: UUID = dataclasses.field(default_factory=uuid4)
    message_type: ClassVar[str] = "notification_event"


async def test_a_timestamp_that_is_not_a_datetime_is_refused():
    with pytest.raises(EncodingError, match="event_timestamp must have a time zone"):
        await EventEmitter(message_broker=MemoryMessageBroker()).emit(TextTime("2026-03-07T09:26:02Z"))


def as_plain(base):
    class Plain(base):
        def __init__(self, user_id):
            self.user_id = user_id

    return Plain


def as_dataclass(base):
    @dataclasses.dataclass
    class Dataclass(base):
        user_id: int

    return Dataclass


def as_slots(base):
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Slots(base):
        user_id: int

    return Slots


def as_attrs(base):
    @attrs.frozen
    class Attrs(base):
        user_id: int

    return Attrs


def as_pydantic(base):
    class Pydantic(pydantic.BaseModel, base):
        user_id: int

    return Pydantic


def as_pydantic_dataclass(base):
    @pydantic.dataclasses.dataclass(frozen=True)
    class PydanticDataclass(base):
        user_id: int

    return PydanticDataclass


def as_struct(base):
    class Struct(msgspec.Struct, base):
        user_id: int

    return Struct


@pytest.fixture(
    params=[as_plain, as_dataclass, as_slots, as_attrs, as_pydantic, as_pydantic_dataclass, as_struct],
    ids=lambda make: make.__name__,
)
def model(request):
    return request.param


async def test_a_request_and_its_response(model):
    question, answer = model(Request), model(Response)

    async def read(query: question) -> answer:
        return answer(user_id=query.user_id)

    response = await mediator_of(read).send(question(user_id=7))

    assert isinstance(response, Response)
    assert response.user_id == 7


@pytest.mark.parametrize("base", [Event, DomainEvent])
async def test_a_domain_event(model, base):
    event_type, handled = model(base), []

    async def on_happened(event: event_type) -> None:
        handled.append(event.user_id)

    await EventEmitter(events_of(on_happened)).emit(event_type(user_id=7))

    assert handled == [7]


# -- integration events ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataclassJoined(NotificationEvent):
    user_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataclassChanged(ECSTEvent):
    user_id: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlotsJoined(NotificationEvent):
    user_id: int


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class PydanticDataclassJoined(NotificationEvent):
    user_id: int


@attrs.frozen(kw_only=True)
class AttrsJoined(Event):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = attrs.field(factory=uuid4)
    event_timestamp: dt.datetime = attrs.field(factory=now)
    user_id: int


class PydanticJoined(pydantic.BaseModel, Event):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = pydantic.Field(default_factory=uuid4)
    event_timestamp: dt.datetime = pydantic.Field(default_factory=now)
    user_id: int


class StructJoined(msgspec.Struct, Event, kw_only=True, frozen=True):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = msgspec.field(default_factory=uuid4)
    event_timestamp: dt.datetime = msgspec.field(default_factory=now)
    user_id: int


@dataclasses.dataclass(kw_only=True)
class OfNobody:
    """An event that does not derive from a class of diator."""

    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = dataclasses.field(default_factory=uuid4)
    event_timestamp: dt.datetime = dataclasses.field(default_factory=now)
    user_id: int


TRAVELLERS = [
    DataclassJoined,
    DataclassChanged,
    SlotsJoined,
    PydanticDataclassJoined,
    AttrsJoined,
    PydanticJoined,
    StructJoined,
    OfNobody,
]


@pytest.mark.parametrize("event_type", TRAVELLERS)
async def test_the_message_contains_the_whole_event(event_type):
    broker, event = MemoryMessageBroker(), event_type(user_id=7)

    await EventEmitter(message_broker=broker).emit(event)

    message = await broker.receive()
    assert (message.message_name, message.message_id) == (event_type.__name__, event.event_id)
    assert [*message.payload] == ["event_id", "event_timestamp", "user_id"]
    assert payload_decoder(event_type)(message.payload_json) == event


@pytest.mark.parametrize("event_type", TRAVELLERS)
def test_an_error_of_decoding_does_not_quote_the_payload(event_type):
    payload = b'{"event_id":"hunter2","event_timestamp":"hunter2","user_id":"hunter2"}'

    with pytest.raises(DecodingError, match=f"the payload does not fit {event_type.__name__}: ") as caught:
        payload_decoder(event_type)(payload)

    assert "hunter2" not in str(caught.value)


def test_an_error_names_the_place_without_keys_of_the_payload():
    class Seated(pydantic.BaseModel):
        seats: dict[str, int]

    with pytest.raises(DecodingError, match=r"at `\$\.seats") as caught:
        payload_decoder(Seated)(b'{"seats":{"hunter2":"x"}}')

    assert "hunter2" not in str(caught.value)


def test_the_text_of_a_validator_is_not_quoted():
    """It may contain the value."""

    class Checked(pydantic.BaseModel):
        name: str

        @pydantic.field_validator("name")
        @classmethod
        def check(cls, name):
            raise ValueError(f"no such user: {name}")

    @dataclasses.dataclass
    class CheckedDataclass:
        name: str

        def __post_init__(self):
            raise ValueError(f"no such user: {self.name}")

    for model in (Checked, CheckedDataclass):
        with pytest.raises(DecodingError) as caught:
            payload_decoder(model)(b'{"name":"hunter2"}')

        assert "hunter2" not in str(caught.value)


class Strict(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name", mode="before")
    @classmethod
    def check(cls, name):
        if not isinstance(name, bytes):
            raise ValueError(f"not bytes: {name}")  # noqa: TRY004  # pydantic keeps it
        return name.decode()


def test_an_error_of_reading_back_does_not_quote_the_event_either():
    with pytest.raises(EncodingError, match=r"^Strict\.name: it could not be read back") as caught:
        payload_encoder(Strict)(Strict(name=b"hunter2"))

    assert "hunter2" not in str(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_of_several_fields_that_cannot_be_read_back_the_first_is_named():
    class Sizes(pydantic.BaseModel):
        width: int
        height: int

    with pytest.raises(EncodingError, match=r"\.Sizes\.width: it could not be read back: int_parsing$"):
        payload_encoder(Sizes)(Sizes.model_construct(width="x", height="y"))


class Anything(pydantic.BaseModel, Event):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = pydantic.Field(default_factory=uuid4)
    event_timestamp: dt.datetime = pydantic.Field(default_factory=now)
    value: object


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "Anything.value"),
        ([1, float("nan")], "Anything.value[1]"),
        ({"a": "\ud800"}, "Anything.value[...]"),
    ],
    ids=["object", "NaN", "lone surrogate"],
)
async def test_a_value_that_json_cannot_represent_is_refused_in_a_model_too(value, path):
    with pytest.raises(EncodingError) as caught:
        await EventEmitter(message_broker=Recorder()).emit(Anything(value=value))

    assert caught.value.path == path


async def test_a_model_inside_of_a_dataclass_is_encoded():
    class Place(pydantic.BaseModel):
        room: str
        price: float | None = None

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Moved(NotificationEvent):
        place: Place

    broker = Recorder()
    emitter = EventEmitter(message_broker=broker)

    await emitter.emit(Moved(place=Place(room="A")))

    assert broker.sent[0].payload["place"] == {"room": "A", "price": None}
    with pytest.raises(EncodingError, match=r"Moved\.place\.price: JSON cannot represent NaN"):
        await emitter.emit(Moved(place=Place(room="A", price=float("nan"))))


# -- classes whose messages would lose fields ------------------------------------------------------------------------


@attrs.frozen
class AttrsOfDataclass(NotificationEvent):
    user_id: int


class Undecorated(NotificationEvent):
    user_id: int = 7


class WithInit(NotificationEvent):
    def __init__(self, user_id):
        super().__init__()
        object.__setattr__(self, "user_id", user_id)


class WithoutId(msgspec.Struct, Event):
    message_type: ClassVar[str] = "notification_event"
    user_id: int


class NoModel(Event):
    message_type = "notification_event"

    def __init__(self, user_id):
        self.event_id, self.event_timestamp, self.user_id = uuid4(), now(), user_id


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (AttrsOfDataclass(7), "AttrsOfDataclass is an attrs class that derives from a dataclass"),
        (Undecorated(), "Undecorated declares user_id but is not a dataclass; decorate it with @dataclass"),
        (WithInit(7), "WithInit has an __init__ of its own but is not a dataclass; decorate it with @dataclass"),
        (WithoutId(7), "WithoutId needs the field event_id and the field event_timestamp"),
        (NoModel(7), "NoModel needs the field event_id and the field event_timestamp"),
    ],
    ids=["attrs of a dataclass", "not decorated", "own constructor", "without an id", "no model"],
)
async def test_is_refused(event, problem):
    broker = Recorder()

    with pytest.raises(NotAnEvent, match=problem):
        await EventEmitter(message_broker=broker).emit(event)

    assert broker.sent == []


@pytest.mark.parametrize("event_type", [AttrsOfDataclass, Undecorated, WithInit, NoModel])
def test_a_consumer_refuses_it_too(event_type):
    async def on_event(event: event_type) -> None: ...

    with pytest.raises(ConfigurationError, match=r"decorate it with @dataclass|derive it from Event"):
        Consumer(MemoryMessageBroker(), event_map=events_of(on_event))


@pytest.mark.parametrize("inner", [AttrsOfDataclass, Undecorated, WithInit])
def test_a_class_inside_of_an_event_is_refused_too(inner):
    holder = dataclasses.make_dataclass(
        "Holder", [("one", list[inner])], bases=(NotificationEvent,), frozen=True, kw_only=True
    )

    with pytest.raises(ConfigurationError, match=r"^Holder\.one\[\.\.\.\]: "):
        payload_encoder(holder)


async def test_a_subclass_that_only_names_its_message_needs_no_decorator():
    class Renamed(DataclassJoined):
        message_name: ClassVar[str] = "joined"

    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(Renamed(user_id=7))

    assert broker.names == ["joined"]


@pytest.mark.parametrize("base", [msgspec.Struct, pydantic.BaseModel])
def test_python_refuses_a_model_that_derives_from_a_dataclass(base):
    """Either the class or its first object raises an error, so an event never lacks its fields."""
    with pytest.raises((TypeError, ValueError)):
        type("Joined", (NotificationEvent, base), {"__annotations__": {"user_id": int}})(user_id=7)


async def test_a_subclass_without_new_fields_needs_no_decorator():
    class Rejoined(DataclassJoined): ...

    broker = Recorder()

    await EventEmitter(message_broker=broker).emit(Rejoined(user_id=7))

    assert broker.names == ["Rejoined"]


@pytest.mark.parametrize("excluded", ["event_id", "event_timestamp", "room"])
async def test_a_field_that_the_message_needs_must_not_be_excluded(excluded):
    class Base(Event):
        message_type: ClassVar[str] = "notification_event"
        message_key: ClassVar[str] = "room"

    defaults = {"event_id": uuid4(), "event_timestamp": dt.datetime.now(dt.UTC), "room": "A"}
    fields = {
        name: (type(value), pydantic.Field(default=value, exclude=name == excluded)) for name, value in defaults.items()
    }
    event_type = pydantic.create_model("Moved", __base__=(pydantic.BaseModel, Base), **fields)
    recorder = Recorder()

    with pytest.raises(
        NotAnEvent, match=rf"Moved\.{excluded} is excluded from the payload, which needs it; include it"
    ):
        await EventEmitter(message_broker=recorder).emit(event_type())

    assert recorder.sent == []
