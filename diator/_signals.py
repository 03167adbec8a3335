"""Stop consumers on SIGTERM and SIGINT, beside whatever else handles these signals."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Generator[None, None, None]:
    """
    Call *stop* on SIGTERM and SIGINT, and then the handler that was there before.

    The default action of a signal is replaced: *stop* is graceful, and to end the process is not. Only the main thread
    can handle signals; in another one, nothing is done.
    """
    joined: list[_Handler] = []
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            with suppress(ValueError):  # such as in a subinterpreter
                joined += _joined(number)
    entry = (asyncio.get_running_loop(), stop)
    for handler in joined:
        handler.stops.append(entry)
    try:
        yield
    finally:
        for handler in joined:
            handler.stops.remove(entry)
            with suppress(ValueError):
                handler.leave()


class _Handler:
    """
    Stops consumers at a signal, and calls the handler that was there *before*.

    It is a handler of `signal.signal`: an event loop has one handler for each signal, and does not say which. The
    handlers of a loop are called all the same, because a loop reads the numbers of the signals from its wakeup file.

    A program that installed its handler after this one may restore this one at any time. So without consumers, it does
    what the signal would do without it.
    """

    def __init__(self, number: signal.Signals, before: Any) -> None:
        self._number = number
        self._before = before
        self.stops: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before = self._before
        for loop, stop in self.stops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(stop)
        if not self.stops and before is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif callable(before) and not (self.stops and _is_default(before)):
            before(number, frame)

    def leave(self) -> None:
        """Restore the handler from before, unless consumers are left or another handler took the place of this one."""
        current: object = signal.getsignal(self._number)
        if not self.stops and current is self:
            signal.signal(self._number, self._before)


def _joined(number: signal.Signals) -> list[_Handler]:
    """Return the handler to add a consumer to. None where the program is embedded, and its host handles the signal."""
    current = signal.getsignal(number)
    if current is None:
        return []
    if isinstance(current, _Handler):
        return [current]
    handler = _Handler(number, current)
    signal.signal(number, handler)
    return [handler]


def _is_default(handler: object) -> bool:
    """Return whether *handler* is the one of Python for SIGINT, or that of `asyncio.run`."""
    owner = getattr(getattr(handler, "func", handler), "__self__", None)
    return handler is signal.default_int_handler or isinstance(owner, asyncio.Runner)
