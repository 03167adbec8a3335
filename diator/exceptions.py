"""
Every error of diator. One root, `DiatorError`; a built-in as second parent where one fits.

An error of sending is a verdict on one message, and says whether the message may have arrived:

=====================  ==========================================================================
`BrokerUnavailable`    not sent: no connection; sending again is safe
`BrokerClosed`         not sent: the broker was closed by its program
`MessageRejected`      not sent: the service, or a limit, refuses this message; it will do so again
`MessageUnroutable`    nobody received it, where the program asked to be told
`OutcomeUnknown`       perhaps arrived; a repeat carries the same `message_id`
=====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self
from uuid import UUID


class DiatorError(Exception):
    """The root of all errors that diator raises by itself. A handler's own error is never wrapped in one."""


# -- wiring ------------------------------------------------------------------------------------------------------


class BindingError(DiatorError, TypeError):
    """A handler cannot be bound to this type, or a name is taken. Raised when binding."""


class HandlerNotFound(DiatorError, LookupError):
    """No handler is bound to the type of a request."""

    def __init__(self, request_type: type) -> None:
        if request_type is type:
            super().__init__("a class was sent; send an object of it")
        else:
            super().__init__(
                f"no handler is bound to {request_type.__qualname__}; use RequestMap.bind({request_type.__name__}, …)"
            )
        self.request_type = request_type


class ConfigurationError(DiatorError, ValueError):
    """The parts of a program do not fit together, or an option is out of its range. Raised when constructing."""


class UsageError(DiatorError, RuntimeError):
    """An object's state does not allow the call: a consumer runs twice, a broker has two running event loops."""


class UnsupportedCapability(ConfigurationError):
    """A program asks for what a transport does not promise. The text says which option, and what can be done."""

    def __init__(self, broker: str, lacks: Sequence[str], *, why: str, remedy: str) -> None:
        super().__init__(f"{broker} does not promise {'; '.join(lacks)}, which {why} needs; {remedy}")
        self.lacks: tuple[str, ...] = tuple(lacks)


class ResolutionError(DiatorError, LookupError):
    """A container cannot build a type. The text shows the path that led to it."""

    def __init__(self, path: Sequence[str], problem: str) -> None:
        super().__init__("\n".join([problem, *(f"{'  ' * depth}└ {step}" for depth, step in enumerate(path, 1))]))
        self.path: tuple[str, ...] = tuple(path)


class MissingExtra(DiatorError, ImportError):
    """A part of diator was imported whose client library is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} needs an extra that is not installed: pip install 'diator[{extra}]'")
        self.extra = extra


# -- events ------------------------------------------------------------------------------------------------------


class NotAnEvent(DiatorError, TypeError):
    """Something was emitted that is no event, or an event class that cannot travel as it is declared."""


class BrokerNotConfigured(DiatorError, RuntimeError):
    """An event that travels was raised, and there is no broker to send it with. Raised inside the unit of work."""

    def __init__(self, event_type: type) -> None:
        super().__init__(
            f"{event_type.__qualname__} travels through a message broker, and none is configured; "
            "give EventEmitter or Mediator a message_broker"
        )
        self.event_type = event_type


class SharedHandler(DiatorError, RuntimeError):
    """A container gave out the same handler object twice, and it remembers the events of an earlier message."""

    def __init__(self, handler_type: type) -> None:
        super().__init__(
            f"the container gave out one {handler_type.__qualname__} for two messages, and it still holds the events "
            "of the first; register handlers that raise events so that each message gets a new one (transient)"
        )
        self.handler_type = handler_type


class EventHandlersFailed(ExceptionGroup[Exception], DiatorError):
    """
    Handlers of domain events failed. All of them ran; each error carries a note that names its handler.

    No integration event of this send was sent.
    """

    def derive(self, excs: Sequence[Exception]) -> Self:  # type: ignore[override]  # narrower: only Exceptions get in
        """Keep the type when `except*` splits the group."""
        return type(self)(self.message, excs)


class EventsNotSent(DiatorError):
    """
    The request was handled, its unit of work is finished, and not all of its events were sent.

    `__cause__` is the verdict on the first of `events`; those after it were not confirmed either, or not tried.

    Attributes:
        response: What the handler answered. It is not lost because a broker was away.
        events: The events that were not confirmed, in the order in which they were raised.
    """

    def __init__(self, response: object, events: Sequence[object], message_ids: Sequence[UUID]) -> None:
        names = ", ".join(
            f"{type(event).__name__} {message_id}" for event, message_id in zip(events, message_ids, strict=True)
        )
        super().__init__(f"the request was handled, but of its events these were not sent: {names}")
        self.response = response
        self.events: tuple[object, ...] = tuple(events)


# -- messages ----------------------------------------------------------------------------------------------------


class EncodingError(DiatorError, ValueError):
    """
    A value cannot be written as JSON without losing something.

    Attributes:
        path: Where the value is, such as `UserJoined.tags[2].weight`.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class DecodingError(DiatorError, ValueError):
    """
    Bytes are no message of ours, or a payload does not fit the event's type.

    The text names the place, never the content: a payload may hold what no log should.
    """


class BrokerError(DiatorError):
    """
    A broker could not do what was asked.

    Attributes:
        message_id: The message it concerns, where it concerns one.
    """

    def __init__(self, problem: str, *, message_id: UUID | None = None) -> None:
        super().__init__(problem if message_id is None else f"message {message_id}: {problem}")
        self.message_id = message_id


class BrokerUnavailable(BrokerError, ConnectionError):
    """The service cannot be reached. The message was not sent; sending it again is safe."""

    def __init__(self, problem: str, *, message_id: UUID | None = None) -> None:
        super().__init__(problem if message_id is None else f"not sent: {problem}", message_id=message_id)


class AccessRefused(BrokerError, ConfigurationError):
    """The service does not allow this user what a subscription needs. Trying again does not mend that."""


class BrokerClosed(BrokerError):
    """The broker was closed by its program. The message was not sent."""


class MessageRejected(BrokerError):
    """The message was refused, and will be again: by the service, or by a limit of the broker. It was not sent."""


class MessageTooLarge(MessageRejected, ValueError):
    """The encoded message has more bytes than the broker takes."""

    def __init__(self, size: int, limit: int, *, message_id: UUID | None = None) -> None:
        super().__init__(
            f"{size:,} bytes, and this broker takes {limit:,}; send a reference to the data, "
            "or raise max_message_bytes where the service allows it",
            message_id=message_id,
        )
        self.size = size
        self.limit = limit


class AlreadySettled(BrokerError, RuntimeError):
    """A delivery was settled in one way and then in another. The first one holds."""


class MessageUnroutable(BrokerError):
    """The service has the message and nobody to give it to, and the program asked to be told."""


class MessagesNotSent(BrokerError):
    """
    Of several messages, some were not confirmed. `__cause__` is the verdict on the first of them.

    Attributes:
        message_ids: Those that were not confirmed, in their order.
    """

    def __init__(self, message_ids: Sequence[UUID]) -> None:
        super().__init__(f"not confirmed: {', '.join(map(str, message_ids))}")
        self.message_ids: tuple[UUID, ...] = tuple(message_ids)


class OutcomeUnknown(BrokerError, TimeoutError):
    """The message may have arrived or not: the answer is missing. A repeat carries the same `message_id`."""
