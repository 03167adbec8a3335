"""Another clock for one store, as a process on another machine has one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from typing import Any, Self


@contextmanager
def shifted(store: object, by: timedelta) -> Generator[None, None, None]:
    """
    Inside the block, the code of *store* reads a clock that is off *by* so much.

    Its code is the modules of the package in which its class, and the classes that it is derived from, are defined.
    """

    class AsDatetime(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, datetime)

    class Shifted(datetime, metaclass=AsDatetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + by

        @classmethod
        def utcnow(cls) -> Self:
            return cls.now()

    seconds = by.total_seconds()
    clocks: dict[Any, Any] = {datetime: Shifted}
    for clock in (time.time, time.monotonic):
        clocks[clock] = _later(clock, seconds)
    changed: list[tuple[Any, str, object]] = [(time, "time", time.time)]
    packages = tuple({kind.__module__.rpartition(".")[0] or kind.__module__ for kind in type(store).__mro__[:-1]})
    for name, module in [*sys.modules.items()]:
        if name != __name__ and (name in packages or name.startswith(tuple(f"{each}." for each in packages))):
            changed += [(module, each, value) for each, value in vars(module).items() if _is_clock(value, clocks)]
    for owner, name, value in changed:
        setattr(owner, name, clocks[value])
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _is_clock(value: object, clocks: dict[Any, Any]) -> bool:
    return any(value is clock for clock in clocks)


def _later(clock: Callable[[], float], seconds: float) -> Callable[[], float]:
    return lambda: clock() + seconds
