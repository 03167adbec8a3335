"""A subscription to Kafka: which partitions it has, what of them is out, and how that is settled."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition, errors
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata

from diator.brokers._kafka_client import (
    CLIENT_ERRORS,
    DEAD,
    HEADERS_BYTES,
    RETRY,
    Cluster,
    Names,
    Policy,
    close_client,
    end_tasks,
    ensure_topics,
)
from diator.brokers._kafka_offsets import Offsets, rung
from diator.brokers._kafka_sending import SharedProducer
from diator.brokers.base import Delivery, Topic
from diator.brokers.settling import provenance
from diator.brokers.supervisor import Source, Supervised
from diator.exceptions import BrokerUnavailable, MessageRejected, WiringError

logger: logging.Logger = logging.getLogger(__name__)

Record: TypeAlias = ConsumerRecord[Any, Any]

_COMMIT_EVERY = 0.2
_COMMIT_TIMEOUT = 5.0
_COORDINATING = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")
_LOOK_AGAIN = 1.0
"""How often, in seconds, it is looked whether topics have changed, as far as the client has heard."""
_MOST_WAITING = 100
"""How many messages of one partition of a retry topic wait here for their time."""
_RETRY_HEADERS = ("diator-retry-attempt", "diator-retry-due", "diator-retry-origin")
"""What a message in a retry topic has at the end of its headers: attempt, due (ms since 1970), partition:offset."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a subscription reads: the options of its broker. Times in seconds."""

    session: float
    heartbeat: float
    drain: float
    window: int
    in_place: bool
    metadata_age: float
    max_message_bytes: int
    first_part: float
    """For how long a new member waits for its first part of the topics, before it is there without one."""

    @property
    def most_patience(self) -> float:
        """How long a rebalance can take: the dead are noticed, and the slowest of the living lets go."""
        return self.session + self.drain + 30.0

    def settings(self, cluster: Cluster, group: str | None) -> dict[str, Any]:
        """Give what a consumer of aiokafka is made with."""
        rebalance = self.drain + 10.0
        # A join is answered when the slowest member has rejoined; a shorter timeout would break it off each time.
        settings = cluster.settings(request_timeout=max(40.0, rebalance + 10.0))
        settings |= {
            "enable_auto_commit": False,
            "retry_backoff_ms": 250,  # until the supervisor takes over, whose pauses grow
            "auto_offset_reset": "none",  # it would skip silently what retention has removed
            "isolation_level": "read_committed",
            "fetch_max_wait_ms": 200,
            "max_partition_fetch_bytes": self.max_message_bytes + 16 * HEADERS_BYTES,
            "metadata_max_age_ms": round(self.metadata_age * 1000),
        }
        if group is not None:
            settings |= {
                "group_id": group,
                "session_timeout_ms": round(self.session * 1000),
                "heartbeat_interval_ms": round(self.heartbeat * 1000),
                "rebalance_timeout_ms": round(rebalance * 1000),
                # Heartbeats say that this member lives; that its handlers do is for the consumer to see.
                "max_poll_interval_ms": 2**31 - 1,
                # Not the sticky one: aiokafka keeps its state in the class, so that groups would mix.
                "partition_assignment_strategy": (RoundRobinPartitionAssignor,),
            }
        return settings


class _Partition:
    """One partition, from its assignment to its revocation. A new assignment is a new one of these."""

    __slots__ = (
        "behind",
        "committed",
        "ending",
        "lost",
        "offsets",
        "out",
        "place",
        "read_until",
        "retries",
        "topic",
        "waiting",
    )

    def __init__(self, place: TopicPartition, topic: Topic, offsets: Offsets, *, retries: bool) -> None:
        self.place = place
        self.topic = topic
        self.offsets = offsets
        self.retries = retries
        self.committed = offsets.progress()
        self.ending = False
        """Whether it is about to go to another: what was begun of it ends, and nothing else begins."""
        self.lost = False
        self.read_until = 0
        """When the last message that was read had been sent, in milliseconds since 1970."""
        self.out = 0
        """How many deliveries are not settled, given out or not."""
        self.waiting = 0
        """How many messages wait here for their time."""
        self.behind: dict[bytes, deque[Record]] = {}
        """In place: what waits for an earlier message of its key, which is out or given back."""


class _Token:
    """By what a delivery is known. It has no `repr` with a payload in it, as a record has."""

    __slots__ = ("partition", "record")

    def __init__(self, partition: _Partition, record: Record) -> None:
        self.partition = partition
        self.record = record


class Subscription:
    """What a subscription has, beyond the life of a connection. It also settles its deliveries."""

    def __init__(
        self,
        topics: Collection[Topic],
        group: str | None,
        *,
        cluster: Cluster,
        policy: Policy,
        reading: Reading,
        names: Names,
        producer: SharedProducer,
    ) -> None:
        self._cluster = cluster
        self._policy = policy
        self.reading = reading
        self._names = names
        self._producer = producer
        self._group = group
        with_retries = group is not None and not reading.in_place
        try:
            self._topics = {names.topic(topic): topic for topic in topics}
            self._dead = {name: names.beside(name, group, DEAD) for name in self._topics}
            self._retries = {names.beside(name, group, RETRY): name for name in self._topics} if with_retries else {}
        except MessageRejected as error:
            raise WiringError(str(error)) from error
        self.supervised: Supervised
        self.connection: _Connection
        self.unsettled = 0
        self.alone: dict[TopicPartition, _Partition] = {}
        """Without a group: what is read, and how far it is, whatever becomes of the connection."""
        self.has_begun = False
        self.freed = asyncio.Event()
        self.wake: Callable[[], None] = lambda: None
        self.ready: deque[tuple[_Partition, Record, int]] = deque()
        """What is to be delivered without asking Kafka: what is due, and what was behind another."""
        self._delayed: list[tuple[float, int, _Partition, Record, int]] = []
        self._numbers = 0
        self._leaving: set[asyncio.Task[None]] = set()

    # -- connecting ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[Source, None]:
        """See that the topics are there, connect, and become a member of the group."""
        wanted = [*self._topics, *self._retries]
        if not self._policy.create:
            wanted += self._dead.values()  # better refused now than when it is needed
        try:
            await ensure_topics(self._cluster, self._policy, wanted)
        except MessageRejected as error:
            raise WiringError(str(error)) from error
        consumer = AIOKafkaConsumer(**self.reading.settings(self._cluster, self._group))
        connection = self.connection = (_Alone if self._group is None else _Member)(self, consumer)
        try:
            await consumer.start()
            await connection.begin([*self._topics, *self._retries])
            yield connection
        finally:
            leaving = asyncio.create_task(connection.leave(within=min(self._cluster.timeout, 5.0)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    async def left(self) -> None:
        """Wait for what was settled to reach Kafka. That has its own bound."""
        if self._leaving:
            await asyncio.wait(self._leaving)

    def partition(self, place: TopicPartition, offsets: Offsets) -> _Partition:
        """Begin to read a partition."""
        name = self._retries.get(place.topic)
        return _Partition(place, self._topics[name or place.topic], offsets, retries=name is not None)

    def lose(self, partitions: Iterable[_Partition]) -> None:
        """From now on these are others'. What comes of them late says nothing."""
        for partition in partitions:
            partition.lost = True
            self.unsettled -= partition.out
            partition.out = 0
        self._delayed = [each for each in self._delayed if not each[2].lost]
        heapq.heapify(self._delayed)
        self.supervised.take_back(lambda delivery: _token(delivery).partition.lost)

    def withdraw(self, partitions: Collection[_Partition]) -> None:
        """Take back what of *partitions* was received and not given out."""
        for delivery in self.supervised.take_back(lambda delivery: _token(delivery).partition in partitions):
            _token(delivery).partition.out -= 1
            self.unsettled -= 1

    def tell_gap(self, partition: _Partition, reason: str) -> None:
        """Messages are gone: some that came after the last one that was read, whenever that was."""
        logger.error("%s", reason)
        self.supervised.tell_gap(datetime.fromtimestamp(partition.read_until / 1000, UTC), reason)

    def deleted(self, topic: str) -> BrokerUnavailable:
        """A topic is gone, and with it whatever was not read yet. Connecting again, it is created, or refused."""
        partitions = [*self.connection.partitions.values(), *self.alone.values()]
        mine = [partition for partition in partitions if partition.place.topic == topic]
        reason = f"the topic {topic} was deleted"
        logger.error("%s", reason)
        read_until = min((partition.read_until for partition in mine), default=0)
        self.supervised.tell_gap(datetime.fromtimestamp(read_until / 1000, UTC), reason)
        for partition in mine:
            self.alone.pop(partition.place, None)
        return BrokerUnavailable(reason)

    # -- receiving -----------------------------------------------------------------------------------------------

    def accept(self, partition: _Partition, records: Sequence[Record], into: list[Delivery]) -> None:
        """Make deliveries of *records*, as far as they are to be handled now."""
        take, in_place = partition.offsets.take, self.reading.in_place
        if records:
            partition.read_until = records[-1].timestamp
        for record in records:
            attempt = take(record.offset)
            if not attempt:
                continue
            if partition.retries:
                self._wait_until_due(partition, record, into)
            elif in_place and record.key is not None:
                if record.key in partition.behind:
                    partition.behind[record.key].append(record)
                else:
                    partition.behind[record.key] = deque()
                    into.append(self.delivery(partition, record, attempt))
            else:
                into.append(self.delivery(partition, record, attempt))

    def _wait_until_due(self, partition: _Partition, record: Record, into: list[Delivery]) -> None:
        told = _told_by(record)
        attempt, remaining = told.attempt, told.due / 1000 - time.time()
        if remaining <= 0:
            into.append(self.delivery(partition, record, attempt))
        else:
            self._delay(partition, record, attempt, remaining)

    def _delay(self, partition: _Partition, record: Record, attempt: int, after: float) -> None:
        self._numbers += 1
        partition.waiting += 1
        due = asyncio.get_running_loop().time() + after
        heapq.heappush(self._delayed, (due, self._numbers, partition, record, attempt))
        self.wake()

    def due_in(self) -> float | None:
        """After how many seconds something is due; None if nothing waits."""
        return self._delayed[0][0] - asyncio.get_running_loop().time() if self._delayed else None

    def take_ready(self, most: int) -> list[Delivery]:
        """Give what is to be delivered without asking Kafka."""
        now = asyncio.get_running_loop().time()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, partition, record, attempt = heapq.heappop(self._delayed)
            partition.waiting -= 1
            self.ready.append((partition, record, attempt))
        taken: list[Delivery] = []
        while self.ready and len(taken) < most:
            partition, record, attempt = self.ready.popleft()
            if not partition.lost and not partition.ending:
                taken.append(self.delivery(partition, record, attempt))
        return taken

    def delivery(self, partition: _Partition, record: Record, attempt: int) -> Delivery:
        """Make a delivery, which is out from now on."""
        partition.out += 1
        self.unsettled += 1
        headers: dict[str, str] = {}
        if record.headers or record.key is not None:
            pairs = _told_by(record).headers if partition.retries else record.headers
            headers = {name: (value or b"").decode(errors="replace") for name, value in pairs}
            if record.key is not None:  # of another program, which has no such header
                headers.setdefault("key", record.key.decode(errors="replace"))
        return Delivery(
            topic=partition.topic,
            body=record.value or b"",
            headers=headers,
            attempt=attempt,
            settler=self,
            token=_Token(partition, record),
        )

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Noted here, and committed together with others."""
        token = _token(delivery)
        if not token.partition.lost:
            self._finished(token.partition, token.record)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        token = _token(delivery)
        partition, record = token.partition, token.record
        if partition.lost:
            return
        if self._group is None or self.reading.in_place:
            self._let_go(partition)
            self._delay(partition, record, partition.offsets.give_back(record.offset), after)
            return
        due = str(round((time.time() + after) * 1000) + 1)
        told = (str(delivery.attempt + 1), due, self._origin(partition, record))
        headers = [*self._own_headers(partition, record)]
        headers += [(name, value.encode()) for name, value in zip(_RETRY_HEADERS, told, strict=True)]
        topic = (
            partition.place.topic
            if partition.retries
            else self._names.beside(partition.place.topic, self._group, RETRY)
        )
        await self._producer.send(topic, record.value or b"", key=record.key, headers=headers, partition=rung(after))
        if not partition.lost:
            self._finished(partition, record)

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        token = _token(delivery)
        partition, record = token.partition, token.record
        if partition.lost:
            return
        source = self._retries.get(partition.place.topic, partition.place.topic)
        partition_, _, offset = self._origin(partition, record).partition(":")
        about = provenance(
            delivery, reason, source=source, group=self._group or "", partition=partition_, offset=offset
        )
        headers = [*self._own_headers(partition, record)]
        headers += [(name, value.encode(errors="replace")) for name, value in about.items()]
        await self._producer.send(self._dead[source], record.value or b"", key=record.key, headers=headers)
        if not partition.lost:
            self._finished(partition, record)

    @staticmethod
    def _own_headers(partition: _Partition, record: Record) -> Sequence[tuple[str, bytes]]:
        headers: Sequence[tuple[str, bytes]] = record.headers
        return _told_by(record).headers if partition.retries else headers

    @staticmethod
    def _origin(partition: _Partition, record: Record) -> str:
        return _told_by(record).origin if partition.retries else f"{record.partition}:{record.offset}"

    def _finished(self, partition: _Partition, record: Record) -> None:
        partition.offsets.finish(record.offset)
        self._let_go(partition)
        if partition.behind and record.key in partition.behind:
            behind = partition.behind[record.key]
            if behind:
                following = behind.popleft()
                self.ready.append((partition, following, partition.offsets.attempt(following.offset)))
                self.wake()
            else:
                del partition.behind[record.key]

    def _let_go(self, partition: _Partition) -> None:
        partition.out -= 1
        self.unsettled -= 1
        if partition.ending:
            self.freed.set()
        self.supervised.look_again()

    def is_too_far(self, partition: _Partition) -> bool:
        """Whether nothing more of *partition* is to be read for now."""
        return partition.offsets.spread >= self.reading.window or partition.waiting >= _MOST_WAITING


def _token(delivery: Delivery) -> _Token:
    token = delivery.token
    assert isinstance(token, _Token), "a delivery is settled by the subscription that it is of"  # noqa: S101
    return token


@dataclass(frozen=True)
class _Told:
    """What a record of a retry topic says of itself."""

    attempt: int
    due: int
    """In milliseconds since 1970."""
    origin: str
    """Partition and offset at first, with a colon between."""
    headers: Sequence[tuple[str, bytes]]
    """Those of the message."""


def _told_by(record: Record) -> _Told:
    """Read what is at the end of the headers; what somebody else put there is due now, and was tried once."""
    control = record.headers[-len(_RETRY_HEADERS) :]
    try:
        if tuple(name for name, _ in control) == _RETRY_HEADERS:
            attempt, due, origin = (value.decode() for _, value in control)
            return _Told(max(2, int(attempt)), int(due), origin, record.headers[: -len(control)])
    except (ValueError, AttributeError):
        logger.warning("a record of %s has control headers that are not ours", record.topic)
    return _Told(2, 0, f"{record.partition}:{record.offset}", record.headers)


class _Connection:
    """One consumer of aiokafka, while it lives."""

    def __init__(self, subscription: Subscription, consumer: Any) -> None:
        self.subscription = subscription
        self.consumer = consumer
        self.partitions: dict[TopicPartition, _Partition] = {}
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
                raise self.subscription.deleted(topic)

    async def _skip_what_is_gone(self, error: Any) -> None:
        """What was to be read next is not there: removed by retention, or with its topic."""
        for place, offset in error.args[0].items():
            if place in self.partitions:
                oldest = (await self.consumer.beginning_offsets([place]))[place]
                self.subscription.tell_gap(
                    self.partitions[place],
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
