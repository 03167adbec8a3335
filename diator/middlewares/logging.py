"""Logs each message with its outcome and duration."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from diator.middlewares.base import Handle


class LoggingMiddleware:
    """
    Logs the type of each message, the outcome, and the time it took: debug if handled, warning if it failed.

    Never the content, of the message, the answer or the error: logs are no place for it.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger(__name__)

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Handle *message* and log how that went. Errors go on as they are."""
        name, start = type(message).__qualname__, perf_counter()
        try:
            response = await handle(message)
        except BaseException as error:
            self._logger.warning(
                "%s failed with %s after %.1f ms", name, type(error).__qualname__, (perf_counter() - start) * 1000
            )
            raise
        self._logger.debug("%s handled in %.1f ms", name, (perf_counter() - start) * 1000)
        return response
