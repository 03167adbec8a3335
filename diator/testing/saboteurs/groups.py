"""Defects of routing and of consumer groups."""

from __future__ import annotations

import asyncio
import re
import struct
from collections import deque
from collections.abc import Collection
from typing import Any, ClassVar, cast

from diator.brokers.base import Delivery, Settler, Topic
from diator.brokers.message import Message
from diator.testing.saboteurs._base import FOREVER, Reading, Saboteur, Subscription, caught_by


class _Misroutes(Saboteur):
    async def send_message(self, message: Message, /) -> None:
        sent = Topic(message.message_type, message.message_name)
        for queue in self._queues:
            if any(self.also(topic, sent) for topic in queue.topics) and sent not in queue.topics:
                queue.topics.add(sent)
                for subscription in self._open_subscriptions:
                    if subscription.queue is queue:
                        subscription.topics.add(sent)
        await super().send_message(message)

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        raise NotImplementedError


@caught_by("ISO-02", "ENC-06")
class MatchesPrefixes(_Misroutes):
    """Treats the name of a topic as a prefix."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.startswith(subscribed.message_name)


@caught_by("ISO-02")
class FoldsNames(_Misroutes):
    """Treats names that differ only in case as the same name."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.lower() == subscribed.message_name.lower()


@caught_by("ENC-06")
class ReplacesCharacters(_Misroutes):
    """Replaces unusual characters of a name."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return re.sub(r"\W", "_", sent.message_name) == re.sub(r"\W", "_", subscribed.message_name)


@caught_by("SUB-14")
class IgnoresTheType(_Misroutes):
    """Routes by the message name alone."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name == subscribed.message_name


@caught_by("ISO-01", "ISO-08", "ISO-02")
class MixesTopics(_Misroutes):
    """Delivers every message to every subscription."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return True


@caught_by("GRP-02", "GRP-03", "GRP-04")
class BroadcastsToGroups(Saboteur):
    """Delivers every message to each consumer of a group."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, None, prefetch


@caught_by("GRP-01", "SUB-04")
class SharesWithoutAGroup(Saboteur):
    """Makes subscriptions without a group share the messages."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group or f"nobody's {sorted(topics)}", prefetch


@caught_by("GRP-09")
class FoldsGroups(Saboteur):
    """Treats groups whose names differ only in case as one group."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and group.lower(), prefetch


@caught_by("GRP-03", "ACK-23")
class HasOneGroup(Saboteur):
    """Treats all groups of a topic as one group."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and f"the group {sorted(topics)}", prefetch


@caught_by("SUB-12", "GRP-16", "UNR-04")
class ListensToOneTopic(Saboteur):
    """Subscribes only to the first topic."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return [*topics][:1], group, prefetch


@caught_by("GRP-17")
class FollowsTheLatestTopics(Saboteur):
    """Lets a group collect only what its latest consumer reads."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.queue.topics.intersection_update(topics)


@caught_by("GRP-17")
class DeliversWhatOthersLeft(Saboteur):
    """Delivers the messages of every topic of the group to each of its consumers."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.topics = subscription.queue.topics


@caught_by("SUB-12")
class LabelsWithOneTopic(Saboteur):
    """Delivers every message with the same topic."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.topic = min(
            topic for queue in self._queues if delivery.topic in queue.topics for topic in queue.topics
        )
        return delivery


@caught_by("FLW-02")
class IgnoresPrefetch(Saboteur):
    """Ignores the prefetch."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1_000


@caught_by("FLW-02")
class AllowsOneMore(Saboteur):
    """Delivers one message more than the prefetch allows."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1


@caught_by("FLW-01")
class DeliversOneAtATime(Saboteur):
    """Never delivers a second message before the first is settled."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, 1


class _HasOneWindow(Saboteur):
    """Has one limit on unsettled deliveries for all subscriptions together."""

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


@caught_by("FLW-17")
class CountsWaiting(Saboteur):
    """Counts a message that waits behind its key as handed out."""

    def postpone(self, subscription: Subscription, delivery: Delivery) -> None: ...

    def resume(self, subscription: Subscription, delivery: Delivery) -> bool:
        return True


@caught_by("FLW-16")
class SharesPrefetch(_HasOneWindow):
    """Has one prefetch for all subscriptions."""


@caught_by("FLW-04")
class GetsStuckWhenFull(_HasOneWindow):
    """Frees a prefetch slot only for every second acknowledgement."""

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
    """Delivers every message to the consumer that joined first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._firsts: dict[int, object] = {}

    async def read(self, subscription: Subscription) -> Delivery:
        if self._firsts.setdefault(id(subscription.queue), subscription) is not subscription:
            await asyncio.Event().wait()
        return await super().read(subscription)


@caught_by("GRP-10")
class ForgetsIdleConsumers(Starves):
    """Delivers nothing to an idle consumer after the busy one has left."""


@caught_by("SUB-21")
class CountsWhatWaits(Saboteur):
    """Counts the first message that waits for each topic as unsettled."""

    async def read(self, subscription: Subscription) -> Delivery:
        while len({entry.topic for entry in subscription.queue.waiting}) > self._room(subscription):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await super().read(subscription)

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._prefetch = prefetch
        return topics, group, prefetch

    def _room(self, subscription: Subscription) -> int:
        return self._prefetch - len(subscription.unsettled)


@caught_by("FLW-21")
class AddsUpRoom(Saboteur):
    """Adds the room of each call of `make_room` to that of the calls before."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        made, room = subscription.make_room, 0

        def make_room(deliveries: int) -> None:
            nonlocal room
            room += deliveries
            made(room)

        subscription.make_room = make_room  # type: ignore[method-assign]


@caught_by("FLW-21")
class MakesNoRoom(Saboteur):
    """Hands out no more deliveries than the prefetch, whatever `make_room` says."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        subscription.make_room = lambda deliveries: None  # type: ignore[method-assign]  # noqa: ARG005


@caught_by("FLW-23")
class ChargesThePostponed(Saboteur):
    """Counts an attempt for a delivery that was only postponed."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        for entry in subscription.unsettled.values():
            entry.attempt += 1


@caught_by("FLW-23")
class ForgetsToResume(Saboteur):
    """Counts a delivery as postponed for ever."""

    def resume(self, subscription: Subscription, delivery: Delivery) -> bool:
        return True


@caught_by("FLW-24")
class HurriesPastThePrefetch(Saboteur):
    """Hands out what is there without counting it, if nobody has to wait."""

    def reading(self, subscription: Subscription) -> Reading:
        return _Hurrying(subscription, self)


class _Hurrying(Reading):
    def receive_nowait(self) -> Delivery | None:
        try:
            entry = self._subscription.queue.waiting.popleft()
        except IndexError:
            return None
        settler = cast("Any", self._subscription)
        return Delivery(topic=entry.topic, body=entry.body, headers={}, attempt=entry.attempt, settler=settler)


@caught_by("FLW-22")
class NoticesRoomLate(Saboteur):
    """Looks for a free place only when it is asked for a delivery."""

    async def read(self, subscription: Subscription) -> Delivery:
        if len(subscription.unsettled) >= self._limit:
            await asyncio.sleep(FOREVER)
        return await super().read(subscription)

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        self._limit = prefetch
        return topics, group, prefetch


@caught_by("GRP-19")
class TakesTheBacklog(Saboteur):
    """Takes everything that waits for its group when it first reads, and hands it out one after the other."""

    async def read(self, subscription: Subscription) -> Delivery:
        if subscription not in self._hoards:
            self._hoards[subscription] = deque(subscription.queue.waiting)
            subscription.queue.waiting.clear()
        if self._hoards[subscription] and not subscription.unsettled:
            subscription.queue.requeue([self._hoards[subscription].popleft()])
        return await super().read(subscription)

    def before_unsubscribe(self, subscription: Subscription) -> None:
        subscription.queue.requeue(self._hoards.pop(subscription, ()))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._hoards: dict[Subscription, deque[Any]] = {}


@caught_by("GRP-18")
class TakesAnEmptyNameForNone(Saboteur):
    """Takes a group with an empty name for no group."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group or None, prefetch


@caught_by("SUB-21")
class LimitsEachTopic(Saboteur):
    """Applies the prefetch to each topic on its own."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch * len(topics)


@caught_by("API-12")
class PacksThePrefetch(Saboteur):
    """Sends the prefetch as a number of 16 bits."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        struct.pack(">H", max(prefetch, 0))
        return topics, group, prefetch


@caught_by("API-12")
class TakesAnyPrefetch(Saboteur):
    """Takes a prefetch below 1 for one of 1."""

    def adjust_subscription(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, max(1, prefetch)
