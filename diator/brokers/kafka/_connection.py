"""One connection of a subscription to Kafka, while it lives."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition, errors

from diator._hints import name_of
from diator._text import explained
from diator.brokers.base import Delivery
from diator.brokers.kafka._client import end_tasks
from diator.brokers.kafka._consumer import KafkaConsumer
from diator.brokers.kafka._errors import CLIENT_ERRORS
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import Partition, Subscription
from diator.exceptions import BrokerUnavailable

logger: logging.Logger = logging.getLogger(__name__)

_CHECK_EVERY = 1.0


class Connection(ABC):
    """
    One connection of *subscription*, by one *consumer*.

    Attributes:
        subscription: What outlives this connection.
        consumer: The client.
        partitions: What it reads now.
        generation: Grows with every assignment, so that records of an earlier one are recognized.
    """

    def __init__(self, subscription: Subscription, consumer: KafkaConsumer) -> None:
        self.subscription = subscription
        self.consumer = consumer
        self.partitions: dict[TopicPartition, Partition] = {}
        self.generation = 0
        self.tasks: list[asyncio.Task[None]] = []  # they end only with an error that nobody expects
        self._paused: dict[TopicPartition, Partition] = {}
        self._unread = set[TopicPartition]()  # what is read from its beginning, wherever that is
        self._has_returned = False
        self._was_answered = False
        self._was_connected = True
        self._next_check = 0.0

    async def start(self) -> None:
        """Connect, and read the topics of the subscription from now on."""
        await self.consumer.start()
        await self._find_recreated()
        await self.begin()
        self.tasks.append(asyncio.create_task(self._watch_topics(), name="diator: watching topics"))

    @abstractmethod
    async def begin(self) -> None:
        """Begin to read the topics of the subscription."""

    @abstractmethod
    async def start_over(self, topic_names: Collection[str]) -> None:
        """Read these topics, which were deleted and created again, from their beginning."""

    def begun(self, place: TopicPartition, offsets: Offsets) -> Partition:
        """Return a partition that this connection begins to read."""
        return self.subscription.partition(place, offsets, of=self.consumer.count_partitions(place.topic))

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        """See `Source.receive`."""
        subscription = self.subscription
        if self._has_returned:
            self._has_returned = False
            await asyncio.sleep(0)  # a handler that waits for these messages begins before the client is asked again
        while True:
            subscription.wakeup.clear()
            if self._was_answered:
                self._was_answered = False
                return []
            if ready := subscription.take_ready(most):
                return ready
            if (now := asyncio.get_running_loop().time()) >= self._next_check:
                self._next_check = now + _CHECK_EVERY
                await self.check()
            self._resume()
            try:
                if (deliveries := await self._take(most)) is None:
                    # The client could wait by itself. It would then also take the messages, and so fetch the next ones
                    # before the handler of the first has begun.
                    await subscription.wakeup.wait(self.consumer.fetched, within=self._wait_bound)
                elif deliveries:
                    self._has_returned = True
                    return deliveries
            except errors.OffsetOutOfRangeError as error:
                await self._skip_lost_messages(error)
            except errors.NoOffsetForPartitionError:
                logger.debug("a partition had no offset yet")  # by now it has: see `on_partitions_assigned`

    @property
    def _wait_bound(self) -> float:
        due = self.subscription.due_in()
        return _CHECK_EVERY if due is None else max(0.0, min(due, _CHECK_EVERY))

    async def _take(self, most: int) -> list[Delivery] | None:
        """Return deliveries of the messages that the client has already fetched; None if it has none."""
        if not self.subscription.is_assigned:
            return None
        generation, deliveries = self.generation, list[Delivery]()
        records = await self.consumer.take(most)
        if generation == self.generation:  # otherwise another consumer may have these partitions, and reads them again
            for place, of_partition in records.items():
                if partition := self.partitions.get(place):
                    self.subscription.accept(partition, of_partition, deliveries)
                    if partition.is_too_far:
                        self._pause(place, partition)
        for place in self.consumer.problems.keys() & self.partitions.keys():
            self.consumer.pause(place)
        return deliveries if records else None

    def _begin_assignment(self) -> None:
        """Forget what belonged to the earlier assignment. The client forgets what was paused, too."""
        self.generation += 1
        self._paused.clear()

    def _read_from_beginning(self, place: TopicPartition) -> None:
        """Read *place* from its oldest message. Kafka is not asked where that is: there may be no leader to answer."""
        self._unread.add(place)
        self._read_from(place, 0)

    def _read_from(self, place: TopicPartition, offset: int) -> None:
        self.partitions[place] = self.begun(place, Offsets(offset))
        self.consumer.seek(place, offset)
        if self._paused.pop(place, None):
            self.consumer.resume(place)

    def _pause(self, place: TopicPartition, partition: Partition) -> None:
        """Fetch nothing more of a partition that is too far."""
        self.consumer.pause(place)
        partition.is_paused = True
        self._paused[place] = partition

    def _resume(self) -> None:
        """Fetch from paused partitions again that are not too far any more."""
        for place, partition in [*self._paused.items()]:
            if not partition.is_too_far:
                del self._paused[place]
                self.consumer.resume(place)
                partition.is_paused = False

    async def check(self) -> None:
        """
        Check the connection, and whether topics have changed, as far as the client knows. Called once a second.

        Raises:
            ConnectionError: There is no connection, for the second time. The client would try ten times a second.
            BrokerUnavailable: A topic was deleted. It was reported as a gap.
            ConfigurationError: A partition cannot be read any further, and all that came before is settled.
        """
        for task in self.tasks:
            if task.done():
                task.result()
        for place, problem in self.consumer.problems.items():
            if place in self.partitions and not self.partitions[place].unsettled:
                raise problem
        is_connected = self.consumer.is_connected
        if not is_connected and not self._was_connected:
            raise ConnectionError("there is no connection to Kafka")
        self._was_connected = is_connected
        for topic_name in self.subscription.topic_names:
            if not self.consumer.has_topic(topic_name):
                raise self._deleted(topic_name)

    def _deleted(self, topic_name: str) -> BrokerUnavailable:
        """Report the messages of a deleted topic as lost. Reconnecting creates the topic, or is refused."""
        self.subscription.topic_ids.pop(topic_name, None)
        reason = f"the topic {topic_name} was deleted"
        self._forget(topic_name, reason)
        return BrokerUnavailable(reason)

    def _forget(self, topic_name: str, reason: str) -> None:
        """Report the messages of a topic as lost. Settling a delivery of it has no effect any more."""
        lost = [partition for partition in self.partitions.values() if partition.place.topic == topic_name]
        self.subscription.report_lost_messages(min((partition.read_until for partition in lost), default=0), reason)
        self.subscription.lose(lost)
        for partition in lost:
            del self.partitions[partition.place]

    async def _watch_topics(self) -> None:
        """
        Look for topics that were deleted and created again, whenever the client had a reason to ask about its topics.

        The new topic may have a message at the offset that is read next, so that nothing else would show it.
        """
        while True:
            await self.consumer.metadata_changed.wait()
            self.consumer.metadata_changed.clear()
            try:
                if recreated := await self._find_recreated():
                    self.generation += 1  # what the client is returning now is of the old topic
                    await self.start_over(recreated)
                    self.subscription.wakeup.set()
            except CLIENT_ERRORS as error:
                logger.debug("looking at the ids of topics failed: %r", error)
                self.consumer.metadata_changed.set()
            await asyncio.sleep(_CHECK_EVERY)

    async def _find_recreated(self) -> Collection[str]:
        """Return the topics that were deleted and created again. Their messages are reported as lost."""
        known, ids = self.subscription.topic_ids, await self.consumer.topic_ids(self.subscription.topic_names)
        recreated = [name for name, topic_id in ids.items() if known.get(name, topic_id) != topic_id]
        known.update(ids)
        for name in recreated:
            self._forget(name, f"the topic {name} was deleted and created again")
        if recreated:
            await self.consumer.refresh_metadata()  # the client may have found that there is no such topic
        return recreated

    async def _skip_lost_messages(self, error: Any) -> None:
        """Read on at the oldest message of each partition that does not have the next offset any more."""
        wanted: Mapping[TopicPartition, int] = error.args[0]
        recreated = await self._find_recreated()
        if recreated:
            await self.start_over(recreated)
        for place, offset in wanted.items():
            if place in self.partitions and place.topic not in recreated:
                oldest = (await self.consumer.oldest_offsets([place]))[place]
                if offset or place not in self._unread:
                    self.subscription.report_lost_messages(
                        self.partitions[place].read_until,
                        f"messages of {place.topic}, partition {place.partition}, are gone: the next offset was "
                        f"{offset}, and the oldest is {oldest}; retention was faster than its reader, or the topic was "
                        "deleted",
                    )
                self._read_from(place, oldest)

    async def probe(self) -> None:
        """
        Ask any broker about the topics. See `Source.probe`.

        A partition without a leader does not answer, and the other partitions are read all the same.
        """
        if not await self.consumer.refresh_metadata():
            raise ConnectionError("no broker of Kafka answers")
        self._was_answered = True
        self.subscription.wakeup.set()

    async def end(self, *, within: float) -> None:
        """End the connection, whatever state it is in. Leaving the group takes at most *within* seconds."""
        await end_tasks(self.tasks)
        try:
            async with asyncio.timeout(within):
                await self.say_goodbye()
        except (asyncio.CancelledError, *CLIENT_ERRORS) as error:  # the client also cancels whoever calls it
            logger.warning(
                "Kafka did not learn that a consumer left: %s",
                explained(error, within=within),
                extra={**self.subscription.log_fields, "error_type": name_of(type(error))},
            )
        finally:
            await self.consumer.end()

    async def say_goodbye(self) -> None:  # noqa: B027  # without a group there is nothing to do
        """Send Kafka what it must know before the connection ends."""


class ReaderConnection(Connection):
    """A connection without a group. It reads every partition, and commits nothing: the subscription knows how far."""

    def __init__(self, subscription: Subscription, consumer: KafkaConsumer) -> None:
        super().__init__(subscription, consumer)
        self.partitions = subscription.alone

    async def begin(self) -> None:
        """Read each partition where the subscription is; at first at its end."""
        await self._assign()

    async def start_over(self, topic_names: Collection[str]) -> None:  # they are not in `partitions` now
        """See `Connection.start_over`."""
        await self._assign()

    async def _assign(self) -> None:
        known, places = self.partitions, []
        for topic_name in self.subscription.topic_names:
            numbers = await self.consumer.partitions_of(topic_name)
            places += [TopicPartition(topic_name, number) for number in numbers]
        if not self.subscription.has_begun:
            self.subscription.read_alone(await self.consumer.end_offsets(places))
        self._begin_assignment()
        self.consumer.assign(places)
        for place in places:
            if place in known:
                self.consumer.seek(place, known[place].offsets.next)
                known[place].is_paused = False
            else:  # it is newer than the subscription
                self._read_from_beginning(place)

    async def check(self) -> None:
        """Check the connection, and read partitions that were added."""
        await super().check()
        for topic_name in self.subscription.topic_names:
            numbers = await self.consumer.partitions_of(topic_name)
            if any(TopicPartition(topic_name, number) not in self.partitions for number in numbers):
                return await self._assign()
        return None
