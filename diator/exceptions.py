"""
Every error of diator. All derive from `DiatorError`; some also derive from a built-in error, such as `ValueError`.

A *send error* concerns one message and states whether the message may have arrived:

=====================  ===========================================================================================
`BrokerUnavailable`    not sent: the broker has no connection; sending the message again is safe
`AccessRefused`        not sent: the service refuses the login of this user
`BrokerClosed`         not sent: the program closed the broker
`MessageRejected`      not sent: the service, or a limit, refuses this message and will refuse it again
`MessageUnroutable`    no queue received the message, and the broker was asked to report that
`OutcomeUnknown`       the message may have arrived; if it is sent again, the duplicate has the same `message_id`
=====================  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self
from uuid import UUID


class DiatorError(Exception):
    """
    The root of all errors that diator itself raises. diator never wraps an error of a handler in one.

    An error can be copied and pickled, with its text, attributes and notes, and with its `__cause__` if that is one of
    diator's errors too. Another cause is an error of a client library, which often cannot be pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.__dict__
        if isinstance(self.__cause__, DiatorError):
            state = {**state, "__cause__": self.__cause__}
        return _copied, (type(self), self.args), state


def _copied(error_type: type[DiatorError], args: tuple[Any, ...]) -> DiatorError:
    """Return an error without calling its own constructor, which would make a text of *args* once more."""
    error = error_type.__new__(error_type, *args)
    super(DiatorError, error).__init__(*args)  # the built-in one: an `ImportError` keeps its text outside of `args`
    return error


# -- configuration and use ---------------------------------------------------------------------------------------


class BindingError(DiatorError, TypeError):
    """The handler cannot be bound to this type, or its wire name is taken. Raised when a handler is bound."""


class HandlerNotFound(DiatorError, LookupError):
    """
    The request map has no handler for the type of a request.

    Attributes:
        request_type: The type of the request.
    """

    def __init__(self, request_type: type) -> None:
        if request_type is type:
            super().__init__("send() received a class; send an instance of the class")
        else:
            super().__init__(
                f"no handler is bound to {request_type.__qualname__}; "
                f"bind one with RequestMap.bind({request_type.__name__}, …)"
            )
        self.request_type = request_type


class ConfigurationError(DiatorError, ValueError):
    """The parts of a program do not fit together, or an option is out of range. Raised when an object is made."""


class UsageError(DiatorError, RuntimeError):
    """The state of the object forbids this call: a second `Consumer.run`, or one broker in two event loops."""


class UnsupportedCapability(ConfigurationError):
    """
    The program asks for a capability that the transport does not promise. The text names the option and a remedy.

    Attributes:
        lacks: The missing capabilities, each as `name (has, needed is needs)`.
    """

    def __init__(self, broker: str, lacks: Sequence[str], *, why: str, remedy: str) -> None:
        super().__init__(f"{broker} does not promise {'; '.join(lacks)}, which {why} needs; {remedy}")
        self.lacks: tuple[str, ...] = tuple(lacks)


class ResolutionError(DiatorError, LookupError):
    """
    A container cannot build a type. The text shows the path of dependencies that leads to the type.

    Attributes:
        path: The names of the types on that path. The handler comes first.
    """

    def __init__(self, path: Sequence[str], problem: str) -> None:
        super().__init__("\n".join([problem, *(f"{'  ' * depth}└ {step}" for depth, step in enumerate(path, 1))]))
        self.path: tuple[str, ...] = tuple(path)


class MissingExtra(DiatorError, ImportError):
    """
    The program imported a module of diator whose client library is not installed.

    Attributes:
        extra: The extra to install, as in `pip install 'diator[redis]'`.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} needs an extra that is not installed: pip install 'diator[{extra}]'")
        self.extra = extra


class IncompatibleClient(DiatorError, ImportError):
    """
    An installed client library lacks an internal attribute that diator uses. Raised when the transport is imported.

    Attributes:
        distribution: The name of the client library, as pip knows it.
        version: Its installed version.
        attribute: The missing attribute, with its module and class.
    """

    def __init__(self, distribution: str, version: str, attribute: str, supported: str) -> None:
        super().__init__(
            f"{distribution} {version} has no {attribute}, which diator uses; install a version that this diator was "
            f"tested with, by pip install '{supported}', or a newer diator"
        )
        self.distribution = distribution
        self.version = version
        self.attribute = attribute


# -- events ------------------------------------------------------------------------------------------------------


class NotAnEvent(ConfigurationError, TypeError):
    """A handler raised an object that cannot be an event, or an integration event whose class is incomplete."""


class BrokerNotConfigured(DiatorError, RuntimeError):
    """
    A handler raised an integration event, and the emitter has no broker. Raised inside the unit of work.

    Attributes:
        event_type: The type of the event.
    """

    def __init__(self, event_type: type) -> None:
        super().__init__(
            f"{event_type.__qualname__} is an integration event, and no message broker is configured; "
            "pass message_broker to the Mediator or the EventEmitter"
        )
        self.event_type = event_type


class SharedHandler(DiatorError, RuntimeError):
    """
    A container returned one handler object for two messages, and the object still holds the events of the first.

    Attributes:
        handler_type: The class of the handler.
    """

    def __init__(self, handler_type: type) -> None:
        super().__init__(
            f"the container returned one {handler_type.__qualname__} for two messages, and the object still holds "
            "the events of the first; register handlers that raise events as transient (a new object per message)"
        )
        self.handler_type = handler_type


class EventHandlersFailed(ExceptionGroup[Exception], DiatorError):
    """
    Event handlers failed. All handlers ran; each error has a note with the name of its handler.

    diator sent no integration event of this unit of work.
    """

    def derive(self, excs: Sequence[Exception]) -> Self:  # type: ignore[override]  # narrower: only Exceptions get in
        """Keep the type when `except*` splits the group."""
        return type(self)(self.message, excs)


class EventsNotSent(DiatorError):
    """
    The request was handled and its unit of work is finished, but the broker did not confirm all of its events.

    `__cause__` is the send error of the first of `events`. The later ones were not confirmed or not tried.

    Attributes:
        response: The response of the handler, which the program can still return to its caller.
        events: The unconfirmed events, in the order in which they were raised.
    """

    def __init__(self, response: object, events: Sequence[object], message_ids: Sequence[UUID]) -> None:
        names = ", ".join(
            f"{type(event).__name__} {message_id}" for event, message_id in zip(events, message_ids, strict=True)
        )
        super().__init__(
            f"the request was handled, but the broker did not confirm {names}; "
            "do not send the request again: its response and these events are attributes of this error"
        )
        self.response = response
        self.events: tuple[object, ...] = tuple(events)


class NotCommitted(DiatorError, RuntimeError):
    """
    A unit of work succeeded, and its transaction was rolled back: an outbox has stored in it, or an inbox has noted.

    So the messages do not exist, nor does what the handler wrote in that transaction. The session has to be committed
    when the unit of work succeeds: by the resource that gives it to the container, or by a middleware, and not by the
    handler.
    """

    def __init__(self, event_types: Sequence[type], session_type: type, *, did: str = "stored") -> None:
        names = ", ".join(dict.fromkeys(each.__qualname__ for each in event_types))
        super().__init__(
            f"the unit of work succeeded, but the transaction that {did} {names} was rolled back, or its "
            f"{session_type.__qualname__} was closed without a commit; let the resource commit it, as in "
            "`async with sessions.begin() as session: yield session`, and not the handler"
        )


# -- messages ----------------------------------------------------------------------------------------------------


class EncodingError(DiatorError, ValueError):
    """
    A value cannot be written as JSON without loss.

    Attributes:
        path: Where the value is, such as `UserJoined.tags[2].weight`.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class DecodingError(DiatorError, ValueError):
    """
    The body of a message cannot be decoded, or its payload does not fit the type of the event.

    The text names the place and never the content: the content may be unfit for logs.
    """


class BrokerError(DiatorError):
    """
    A broker could not do what the program asked for. The root of all errors of brokers.

    Attributes:
        message_id: The id of the message that the error concerns; None if it concerns no single message.
    """

    def __init__(self, problem: str, *, message_id: UUID | None = None) -> None:
        super().__init__(problem if message_id is None else f"message {message_id}: {problem}")
        self.message_id = message_id


class BrokerUnavailable(BrokerError, ConnectionError):
    """The service cannot be reached. The message was not sent; sending it again is safe."""

    def __init__(self, problem: str, *, message_id: UUID | None = None) -> None:
        super().__init__(problem if message_id is None else f"not sent: {problem}", message_id=message_id)


class AccessRefused(BrokerError, ConfigurationError):
    """The service refuses the login of this user, or a permission that the subscription needs. Retries do not help."""


class BrokerClosed(BrokerError):
    """The program closed the broker. The message was not sent."""


class MessageRejected(BrokerError):
    """The service, or a limit of the broker, refused the message and will refuse it again. It was not sent."""


class MessageTooLarge(MessageRejected, ValueError):
    """
    The encoded message has more bytes than the broker accepts.

    Attributes:
        size: The size of the encoded message, in bytes.
        limit: The largest size that the broker accepts, in bytes.
    """

    def __init__(self, size: int, limit: int, *, message_id: UUID | None = None) -> None:
        super().__init__(
            f"the encoded message has {size:,} bytes, and this broker accepts {limit:,}; send a reference to the data, "
            "or raise max_message_bytes if the service allows that",
            message_id=message_id,
        )
        self.size = size
        self.limit = limit


class AlreadySettled(BrokerError, RuntimeError):
    """A delivery was settled in one way and then in another. The first one counts."""


class MessageUnroutable(BrokerError):
    """The service accepted the message, but no queue received it, and the broker was asked to report that."""


class MessagesNotSent(BrokerError):
    """
    The broker did not confirm all of several messages. `__cause__` is the send error of the first of them.

    Attributes:
        message_ids: The ids of the unconfirmed messages, in the order in which they were sent.
    """

    def __init__(self, message_ids: Sequence[UUID]) -> None:
        super().__init__(f"the broker did not confirm messages {', '.join(map(str, message_ids))}")
        self.message_ids: tuple[UUID, ...] = tuple(message_ids)


class OutcomeUnknown(BrokerError, TimeoutError):
    """
    The message may have arrived: the answer of the service is missing.

    If the program sends the message again, the duplicate has the same `message_id`.
    """
