"""A middleware that logs each message with its outcome and duration."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from diator._hints import described
from diator.context import log_fields
from diator.exceptions import ConfigurationError
from diator.middlewares.base import Handle


class LoggingMiddleware:
    """
    Logs the type of each message, the outcome and the duration: at DEBUG after success, at WARNING after an error.

    The record has the attributes `type_name`, `error_type` (None after success) and `seconds`, and those of
    `diator.context.ContextFilter`: a handler of a consumer has the `message_id`, `correlation_id` and so on.

    It never logs the content of the message, the response or the error, which may be confidential.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        if logger is not None and not callable(getattr(logger, "warning", None)):
            raise ConfigurationError(f"logger must be a logger, and it is {described(logger)}")
        self._logger = logger or logging.getLogger(__name__)

    async def __call__(self, message: Any, handle: Handle, /) -> Any:
        """Handle *message* and log the outcome. The caller receives errors unchanged."""
        name, start = type(message).__qualname__, perf_counter()
        try:
            response = await handle(message)
        except BaseException as error:
            seconds, kind = perf_counter() - start, type(error).__qualname__
            line = "%s failed with %s after %.1f ms"
            self._logger.warning(line, name, kind, seconds * 1000, extra=_fields(name, kind, seconds))
            raise
        if self._logger.isEnabledFor(logging.DEBUG):
            seconds = perf_counter() - start
            self._logger.debug("%s handled in %.1f ms", name, seconds * 1000, extra=_fields(name, None, seconds))
        return response


def _fields(name: str, error_type: str | None, seconds: float) -> dict[str, object]:
    return {**log_fields(), "type_name": name, "error_type": error_type, "seconds": seconds}
