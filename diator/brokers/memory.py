"""A message broker inside the process, in full: the shortest program that keeps the contract, and its reference."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, encode
from diator.brokers.message import Message
from diator.exceptions import BrokerClosed, ConfigurationError, MessageRejected


class MemoryMessageBroker:
    """
    Queues of encoded messages: for tests, examples and programs that need no service.

    Each group has a queue, which collects from the moment of its first subscription, whether or not a member is there;
    a subscription without a group has one of its own, which ends with it. A message that no queue wants is kept, for
    the first subscription to its topic, or for `receive`. At most *capacity* messages wait in each queue, and as many
    are kept: one more is rejected, never dropped. *max_message_bytes* bounds each of them.

    Closing refuses further messages and ends all waiting; what is in the queues is gone with the object.
    """

    def __init__(self, *, capacity: int = 10_000, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        if capacity < 1:
            raise ConfigurationError("capacity is at least 1")
        self._capacity = capacity
        self._max_message_bytes = max_message_bytes
        self._kept = _Queue()
        self._groups: dict[str, _Queue] = {}
        self._queues: list[_Queue] = []
        self._dead_letters: list[DeadLetter] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What this broker promises."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="accepted",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash"}),
            redelivery_bound=0.0,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact",
            ordering="destination",
            distribution=frozenset({"broadcast", "competing"}),
            subscription="durable",
            unroutable="retained",
            backpressure="pull",
            max_message_bytes=self._max_message_bytes,
        )

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """What consumers put aside, the oldest first."""
        return self._dead_letters

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`. It never waits, and no handler runs in it."""
        if self._closed:
            raise BrokerClosed("this broker is closed", message_id=message.message_id)
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        self._put(Topic(message.message_type, message.message_name), body, message.message_id)

    def _put(self, topic: Topic, body: bytes, message_id: UUID | None = None) -> None:
        queues = [queue for queue in self._queues if topic in queue.topics]
        if any(len(queue) >= self._capacity for queue in queues) or (not queues and len(self._kept) >= self._capacity):
            raise MessageRejected(
                f"{self._capacity:,} messages wait already, and nobody takes them", message_id=message_id
            )
        for queue in queues or [self._kept]:
            queue.put(_Entry(topic, body))

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,  # there is no link that could have a gap
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """See `ReadableBroker.subscribe`."""
        self.check_open()
        if prefetch < 1:
            raise ConfigurationError("prefetch is at least 1")
        queue = _Queue() if group is None else self._groups.setdefault(group, _Queue())
        queue.topics |= set(topics)
        if queue not in self._queues:
            self._queues.append(queue)
        for entry in self._kept.take_all(queue.topics):
            queue.put(entry)
        member = _Subscription(self, queue, topics, prefetch)
        try:
            yield member
        finally:
            member.leave()
            if group is None:
                self._queues.remove(queue)

    async def receive(self) -> Message:
        """Take the oldest message that no subscription wanted; wait for one if there is none."""
        while not len(self._kept):
            self.check_open()
            await self._kept.change()
        return decode(self._kept.take().body, max_bytes=self._max_message_bytes)

    def __len__(self) -> int:
        """How many messages `receive` would find."""
        return len(self._kept)

    async def aclose(self) -> None:
        """Refuse further messages, and end all waiting. Calling it again does nothing."""
        self._closed = True
        for queue in [self._kept, *self._queues]:
            queue.changed()

    def check_open(self) -> None:
        """BrokerClosed if it is."""
        if self._closed:
            raise BrokerClosed("this broker is closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that was put aside, as it was, and why."""

    topic: Topic
    body: bytes
    attempts: int
    reason: str


@dataclass(slots=True, eq=False)
class _Entry:
    topic: Topic
    body: bytes
    attempt: int = 1


class _Queue:
    """What waits for the members of one group, in order."""

    def __init__(self) -> None:
        self.topics: set[Topic] = set()
        self.waiting: deque[_Entry] = deque()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self.waiting)

    def put(self, entry: _Entry) -> None:
        self.waiting.append(entry)
        self._changed.set()

    def requeue(self, entries: Collection[_Entry]) -> None:
        """Return what was given out, before everything that came later."""
        for entry in entries:
            entry.attempt += 1
        self.waiting.extendleft(reversed([*entries]))
        self._changed.set()

    def take(self) -> _Entry:
        return self.waiting.popleft()

    def take_of(self, topics: Collection[Topic]) -> _Entry | None:
        """Take the oldest that is of *topics*; None if there is none."""
        for place, entry in enumerate(self.waiting):
            if entry.topic in topics:
                del self.waiting[place]
                return entry
        return None

    def take_all(self, topics: Collection[Topic]) -> list[_Entry]:
        """Take what is of *topics*, in its order."""
        taken = [entry for entry in self.waiting if entry.topic in topics]
        self.waiting = deque(entry for entry in self.waiting if entry.topic not in topics)
        return taken

    async def change(self) -> None:
        """Wait until there is reason to look again."""
        self._changed.clear()
        await self._changed.wait()

    def changed(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()


class _Subscription:
    """One subscription: takes what it wants from its queue, and settles what it took."""

    def __init__(self, broker: MemoryMessageBroker, queue: _Queue, topics: Collection[Topic], prefetch: int) -> None:
        self._broker = broker
        self.queue = queue
        self.topics = {*topics}
        self._prefetch = prefetch
        self.unsettled: dict[Delivery, _Entry] = {}
        self._left = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        while self._left or len(self.unsettled) >= self._prefetch or not (entry := self.queue.take_of(self.topics)):
            if self._left:
                raise StopAsyncIteration
            self._broker.check_open()
            await self.queue.change()
        delivery = Delivery(topic=entry.topic, body=entry.body, headers={}, attempt=entry.attempt, settler=self)
        self.unsettled[delivery] = entry
        return delivery

    async def ack(self, delivery: Delivery, /) -> None:
        self._settled(delivery)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        if entry := self._settled(delivery):
            if after > 0:
                asyncio.get_running_loop().call_later(after, self.queue.requeue, [entry])
            else:
                self.queue.requeue([entry])

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        if entry := self._settled(delivery):
            letter = DeadLetter(topic=entry.topic, body=entry.body, attempts=entry.attempt, reason=reason)
            self._broker.dead_letters.append(letter)

    def leave(self) -> None:
        """What this member has not settled goes to others, in its order."""
        self._left = True
        self.queue.requeue(self.unsettled.values())
        self.unsettled.clear()

    def _settled(self, delivery: Delivery) -> _Entry | None:
        """Give the entry of *delivery*, once; None if it was returned to the queue before, or is no longer ours."""
        self.queue.changed()
        return self.unsettled.pop(delivery, None)
