"""The connections of a subscription to Kafka, each a member of its group, or a reader alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata

from diator.brokers._kafka_client import (
    CLIENT_ERRORS,
    HEADERS_BYTES,
    Cluster,
    Policy,
    close_client,
    end_tasks,
    ensure_topics,
    started,
)
from diator.brokers._kafka_offsets import Offsets
from diator.brokers._kafka_subscription import Partition, Reading, Record, Subscription
from diator.brokers.base import Delivery
from diator.brokers.supervisor import Source
from diator.exceptions import AccessRefused, BrokerUnavailable, MessageRejected, WiringError

logger: logging.Logger = logging.getLogger(__name__)

_COMMIT_EVERY = 0.2
_COMMIT_TIMEOUT = 5.0
_COORDINATING = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")
_LOOK_AGAIN = 1.0
"""How often, in seconds, it is looked whether topics have changed, as far as the client has heard."""


_NO_RIGHT = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)


class Connections:
    """Those of one subscription, one after the other."""

    def __init__(self, subscription: Subscription, cluster: Cluster, policy: Policy) -> None:
        self._subscription = subscription
        self._cluster = cluster
        self._policy = policy
        self._leaving: set[asyncio.Task[None]] = set()
        self.latest: _Connection

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
            raise WiringError(str(error)) from error
        except _NO_RIGHT as error:
            raise _access_refused(error) from error
        consumer = AIOKafkaConsumer(**_settings(self._cluster, subscription.reading, subscription.group_id))
        connection = self.latest = (_Alone if subscription.group is None else _Member)(subscription, consumer)
        try:
            await started(consumer.start())
            await connection.begin(subscription.names)
            yield connection
        except _NO_RIGHT as error:
            raise _access_refused(error) from error
        finally:
            leaving = asyncio.create_task(connection.leave(within=min(self._cluster.timeout, 5.0)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """Wait for what was settled to reach Kafka. That has its own bound. What nobody has seen was not committed."""
        if self._leaving:
            await asyncio.wait(self._leaving)


def _access_refused(error: Exception) -> AccessRefused:
    problem = f"{type(error).__name__}: {error}"
    remedy = "let its user describe and read its topics, and read its group"
    return AccessRefused(f"Kafka refuses a subscription ({problem}); {remedy} (kafka-acls.sh)")


def _settings(cluster: Cluster, reading: Reading, group_id: str | None) -> dict[str, Any]:
    """Give what a consumer of aiokafka is made with."""
    rebalance = reading.drain + 10.0
    # A join is answered when the slowest member has rejoined; a shorter timeout would break it off each time.
    settings = cluster.settings(request_timeout=max(40.0, rebalance + 10.0))
    settings |= {
        "enable_auto_commit": False,
        "retry_backoff_ms": 250,  # until the supervisor takes over, whose pauses grow
        "auto_offset_reset": "none",  # it would skip silently what retention has removed
        "isolation_level": "read_committed",
        "fetch_max_wait_ms": 200,
        "max_partition_fetch_bytes": reading.max_message_bytes + 16 * HEADERS_BYTES,
        "metadata_max_age_ms": round(reading.metadata_age * 1000),
    }
    if group_id is not None:
        settings |= {
            "group_id": group_id,
            "session_timeout_ms": round(reading.session * 1000),
            "heartbeat_interval_ms": round(reading.heartbeat * 1000),
            "rebalance_timeout_ms": round(rebalance * 1000),
            # Heartbeats say that this member lives; that its handlers do is for the consumer to see.
            "max_poll_interval_ms": 2**31 - 1,
            # Not the sticky one: aiokafka keeps its state in the class, so that groups would mix.
            "partition_assignment_strategy": (RoundRobinPartitionAssignor,),
        }
    return settings


class _Connection:
    """One consumer of aiokafka, while it lives."""

    def __init__(self, subscription: Subscription, consumer: Any) -> None:
        self.subscription = subscription
        self.consumer = consumer
        self.partitions: dict[TopicPartition, Partition] = {}
        self.generation = 0
        self.topics: Sequence[str] = ()
        self._paused: set[TopicPartition] = set()
        self._fetching: asyncio.Task[tuple[int, Mapping[TopicPartition, list[Record]]]] | None = None
        self._woken = asyncio.Event()
        self._heard = False
        self._next_look = 0.0
        self._was_connected = True
        subscription.wake = self._woken.set

    async def begin(self, topics: Sequence[str]) -> None:
        raise NotImplementedError

    @property
    def is_readable(self) -> bool:
        """Whether what the client has now is ours."""
        return True

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while True:
            self._woken.clear()
            if self._heard:
                self._heard = False
                return []
            if deliveries := self.subscription.take_ready(most):
                return deliveries
            await self._look_now_and_then()
            self._hold_back()
            try:
                if deliveries := await self._what_is_there(most):
                    return deliveries
                if deliveries := await self._what_comes(most):
                    return deliveries
            except errors.OffsetOutOfRangeError as error:
                await self._skip_what_is_gone(error)
            except errors.NoOffsetForPartitionError:
                logger.debug("a partition had no offset yet")  # it has one by now: see `on_partitions_assigned`

    async def _what_is_there(self, most: int) -> list[Delivery]:
        """Give what the client has already. Asked first, for a task and a wait would cost more than all the rest."""
        if self._fetching is not None or not self.is_readable:
            return []
        return self._accept(self.generation, await self.consumer.getmany(max_records=most))

    async def _what_comes(self, most: int) -> list[Delivery]:
        """Wait for messages, for something to be due, or to be woken."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(most), name="diator: fetching")
        woken = asyncio.create_task(self._woken.wait())
        due = self.subscription.due_in()
        limit = _LOOK_AGAIN if due is None else max(0.0, min(due, _LOOK_AGAIN))
        # What has come of a new assignment before we know where it begins has to wait: it must not be passed over.
        waiting = {self._fetching, woken} if self.is_readable else {woken}
        try:
            await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        if not self._fetching.done() or not self.is_readable:
            return []
        fetched, self._fetching = self._fetching, None
        return self._accept(*fetched.result())

    async def _look_now_and_then(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_look:
            self._next_look = now + _LOOK_AGAIN
            await self.look()

    async def _fetch(self, most: int) -> tuple[int, Mapping[TopicPartition, list[Record]]]:
        records: Mapping[TopicPartition, list[Record]] = await self.consumer.getmany(timeout_ms=500, max_records=most)
        return self.generation, records

    def _accept(self, generation: int, records: Mapping[TopicPartition, list[Record]]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        if generation == self.generation:  # else it was read of what was ours then; whoever has it now reads it again
            for place, of_partition in records.items():
                if partition := self.partitions.get(place):
                    self.subscription.accept(partition, of_partition, deliveries)
        return deliveries

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
        self._woken.set()

    async def leave(self, *, within: float) -> None:
        """End it within *within* seconds, whatever state it is in."""
        if self._fetching is not None:
            await end_tasks([self._fetching])
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

    async def say_goodbye(self) -> None:
        """Tell Kafka what it has to know."""


class _Member(_Connection, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka comes without types
    """A member of a group, whose partitions come and go with those of the others."""

    def __init__(self, subscription: Subscription, consumer: Any) -> None:
        super().__init__(subscription, consumer)
        self._assigned = asyncio.Event()
        self._assigned_at = asyncio.get_running_loop().time()
        self._committing: asyncio.Task[None] | None = None

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
            async with asyncio.timeout(self.subscription.reading.drain):
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
        self._woken.set()

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
                offsets = {place: OffsetAndMetadata(*now) for place, (_, now) in progress.items()}
                await coordinator.ensure_coordinator_known()
                await coordinator._do_commit_offsets(assignment, offsets)  # noqa: SLF001
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
            await self.consumer._client.send(coordinator.coordinator_id, request)  # noqa: SLF001


class _Alone(_Connection):
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
