"""What other programs write in diator's format: what is read, what is never invented, what an error never quotes."""

import dataclasses
import json
import re
import tracemalloc
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Literal
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator.brokers.codec import (
    MAX_MESSAGE_BYTES,
    Envelope,
    _misfit,
    decode,
    decode_envelope,
    event_decoder,
    payload_decoder,
)
from diator.events import Event, NotificationEvent
from diator.exceptions import DecodingError
from tests.unit.test_models import TRAVELLERS

MESSAGE_ID, OTHER_ID = UUID(int=4711), UUID(int=4712)
SENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def body_with(payload=None, **envelope):
    own = {"message_type": "t", "message_name": "N", "message_id": str(MESSAGE_ID), "payload": payload or {}}
    return json.dumps(own | envelope).encode()


def read(event_type, payload):
    """Decode an event from *payload*, JSON or an object, in a message with the id `MESSAGE_ID`."""
    payload_json = payload if isinstance(payload, bytes) else json.dumps(payload, separators=(",", ":")).encode()
    envelope = decode_envelope(
        body_with().replace(b'"payload": {}', b'"payload":' + payload_json), max_bytes=MAX_MESSAGE_BYTES, headers={}
    )
    return event_decoder(event_type)(envelope)


# -- the envelope ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_headers", "key", "headers"),
    [
        (None, None, {}),
        ({"key": None, "trace": None}, None, {}),
        ({"key": 7, "retry": 1, "ratio": 1.5, "ok": True}, "7", {"retry": "1", "ratio": "1.5", "ok": "true"}),
        ({"key": "7", "big": 2**70}, "7", {"big": str(2**70)}),
        ({"key": "null", "trace": ""}, "null", {"trace": ""}),
        ({"key": ["k"], "list": [1], "object": {"a": {"b": None}}}, "", {"list": "", "object": ""}),
    ],
    ids=["null", "of null", "numbers", "large", "text", "nested"],
)
def test_headers_that_are_not_text_lose_no_message(given_headers, key, headers):
    body = body_with(headers=given_headers)

    message = decode(body)
    assert (message.key, message.headers) == (key, headers)
    assert decode_envelope(body, max_bytes=MAX_MESSAGE_BYTES, headers={}).key == key


def test_a_consumer_pays_nothing_for_headers_that_it_does_not_need(monkeypatch):
    body = body_with(headers={"key": 7, **{str(number): number for number in range(1_000)}})
    written = []
    monkeypatch.setattr("diator.brokers.codec.json.dumps", lambda value: written.append(value) or str(value))

    assert decode_envelope(body, max_bytes=MAX_MESSAGE_BYTES, headers={}).key == "7"
    assert written == [7]


@pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t" * 10_000])
def test_an_empty_body_is_called_empty(body):
    with pytest.raises(DecodingError, match=r"^the body is empty$"):
        decode(body)


def test_unknown_keys_may_be_null():
    assert decode(body_with(tenant=None, key=None, specversion="1.0")).message_id == MESSAGE_ID


# -- what a payload lacks --------------------------------------------------------------------------------------------


class Camel(msgspec.Struct, Event, kw_only=True, rename="camel", forbid_unknown_fields=True):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = msgspec.field(default_factory=uuid4)
    event_timestamp: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))
    user_id: int


class Strict(pydantic.BaseModel, Event, frozen=True, extra="forbid"):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID
    event_timestamp: datetime = pydantic.Field(default_factory=lambda: datetime.now(UTC))
    user_id: int


class Aliased(pydantic.BaseModel, Event, extra="forbid", populate_by_name=True):
    message_type: ClassVar[str] = "notification_event"
    event_id: UUID = pydantic.Field(default_factory=uuid4, alias="eventId")
    event_timestamp: datetime = pydantic.Field(
        default_factory=lambda: datetime.now(UTC), validation_alias=pydantic.AliasChoices("eventTimestamp", "sent")
    )
    user_id: int = pydantic.Field(alias="userId")


READERS = [*TRAVELLERS, Strict]


@pytest.mark.parametrize("event_type", READERS)
@pytest.mark.parametrize("absent", [{}, {"event_id": None}], ids=["left out", "null"])
def test_an_event_without_an_id_has_the_id_of_its_message(event_type, absent):
    """A random id would be another one at each attempt, so that no handler could recognise a duplicate."""
    event = read(event_type, absent | {"user_id": 7, "event_timestamp": SENT.isoformat()})

    assert (event.event_id, event.event_timestamp, event.user_id) == (MESSAGE_ID, SENT, 7)


@pytest.mark.parametrize("event_type", READERS)
@pytest.mark.parametrize("absent", [{}, {"event_timestamp": None}], ids=["left out", "null"])
def test_no_timestamp_is_invented(event_type, absent):
    event = read(event_type, absent | {"event_id": str(OTHER_ID), "user_id": 7})

    assert (event.event_id, event.event_timestamp, event.user_id) == (OTHER_ID, None, 7)


@pytest.mark.parametrize("event_type", READERS)
@pytest.mark.parametrize(
    "payload",
    [
        b'{"user_id":7}',
        b'{ "user_id" : 7 \n}',
        b'{"event_id":null,"event_timestamp":null,"user_id":7}',
        b'{"user_id":7,"note":{"event_id":"x","event_timestamp":"y"}}',
    ],
)
def test_a_payload_may_lack_both(event_type, payload):
    if event_type is Strict:
        payload = payload.partition(b',"note"')[0].removesuffix(b"}") + b"}"

    event = read(event_type, payload)

    assert (event.event_id, event.event_timestamp, event.user_id) == (MESSAGE_ID, None, 7)


@pytest.mark.parametrize("name", ["order_id", "trace_id", "Event_id"])
def test_another_id_in_the_place_of_the_events_own_is_not_taken_for_it(name):
    """Its name is as long, and what follows is what diator writes."""
    payload = {name: str(OTHER_ID), "event_timestamp": SENT.isoformat(), "user_id": 7}

    assert read(TRAVELLERS[0], payload).event_id == MESSAGE_ID


def test_an_empty_payload_is_completed_too():
    event = read(NotificationEvent, b"{ }")

    assert (event.event_id, event.event_timestamp) == (MESSAGE_ID, None)


@pytest.mark.parametrize("payload", [b" { } \n", b'\n{"user_id":7}\n'])
def test_white_space_around_a_payload_does_not_matter(payload):
    """A codec that a program chose may leave it there."""
    event_type = TRAVELLERS[0] if b"user_id" in payload else NotificationEvent
    event = event_decoder(event_type)(Envelope("t", "N", MESSAGE_ID, payload, None))

    assert (event.event_id, event.event_timestamp) == (MESSAGE_ID, None)


@pytest.mark.parametrize("event_type", TRAVELLERS)
@pytest.mark.parametrize(
    "order", [["event_id", "event_timestamp", "user_id"], ["user_id", "event_timestamp", "event_id"]]
)
def test_what_the_payload_has_is_kept(event_type, order):
    """Its id too, although diator itself always gives the message the id of its event."""
    fields = {"event_id": str(OTHER_ID), "event_timestamp": SENT.isoformat(), "user_id": 7}

    event = read(event_type, {name: fields[name] for name in order})

    assert (event.event_id, event.event_timestamp, event.user_id) == (OTHER_ID, SENT, 7)


def test_a_name_with_escapes_is_the_same_name():
    event = read(TRAVELLERS[0], b'{"user_id":7,"event\\u005fid":"%b"}' % str(OTHER_ID).encode())

    assert event.event_id == OTHER_ID


@pytest.mark.parametrize("value", [7, "no UUID", {}, ""], ids=repr)
def test_a_wrong_id_is_not_a_missing_one(value):
    with pytest.raises(DecodingError, match=r"- at `\$\.event_id`$"):
        read(TRAVELLERS[0], {"event_id": value, "user_id": 7})


def test_the_names_are_those_of_the_class_in_json():
    event = read(Camel, {"userId": 7})
    assert (event.event_id, event.event_timestamp) == (MESSAGE_ID, None)

    event = read(Camel, {"userId": 7, "eventId": str(OTHER_ID), "eventTimestamp": SENT.isoformat()})
    assert (event.event_id, event.event_timestamp) == (OTHER_ID, SENT)


@pytest.mark.parametrize("names", [["eventId", "sent", "userId"], ["event_id", "eventTimestamp", "user_id"]])
def test_a_field_with_several_names_in_json_is_left_to_its_class(names):
    event = read(Aliased, dict(zip(names, [str(OTHER_ID), SENT.isoformat(), 7], strict=True)))

    assert (event.event_id, event.event_timestamp, event.user_id) == (OTHER_ID, SENT, 7)


def test_an_error_names_the_alias_of_a_field():
    with pytest.raises(DecodingError, match=r"int_parsing - at `\$\.userId`"):
        read(Aliased, {"userId": "x"})


def test_a_class_may_lack_these_fields():
    @dataclasses.dataclass
    class Bare:
        user_id: int

    @dataclasses.dataclass
    class WithId:
        user_id: int
        event_id: UUID = dataclasses.field(default_factory=uuid4)

    @dataclasses.dataclass
    class WithTime:
        user_id: int
        event_timestamp: datetime | None = dataclasses.field(default_factory=lambda: datetime.now(UTC))

    assert read(Bare, {"user_id": 7}) == Bare(7)
    assert read(WithId, {"user_id": 7}) == WithId(7, MESSAGE_ID)
    assert read(WithTime, {"user_id": 7}) == WithTime(7, None)


def test_a_timestamp_without_a_time_zone_stays_without_one():
    event = read(TRAVELLERS[0], {"event_timestamp": "2026-01-02T03:04:05", "user_id": 7})

    assert event.event_timestamp == SENT.replace(tzinfo=None)


# -- errors that quote nothing ---------------------------------------------------------------------------------------

SECRET = "hunter2"


def refusing(value):
    raise ValueError(f"{value} - at `$.{SECRET}`")


@dataclasses.dataclass
class Part:
    size: int
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Whole:
    part: Part
    parts: list[Part] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Refusing:
    name: str

    def __post_init__(self):
        refusing(self.name)


@dataclasses.dataclass
class Looking:
    """Its error is none that msgspec translates, and begins like one of msgspec's own."""

    name: str

    def __post_init__(self):
        raise LookupError(f"Expected {self.name}")


@dataclasses.dataclass
class HoldsRefusing:
    part: Refusing


@attrs.define
class AttrsPart:
    size: int
    sizes: dict[str, int] = attrs.Factory(dict)


@attrs.define
class AttrsWhole:
    part: AttrsPart
    parts: list[AttrsPart] = attrs.Factory(list)


class StructPart(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    sizes: dict[str, int] = {}


class StructWhole(msgspec.Struct, forbid_unknown_fields=True):
    part: StructPart
    parts: list[StructPart] = []


class ModelPart(pydantic.BaseModel, extra="forbid"):
    size: int
    sizes: dict[str, int] = {}


class Cat(pydantic.BaseModel, extra="forbid"):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel, extra="forbid"):
    kind: Literal["dog"]
    legs: int


@dataclasses.dataclass
class HoldsModel:
    part: ModelPart
    parts: list[ModelPart] = dataclasses.field(default_factory=list)


class ModelWhole(pydantic.BaseModel, extra="forbid"):
    part: ModelPart
    parts: list[ModelPart] = []
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")] | None = None
    either: int | ModelPart | None = None


class ModelRefusing(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def check(cls, name):
        kind, _, rest = name.partition(" ")
        if kind == "type":
            raise pydantic_core.PydanticCustomError(rest, rest)
        if kind == "broken":
            raise Unprintable
        refusing(name)


class Unprintable(ValueError):
    def __str__(self):
        raise LookupError(SECRET)


MISFITS = [
    *[
        (whole, payload, place)
        for whole in (Whole, AttrsWhole, StructWhole, ModelWhole)
        for payload, place in (
            ({"part": {"size": SECRET}}, "$.part.size"),
            ({"part": {"size": 1, "sizes": {SECRET: SECRET}}}, "$.part.sizes[...]"),
            ({"part": {"size": 1}, "parts": [{"size": 1}, {"size": {SECRET: 1}}]}, "$.parts[1].size"),
            ({"part": {SECRET: 1}}, "$.part"),
        )
    ],
    (StructWhole, {f"{SECRET}` - at `$.{SECRET}": 1}, ""),
    (StructWhole, {"part": {f"a\nb` - at `$.{SECRET}": 1}}, ""),
    (ModelWhole, {"part": {"size": 1, f"\n{SECRET}": 1}}, "$.part[...]"),
    (ModelWhole, {SECRET: 1}, "$[...]"),
    (ModelWhole, {"part": {"size": 1}, "pet": {"kind": SECRET}}, "$.pet"),
    (ModelWhole, {"part": {"size": 1}, "pet": {"kind": "cat", SECRET: SECRET}}, "$.pet[...].lives"),
    (ModelWhole, {"part": {"size": 1}, "either": {SECRET: SECRET}}, "$.either[...]"),
    (Refusing, {"name": SECRET}, ""),
    (Looking, {"name": SECRET}, "a value is invalid"),
    (HoldsRefusing, {"part": {"name": SECRET}}, "$.part"),
    (ModelRefusing, {"name": SECRET}, "value_error - at `$.name`"),
    (ModelRefusing, {"name": f"type {SECRET}"}, "a value is invalid - at `$.name`"),
    (ModelRefusing, {"name": "broken"}, ""),
    (HoldsModel, {"part": {"size": SECRET}}, "int_parsing - at `$.part.size`"),
    (HoldsModel, {"part": {"size": 1}, "parts": [{"size": 1}, {"size": SECRET}]}, "int_parsing - at `$.parts[1].size`"),
    (HoldsModel, {"part": {"size": 1, SECRET: 1}}, "extra_forbidden - at `$.part[...]`"),
]


@pytest.mark.parametrize(
    ("event_type", "payload", "place"),
    MISFITS,
    ids=[f"{each[0].__name__}-{number}" for number, each in enumerate(MISFITS)],
)
def test_an_error_names_fields_of_the_class_and_nothing_that_the_sender_wrote(event_type, payload, place):
    for decode_payload in (payload_decoder(event_type), lambda raw: read(event_type, raw)):
        with pytest.raises(DecodingError) as caught:
            decode_payload(json.dumps(payload).encode())

        assert SECRET not in str(caught.value)
        assert place in str(caught.value)
        assert caught.value.__context__ is None  # it would keep the content alive, and reports of errors show it


KEYS = st.sampled_from(
    ["part", "parts", "size", "sizes", "pet", "either", "kind", "lives", SECRET, f"x` - at `$.{SECRET}"]
) | st.text(max_size=5).map(lambda text: f"{SECRET}{text}")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.just(SECRET) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("event_type", [Whole, AttrsWhole, StructWhole, ModelWhole])
@given(payload=st.dictionaries(KEYS, JSON, max_size=4))
def test_whatever_is_sent_an_error_does_not_quote_it(event_type, payload):
    error = ""
    try:
        payload_decoder(event_type)(json.dumps(payload).encode())
    except DecodingError as refused:
        error = str(refused)

    assert SECRET not in error
    assert error.isprintable()


def test_a_model_lists_its_first_errors_and_counts_many():
    problem = "int_parsing - at `$.sizes[{}]`"

    class Sizes(pydantic.BaseModel):
        sizes: list[int]

    for count, described in (
        (8, "; ".join(problem.format(number) for number in range(8))),
        (9, "9 values are invalid"),
        (1_000, "1,000 values are invalid"),
    ):
        with pytest.raises(DecodingError, match=re.escape(f": {described}") + "$"):
            payload_decoder(Sizes)(json.dumps({"sizes": ["x"] * count}).encode())


def test_the_names_of_a_class_are_found_wherever_its_fields_lead():
    class Deep(pydantic.BaseModel):
        places: dict[str, list[Annotated[ModelPart, "somewhere"] | None]]

    with pytest.raises(DecodingError, match=r"int_parsing - at `\$\.places\[\.\.\.\]\[0\]\.size`"):
        payload_decoder(Deep)(b'{"places":{"hunter2":[{"size":"x"}]}}')


def test_an_annotation_that_cannot_be_inspected_does_not_matter():
    class Later(pydantic.BaseModel):
        size: int
        later: "ModelPart | None" = None

    Later.__annotations__["later"] = "Unknown"

    with pytest.raises(DecodingError, match=r"int_parsing - at `\$\.size`"):
        payload_decoder(Later)(b'{"size":"x"}')


class Prices(pydantic.BaseModel):
    prices: list[int]


def errors_of(count):
    with pytest.raises(pydantic.ValidationError) as caught:
        Prices.model_validate_json(json.dumps({"prices": ["x"] * count}))
    return caught.value


def test_a_few_errors_are_described_and_many_are_counted():
    """A description of each of 100,000 errors would block the event loop, and fill the log."""
    few, many = errors_of(3), errors_of(100_000)
    assert re.search(r"at `\$\.prices\[0\]`; .*at `\$\.prices\[2\]`$", _misfit(Prices, few))

    tracemalloc.start()
    described = _misfit(Prices, many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert described.endswith("Prices: 100,000 values are invalid")
    assert peak < 1_000_000
