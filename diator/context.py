"""What a handler can know about the message that it handles: its id, headers, attempt, topic and so on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from diator._hints import name_of
from diator.brokers.message import Topic
from diator.exceptions import ConfigurationError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageContext:
    """
    What is known about the message that a consumer handles, apart from the event in it.

    A handler that is a function has it as a parameter, `context: MessageContext`; a handler class, and what it depends
    on, takes it in the constructor. `current_message` returns it everywhere else. A request handler may run outside of
    any message. Then a `MessageContext` is an error, and `MessageContext | None` is None.

    Its `repr` contains neither the key nor the headers, so that no log does. Each field has a default, so that a test
    can make one.

    Attributes:
        message_id: The id of the message; a duplicate and a redelivery have the same id.
        message_type: `notification_event`, `ecst_event`, or a type that a program defines.
        message_name: The wire name of the event.
        group: The consumer group; None without one.
        key: Messages with the same key keep their order; None if the message has no key.
        headers: The headers of the message as texts, without the key. Do not trust them more than their sender.
        attempt: As `Delivery.attempt`: 1 for the first delivery to the group.
        redelivered: Whether it is known that the message was delivered to the group before.
        sent_at: When the service stored the message (UTC), on RabbitMQ when the sender says that it was sent; None if
            nothing says it.
    """

    message_id: UUID = field(default_factory=uuid4)
    message_type: str = "notification_event"
    message_name: str = ""
    group: str | None = None
    key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    attempt: int = 1
    redelivered: bool = False
    sent_at: datetime | None = None

    @property
    def topic(self) -> Topic:
        """The destination that the message came from."""
        return Topic(self.message_type, self.message_name)

    @property
    def correlation_id(self) -> str:
        """What all messages have in common that go back to one cause: the header, or else the id of this message."""
        return usable_id(self.headers.get(CORRELATION_ID)) or str(self.message_id)

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handler has sent this one; None if no message caused it."""
        return usable_id(self.headers.get(CAUSATION_ID))


CORRELATION_ID = "correlation-id"
CAUSATION_ID = "causation-id"
#: An id in a header of another program is ignored if it has more characters: diator passes it on.
_LONGEST_ID = 255


def usable_id(text: object) -> str | None:
    """Return the id in a header; None if it should be neither passed on nor logged."""
    return text if isinstance(text, str) and 0 < len(text) <= _LONGEST_ID and text.isprintable() else None


#: The delivery that a consumer handles here, or its context, which is made when somebody asks for the first time.
DELIVERY: ContextVar[Any] = ContextVar("diator.context.DELIVERY", default=None)
#: Makes the context of a delivery; None if it cannot be decoded. Each worker of a consumer sets it once.
CONTEXT_OF: ContextVar[Callable[[Any], MessageContext | None]] = ContextVar("diator.context.CONTEXT_OF")


def current_message() -> MessageContext | None:
    """
    Return the context of the message that a consumer handles here; None if there is none.

    It is right with any concurrency: in middlewares, in all that a handler calls or sends, and in the tasks and threads
    (`asyncio.to_thread`) that it starts, for as long as they run. A message is handled until its outcome is reported:
    `on_handled` and the log lines of a consumer have the context too, unless the message cannot be decoded.
    """
    current = DELIVERY.get()
    if current is None or type(current) is MessageContext:
        return current
    DELIVERY.set(None)  # so that a codec which logs is not called again and again
    context = CONTEXT_OF.get()(current)
    DELIVERY.set(current if context is None else context)
    return context


def needed_message(*path: Callable[..., Any]) -> MessageContext:
    """
    Return what `current_message` does. UsageError outside of a consumer's handlers.

    *path* leads from the handler to what asks for it.
    """
    context = current_message()
    if context is None:
        asks = name_of(path[-1]) if path else "the program"
        of = f", which {name_of(path[0])} depends on," if len(path) > 1 else ""
        raise UsageError(
            f"{asks}{of} needs a MessageContext, and no message is being handled: the request was not sent "
            "by a handler of a consumer; annotate it with `MessageContext | None` if it can do without"
        )
    return context


# -- correlation -----------------------------------------------------------------------------------------------------

#: The correlation id of `correlated`.
CORRELATED: ContextVar[str | None] = ContextVar("diator.context.CORRELATED", default=None)


@contextmanager
def correlated(correlation_id: str | None = None) -> Generator[str]:
    """
    Give all messages that are sent inside of the block one correlation id, and return it; a new one by default.

    For the edge of a program, such as a web server. What a consumer handles has the correlation id of its message, also
    if the consumer runs inside of such a block; a block inside of a handler is for what is sent there.

    Raises:
        ConfigurationError: *correlation_id* is not 1 to 255 printable characters.
    """
    if correlation_id is None:
        correlation_id = str(uuid4())
    elif usable_id(correlation_id) is None:
        raise ConfigurationError(f"a correlation id must be text of 1 to {_LONGEST_ID} printable characters")
    token = CORRELATED.set(correlation_id)
    try:
        yield correlation_id
    finally:
        CORRELATED.reset(token)


def current_correlation_id() -> str | None:
    """Return the correlation id that a message would have that is sent here; None if it would have its own id."""
    correlation_id = CORRELATED.get()
    if correlation_id is None and (context := current_message()) is not None:
        correlation_id = context.correlation_id
    return correlation_id


def correlation(event: Any) -> Mapping[str, str]:
    """
    Return the headers `correlation-id` and `causation-id` of a message, as a header source.

    diator adds them by itself where headers are the service's own. Pass this function, as in `headers=[correlation]`,
    where a message would have them in its body, as on Redis Pub/Sub.
    """
    return correlation_headers(event.event_id, b"")


_BEFORE_ID = b'{"event_id":"'


def correlation_headers(message_id: UUID, payload_json: bytes) -> dict[str, str]:
    """Return the headers that correlate a message. A payload of diator usually begins with the id, as text."""
    correlation_id = CORRELATED.get()
    if correlation_id is None and DELIVERY.get() is None:
        is_usual = payload_json[:13] == _BEFORE_ID and payload_json.find(b'"', 13) == 49  # noqa: PLR2004  # where it ends
        return {CORRELATION_ID: payload_json[13:49].decode() if is_usual else str(message_id)}
    context = current_message()
    if context is None:
        return {CORRELATION_ID: correlation_id or str(message_id)}
    return {CORRELATION_ID: correlation_id or context.correlation_id, CAUSATION_ID: str(context.message_id)}


def log_fields() -> dict[str, object]:
    """Return what a log record says of the message that is being handled. Each is None if it is not known."""
    context = current_message()
    return {
        "correlation_id": current_correlation_id(),
        "message_id": None if context is None else str(context.message_id),
        "attempt": None if context is None else context.attempt,
        "group": None if context is None else context.group,
    }


class ContextFilter(logging.Filter):
    """
    Adds to each log record what is known about the message that is being handled: for a handler of `logging`.

    The attributes are `message_id`, `correlation_id`, `attempt` and `group`, each None if it is not known; one that the
    record has already stays as it is. Formats name them, as in `%(correlation_id)s`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes, and let the record pass."""
        for name, value in log_fields().items():
            record.__dict__.setdefault(name, value)
        return True
