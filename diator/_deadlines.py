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
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def limit(self, task: asyncio.Task[Any]) -> Deadline:
        """Return a context for code of *task*. Code in it that takes too long ends with `TimeoutError`."""
        return Deadline(self, task)

    def close(self) -> None:
        """Stop the timer. Nothing is cancelled any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, deadline: Deadline) -> None:
        self._running[deadline] = None
        if self._timer is None:
            self._check_after(self.seconds)

    def _end(self, deadline: Deadline) -> None:
        del self._running[deadline]

    def _check_after(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check)

    def _check(self) -> None:
        self._timer = None
        now = monotonic()
        for deadline in self._running:
            if deadline.is_over:
                continue  # cancelled before, and still running
            if (left := deadline.began + self.seconds - now) > 0:
                self._check_after(left)
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
        self._cancellations = self.task.cancelling()
        self.began = monotonic()
        self.is_over = False
        self._deadlines._begin(self)  # noqa: SLF001  # the other half of this class

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines._end(self)  # noqa: SLF001  # as above
        # If other code cancelled the task as well, the task stays cancelled.
        if self.is_over and self.task.uncancel() <= self._cancellations and kind is asyncio.CancelledError:
            raise TimeoutError from error
