"""The tables of docs/payloads.md are true, in each kind of class."""

import collections
import dataclasses
import datetime as dt
import decimal
import ipaddress
import math
import pathlib
import re
import typing
import uuid
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import attrs
import msgspec
import pydantic
import pytest
from typing_extensions import TypedDict

from diator.brokers.codec import payload_decoder, payload_encoder
from diator.exceptions import ConfigurationError, EncodingError

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "payloads.md").read_text()


class Color(Enum):
    RED = "red"


class Mixed(Enum):
    RED = "red"
    ONE = 1


class Point(NamedTuple):
    x: int
    y: int


class Options(TypedDict):
    a: int


@dataclass(frozen=True)
class Place:
    room: str


@dataclass(frozen=True)
class Hall(Place):
    seats: int


@attrs.frozen
class AttrsPlace:
    room: str


class StructPlace(msgspec.Struct):
    room: str


class ModelPlace(pydantic.BaseModel):
    room: str


@pydantic.dataclasses.dataclass
class PydanticPlace:
    room: str


class HasRoom(Protocol):
    room: str


class UserId(str):
    __slots__ = ()


@attrs.frozen
class AttrsPrivate:
    _room: str


class Undecorated(Place):
    seats: int = 7


@dataclass
class WithInitVar:
    room: str
    seats: InitVar[int]


Recursive = dict[str, "Recursive"] | int
endless: list[Any] = []
endless.append(endless)
NAMES = {
    **{
        name: getattr(module, name)
        for module in (typing, collections, dt, decimal, ipaddress, math, pathlib, pydantic, uuid)
        for name in dir(module)
    },
    **{name: value for name, value in globals().items() if name[0].isupper() or name == "endless"},
    "Sequence": Sequence,
    "amsterdam": dt.timezone(dt.timedelta(minutes=19, seconds=32)),
}


def rows(header):
    """Return the cells of the table with this header."""
    table = PAGE.partition(f"| {header} |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert table
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def code(cell, *, last=False):
    """Return the first (or the last) code of a cell that is an annotation or a value, by evaluating it."""
    found = re.findall(r"`([^`]+)`", cell)
    return eval(found[-1 if last else 0], NAMES)


def annotation_of(cell):
    """An introduction ends with a colon."""
    return code(cell.rpartition("`: ")[2] if "`: " in cell else cell.rpartition(": ")[2] or cell)


def as_dataclass(hint):
    return dataclasses.make_dataclass("Holder", [("value", hint)], namespace={"__module__": __name__})


def as_attrs(hint):
    return attrs.make_class("Holder", {"value": attrs.field(type=hint)})


def as_struct(hint):
    return msgspec.defstruct("Holder", [("value", hint)], kw_only=True)


def as_model(hint):
    return pydantic.create_model("Holder", __config__={"arbitrary_types_allowed": True}, value=(hint, ...))


def as_pydantic_dataclass(hint):
    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    return pydantic.dataclasses.dataclass(config=config)(as_dataclass(hint))


@pytest.mark.parametrize("kind", [as_dataclass, as_attrs, as_struct, as_model, as_pydantic_dataclass])
@pytest.mark.parametrize("row", rows("annotation | a value | in JSON"), ids=lambda row: row[0])
def test_a_type_has_one_form_in_json_and_comes_back(row, kind):
    annotation, value, written = annotation_of(row[0]), code(row[1]), row[2].strip("`")
    holder = kind(annotation)

    payload = payload_encoder(holder)(holder(value=value))

    assert payload.decode() == f'{{"value":{written}}}'
    back = payload_decoder(holder)(payload).value
    assert (back, type(back)) == (value, type(value))


REFUSED = [
    (name, row[1])
    for row in rows("annotation | instead")
    for name in re.findall(r"`([^`]+)`", row[0].rpartition(": ")[2] or row[0])
    if name not in ("@dataclass", "Enum", "str", "if TYPE_CHECKING")
]


@pytest.mark.parametrize(("annotation", "remedy"), REFUSED)
@pytest.mark.parametrize("plan", [payload_encoder, payload_decoder])
def test_a_type_that_cannot_travel_is_refused_when_its_class_is_planned(annotation, remedy, plan):
    hint = eval(annotation, NAMES) if annotation != '"Missing"' else "Missing"

    with pytest.raises(ConfigurationError, match=r"^Holder\.value") as caught:
        plan(as_dataclass(hint))

    assert ";" in str(caught.value), "with a remedy"


@pytest.mark.parametrize("row", rows("annotation | value | instead"), ids=lambda row: f"{row[0]} {row[1]}")
def test_a_value_that_cannot_travel_is_refused_when_it_is_sent(row):
    holder = as_dataclass(annotation_of(row[0]))

    with pytest.raises(EncodingError) as caught:
        payload_encoder(holder)(holder(value=code(row[1])))

    assert caught.value.path.startswith("Holder.value")
