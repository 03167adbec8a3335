"""What a log record has beside its text."""

import logging

_OF_ANY = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the attributes of *record* that diator has added with `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OF_ANY}
