"""Everything of a message is encoded inside the unit of work. What has been handled there can be sent and read."""

import asyncio
import datetime as dt
import enum
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest

from diator.brokers import Message
from diator.brokers.codec import decode, encode
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.events import Event, EventEmitter, Events, NotificationEvent
from diator.exceptions import EncodingError, EventHandlersFailed, MessageRejected, MessageTooLarge
from tests.unit.consumer.helpers import consume
from tests.unit.doubles import Join, MeetingChanged, Noticed, Recorder, UserJoined, Witness, holding, mediator_of


async def sent(event, broker=None):
    broker = broker or MemoryMessageBroker()
    await EventEmitter(message_broker=broker).emit(event)
    return await broker.receive()


async def received(event):
    """Return what a consumer's handler receives."""
    events = []

    async def handler(received) -> None:
        events.append(received)

    handler.__annotations__["received"] = type(event)
    [handled] = await consume(await holding(event), handler)
    assert handled.outcome == "acked", handled
    return events[0]


# -- subclasses of the standard types ----------------------------------------------------------------------------


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "another text"


class Integer(int):
    def __int__(self):
        return 0


class Float(float):
    __slots__ = ()


class Bytes(bytes):
    def __bytes__(self):
        return b"other bytes"


class ByteArray(bytearray): ...


class List(list): ...


class Set(set): ...


class Dict(dict): ...


class Date(dt.date): ...


class Time(dt.time): ...


class Datetime(dt.datetime):
    def isoformat(self, *_):
        return "another format"


class Delta(dt.timedelta):
    def __radd__(self, other):
        return dt.timedelta(0)


class Id(UUID):
    def __str__(self):
        return "another text"


class Amount(Decimal): ...


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class OldColor(str, enum.Enum):  # noqa: UP042  # as before Python 3.11
    RED = "red"


EAST = dt.timezone(dt.timedelta(hours=5, minutes=30))

SUBCLASSES = [
    (str, Text("x")),
    (int, Integer(5)),
    (int, Integer(2**63)),
    (float, Float(1.5)),
    (bytes, Bytes(b"x")),
    (bytearray, ByteArray(b"x")),
    (list[int], List([1, 2])),
    (set[int], Set([1])),
    (dict[str, int], Dict(a=1)),
    (dict[str, int], OrderedDict(a=1)),
    (dict[str, int], defaultdict(int, a=1)),
    (dict[str, list[str]], {Text("a"): [Text("b")]}),
    (dict[int, dt.date], {Integer(1): Date(2024, 2, 29)}),
    (dt.date, Date(2024, 2, 29)),
    (dt.time, Time(23, 59, 58, 7)),
    (dt.datetime, Datetime(2024, 2, 29, 23, 59, 58, 7, tzinfo=EAST)),
    (dt.timedelta, Delta(days=-1, seconds=3, microseconds=7)),
    (UUID, Id(int=7)),
    (Decimal, Amount("1.500000000000000000000000000000000000000")),
    (str, Color.RED),
    (str, OldColor.RED),
    (int, Level.LOW),
    (Color, Color.RED),
    (Any, Text("x")),
    (list[dt.datetime | None], [None, Datetime(2024, 1, 1, tzinfo=dt.UTC)]),
]
IDS = [f"{number}-{type(value).__name__}" for number, (_, value) in enumerate(SUBCLASSES)]


def as_dataclass(hint):
    return dataclass(frozen=True, kw_only=True)(
        type("Sample", (NotificationEvent,), {"__annotations__": {"value": hint}})
    )


OWN = {"message_type": "notification_event", "__module__": __name__}


def annotations(hint):
    return {"message_type": ClassVar[str], "event_id": UUID, "event_timestamp": dt.datetime, "value": hint}


def as_attrs(hint):
    return attrs.frozen(kw_only=True)(type("Sample", (Event,), {**OWN, "__annotations__": annotations(hint)}))


def as_struct(hint):
    namespace = {**OWN, "__annotations__": annotations(hint)}
    return msgspec.StructMeta("Sample", (msgspec.Struct, Event), namespace, kw_only=True)


def of_kind(make, hint, value):
    event_type = make(hint)
    return event_type(event_id=uuid4(), event_timestamp=dt.datetime.now(dt.UTC), value=value)


@pytest.mark.parametrize("make", [as_dataclass, as_attrs, as_struct], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("hint", "value"), SUBCLASSES, ids=IDS)
async def test_a_value_of_a_subclass_is_written_as_the_standard_type(hint, value, make):
    got = await received(of_kind(make, hint, value))

    assert got.value == value
    assert not isinstance(got.value, type(value)) or hint is type(value) or type(value) in (list, dict)


async def test_a_value_of_a_model_may_be_of_a_subclass():
    class Sample(pydantic.BaseModel, Event):
        message_type: ClassVar[str] = "notification_event"
        event_id: UUID
        event_timestamp: dt.datetime
        name: str
        number: int
        day: dt.date

    now = Datetime(2024, 1, 1, tzinfo=dt.UTC)
    sample = Sample(event_id=Id(int=7), event_timestamp=now, name=Text("x"), number=Integer(5), day=Date(2024, 2, 29))

    assert await received(sample) == sample


async def test_an_id_of_a_subclass_is_the_id_of_the_message():
    message = await sent(UserJoined(event_id=Id(int=7)))

    assert type(message.message_id) is UUID
    assert message.message_id == UUID(int=7)
    assert message.payload["event_id"] == str(UUID(int=7))


async def test_an_id_of_asyncpg_is_the_id_of_the_message():
    """As SQLAlchemy returns it."""
    asyncpg = pytest.importorskip("asyncpg")
    pg_id = asyncpg.pgproto.pgproto.UUID(str(UUID(int=7)))

    assert (await received(UserJoined(event_id=pg_id))).event_id == UUID(int=7)
    message = Message.create(message_name="x", payload={}, message_id=pg_id)
    assert decode(encode(message)).message_id == UUID(int=7)


async def test_times_of_pendulum():
    pendulum = pytest.importorskip("pendulum")

    @dataclass(frozen=True, kw_only=True)
    class Scheduled(NotificationEvent):
        at: dt.datetime
        day: dt.date
        length: dt.timedelta

    at = pendulum.datetime(2024, 7, 1, 12, tz="Europe/Berlin")
    event = Scheduled(
        event_timestamp=pendulum.now("UTC"), at=at, day=at.date(), length=pendulum.duration(weeks=1, seconds=7)
    )

    got = await received(event)

    assert (got.at, got.day) == (at, dt.date(2024, 7, 1))
    assert (got.event_timestamp, got.length) == (event.event_timestamp, dt.timedelta(weeks=1, seconds=7))


@dataclass(frozen=True, kw_only=True)
class Booked(NotificationEvent):
    """Planned for the first time while freezegun is active, as a class of a program is in its first frozen test."""

    at: dt.datetime | None
    days: list[dt.date]


class BookedModel(pydantic.BaseModel, Event):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = UUID(int=7)
    event_timestamp: dt.datetime
    days: list[dt.date]


class BookedStruct(msgspec.Struct, Event):
    message_type: ClassVar[str] = "notification_event"
    event_timestamp: dt.datetime
    days: list[dt.date]
    event_id: UUID = UUID(int=7)


def frozen_program():
    @dataclass(frozen=True, kw_only=True)
    class Sample(NotificationEvent):
        at: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))
        day: dt.date = field(default_factory=lambda: dt.date.today())  # noqa: DTZ011, PLW0108  # freezegun replaces it

    event = Sample()
    return event, asyncio.run(received(event))


@pytest.mark.real_time
def test_events_can_be_sent_and_read_while_freezegun_is_active():
    """Whether the classes were planned before, or are planned meanwhile and used afterwards."""
    freezegun = pytest.importorskip("freezegun")

    with freezegun.freeze_time("2024-02-29 12:00", real_asyncio=True):
        event, got = frozen_program()
        also, got_too = UserJoined(), asyncio.run(received(UserJoined()))
        now, days = dt.datetime.now(dt.UTC), [dt.date.today()]  # noqa: DTZ011
        booked = [
            Booked(at=now, days=days),
            BookedModel(event_timestamp=now, days=days),
            BookedStruct(event_timestamp=now, days=days),
        ]
        assert [asyncio.run(received(each)) for each in booked] == booked

    assert got == event
    assert got.at.isoformat() == got_too.event_timestamp.isoformat() == "2024-02-29T12:00:00+00:00"
    assert asyncio.run(received(replace(event))) == event
    assert asyncio.run(received(also)) == also
    assert [asyncio.run(received(each)) for each in booked] == booked


# -- the key -----------------------------------------------------------------------------------------------------


class Tenant(enum.Enum):
    A = "a"


class Rank(enum.Enum):
    ONE = 1


@dataclass(frozen=True)
class Place:
    room: str


KEYS = [
    (str, "a b", "a b"),
    (str, 'quoted "ü"', 'quoted "ü"'),
    (str, "", ""),
    (int, 5, "5"),
    (int, -(2**63), str(-(2**63))),
    (float, 1e16, "1e16"),
    (bool, True, "true"),
    (UUID, UUID(int=7), str(UUID(int=7))),
    (Decimal, Decimal("1.50"), "1.50"),
    (bytes, b"ab", "YWI="),
    (dt.datetime, dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "2024-01-01T00:00:00Z"),
    (dt.date, dt.date(2024, 1, 1), "2024-01-01"),
    (dt.timedelta, dt.timedelta(days=1), "P1D"),
    (Tenant, Tenant.A, "a"),
    (Rank, Rank.ONE, "1"),
    (Color, Color.RED, "red"),
    (OldColor, OldColor.RED, "red"),
    (Level, Level.LOW, "1"),
    (str, Text("x"), "x"),
    (UUID, Id(int=7), str(UUID(int=7))),
    (int | None, None, None),
    (tuple[int, str], (1, "a"), '[1,"a"]'),
    (Place, Place("A"), '{"room":"A"}'),
]


@pytest.mark.parametrize(
    ("hint", "value", "key"), KEYS, ids=[f"{n}-{type(value).__name__}" for n, (_, value, _) in enumerate(KEYS)]
)
async def test_the_key_is_what_the_payload_has(hint, value, key):
    event_type = as_dataclass(hint)
    event_type.message_key = "value"

    message = await sent(event_type(value=value))

    assert message.key == key


# -- what is refused, before the end of the unit of work ---------------------------------------------------------


class Explosive:
    """A value whose class raises an error of any kind when it is encoded."""

    def __iter__(self):
        raise LookupError("no content in the text: 4711")


class Fragile(pydantic.BaseModel, Event):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = UUID(int=7)
    event_timestamp: dt.datetime = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    name: str = "x"

    @pydantic.field_serializer("name")
    def _serialized(self, name: str) -> str:
        raise LookupError(name)


@dataclass(frozen=True, kw_only=True)
class KeyRaises(NotificationEvent):
    message_key: ClassVar[str] = "number"
    number: Any

    def __getattribute__(self, name):
        if name == "number":
            raise LookupError("no content in the text: 4711")
        return super().__getattribute__(name)


@dataclass(frozen=True, kw_only=True)
class BadName(NotificationEvent):
    message_name: ClassVar[str] = "\ud800"


AMBIGUOUS = "event_id must be a UUID, and event_timestamp must have a time zone, otherwise it is ambiguous"
RAISED = "its class raised LookupError while it was encoded"
TEXTS = {
    **dict.fromkeys(["no timestamp", "naive", "id is text", "no id"], f"UserJoined: {AMBIGUOUS}"),
    "key": f"KeyRaises: {RAISED}",
}
REFUSED = {
    "no timestamp": (UserJoined(event_timestamp=None), EncodingError),
    "naive": (UserJoined(event_timestamp=dt.datetime(2024, 1, 1)), EncodingError),  # noqa: DTZ001
    "timestamp is text": (UserJoined(event_timestamp="2024-01-01T00:00:00Z"), EncodingError),
    "id is text": (UserJoined(event_id=str(UUID(int=7))), EncodingError),
    "no id": (UserJoined(event_id=None), EncodingError),
    "serializer": (Fragile(), EncodingError),
    "key": (KeyRaises(number=1), EncodingError),
    "name": (BadName(), EncodingError),
    "size": (MeetingChanged(title="x" * 1024 * 1024), MessageTooLarge),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_an_event_that_cannot_be_sent_fails_in_the_unit_of_work(case):
    event, expected = REFUSED[case]
    broker, handled = MemoryMessageBroker(), []
    witness = Witness()

    async def join(command: Join, events: Events) -> str:
        events.extend([UserJoined(), event, Noticed()])
        return "joined"

    async def on_noticed(event: Noticed) -> None:
        handled.append(event)

    mediator = mediator_of(join, on_events=[on_noticed], message_broker=broker, middlewares=[witness])
    with pytest.raises(expected) as caught:
        await mediator.send(Join())

    assert witness.outcome is caught.value
    assert "4711" not in str(caught.value)
    assert TEXTS.get(case, str(caught.value)) == str(caught.value)
    assert (len(handled), len(broker)) == (1, 0)


async def test_errors_of_handlers_and_of_encoding_are_raised_together():
    async def join(command: Join, events: Events) -> str:
        events.extend([Fragile(), Noticed()])
        return "joined"

    async def on_noticed(event: Noticed) -> None:
        raise KeyError

    with pytest.raises(EventHandlersFailed) as caught:
        await mediator_of(join, on_events=[on_noticed], message_broker=Recorder()).send(Join())

    assert [type(each) for each in caught.value.exceptions] == [KeyError, EncodingError]


@dataclass(frozen=True, kw_only=True)
class Keyed(NotificationEvent):
    message_key: ClassVar[str] = "key"
    key: str | None = None
    text: str = ""


class NativeHeaders(MemoryMessageBroker):
    """A transport with headers of its own."""

    @property
    def capabilities(self):
        return replace(super().capabilities, headers="native")

    async def send_message(self, message, /):
        encode(message, max_bytes=self._max_message_bytes)


@pytest.mark.parametrize("broker_type", [MemoryMessageBroker, NativeHeaders])
@pytest.mark.parametrize("key", [None, "k", "k" * 500, '"' * 300, "ü" * 200])
async def test_the_emitter_and_the_broker_have_the_same_limit(key, broker_type):
    """A message of exactly the limit is sent, and one more byte is refused in the unit of work."""
    event = Keyed(key=key)
    message = await sent(event)
    size = len(encode(message, headers_in_body=broker_type is MemoryMessageBroker))
    emitter = EventEmitter(message_broker=broker_type(max_message_bytes=size))
    too_large = replace(event, text="x")

    await emitter.emit(event)
    with pytest.raises(MessageTooLarge) as caught:
        await emitter._handle([too_large], {})

    assert (caught.value.message_id, caught.value.size, caught.value.limit) == (event.event_id, size + 1, size)


@pytest.mark.parametrize("capabilities", [None, SimpleNamespace(max_message_bytes="?"), 7])
async def test_a_broker_that_promises_no_limit_is_asked_itself(capabilities):
    class Broker(Recorder):
        async def send_message(self, message, /):
            raise MessageRejected("too large", message_id=message.message_id)

    broker = Broker()
    broker.capabilities = capabilities

    with pytest.raises(MessageRejected):
        await EventEmitter(message_broker=broker).emit(MeetingChanged(title="x" * 2_000_000))


def kafka():
    return pytest.importorskip("diator.brokers.kafka", exc_type=ImportError).KafkaMessageBroker("127.0.0.1:1")


def rabbitmq(**options):
    module = pytest.importorskip("diator.brokers.rabbitmq", exc_type=ImportError)
    return module.RabbitMQMessageBroker("amqp://127.0.0.1:1/", **options)


@pytest.mark.parametrize(
    ("make", "length"),
    [(kafka, 230), (rabbitmq, 230), (lambda: rabbitmq(unroutable="drop"), 240), (lambda: Wrapped(kafka()), 230)],
    ids=["kafka", "rabbitmq", "rabbitmq-drop", "wrapped"],
)
async def test_a_name_that_is_too_long_for_the_service_is_refused_in_the_unit_of_work(make, length):
    @dataclass(frozen=True, kw_only=True)
    class LongName(NotificationEvent):
        message_name: ClassVar[str] = "x" * length

    for _ in range(2):
        with pytest.raises(MessageRejected, match=r"characters|bytes"):
            await EventEmitter(message_broker=make())._handle([LongName()], {})


async def test_a_key_that_is_too_long_for_kafka_is_refused_in_the_unit_of_work():
    emitter = EventEmitter(message_broker=kafka())

    await emitter._handle([Keyed(key="k" * 30_000)], {})
    with pytest.raises(MessageRejected, match="key and headers have 62,"):
        await emitter._handle([Keyed(key="k" * 31_000)], {})


@pytest.mark.filterwarnings("error")
async def test_a_mock_can_be_the_broker():
    broker = AsyncMock()

    await EventEmitter(message_broker=broker).emit(UserJoined())
    await EventEmitter(message_broker=broker)._handle([MeetingChanged(title="x" * 2_000_000)], {})

    broker.send_message.assert_awaited_once()


@pytest.mark.parametrize("headers", [{"a": 1}, {1: "a"}, {"a": None}])
async def test_headers_that_are_no_text_are_an_encoding_error(headers):
    message = replace(Message.create(message_name="x", payload={}), headers=headers)

    with pytest.raises(EncodingError, match="must be text"):
        await MemoryMessageBroker().send_message(message)
