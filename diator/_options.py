"""Checks of the arguments that a program wires its objects with: a wrong one is named at once, before anything runs."""

from __future__ import annotations

import inspect
from typing import TypeGuard

from diator._hints import described
from diator.exceptions import ConfigurationError


def check_counts(least: int, **counts: object) -> None:
    """Check that each of *counts* is a whole number, and at least *least*."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise _wrong(name, f"a whole number of at least {least:,}", count)


def check_numbers(least: float, **numbers: object) -> None:
    """Check that each of *numbers*, such as a time in seconds, is at least *least*. NaN is not."""
    for name, number in numbers.items():
        if not _is_number(number) or not number >= least:
            raise _wrong(name, f"a number of at least {least:g}", number)


def check_times(**times: object) -> None:
    """Check that each of *times*, in seconds, is above 0. NaN is not."""
    for name, time in times.items():
        if not _is_number(time) or not time > 0:
            raise _wrong(name, "a number above 0", time)


def check_texts(**texts: object) -> None:
    """Check that each of *texts* is a string."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise _wrong(name, "text", text)


def check_functions(**functions: object) -> None:
    """Check that each of *functions* is None, or can be called and is not asynchronous."""
    for name, function in functions.items():
        if function is not None and (
            isinstance(function, type) or not callable(function) or inspect.iscoroutinefunction(function)
        ):
            raise _wrong(name, "a function that is not asynchronous", function)


def check_type(name: str, part: object, wanted: type, *, is_needed: bool = False) -> None:
    """Check the type of the argument *name*. None, unless *is_needed*: not passed."""
    if not isinstance(part, wanted) and (is_needed or part is not None):
        raise _wrong(name, f"of the type {wanted.__name__}", part)


def word(value: object) -> str:
    """Return what was passed instead of one of a few words, for the text of an error."""
    return f"{value!r:.80}" if isinstance(value, str) else described(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(name: str, wanted: str, value: object) -> ConfigurationError:
    """Return the error, which shows a number, and of everything else, such as a URL with a password, only the type."""
    shown = repr(value) if _is_number(value) else described(value)
    return ConfigurationError(f"{name} must be {wanted}, and it is {shown}")
