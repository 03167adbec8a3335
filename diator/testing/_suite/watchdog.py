"""Notice that what is tested blocks the event loop, so that the suite fails instead of hanging."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic

from diator.testing._suite.errors import Nonconformance
from diator.testing._suite.places import in_tested

_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR2", None)  # Windows has no signal that interrupts a call


class Watchdog:
    """
    A thread that notices when the event loop of a scenario stands still for *seconds*.

    It interrupts the call that blocks the loop, which then raises `Nonconformance`. That works in the main thread, for
    Python code and for most calls of the standard library. If the loop stands still even so, only the end of the
    process ends the run: the watchdog writes the error to standard error, inside *uncaptured*, and exits with 1.
    *rule* is the rule that is broken.

    Attributes:
        error: What it has noticed; None if nothing.
    """

    def __init__(self, scenario: str, seconds: float, uncaptured: AbstractContextManager[object], *, rule: str) -> None:
        self.error: Nonconformance | None = None
        self._scenario = scenario
        self._seconds = seconds
        self._rule = rule
        self._uncaptured = uncaptured
        self._watched = threading.get_ident()
        self._ran = monotonic()
        self._interrupted = False
        self._ended = threading.Event()
        self._number = _SIGNAL if threading.current_thread() is threading.main_thread() else None

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that *loop* is running, now and from time to time."""
        self._ran, self._interrupted = monotonic(), False
        loop.call_later(self._seconds / 10, self.listen, loop)

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Watch the event loop that this thread runs inside the block."""
        watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        before = self._number and signal.signal(self._number, self._raise)
        watching.start()
        try:
            yield
        finally:
            self._ended.set()
            watching.join()
            if self._number:
                signal.signal(self._number, before)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / 10):
            if monotonic() - self._ran < self._seconds * (1 + self._interrupted):
                continue
            stack = traceback.extract_stack(sys._current_frames()[self._watched])  # noqa: SLF001  # public, in spite of its name
            if any(Path(frame.filename).name == "bdb.py" for frame in stack):
                continue  # somebody debugs it
            if self._interrupted:
                self._exit()
            self._interrupted = True
            below = [place for place, frame in enumerate(stack) if frame.name == "_run_once"]  # of the event loop
            stack = traceback.StackSummary.from_list(stack[below[-1] + 1 :] if below else stack)
            where = in_tested(stack) or "an unknown place"
            self.error = Nonconformance(
                f"the event loop stood still for {self._seconds:g} s, in {where}", rule=self._rule
            )
            self.error.add_note("the stack:\n" + "".join(traceback.format_list(stack)).rstrip())
            if self._number:
                signal.pthread_kill(self._watched, self._number)

    def _raise(self, *_: object) -> None:
        if self.error is not None:
            raise self.error

    def _exit(self) -> None:
        text = "\n".join([f"FAIL {self._scenario}: {self.error}", *getattr(self.error, "__notes__", ())])
        with self._uncaptured:
            sys.stderr.write(f"{text}\nthe call cannot be interrupted, so the run ends here\n")
            sys.stderr.flush()
            os._exit(1)
