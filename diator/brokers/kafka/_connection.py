"""One connection to Kafka that reads, while it lives."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition, errors

from diator.brokers.base import Delivery
from diator.brokers.kafka._client import close_client, end_tasks
from diator.brokers.kafka._errors import CLIENT_ERRORS
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import Partition, Record, Subscription
from diator.exceptions import BrokerUnavailable

logger: logging.Logger = logging.getLogger(__name__)

_COORDINATING = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")
_LOOK_AGAIN = 1.0
"""How often, in seconds, it is looked whether topics have changed, as far as the client has heard."""


class Connection(ABC):
    """One consumer of aiokafka, while it lives."""

    def __init__(self, subscription: Subscription, consumer: Any) -> None:
        self.subscription = subscription
        self.consumer = consumer
        self.partitions: dict[TopicPartition, Partition] = {}
        self.generation = 0
        self.topics: Sequence[str] = ()
        self._paused: set[TopicPartition] = set()
        self._coming: asyncio.Future[None] | None = None
        self._is_woken = False
        self._heard = False
        self._next_look = 0.0
        self._was_connected = True
        subscription.wake = self.wake

    @abstractmethod
    async def begin(self, topics: Sequence[str]) -> None:
        """Read *topics* from now on."""

    @property
    def is_readable(self) -> bool:
        """Whether what the client has now is ours."""
        return True

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while True:
            self._is_woken = False
            if self._heard:
                self._heard = False
                return []
            if ready := self.subscription.take_ready(most):
                return ready
            await self._look_now_and_then()
            self._hold_back()
            try:
                if (deliveries := await self._what_is_there(most)) is None:
                    await self._what_comes()
                elif deliveries:
                    return deliveries
            except errors.OffsetOutOfRangeError as error:
                await self._skip_what_is_gone(error)
            except errors.NoOffsetForPartitionError:
                logger.debug("a partition had no offset yet")  # it has one by now: see `on_partitions_assigned`

    async def _what_is_there(self, most: int) -> list[Delivery] | None:
        """
        Give what is to be handled of what the client has already; None if it has nothing.

        Of a new assignment it has to wait, until we know where that begins.
        """
        if not self.is_readable:
            return None
        generation, deliveries = self.generation, list[Delivery]()
        records: Mapping[TopicPartition, list[Record]] = await self.consumer.getmany(max_records=most)
        if generation == self.generation:  # else it was read of what was ours then; whoever has it now reads it again
            for place, of_partition in records.items():
                if partition := self.partitions.get(place):
                    self.subscription.accept(partition, of_partition, deliveries)
        return deliveries if records else None

    async def _what_comes(self) -> None:
        """
        Wait for messages, for something to be due, or to be woken.

        The client's own way of waiting takes the messages with it, and asks for the next ones before we have begun.
        """
        if self._is_woken:
            return
        due = self.subscription.due_in()
        limit = _LOOK_AGAIN if due is None else max(0.0, min(due, _LOOK_AGAIN))
        timer = asyncio.get_running_loop().call_later(limit, self.wake)
        coming: asyncio.Future[None] = self.consumer._fetcher._create_fetch_waiter()  # noqa: SLF001
        self._coming = coming
        try:
            await coming
        finally:
            timer.cancel()
            self._coming = None

    def wake(self) -> None:
        """Have `receive` look again, also if it is not waiting yet."""
        self._is_woken = True
        if self._coming is not None and not self._coming.done():
            self._coming.set_result(None)

    async def _look_now_and_then(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_look:
            self._next_look = now + _LOOK_AGAIN
            await self.look()

    def _hold_back(self) -> None:
        """Read nothing of a partition while too much of it is unfinished. Set anew: a rebalance forgets it."""
        if not self.is_readable:
            return
        for place, partition in self.partitions.items():
            too_far = self.subscription.is_too_far(partition)
            if too_far != (place in self._paused):
                if too_far:
                    self.consumer.pause(place)
                    self._paused.add(place)
                else:
                    self.consumer.resume(place)
                    self._paused.discard(place)
        self.subscription.is_held_back = bool(self._paused)

    async def look(self) -> None:
        """
        See whether topics have changed, as far as the client has heard. One that is gone is told as a gap.

        Raises:
            ConnectionError: There is no connection, for the second time. The client would try ten times a second.
        """
        is_connected = any(each.connected() for each in self.consumer._client._conns.values())  # noqa: SLF001
        if not is_connected and not self._was_connected:
            raise ConnectionError("there is no connection to Kafka")
        self._was_connected = is_connected
        for topic in self.topics:
            if not self.consumer.partitions_for_topic(topic):
                raise self._deleted(topic)

    def _deleted(self, topic: str) -> BrokerUnavailable:
        """A topic is gone, and with it whatever was not read yet. Connecting again, it is created, or refused."""
        mine = [partition for partition in self.partitions.values() if partition.place.topic == topic]
        reason = f"the topic {topic} was deleted"
        self.subscription.tell_gap(min((partition.read_until for partition in mine), default=0), reason)
        for partition in mine:
            self.subscription.alone.pop(partition.place, None)
        return BrokerUnavailable(reason)

    async def _skip_what_is_gone(self, error: Any) -> None:
        """What was to be read next is not there: removed by retention, or with its topic."""
        for place, offset in error.args[0].items():
            if place in self.partitions:
                oldest = (await self.consumer.beginning_offsets([place]))[place]
                self.subscription.tell_gap(
                    self.partitions[place].read_until,
                    f"messages of {place.topic}, partition {place.partition}, are gone: {offset} was to be read next, "
                    f"and the oldest is {oldest}; retention was faster than this reader, or the topic was deleted",
                )
                self.partitions[place] = self.subscription.partition(place, Offsets(oldest))
                self.consumer.seek(place, oldest)

    async def probe(self) -> None:
        """Ask the leaders of all partitions where they end. Where there is more, only its coming is a sign of life."""
        places = [place for place in self.partitions if place not in self._paused] if self.is_readable else []
        if not places:
            if not await self.consumer._client.force_metadata_update():  # noqa: SLF001  # the public way asks for all topics
                raise ConnectionError("no broker tells about the topics")
        else:
            ends = await self.consumer.end_offsets(places)
            for place in places:
                if place in self.partitions and ends[place] > await self.consumer.position(place):
                    return
        self._heard = True
        self.wake()

    async def leave(self, *, within: float) -> None:
        """End it within *within* seconds, whatever state it is in."""
        try:
            async with asyncio.timeout(within):
                await self.say_goodbye()
        except CLIENT_ERRORS as error:
            logger.warning("leaving Kafka was not heard there: %s: %s", type(error).__name__, error)
        consumer = self.consumer
        consumer._closed = True  # noqa: SLF001  # its own `stop` can hang, and raise what it was not told to
        coordinator, fetcher = consumer._coordinator, consumer._fetcher  # noqa: SLF001
        tasks = [getattr(coordinator, name, None) for name in _COORDINATING]
        await end_tasks([*tasks, getattr(fetcher, "_fetch_task", None), *getattr(fetcher, "_pending_tasks", ())])
        await close_client(consumer._client)  # noqa: SLF001

    async def say_goodbye(self) -> None:  # noqa: B027  # a reader alone has nothing to tell
        """Tell Kafka what it has to know."""


class ReaderConnection(Connection):
    """A reader without a group: every partition, from its end. Nothing is committed; it knows where it is."""

    async def begin(self, topics: Sequence[str]) -> None:
        self.topics = topics
        self.partitions = self.subscription.alone
        await self._assign()

    async def _assign(self) -> None:
        known, places = self.partitions, []
        for topic in self.topics:
            places += [TopicPartition(topic, number) for number in await self._numbers_of(topic)]
        if new := [place for place in places if place not in known]:
            # What comes later than this subscription is read from its beginning.
            begins = self.consumer.beginning_offsets if self.subscription.has_begun else self.consumer.end_offsets
            for place, position in (await begins(new)).items():
                known[place] = self.subscription.partition(place, Offsets(position))
        self.subscription.has_begun = True
        self.generation += 1
        self.consumer.assign(places)
        for place in places:
            self.consumer.seek(place, known[place].offsets.next)
        self._paused.clear()

    async def _numbers_of(self, topic: str) -> Collection[int]:
        numbers: Collection[int] | None = self.consumer.partitions_for_topic(topic)
        return numbers or await self.consumer._client._wait_on_metadata(topic)  # noqa: SLF001

    async def look(self) -> None:
        await super().look()
        for topic in self.topics:
            if any(TopicPartition(topic, number) not in self.partitions for number in await self._numbers_of(topic)):
                return await self._assign()
        return None
