from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID

from diator._hints import described, name_of
from diator.brokers.message import Codec, Message
from diator.brokers.sending import Due, MessageBroker, transactional
from diator.exceptions import ConfigurationError, UsageError
from diator.outbox.store import Store

Session = TypeVar("Session")

#: What the emitter asks the broker that sends, so that a message which it refuses rolls the work back.
_OF_BROKER = ("capabilities", "check_message", "messaging_system", "where")


class Outbox(Generic[Session]):
    """
    A message broker that stores messages in the transaction of the unit of work. A `Relay` sends them with another one.

    Pass it as `message_broker` to a `Mediator` or an `EventEmitter`, and as `outbox` to a `Consumer`. The container of
    the program has to give one session for each unit of work, and whoever gives it commits the session. The messages
    exist if and only if that transaction was committed. They are sent at least once, in the order of their keys.

    An event that its broker would refuse is refused in the unit of work: what is wrong with its size, its headers or
    its name rolls the work back.

    Programs with the same broker may share the tables of one store. Programs with different brokers need different
    tables, because a relay sends every message that it finds.

    Several tasks of one event loop may use it at the same time.

    Args:
        store: Keeps the messages.
        to: The broker that sends them. The outbox does not close it.
        codec: The envelope of the messages. Default: diator's own.

    Attributes:
        transactional: True, see `diator.brokers.sending.TransactionalBroker`.
        session_type: The class of the sessions of *store*.
        to, codec: As passed.
        messages: *store*, as passed.

    Raises:
        ConfigurationError: An argument has the wrong type.
    """

    transactional: Literal[True] = True

    def __init__(self, store: Store[Session], to: MessageBroker, *, codec: Codec | None = None) -> None:
        check_store(store)
        if isinstance(to, type) or not callable(getattr(to, "send_message", None)) or transactional(to):
            raise ConfigurationError(f"to must be the broker that sends the messages, and it is {described(to)}")
        self.messages: Store[Session] = store
        self.session_type: type = store.session_type
        self.to: MessageBroker = to
        self.codec: Codec | None = codec

    async def store(
        self, messages: Sequence[Message], due: Sequence[Due], session: Session, /
    ) -> Callable[[], bool] | None:
        """
        Store *messages* in the open transaction of *session*; see `TransactionalBroker.store`. The emitter calls it.

        Raises:
            ConfigurationError: *session* is not of the type that the store needs.
            EncodingError: The database cannot hold a message.
        """
        check_session(session, self.session_type, "the outbox")
        return await self.messages.add(messages, due, session)

    async def cancel(self, message_id: UUID, session: Session, /) -> bool:
        """
        Delete a message that was not sent yet, such as a scheduled one, in the open transaction of *session*.

        *message_id* is the `event_id` of its event. Return False if there is nothing to delete: a relay has sent the
        message, or is just sending it.

        Raises:
            UsageError: *message_id* is not a UUID.
            ConfigurationError: *session* is not of the type that the store needs.
        """
        if not isinstance(message_id, UUID):
            raise UsageError(f"message_id must be the event_id of an event, and it is {described(message_id)}")
        check_session(session, self.session_type, "the outbox")
        return await self.messages.cancel(message_id, session)

    async def send_message(self, message: Message, /) -> None:
        """
        Refuse to send: this broker stores, and the emitter knows in which transaction.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"{message.message_name} {message.message_id} was passed to an Outbox, which stores in a transaction; "
            "raise the event in a handler, or emit it with an EventEmitter"
        )

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_BROKER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self.to, name)


def check_store(store: Any) -> None:
    """Check the type of a store when an outbox or an inbox is made."""
    is_outbox = isinstance(store, Outbox)
    if isinstance(store, type) or is_outbox or not isinstance(getattr(store, "session_type", None), type):
        raise ConfigurationError(
            f"store must be a store such as SqlAlchemyStore, with a session_type, and it is {described(store)}"
        )


def check_session(session: object, session_type: type, user: str) -> None:
    """Check what the container has given as the session of a unit of work."""
    if not isinstance(session, session_type):
        raise ConfigurationError(
            f"{user} stores in the {name_of(session_type)} of a unit of work, and it was given {described(session)}; "
            f"register {name_of(session_type)} with what returns one"
        )
