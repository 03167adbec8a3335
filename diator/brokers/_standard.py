"""
Subclasses of the standard types. Their values are written as values of the standard type.

Many libraries have such classes: SQLAlchemy returns UUIDs of asyncpg, pendulum has datetimes of its own, and freezegun
replaces `datetime` itself, in every module. So this module finds the standard types by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from diator._hints import name_of

#: How to make a value of a standard type of a value of its subclass, whose methods may be other ones.
_MAKE: dict[str, Callable[[Any, Any], Any]] = {
    "builtins.str": lambda standard, value: standard.__str__(value),
    "builtins.int": lambda standard, value: standard.__int__(value),
    "builtins.float": lambda standard, value: standard.__float__(value),
    "builtins.bytes": lambda _, value: memoryview(value),
    "builtins.bytearray": lambda _, value: memoryview(value),
    "datetime.datetime": lambda standard, value: standard(
        *(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, value.tzinfo),
        fold=value.fold,
    ),
    "datetime.date": lambda standard, value: standard(value.year, value.month, value.day),
    "datetime.time": lambda standard, value: standard(
        *(value.hour, value.minute, value.second, value.microsecond, value.tzinfo), fold=value.fold
    ),
    "datetime.timedelta": lambda standard, value: standard.__add__(standard(), value),
    "decimal.Decimal": lambda standard, value: standard(value),
    "uuid.UUID": lambda standard, value: standard(int=value.int),
}


def _standard_of(types: Iterable[type]) -> Any:
    return next((each for each in types if f"{each.__module__}.{each.__qualname__}" in _MAKE), None)


def standard_type(type_: type) -> Any:
    """Return the standard type that a class derives from; None if there is none."""
    return _standard_of(type_.__mro__[1:]) if type_ is not bool else None


def as_standard(value: Any) -> Any:
    """
    Return *value* as a value of the standard type that its class derives from.

    Raises:
        TypeError: Its class derives from none.
    """
    standard = standard_type(type(value))
    if standard is None:
        raise TypeError(f"values of {name_of(type(value))} cannot be written as JSON")
    return _MAKE[f"{standard.__module__}.{standard.__qualname__}"](standard, value)


def stands_for_standard(type_: Any) -> bool:
    """Return whether a class is a standard type, or stands for one, as the classes of freezegun do."""
    standard = _standard_of(type_.__mro__) if isinstance(type_, type) else None
    return standard is not None and issubclass(standard, type_)
