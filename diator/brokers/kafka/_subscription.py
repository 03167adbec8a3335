"""A subscription to Kafka, beyond the life of a connection: what of its partitions is out, and how that is settled."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from aiokafka import ConsumerRecord, TopicPartition

from diator.brokers.base import Delivery, Topic
from diator.brokers.kafka._names import DEAD, RETRY, Names
from diator.brokers.kafka._offsets import Offsets, delay_bucket
from diator.brokers.kafka._producer import Producer
from diator.brokers.settling import dead_letter_headers
from diator.brokers.supervisor import ResilientSubscription
from diator.exceptions import ConfigurationError, MessageRejected

logger: logging.Logger = logging.getLogger(__name__)

Record: TypeAlias = ConsumerRecord[Any, Any]

_MOST_WAITING = 100
"""How many messages of one partition of a retry topic wait here for their time."""
_RETRY_HEADERS = ("diator-retry-attempt", "diator-retry-due", "diator-retry-origin")
"""What a message in a retry topic has at the end of its headers: attempt, due (ms since 1970), partition:offset."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a subscription reads: the options of its broker. Times in seconds."""

    session_timeout: float
    heartbeat_interval: float
    drain_timeout: float
    max_unacked_per_partition: int
    in_place: bool
    metadata_max_age: float
    max_message_bytes: int
    first_part: float
    """For how long a new member waits for its first part of the topics, before it is there without one."""

    @property
    def most_patience(self) -> float:
        """How long a rebalance can take: the dead are noticed, and the slowest of the living lets go."""
        return self.session_timeout + self.drain_timeout + 30.0


class Partition:
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

    __slots__ = ("partition", "record", "settled")

    def __init__(self, partition: Partition, record: Record) -> None:
        self.partition = partition
        self.record = record
        self.settled = False
        """Whether it is, or has come again as another delivery: settling it now says nothing."""

    @property
    def is_over(self) -> bool:
        return self.settled or self.partition.lost


class Subscription:
    """What a subscription has, beyond the life of a connection. It also settles its deliveries."""

    def __init__(
        self,
        topics: Collection[Topic],
        group: str | None,
        *,
        reading: ReadOptions,
        names: Names,
        producer: Producer,
    ) -> None:
        self.group = group
        self.group_id = None if group is None else names.group(group)
        self.reading = reading
        self._names = names
        self._producer = producer
        with_retries = group is not None and not reading.in_place
        try:
            self._topics = {names.topic(topic): topic for topic in topics}
            self._dead = {name: names.beside(name, group, DEAD) for name in self._topics}
            self._retries = {names.beside(name, group, RETRY): name for name in self._topics} if with_retries else {}
        except MessageRejected as error:
            raise ConfigurationError(str(error)) from error
        self.names: Sequence[str] = [*self._topics, *self._retries]
        """The topics that are read."""
        self.dead: Collection[str] = self._dead.values()
        """Those that are written to when a message is put aside."""
        self.supervised: ResilientSubscription
        self.unsettled = 0
        self.alone: dict[TopicPartition, Partition] = {}
        """Without a group: what is read, and how far it is, whatever becomes of the connection."""
        self.has_begun = False
        self.freed = asyncio.Event()
        self.wake: Callable[[], None] = lambda: None
        self.is_held_back = False
        """Whether something is not read for now, until enough is settled."""
        self.ready: deque[tuple[Partition, Record, int]] = deque()
        """What is to be delivered without asking Kafka: what is due, and what was behind another."""
        self._delayed: list[tuple[float, int, Partition, Record, int]] = []
        self._numbers = 0

    def partition(self, place: TopicPartition, offsets: Offsets) -> Partition:
        """Begin to read a partition."""
        name = self._retries.get(place.topic)
        return Partition(place, self._topics[name or place.topic], offsets, retries=name is not None)

    def lose(self, partitions: Iterable[Partition]) -> None:
        """From now on these are others'. What comes of them late says nothing."""
        for partition in partitions:
            partition.lost = True
            self.unsettled -= partition.out
            partition.out = 0
        self._delayed = [each for each in self._delayed if not each[2].lost]
        heapq.heapify(self._delayed)
        self.supervised.remove_prefetched(lambda delivery: _token(delivery).partition.lost)

    def withdraw(self, partitions: Collection[Partition]) -> None:
        """Take back what of *partitions* was received and not given out."""
        for delivery in self.supervised.remove_prefetched(lambda delivery: _token(delivery).partition in partitions):
            _token(delivery).partition.out -= 1
            self.unsettled -= 1

    def tell_gap(self, read_until: int, reason: str) -> None:
        """Messages are gone: some that came after the last one that was read, whenever that was."""
        logger.error("%s", reason)
        self.supervised.tell_gap(datetime.fromtimestamp(read_until / 1000, UTC), reason)

    # -- receiving -----------------------------------------------------------------------------------------------

    def accept(self, partition: Partition, records: Sequence[Record], into: list[Delivery]) -> None:
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

    def _wait_until_due(self, partition: Partition, record: Record, into: list[Delivery]) -> None:
        told = _told_by(record)
        attempt, remaining = told.attempt, told.due / 1000 - time.time()
        if remaining <= 0:
            into.append(self.delivery(partition, record, attempt))
        else:
            self._delay(partition, record, attempt, remaining)

    def _delay(self, partition: Partition, record: Record, attempt: int, after: float) -> None:
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

    def delivery(self, partition: Partition, record: Record, attempt: int) -> Delivery:
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
        if not token.is_over:
            self._finished(token)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        token = _token(delivery)
        partition, record = token.partition, token.record
        if token.is_over:
            return
        if self.group is None or self.reading.in_place:
            token.settled = True
            self._let_go(partition)
            self._delay(partition, record, partition.offsets.give_back(record.offset), after)
            return
        due = str(round((time.time() + after) * 1000) + 1)
        told = (str(delivery.attempt + 1), due, self._origin(partition, record))
        headers = [*self._own_headers(partition, record)]
        headers += [(name, value.encode()) for name, value in zip(_RETRY_HEADERS, told, strict=True)]
        topic = (
            partition.place.topic if partition.retries else self._names.beside(partition.place.topic, self.group, RETRY)
        )
        await self._move(token, delivery.attempt, topic, headers, partition=delay_bucket(after))

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        token = _token(delivery)
        partition, record = token.partition, token.record
        if token.is_over:
            return
        source = self._retries.get(partition.place.topic, partition.place.topic)
        partition_, _, offset = self._origin(partition, record).partition(":")
        about = dead_letter_headers(
            delivery, reason, source=source, group=self.group or "", partition=partition_, offset=offset
        )
        headers = [*self._own_headers(partition, record)]
        headers += [(name, value.encode(errors="replace")) for name, value in about.items()]
        await self._move(token, delivery.attempt, self._dead[source], headers)

    async def _move(
        self,
        token: _Token,
        attempt: int,
        topic: str,
        headers: list[tuple[str, bytes]],
        partition: int | None = None,
    ) -> None:
        """Write it to *topic*, and then it is done here. If that fails, it comes again, though this member lives on."""
        record = token.record
        try:
            await self._producer.send(topic, record.value or b"", key=record.key, headers=headers, partition=partition)
        except BaseException:
            asyncio.get_running_loop().call_later(self.reading.session_timeout, self._come_again, token, attempt)
            raise
        if not token.is_over:
            self._finished(token)

    def _come_again(self, token: _Token, attempt: int) -> None:
        """Unless another try to settle it has succeeded meanwhile."""
        if not token.is_over:
            token.settled = True
            self._let_go(token.partition)
            self.ready.append((token.partition, token.record, attempt))
            self.wake()

    @staticmethod
    def _own_headers(partition: Partition, record: Record) -> Sequence[tuple[str, bytes]]:
        headers: Sequence[tuple[str, bytes]] = record.headers
        return _told_by(record).headers if partition.retries else headers

    @staticmethod
    def _origin(partition: Partition, record: Record) -> str:
        return _told_by(record).origin if partition.retries else f"{record.partition}:{record.offset}"

    def _finished(self, token: _Token) -> None:
        partition, record = token.partition, token.record
        token.settled = True
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

    def _let_go(self, partition: Partition) -> None:
        partition.out -= 1
        self.unsettled -= 1
        if partition.ending:
            self.freed.set()
        if self.is_held_back:
            self.wake()
        self.supervised.notify_settled()

    def is_too_far(self, partition: Partition) -> bool:
        """Whether nothing more of *partition* is to be read for now."""
        return partition.offsets.spread >= self.reading.max_unacked_per_partition or partition.waiting >= _MOST_WAITING


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
