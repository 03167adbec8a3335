"""Defects of subscriptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import decode
from diator.brokers.message import Message
from diator.exceptions import BrokerUnavailable, MessageRejected
from diator.testing.saboteurs._base import (
    FOREVER,
    Saboteur,
    Subscription,
    caught_by,
    fields_of,
    subscription_of,
    topic_of,
)

# -- joining -----------------------------------------------------------------------------------------------------


@caught_by("SUB-01")
class IsReadyLater(Saboteur):
    """Subscribes only when a message is first awaited."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._later = [] if group else [*topics]
        return (topics if group else []), group, prefetch

    async def read(self, subscription: Subscription) -> Delivery:
        subscription.queue.topics |= set(self._later)
        return await super().read(subscription)


@caught_by("GRP-05")
class LosesOnJoin(Saboteur):
    """Loses the waiting messages when a consumer joins a group."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.queue.waiting.clear()


@caught_by("SUB-04", "SUB-17", "SUB-05")
class KeepsOneSubscription(Saboteur):
    """Keeps only the last subscription to a topic."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        for queue in self._queues:
            if queue is not subscription.queue:
                queue.topics -= set(topics)


@caught_by("SUB-16")
class SubscribesWhenClosed(Saboteur):
    """Opens again to subscribe after its close."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._closed = False
        return topics, group, prefetch


@caught_by("SUB-19")
class ReplaysThePast(Saboteur):
    """Delivers messages to a new subscription that were sent before it."""

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
    """Continues to subscribe when that is cancelled."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.005)


@caught_by("SUB-10")
class LeavesAGhost(Saboteur):
    """Keeps the messages of a consumer that was cancelled while it joined its group."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(30, subscription.queue.requeue, [*subscription.queue.waiting])
            subscription.queue.waiting.clear()
            raise


@caught_by("SUB-08", "UNR-06")
class HasFewSubscriptions(Saboteur):
    """Has a limit on subscriptions that it does not declare."""

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
    """Ends the iterator when no message arrives for a moment."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await asyncio.wait_for(super().read(subscription), 0.005)
        except TimeoutError:
            raise StopAsyncIteration from None


@caught_by("SUB-13")
class LosesWithAWait(Saboteur):
    """Loses a delivery when the wait for it is cancelled."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        del subscription_of(delivery.settler).unsettled[delivery]
        await asyncio.sleep(0)
        return delivery


@caught_by("SUB-22")
class IsReadOnlyByAnext(Saboteur):
    """Returns an object that `anext` reads, and `async for` refuses."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield cast("AsyncIterator[Delivery]", _OnlyAnext(deliveries))


class _OnlyAnext:
    def __init__(self, deliveries: AsyncIterator[Delivery]) -> None:
        self._deliveries = deliveries

    async def __anext__(self) -> Delivery:
        return await anext(self._deliveries)


@caught_by("SUB-13")
class CountsCancelledWaits(Saboteur):
    """Counts each cancelled wait for a delivery as an unsettled delivery."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await super().read(subscription)
        except asyncio.CancelledError:
            subscription.unsettled[cast(Delivery, object())] = None
            raise


@caught_by("SUB-03")
class KeepsReading(Saboteur):
    """Keeps reading from its latest subscription after its end."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        self._latest = subscription

    async def read(self, subscription: Subscription) -> Delivery:
        return await super().read(self._latest)


@caught_by("HDR-09")
class DeliversOneObject(Saboteur):
    """Delivers one and the same object to every subscription."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._given: dict[bytes, Delivery] = {}

    async def deliver(self, delivery: Delivery) -> Delivery:
        return self._given.setdefault(delivery.body, delivery)


@caught_by("PSN-01", "PSN-02", "PSN-06")
class FailsOnGarbage(Saboteur):
    """Raises when it receives a body that it cannot decode."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        decode(delivery.body)
        return delivery


@caught_by("PSN-01", "PSN-02")
class SkipsGarbage(Saboteur):
    """Silently acknowledges a body that it cannot decode."""

    async def read(self, subscription: Subscription) -> Delivery:
        while True:
            delivery = await super().read(subscription)
            try:
                decode(delivery.body)
            except ValueError:
                await delivery.ack()
            else:
                return delivery


@caught_by("FRN-07")
class SkipsUnknownNames(Saboteur):
    """Silently acknowledges a message whose name differs from its topic."""

    async def read(self, subscription: Subscription) -> Delivery:
        while True:
            delivery = await super().read(subscription)
            if fields_of(delivery.body).get("message_name", delivery.topic.message_name) == delivery.topic.message_name:
                return delivery
            await delivery.ack()


# -- leaving -----------------------------------------------------------------------------------------------------


@caught_by("PUB-02", "GRP-08", "ACK-05", "GRP-09")
class ForgetsGroups(Saboteur):
    """Deletes a group when its last consumer leaves."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        if group is not None and (queue := self._groups.pop(group, None)):
            self._queues.remove(queue)


@caught_by("ACK-05", "ACK-14", "LIF-12")
class LosesUnsettled(Saboteur):
    """Loses unsettled and prefetched messages at the end of a subscription."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.unsettled.clear()

    async def read(self, subscription: Subscription) -> Delivery:
        delivery = await super().read(subscription)
        if len(self._queues) == 1 and len(subscription.queue.waiting) > 20:  # noqa: PLR2004
            await anext(subscription)
        return delivery


@caught_by("ACK-14", "LIF-11")
class HandsOverLate(Saboteur):
    """Redelivers unsettled messages only after the bound for crashes."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        asyncio.get_running_loop().call_later(30, subscription.queue.requeue, [*subscription.unsettled.values()])
        subscription.unsettled.clear()


@caught_by("GRP-06", "LIF-11")
class LosesOnLeave(Saboteur):
    """Loses the waiting messages when a consumer leaves."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.queue.waiting.clear()


@caught_by("SUB-17")
class UnsubscribesAll(Saboteur):
    """Ends all subscriptions to a topic together with one."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        for queue in self._queues:
            queue.topics -= set(topics)


@caught_by("LIF-22")
class StealsAfterItsEnd(Saboteur):
    """Takes the messages that wait for the next consumer of its group, after its subscription has ended."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await super().read(subscription)
        except StopAsyncIteration:
            if not subscription.queue.waiting:
                raise
            entry = subscription.queue.waiting.popleft()
            return Delivery(topic=entry.topic, body=entry.body, headers={}, attempt=1, settler=cast(Any, None))


@caught_by("LIF-22")
class LetsOthersWait(Saboteur):
    """Ends a subscription, and lets the task that waits for its next delivery wait for ever."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await super().read(subscription)
        except StopAsyncIteration:
            await asyncio.sleep(FOREVER)
            raise


@caught_by("UNR-12")
class CollectsForTheGone(Saboteur):
    """Collects messages for subscriptions without a group that have ended."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        if group is None:
            self._queues.append(cast(Any, subscription.queue))


@caught_by("SUB-18", "ISO-04")
class SwallowsTheProgramsErrors(Saboteur):
    """Swallows an error in a subscription's block."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            with suppress(LookupError):
                yield deliveries


# -- unroutable --------------------------------------------------------------------------------------------------


@caught_by("UNR-01")
class DropsUnroutable(Saboteur):
    """Keeps no message for a later subscription."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._kept.take_all([topic_of(message)])


@caught_by("UNR-07")
class HandsOverTooLate(Saboteur):
    """Delivers what was retained after the messages that arrive during the subscribe."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        retained = [*subscription.queue.waiting]
        subscription.queue.waiting.clear()
        await asyncio.sleep(0)
        subscription.queue.waiting.extend(retained)


@caught_by("UNR-08")
class SharesOutWhatItRetained(Saboteur):
    """Lets a new group take messages that wait for another one."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        for queue in self._queues:
            if queue is not subscription.queue and not subscription.queue.waiting:
                subscription.queue.waiting.extend(queue.take_all(topics)[:10])


@caught_by("UNR-15")
class RetainsForOneTopic(Saboteur):
    """Drops everything that is retained when the first group of any topic comes."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        self._kept.waiting.clear()


@caught_by("UNR-12")
class CollectsAfterAnError(Saboteur):
    """Collects messages for subscriptions that have ended with an error of the program."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        try:
            async with super().subscribe(topics, group=group, **options) as deliveries:
                yield deliveries
        except LookupError:
            self.adjust_group(topics)
            raise

    def adjust_group(self, topics: Collection[Topic]) -> None:
        """Make a queue that nobody reads."""
        queue = type(self._kept)()
        queue.topics |= set(topics)
        self._queues.append(queue)


@caught_by("UNR-09")
class RetainsOnlyTheLatest(Saboteur):
    """Drops the oldest retained message to make room."""

    async def send_message(self, message: Message, /) -> None:
        if len(self._kept) >= self._capacity:
            self._kept.take()
        await super().send_message(message)


@caught_by("UNR-14")
class HasOneBound(Saboteur):
    """Accepts no message of any topic while there is no room to retain one."""

    async def send_message(self, message: Message, /) -> None:
        if len(self._kept) >= self._capacity:
            raise MessageRejected("there is no room", message_id=message.message_id)
        await super().send_message(message)


@caught_by("UNR-10")
class RetainsAnewAfterACrash(Saboteur):
    """Gives the messages of a crashed consumer to the next group that comes."""

    def on_crash(self, subscription: Subscription) -> None:
        super().on_crash(subscription)
        for entry in [*subscription.queue.waiting]:
            self._kept.put(entry)
        subscription.queue.waiting.clear()


@caught_by("UNR-11")
class RetainsForAnybody(Saboteur):
    """Gives retained messages to a subscription without a group."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.queue.waiting.extend(self._kept.take_all(topics))


@caught_by("UNR-03")
class WaitsForADestination(Saboteur):
    """Waits in a send until somebody subscribes."""

    async def send_message(self, message: Message, /) -> None:
        while not any(topic_of(message) in queue.topics for queue in self._queues):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await super().send_message(message)
