"""The connections of a subscription to Kafka, each a member of its group, or a reader alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.client import ConnectionGroup
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata

from diator.brokers.base import Delivery
from diator.brokers.connecting import BackgroundTasks
from diator.brokers.kafka._client import Cluster, end_tasks, started
from diator.brokers.kafka._connection import Connection, ReaderConnection
from diator.brokers.kafka._errors import CLIENT_ERRORS, NO_RIGHT
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import ReadOptions, Subscription
from diator.brokers.kafka._topics import HEADERS_BYTES, TopicPolicy, ensure_topics
from diator.brokers.supervisor import Source
from diator.exceptions import AccessRefused, BrokerUnavailable, ConfigurationError, MessageRejected

logger: logging.Logger = logging.getLogger(__name__)

_COMMIT_EVERY = 0.2
_COMMIT_TIMEOUT = 5.0

_NO_ROOM = (
    "Kafka has no room beside a commit for what was finished above it (offset.metadata.max.bytes is below 4,096): that "
    "comes again whenever a member comes, goes or dies, and attempts are counted anew"
)


class Connections:
    """Those of one subscription, one after the other."""

    def __init__(self, subscription: Subscription, cluster: Cluster, policy: TopicPolicy) -> None:
        self._subscription = subscription
        self._cluster = cluster
        self._policy = policy
        self._background = BackgroundTasks()
        self.latest: Connection

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[Source, None]:
        """See that the topics are there, connect, and become a member of the group."""
        subscription = self._subscription
        wanted = [*subscription.names]
        if not self._policy.create:
            wanted += subscription.dead  # better refused now than when it is needed
        try:
            await ensure_topics(self._cluster, self._policy, wanted, reading=subscription.names)
        except MessageRejected as error:
            raise ConfigurationError(str(error)) from error
        except NO_RIGHT as error:
            raise _access_refused(error) from error
        consumer = AIOKafkaConsumer(**_settings(self._cluster, subscription.reading, subscription.group_id))
        connection = self.latest = (ReaderConnection if subscription.group is None else GroupConnection)(
            subscription, consumer
        )
        try:
            await started(consumer.start())
            await connection.begin(subscription.names)
            yield connection
        except NO_RIGHT as error:
            raise _access_refused(error) from error
        finally:
            self._background.start(connection.leave(within=min(self._cluster.timeout, 5.0)), "leaving Kafka")
            await self._background.wait()

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """Wait for what was settled to reach Kafka. That has its own bound. What nobody has seen was not committed."""
        await self._background.wait()


def _access_refused(error: Exception) -> AccessRefused:
    problem = f"{type(error).__name__}: {error}"
    remedy = "let its user describe and read its topics, and read its group"
    return AccessRefused(f"Kafka refuses a subscription ({problem}); {remedy} (kafka-acls.sh)")


def _settings(cluster: Cluster, reading: ReadOptions, group_id: str | None) -> dict[str, Any]:
    """Give what a consumer of aiokafka is made with."""
    rebalance = reading.drain_timeout + 10.0
    # A join is answered when the slowest member has rejoined; a shorter timeout would break it off each time.
    settings = cluster.settings(request_timeout=max(40.0, rebalance + 10.0))
    settings |= {
        "enable_auto_commit": False,
        "retry_backoff_ms": 250,  # until the supervisor takes over, whose pauses grow
        "auto_offset_reset": "none",  # it would skip silently what retention has removed
        "isolation_level": "read_committed",
        "fetch_max_wait_ms": 200,
        "max_partition_fetch_bytes": reading.max_message_bytes + 16 * HEADERS_BYTES,
        "metadata_max_age_ms": round(reading.metadata_max_age * 1000),
    }
    if group_id is not None:
        settings |= {
            "group_id": group_id,
            "session_timeout_ms": round(reading.session_timeout * 1000),
            "heartbeat_interval_ms": round(reading.heartbeat_interval * 1000),
            "rebalance_timeout_ms": round(rebalance * 1000),
            # Heartbeats say that this member lives; that its handlers do is for the consumer to see.
            "max_poll_interval_ms": 2**31 - 1,
            # Not the sticky one: aiokafka keeps its state in the class, so that groups would mix.
            "partition_assignment_strategy": (RoundRobinPartitionAssignor,),
        }
    return settings


class GroupConnection(Connection, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka comes without types
    """A member of a group, whose partitions come and go with those of the others."""

    def __init__(self, subscription: Subscription, consumer: Any) -> None:
        super().__init__(subscription, consumer)
        self._assigned = asyncio.Event()
        self._assigned_at = asyncio.get_running_loop().time()
        self._committing: asyncio.Task[None] | None = None
        self._bare = False
        """Whether no more than offsets is committed, since Kafka has no room for what is written beside them."""

    async def begin(self, topics: Sequence[str]) -> None:
        self.topics = topics
        self.consumer.subscribe(topics, listener=self)
        self._committing = asyncio.create_task(self._keep_committing(), name="diator: committing")
        # Whether or not it has a part of the topics yet, what is sent from now on is for its group. Other members may
        # take their time; giving up would only make them rebalance again.
        coordinating = self.consumer._coordinator._coordination_task  # noqa: SLF001
        assigned = asyncio.create_task(self._assigned.wait())
        first_part = self.subscription.reading.first_part
        try:
            await asyncio.wait({assigned, coordinating}, timeout=first_part, return_when=asyncio.FIRST_COMPLETED)
        finally:
            assigned.cancel()
        self.consumer._coordinator.check_errors()  # noqa: SLF001  # no right to this group, for one

    @property
    def is_readable(self) -> bool:
        return self._assigned.is_set()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # it may be a coroutine
        """Let the work that was begun end, within bounds, and commit it; the rest is the next one's."""
        self._assigned.clear()
        self.generation += 1
        mine = {partition for place, partition in self.partitions.items() if place in revoked}
        for partition in mine:
            partition.ending = True
        self.subscription.withdraw(mine)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.subscription.reading.drain_timeout):
                while any(partition.out for partition in mine):
                    self.subscription.freed.clear()
                    await self.subscription.freed.wait()
        if late := sum(partition.out for partition in mine):
            logger.warning("%d deliveries were not settled when their partitions went to others; they come again", late)
        await self._commit()
        self.subscription.lose(mine)
        self.partitions.clear()
        self._paused.clear()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # it may be a coroutine
        """Begin where the group left off; where it never was, at the oldest message."""
        committed = await self.consumer._coordinator.fetch_committed_offsets([*assigned])  # noqa: SLF001  # `committed()` keeps the metadata to itself
        new = [place for place in assigned if place not in committed or committed[place].offset < 0]
        oldest = await self.consumer.beginning_offsets(new) if new else {}
        for place in assigned:
            if place in oldest:
                offsets = Offsets(oldest[place])
                self.consumer.seek(place, oldest[place])
            else:
                offsets = Offsets(committed[place].offset, committed[place].metadata or "")
            self.partitions[place] = self.subscription.partition(place, offsets)
        self._assigned.set()
        self.wake()

    async def _keep_committing(self) -> None:
        pause = _COMMIT_EVERY
        while True:
            await asyncio.sleep(pause)
            if self._assigned.is_set():
                pause = _COMMIT_EVERY if await self._commit() else min(5.0, 2 * pause)

    async def look(self) -> None:
        await super().look()
        now = asyncio.get_running_loop().time()
        if self._assigned.is_set():
            self._assigned_at = now
        elif now - self._assigned_at > self.subscription.reading.most_patience:
            raise BrokerUnavailable("its group has given this member nothing, not even that there is nothing for it")

    async def _commit(self) -> bool:
        """
        Commit how far each partition is, of those that are still ours; tell whether that worked.

        One that is not ours any more would fail them all.
        """
        ours = self.consumer.assignment()
        progress = {
            place: (partition, now)
            for place, partition in self.partitions.items()
            if place in ours and (now := partition.offsets.progress()) != partition.committed
        }
        if not progress:
            return True
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT):
                # Not aiokafka's own `commit`: it tries for ever, and what it shields from us nobody waits for.
                coordinator = self.consumer._coordinator  # noqa: SLF001
                assignment = self.consumer._subscription.subscription.assignment  # noqa: SLF001
                offsets = {
                    place: OffsetAndMetadata(lowest, "" if self._bare else beside)
                    for place, (_, (lowest, beside)) in progress.items()
                }
                await coordinator.ensure_coordinator_known()
                await coordinator._do_commit_offsets(assignment, offsets)  # noqa: SLF001
        except errors.OffsetMetadataTooLargeError:
            if self._bare:
                return False
            self._bare = True
            logger.warning("%s", _NO_ROOM)
            return await self._commit()
        except CLIENT_ERRORS as error:
            logger.warning("what was settled could not be committed yet: %s: %s", type(error).__name__, error)
            return False
        for partition, now in progress.values():
            partition.committed = now
        return True

    async def say_goodbye(self) -> None:
        try:
            if self._committing is not None:
                await end_tasks([self._committing])
            if self._assigned.is_set():
                await self._commit()
        finally:
            self.subscription.lose(self.partitions.values())
        coordinator = self.consumer._coordinator  # noqa: SLF001
        if coordinator is None:
            return
        # Its own way waits for a rebalance that is under way, and on the connection that this blocks.
        await end_tasks([coordinator._coordination_task, coordinator._heartbeat_task])  # noqa: SLF001
        if coordinator.member_id and coordinator.coordinator_id is not None:
            request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
            # On the other connection Kafka answers when the fetch is over that waits there.
            await self.consumer._client.send(  # noqa: SLF001
                coordinator.coordinator_id, request, group=ConnectionGroup.COORDINATION
            )
