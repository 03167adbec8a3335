"""
The reading half of a message broker's contract. The sending half is `sending.py`.

This prose is the specification. The conformance suite proves each promise in it, and `diator.brokers.memory` is the
shortest program that keeps all of them. `docs/writing-a-transport.md` explains the same contract step by step.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, Self, TypeAlias

import msgspec

from diator._text import printable
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Topic as Topic  # noqa: PLC0414  # it belongs here; importing it is fast from there
from diator.brokers.sending import MessageBroker
from diator.exceptions import AlreadySettled


class Settler(Protocol):
    """
    The transport's side of a delivery: it reports each outcome to the service.

    `Delivery` calls one of these methods, once. Only after a call has failed does it make another call, of any of these
    methods. Each method keeps the promises of the method of `Delivery` with the same name, raises the errors that the
    docstring there lists, and ends within the broker's `timeout`.

    A call that fails settles nothing: the service redelivers the message, after `Capabilities.redelivery_bound` at the
    latest. Until then it takes no place of *prefetch* from other messages. Settling too late has no effect either: if
    another consumer already has the message, or if the subscription has ended, the message is redelivered. Such a call
    returns, or raises a `BrokerError` if the settler knows. A settler never settles a delivery that another consumer
    holds, even if its own process stood still meanwhile.

    A settler may also have `sent_at(delivery)`, for `MessageContext.sent_at`: when the service stored the message, in
    seconds since 1970; None if it does not know. It is called only if a handler asks.
    """

    async def ack(self, delivery: Delivery, /) -> None:
        """Acknowledge; see `Delivery.ack`. Do nothing if the transport has no acknowledgements."""
        ...

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """Requeue; see `Delivery.retry`. *after* is in seconds; 0 means at once."""
        ...

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        """Dead-letter; see `Delivery.dead_letter`. Store the dead letter first; only then remove it from the group."""
        ...


class Delivery(msgspec.Struct, kw_only=True, eq=False):  # a dataclass with slots is made in four times the time
    """
    One message as the service delivered it, and the three ways to settle it. A delivery is settled once.

    A delivery may also stay unsettled: a consumer that was cancelled or that crashed has neither succeeded nor failed.
    The service then redelivers the message, as `Capabilities.redelivery` says. The body is not decoded yet and may
    contain anything. Each redelivery is a new object, and each subscription has its own objects.

    The transport passes a message on as it came: body, headers and key arrive byte for byte. A requeued or
    dead-lettered message has the same body and the same headers, and the transport only adds its own. What one of its
    own headers says (an attempt, a due time) counts only where the transport wrote it itself, such as in a retry queue
    of the group, and within its own limits. The transport ignores such a header of a sender.

    Attributes:
        topic: The topic that the message came from: one of the subscription's topics, whatever the body contains.
        body: The body as the service stores it; empty if it has none.
        headers: The service's own headers, including the key; empty if the transport has none.
        attempt: 1 for the first delivery of this message to its group, whatever its headers say; always 1 if the
            transport does not count.
        settler: The transport's side, which the three methods call.
        token: Identifies the delivery for its settler: a tag, an offset or an entry id. Only the transport uses it.
        outcome: How the delivery was settled: `ack`, `retry` or `dead_letter`; None while it is unsettled.
        redelivered: Whether the service says that it has delivered the message before, although *attempt* may be 1.
        unreadable: What of the service's own metadata, or of the form of the body, the transport cannot read; None if
            nothing. It contains nothing of the message. A consumer dead-letters such a message.
    """

    topic: Topic
    body: bytes
    headers: Mapping[str, str]
    attempt: int
    settler: Settler
    token: object = None
    outcome: str | None = None
    redelivered: bool = False
    unreadable: str | None = None

    async def ack(self) -> None:
        """
        Acknowledge the message: its work is done, and it must not be delivered again.

        Return when the transport has recorded the acknowledgement. The transport may send it to the service together
        with others, within milliseconds, and at the latest when the subscription ends. If that fails, the message is
        redelivered. `ack` does nothing if the transport has no acknowledgements.

        Raises:
            BrokerError: The acknowledgement did not reach the service; the message will be redelivered.
        """
        if self.outcome is not None:
            self._check_outcome("ack")
            return
        # As `_settle`, written out: nearly every delivery ends here.
        self.outcome = "ack"
        try:
            await self.settler.ack(self)
        except BaseException:
            self.outcome = None
            raise

    async def retry(self, *, after: float = 0.0) -> None:
        """
        Requeue the message: its group receives it again, at least *after* seconds from now, as the next attempt.

        Raises:
            UnsupportedCapability: The transport cannot requeue, or cannot requeue with a delay.
            MessageRejected, EncodingError: The service will never take this message as a retry; dead-letter it.
            BrokerError: The message could not be requeued; it will be redelivered.
        """
        await self._settle("retry", self.settler.retry, after)

    async def dead_letter(self, reason: str) -> None:
        """
        Dead-letter the message with *reason*: the transport keeps it and never delivers it to the group again.

        Return when the dead letter is safely stored. Only then is the message removed from its group.

        The transport receives *reason* as one line of at most 1,024 printable characters: whatever else it contains is
        escaped or cut. If the service refuses the dead letter as it is, the transport stores it in a smaller form:
        first without the headers that cannot be written, then without the body. Headers of the dead letter say what is
        missing (`diator-dlq-omitted`), and where the message lay.

        Raises:
            UnsupportedCapability: The transport has no dead-letter queue.
            BrokerError: The message could not be dead-lettered; it will be redelivered.
        """
        await self._settle("dead_letter", self.settler.dead_letter, printable(reason))

    async def _settle(self, outcome: str, settle: Callable[..., Awaitable[None]], *how: object) -> None:
        if self.outcome is not None:
            self._check_outcome(outcome)
            return
        self.outcome = outcome
        try:
            await settle(self, *how)
        except BaseException:
            self.outcome = None  # the failed call settled nothing, so the caller may try another way
            raise

    def _check_outcome(self, outcome: str) -> None:
        if self.outcome != outcome:
            raise AlreadySettled(
                f"a delivery of {self.topic.message_name} is already settled by {self.outcome}(); "
                f"do not settle it again by {outcome}()"
            )

    def __repr__(self) -> str:  # without the body and the headers: it may end in a log
        return f"Delivery(topic={self.topic!r}, attempt={self.attempt!r}, outcome={self.outcome!r})"


@dataclass(frozen=True, kw_only=True)
class Gap:
    """
    A period in which messages may have been missed.

    Attributes:
        since: The last time at which the reader had certainly received everything (aware, UTC). It may be earlier than
            the loss itself, never later: a program that catches up from here processes a little too much.
        until: When the transport was receiving again (aware, UTC).
        reason: What happened, such as the error that broke the connection.
    """

    since: datetime
    until: datetime
    reason: str


OnGap: TypeAlias = Callable[[Gap], None]


class ReadableBroker(MessageBroker, Protocol):
    """
    A broker that consumers can also read from.

    Its subscriptions end with the event loop that they began in.
    """

    @property
    def capabilities(self) -> Capabilities:
        """The promises of this transport, known without a connection, and constant while the broker exists."""
        ...

    def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """
        Subscribe to *topics*, at least one: return a context manager that returns an iterator of deliveries on entry.

        Groups: *group* names a consumer group: one consumer of the group receives each message. Without a group,
        every subscription receives each message. All consumers of a group subscribe to the same topics. A group exists
        for each topic separately, and no group's settlements affect another group.

        Start: On entry the subscription is ready: it delivers every message that is confirmed from now on.
        `Capabilities.replay` defines where a new group starts. From then on the group collects messages, if
        `Capabilities.subscription` is `durable`. A subscription without a group starts at its entry.

        Prefetch: The iterator hands out deliveries until *prefetch* of them, any number from 1 on, are unsettled, and
        no more if the transport has backpressure. The transport may receive some more in advance, but it leaves enough
        messages for the other consumers of the group.

        Waiting for a key: A consumer receives messages of a key faster than it handles them, one after the other. So it
        calls `postpone(delivery)` of the iterator for a delivery that waits for an earlier one of its key, and
        `resume(delivery)` when its turn has come. In between, the delivery counts as prefetched: it takes no place of
        *prefetch*, and is not charged an attempt at the end. If the message was given to another consumer meanwhile, or
        will be delivered once more, `resume` returns False, and the delivery is never handled.

        Isolation: No message stops another one. A message that the transport cannot deliver (metadata that cannot be
        decoded, a body that is too large) is dead-lettered by itself, with a reason that contains nothing of the
        message, and the next message is delivered. It costs neither the connection nor a place in *prefetch*.

        Several subscriptions: One broker can have any number of them, to the same topics or to others. No
        subscription delays or ends another.

        Waiting: A wait for the next delivery takes no processor time. A cancelled wait loses no message.

        Reconnecting: The iterator reconnects by itself, with exponential backoff and jitter. It calls *on_gap*
        whenever messages may have been missed meanwhile. It ends only when its context ends, or with an error that
        reconnecting cannot fix: `BrokerClosed`, or a `ConfigurationError` if the service's settings have changed.

        End: The end of the context waits only until the settlements have reached the service. Deliveries that are
        unsettled become available to other consumers at once, if `Capabilities.redelivery` contains `close`.
        A message that was prefetched and never handed out was not delivered, so it is not charged an attempt. An error
        that is raised inside the context leaves it unchanged. The broker keeps nothing of an ended subscription.

        Raises, on entry:
            ConfigurationError: *prefetch* is below 1.
            UnsupportedCapability: The transport has no groups, or requires one.
            AccessRefused: The service does not allow this user to read there.
            BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
            BrokerClosed: The broker was closed.
        """
        ...


class Transport(ReadableBroker, Protocol):
    """A broker that can also be opened and closed, as each of diator's can. A program creates one and shares it."""

    async def aclose(self) -> None:
        """
        Refuse new messages, end the subscriptions, and close the connections. A further call does nothing.

        Nothing remains: no task, no thread, no open file, and no error that nobody has retrieved.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> bool | None: ...
