"""The broker that saboteurs are made of: healthy, with a place for each kind of defect."""

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
"""All of them, in the order of the catalogue of their files."""

FOREVER = 3600.0


class Queue(Protocol):
    """What waits for the members of one group, as the broker inside has it."""

    topics: set[Topic]
    waiting: deque[Any]

    def requeue(self, entries: Collection[Any]) -> None: ...


class Subscription(Protocol):
    """One subscription, as the broker inside has it. This and `Queue` are all that a saboteur may know of it."""

    queue: Queue
    topics: set[Topic]
    unsettled: dict[Delivery, Any]

    async def __anext__(self) -> Delivery: ...

    def leave(self) -> None: ...


class Saboteur(MemoryMessageBroker):
    """
    The broker inside the process, with places where a subclass puts its defect. This one has none.

    Several of them can be `share_service` each other on one service, as those are that talk to one over a network.
    """

    caught_by: ClassVar[tuple[str, ...]] = ()
    """The ids of the scenarios that fail for it."""
    consumer: ClassVar[type[Consumer]] = Consumer
    """What runs above it: a defect of the consumer is put here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._open_subscriptions: weakref.WeakSet[Any] = weakref.WeakSet()

    def share_service(self, other: Saboteur) -> Self:
        """Use the queues of *other*."""
        self._kept, self._groups = other._kept, other._groups
        self._queues, self._dead_letters = other._queues, other._dead_letters
        return self

    def crash(self) -> None:
        """Die as with the process: the service gives to others what was not settled, and hears nothing more."""
        self._closed = True
        for subscription in self._open_subscriptions:
            self.on_crash(subscription)

    async def aclose(self) -> None:
        """See `MessageBroker.aclose`: others have at once what was not settled, as over a network."""
        await super().aclose()
        for subscription in self._open_subscriptions:
            self.on_close(subscription)

    @property
    def capabilities(self) -> Capabilities:
        """What the broker inside promises, and that several share a service, as over a network."""
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
        """See `ReadableBroker.subscribe`."""
        topics, group, prefetch = self.adjust_subscription(topics, group, prefetch)
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            subscription = cast("Subscription", deliveries)
            subscription.topics = subscription.queue.topics  # whatever a defect puts into its queue, it takes
            self._open_subscriptions.add(subscription)
            await self.on_subscribed(subscription, topics)
            yield _Reading(subscription, self.read)
            self.before_unsubscribe(subscription)
        self.after_unsubscribe(subscription, topics, group)

    # -- places for defects --------------------------------------------------------------------------------------

    def adjust_subscription(
        self, topics: Collection[Topic], group: str | None, prefetch: int
    ) -> tuple[Collection[Topic], str | None, int]:
        """Say what is subscribed to, where that was asked for."""
        return topics, group, prefetch

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        """Do something before a subscription is said to be ready."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        """Do something before a subscription ends."""

    def after_unsubscribe(self, subscription: Subscription, topics: Collection[Topic], group: str | None) -> None:
        """Do something after it."""

    def on_crash(self, subscription: Subscription) -> None:
        """Do what the service does for a subscription whose process is gone."""
        subscription.leave()

    def on_close(self, subscription: Subscription) -> None:
        """Do what becomes of a subscription whose broker is closed."""
        subscription.queue.requeue(subscription.unsettled.values())
        subscription.unsettled.clear()

    async def read(self, subscription: Subscription) -> Delivery:
        """Wait for the next delivery."""
        delivery = await anext(subscription)
        delivery.settler = Settling(self, delivery)
        return await self.deliver(delivery)

    async def deliver(self, delivery: Delivery) -> Delivery:
        """Say what is given out for *delivery*."""
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        """Acknowledge."""
        await settle.ack(delivery)

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        """Give back."""
        await settle.retry(delivery, after)

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        """Put aside."""
        await settle.dead_letter(delivery, reason)


class _Reading:
    """An iterator that reads as its broker does."""

    def __init__(self, subscription: Subscription, read: Callable[[Subscription], Any]) -> None:
        self._subscription = subscription
        self._read = read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        delivery: Delivery = await self._read(self._subscription)
        return delivery


class Settling:
    """Settles the delivery that the broker inside gave, whatever was made of it."""

    def __init__(self, broker: Saboteur, delivery: Delivery) -> None:
        self.inner = delivery.settler
        self._broker = broker
        self._delivery = delivery

    async def ack(self, _: Delivery, /) -> None:
        await self._broker.ack(self.inner, self._delivery)

    async def retry(self, _: Delivery, after: float, /) -> None:
        await self._broker.retry(self.inner, self._delivery, after)

    async def dead_letter(self, _: Delivery, reason: str, /) -> None:
        await self._broker.dead_letter(self.inner, self._delivery, reason)


def caught_by(*ids: str) -> Callable[[S], S]:
    """Register a saboteur that fails the scenarios *ids*."""

    def register(saboteur: S) -> S:
        saboteur.caught_by = ids
        SABOTEURS.append(saboteur)
        return saboteur

    return register


def subscription_of(settler: Settler) -> Subscription:
    """Give the subscription that a delivery with this settler came by."""
    inner = settler.inner if isinstance(settler, Settling) else settler
    return cast("Subscription", inner)


def topic_of(message: Message) -> Topic:
    """Give where *message* goes to."""
    return Topic(message.message_type, message.message_name)


def again(delivery: Delivery, **changes: Any) -> Delivery:
    """Make another delivery of the same message."""
    values = {name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler", "token")}
    return Delivery(**{**values, **changes})


def fields_of(body: bytes) -> dict[str, Any]:
    """Read *body* as the JSON object that it should be; empty if it is none."""
    with suppress(ValueError, RecursionError):
        value: object = json.loads(body)
        if isinstance(value, dict):
            return value
    return {}
