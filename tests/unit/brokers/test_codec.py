"""The wire format: exact bytes in golden files, round trips without loss, and errors that quote no payload."""

import json
import math
import re
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator.brokers import Message
from diator.brokers.codec import (
    MAX_MESSAGE_BYTES,
    decode,
    decode_envelope,
    encode,
    headers_with_key,
    key_of,
    payload_decoder,
    payload_encoder,
)
from diator.events import ECSTEvent, EventEmitter, NotificationEvent
from diator.exceptions import ConfigurationError, DecodingError, EncodingError, MessageTooLarge
from tests.unit.doubles import Recorder

GOLDEN = Path(__file__).parent.parent / "golden"
EVENT_ID = UUID("9f62e977-73f7-462b-92cb-8ea658d3bcb5")
NOON = datetime(2023, 3, 7, 9, 26, 2, 588855, tzinfo=UTC)

# -- golden files ----------------------------------------------------------------------------------------------------


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Mood(StrEnum):
    GOOD = "good"


@dataclass(frozen=True)
class Place:
    room: str
    seats: int | None = None


@dataclass(frozen=True, kw_only=True)
class UserJoinedNotificationEvent(NotificationEvent):
    user_id: int


@dataclass(frozen=True, kw_only=True)
class MeetingMoved(ECSTEvent):
    message_name: ClassVar[str] = "meeting.moved"
    message_key: ClassVar[str] = "meeting_id"

    meeting_id: int = 7
    title: str = 'Jürgen\'s "stand-up" ☕ \u2028'
    starts: datetime = datetime(2023, 3, 7, 9, 30, tzinfo=timezone(timedelta(hours=1)))
    naive: datetime = datetime(2023, 3, 7, 9, 30)  # noqa: DTZ001  # deliberately without a time zone
    day: date = date(2023, 3, 7)
    clock: time = time(9, 30)
    lasts: timedelta = timedelta(minutes=15)
    price: Decimal = Decimal("1.10")
    cover: bytes = b"\x00\xff"
    color: Color = Color.RED
    level: Level = Level.HIGH
    mood: Mood = Mood.GOOD
    place: Place = Place("A", 12)
    others: list[Place] = field(default_factory=lambda: [Place("B")])
    seats: dict[int, str] = field(default_factory=lambda: {1: "Ann", 2: "Bob"})
    tags: set[str] = field(default_factory=lambda: {"daily"})
    pair: tuple[int, str] = (1, "one")
    ratio: float = 0.5
    nothing: None = None
    big: int = 2**64


EVENTS = [
    UserJoinedNotificationEvent(event_id=EVENT_ID, event_timestamp=NOON, user_id=123),
    MeetingMoved(event_id=EVENT_ID, event_timestamp=NOON),
]
HEADERS = Message.create(
    message_type="audit", message_name="a", message_id=EVENT_ID, payload={"x": "é"}, key="7", headers={"trace": "0-1"}
)


def golden(name):
    """Return the bytes of a body. A file ends with a line break; a body does not."""
    return (GOLDEN / f"{name}.json").read_bytes().removesuffix(b"\n")


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
async def test_an_event_is_encoded_as_in_its_golden_file(event):
    broker = Recorder()
    await EventEmitter(message_broker=broker).emit(event)

    body = encode(broker.sent[0])

    assert body == golden(type(event).__name__)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_golden_file_is_decoded_as_its_event(event):
    message = decode(golden(type(event).__name__))

    assert message.message_id == event.event_id
    assert payload_decoder(type(event))(message.payload_json) == event


@pytest.mark.parametrize("in_body", [True, False], ids=["in the body", "beside the body"])
def test_headers_are_encoded_as_in_their_golden_file(in_body):
    body = encode(HEADERS, headers_in_body=in_body)

    assert body == golden("headers_in_body" if in_body else "headers_apart")


def test_the_keys_are_those_of_earlier_versions():
    """A reader of an earlier diator can read the messages of this one."""
    body = json.loads(golden("UserJoinedNotificationEvent"))

    assert [*body] == ["message_type", "message_name", "message_id", "payload"]
    assert [*body["payload"]] == ["event_id", "event_timestamp", "user_id"]


def test_a_body_of_an_earlier_diator_can_be_decoded():
    """Its timestamps have no time zone."""
    message = decode(
        b'{"message_type":"notification_event","message_name":"UserJoinedNotificationEvent",'
        b'"message_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5","payload":'
        b'{"event_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5",'
        b'"event_timestamp":"2023-03-07T09:26:02.588855","user_id":123}}'
    )

    event = payload_decoder(UserJoinedNotificationEvent)(message.payload_json)

    assert event == UserJoinedNotificationEvent(
        event_id=EVENT_ID, event_timestamp=NOON.replace(tzinfo=None), user_id=123
    )


# -- message ↔ bytes -------------------------------------------------------------------------------------------------


@given(
    name=st.text(min_size=1),
    payload=st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)),
    message_id=st.uuids(),
    key=st.none() | st.text(),
    headers=st.dictionaries(st.text().filter(lambda name: name != "key"), st.text()),
)
def test_a_message_survives_a_round_trip(name, payload, message_id, key, headers):
    message = Message.create(message_name=name, payload=payload, message_id=message_id, key=key, headers=headers)

    assert decode(encode(message, headers_in_body=True)) == message


def test_headers_of_the_service_take_precedence_over_headers_in_the_body():
    message = decode(encode(HEADERS, headers_in_body=True), headers={"trace": "0-2", "key": "8"})

    assert (message.headers, message.key) == ({"trace": "0-2"}, "8")


@pytest.mark.parametrize("in_service", [{}, {"key": "of the service"}, {"key": "", "trace": "t"}, {"trace": "t"}])
@pytest.mark.parametrize("in_body", [None, {"key": "of the body"}, {"other": "o"}])
def test_an_envelope_has_what_the_message_has(in_service, in_body):
    headers = {} if in_body is None else {"headers": in_body}
    body = json.dumps({"message_type": "t", "message_name": "N", "message_id": str(EVENT_ID), "payload": {}, **headers})

    message = decode(body.encode(), headers=in_service)
    envelope = decode_envelope(body.encode(), max_bytes=MAX_MESSAGE_BYTES, headers=in_service)

    fields = ("message_type", "message_name", "message_id", "payload_json", "key")
    assert [getattr(envelope, name) for name in fields] == [getattr(message, name) for name in fields]


def test_unknown_keys_are_ignored():
    body = json.loads(encode(HEADERS)) | {"version": 2}

    assert decode(json.dumps(body).encode()).message_id == EVENT_ID


def enveloped(body, max_bytes=MAX_MESSAGE_BYTES):
    """Decode as a consumer does: the usual body has a way of its own."""
    return decode_envelope(body, max_bytes=max_bytes, headers={})


def sized(size):
    """Return a message whose body has *size* bytes."""
    empty = len(encode(Message.create(message_name="a", payload={"x": ""})))
    return Message.create(message_name="a", payload={"x": "x" * (size - empty)})


def test_a_message_of_the_maximum_size_can_be_encoded_and_decoded():
    message = sized(MAX_MESSAGE_BYTES)

    assert decode(encode(message)) == message


def test_one_byte_more_is_not_encoded():
    message = sized(MAX_MESSAGE_BYTES + 1)

    with pytest.raises(MessageTooLarge) as caught:
        encode(message)

    assert (caught.value.size, caught.value.limit) == (MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES)
    assert caught.value.message_id == message.message_id


def test_one_byte_more_is_not_decoded():
    body = encode(sized(101 + 200), max_bytes=1000)

    for read in (decode, enveloped):
        with pytest.raises(DecodingError, match=r"^the body has 301 bytes; this broker accepts at most 300$"):
            read(body, max_bytes=300)
        assert read(body, max_bytes=301).message_name == "a"


@pytest.mark.parametrize("bad", [{"key": "\ud800"}, {"headers": {"\ud800": "1"}}, {"headers": {"trace": "\ud800"}}])
def test_headers_beside_the_body_that_are_not_valid_unicode_are_refused(bad):
    with pytest.raises(EncodingError, match=r"^a\.headers: .*surrogates not allowed$"):
        headers_with_key(Message.create(message_name="a", payload={}, **bad))


NOT_TEXT = "the names and values of headers, and the key, must be text"


@pytest.mark.parametrize("write", [headers_with_key, lambda message: encode(message, headers_in_body=True)])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (
            {"headers": {"key": "7"}},
            "the header 'key' is reserved for the key of the message; set the key instead",
        ),
        ({"headers": {"trace": 1}}, NOT_TEXT),
        ({"headers": {1: "trace"}}, NOT_TEXT),
        ({"key": 7}, NOT_TEXT),
    ],
)
def test_headers_that_could_not_be_told_apart_or_are_not_text_are_refused(write, bad, problem):
    with pytest.raises(EncodingError) as caught:
        write(Message.create(message_name="a", payload={}, **bad))

    assert str(caught.value) == f"a.headers: {problem}"


@pytest.mark.parametrize(
    ("part", "path"),
    [("message_name", "?"), ("message_type", "a"), ("key", "a.headers"), ("headers", "a.headers")],
)
def test_text_that_is_not_valid_unicode_raises_an_encoding_error(part, path):
    bad = {"trace": "\ud800"} if part == "headers" else "\ud800"

    with pytest.raises(EncodingError, match=r"surrogates not allowed$") as caught:
        encode(Message.create(**{"message_name": "a", "payload": {}, part: bad}), headers_in_body=True)

    assert caught.value.path == path


def test_an_id_of_a_class_that_derives_from_uuid_is_written_as_any_other():
    """SQLAlchemy returns UUIDs of asyncpg, for example."""

    class Id(UUID): ...

    message = Message.create(message_name="a", payload={}, message_id=Id(int=EVENT_ID.int))

    assert decode(encode(message)).message_id == EVENT_ID


def test_an_id_that_json_does_not_have_is_refused():
    with pytest.raises(EncodingError, match=r"^a: Type is not JSON serializable: object$"):
        encode(Message.create(message_name="a", payload={}, message_id=object()))


def body_with(**changes):
    body = json.loads(encode(HEADERS, headers_in_body=True)) | {"payload": {"password": "hunter2"}} | changes
    return json.dumps({key: value for key, value in body.items() if value is not ...}).encode()


NOT_MESSAGES = {
    "empty": b"",
    "garbage": b"\x80\x04hunter2\x00",
    "text": b"hunter2",
    "truncated": body_with()[:-10],
    "more than one": body_with() + body_with(),
    "list": b'["hunter2"]',
    "null": b"null",
    "number": b"1",
    "wrong charset": body_with().decode().encode("utf-16"),
    "Latin-1 in a name": body_with(message_name="NAME").replace(b"NAME", b"hunter2 \xe9"),
    "Latin-1 in the payload": body_with().replace(b"hunter2", b"hunter2 \xe9"),
    "NaN": body_with().replace(b'"hunter2"', b"NaN"),
    "lone surrogate": body_with().replace(b"hunter2", b"hunter2 \\ud800"),
    "deep nesting": b"[" * 100_000 + b"]" * 100_000,
    "deep payload": body_with().replace(b'"hunter2"', b"[" * 100_000 + b"]" * 100_000),
    "deep unknown": body_with(more="DEEP").replace(b'"DEEP"', b"[" * 100_000 + b"]" * 100_000),
    "id missing": body_with(message_id=...),
    "name missing": body_with(message_name=...),
    "type missing": body_with(message_type=...),
    "payload missing": body_with(payload=...),
    "id no UUID": body_with(message_id="hunter2"),
    "name no text": body_with(message_name=["hunter2"]),
    "payload a list": body_with(payload=["hunter2"]),
    "payload a text": body_with(payload="hunter2"),
    "payload null": body_with(payload=None),
    "headers no object": body_with(headers="hunter2"),
}


@pytest.mark.parametrize("body", NOT_MESSAGES.values(), ids=NOT_MESSAGES)
def test_a_body_that_is_not_a_message_is_refused_without_being_quoted(body):
    with pytest.raises(DecodingError) as caught:
        decode(body)

    assert "hunter2" not in str(caught.value)


#: A consumer accepts such payloads, because no event can be decoded from one anyway.
OTHER_PAYLOADS = ["payload a list", "payload a text", "payload null"]


@pytest.mark.parametrize("kind", [kind for kind in NOT_MESSAGES if kind not in OTHER_PAYLOADS])
def test_a_consumer_refuses_a_body_with_the_same_error(kind):
    with pytest.raises(DecodingError) as by_message:
        decode(NOT_MESSAGES[kind])
    with pytest.raises(DecodingError) as by_envelope:
        enveloped(NOT_MESSAGES[kind])

    assert str(by_envelope.value) == str(by_message.value)


@pytest.mark.parametrize("kind", OTHER_PAYLOADS)
def test_a_payload_that_is_not_an_object_makes_no_message(kind):
    problem = "the body is not a message: the payload is not a JSON object - at `$.payload`"

    with pytest.raises(DecodingError, match=f"^{re.escape(problem)}$"):
        decode(NOT_MESSAGES[kind])
    assert not enveloped(NOT_MESSAGES[kind]).payload_json.startswith(b"{")


@pytest.mark.parametrize("kind", ["deep payload", "deep unknown"])
def test_a_body_that_is_nested_too_deeply_is_called_so(kind):
    with pytest.raises(DecodingError, match=r"^the body is not a message: it is nested too deeply$"):
        decode(NOT_MESSAGES[kind])


def test_text_that_is_not_utf_8_is_called_so():
    for read in (decode, enveloped):
        with pytest.raises(DecodingError, match=r"it is not valid UTF-8 - at byte \d+$"):
            read(body_with().replace(b"hunter2", b"hunter2 \xe9"))


@given(st.binary())
def test_any_other_bytes_raise_a_decoding_error(body):
    with pytest.raises(DecodingError):
        decode(body)


# -- event ↔ payload -------------------------------------------------------------------------------------------------

whole_minutes = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
durations = st.timedeltas(timedelta(days=-99_999), timedelta(days=99_999))
places = st.builds(Place, room=st.text(), seats=st.none() | st.integers())

FIELDS = {
    "UUID": (UUID, st.uuids()),
    "aware datetime": (datetime, st.datetimes(timezones=whole_minutes)),
    "datetime in UTC": (datetime, st.datetimes(timezones=st.just(UTC))),
    "naive datetime": (datetime, st.datetimes()),
    "date": (date, st.dates()),
    "time": (time, st.times()),
    "timedelta": (timedelta, durations),
    "Enum": (Color, st.sampled_from(Color)),
    "IntEnum": (Level, st.sampled_from(Level)),
    "StrEnum": (Mood, st.sampled_from(Mood)),
    "Decimal": (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    "bytes": (bytes, st.binary()),
    "text": (str, st.text()),
    "int": (int, st.integers()),
    "float": (float, st.floats(allow_nan=False, allow_infinity=False)),
    "bool": (bool, st.booleans()),
    "dataclass": (Place, places),
    "list": (list[Place], st.lists(places)),
    "tuple": (tuple[int, str], st.tuples(st.integers(), st.text())),
    "dict": (dict[str, list[Place]], st.dictionaries(st.text(), st.lists(places, max_size=2))),
    "int keys": (dict[int, str], st.dictionaries(st.integers(), st.text())),
    "UUID keys": (dict[UUID, str], st.dictionaries(st.uuids(), st.text())),
    "set": (set[int], st.sets(st.integers())),
    "frozenset": (frozenset[str], st.frozensets(st.text())),
    "Optional": (UUID | None, st.none() | st.uuids()),
    "Optional dataclass": (Place | None, st.none() | places),
    "anything": (Any, st.recursive(st.none() | st.integers() | st.text(), st.lists)),
}


def holding(hint, name="Holder"):
    """Return an event class with one field of type *hint*."""
    return make_dataclass(name, [("value", hint)], bases=(NotificationEvent,), frozen=True, kw_only=True)


@pytest.mark.parametrize(("hint", "values"), FIELDS.values(), ids=FIELDS)
def test_a_value_survives_a_round_trip(hint, values):
    event_type = holding(hint)
    write, read = payload_encoder(event_type), payload_decoder(event_type)

    @given(values)
    def round_trip(value):
        event = event_type(value=value)
        back = read(write(event))
        assert back == event
        assert type(back.value) is type(value)

    round_trip()


def deep(value, levels=50):
    for _ in range(levels):
        value = [value]
    return value


@dataclass
class Node:
    next: Any


def endless():
    node = Node(None)
    node.next = [node]
    return node


REFUSED = {
    "object": (object(), "Holder.value"),
    "class": (Place, "Holder.value"),
    "function": (deep, "Holder.value"),
    "complex": ([1, complex(1)], "Holder.value[1]"),
    "NaN": (math.nan, "Holder.value"),
    "infinity": ({"a": -math.inf}, "Holder.value[...]"),
    "NaN deep in a list": (deep(math.nan, 3), "Holder.value[0][0][0]"),
    "NaN beside a null": ([None, {"x": [None, math.nan]}], "Holder.value[1][...][1]"),
    "object very deep": (deep(object()), "Holder.value" + "[0]" * 50),
    "object deeper than anybody looks": (deep(object(), 99), "Holder.value" + "[0]" * 63),
    "object in a dataclass": ({"a": [Place("A", object())]}, "Holder.value[...][0].seats"),
    "lone surrogate": (["a", "\ud800"], "Holder.value[1]"),
    "lone surrogate as key": ({"\ud800": 1}, "Holder.value (key str)"),
    "object as key": ({object(): 1}, "Holder.value (key object)"),
    "cyclic": (endless(), "Holder.value.next[0]"),
    "too deep": (deep(1, 100_000), "Holder.value"),
}


@pytest.mark.parametrize(("value", "path"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_json_cannot_represent_is_refused_with_its_path(value, path):
    event_type = holding(Any)

    with pytest.raises(EncodingError) as caught:
        payload_encoder(event_type)(event_type(value=value))

    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("kind", "problem"), [("cyclic", "the value contains itself"), ("too deep", "the value is nested too deeply")]
)
def test_a_value_without_an_end_is_called_so(kind, problem):
    value, path = REFUSED[kind]
    event_type = holding(Any)

    with pytest.raises(EncodingError, match=f"^{re.escape(path)}: {problem}$"):
        payload_encoder(event_type)(event_type(value=value))


def test_a_field_that_an_event_has_lost_is_named():
    class Lossy(msgspec.Struct):
        kept: int
        lost: int

    event = Lossy(1, 2)
    del event.lost

    with pytest.raises(EncodingError, match=r"\.Lossy: Struct field 'lost' is unset$"):
        payload_encoder(Lossy)(event)


@pytest.mark.parametrize(
    ("value", "key"),
    [("", ""), ('"a" é ☕', '"a" é ☕'), (7, "7"), (True, "true"), (EVENT_ID, str(EVENT_ID)), (Mood.GOOD, "good")],
    ids=["empty", "text", "number", "bool", "UUID", "enum"],
)
def test_a_key_is_the_text_of_its_value_without_quotes(value, key):
    assert key_of(value) == key


def test_a_text_that_contains_null_is_not_taken_for_nan():
    event_type = holding(str)

    assert b'"null"' in payload_encoder(event_type)(event_type(value="null"))


def test_a_type_that_cannot_be_read_back_is_refused_when_the_decoder_is_made():
    with pytest.raises(ConfigurationError, match=r"Holder\.value cannot travel: it cannot be read back from JSON"):
        payload_decoder(holding(Place | Node))


NOT_PAYLOADS = {
    "empty": (int, b""),
    "garbage": (int, b"\x80hunter2"),
    "list": (int, b'["hunter2"]'),
    "missing": (int, b'{"password":"hunter2"}'),
    "wrong type": (int, b'{"value":"hunter2"}'),
    "wrong charset": (str, b'{"value":"hunter2 \xe9"}'),
    "truncated": (str, b'{"value":"hunter2'),
    "no UUID": (UUID, b'{"value":"hunter2"}'),
    "no datetime": (datetime, b'{"value":"hunter2"}'),
    "no timedelta": (timedelta, b'{"value":"hunter2"}'),
    "no Decimal": (Decimal, b'{"value":"hunter2"}'),
    "no bytes": (bytes, b'{"value":"hunter2!"}'),
    "no member": (Color, b'{"value":"hunter2"}'),
    "no member of int": (Level, b'{"value":4711}'),
    "wrong key": (dict[int, str], b'{"value":{"hunter2":"hunter2"}}'),
    "wrong value": (dict[str, int], b'{"value":{"hunter2":"hunter2"}}'),
    "wrong in a list": (list[Place], b'{"value":[{"room":1,"seats":"hunter2"}]}'),
    "deep nesting": (Any, b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize(("hint", "payload"), NOT_PAYLOADS.values(), ids=NOT_PAYLOADS)
def test_a_payload_that_does_not_fit_is_refused_without_being_quoted(hint, payload):
    @dataclass
    class Holder:
        value: hint

    with pytest.raises(DecodingError, match=r"the payload does not fit .*Holder: ") as caught:
        payload_decoder(Holder)(payload)

    assert "hunter2" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_the_error_names_the_field():
    @dataclass
    class Meeting:
        places: list[Place]

    with pytest.raises(DecodingError, match=r"Expected `str`, got `int` - at `\$\.places\[1\]\.room`"):
        payload_decoder(Meeting)(b'{"places":[{"room":"A"},{"room":2}]}')


def test_the_error_names_the_field_of_a_value_that_is_not_allowed():
    @dataclass
    class Painted:
        color: Color

    with pytest.raises(DecodingError, match=r"at `\$\.color`") as caught:
        payload_decoder(Painted)(b'{"color":"hunter2"}')

    assert "hunter2" not in str(caught.value)


def test_a_text_that_is_not_valid_unicode_is_called_so():
    event_type = holding(str)

    with pytest.raises(EncodingError, match=r"value: the text is not valid Unicode \(a lone surrogate\)"):
        payload_encoder(event_type)(event_type(value="\ud800"))


def test_unknown_fields_are_ignored():
    assert payload_decoder(Place)(b'{"room":"A","seats":1,"windows":2}') == Place("A", 1)
