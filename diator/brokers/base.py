"""
The second half of the contract of a message broker: what it has to do to be read from. The first is `sending.py`.

This prose is the specification; the conformance suite proves each promise in it, and `diator.brokers.memory` is the
shortest program that keeps them all. `docs/writing-a-transport.md` goes through it in the order in which one writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol, Self, TypeAlias

from diator.brokers.capabilities import Capabilities
from diator.brokers.sending import MessageBroker
from diator.exceptions import AlreadySettled


class Topic(NamedTuple):
    """
    What a subscription listens to: the kind and the name of messages.

    Both are any text, as is the name of a group. Two that differ are two destinations: a transport writes them for its
    service so that no two become one, whatever the service makes of separators, wildcards, case or length. What it
    cannot write it refuses, with `MessageRejected` when sending and `ConfigurationError` when subscribing.
    """

    message_type: str
    message_name: str


class Settler(Protocol):
    """
    The transport's half of a delivery: how each outcome is told to the service.

    `Delivery` calls one of these, once; again, or another one, only after it failed. Each keeps the promises of the
    method of `Delivery` by the same name, and raises what that says, within the broker's `timeout`. A failure means
    that nothing was settled: the message comes again, at the latest by the transport's bound for crashes. So does what
    is settled too late, when another member has it already or the subscription has ended: that settles nothing, and
    never what another member holds.
    """

    async def ack(self, delivery: Delivery, /) -> None:
        """See `Delivery.ack`. Where the transport has no acknowledgements, do nothing."""
        ...

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """See `Delivery.retry`. *after* is in seconds, 0 for at once."""
        ...

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        """See `Delivery.dead_letter`. Aside first, and then gone from the group: never the other way round."""
        ...


@dataclass(kw_only=True, slots=True, eq=False)
class Delivery:
    """
    One message as it came from the service, and the three ways to settle it. It is settled once.

    Not settled at all is the fourth: a consumer that was cancelled or died has neither succeeded nor failed, and the
    message comes again as the transport's `redelivery` says. The body is not decoded: it may be anything.

    A message that comes again is another object of this class, and each subscription has objects of its own.
    """

    topic: Topic
    """Where it came from, one of those that were subscribed to, whatever the body says."""
    body: bytes = field(repr=False)
    """As it is in the service; empty where there is none."""
    headers: Mapping[str, str]
    """The service's own, the key among them; empty where the transport has none."""
    attempt: int
    """1 for the first delivery of this message to its group; always 1 where the transport does not count."""
    settler: Settler = field(repr=False)
    token: object = field(default=None, repr=False)
    """By what the transport knows this delivery: a tag, an offset, an entry. Nobody else looks at it, nor logs it."""
    outcome: str | None = None
    """How it was settled: `ack`, `retry`, `dead_letter`; None if it was not."""

    async def ack(self) -> None:
        """
        The work is done; it must not come again.

        Returns when the transport has taken note. It may tell the service together with others, within milliseconds,
        and at the latest when the subscription ends; if that fails, the message comes again. Does nothing where the
        transport has no acknowledgements.

        Raises:
            BrokerError: It could not be told, and comes again.
        """
        await self._settle("ack", self.settler.ack)

    async def retry(self, *, after: float = 0.0) -> None:
        """
        Have it delivered to the group again, no earlier than *after* seconds from now, as the next attempt.

        Raises:
            UnsupportedCapability: The transport cannot, or cannot with a delay.
        """
        await self._settle("retry", self.settler.retry, after)

    async def dead_letter(self, reason: str) -> None:
        """
        Put it aside, with *reason*, and deliver it no more.

        Returns when it is safely aside; only then is it taken from its group.

        Raises:
            UnsupportedCapability: The transport cannot.
            BrokerError: It could not be put aside, and comes again.
        """
        await self._settle("dead_letter", self.settler.dead_letter, reason)

    async def _settle(self, outcome: str, settle: Callable[..., Awaitable[None]], *how: object) -> None:
        if self.outcome == outcome:
            return
        if self.outcome is not None:
            raise AlreadySettled(f"this delivery was settled by {self.outcome}, and cannot be by {outcome}")
        self.outcome = outcome
        try:
            await settle(self, *how)
        except BaseException:
            self.outcome = None  # what failed has settled nothing; another way may do
            raise


@dataclass(frozen=True, kw_only=True)
class Gap:
    """
    Messages may have been missed: the transport was not listening between these two moments (aware, UTC).

    *since* is when the reader was last known to have everything, which may be before anybody noticed the loss. Too
    early is safe: whoever catches up from there does a little too much.
    """

    since: datetime
    until: datetime
    reason: str


OnGap: TypeAlias = Callable[[Gap], None]


class ReadableBroker(MessageBroker, Protocol):
    """
    A broker that can also be read from.

    It is made without a running event loop, and then used in one.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this transport promises. Told without connecting, and the same as long as the broker lives."""
        ...

    def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """
        Receive the messages of *topics*, of which there is at least one.

        On entry the subscription is ready: a message that is confirmed from now on is delivered. With *group*, each
        message goes to one of the group's members; without, to every subscription. The members of a group subscribe to
        the same topics; each group is there for each topic by itself, and settles for itself. At most *prefetch*
        deliveries are given out and not settled at any time, where the transport can be held back. It may receive some
        more ahead, and leaves enough for the other members to have work.

        A group begins where `replay` says, and collects from then on where the `subscription` is durable; a
        subscription without a group begins with its entry. Any number of subscriptions live beside each other in one
        broker, to the same topics or not, and neither holds up nor ends another.

        Cancelling a wait for the next delivery loses nothing. The iterator reconnects by itself, with growing, jittered
        pauses, and tells *on_gap* whenever messages may have been missed meanwhile. It ends only when its context does,
        or with an error that trying again does not fix: BrokerClosed, or a ConfigurationError when the settings of
        the service have changed.

        The context's end waits for nothing but what was settled to reach the service; what was not settled becomes
        available to other members at once where the transport's `redelivery` has `close`, and what was received and
        never given out was not delivered: it counts as no attempt. An error in the context's block comes out of it as
        it is.

        Raises, on entry:
            ConfigurationError: *prefetch* is below 1.
            UnsupportedCapability: The transport has no groups, or cannot do without one.
            AccessRefused: The service does not let this user read there.
            BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
            BrokerClosed: This broker was closed.
        """
        ...


class Transport(ReadableBroker, Protocol):
    """A broker that can also be opened and closed, as all of diator's can: what a program makes, and what it shares."""

    async def aclose(self) -> None:
        """Refuse further messages, end its subscriptions, and give up what it holds. Calling it again does nothing."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> bool | None: ...
