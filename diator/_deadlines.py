"""Deadlines for many tasks, with one timer for all."""

from __future__ import annotations

import asyncio
from time import monotonic
from types import TracebackType
from typing import Any


class Deadlines:
    """
    Cancels every block of code that takes longer than *seconds*.

    All blocks have the same limit, so they expire in the order in which they began, and one timer for the oldest is
    enough. `asyncio.timeout` would set and cancel a timer for each block, which is a tenth of a consumer's time.

    Attributes:
        running: The deadlines that have begun and not ended, in the order in which they began.
        timer: Checks the oldest of them.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running: dict[Deadline, None] = {}
        self.timer: asyncio.TimerHandle | None = None

    def limit(self, task: asyncio.Task[Any]) -> Deadline:
        """Return a context for code of *task*. Code in it that takes too long ends with `TimeoutError`."""
        return Deadline(self, task)

    def close(self) -> None:
        """Stop the timer. Nothing is cancelled any more."""
        if self.timer is not None:
            self.timer.cancel()

    def start_timer(self, seconds: float) -> None:
        """Check the deadlines after so many seconds."""
        self.timer = asyncio.get_running_loop().call_later(seconds, self._check)

    def _check(self) -> None:
        self.timer = None
        now = monotonic()
        for deadline in self.running:
            if deadline.is_over:
                continue  # cancelled before, and still running
            if (left := deadline.began + self.seconds - now) > 0:
                self.start_timer(left)
                return
            deadline.is_over = True
            deadline.task.cancel()


class Deadline:
    """The deadline of a block of code of *task*, as a context manager. It can be entered again when it was left."""

    __slots__ = ("_cancellations", "_deadlines", "began", "is_over", "task")

    def __init__(self, deadlines: Deadlines, task: asyncio.Task[Any]) -> None:
        self._deadlines = deadlines
        self._cancellations = 0
        self.task = task
        self.began = 0.0
        self.is_over = False

    def __enter__(self) -> None:
        deadlines = self._deadlines
        self._cancellations = self.task.cancelling()
        self.began = monotonic()
        self.is_over = False
        deadlines.running[self] = None
        if deadlines.timer is None:
            deadlines.start_timer(deadlines.seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._deadlines.running[self]
        # If other code cancelled the task as well, the task stays cancelled.
        if self.is_over and self.task.uncancel() <= self._cancellations and kind is asyncio.CancelledError:
            raise TimeoutError from error
