"""
The sending half of a message broker's contract. The mediator depends on this half alone; `base.py` is the reading half.

It is a module of its own so that importing the mediator stays fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

from diator.brokers.message import Message
from diator.exceptions import MessagesNotSent, UsageError


class MessageBroker(Protocol):
    """
    Sends messages. The mediator depends on nothing else: any class with this one method will do.

    A broker of diator keeps these promises as well:

    - The program can make it without a running event loop. It connects at its first use. `async with broker:` connects
      at once, returns the broker itself, and closes it at the end.
    - Several tasks of one event loop may use it at the same time. The messages that one task sends keep their order,
      also when the task starts several sends one after the other and then waits for all of them.
    - It serves one event loop at a time. When that has ended, another one may use the broker, as with several calls of
      `asyncio.run`; while it is running, calls in another one raise `UsageError`.
    - It never blocks the event loop: while it waits for the service, other tasks run.
    - It never runs a handler, never waits for a consumer, and never changes a message or keeps a reference to it.
    - Every call returns or raises within the broker's `timeout` (in seconds), even if the service does not respond.
    - It does not retry a send, and it does not drop a message that looks like a duplicate. The program decides what
      to do after a send error.
    - A cancelled call raises `CancelledError` at once. Its message may have arrived or not; other calls are unaffected.
    - After `await aclose()` every new call raises `BrokerClosed`. Each send that was in progress ends with its own send
      error; each subscription ends with `BrokerClosed`. `aclose` waits for outstanding answers of the service, but not
      for a service that does not respond. A program may call it again, from several tasks, or after it was cancelled:
      it completes and raises nothing.
    - An error of the service or of its client library is raised as one of diator's errors, with the original error as
      `__cause__`.
    - No log record, error text or `repr` contains a password or any part of a payload. While nothing is wrong, the
      broker logs nothing above INFO.
    """

    async def send_message(self, message: Message, /) -> None:
        """
        Publish *message*. Return when the service has confirmed it, as strongly as `Capabilities.receipt` promises.

        Each `BrokerError` has the `message_id`.

        Raises:
            EncodingError: Not sent: the message cannot be encoded. Raised before anything else happens.
            BrokerUnavailable: Not sent: the broker has no connection. Sending the message again is safe.
            AccessRefused: Not sent: the service does not let this user in. Sending again helps when that has changed.
            BrokerClosed: Not sent: the broker was closed.
            MessageRejected: Not sent: the message was refused, and will be refused again. The common reason is
                `MessageTooLarge`.
            MessageUnroutable: No subscriber or queue received the message, and the broker was asked to report that.
            OutcomeUnknown: The message may have arrived. If it is sent again, the duplicate has the same `message_id`.
        """
        ...


class BatchMessageBroker(Protocol):
    """
    A broker that can also send several messages in one batch.

    `send_messages` is optional: to a broker without it, diator passes messages one at a time.
    """

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """
        Publish *messages* in their order. Return when the service has confirmed all of them.

        Raises:
            MessagesNotSent: Some messages were not confirmed; the error lists them. `__cause__` is the send error of
                the first one.
            DiatorError: Any other error means that no message was sent.
        """
        ...


class CheckingMessageBroker(Protocol):
    """
    A broker that knows more about what its service never accepts than `Capabilities.max_message_bytes` says.

    `check_message` is optional. The emitter calls it inside the unit of work, so that nothing is committed: with an
    empty message of each event class, and with each message that may be too large.
    """

    def check_message(self, message: Message, /) -> None:
        """
        Check *message* without a connection.

        Raises:
            MessageRejected, EncodingError: `send_message` would raise this too, whatever the service answers.
        """
        ...


async def send_together(send: Callable[[Message], Awaitable[None]], messages: Sequence[Message]) -> None:
    """
    Send *messages* by concurrent calls of *send*, and report all failures in one error, as `send_messages` must.

    The calls start in the order of *messages*. *send* has to keep that order, and should put the messages of concurrent
    calls into one write.

    Raises:
        MessagesNotSent: *send* raised an error for at least one message.
    """
    results = await asyncio.gather(*map(send, messages), return_exceptions=True)
    failed = [(message, error) for message, error in zip(messages, results, strict=True) if error is not None]
    if failed:
        raise MessagesNotSent([message.message_id for message, _ in failed]) from failed[0][1]


async def send_one_by_one(send: Callable[[Message], Awaitable[None]], messages: Sequence[Message]) -> None:
    """
    Send *messages* by one call of *send* after the other, for a broker without `send_messages`.

    Raises:
        MessagesNotSent: *send* raised an error. The later messages were not tried.
    """
    for position, message in enumerate(messages):
        try:
            await send(message)
        except Exception as error:
            raise MessagesNotSent([each.message_id for each in messages[position:]]) from error


#: When a message may be sent: at a time, some time after it was stored, or at once.
Due: TypeAlias = datetime | timedelta | None

Session_contra = TypeVar("Session_contra", contravariant=True)


class TransactionalBroker(MessageBroker, Protocol[Session_contra]):
    """
    A broker that takes part in the unit of work: it stores messages in the open transaction, as an outbox does.

    The emitter asks the container for an object of `session_type`, in the scope of the unit of work, and passes it to
    `store`. It never calls `send_message` of such a broker. Somebody else sends the messages later, such as a relay.

    Attributes:
        transactional: True. A broker without `session_type` and `store` may have it too: then the emitter calls
            `send_message` inside the unit of work.
        session_type: The class of the objects that hold a transaction, such as SQLAlchemy's `AsyncSession`.
    """

    transactional: Literal[True]
    session_type: type

    async def store(
        self, messages: Sequence[Message], due: Sequence[Due], session: Session_contra, /
    ) -> Callable[[], bool] | None:
        """
        Store *messages* in the open transaction of *session*, in their order. *due* says when each may be sent.

        Return a function that says whether that transaction was rolled back; None if the broker cannot know.
        """
        ...


class Deduplicating(Protocol[Session_contra]):
    """
    An inbox: notes in the transaction of a handler which messages it has handled.

    Attributes:
        session_type: As `TransactionalBroker.session_type`.
        group: The name that takes the place of the consumer group; None: the group of the consumer.
    """

    session_type: type
    group: str | None

    async def __aenter__(self) -> object:
        """Begin what the inbox does beside the handlers, such as to forget old messages. A consumer runs."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """End it: the consumer has ended. Several consumers may use one inbox at the same time."""
        ...

    async def first_time(self, message_id: UUID, group: str, handler: str, session: Session_contra, /) -> bool:
        """Note in the open transaction of *session* that *handler* handles this message; false if it did before."""
        ...

    def watch(self, session: Session_contra, /) -> Callable[[], bool | None] | None:
        """
        Return a function that says whether the open transaction of *session* was committed. None if it cannot know.

        The function returns None while the transaction is open, and False if it was rolled back.
        """
        ...


def transactional(broker: object) -> bool:
    """Return whether *broker* takes part in the unit of work, see `TransactionalBroker`."""
    return getattr(broker, "transactional", False) is True


def session_type_of(broker: Any) -> type | None:
    """Return the class of the sessions in which *broker* stores messages; None if it does not need one."""
    session_type: type | None = getattr(broker, "session_type", None) if transactional(broker) else None
    return session_type


def check_has_ended(loop: asyncio.AbstractEventLoop | None) -> None:
    """Raise `UsageError` if *loop*, which used a broker before the running one, is still running."""
    if loop is not None and loop.is_running():
        raise UsageError(
            "this broker is in use in another event loop that is still running; a broker serves one event loop at a "
            "time, so make one for each thread"
        )
