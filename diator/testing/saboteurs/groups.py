"""Who gets what, gone wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from typing import Any, ClassVar

from diator.brokers.base import Delivery, Settler, Topic
from diator.brokers.message import Message
from diator.testing.saboteurs._base import Saboteur, Subscription, caught_by


class _Misroutes(Saboteur):
    async def send_message(self, message: Message, /) -> None:
        sent = Topic(message.message_type, message.message_name)
        for queue in self._queues:
            if any(self.also(topic, sent) for topic in queue.topics) and sent not in queue.topics:
                queue.topics.add(sent)
        await super().send_message(message)

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        raise NotImplementedError


@caught_by("ISO-02", "ENC-06")
class MatchesPrefixes(_Misroutes):
    """Takes a name for a prefix."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.startswith(subscribed.message_name)


@caught_by("ISO-02")
class FoldsNames(_Misroutes):
    """Takes names for the same if they differ in case."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.lower() == subscribed.message_name.lower()


@caught_by("ENC-06")
class SqueezesNames(_Misroutes):
    """Replaces what it does not like in a name."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return re.sub(r"\W", "_", sent.message_name) == re.sub(r"\W", "_", subscribed.message_name)


@caught_by("SUB-14")
class IgnoresTheKind(_Misroutes):
    """Routes by name alone."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name == subscribed.message_name


@caught_by("ISO-01", "ISO-08", "ISO-02")
class Mixes(_Misroutes):
    """Gives everything to everybody."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return True


@caught_by("GRP-02", "GRP-03", "GRP-04")
class BroadcastsToGroups(Saboteur):
    """Gives every message to each subscription of a group."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, None, prefetch


@caught_by("GRP-01", "SUB-04")
class SharesWithoutAGroup(Saboteur):
    """Has those who named no group share."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group or f"nobody's {sorted(topics)}", prefetch


@caught_by("GRP-09")
class FoldsGroups(Saboteur):
    """Takes groups for the same if they differ in case."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and group.lower(), prefetch


@caught_by("GRP-03", "ACK-23")
class HasOneGroup(Saboteur):
    """Knows that there is a group, and not which."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and f"the group {sorted(topics)}", prefetch


@caught_by("SUB-12", "GRP-16", "UNR-04")
class ListensToOneTopic(Saboteur):
    """Subscribes to the first topic."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return [*topics][:1], group, prefetch


@caught_by("SUB-12")
class LabelsWithOneTopic(Saboteur):
    """Says the same topic for every delivery."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.topic = min(
            topic for queue in self._queues if delivery.topic in queue.topics for topic in queue.topics
        )
        return delivery


@caught_by("FLW-02")
class IgnoresPrefetch(Saboteur):
    """Gives out whatever there is."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1_000


@caught_by("FLW-02")
class CountsFromZero(Saboteur):
    """Gives out one too many."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1


@caught_by("FLW-01")
class GivesOneAtATime(Saboteur):
    """Never gives out a second delivery before the first is settled."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, 1


class _HasOneWindow(Saboteur):
    """Has two deliveries out at once, among all subscriptions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._room = asyncio.Semaphore(self.window)

    window: ClassVar[int] = 2

    async def read(self, subscription: Subscription) -> Delivery:
        await self._room.acquire()
        try:
            return await super().read(subscription)
        except BaseException:
            self._room.release()
            raise

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._room.release()
        await super().ack(settle, delivery)


@caught_by("FLW-16")
class SharesPrefetch(_HasOneWindow):
    """Has one prefetch for all subscriptions."""


@caught_by("FLW-04")
class GetsStuckWhenFull(_HasOneWindow):
    """Gives out ten, and forgets to make room for every second one that is settled."""

    window = 10
    _count = 0

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._count += 1
        if self._count % 2:
            await super().ack(settle, delivery)
        else:
            await settle.ack(delivery)


@caught_by("GRP-04")
class Starves(Saboteur):
    """Gives everything to the subscription that came first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._firsts: dict[int, object] = {}

    async def read(self, subscription: Subscription) -> Delivery:
        if self._firsts.setdefault(id(subscription.queue), subscription) is not subscription:
            await asyncio.Event().wait()
        return await super().read(subscription)


@caught_by("GRP-10")
class ForgetsSpareMembers(Starves):
    """Keeps a subscription asleep although the one that worked has left."""
