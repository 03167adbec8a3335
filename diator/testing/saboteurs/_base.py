"""The base class of saboteurs: a healthy broker with methods to override for each kind of defect."""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

from diator.brokers.base import Delivery, OnGap, Settler, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import Message
from diator.consumer import Consumer

S = TypeVar("S", bound="type[Saboteur]")

SABOTEURS: list[type[Saboteur]] = []
"""All saboteurs, in the order in which they are registered."""

FOREVER = 3600.0


class Queue(Protocol):
    """The queue of one group in the in-memory broker."""

    topics: set[Topic]
    waiting: deque[Any]

    def requeue(self, entries: Collection[Any]) -> None: ...


class Subscription(Protocol):
    """A subscription of the in-memory broker. Saboteurs may use only this and `Queue` of its internals."""

    queue: Queue
    topics: set[Topic]
    unsettled: dict[Delivery, Any]

    async def __anext__(self) -> Delivery: ...

    def postpone(self, delivery: Delivery) -> None: ...

    def resume(self, delivery: Delivery) -> bool: ...

    def leave(self) -> None: ...

    def make_room(self, deliveries: int) -> None: ...


class Saboteur(MemoryMessageBroker):
    """
    The in-memory broker without a defect, with methods that a subclass overrides to add one.

    Several saboteurs can use one service (`share_service`), as brokers that are connected to it over a network.

    Attributes:
        caught_by: The ids of the scenarios that fail because of the defect.
        consumer: The consumer class that runs on this broker, for defects of a consumer.
    """

    caught_by: ClassVar[tuple[str, ...]] = ()
    consumer: ClassVar[type[Consumer]] = Consumer

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._open_subscriptions: weakref.WeakSet[Any] = weakref.WeakSet()

    def share_service(self, other: Saboteur) -> Self:
        """Use the queues of *other*, and return this broker."""
        self._kept, self._groups = other._kept, other._groups
        self._queues, self._dead_letters = other._queues, other._dead_letters
        return self

    def crash(self) -> None:
        """Crash as with the process: the service redelivers the unsettled messages and receives nothing more."""
        self._closed = True
        for subscription in self._open_subscriptions:
            self.on_crash(subscription)

    async def aclose(self) -> None:
        """Close the broker. As over a network, its unsettled messages are redelivered to other consumers at once."""
        await super().aclose()
        for subscription in self._open_subscriptions:
            self.on_close(subscription)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the in-memory broker, and a service that several brokers share over a network."""
        return replace(super().capabilities, multi_process=True, network=True)

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """Subscribe; see `ReadableBroker.subscribe`."""
        topics, group, prefetch = self.adjust_subscription(topics, group, prefetch)
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            subscription = cast("Subscription", deliveries)
            if group is None:
                subscription.topics = subscription.queue.topics  # it receives whatever a defect puts into its queue
            self._open_subscriptions.add(subscription)
            await self.on_subscribed(subscription, topics)
            yield self.reading(subscription)
            self.before_unsubscribe(subscription)
        self.after_unsubscribe(subscription, topics, group)

    # -- methods for defects -------------------------------------------------------------------------------------

    def adjust_subscription(
        self, topics: Collection[Topic], group: str | None, prefetch: int
    ) -> tuple[Collection[Topic], str | None, int]:
        """Return the topics, group and prefetch to use instead of the requested ones."""
        return topics, group, prefetch

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        """Run before *subscription* is ready."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        """Run before *subscription* ends."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        """Run after *subscription* has ended."""

    def on_crash(self, subscription: Subscription) -> None:
        """Do what the service does when the process of *subscription* has crashed."""
        subscription.leave()
        if subscription.queue not in self._groups.values():
            subscription.queue.topics.clear()  # nobody collects for it any more

    def on_close(self, subscription: Subscription) -> None:
        """Do what the service does when the broker of *subscription* is closed."""
        subscription.queue.requeue(subscription.unsettled.values())
        subscription.unsettled.clear()

    def reading(self, subscription: Subscription) -> Reading:
        """Return the iterator of *subscription*."""
        return Reading(subscription, self)

    async def read(self, subscription: Subscription) -> Delivery:
        """Wait for the next delivery of *subscription*."""
        delivery = await anext(subscription)
        delivery.settler = Settling(self, delivery)
        return await self.deliver(delivery)

    async def deliver(self, delivery: Delivery) -> Delivery:
        """Return the delivery to hand out for *delivery*."""
        return delivery

    def postpone(self, subscription: Subscription, delivery: Delivery) -> None:
        """Count *delivery* as prefetched."""
        subscription.postpone(delivery)

    def resume(self, subscription: Subscription, delivery: Delivery) -> bool:
        """Count *delivery* as handed out again."""
        return subscription.resume(delivery)

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        """Acknowledge *delivery*."""
        await settle.ack(delivery)

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        """Requeue *delivery*."""
        await settle.retry(delivery, after)

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        """Dead-letter *delivery*."""
        await settle.dead_letter(delivery, reason)


class Reading:
    """An iterator that reads through the methods of its broker."""

    def __init__(self, subscription: Subscription, broker: Saboteur) -> None:
        self._subscription = subscription
        self._broker = broker

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        return await self._broker.read(self._subscription)

    def postpone(self, delivery: Delivery) -> None:
        self._broker.postpone(self._subscription, _original(delivery))

    def resume(self, delivery: Delivery) -> bool:
        return self._broker.resume(self._subscription, _original(delivery))

    def make_room(self, deliveries: int) -> None:
        self._subscription.make_room(deliveries)


def _original(delivery: Delivery) -> Delivery:
    """Return the delivery of the in-memory broker that a saboteur has made *delivery* of."""
    return delivery.settler.delivery if isinstance(delivery.settler, Settling) else delivery


class Settling:
    """Settles the original delivery of the in-memory broker, whatever the saboteur has made of it."""

    def __init__(self, broker: Saboteur, delivery: Delivery) -> None:
        self.inner = delivery.settler
        self._broker = broker
        self.delivery = delivery

    async def ack(self, _: Delivery, /) -> None:
        await self._broker.ack(self.inner, self.delivery)

    async def retry(self, _: Delivery, after: float, /) -> None:
        await self._broker.retry(self.inner, self.delivery, after)

    async def dead_letter(self, _: Delivery, reason: str, /) -> None:
        await self._broker.dead_letter(self.inner, self.delivery, reason)


def caught_by(*ids: str) -> Callable[[S], S]:
    """Register a saboteur that the scenarios *ids* catch."""

    def register(saboteur: S) -> S:
        saboteur.caught_by = ids
        SABOTEURS.append(saboteur)
        return saboteur

    return register


def subscription_of(settler: Settler) -> Subscription:
    """Return the subscription of a delivery with *settler*."""
    inner = settler.inner if isinstance(settler, Settling) else settler
    return cast("Subscription", inner)


def topic_of(message: Message) -> Topic:
    """Return the topic of *message*."""
    return Topic(message.message_type, message.message_name)


def copy_of(delivery: Delivery, **changes: Any) -> Delivery:
    """Return another delivery of the same message, with *changes*."""
    values = {name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler", "token")}
    return Delivery(**{**values, **changes})


def fields_of(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*; empty if it is not one."""
    with suppress(ValueError, RecursionError):
        value: object = json.loads(body)
        if isinstance(value, dict):
            return value
    return {}
