"""
The plan of a payload: how the objects of one class become JSON and come back, and the proof that they come back.

Each type has one form in JSON, whoever declares it: msgspec writes it. The emitter and the consumer make the plan of a
class once. `plan_payload` refuses a class whose objects could be written but not read. A class cannot promise
everything: a field that is an `int` may contain `True`. Therefore `PayloadPlan.proven` is one expression, which is true
of an object that certainly comes back as it is. Of any other object, the codec reads the payload back and compares.
"""

from __future__ import annotations

import builtins
import dataclasses
import datetime as dt
import inspect
import itertools
import keyword
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints
from uuid import UUID

import msgspec
import orjson
from msgspec import UNSET
from msgspec import inspect as of

from diator._hints import fields_of, name_of, undeclared_in, unresolved
from diator.brokers._standard import as_standard, standard_type, stands_for_standard
from diator.exceptions import ConfigurationError

E = TypeVar("E")


class PayloadPlan(NamedTuple, Generic[E]):
    """
    How the objects of one class become JSON and come back.

    Attributes:
        read: Decodes a payload. It raises any error.
        proven: Returns whether an object certainly comes back as it is; None if only reading it back can tell.
    """

    read: Callable[[bytes], E]
    proven: Callable[[E], bool] | None


def plan_payload(type_: type[E]) -> PayloadPlan[E]:
    """
    Return the plan of a class: a dataclass, an attrs class, or a pydantic or msgspec model.

    Raises:
        ConfigurationError: The class could write what it cannot read. The text has the path of the field and a remedy.
    """
    planner = _Planner()
    proof = planner.of_event(type_)
    proven = eval(f"lambda event: {proof}", planner.known) if proof else None  # noqa: S307  # made of names of fields
    return PayloadPlan(planner.reader_of(type_), proven)


# -- writing -----------------------------------------------------------------------------------------------------------


def _written(value: Any) -> Any:
    """Return what is written for a value that msgspec does not know."""
    kind: Any = type(value)
    return _writer(kind)(value)


@lru_cache(1024)
def _writer(kind: Any) -> Callable[[Any], Any]:
    """Return a function that returns what is written for a value of this type."""
    if is_model(kind):
        return _model_writer(kind)
    if _is_secret(kind):
        return kind.get_secret_value  # type: ignore[no-any-return]
    if standard_type(kind) is not None:
        return as_standard

    def write(value: Any) -> Any:
        if isinstance(value, deque):
            return list(value)
        pydantic: Any = sys.modules.get("pydantic_core")  # it knows URLs, paths, IP addresses
        if pydantic is not None and not isinstance(value, Iterator):
            with suppress(pydantic.PydanticSerializationError):
                # Some come back as they are, such as a key that is None, which pydantic would know.
                if (written := pydantic.to_jsonable_python(value)) is not value:
                    return written
        raise TypeError(f"values of {name_of(kind)} cannot be written as JSON")

    return write


def _model_writer(model: Any) -> Callable[[Any], Any]:
    if _serializes_itself(model):
        return lambda value: value.model_dump(mode="json", by_alias=True)
    if model.__pydantic_root_model__:
        return lambda value: value.root
    names = [*wire_names(model).items()]
    texts = _json_texts(model)
    computed = [*_computed(model).items()]

    def write(value: Any) -> dict[str, Any]:
        fields = value.__dict__
        written = {wire_name: fields[name] for name, wire_name in names}
        for name in texts:
            written[name] = None if written[name] is None else dump(written[name]).decode()
        for name, attribute in computed:
            written[name] = getattr(value, attribute)
        return {**written, **value.__pydantic_extra__} if value.__pydantic_extra__ else written

    return write


#: Write a value in the one form that its type has.
dump: Callable[[Any], bytes] = msgspec.json.Encoder(enc_hook=_written).encode


def is_model(type_: Any) -> bool:
    """Return whether a class is a pydantic model."""
    return isinstance(type_, type) and hasattr(type_, "__pydantic_root_model__")


def _is_secret(type_: Any) -> bool:
    pydantic: Any = sys.modules.get("pydantic")
    return pydantic is not None and type_ in (pydantic.SecretStr, pydantic.SecretBytes)


def names_in_json(type_: Any) -> Mapping[str, Sequence[str]]:
    """Return the fields of a class that are written, each with all names by which it is read. The first is written."""
    fields = fields_of(type_)
    if not is_model(type_):
        names = zip(fields, getattr(type_, "__struct_encode_fields__", fields), strict=True)
        return {field: [name] for field, name in names}
    by_name = type_.model_config.get("populate_by_name") or type_.model_config.get("validate_by_name")
    return {
        name: [*[name] * bool(by_name or field.validation_alias is None), *_aliases(field)]
        for name, field in type_.model_fields.items()
        if not field.exclude
    }


def _aliases(field: Any) -> list[str]:
    aliases = getattr(field.validation_alias, "choices", [field.validation_alias])
    return [each for each in aliases if isinstance(each, str)]


@lru_cache(1024)
def wire_names(type_: Any) -> Mapping[str, str]:
    """Return the fields of a class that are written, each with the name by which it is written."""
    return {field: names[0] for field, names in names_in_json(type_).items()}


def _computed(model: Any) -> Mapping[str, str]:
    """Return the names in JSON of the computed fields, each with its attribute."""
    return {field.alias or name: name for name, field in model.model_computed_fields.items()}


def _json_texts(model: Any) -> Sequence[str]:
    """Return the names in JSON of the fields that contain JSON as a text (`pydantic.Json`)."""
    json: Any = sys.modules["pydantic"].Json
    names = wire_names(model)

    def is_text(field: Any) -> bool:
        metadata = [*field.metadata, *(each for part in get_args(field.annotation) for each in _metadata_of(part))]
        return any(each is json or isinstance(each, json) for each in (field.annotation, *metadata))

    return [names[name] for name, field in model.model_fields.items() if is_text(field)]


def _metadata_of(hint: Any) -> Sequence[Any]:
    """Return what `Annotated` adds to a type."""
    added: Sequence[Any] = getattr(hint, "__metadata__", ())
    return added


def _serializes_itself(model: Any) -> bool:
    decorators, pydantic = model.__pydantic_decorators__, sys.modules["pydantic"]
    return bool(
        decorators.field_serializers
        or decorators.model_serializers
        or any(
            isinstance(each, (pydantic.PlainSerializer, pydantic.WrapSerializer))
            for field in model.model_fields.values()
            for each in field.metadata
        )
    )


# -- planning ----------------------------------------------------------------------------------------------------------

# A value of exactly this type comes back as it is. (A dictionary: freezegun replaces the names of a module.)
_EXACT: dict[type[of.Type], type] = {
    of.BoolType: bool,
    of.IntType: int,
    of.StrType: str,
    of.BytesType: bytes,
    of.ByteArrayType: bytearray,
    of.UUIDType: UUID,
    of.DateType: dt.date,
    of.TimeDeltaType: dt.timedelta,
    of.FloatType: float,
    of.DecimalType: Decimal,
    of.DateTimeType: dt.datetime,
    of.TimeType: dt.time,
}
# What must be true of such a value besides. NaN and infinity, times zero, are NaN; JSON cannot represent them.
_BESIDES: dict[type[of.Type], str] = {
    of.FloatType: " and {0} * 0.0 == 0.0",
    of.DecimalType: " and {0}.is_finite()",
    of.DateTimeType: " and ({0}.tzinfo is UTC or has_whole_minutes({0}))",
    of.TimeType: " and has_whole_minutes({0})",
}
_COLLECTIONS: dict[type[of.Type], type] = {
    of.ListType: list,
    of.SetType: set,
    of.FrozenSetType: frozenset,
    of.VarTupleType: tuple,
}
_LIMITS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern", "tz")
# The types of the keys of a dictionary. Other keys have no text in JSON, or not one of their own.
_KEYS: tuple[type, ...] = (
    *{*_EXACT} - {of.BoolType, of.ByteArrayType},
    of.EnumType,
    of.LiteralType,
    of.UnionType,
    of.AnyType,
)
# The settings of pydantic that do not change a value.
_HARMLESS = {
    "alias_generator", "arbitrary_types_allowed", "extra", "frozen", "from_attributes", "populate_by_name", "strict",
    "title", "use_attribute_docstrings", "validate_assignment", "validate_by_alias", "validate_by_name",
}  # fmt: skip


def _is_plain_json(value: Any) -> bool:
    """Return whether JSON gives *value* back without knowing its type."""
    try:
        return bool(orjson.loads(orjson.dumps(value)) == value)
    except TypeError:  # also an int of more than 64 bits
        return False


def _has_whole_minutes(value: dt.datetime | dt.time) -> bool:
    """Return whether the offset of a time can be written: RFC 3339 has no seconds there."""
    offset = value.utcoffset()
    return value.tzinfo is None if offset is None else not offset % _MINUTE


_MINUTE = dt.timedelta(minutes=1)


class _Planner:
    """
    Walks the types of the fields of a class, and refuses those that cannot be read back.

    Each method returns a proof: a condition in Python that is true of a value that certainly comes back as it is; None
    if there is no such condition.
    """

    def __init__(self) -> None:
        self.known: dict[str, Any] = {
            "UTC": dt.UTC,
            "is_plain_json": _is_plain_json,
            "has_whole_minutes": _has_whole_minutes,
        }
        self._numbers = itertools.count()
        self._within: list[Any] = []  # the classes that contain the field, outermost first
        self._in_models = 0
        self._shadows: dict[Any, type[msgspec.Struct]] = {}
        # pydantic reads the JSON of its models itself, unless it would read another value than msgspec has written.
        self._typed = ""  # the path of a field that only msgspec reads
        self._foreign = ""  # the path of a field that only pydantic reads

    def of_event(self, type_: Any) -> str | None:
        path = name_of(type_)
        if getattr(getattr(type_, "__struct_config__", None), "array_like", False):
            raise _refusal(path, "a payload is a JSON object", "remove array_like=True")
        try:
            node = of.type_info(type_)
        except Exception as error:  # msgspec and the annotations may raise anything
            raise _explained(type_, path, error) from error
        proof = self._proof(node, "event", path)
        if self._typed and self._foreign:
            what = f"only pydantic can read it, and {self._typed} is of a type that pydantic reads from another form"
            raise _refusal(self._foreign, what, "replace one of the two types, for instance bytes by a str")
        return proof and proof.removeprefix(f"type(event) is {self._name(type_)} and ")

    # -- reading ---------------------------------------------------------------------------------------------------

    def reader_of(self, type_: Any) -> Callable[[bytes], Any]:
        if not is_model(type_):
            return msgspec.json.Decoder(type_, dec_hook=self._read_other).decode
        if not self._typed:
            return type_.model_validate_json  # type: ignore[no-any-return]
        decode = msgspec.json.Decoder(self._shadow(type_), dec_hook=self._read_other).decode
        return lambda payload_json: self._built(type_, decode(payload_json))

    def _read_other(self, hint: Any, value: Any) -> Any:
        """Return what *value*, plain JSON, is as a type that msgspec does not know."""
        if hint is object:
            return value
        try:
            return self._read_json_of_other(hint, msgspec.json.encode(value))
        except msgspec.ValidationError as error:  # msgspec adds the place to other errors only
            raise ValueError from error

    def _read_json_of_other(self, hint: Any, value: bytes) -> Any:
        if _is_secret(hint):
            return hint(msgspec.json.decode(value, type=str if "Str" in hint.__name__ else bytes))
        if stands_for_standard(hint):
            return msgspec.json.decode(value, type=standard_type(hint))
        if not self._typed:
            return hint.model_validate_json(value)
        if hint.__pydantic_root_model__:
            root = hint.model_fields["root"].annotation
            return hint.model_validate(msgspec.json.decode(value, type=root, dec_hook=self._read_other))
        return self._built(hint, msgspec.json.decode(value, type=self._shadow(hint), dec_hook=self._read_other))

    def _shadow(self, model: Any) -> type[msgspec.Struct]:
        """Return a struct with the fields of a model, which reads their values for it."""
        if model not in self._shadows:
            names = wire_names(model)
            self._shadows[model] = msgspec.defstruct(
                model.__name__,
                [(name, model.model_fields[name].annotation, UNSET) for name in names],
                rename=names,
                forbid_unknown_fields=model.model_config.get("extra") == "forbid",
            )
        return self._shadows[model]

    def _built(self, model: Any, read: msgspec.Struct) -> Any:
        values = {wire_name: getattr(read, name) for name, wire_name in wire_names(model).items()}
        return model.model_validate({name: value for name, value in values.items() if value is not UNSET})

    # -- proving ---------------------------------------------------------------------------------------------------

    def _proof(self, node: Any, value: str, path: str) -> str | None:
        proof = self._of_any(node, value, path)
        return None if any(getattr(node, limit, None) is not None for limit in _LIMITS) else proof

    def _of_any(  # noqa: C901, PLR0911, PLR0912  # one case for each type
        self, node: Any, value: str, path: str
    ) -> str | None:
        if (exact := _EXACT.get(type(node))) is not None:
            if exact in (bytes, bytearray):
                self._read_by_msgspec(path)
            return f"type({value}) is {self._name(exact)}{_BESIDES.get(type(node), '').format(value)}"
        match node:
            case of.AnyType() | of.CustomType(cls=builtins.object):
                return f"is_plain_json({value})"
            case of.NoneType():
                return f"{value} is None"
            case of.EnumType(cls=cls):
                return f"type({value}) is {self._name(cls)}"
            case of.LiteralType(values=values):
                return f"({value} in {values!r} and type({value}) in {self._name({*map(type, values)})})"
            case of.UnionType(types=types):
                proofs = [self._proof(each, value, path) for each in types]
                return None if None in proofs else f"({' or '.join(map(str, proofs))})"
            case of.DictType():
                return self._of_dict(node, value, path)
            case of.ListType() | of.SetType() | of.FrozenSetType() | of.VarTupleType():
                item = f"item{next(self._numbers)}"
                proof = self._proof(node.item_type, item, f"{path}[...]")
                kind = self._name(_COLLECTIONS[type(node)])
                if isinstance(node, of.ListType) and proof == f"is_plain_json({item})":
                    return f"type({value}) is {kind} and is_plain_json({value})"
                return proof and f"type({value}) is {kind} and all([{proof} for {item} in {value}])"
            case of.TupleType(item_types=types):
                proofs = [self._proof(each, f"{value}[{at}]", f"{path}[{at}]") for at, each in enumerate(types)]
                return _all(f"type({value}) is tuple and len({value}) == {len(types)}", proofs)
            case of.DataclassType() | of.StructType() | of.NamedTupleType() | of.TypedDictType():
                return self._of_record(node, value, path)
            case of.CustomType(cls=cls) if is_model(cls):
                return self._of_model(cls, value, path)
            case of.CustomType(cls=cls) if _is_secret(cls):
                if "Bytes" in cls.__name__:
                    self._read_by_msgspec(path)
                inside = self._name(bytes if "Bytes" in cls.__name__ else str)  # its class accepts any value, as None
                return f"type({value}) is {self._name(cls)} and type({value}.get_secret_value()) is {inside}"
            case of.CustomType(cls=cls) if stands_for_standard(
                cls
            ):  # under freezegun, msgspec does not know the real one
                return None
            case of.MemoryViewType():
                return None
            case _ if self._in_models:
                self._foreign = path
                return None
            case _ if value == "event":
                remedy = "decorate it with @dataclass, or derive it from a pydantic or msgspec model"
                raise _refusal(path, "it has no fields", remedy)
            case _:
                unreadable = name_of(getattr(node, "cls", type(node)))
                raise _refusal(path, f"{unreadable} cannot be read back from JSON", _ELSE)

    def _of_dict(self, node: Any, value: str, path: str) -> str | None:
        keys, key, item = f"{path} (key)", f"item{next(self._numbers)}", f"item{next(self._numbers)}"
        if not isinstance(node.key_type, _KEYS):
            raise _refusal(keys, "JSON has no such keys", "use keys that are text, numbers, UUIDs, dates or enums")
        proofs = [self._proof(node.key_type, key, keys), self._proof(node.value_type, item, f"{path}[...]")]
        if isinstance(node.key_type, (of.EnumType, of.LiteralType)):
            self._read_by_msgspec(keys)
        if isinstance(node.key_type, (of.AnyType, of.StrType)) and proofs[1] == f"is_plain_json({item})":
            return f"type({value}) is dict and is_plain_json({value})"
        is_mixed = isinstance(node.key_type, of.LiteralType) and len({*map(type, node.key_type.values)}) > 1
        is_mixed = is_mixed or isinstance(node.key_type, (of.AnyType, of.UnionType))
        if is_mixed or None in proofs:  # 1 and "1" are one key in JSON
            return None
        return f"type({value}) is dict and all([{' and '.join(map(str, proofs))} for {key}, {item} in {value}.items()])"

    def _of_record(self, node: Any, value: str, path: str) -> str | None:
        cls = node.cls
        if cls in self._within:
            return None
        if problem := undeclared_in(cls):
            raise ConfigurationError(f"{path}: {problem}")
        is_attrs = hasattr(cls, "__attrs_attrs__")
        if is_attrs and (private := [name for name in fields_of(cls) if name.startswith("_")]):
            raise _refusal(f"{path}.{private[0]}", "private attributes of attrs classes are not written", "rename it")
        if is_attrs or isinstance(node, of.StructType):
            self._read_by_msgspec(path)
        self._within.append(cls)
        proofs = [self._proof(field.type, f"{value}.{field.name}", f"{path}.{field.name}") for field in node.fields]
        self._within.pop()
        if isinstance(node, of.TypedDictType) or self._changes(cls):
            return None
        return self._of_fields(cls, [field.name for field in node.fields], value, proofs)

    def _of_model(self, model: Any, value: str, path: str) -> str | None:
        if model in self._within:
            return None
        if not model.__pydantic_complete__:
            with suppress(Exception):
                model.model_rebuild()
            if not model.__pydantic_complete__:
                problem = f"an annotation of {name_of(model)} contains a name that does not exist at run time"
                raise _refusal(path, problem, "define the name, then call model_rebuild() of the class")
        names = names_in_json(model)
        for name, field in model.model_fields.items():
            if field.exclude and field.is_required():
                raise _refusal(f"{path}.{name}", "the field is excluded and has no default", "give it a default")
            if names.get(name) == []:
                raise _refusal(f"{path}.{name}", "its alias is a path", "give it an alias that is a name")
        if (computed := [*model.model_computed_fields]) and model.model_config.get("extra") == "forbid":
            problem = "extra='forbid' refuses a computed field when it is read"
            raise _refusal(f"{path}.{computed[0]}", problem, "make it a property")
        if _serializes_itself(model) or _json_texts(model) or model.model_config.get("extra") == "allow":
            self._foreign = path
        self._within.append(model)
        self._in_models += 1
        proofs = [
            self._of_hint(model.model_fields[name].annotation, f"{value}.{name}", f"{path}.{name}") for name in names
        ]
        self._in_models -= 1
        self._within.pop()
        all_names = [*itertools.chain(*names.values()), *_computed(model)]
        is_clear = len({*all_names}) == len(all_names)
        return self._of_fields(model, [*names], value, proofs) if is_clear and not _model_changes(model) else None

    def _of_hint(self, hint: Any, value: str, path: str) -> str | None:
        """Return the proof of a field of a pydantic model, which may have types that msgspec does not know."""
        try:
            node = of.type_info(hint)
        except Exception:  # noqa: BLE001  # as in `of_event`
            self._foreign = path
            for part in get_args(hint):  # such as the models of a union
                self._of_hint(part, value, path)
            return None
        return self._proof(node, value, path)

    def _of_fields(self, cls: Any, names: Sequence[str], value: str, proofs: Sequence[str | None]) -> str | None:
        if not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
            return None
        return _all(f"type({value}) is {self._name(cls)}", proofs)

    def _changes(self, cls: Any) -> bool:
        """Return whether code of the class may change a value when it is read."""
        return (
            hasattr(cls, "__post_init__")
            or hasattr(cls, "__attrs_post_init__")
            or any(each.validator for each in getattr(cls, "__attrs_attrs__", ()))
            or any(isinstance(inspect.getattr_static(cls, name, None), property) for name in fields_of(cls))
            or (self._in_models > 0 and hasattr(cls, "__pydantic_fields__"))
            or (
                self._in_models > 0
                and dataclasses.is_dataclass(cls)
                and not all(field.init for field in dataclasses.fields(cls))
            )
        )

    def _read_by_msgspec(self, path: str) -> None:
        if self._in_models:
            self._typed = self._typed or path

    def _name(self, thing: Any) -> str:
        name = f"t{id(thing)}"
        self.known[name] = thing
        return name


def _all(condition: str, proofs: Sequence[str | None]) -> str | None:
    return None if None in proofs else " and ".join([condition, *map(str, proofs)])


def _model_changes(model: Any) -> bool:
    """Return whether code or a setting of a pydantic model may change or refuse a value when it is read."""
    decorators, base = model.__pydantic_decorators__, sys.modules["pydantic"].BaseModel
    return (
        any(getattr(decorators, each.name) for each in dataclasses.fields(decorators) if each.name != "computed_fields")
        or any(field.metadata or "Annotated[" in repr(field.annotation) for field in model.model_fields.values())
        or any(getattr(model, name) is not getattr(base, name) for name in ("__init__", "model_post_init"))
        or not _HARMLESS.issuperset(model.model_config)
        or model.model_config.get("extra") == "allow"
    )


_ELSE = "docs/payloads.md lists the types that can be, and what to use instead of others"


def _refusal(path: str, problem: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot travel: {problem}; {remedy}")


def _explained(hint: Any, path: str, error: Exception) -> ConfigurationError:
    """Return the refusal of the innermost field that msgspec cannot read."""
    seen: set[int] = set()
    while (found := next(_broken_fields(hint, path, seen), None)) is not None:
        hint, path, error = found
    if isinstance(error, NameError):
        return ConfigurationError(f"{path} cannot travel: {unresolved(error, hint)}")
    if isinstance(error, RecursionError) or "ForwardRef(" in str(error):
        return _refusal(path, "its type contains itself", "use a class where the type refers to itself, or Any")
    remedy = "use one type, a tagged union of msgspec Structs, or a pydantic event with a discriminated union"
    is_union = str(error).startswith("Type unions")
    return _refusal(path, f"it cannot be read back from JSON: {str(error).rstrip('.')}", remedy if is_union else _ELSE)


def _broken_fields(hint: Any, path: str, seen: set[int]) -> Iterator[tuple[Any, str, Exception]]:
    """Yield the fields of the classes in *hint* that msgspec cannot read: what is wrong, its path, the error."""
    for cls in [hint, *get_args(hint)]:
        if id(cls) in seen:
            continue
        seen.add(id(cls))
        if not fields_of(cls):
            if cls is not hint:
                yield from _broken_fields(cls, path, seen)
            continue
        try:
            hints = get_type_hints(cls, include_extras=True)
        except Exception as error:  # noqa: BLE001  # an annotation may raise anything
            own = {name: each for base in cls.__mro__ for name, each in inspect.get_annotations(base).items()}
            name = next((name for name, each in own.items() if str(getattr(error, "name", "")) in str(each)), "")
            yield cls, f"{path}.{name}".rstrip("."), error
            continue
        for name in fields_of(cls):
            try:
                of.type_info(hints[name])
            except Exception as error:  # noqa: BLE001
                yield hints[name], f"{path}.{name}", error


# -- comparing ---------------------------------------------------------------------------------------------------------


def difference(sent: Any, read: Any, path: str) -> tuple[str, str] | None:
    """Return where and how a value that was read differs from the one that was sent; None if it does not."""
    kind: Any = type(read)
    if fields := wire_names(kind):
        if type(sent) is not kind:
            return path, _how_different(sent, read)
        parts = [(f".{name}", getattr(sent, name), getattr(read, name)) for name in fields]
        sent_extra, read_extra = (getattr(each, "__pydantic_extra__", None) for each in (sent, read))
        if sent_extra or read_extra:
            parts.append(("", sent_extra, read_extra))
    elif isinstance(read, dict) and isinstance(sent, Mapping) and sent.keys() == read.keys():
        parts = [("[...]", sent[key], value) for key, value in read.items()]  # a key is content
    elif isinstance(read, (list, tuple)) and isinstance(sent, kind) and len(sent) == len(read):
        parts = [(f"[{at}]", *pair) for at, pair in enumerate(zip(sent, read, strict=True))]
    else:
        return None if _same(sent, read) else (path, _how_different(sent, read))
    return next((found for step, *pair in parts if (found := difference(pair[0], pair[1], path + step))), None)


def _same(sent: Any, read: Any) -> bool:
    if isinstance(read, (dt.datetime, dt.time)):
        same_offset = isinstance(sent, type(read)) and sent.utcoffset() == read.utcoffset()
        return same_offset and sent.replace(tzinfo=None) == read.replace(tzinfo=None)
    if isinstance(read, Decimal):
        return isinstance(sent, Decimal) and str(sent) == str(read)
    is_kind = isinstance(sent, type(read)) or (isinstance(read, float) and isinstance(sent, int))
    return is_kind and isinstance(sent, bool) is isinstance(read, bool) and bool(sent == read)


def _how_different(sent: Any, read: Any) -> str:
    if isinstance(sent, float) and sent * 0.0 != 0.0:
        return "JSON cannot represent NaN or infinity"
    if isinstance(read, dict) and isinstance(sent, Mapping):
        return "its keys would be read as other keys"
    if isinstance(sent, type(read)):
        if isinstance(sent, (dt.datetime, dt.time)):
            return "an offset with seconds cannot be written; convert the time to UTC"
        if type(sent) is type(read):
            return f"the {name_of(type(sent))} would be read as another value"
    sent_type, read_type = name_of(type(sent)), name_of(type(read))
    return (
        f"a value of type {sent_type} would be read as {read_type}; annotate the field with {sent_type}, or send "
        f"{read_type}"
    )
