"""What client libraries log about diator's own connections: diator logs each fault itself, once."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_OURS: ContextVar[bool] = ContextVar("diator_client", default=False)


@contextmanager
def own_client() -> Generator[None, None, None]:
    """Mark the work of a client library in this block, and in the tasks that it begins there, as work for diator."""
    before = _IS_OURS.set(True)
    try:
        yield
    finally:
        _IS_OURS.reset(before)


def demote(*loggers: str) -> None:
    """
    Make these *loggers* of a client library log warnings and errors about work for diator at the level DEBUG.

    One lost connection would otherwise be several lines with tracebacks. What the library logs about connections of the
    program itself does not change.
    """
    for name in loggers:
        logging.getLogger(name).addFilter(_demoted)


def _demoted(record: logging.LogRecord) -> bool:
    if record.levelno <= logging.INFO or not _IS_OURS.get():
        return True
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
