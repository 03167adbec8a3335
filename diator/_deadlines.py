"""Deadlines for many tasks, with one timer for all."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from time import monotonic
from types import TracebackType
from typing import Any


class Deadlines:
    """
    Cancels every block of code that takes longer than *seconds*.

    One timer checks all of them. `asyncio.timeout` would set and cancel a timer for each block, which is a tenth of a
    consumer's time.

    Attributes:
        seconds: The time limit.
        timer: Checks the deadlines, next when the oldest block would be over; None if no block began since.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timer: asyncio.TimerHandle | None = None
        self._deadlines: list[Deadline] = []
        self._context = copy_context()  # that of a task would keep the delivery alive which it handles

    def limit(self, task: asyncio.Task[Any]) -> Deadline:
        """
        Return a context for blocks of *task*. A block in it that takes too long ends with `TimeoutError`.

        A task needs only one, which it can enter again and again.
        """
        deadline = Deadline(self, task)
        self._deadlines.append(deadline)
        return deadline

    def forget(self, deadline: Deadline) -> None:
        """Drop *deadline*, whose task ends."""
        self._deadlines.remove(deadline)

    def close(self) -> None:
        """Stop the timer. Nothing is cancelled any more."""
        if self.timer is not None:
            self.timer.cancel()

    def start_timer(self, seconds: float) -> None:
        """Check the deadlines after so many seconds."""
        self.timer = asyncio.get_running_loop().call_later(seconds, self._check, context=self._context)

    def _check(self) -> None:
        self.timer = None
        now = monotonic()
        oldest = None
        for deadline in self._deadlines:
            if deadline.began is None:
                continue  # no block is running, or it was cancelled before
            if deadline.began + self.seconds <= now:
                deadline.began = None
                deadline.is_over = True
                deadline.task.cancel()
            elif oldest is None or deadline.began < oldest:
                oldest = deadline.began
        if oldest is not None:
            self.start_timer(oldest + self.seconds - now)


class Deadline:
    """
    The deadline of one block at a time of *task*, as a context manager.

    Attributes:
        task: The task that it cancels.
        began: When the running block began, by `time.monotonic`; None if none is running within its time.
        is_over: Whether the running block, or the last one, was cancelled.
    """

    __slots__ = ("_cancellations", "_deadlines", "began", "is_over", "task")

    def __init__(self, deadlines: Deadlines, task: asyncio.Task[Any]) -> None:
        self._deadlines = deadlines
        self._cancellations = 0
        self.task = task
        self.began: float | None = None
        self.is_over = False

    def begin(self, now: float) -> None:
        """Begin a block *now*, by `time.monotonic`. It ends with `end`, or the next one begins."""
        self._cancellations = self.task.cancelling()
        self.began = now
        self.is_over = False
        if self._deadlines.timer is None:
            self._deadlines.start_timer(self._deadlines.seconds)

    def end(self, error: BaseException | None) -> BaseException | None:
        """Return what the block that ended with *error* came to: `TimeoutError` if it was cancelled here."""
        self.began = None
        # If other code cancelled the task as well, the task stays cancelled. Code that swallows its cancellation has
        # probably not finished its work.
        is_timeout = self.is_over and self.task.uncancel() <= self._cancellations
        if is_timeout and (error is None or type(error) is asyncio.CancelledError):
            timeout = TimeoutError()
            timeout.__cause__ = error
            return timeout
        return error

    def __enter__(self) -> None:
        self.begin(monotonic())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (ended := self.end(error)) is not None and ended is not error:
            raise ended
