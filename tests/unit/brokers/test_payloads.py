"""Classes of all kinds with fields of all types: what is sent comes back equal, or it is not sent."""

import collections
import dataclasses
import datetime as dt
import enum
import math
import re
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple, NewType
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from typing_extensions import TypedDict

from diator.brokers.codec import payload_decoder, payload_encoder
from diator.exceptions import ConfigurationError, EncodingError

# -- the kinds of classes --------------------------------------------------------------------------------------------

MODEL = pydantic.ConfigDict(arbitrary_types_allowed=True)


def as_dataclass(name, fields):
    return dataclasses.make_dataclass(name, fields.items(), namespace={"__module__": __name__}, kw_only=True)


def as_attrs(name, fields):
    return attrs.make_class(name, {field: attrs.field(type=hint) for field, hint in fields.items()}, kw_only=True)


def as_struct(name, fields):
    return msgspec.defstruct(name, [*fields.items()], kw_only=True)


def as_model(name, fields):
    return pydantic.create_model(name, __config__=MODEL, **{field: (hint, ...) for field, hint in fields.items()})


def as_pydantic_dataclass(name, fields):
    return pydantic.dataclasses.dataclass(config=MODEL, kw_only=True)(as_dataclass(name, fields))


KINDS = [as_dataclass, as_attrs, as_struct, as_model, as_pydantic_dataclass]

# -- the types of fields, each with its values -----------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Mood(enum.StrEnum):
    GOOD = "good"


class Rights(enum.IntFlag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    name: str = "here"


class Options(TypedDict, total=False):
    room: str
    seats: int


class Cat(msgspec.Struct, tag=True, frozen=True):
    name: str


class Dog(msgspec.Struct, tag=True, frozen=True):
    name: str


UserId = NewType("UserId", int)

whole_minutes = st.integers(-23 * 60, 23 * 60).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

# The keys of dictionaries and the items of sets.
SCALARS = [
    (str, st.text()),
    (int, st.integers()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bytes, st.binary()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (UUID, st.uuids()),
    (dt.datetime, st.datetimes() | st.datetimes(timezones=st.just(dt.UTC) | whole_minutes)),
    (dt.date, st.dates()),
    (dt.time, st.times() | st.times(timezones=whole_minutes)),
    (dt.timedelta, st.timedeltas()),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (Mood, st.sampled_from(Mood)),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (UserId, st.integers()),
]
OTHERS = [
    (None, st.none()),
    (bool, st.booleans()),
    (bytearray, st.binary().map(bytearray)),
    (Any, json_values),
    (dict, st.dictionaries(st.text(), json_values, max_size=3)),
    (Point, st.builds(Point, x=st.integers(), name=st.text())),
    (Options, st.fixed_dictionaries({}, optional={"room": st.text(), "seats": st.integers()})),
    (Rights, st.sampled_from([Rights.READ, Rights.READ | Rights.WRITE])),
    (Cat | Dog, st.builds(Cat, st.text()) | st.builds(Dog, st.text())),
    (int | str | None, st.integers() | st.text() | st.none()),
    (
        float | bool | list[int],
        st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.lists(st.integers()),
    ),
    (pydantic.SecretStr, st.text().map(pydantic.SecretStr)),
    (pydantic.SecretBytes, st.binary().map(pydantic.SecretBytes)),
]


def containers(hint, values):
    """Return a strategy of the types that contain this one."""
    return st.sampled_from(
        [
            (hint | None if not isinstance(hint, str) else hint, values | st.none())
            if hint is not None
            else (None, values),
            (list[hint], st.lists(values, max_size=3)),
            (Sequence[hint], st.lists(values, max_size=3)),
            (tuple[hint, ...], st.lists(values, max_size=3).map(tuple)),
            (tuple[hint, int], st.tuples(values, st.integers())),
            (dict[str, hint], st.dictionaries(st.text(), values, max_size=3)),
            (Mapping[str, hint], st.dictionaries(st.text(), values, max_size=3)),
        ]
    )


hashable = st.sampled_from(SCALARS).flatmap(
    lambda scalar: st.sampled_from(
        [
            (set[scalar[0]], st.sets(scalar[1], max_size=3)),
            (frozenset[scalar[0]], st.frozensets(scalar[1], max_size=3)),
            (dict[scalar[0], int], st.dictionaries(scalar[1], st.integers(), max_size=3)),
        ]
    )
)
numbers = iter(range(10**9))


def records(types):
    """Return a strategy of classes of any kind, with the values of their fields."""

    def record(kind, members):
        fields = {f"field_{position}": member for position, member in enumerate(members)}
        cls = kind(f"Record{next(numbers)}", {name: hint for name, (hint, _) in fields.items()})
        values = st.fixed_dictionaries({name: values for name, (_, values) in fields.items()})
        return cls, values.map(lambda given: built(cls, given))

    return st.builds(record, st.sampled_from(KINDS), st.lists(types, min_size=1, max_size=3))


def built(cls, given):
    try:
        return cls(**given)
    except pydantic.ValidationError:
        reject()


def nested(leaves):
    return st.recursive(
        leaves, lambda inner: inner.flatmap(lambda member: containers(*member)) | records(inner), max_leaves=4
    )


PLAIN = nested(st.sampled_from([*SCALARS, *OTHERS]) | hashable)

# -- values that type checkers accept, and that do not come back -----------------------------------------------------


class Text(str):
    __slots__ = ()


class Moment(dt.datetime):
    pass


@dataclasses.dataclass
class Animal:
    name: str


@dataclasses.dataclass
class Cow(Animal):
    milk: int


class Pet(pydantic.BaseModel):
    name: str


class Parrot(Pet):
    words: list[str]


class Spoken(pydantic.BaseModel):
    """Its validator reads another form than its field has."""

    words: list[str]

    @pydantic.field_validator("words", mode="before")
    @classmethod
    def split(cls, value):
        return value.split() if isinstance(value, str) else [f"{word}!" for word in value]


@dataclasses.dataclass
class Doubled:
    number: int

    def __post_init__(self):
        self.number *= 2


class Backref(pydantic.BaseModel):
    name: str
    parent: Any = pydantic.Field(default=None, exclude=True)


AWKWARD = [
    (int, st.booleans() | st.sampled_from(Level)),
    (float, st.booleans() | st.floats() | st.integers() | st.just(10**400)),
    (str, st.builds(Text, st.text()) | st.sampled_from(Mood) | st.just("\ud800")),
    (dt.date, st.datetimes()),
    (dt.datetime, st.datetimes(timezones=st.just(dt.timezone(dt.timedelta(minutes=19, seconds=32))))),
    (dt.datetime, st.builds(Moment, st.just(2026), st.just(1), st.just(1), tzinfo=st.none() | st.just(dt.UTC))),
    (dt.time, st.times(timezones=st.just(dt.timezone(dt.timedelta(seconds=1))))),
    (Decimal, st.decimals()),
    (Sequence[int], st.lists(st.integers()).map(tuple)),
    (dict[int | str, int], st.dictionaries(st.integers(0, 3) | st.sampled_from("012"), st.integers())),
    (dict[int, int], st.dictionaries(st.booleans(), st.integers())),
    (dict, st.dictionaries(st.integers(0, 3) | st.sampled_from("012"), st.integers())),
    (dict[float, int], st.dictionaries(st.floats(), st.integers())),
    (
        Any,
        st.uuids() | st.floats() | st.tuples(st.integers()) | st.builds(object) | st.builds(Cow, st.text(), st.just(1)),
    ),
    (Options, st.fixed_dictionaries({"room": st.text(), "more": st.integers()})),
    (Animal, st.builds(Cow, st.text(), st.integers())),
    (list[Animal], st.lists(st.builds(Cow, st.text(), st.integers()) | st.builds(Animal, st.text()), max_size=3)),
    (Pet, st.builds(Parrot, name=st.text(), words=st.just(["hello"]))),
    (Spoken, st.builds(Spoken, words=st.sampled_from(["", "a b"]))),
    (Doubled, st.builds(Doubled, st.integers())),
    (Backref, st.builds(Backref, name=st.text())),
    (collections.Counter[str], st.just(collections.Counter("a"))),
    (complex, st.complex_numbers()),
    (UUID | str, st.uuids().map(str) | st.uuids()),
    (Animal | Pet, st.builds(Animal, st.text()) | st.builds(Pet, name=st.text())),
    (dt.datetime | dt.date, st.datetimes() | st.dates()),
    (pydantic.HttpUrl, st.just(pydantic.HttpUrl("http://a/b"))),
    (pydantic.Json[list[int]], st.just("[1]")),
]
ANY = nested(st.sampled_from([*SCALARS, *OTHERS, *AWKWARD, *AWKWARD]) | hashable)


def fields_of(cls):
    if hasattr(cls, "model_fields"):
        return [name for name, field in cls.model_fields.items() if not field.exclude]
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return [each.name for each in cls.__attrs_attrs__] if attrs.has(cls) else getattr(cls, "__struct_fields__", None)


def same(sent, back):
    """Return whether a value has come back: equal, and of its own class or of the standard type of its class."""
    pairs = [(sent, back)]  # a deep value needs no deep stack
    while pairs:
        sent, back = pairs.pop()
        kind = type(back)
        if (names := fields_of(kind)) is not None:
            is_same = type(sent) is kind
            parts = [(getattr(sent, name), getattr(back, name)) for name in names] if is_same else ()
        elif isinstance(back, dict):
            is_same = isinstance(sent, dict) and sent.keys() == back.keys()
            parts = [(sent[key], back[key]) for key in back] if is_same else ()
        elif isinstance(back, (list, tuple)):
            is_same = isinstance(sent, kind) and len(sent) == len(back)
            parts = zip(sent, back, strict=True) if is_same else ()
        else:
            is_same, parts = same_leaf(sent, back), ()
        if not is_same:
            return False
        pairs += parts
    return True


def same_leaf(sent, back):
    kind = type(back)
    if isinstance(back, float) and type(sent) is int:
        return sent == back
    if isinstance(back, Decimal):
        return isinstance(sent, Decimal) and str(sent) == str(back)
    is_exact = type(sent) is kind or (
        isinstance(sent, kind) and kind in (str, int, dt.datetime) and not isinstance(sent, bool)
    )
    return is_exact and sent == back


pytestmark = pytest.mark.timeout(60 + settings().max_examples)
more = settings(max_examples=settings().max_examples * 2)


@more
@given(st.data())
def test_what_a_class_can_promise_is_sent_and_comes_back(data):
    """None of it is refused; any two kinds of classes write the same JSON, and read that of each other."""
    hint, values = data.draw(PLAIN)
    value = data.draw(values)
    classes = [data.draw(st.sampled_from(KINDS))("Event", {"value": hint}) for _ in range(2)]
    payloads = [payload_encoder(cls)(built(cls, {"value": value})) for cls in classes]

    assert len({bytes(sorted(each)) for each in payloads}) == 1  # a set has no order
    for cls in classes:
        assert same(value, payload_decoder(cls)(payloads[0]).value)


@more
@given(st.data())
def test_whatever_type_checkers_accept_comes_back_or_is_refused(data):
    hint, values = data.draw(ANY)
    event_type = data.draw(st.sampled_from(KINDS))("Event", {"value": hint})
    try:
        write = payload_encoder(event_type)
    except ConfigurationError as error:
        refused = str(error)
        with pytest.raises(ConfigurationError, match=re.escape(refused)):
            payload_decoder(event_type)
    else:
        refused = sent_and_read(event_type, data.draw(values), write)
    assert refused is None or refused.startswith("Event.value")


def sent_and_read(event_type, value, write):
    """Check that a value comes back; return the text of the error if it is refused."""
    event = built(event_type, {"value": value})
    try:
        payload = write(event)
    except EncodingError as error:
        return str(error)
    assert same(event.value, payload_decoder(event_type)(payload).value)
    return None


# -- cyclic and deep values ------------------------------------------------------------------------------------------

NODES = [kind("Node", {"value": Any}) for kind in KINDS]
WRAPS = [lambda value: [value], lambda value: {"value": value}, lambda value: collections.deque([value])]
WRAPS += [lambda value, node=node: node(value=value) for node in NODES]


@more
@given(
    event_type=st.sampled_from(NODES),
    wraps=st.lists(st.sampled_from(WRAPS), min_size=1, max_size=4),
    depth=st.integers(0, 60) | st.sampled_from([300, 500, 1_000, 10_000]),
    leaves=st.sampled_from([[None], [1], [math.nan], [object()], ["\ud800"], [*range(1_000), object()]]),
    is_cyclic=st.booleans(),
)
def test_a_cyclic_or_deep_value_is_sent_or_refused_soon(event_type, wraps, depth, leaves, is_cyclic):
    value = innermost = [*leaves]
    for position in range(depth):
        value = wraps[position % len(wraps)](value)
    if is_cyclic:
        innermost.append(value)
    write = payload_encoder(event_type)

    started = time.process_time()
    refused = sent_and_read(event_type, value, write)

    assert time.process_time() - started < 5  # and not for ever
    assert refused is None or refused.startswith("Node")
    assert refused or not is_cyclic
