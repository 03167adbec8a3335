"""Log lines in a program whose logs are structured by structlog."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from diator.context import ContextFilter
from diator.events import NotificationEvent
from tests.records import handle_once


class Joined(NotificationEvent):
    """The event of this test."""


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Configure structlog as its documentation advises for a program with loggers of both kinds. Yield its output."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
        processors=[
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(formatter)
    handler.addFilter(ContextFilter())
    structlog.configure(
        processors=[structlog.stdlib.add_logger_name, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    loggers = [logging.getLogger(name) for name in ("diator", "program")]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.DEBUG)
    yield stream
    for each in loggers:
        each.removeHandler(handler)
        each.setLevel(logging.NOTSET)
    structlog.reset_defaults()


async def test_structlog_shows_the_fields_of_each_line(written: io.StringIO) -> None:
    async def welcome(event: Joined) -> None:
        structlog.get_logger("program").info("welcoming", language="en")
        raise ValueError("a password")

    event = Joined()
    await handle_once(event, welcome)

    started, own, middleware, failed, stopped = (json.loads(line) for line in written.getvalue().splitlines())
    about = "consuming Joined from MemoryMessageBroker, group greeters, concurrency 1"
    assert [started["event"], stopped["event"]] == [about, f"stopped {about}"]
    assert {each["message_id"] for each in (own, middleware, failed)} == {str(event.event_id)}
    assert {each["correlation_id"] for each in (own, middleware, failed)} == {"order-7"}
    assert (own["event"], own["language"], own["attempt"]) == ("welcoming", "en", 1)
    assert (middleware["type_name"], middleware["error_type"]) == ("Joined", "ValueError")
    assert failed.pop("seconds") >= 0
    assert failed.pop("event").startswith(f"Joined {event.event_id} was not handled and is dead-lettered")
    assert failed == {
        "logger": "diator.consumer",
        "level": "error",
        "message_id": str(event.event_id),
        "message_type": "notification_event",
        "message_name": "Joined",
        "correlation_id": "order-7",
        "group": "greeters",
        "attempt": 1,
        "outcome": "dead_lettered",
        "reason": failed["reason"],
        "error_type": "ValueError",
        "retries": 0,
    }
    assert failed["reason"].startswith("retries-exhausted: ValueError in ")
    assert "password" not in written.getvalue()
