"""Defects of the order of messages."""

from __future__ import annotations

from diator.brokers.base import Delivery, Settler
from diator.brokers.message import Message
from diator.testing.saboteurs import content
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by


@caught_by("ORD-01", "ORD-02", "ORD-07", "ORD-09")
class SwapsNeighbours(Saboteur):
    """Lets every tenth message be overtaken by the next one."""

    _count = 0
    _held: Message | None = None

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10 == 0 and self._held is None:
            self._held = message
            return
        await super().send_message(message)
        if held := self._held:
            self._held = None
            await super().send_message(held)


@caught_by("ORD-02")
class SwapsKeys(Saboteur):
    """Keeps the order of a topic and not of a key."""

    _count = 0
    _held: Message | None = None

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if message.key is not None and self._count % 10 == 0 and self._held is None:
            self._held = message
            return
        if (held := self._held) and held.key == message.key:
            self._held = None
            await super().send_message(held)
        await super().send_message(message)
        if held := self._held:
            self._held = None
            await super().send_message(held)


@caught_by("ORD-03")
class HidesKeys(content.DropsKeys):
    """Hides the key from the consumer, so that the consumer cannot keep an order."""


@caught_by("ORD-10")
class ReordersOnRetry(Saboteur):
    """Reverses the queue when a message is requeued."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        for queue in self._queues:
            queue.waiting.reverse()
        await super().retry(settle, delivery, after)


@caught_by("ORD-11")
class ReordersOnLeave(Saboteur):
    """Returns in any order what a consumer had prefetched."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.unsettled = dict(reversed(subscription.unsettled.items()))
