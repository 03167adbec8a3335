"""Inspect callables and classes: their names, parameters and fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


class UnresolvedName(TypeError):
    """An annotation contains a name that does not exist at run time."""


@dataclass(frozen=True)
class Parameter:
    """
    One parameter of a callable.

    Attributes:
        name: Its name.
        hint: Its annotation, without `Annotated` and `| None`; None if it has none.
        has_default: Whether it has a default.
        kind: Its kind, as in `inspect.Parameter`.
        may_be_none: Whether its annotation has `| None`, or it has a default.
    """

    name: str
    hint: Any
    has_default: bool
    kind: inspect._ParameterKind
    may_be_none: bool

    @property
    def by_position(self) -> bool:
        """Whether a call can pass it by position."""
        return self.kind is not inspect.Parameter.KEYWORD_ONLY


def name_of(thing: Any) -> str:
    """Return the name of a type, a callable or an annotation, for a text. It contains no argument of a partial."""
    if isinstance(thing, functools.partial):
        return name_of(thing.func)
    if name := getattr(thing, "__qualname__", None):
        return str(name)
    is_object = callable(thing) and get_origin(thing) is None and type(thing).__module__ != "typing"
    return name_of(type(thing)) if is_object else str(thing)


def described(part: object) -> str:
    """Return what *part* is, for the text of an error. It contains nothing of its content."""
    if part is None:
        return "None"
    return f"the class {name_of(part)}" if isinstance(part, type) else f"an object of {name_of(type(part))}"


def parameters_of(call: Callable[..., Any]) -> list[Parameter]:
    """
    Return the parameters of *call*, without `self`, `*args` and `**kwargs`.

    Raises:
        TypeError: *call* cannot be inspected, or an annotation contains a name that does not exist.
    """
    try:
        signature = inspect.signature(call)
    except ValueError as error:
        raise TypeError(f"the parameters of {name_of(call)} cannot be inspected; wrap it in a function") from error
    hints = hints_of(call)
    bound = _bound(call)
    return [
        Parameter(
            name=parameter.name,
            hint=_plain(hints.get(parameter.name)),
            has_default=parameter.default is not inspect.Parameter.empty,
            kind=parameter.kind,
            may_be_none=_allows_none(hints.get(parameter.name)) or parameter.default is not inspect.Parameter.empty,
        )
        for parameter in signature.parameters.values()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and parameter.name not in bound
    ]


def hints_of(call: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of *call*, or of the constructor of a class. TypeError if one contains an unknown name."""
    annotated: Any = function_of(call)
    if isinstance(annotated, type):
        annotated = annotated.__init__  # type: ignore[misc]  # a subclass may have another one
    try:
        return get_type_hints(annotated)
    except NameError as error:
        raise UnresolvedName(unresolved(error, call)) from error


def unresolved(error: NameError, annotated: Any) -> str:
    """Return what is wrong with an annotation that contains an unknown name, and the remedy."""
    problem = f"an annotation of {name_of(annotated)} contains the name {error.name!r}"
    bases: Sequence[Any] = getattr(annotated, "__mro__", ())
    if any(str(each) == error.name for base in bases for each in getattr(base, "__type_params__", ())):
        return f"{problem}, a type parameter; annotate it with the type itself, in an __init__ of {name_of(annotated)}"
    return (
        f"{problem}, which its module does not define at run time; import or define the name at the top of the module, "
        "outside of `if TYPE_CHECKING`"
    )


def function_of(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, method or class that runs when *call* is called: also of a partial, or of an object."""
    while isinstance(call, functools.partial):
        call = call.func
    return call if isinstance(call, type) or inspect.isroutine(call) else type(call).__call__


def _bound(call: Callable[..., Any]) -> Collection[str]:
    """Return the arguments that a partial already has. To inspect, they look like defaults."""
    return call.keywords if isinstance(call, functools.partial) else ()


def fits(given: type, wanted: Any) -> bool:
    """
    Return whether a value of type *given* is valid for the annotation *wanted*.

    False only where that is certain: protocols, typed dictionaries and unions are left to the type checker.
    """
    if not isinstance(wanted, type) or Any in (given, wanted):
        return True
    try:
        # int for float, and both for complex: https://typing.python.org/en/latest/spec/special-types.html
        return issubclass(given, (wanted, *_PROMOTED.get(wanted, ())))
    except TypeError:
        return True


_PROMOTED: dict[Any, tuple[type, ...]] = {float: (int,), complex: (int, float)}


def fields_of(type_: Any) -> Sequence[str]:
    """Return the field names of a dataclass, an attrs class, or a pydantic or msgspec model; else an empty list."""
    if dataclasses.is_dataclass(type_):
        return [field.name for field in dataclasses.fields(type_)]
    if attributes := getattr(type_, "__attrs_attrs__", None):
        return [attribute.name for attribute in attributes]
    fields: Any = getattr(type_, "model_fields", None) or getattr(type_, "__struct_fields__", ())
    return list(fields)


def undeclared_in(type_: type) -> str:
    """
    Return what objects of a class have beyond its fields, as a sentence with the remedy; empty if nothing is known.

    The decorator of a dataclass or an attrs class finds the fields. A subclass needs a decorator of its own.
    """
    if dataclasses.is_dataclass(type_) and "__attrs_attrs__" in type_.__dict__:
        return (
            f"{name_of(type_)} is an attrs class that derives from a dataclass, so its message would lose fields; "
            "derive it from Event and declare message_type, event_id and event_timestamp"
        )
    fields = fields_of(type_)
    if not dataclasses.is_dataclass(type_) and not hasattr(type_, "__attrs_attrs__"):
        return ""
    for base in type_.__mro__:
        if "__dataclass_fields__" in base.__dict__ or "__attrs_attrs__" in base.__dict__:
            break
        hints = inspect.get_annotations(base).items()
        own = [name for name, hint in hints if name not in fields and "ClassVar" not in str(hint)]
        if own or "__init__" in base.__dict__:
            declares = f"declares {', '.join(own)}" if own else "has an __init__ of its own"
            return f"{name_of(base)} {declares} but is not a dataclass; decorate it with @dataclass"
    return ""


def _allows_none(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _allows_none(get_args(hint)[0])
    return get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)


def _plain(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        others = [part for part in get_args(hint) if part is not types.NoneType]
        if len(others) == 1:
            return _plain(others[0])
    return hint
