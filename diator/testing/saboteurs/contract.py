"""Defects: promises that are not kept, or kept differently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import DiatorError
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by, subscription_of


@caught_by("API-02", "GRP-14")
class AcceptsWhatItCannot(Saboteur):
    """Promises no groups, and accepts them anyway."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, distribution=frozenset({"broadcast"}), subscription="ephemeral")


@caught_by("API-10")
class GuessesItsCapabilities(Saboteur):
    """Promises capabilities that need others, which it does not promise."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, settlement="none", receipt="none")


@caught_by("API-03")
class ChangesItsMind(Saboteur):
    """Changes its promises once it is connected."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ordering="none" if self._queues else "destination")


@caught_by("API-04")
class HasOtherDefaults(Saboteur):
    """Has a default prefetch of one."""

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 1,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield deliveries


@caught_by("API-07")
class CallsFromAnotherThread(Saboteur):
    """Calls the event loop from another thread, which only the debug mode notices."""

    async def send_message(self, message: Message, /) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(lambda: loop.call_soon(int))
        await super().send_message(message)


@caught_by("API-11")
class ClaimsToBeTransactional(Saboteur):
    """Claims to be an outbox."""

    transactional = True


@caught_by("UNR-01", "UNR-02")
class ReportsNothing(Saboteur):
    """Promises to report unroutable messages, and does not."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, unroutable="reported")


@caught_by("ACK-12")
class RedeliversSlowWork(Saboteur):
    """Redelivers a message that a consumer is still working on."""

    @property
    def capabilities(self) -> Capabilities:
        redelivery = frozenset({*super().capabilities.redelivery, "deadline"})
        return replace(super().capabilities, redelivery=redelivery, redelivery_bound=0.1)

    async def deliver(self, delivery: Delivery) -> Delivery:
        asyncio.get_running_loop().call_later(0.1, self._redeliver, delivery)
        return delivery

    @staticmethod
    def _redeliver(delivery: Delivery) -> None:
        subscription = subscription_of(delivery.settler)
        if entry := subscription.unsettled.pop(delivery, None):
            subscription.queue.requeue([entry])


@caught_by("PUB-06")
class BatchesCarelessly(Saboteur):
    """Silently skips messages of a batch that cannot be sent."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        for message in messages:
            with suppress(DiatorError):
                await self.send_message(message)


@caught_by("ISO-09")
class HasOneConnection(Saboteur):
    """Shares one connection among all brokers, and takes it from the others to subscribe."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._own: list[object] = []

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        self._own.append(subscription.queue)
        for queue in self._queues:
            if queue not in self._own:
                queue.topics.clear()
