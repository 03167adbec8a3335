"""Subscriptions gone wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any

from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import decode
from diator.brokers.message import Message
from diator.exceptions import BrokerUnavailable
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by, fields_of, subscription_of, topic_of

# -- joining -----------------------------------------------------------------------------------------------------


@caught_by("SUB-01")
class IsReadyLater(Saboteur):
    """Subscribes when it is first read from."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._later = [] if group else [*topics]
        return (topics if group else []), group, prefetch

    async def read(self, subscription: Subscription) -> Delivery:
        subscription.queue.topics |= set(self._later)
        return await super().read(subscription)


@caught_by("GRP-05")
class StumblesOverJoining(Saboteur):
    """Loses what waits when a subscription joins."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.queue.waiting.clear()


@caught_by("SUB-04", "SUB-17", "SUB-05")
class KeepsOneSubscription(Saboteur):
    """Has one subscription a topic: the last."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        for queue in self._queues:
            if queue is not subscription.queue:
                queue.topics -= set(topics)


@caught_by("SUB-16")
class SubscribesWhenClosed(Saboteur):
    """Opens again to subscribe."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._closed = False
        return topics, group, prefetch


@caught_by("SUB-19")
class ShowsThePast(Saboteur):
    """Gives a new subscription what was sent before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._past: list[Message] = []

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._past.append(message)

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        others = {queue: {*queue.topics} for queue in self._queues if queue is not subscription.queue}
        for queue in others:
            queue.topics.clear()
        for message in self._past[-3:]:
            if topic_of(message) in topics:
                await super().send_message(message)
        for queue, own in others.items():
            queue.topics |= own


@caught_by("SUB-20")
class EntersUncancellably(Saboteur):
    """Goes on subscribing when that is cancelled."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.005)


@caught_by("SUB-10")
class LeavesAGhost(Saboteur):
    """Keeps the messages of a subscription that was cancelled while it joined its group."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(30, subscription.queue.requeue, [*subscription.queue.waiting])
            subscription.queue.waiting.clear()
            raise


@caught_by("SUB-08", "UNR-06")
class HasFewSubscriptions(Saboteur):
    """Has a limit that it does not tell."""

    _count = 0

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        self._count += 1
        try:
            if self._count > 8:  # noqa: PLR2004
                raise BrokerUnavailable("too many subscriptions")
            async with super().subscribe(topics, **options) as deliveries:
                yield deliveries
        finally:
            self._count -= 1


# -- reading -----------------------------------------------------------------------------------------------------


@caught_by("SUB-15")
class EndsWhenIdle(Saboteur):
    """Ends when nothing came for a moment."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await asyncio.wait_for(super().read(subscription), 0.005)
        except TimeoutError:
            raise StopAsyncIteration from None


@caught_by("SUB-13")
class LosesWithAWait(Saboteur):
    """Takes a delivery along when waiting for it is cancelled."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        del subscription_of(delivery.settler).unsettled[delivery]
        await asyncio.sleep(0)
        return delivery


@caught_by("SUB-03")
class GoesOnReading(Saboteur):
    """Reads from its latest subscription even when it is over."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        self._latest = subscription

    async def read(self, subscription: Subscription) -> Delivery:
        return await super().read(self._latest)


@caught_by("HDR-09")
class GivesAllTheSame(Saboteur):
    """Gives every subscription one and the same delivery."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._given: dict[bytes, Delivery] = {}

    async def deliver(self, delivery: Delivery) -> Delivery:
        return self._given.setdefault(delivery.body, delivery)


@caught_by("PSN-01", "PSN-02", "PSN-06")
class DiesOfGarbage(Saboteur):
    """Cannot give out what it cannot read."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        decode(delivery.body)
        return delivery


@caught_by("PSN-01", "PSN-02")
class SkipsGarbage(Saboteur):
    """Acknowledges what it cannot read, and tells nobody."""

    async def read(self, subscription: Subscription) -> Delivery:
        while True:
            delivery = await super().read(subscription)
            try:
                decode(delivery.body)
            except ValueError:
                await delivery.ack()
            else:
                return delivery


@caught_by("PSN-03")
class SkipsStrangers(Saboteur):
    """Acknowledges what is of another name than its topic, and tells nobody."""

    async def read(self, subscription: Subscription) -> Delivery:
        while True:
            delivery = await super().read(subscription)
            if fields_of(delivery.body).get("message_name", delivery.topic.message_name) == delivery.topic.message_name:
                return delivery
            await delivery.ack()


# -- leaving -----------------------------------------------------------------------------------------------------


@caught_by("PUB-02", "GRP-08", "ACK-05", "GRP-09")
class ForgetsGroups(Saboteur):
    """Ends a group with its last subscription."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        if group is not None and (queue := self._groups.pop(group, None)):
            self._queues.remove(queue)


@caught_by("ACK-05", "ACK-14", "LIF-12")
class ForgetsWhatIsHeld(Saboteur):
    """Loses at the end of a subscription what was not settled, and what it had read ahead."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.unsettled.clear()

    async def read(self, subscription: Subscription) -> Delivery:
        delivery = await super().read(subscription)
        if len(self._queues) == 1 and len(subscription.queue.waiting) > 20:  # noqa: PLR2004
            await anext(subscription)
        return delivery


@caught_by("ACK-14", "LIF-11")
class HandsOverLate(Saboteur):
    """Leaves what was not settled to the bound for crashes."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        asyncio.get_running_loop().call_later(30, subscription.queue.requeue, [*subscription.unsettled.values()])
        subscription.unsettled.clear()


@caught_by("GRP-06", "LIF-11")
class TakesAlong(Saboteur):
    """Takes what is waiting along when a subscription leaves."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.queue.waiting.clear()


@caught_by("SUB-17")
class UnsubscribesAll(Saboteur):
    """Ends all subscriptions to a topic with one."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        for queue in self._queues:
            queue.topics -= set(topics)


@caught_by("SUB-18", "ISO-04")
class SwallowsTheProgramsErrors(Saboteur):
    """Ends a subscription's block as if nothing had been raised."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            with suppress(LookupError):
                yield deliveries


# -- nobody there ------------------------------------------------------------------------------------------------


@caught_by("UNR-01")
class DropsWhatNobodyWants(Saboteur):
    """Keeps nothing for a later subscription."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._kept.take_all([topic_of(message)])


@caught_by("UNR-03")
class WaitsForADestination(Saboteur):
    """Waits until somebody subscribes."""

    async def send_message(self, message: Message, /) -> None:
        while not any(topic_of(message) in queue.topics for queue in self._queues):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await super().send_message(message)
