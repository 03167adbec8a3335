"""What callables and classes say about themselves: names, parameters, fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


class UnresolvedName(TypeError):
    """An annotation names something that cannot be found at run time."""


@dataclass(frozen=True)
class Parameter:
    """One parameter that can be given by name or position."""

    name: str
    hint: Any
    """The annotation, without `Annotated` and without `| None`; None if there is none."""
    has_default: bool
    kind: inspect._ParameterKind

    @property
    def by_position(self) -> bool:
        """Whether it can be given by position."""
        return self.kind is not inspect.Parameter.KEYWORD_ONLY


def name_of(thing: Any) -> str:
    """Name a type, a function or an annotation as a person would."""
    return getattr(thing, "__qualname__", None) or str(thing)


def parameters_of(call: Callable[..., Any]) -> list[Parameter]:
    """
    List what *call* takes, without `self`, `*args` and `**kwargs`.

    Raises:
        TypeError: It cannot be inspected, or an annotation names something that cannot be found.
    """
    try:
        signature = inspect.signature(call)
    except ValueError as error:
        raise TypeError(f"the parameters of {name_of(call)} cannot be inspected") from error
    hints = hints_of(call)
    return [
        Parameter(
            name=parameter.name,
            hint=_plain(hints.get(parameter.name)),
            has_default=parameter.default is not inspect.Parameter.empty,
            kind=parameter.kind,
        )
        for parameter in signature.parameters.values()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def hints_of(call: Callable[..., Any]) -> dict[str, Any]:
    """Read the annotations of *call*, or of a class's constructor. TypeError if a name in them cannot be found."""
    annotated: Any = call
    if isinstance(call, type):
        annotated = call.__init__  # type: ignore[misc]  # of this very class, whatever a subclass has
    elif not inspect.isroutine(call) and not isinstance(call, functools.partial):
        annotated = type(call).__call__
    try:
        return get_type_hints(annotated.func if isinstance(annotated, functools.partial) else annotated)
    except NameError as error:
        raise UnresolvedName(
            f"the annotations of {name_of(call)} name {error.name!r}, which its module does not define at run time; "
            "import or define it at the top of the module, outside of `if TYPE_CHECKING`"
        ) from error


def fits(given: type, wanted: Any) -> bool:
    """
    Tell whether what is annotated as *given* may stand where *wanted* is annotated.

    Only what is certain is refused: a protocol, a typed dictionary or a union is a type checker's business.
    """
    if not isinstance(wanted, type) or Any in (given, wanted):
        return True
    try:
        # int for float, and both for complex, as https://typing.python.org/en/latest/spec/special-types.html has it.
        return issubclass(given, (wanted, *_PROMOTED.get(wanted, ())))
    except TypeError:
        return True


_PROMOTED: dict[Any, tuple[type, ...]] = {float: (int,), complex: (int, float)}


def fields_of(type_: Any) -> Sequence[str]:
    """Name the fields of a dataclass, an attrs class, or a model of pydantic or msgspec; nothing of other classes."""
    if dataclasses.is_dataclass(type_):
        return [field.name for field in dataclasses.fields(type_)]
    if attributes := getattr(type_, "__attrs_attrs__", None):
        return [attribute.name for attribute in attributes]
    fields: Any = getattr(type_, "model_fields", None) or getattr(type_, "__struct_fields__", ())
    return list(fields)


def _plain(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        others = [part for part in get_args(hint) if part is not types.NoneType]
        if len(others) == 1:
            return _plain(others[0])
    return hint
