"""How a connection of a subscription is made, and the connection of a consumer in a group."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager

from aiokafka import ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from diator._hints import name_of
from diator._text import explained
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._connection import Connection, ReaderConnection
from diator.brokers.kafka._consumer import KafkaConsumer
from diator.brokers.kafka._errors import CLIENT_ERRORS, subscription_error
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import Subscription
from diator.brokers.kafka._topics import TopicPolicy, ensure_topics
from diator.brokers.supervisor import Source
from diator.exceptions import BrokerUnavailable, ConfigurationError, MessageRejected

logger: logging.Logger = logging.getLogger(__name__)

_COMMIT_EVERY = 0.2
_COMMIT_TIMEOUT = 5.0
_MAX_COMMIT_DELAY = 5.0
_GOODBYE_TIMEOUT = 5.0
_LAST_COMMIT_TIMEOUT = 1.0  # of a link that is given up, and the next one has to wait

_TOPIC_ID = re.compile(r"[0-9a-f]{32}")
_NO_METADATA = (
    "Kafka refuses the metadata of a commit, for offset.metadata.max.bytes is below 4,096; raise it. Until then, "
    "messages that were finished above the committed offset are delivered again after a rebalance, and attempts are "
    "counted from 1 again"
)


@asynccontextmanager
async def connected(
    subscription: Subscription, *, cluster: Cluster, policy: TopicPolicy
) -> AsyncGenerator[Source, None]:
    """Ensure that the topics exist, connect, and join the group."""
    consumer = KafkaConsumer(cluster, subscription.options, subscription.group_id)
    kind = ReaderConnection if subscription.group_id is None else GroupConnection
    connection = kind(subscription, consumer)
    wanted = [*subscription.topic_names]
    if not policy.create:
        wanted += subscription.dead_letter_topics  # a missing one is better reported now than when it is needed
    try:
        await ensure_topics(cluster, policy, wanted, reading=subscription.topic_names)
        await connection.start()
        yield connection
    except MessageRejected as error:
        raise ConfigurationError(str(error)) from error
    except CLIENT_ERRORS as error:
        if (final := subscription_error(error, subscription.group_id)) is not None:
            raise final from error
        raise
    finally:
        goodbye = _GOODBYE_TIMEOUT if subscription.is_ending else _LAST_COMMIT_TIMEOUT
        await subscription.release(connection.end(within=min(cluster.timeout, goodbye)))


class GroupConnection(Connection, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka comes without types
    """The connection of a consumer in a group. Each rebalance may take partitions from it, and assign others."""

    def __init__(self, subscription: Subscription, consumer: KafkaConsumer) -> None:
        super().__init__(subscription, consumer)
        self._assigned = asyncio.Event()
        subscription.is_assigned = False
        self._assigned_at = asyncio.get_running_loop().time()
        self._commits_metadata = True
        self._commit_failed = False
        self._failure: Exception | None = None

    async def begin(self) -> None:
        """
        Join the group.

        The subscription is ready even if the other consumers take their time, and it has no partitions yet: what is
        sent from now on is for its group. Giving up would only cause another rebalance.
        """
        self.consumer.join(self.subscription.topic_names, self, member_id=self.subscription.member_id)
        self.tasks.append(asyncio.create_task(self._keep_committing(), name="diator: committing"))
        await self.consumer.wait_for_group(self._assigned, within=self.subscription.options.assignment_timeout)

    async def start_over(self, topic_names: Collection[str]) -> None:
        """See `Connection.start_over`."""
        if self.subscription.is_assigned:
            for place in self.consumer.assignment():
                if place.topic in topic_names:
                    self._read_from_beginning(place)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # aiokafka awaits a coroutine
        """Wait until the deliveries of *revoked* are settled, for `drain_timeout` at most, and commit."""
        self.subscription.is_assigned = False
        self._begin_assignment()
        ours = {partition for place, partition in self.partitions.items() if place in revoked}
        await self.subscription.drain(ours)
        await self._commit()
        self.subscription.lose(ours)
        self.partitions.clear()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # aiokafka awaits a coroutine
        """Begin each partition where the group left it; where the group never was, at its oldest message."""
        try:
            committed = await self.consumer.committed(assigned)
        except CLIENT_ERRORS as error:  # the client would only log it
            self._failure = error
            self.subscription.wakeup.set()
            return
        for place in assigned:
            offsets = self._offsets(place, committed[place]) if place in committed else None
            if offsets is None:
                self._read_from_beginning(place)
            else:
                self._unread.discard(place)
                self.partitions[place] = self.begun(place, offsets)
        self.subscription.member_id = self.consumer.member_id
        self.subscription.is_assigned = True
        self._assigned.set()
        self.subscription.wakeup.set()

    def _offsets(self, place: TopicPartition, committed: OffsetAndMetadata) -> Offsets | None:
        """
        Return where the group is in a partition, or None if that was committed for an earlier topic of the same name.

        Kafka deletes commits together with their topic, but a consumer that does not know it yet commits once more.
        """
        metadata = committed.metadata or ""
        topic_id, _, progress = metadata.partition(" ")
        if not _TOPIC_ID.fullmatch(topic_id):
            return Offsets(committed.offset, metadata)  # another program's, or of a Kafka without ids
        if topic_id == self._topic_id(place):
            return Offsets(committed.offset, progress)
        reason = f"the offset of {place.topic}, partition {place.partition}, is of a topic that was deleted meanwhile"
        self.subscription.report_lost_messages(0, reason)
        return None

    def _topic_id(self, place: TopicPartition) -> str:
        topic_id = self.subscription.topic_ids.get(place.topic)
        return "" if topic_id is None else topic_id.hex

    async def check(self) -> None:
        """Check the connection, and that a rebalance ends."""
        await super().check()
        self.consumer.check_group()
        if self._failure is not None:
            raise self._failure
        now = asyncio.get_running_loop().time()
        if self.subscription.is_assigned:
            self._assigned_at = now
        elif now - self._assigned_at > self.subscription.options.rebalance_bound:
            raise BrokerUnavailable("the group has not assigned any partitions, nor said that there are none for it")

    async def _keep_committing(self) -> None:
        delay = _COMMIT_EVERY
        while True:
            await asyncio.sleep(delay)
            if self.subscription.is_assigned:
                delay = _COMMIT_EVERY if await self._commit() else min(_MAX_COMMIT_DELAY, 2 * delay)

    async def _commit(self) -> bool:
        """Commit how far each partition is. Return whether that succeeded."""
        ours = self.consumer.assignment()  # a partition that is another consumer's by now would fail the whole commit
        progress = {
            place: (partition, now)
            for place, partition in self.partitions.items()
            if place in ours and (now := partition.offsets.progress()) != partition.committed
        }
        if not progress:
            return True
        offsets = {
            place: OffsetAndMetadata(lowest, f"{self._topic_id(place)} {metadata}" if self._commits_metadata else "")
            for place, (_, (lowest, metadata)) in progress.items()
        }
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT):
                await self.consumer.commit(offsets)
        except errors.OffsetMetadataTooLargeError:
            if not self._commits_metadata:
                return False
            self._commits_metadata = False
            logger.warning("%s", _NO_METADATA, extra=self.subscription.log_fields)
            return await self._commit()
        except CLIENT_ERRORS as error:
            level = logging.DEBUG if self._commit_failed else logging.WARNING  # one line for a bad link
            logger.log(
                level,
                "a commit failed and is tried again: %s",
                explained(error, within=_COMMIT_TIMEOUT),
                extra={**self.subscription.log_fields, "error_type": name_of(type(error))},
            )
            self._commit_failed = True
            return False
        self._commit_failed = False
        for partition, now in progress.values():
            partition.committed = now
        return True

    async def say_goodbye(self) -> None:
        """
        Commit. At the end of the subscription, leave the group, so that its partitions go to other consumers at once.

        Before that, the next connection continues as the same member of the group, so that nobody has to rebalance.
        """
        try:
            if self.subscription.is_assigned:
                await self._commit()
        finally:
            self.subscription.is_assigned = False
            self.subscription.lose(self.partitions.values())
        if self.subscription.is_ending or not self.subscription.member_id:
            await self.consumer.leave_group()
