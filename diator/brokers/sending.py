"""
The first half of the contract of a message broker, and all that the mediator depends on. `base.py` is the second half.

In a file of its own, because importing the mediator is to be quick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from diator.brokers.message import Message
from diator.exceptions import MessagesNotSent


class MessageBroker(Protocol):
    """
    Sends messages. This is all that the mediator depends on; a class with this one method will do.

    A broker of diator also keeps these promises:

    - It is made without a running event loop, and connects when it is first used. `async with broker:` connects early,
      gives the broker itself, and closes it.
    - It is safe to use from several tasks of one event loop at once. What one task sends keeps its order, also where
      it starts the sends one after the other and waits for all of them.
    - It never runs a handler, never waits for a reader, and never changes or keeps a hold of the message.
    - Every call returns or raises within the broker's `timeout` (seconds), however dead the service is.
    - It does not retry, nor drop what looks like a repeat. What to do about a verdict is the program's to decide.
    - A cancelled call raises `CancelledError` at once; the message may have arrived or not, and others are unaffected.
    - `await aclose()` refuses what comes after it, with `BrokerClosed`; sends that it overtakes end with a verdict of
      their own, subscriptions with `BrokerClosed`. It waits for answers that are due, and for no service that is gone.
      Called again, at the same time, or after it was cancelled, it finishes and raises nothing.
    - What the service or its client library raises comes out as one of diator's errors, with the other as its cause.
    - Nothing that it logs, raises or shows (`repr`) has a part of a payload or a password in it; when nothing is wrong,
      it logs nothing above INFO.
    """

    async def send_message(self, message: Message, /) -> None:
        """
        Hand *message* to the service. Returns when the service has confirmed it, as strongly as it can.

        Each error of a broker has the `message_id`.

        Raises:
            EncodingError: Not sent, it cannot be written. Raised before anything else is done.
            BrokerUnavailable: Not sent, no connection. Sending it again is safe.
            BrokerClosed: Not sent, this broker was closed.
            MessageRejected: Not sent, and will be refused again; `MessageTooLarge` is the common reason.
            MessageUnroutable: Nobody received it, where the broker was asked to tell.
            OutcomeUnknown: It may have arrived. A repeat carries the same `message_id`.
        """
        ...


class BatchMessageBroker(Protocol):
    """A broker that can send several messages in one exchange. Optional: others get them one by one."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """
        Hand *messages* to the service, in their order.

        Raises:
            MessagesNotSent: Some were not confirmed: those that it names. `__cause__` is the verdict on the first.
            DiatorError: Any other error says that none of them was sent.
        """
        ...


async def send_together(send: Callable[[Message], Awaitable[None]], messages: Sequence[Message]) -> None:
    """
    Keep the promise of `send_messages` with a *send* that puts concurrent callers' messages into one exchange.

    It is called for all of *messages* at once, in their order, and has to keep that.

    Raises:
        MessagesNotSent: *send* raised for some of them.
    """
    verdicts = await asyncio.gather(*map(send, messages), return_exceptions=True)
    failed = [(message, error) for message, error in zip(messages, verdicts, strict=True) if error is not None]
    if failed:
        raise MessagesNotSent([message.message_id for message, _ in failed]) from failed[0][1]


def transactional(broker: object) -> bool:
    """
    Tell whether *broker* is part of the unit of work, as an outbox is: it stores messages in the open transaction.

    Such a broker has an attribute `transactional = True`. The emitter calls it before the middlewares have finished.
    """
    return getattr(broker, "transactional", False) is True
