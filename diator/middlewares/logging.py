"""A middleware that logs each message with its outcome and duration."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from diator.middlewares.base import Handle


class LoggingMiddleware:
    """
    Logs the type of each message, the outcome and the duration: at DEBUG after success, at WARNING after an error.

    It never logs the content of the message, the response or the error, which may be confidential.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger(__name__)

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Handle *message* and log the outcome. The caller receives errors unchanged."""
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
