"""Log lines of which one sender can cause thousands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextvars import Context

#: How many lines of one kind are logged in each period, and how long a period is, in seconds.
MAX_LINES = 5
PERIOD = 60.0


class RepeatedLines:
    """
    Logs the first lines of each kind at once, and at the end of the period how many more there were.

    A period begins with the first line after the last one. Only the number of further lines is kept, never their text.
    What is logged at the end of a period belongs to no message. It is used in a running event loop.

    Args:
        logger: Where it logs.
        fields: The attributes that each record has.
    """

    def __init__(self, logger: logging.Logger, fields: Mapping[str, object]) -> None:
        self._logger = logger
        self._fields = fields
        self._counts: dict[tuple[int, str], int] = {}
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def log(
        self,
        level: int,
        kind: str,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        fields: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """
        Log *text* with *args*, unless there were enough lines of this *kind*, which names them in their summary.

        *fields* returns further attributes of the record. It is called only if there is one.
        """
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            self._timer = loop.call_later(PERIOD, self.flush, context=Context())
        count = self._counts[level, kind] = self._counts.get((level, kind), 0) + 1
        if count <= MAX_LINES:
            extra = {**fields(), **self._fields}
            self._logger.log(level, text, *args, exc_info=exc_info, stacklevel=2, extra=extra)

    def flush(self) -> None:
        """End the period, and log how many lines were left out in it."""
        if self._timer is None:
            return
        seconds = asyncio.get_running_loop().time() - self._began
        self._timer.cancel()
        self._timer = None
        counts, self._counts = self._counts, {}
        for (level, kind), count in counts.items():
            if count > MAX_LINES:
                more = count - MAX_LINES
                line = "%s: and %s more in %.0f s"
                extra = {**self._fields, "more": more, "seconds": seconds}
                self._logger.log(level, line, kind, f"{more:,}", seconds, extra=extra)
