"""A subscription to Kafka: what it has of its partitions while connections come and go, and how that is settled."""

from __future__ import annotations

import asyncio
import heapq
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeAlias, cast
from uuid import UUID

import msgspec
from aiokafka import TopicPartition

from diator._text import counted
from diator.brokers.base import Delivery, Topic
from diator.brokers.connecting import BackgroundTasks
from diator.brokers.kafka._consumer import ReadOptions, Record
from diator.brokers.kafka._fetched import Headers, Unreadable
from diator.brokers.kafka._names import DEAD, RETRY, Names
from diator.brokers.kafka._offsets import Offsets, delay_bucket, longest_delay
from diator.brokers.kafka._producer import Producer
from diator.brokers.settling import ALL_OMITTED, OMITTED, confirmed, dead_letter_headers
from diator.brokers.supervisor import ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import ConfigurationError, MessageRejected

logger: logging.Logger = logging.getLogger(__name__)

#: How many messages of one partition of a retry topic wait here until they are due.
_MAX_WAITING = 100
#: How many bytes of one partition are here at most, before its next fetch.
_MAX_HELD_BYTES = 8 * 1024 * 1024
#: How many bytes a header takes beside its name and value. In a compressed batch, millions of empty ones are a few KiB.
_HEADER_BYTES = 64
#: A larger message is dead-lettered by itself: Kafka may refuse it, and then what is sent with it is sent again.
_LARGE = 64 * 1024
#: The last headers of a message in a retry topic: attempt, due (milliseconds since 1970), and where it came from.
_RETRY_HEADERS = ("diator-retry-attempt", "diator-retry-due", "diator-retry-origin")
#: Their values, as diator writes them. No attempt, time or offset has more digits.
_CONTROL = re.compile(rb"([0-9]{1,6}) ([0-9]{1,15}) ([0-9]{1,9}:[0-9]{1,19})")


class Partition:
    """
    One partition, from its assignment to this consumer until its revocation. A new assignment makes a new object.

    Attributes:
        place: The Kafka topic and the number of the partition.
        topic: What its messages are about.
        offsets: Which of its messages are finished.
        is_retries: Whether it is of a retry topic.
        longest_delay: If so: how many seconds ahead its retries are due, at most.
        committed: What was committed last, as `Offsets.progress` returned it.
        is_ending: Whether it is about to go to another consumer: its deliveries may be settled, and no more begin.
        is_lost: Whether it is another consumer's: settling a delivery of it has no effect.
        is_paused: Whether the client fetches nothing of it for now.
        read_until: When its last message that was read had been sent, in milliseconds since 1970. Its sender says so.
        unsettled: How many of its deliveries are not settled, handed out or not.
        waiting: How many of its messages wait here until they are due.
        held: How many bytes its unfinished messages take.
        behind: With retries in place: by key, the messages that wait until an earlier one of their key is settled.
        batches: The first offset and the timestamp of each batch that has unfinished messages, and of older ones.
    """

    __slots__ = (
        "batches",
        "behind",
        "committed",
        "held",
        "is_ending",
        "is_lost",
        "is_paused",
        "is_retries",
        "longest_delay",
        "max_unacked",
        "offsets",
        "place",
        "read_until",
        "topic",
        "unsettled",
        "waiting",
    )

    def __init__(
        self,
        place: TopicPartition,
        topic: Topic,
        offsets: Offsets,
        *,
        is_retries: bool,
        longest_delay: float,
        max_unacked: int,
    ) -> None:
        self.place = place
        self.topic = topic
        self.offsets = offsets
        self.is_retries = is_retries
        self.longest_delay = longest_delay
        self.max_unacked = max_unacked
        self.committed = offsets.progress()
        self.is_ending = False
        self.is_lost = False
        self.is_paused = False
        self.read_until = 0
        self.unsettled = 0
        self.waiting = 0
        self.held = 0
        self.behind: dict[bytes, deque[Record]] = {}
        self.batches: deque[tuple[int, int]] = deque()

    def note_batch(self, first: Record) -> None:
        """Remember when the *first* message of a batch was sent, for `unfinished_since`."""
        self._forget_batches()
        self.batches.append((first.offset, first.timestamp))

    @property
    def unfinished_since(self) -> int:
        """When the batch of the oldest unfinished message was sent, in milliseconds since 1970; 0 if there is none."""
        self._forget_batches()
        return self.batches[0][1] if self.offsets.spread else 0

    def _forget_batches(self) -> None:
        while len(self.batches) > 1 and self.batches[1][0] <= self.offsets.lowest:
            self.batches.popleft()

    @property
    def is_too_far(self) -> bool:
        """Whether it must not be read further for now: too many of its messages, or bytes, are here."""
        return self.offsets.spread >= self.max_unacked or self.held >= _MAX_HELD_BYTES or self.waiting >= _MAX_WAITING


class _Token(msgspec.Struct, eq=False, gc=False):  # nothing that it refers to refers back
    """
    The handle of a delivery.

    Attributes:
        partition: The partition of the message.
        record: The message.
        size: About how many bytes it takes.
        is_settled: Whether settling it has no effect any more: it is settled, or another delivery replaced it.
        is_counted: Whether it is one of the unsettled deliveries. One that could not be settled makes room for others.
    """

    partition: Partition
    record: Record
    size: int
    is_settled: bool = False
    is_counted: bool = True

    @property
    def is_over(self) -> bool:
        return self.is_settled or self.partition.is_lost

    def __repr__(self) -> str:  # a record has the payload in it, and this may end in a log
        return f"{self.partition.place}:{self.record.offset}"


class Wakeup:
    """Lets a connection wait for its client, and yet look again at once when something else has changed."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: asyncio.Future[None] | None = None

    def set(self) -> None:
        """End the wait, or the next one if nobody waits."""
        self._is_set = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def clear(self) -> None:
        """Note that the connection looks at everything now."""
        self._is_set = False

    async def wait(self, future: Callable[[], asyncio.Future[None]], *, within: float) -> None:
        """Wait until the future that *future* returns is done, `set` is called, or *within* seconds are over."""
        if self._is_set:
            return
        timer = asyncio.get_running_loop().call_later(within, self.set)
        self._waiting = future()
        try:
            await self._waiting
        finally:
            timer.cancel()
            self._waiting = None


class Subscription(ResilientSubscription):
    """
    A subscription to Kafka: it outlives its connections, and settles its deliveries.

    Args:
        settings: See `ResilientSubscription`.
        options: How it reads.
        names: How its topics and its group are named.
        producer: Sends the retries and dead letters. This subscription ends with it.
        connect: Makes one connection of a subscription; `connected` of `_group.py`.

    Attributes:
        group_id: The name of the group in Kafka.
        topic_names: The Kafka topics that it reads: of its topics, and of their retries.
        dead_letter_topics: The Kafka topics that get its dead letters.
        options: How it reads.
        wakeup: Wakes the connection: something is ready or due, or a partition has room again.
        topic_ids: The id of each topic that it reads, by its name, when it last looked.
        alone: Without a group: the partitions, and how far each is read, whatever becomes of the connection.
        has_begun: Without a group: whether it began to read. What is created after that is read from its beginning.
        member_id: Its name in the group; empty until it has had partitions. With it, the next connection is the same
            consumer to the group. As a stranger it would wait until the session of the lost connection ends.
        is_assigned: Whether it knows which partitions it has, and where each of them begins.
    """

    def __init__(
        self, settings: SubscriptionSettings, options: ReadOptions, names: Names, producer: Producer, connect: Connect
    ) -> None:
        topics, group, policy = settings.topics, settings.group, settings.reconnect
        if group is not None:  # what its session survives, its connection survives
            bound = max(policy.probe_timeout, options.session_timeout - policy.idle_timeout)
            settings = replace(settings, reconnect=replace(policy, probe_timeout=bound))
        super().__init__(settings, lossy=False, buffer_size=settings.prefetch + options.extra_prefetch)
        self.options = options
        self.group_id = None if group is None else names.group(group)
        self._connect = connect
        self._group = group
        self._producer = producer
        # Without a group, and in place, a retry waits in memory: there is no retry topic.
        self._has_retry_topics = group is not None and not options.in_place
        try:
            self._topics = {names.topic(topic): topic for topic in topics}
            self._dead_letter_topics = {name: names.beside(name, group, DEAD) for name in self._topics}
            self._retry_topics = (
                {name: names.beside(name, group, RETRY) for name in self._topics} if self._has_retry_topics else {}
            )
        except MessageRejected as error:
            raise ConfigurationError(str(error)) from error
        self._sources = {retries: name for name, retries in self._retry_topics.items()}
        self.topic_names: Sequence[str] = [*self._topics, *self._sources]
        self.dead_letter_topics: Collection[str] = self._dead_letter_topics.values()
        self.wakeup = Wakeup()
        self.topic_ids: dict[str, UUID] = {}
        self.alone: dict[TopicPartition, Partition] = {}
        self.has_begun = False
        self._partitions: dict[TopicPartition, Partition] = {}
        self.member_id = ""
        self.is_assigned = group is None
        self._settled = asyncio.Event()
        self._ready: deque[tuple[Partition, Record, int]] = deque()  # to be delivered without asking Kafka
        self._delayed: list[tuple[float, int, Partition, Record, int]] = []  # a heap, by when each is due
        self._delayed_count = 0  # in the heap it keeps the order of those that are due at once
        self._background = BackgroundTasks()

    # -- connections ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Return whether there is a connection, and it has its partitions or knows that there are none for it."""
        return super().connected and self.is_assigned

    def connect(self) -> AbstractAsyncContextManager[Source]:
        """See `ResilientSubscription.connect`."""
        return self._connect(self)

    async def release(self, ending: Coroutine[Any, Any, None]) -> None:
        """Wait for the end of a connection. If this wait is cancelled, the end goes on, and `leave` waits for it."""
        self._background.start(ending, "leaving Kafka")
        await self._background.wait()

    async def leave(self, prefetched: Collection[Delivery], /) -> None:  # nothing of it was committed
        """Wait until Kafka knows what was settled: the end of the connection commits it, within its own time limit."""
        await self._background.wait()

    # -- partitions ----------------------------------------------------------------------------------------------

    def partition(self, place: TopicPartition, offsets: Offsets, *, of: int = 0) -> Partition:
        """Return a partition that this connection begins to read. Its topic has *of* partitions, as far as known."""
        source = self._sources.get(place.topic)
        made = Partition(
            place,
            self._topics[source or place.topic],
            offsets,
            is_retries=source is not None,
            longest_delay=longest_delay(place.partition, of),
            max_unacked=self.options.max_unacked_per_partition,
        )
        self._partitions[place] = made
        return made

    @property
    def oldest_message(self) -> float | None:
        """See `ResilientSubscription.oldest_message`. A message that waits in a retry topic does not count."""
        read = [each for each in [*self._partitions.values()] if not each.is_lost and not each.is_retries]
        sent = [since for each in read if (since := each.unfinished_since) > 0]  # Kafka writes -1 if it does not know
        return max(0.0, time.time() - min(sent) / 1000) if sent else 0.0

    def read_alone(self, positions: Mapping[TopicPartition, int]) -> None:
        """Begin to read further partitions without a group, each at its position."""
        for place, position in positions.items():
            self.alone[place] = self.partition(place, Offsets(position))
        self.has_begun = True

    async def drain(self, partitions: Collection[Partition]) -> None:
        """Begin nothing more of *partitions*. Wait for their deliveries to be settled, for `drain_timeout` at most."""
        for partition in partitions:
            partition.is_ending = True
        for delivery in self.remove_prefetched(lambda delivery: _token(delivery).partition in partitions):
            _token(delivery).partition.unsettled -= 1
            self.unsettled -= 1
        try:
            async with asyncio.timeout(self.options.drain_timeout):
                while any(partition.unsettled for partition in partitions):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            late = sum(partition.unsettled for partition in partitions)
            within = self.options.drain_timeout
            logger.warning(
                "%s not settled within drain_timeout (%g s) when their partitions went to other consumers, which "
                "receive them again",
                counted(late, "delivery was", "deliveries were"),
                within,
                extra={**self.log_fields, "messages": late, "seconds": within},
            )

    def lose(self, partitions: Iterable[Partition]) -> None:
        """Record that *partitions* are other consumers' now: settling a delivery of them has no effect."""
        for partition in partitions:
            partition.is_lost = True
            self.unsettled -= partition.unsettled
            partition.unsettled = 0
        self._delayed = [each for each in self._delayed if not each[2].is_lost]
        heapq.heapify(self._delayed)
        self.remove_prefetched(lambda delivery: _token(delivery).partition.is_lost)

    def report_lost_messages(self, read_until: int, reason: str) -> None:
        """Report a gap: Kafka has no longer what came after *read_until* (milliseconds since 1970)."""
        logger.error("%s", reason, extra={**self.log_fields, "reason": reason})
        self.report_gap(datetime.fromtimestamp(read_until / 1000, UTC), reason)

    # -- receiving -----------------------------------------------------------------------------------------------

    def accept(self, partition: Partition, records: Sequence[Record], into: list[Delivery]) -> None:
        """Append to *into* the deliveries of those *records* that may be handled now. The others wait here."""
        if not records:
            return
        if 0 <= records[-1].timestamp <= time.time() * 1000:  # otherwise its sender has set a wrong time
            partition.read_until = records[-1].timestamp
        partition.note_batch(records[0])
        take, before = partition.offsets.take, len(into)
        if not partition.is_retries and not self.options.in_place:
            into += [self._delivery(partition, each, attempt) for each in records if (attempt := take(each.offset))]
            partition.held += sum([each.token.size for each in into[before:]])  # type: ignore[attr-defined]  # a `_Token`
        else:
            for record in records:
                if attempt := take(record.offset):
                    partition.held += _size(record)
                    self._accept_in_order(partition, record, attempt, into)
        self._count(partition, len(into) - before)

    def _accept_in_order(self, partition: Partition, record: Record, attempt: int, into: list[Delivery]) -> None:
        if partition.is_retries:
            control = _control_of(partition, record)
            if not control.due:
                what = f"{partition.place} has a message that diator did not write"
                self.lines.log(
                    logging.WARNING,
                    what,
                    "%s, at the offset %d",
                    *(what, record.offset),
                    fields=lambda: {"source": partition.place.topic},
                )
            remaining = min(control.due / 1000 - time.time(), partition.longest_delay)
            if remaining > 0:
                self._delay(partition, record, control.attempt, remaining)
            else:
                into.append(self._delivery(partition, record, control.attempt))
        elif record.key is None:
            into.append(self._delivery(partition, record, attempt))
        elif record.key in partition.behind:
            partition.behind[record.key].append(record)
        else:
            partition.behind[record.key] = deque()
            into.append(self._delivery(partition, record, attempt))

    def _delay(self, partition: Partition, record: Record, attempt: int, after: float) -> None:
        self._delayed_count += 1
        partition.waiting += 1
        due = asyncio.get_running_loop().time() + after
        heapq.heappush(self._delayed, (due, self._delayed_count, partition, record, attempt))
        self.wakeup.set()

    def due_in(self) -> float | None:
        """Return in how many seconds the next delayed message is due; None if there is none."""
        return self._delayed[0][0] - asyncio.get_running_loop().time() if self._delayed else None

    def take_ready(self, most: int) -> list[Delivery]:
        """Return at most *most* deliveries of messages that are here: delayed ones that are due, and unblocked ones."""
        if self._delayed:
            now = asyncio.get_running_loop().time()
            while self._delayed and self._delayed[0][0] <= now:
                _, _, partition, record, attempt = heapq.heappop(self._delayed)
                partition.waiting -= 1
                self._ready.append((partition, record, attempt))
        taken: list[Delivery] = []
        while self._ready and len(taken) < most:
            partition, record, attempt = self._ready.popleft()
            if not partition.is_lost and not partition.is_ending:
                self._count(partition, 1)
                taken.append(self._delivery(partition, record, attempt))
        return taken

    def _count(self, partition: Partition, deliveries: int) -> None:
        partition.unsettled += deliveries
        self.unsettled += deliveries

    def _delivery(self, partition: Partition, record: Record, attempt: int) -> Delivery:
        return Delivery(
            topic=partition.topic,
            body=record.value or b"",
            headers=_headers(partition, record) if record.headers or record.key is not None else {},
            attempt=attempt,
            settler=self,
            token=_Token(partition, record, _size(record)),
            unreadable=record.why if type(record) is Unreadable else None,
        )

    def sent_at(self, delivery: Delivery) -> float | None:
        """See `Settler`: the time of the record. A message in a retry topic has that of its retry, so it has none."""
        partition, record = _token(delivery).partition, _token(delivery).record
        return None if partition.is_retries or record.timestamp < 0 else record.timestamp / 1000

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Record that the message is finished. The connection commits it together with others."""
        token: Any = delivery.token  # a `_Token`
        partition = token.partition
        if not (token.is_settled or partition.is_lost):
            self._finish(token, partition)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        """Write the message to the retry topic of its group. Without one, it waits here."""
        token = _token(delivery)
        partition, record = token.partition, token.record
        if token.is_over:
            return
        if type(record) is Unreadable:
            raise MessageRejected(f"a message that cannot be read cannot be requeued; dead-letter it ({record.why})")
        if not self._has_retry_topics:
            token.is_settled = True
            self._make_room(token, partition)
            self._delay(partition, record, partition.offsets.requeue(record.offset), after)
            return
        due = str(round((time.time() + after) * 1000) + 1)
        control = (str(delivery.attempt + 1), due, _origin(partition, record))
        headers = [*_own_headers(partition, record)]
        headers += [(name, value.encode()) for name, value in zip(_RETRY_HEADERS, control, strict=True)]
        topic_name = partition.place.topic if partition.is_retries else self._retry_topics[partition.place.topic]
        with self._redelivered_on_failure(token, delivery.attempt):
            await self._move(token, topic_name, record.key, record.value, headers, partition=delay_bucket(after))

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        """Write the message to the dead-letter topic of its group; if Kafka refuses it there, what it accepts of it."""
        token = _token(delivery)
        partition, record = token.partition, token.record
        if token.is_over:
            return
        about = self._about(delivery, reason)
        own = _own_headers(partition, record)
        topic_name = self._dead_letter_topic(partition)
        refused: MessageRejected | None = None
        with self._redelivered_on_failure(token, delivery.attempt):
            for omitted in ("", "body", ALL_OMITTED) if type(record) is not Unreadable else (ALL_OMITTED,):
                if omitted:
                    about[OMITTED] = omitted
                headers = [] if "headers" in omitted else [*own]
                headers += _encoded(about)
                key, value = None if "key" in omitted else record.key, None if omitted else record.value
                try:
                    await self._move(token, topic_name, key, value, headers)
                except MessageRejected as error:
                    refused = error  # as too large, most likely
                else:
                    return
            assert refused is not None, "it was refused, or this method has returned"  # noqa: S101
            raise refused

    async def dead_letter_all(self, reasons: Mapping[Delivery, str], /) -> Collection[Delivery]:
        sending: dict[Delivery, Awaitable[None]] = {}
        for delivery, reason in reasons.items():
            token = _token(delivery)
            partition, record = token.partition, token.record
            if not token.is_over and type(record) is not Unreadable and token.size <= _LARGE:
                headers = [*_own_headers(partition, record), *_encoded(self._about(delivery, reason))]
                name = self._dead_letter_topic(partition)
                sending[delivery] = self._producer.send(name, record.value, key=record.key, headers=headers)
        stored = await confirmed(sending)
        for delivery in stored:
            token = _token(delivery)
            if not token.is_over:
                self._finish(token, token.partition)
        return stored

    def _dead_letter_topic(self, partition: Partition) -> str:
        return self._dead_letter_topics[self._sources.get(partition.place.topic, partition.place.topic)]

    def _about(self, delivery: Delivery, reason: str) -> dict[str, str]:
        """Return the headers that a dead letter has besides those of its message."""
        partition, record = _token(delivery).partition, _token(delivery).record
        source = self._sources.get(partition.place.topic, partition.place.topic)
        number, _, offset = _origin(partition, record).partition(":")
        return dead_letter_headers(
            delivery, reason, source=source, group=self._group or "", partition=number, offset=offset
        )

    async def _move(
        self,
        token: _Token,
        topic_name: str,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]],
        *,
        partition: int | None = None,
    ) -> None:
        """Write the message to *topic_name*; then it is finished here."""
        await self._producer.send(topic_name, value, key=key, headers=headers, partition=partition)
        if not token.is_over:
            self._finish(token, token.partition)

    @contextmanager
    def _redelivered_on_failure(self, token: _Token, attempt: int) -> Generator[None, None, None]:
        """If the message cannot be settled, others have its place, and it is delivered again later."""
        try:
            yield
        except BaseException:
            self._make_room(token, token.partition)
            # Not at once: a service that fails would be flooded with attempts.
            asyncio.get_running_loop().call_later(self.options.session_timeout, self._redeliver, token, attempt)
            raise

    def _redeliver(self, token: _Token, attempt: int) -> None:
        """Deliver the message again, unless another try to settle it has succeeded meanwhile."""
        if not token.is_over:
            token.is_settled = True
            self._ready.append((token.partition, token.record, attempt))
            self.wakeup.set()

    def _finish(self, token: _Token, partition: Partition) -> None:
        record = token.record
        token.is_settled = True
        partition.held -= token.size
        partition.offsets.finish(record.offset)
        self._make_room(token, partition)
        if partition.behind and record.key in partition.behind:
            behind = partition.behind[record.key]
            if behind:
                following = behind.popleft()
                self._ready.append((partition, following, partition.offsets.attempt(following.offset)))
                self.wakeup.set()
            else:
                del partition.behind[record.key]

    def _make_room(self, token: _Token, partition: Partition) -> None:
        if not token.is_counted or partition.is_lost:
            return
        token.is_counted = False
        partition.unsettled -= 1
        self.unsettled -= 1
        if partition.is_ending:
            self._settled.set()
        if partition.is_paused:
            self.wakeup.set()
        self.notify_settled()


#: Makes one connection of a subscription: entered, it reads; left, it is gone.
Connect: TypeAlias = Callable[[Subscription], AbstractAsyncContextManager[Source]]


def _token(delivery: Delivery) -> _Token:
    return cast("_Token", delivery.token)


def _size(record: Record) -> int:
    """Return about how many bytes *record* takes here."""
    size = len(record.value or b"") + len(record.key or b"")
    for name, value in record.headers:
        size += _HEADER_BYTES + len(name) + len(value or b"")
    return size


# -- headers, and where a message came from ------------------------------------------------------------------------


def _headers(partition: Partition, record: Record) -> dict[str, str]:
    headers = {name: (value or b"").decode(errors="replace") for name, value in _own_headers(partition, record)}
    if record.key is not None:
        headers.setdefault("key", record.key.decode(errors="replace"))  # another program sends no such header
    return headers


def _encoded(headers: Mapping[str, str]) -> Headers:
    return [(name, value.encode(errors="replace")) for name, value in headers.items()]


def _own_headers(partition: Partition, record: Record) -> Headers:
    """Return the headers that the sender wrote."""
    return _control_of(partition, record).headers if partition.is_retries else record.headers


def _origin(partition: Partition, record: Record) -> str:
    """Return the first partition of the message and its offset there, with a colon between."""
    return (
        _control_of(partition, record).origin
        if partition.is_retries
        else f"{partition.place.partition}:{record.offset}"
    )


@dataclass(frozen=True)
class _Control:
    """
    The headers of a message in a retry topic that control its retry.

    Attributes:
        attempt: Which attempt its next delivery is.
        due: When the next delivery is due, in milliseconds since 1970.
        origin: Its first partition and its offset there, with a colon between.
        headers: Its other headers.
    """

    attempt: int
    due: int
    origin: str
    headers: Headers


def _control_of(partition: Partition, record: Record) -> _Control:
    """Read the control headers. A message that another program put there is due now, as a second attempt."""
    control = record.headers[-len(_RETRY_HEADERS) :]
    if tuple(name for name, _ in control) == _RETRY_HEADERS:
        found = _CONTROL.fullmatch(b" ".join(value or b"" for _, value in control))
        if found and int(found[1]) > 1:
            return _Control(int(found[1]), int(found[2]), found[3].decode(), record.headers[: -len(control)])
    return _Control(2, 0, f"{partition.place.partition}:{record.offset}", record.headers)
