"""The leases of what a consumer holds: renewed while it lives, and over by its own clock when it has slept too long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from time import monotonic
from typing import Generic, TypeVar, cast

import msgspec

from diator._hints import name_of
from diator._text import counted, explained
from diator.brokers.supervisor import ResilientSubscription, end_task

logger: logging.Logger = logging.getLogger(__name__)


class Leased(msgspec.Struct, eq=False, kw_only=True):
    """
    A message that the service has lent to a consumer. A transport derives the token of its deliveries from this class.

    Attributes:
        leased_until: When its lease is over at the earliest, by `time.monotonic`, which may stand still while the
            machine is suspended.
    """

    leased_until: float = 0.0

    @property
    def is_leased(self) -> bool:
        """
        Return whether its lease lasts, so that no other consumer can have the message.

        A process that was stopped (SIGSTOP) for longer than a lease finds False when it wakes up. It may find True if
        the whole machine was suspended. If the service does not compare the holder when it settles, the settler asks
        here, in the same step that writes to the service, and settles nothing that is not leased.
        """
        return monotonic() < self.leased_until


T = TypeVar("T", bound=Leased)


class Leases(Generic[T]):
    """
    Keeps the leases of one subscription, and counts its unsettled deliveries.

    It iterates over the tokens that are held.

    Args:
        subscription: Its attribute `unsettled` is the number of held tokens from now on.
        lease: How long a lease lasts, in seconds.
        renew: Called with all held tokens, even if there are none, each time when a third of a lease is over. It
            renews their leases at the service, and returns those that are not this consumer's any more: if the service
            does not tell, those that are no longer leased (`Leased.is_leased`). They are not handed out. If it raises
            an error, the error is logged, and the next third brings another attempt.
    """

    def __init__(
        self,
        subscription: ResilientSubscription,
        lease: float,
        renew: Callable[[Collection[T]], Awaitable[Collection[T]]],
    ) -> None:
        self._subscription, self._lease, self._renew = subscription, lease, renew
        self._held: set[T] = set()
        self._keeping: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[T]:
        return iter([*self._held])  # a copy: metrics may be read in another thread

    @property
    def have_begun(self) -> bool:
        """Return whether `begin` was called: the subscription has had a connection."""
        return self._keeping is not None

    def begin(self) -> None:
        """Renew leases from now on, until `end`. A further call, of a later connection, does nothing."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="diator: renewing leases")

    def hold(self, tokens: Collection[T]) -> None:
        """
        Keep the leases of *tokens*, and count these as unsettled.

        A lease begins now, unless the transport has set `leased_until`: because the message was pushed earlier, or
        because nothing but this clock is the fence, and the service counts from before its answer.
        """
        until = monotonic() + self._lease
        for token in tokens:
            token.leased_until = token.leased_until or until
        self._held.update(tokens)
        self._subscription.unsettled = len(self._held)

    def release(self, token: T) -> None:
        """
        Renew the lease of *token* no longer, and make room for the next delivery.

        Call it before the message is settled. If settling fails, the lease runs out and the message is redelivered.
        `end` does not return *token*.
        """
        self._held.discard(token)
        self._subscription.unsettled = len(self._held)
        self._subscription.notify_settled()

    async def end(self) -> Collection[T]:
        """Renew nothing any more. Return what is still held, for the service to give to others at once."""
        if self._keeping is not None:
            await end_task(self._keeping)
        return self._held

    async def _keep(self) -> None:
        """Renew the leases for as long as this process lives, however long a handler takes."""
        while True:
            await asyncio.sleep(self._lease / 3)
            held = {*self._held}
            try:
                await self._renew_all(held)
            except Exception as error:  # noqa: BLE001  # whatever failed, there is time for another attempt
                logger.warning(
                    "the leases of %s could not be renewed: %s",
                    counted(len(held), "message"),
                    explained(error),
                    extra={**self._subscription.log_fields, "messages": len(held), "error_type": name_of(type(error))},
                )

    async def _renew_all(self, held: set[T]) -> None:
        until = monotonic() + self._lease
        lost = {*await self._renew(held)}
        for token in held - lost:
            token.leased_until = until
        if lost:
            for delivery in self._subscription.remove_prefetched(lambda delivery: delivery.token in lost):
                self.release(cast("T", delivery.token))
