"""A deadline for each of many things, with one timer for all of them."""

from __future__ import annotations

import asyncio
from time import monotonic
from types import TracebackType
from typing import Any


class Deadlines:
    """
    Gives everything the same number of *seconds*, and cancels what takes longer.

    Since all have the same time, they are due in the order in which they began, and one timer looks at the oldest.
    `asyncio.timeout` sets and cancels a timer for each, which is a tenth of a consumer's time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def of(self, task: asyncio.Task[Any]) -> Deadline:
        """Give the deadline of what *task*, which runs now, does in the context. It ends there with `TimeoutError`."""
        return Deadline(self, task)

    def close(self) -> None:
        """Cancel nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, deadline: Deadline) -> None:
        self._running[deadline] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._look)

    def _end(self, deadline: Deadline) -> None:
        del self._running[deadline]

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        for deadline in self._running:
            if deadline.is_over:
                continue  # it was cancelled before, and still runs
            if (left := deadline.began + self.seconds - now) > 0:
                self._timer = asyncio.get_running_loop().call_later(left, self._look)
                return
            deadline.is_over = True
            deadline.task.cancel()


class Deadline:
    """That of one thing, which is done in its context."""

    __slots__ = ("_all", "_cancellations", "began", "is_over", "task")

    def __init__(self, all_of_them: Deadlines, task: asyncio.Task[Any]) -> None:
        self._all = all_of_them
        self._cancellations = task.cancelling()
        self.task = task
        self.began = monotonic()
        self.is_over = False

    def __enter__(self) -> None:
        self._all._begin(self)  # noqa: SLF001  # the other half of it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all._end(self)  # noqa: SLF001  # as above
        # Cancelled by someone else as well, it stays cancelled.
        if self.is_over and self.task.uncancel() <= self._cancellations and kind is asyncio.CancelledError:
            raise TimeoutError from error
