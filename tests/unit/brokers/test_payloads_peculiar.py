"""Classes whose own code or settings decide what is written and read: each value comes back, or is refused with why."""

import dataclasses
import datetime as dt
import enum
import itertools
from collections import deque
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

import attrs
import msgspec
import pydantic
import pytest

from diator.brokers.codec import payload_decoder, payload_encoder
from diator.exceptions import ConfigurationError, DecodingError, EncodingError

T = TypeVar("T")


class Level(enum.Enum):
    LOW = 1


class Mixed(enum.Enum):
    LOW = 1
    HIGH = "high"


@attrs.define
class Converted:
    number: int = attrs.field(converter=lambda number: number + 1)


@attrs.define(on_setattr=[])
class Validated:
    number: int = attrs.field(validator=attrs.validators.ge(0))


@dataclasses.dataclass
class Doubled:
    number: int

    def __post_init__(self):
        self.number *= 2


@dataclasses.dataclass
class Later:
    number: int
    later: int = dataclasses.field(init=False, default=2)


def later():
    made = Later(1)
    made.later = 3
    return made


@dataclasses.dataclass(eq=False)
class Incomparable:
    number: int
    zone: dt.time


@pydantic.dataclasses.dataclass
class Counted:
    number: int

    @pydantic.field_validator("number")
    @classmethod
    def count(cls, number):
        return number + 1


class Nameless(pydantic.BaseModel):
    number: int = pydantic.Field(validation_alias=pydantic.AliasPath("numbers", "first"))


class Choices(pydantic.BaseModel):
    number: int = pydantic.Field(validation_alias=pydantic.AliasChoices("no", "nr"))


class ByName(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    number: int = pydantic.Field(alias="no")


class Excluded(pydantic.BaseModel):
    number: int = pydantic.Field(exclude=True)


class ExcludedDefault(pydantic.BaseModel):
    number: int
    parent: Any = pydantic.Field(default=None, exclude=True)


class Computed(pydantic.BaseModel):
    number: int

    @pydantic.computed_field
    @property
    def double(self) -> int:
        return self.number * 2


class ComputedStrictly(Computed):
    model_config = pydantic.ConfigDict(extra="forbid")


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    number: int


class Root(pydantic.RootModel[dict[int, bytes]]): ...


class Generics(pydantic.BaseModel, Generic[T]):
    number: T


class Cat(pydantic.BaseModel):
    name: str


class Dog(pydantic.BaseModel):
    name: str


class Seconds(pydantic.BaseModel):
    at: dt.datetime

    @pydantic.field_serializer("at")
    def in_seconds(self, at):
        return at.timestamp()


class SecondsAndBytes(Seconds):
    raw: bytes


class Twice(pydantic.BaseModel):
    number: int

    @pydantic.model_serializer
    def twice(self):
        return {"number": self.number * 2}


class Excited(pydantic.BaseModel):
    number: Annotated[int, pydantic.PlainSerializer(lambda number: f"{number}!")]


class Incremented(pydantic.BaseModel):
    number: int

    def model_post_init(self, _):
        self.number += 1


class Raised(pydantic.BaseModel):
    price: Annotated[Decimal, pydantic.AfterValidator(lambda price: price + 1)]


class Tree(pydantic.BaseModel):
    raw: bytes
    trees: "list[Tree]" = []


class First(pydantic.BaseModel):
    names: Annotated[list[str], pydantic.AfterValidator(lambda names: names[:1])]


class Stripped(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(str_strip_whitespace=True)
    name: str


class Forbidding(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    raw: bytes


class Private(pydantic.BaseModel):
    number: int
    _seen: int = pydantic.PrivateAttr(default=3)


class Incomplete(pydantic.BaseModel):
    number: "Nowhere"  # noqa: F821


Odd = pydantic.create_model("Odd", **{"class": (int, ...), "a-b": (int, ...)})


class Omitting(msgspec.Struct, omit_defaults=True, rename="camel"):
    first_name: str = "x"
    numbers: list[int] = []


class Row(msgspec.Struct, array_like=True):
    number: int


class Unset(msgspec.Struct):
    number: int | msgspec.UnsetType = msgspec.UNSET


def assigned(model, name, value):
    setattr(model, name, value)
    return model


Recursive = dict[str, "Recursive"] | int
NOON = dt.datetime(2026, 3, 7, 12, tzinfo=dt.UTC)


class Swapped(pydantic.BaseModel, populate_by_name=True):
    number: int = pydantic.Field(alias="no")
    no: int = pydantic.Field(alias="number")


class Shadowed(pydantic.BaseModel):
    number: int

    @pydantic.computed_field(alias="number")
    @property
    def double(self) -> int:
        return 2 * self.number


@dataclasses.dataclass
class SetByProperty:
    number: int


SetByProperty.number = property(lambda self: self._number, lambda self, number: setattr(self, "_number", number + 1))


class ComputedOpenly(pydantic.BaseModel, extra="allow"):
    number: int

    @pydantic.computed_field
    @property
    def double(self) -> int:
        return 2 * self.number


class OpenAndBytes(pydantic.BaseModel, extra="allow"):
    raw: bytes = b""


COMES_BACK = [
    (Converted, Converted(1)),
    (Later, later()),
    (Incomparable, Incomparable(1, dt.time(1, tzinfo=dt.UTC))),
    (Choices, Choices(no=1)),
    (ByName, ByName(number=1)),
    (ExcludedDefault, ExcludedDefault(number=1)),
    (Computed, Computed(number=1)),
    (Open, Open(number=1, more=[1])),
    (Root, Root({1: b"\xff"})),
    (Tree, Tree(raw=b"\xff", trees=[Tree(raw=b"\xfe")])),
    (Generics[dt.date], Generics[dt.date](number=dt.date(2026, 3, 7))),
    (Seconds, Seconds(at=NOON)),
    (Private, Private(number=1)),
    (Odd, Odd(**{"class": 1, "a-b": 2})),
    (Omitting, Omitting()),
    (Omitting, Omitting("y", [1])),
    (list[Row], [Row(1)]),
    (Unset, Unset()),
    (Forbidding, Forbidding(raw=b"\xff")),
    (Stripped, Stripped(name=" a ")),
]
COMES_BACK_IN_A_MODEL = [
    (dict[Level, int], {Level.LOW: 1}),
    (Cat | Dog, Cat(name="a")),
    (list[Root], [Root({1: b"\xff"})]),
    (deque[int], deque([1])),
    (pydantic.HttpUrl, pydantic.HttpUrl("http://a/b")),
    (pydantic.Json[list[int]], "[1]"),
    (pydantic.Json[list[int]] | None, "[1]"),
]
REFUSED_AS_A_VALUE = [
    (Validated, assigned(Validated(1), "number", -1), r"^Event\.value: it could not be read back"),
    (Doubled, Doubled(1), r"^Event\.value\.number"),
    (Annotated[int, msgspec.Meta(ge=0)], -1, r"^Event\.value: .* >= 0"),
    (Incomparable, Incomparable(1, dt.time(1, tzinfo=dt.timezone(dt.timedelta(seconds=1)))), "offset with seconds"),
    (list[Cat], [type("Lion", (Cat,), {})(name="a")], r"^Event\.value\[0\]: a value of type Lion would be read"),
    (Twice, Twice(number=1), r"^Event\.value\.number"),
    (Excited, Excited(number=1), r"^Event\.value\.number: it could not be read back: int_parsing"),
    (First, assigned(First(names=["a"]), "names", ["a", "b"]), r"^Event\.value\.names: the list would be read as"),
    (Generics[int], assigned(Generics[int](number=1), "number", True), r"^Event\.value\.number: a value of type bool"),  # noqa: FBT003
    (Raised, Raised(price=1), r"^Event\.value\.price: the Decimal would be read as another value"),
    (Incremented, Incremented(number=1), r"^Event\.value\.number"),
    (Stripped, assigned(Stripped(name="a"), "name", " a "), r"^Event\.value\.name"),
    (Forbidding, assigned(Forbidding(raw=b""), "raw", "a"), r"^Event\.value: it could not be read back"),
    (Open, Open(number=1, more=b"\xff"), r"^Event\.value\[\.\.\.\]: a value of type bytes would be read as str"),
    (Any, itertools.count(), r"^Event\.value: values of count cannot be written"),
    (Any, (n for n in itertools.count()), r"^Event\.value: values of generator cannot be written"),
    (dict[str, int], {"a": True}, r"Expected `int`, got `bool`"),
    (list[int], [1, "2"], r"^Event\.value\[1\]"),
    (dict[int, int], {"a": 1}, r"^Event\.value: "),
    (dict[int, int], {True: 1}, r"^Event\.value: values of bool cannot be written as JSON"),
    (dict[Literal[1, "1"], int], {"1": 1}, r"^Event\.value: its keys would be read as other keys"),
    (pydantic.SecretStr, pydantic.SecretStr(None), r"^Event\.value: it could not be read back"),
    (pydantic.SecretBytes, pydantic.SecretBytes("text"), r"^Event: it could not be read back"),
    (Swapped, Swapped.model_construct(number=1, no=2), r"^Event\.value\.number: the int would be read as another"),
    (Shadowed, Shadowed(number=1), r"^Event\.value\.number: the int would be read as another value"),
    (SetByProperty, SetByProperty(1), r"^Event\.value\.number: the int would be read as another value"),
    (ComputedOpenly, ComputedOpenly(number=1), r"^Event\.value: its keys would be read as other keys"),
    (Any, Cat(name="a"), r"^Event\.value: a value of type Cat would be read as dict; annotate the field with Cat"),
    (dict[int | str, int], {1: 1, "1": 2}, r"^Event\.value: its keys would be read as other keys"),
]
REFUSED_IN_A_MODEL = [
    (Cat | Dog, Dog(name="a"), r"a value of type Dog would be read as Cat"),
    (Later, later(), r"^Event\.value\.later"),
    (Counted, Counted(1), r"^Event\.value\.number"),
    (deque[bytes], deque([b"\xff"]), r"^Event\.value"),
]
REFUSED_AS_A_CLASS = [
    (Nameless, r"^Event\.value\.number cannot travel: its alias is a path; give it an alias that is a name"),
    (Excluded, r"^Event\.value\.number cannot travel: .* excluded and has no default; give it a default"),
    (ComputedStrictly, r"^Event\.value\.double cannot travel: .*; make it a property"),
    (Incomplete, r"^Event\.value cannot travel: .* Incomplete contains a name .* model_rebuild\(\)"),
    (OpenAndBytes, r"^Event\.value cannot travel: only pydantic can read it, and Event\.value\.raw is"),
    (SecondsAndBytes, r"^Event\.value cannot travel: only pydantic can read it, and Event\.value\.raw is"),
    (Recursive, r"^Event\.value cannot travel: its type contains itself; use a class"),
    (msgspec.Raw, r"^Event\.value cannot travel: RawType"),
    (Mixed, r"^Event\.value cannot travel: .* either all str or all int .*; docs/payloads\.md lists"),
    (Doubled | Raised, r"^Event\.value cannot travel: .*; use one type, a tagged union of msgspec Structs"),
]


def as_dataclass(hint):
    return dataclasses.make_dataclass("Event", [("value", hint)], namespace={"__module__": __name__})


def as_model(hint):
    return pydantic.create_model("Event", value=(hint, ...))


def cases(cases, kind):
    return [
        pytest.param(kind(hint), *rest, id=f"{position} {kind.__name__} {hint}")
        for position, (hint, *rest) in enumerate(cases)
    ]


@pytest.mark.parametrize(
    ("event_type", "value"), cases(COMES_BACK, as_dataclass) + cases(COMES_BACK_IN_A_MODEL, as_model)
)
def test_comes_back(event_type, value):
    event = event_type(value=value)

    back = payload_decoder(event_type)(payload_encoder(event_type)(event))

    if isinstance(value, (Later, Incomparable)):
        back.value, event.value = vars(back.value), vars(event.value)
    assert back.value == getattr(event, "value", value)
    assert type(back.value) is type(event.value)


@pytest.mark.parametrize(
    ("event_type", "value", "problem"),
    cases(REFUSED_AS_A_VALUE, as_dataclass) + cases(REFUSED_IN_A_MODEL, as_model),
)
def test_is_refused_when_it_is_sent(event_type, value, problem):
    event = event_type(value=value)

    with pytest.raises(EncodingError, match=problem):
        payload_encoder(event_type)(event)


@pytest.mark.parametrize(("event_type", "problem"), cases(REFUSED_AS_A_CLASS, as_dataclass))
@pytest.mark.parametrize("plan", [payload_encoder, payload_decoder])
def test_is_refused_when_its_class_is_planned(event_type, problem, plan):
    with pytest.raises(ConfigurationError, match=problem):
        plan(event_type)


def test_an_event_is_an_object_in_json():
    with pytest.raises(ConfigurationError, match="Row cannot travel: a payload is a JSON object; remove array_like"):
        payload_decoder(Row)


def test_computed_fields_are_written_and_additional_ones_come_back():
    assert payload_encoder(as_dataclass(Computed))(as_dataclass(Computed)(Computed(number=1))) == (
        b'{"value":{"number":1,"double":2}}'
    )
    back = payload_decoder(Open)(payload_encoder(Open)(Open(number=1, more=2)))
    assert back.more == 2


def test_unknown_fields_are_refused_if_the_model_asks_for_it():
    with pytest.raises(DecodingError, match="the payload does not fit Forbidding"):
        payload_decoder(Forbidding)(b'{"raw":"","more":1}')


def test_the_name_that_a_model_reads_is_the_one_that_is_written():
    assert payload_encoder(ByName)(ByName(number=1)) == b'{"number":1}'
    assert payload_encoder(Choices)(Choices(nr=1)) == b'{"no":1}'


def test_an_excluded_field_is_not_written():
    assert payload_encoder(ExcludedDefault)(ExcludedDefault(number=1, parent=[])) == b'{"number":1}'


def test_a_value_in_a_collection_that_only_pydantic_knows_has_the_form_of_its_type():
    event_type = as_model(deque[dt.timedelta])

    assert payload_encoder(event_type)(event_type(value=[dt.timedelta(400)])) == b'{"value":["P400D"]}'


def test_a_decimal_that_is_not_a_number_comes_back():
    event_type = as_dataclass(Decimal)

    assert payload_decoder(event_type)(payload_encoder(event_type)(event_type(Decimal("NaN")))).value.is_nan()


def test_a_type_that_contains_itself_is_planned():
    @dataclasses.dataclass
    class Node:
        number: int
        nodes: "list[Node]"

    Node.__annotations__["nodes"] = list[Node]
    event = Node(1, [Node(2, [])])

    assert payload_decoder(Node)(payload_encoder(Node)(event)) == event
    with pytest.raises(EncodingError, match=r"Node\.nodes\[0\]\.number: "):
        payload_encoder(Node)(Node(1, [Node(number=True, nodes=[])]))


class Serialized(pydantic.BaseModel):
    name: str

    @pydantic.field_serializer("name")
    def quote(self, name: str) -> str:
        raise ValueError(name)


class ComputedWrongly(pydantic.BaseModel):
    name: str

    @pydantic.computed_field
    @property
    def upper(self) -> str:
        raise TypeError(self.name)


class Zone(dt.tzinfo):
    def utcoffset(self, _):
        raise ValueError("secret-4711")


@pytest.mark.parametrize(
    ("hint", "value", "problem"),
    [
        (
            Serialized,
            Serialized(name="secret-4711"),
            r"Event\.value: code of its class raised PydanticSerializationError",
        ),
        (ComputedWrongly, ComputedWrongly(name="secret-4711"), r"Event\.value: code of its class raised TypeError"),
        (dt.datetime, dt.datetime(2026, 3, 7, tzinfo=Zone()), r"Event\.value: code of its class raised ValueError"),
        (Any, {"secret-4711": object()}, r"Event\.value\[\.\.\.\]: values of object cannot be written as JSON"),
        (Any, {"secret-4711": (1,)}, r"Event\.value\[\.\.\.\]: a value of type tuple would be read"),
    ],
)
def test_the_error_of_a_value_does_not_quote_it(hint, value, problem):
    event_type = as_dataclass(hint)

    with pytest.raises(EncodingError, match=problem) as caught:
        payload_encoder(event_type)(event_type(value))

    assert "4711" not in f"{caught.value!r} {caught.value.path}"
