"""
A message broker inside the process.

It is the shortest implementation of the whole contract, and the reference for the other transports.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

from diator._options import check_counts
from diator._text import counted
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import MAX_MESSAGE_BYTES, decode, encode
from diator.brokers.message import Codec, Message
from diator.brokers.sending import check_has_ended
from diator.exceptions import BrokerClosed, MessageRejected


class MemoryMessageBroker:
    """
    A broker with queues of encoded messages in memory, for tests, examples and programs that need no service.

    Each group has a queue. It collects messages from the group's first subscription on, whether or not the group has a
    consumer. A subscription without a group has its own queue, which ends with the subscription. A message that no
    queue takes is retained for the first group that subscribes to its topic, or for `receive`.

    It serves one event loop at a time, as every broker does. When that has ended, the next one finds the messages as a
    service would keep them: those that nobody has settled are redelivered.

    Closing the broker refuses new messages and ends every wait. The messages in the queues are lost with the object.

    Args:
        capacity: How many messages may wait in each queue, and how many may be kept. One more is rejected, never
            dropped.
        max_message_bytes: The size limit of an encoded message, in bytes.

    Raises:
        ConfigurationError: *capacity* is below 1.
    """

    messaging_system = "diator_memory"

    def __init__(self, *, capacity: int = 10_000, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        check_counts(1, capacity=capacity, max_message_bytes=max_message_bytes)
        self._capacity = capacity
        self._max_message_bytes = max_message_bytes
        self._kept = _Queue()
        self._groups: dict[str, _Queue] = {}
        self._queues: list[_Queue] = []
        self._dead_letters: list[DeadLetter] = []
        self._subscriptions: list[_Subscription] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """The promises of this broker."""
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
        """Return the dead-letter queue, oldest message first."""
        return self._dead_letters

    async def send_message(self, message: Message, /) -> None:
        """Send *message*; see `MessageBroker.send_message`. This call never waits and runs no handler."""
        if asyncio.get_running_loop() is not self._loop:
            self._bind_to_running_loop()
        if self._closed:
            raise BrokerClosed("this broker is closed", message_id=message.message_id)
        body = encode(message, max_bytes=self._max_message_bytes, headers_in_body=True)
        self._put(Topic(message.message_type, message.message_name), body, message.message_id, message.codec)

    def _put(self, topic: Topic, body: bytes, message_id: UUID | None = None, codec: Codec | None = None) -> None:
        queues = [queue for queue in self._queues if topic in queue.topics]
        if any(len(queue) >= self._capacity for queue in queues) or (not queues and len(self._kept) >= self._capacity):
            waiting = counted(self._capacity, "message is waiting", "messages are waiting")
            raise MessageRejected(
                f"a queue of {topic.message_name} is full, {waiting}; start a consumer or raise capacity",
                message_id=message_id,
            )
        for queue in queues or [self._kept]:
            queue.put(_Entry(topic, body, codec))

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,  # never called: there is no connection to lose
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """Subscribe to *topics*; see `ReadableBroker.subscribe`."""
        self._bind_to_running_loop()
        self.check_open()
        check_counts(1, prefetch=prefetch)
        queue = _Queue() if group is None else self._groups.setdefault(group, _Queue())
        queue.topics |= set(topics)
        if queue not in self._queues:
            self._queues.append(queue)
        if group is not None:
            for entry in self._kept.take_all(queue.topics):
                queue.put(entry)
        subscription = _Subscription(self, queue, topics, prefetch)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._end(subscription)

    def _end(self, subscription: _Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            subscription.leave()
            if subscription.queue not in self._groups.values():
                self._queues.remove(subscription.queue)

    async def receive(self) -> Message:
        """Return the oldest message that no subscription took, and remove it; wait until there is one."""
        self._bind_to_running_loop()
        while not len(self._kept):
            self.check_open()
            await self._kept.wait_for_change()
        entry = self._kept.take()
        if entry.codec is not None:
            return entry.codec.decode(entry.body, {}, entry.topic)
        return decode(entry.body, max_bytes=self._max_message_bytes)

    def __len__(self) -> int:
        """Return the number of messages that `receive` can return."""
        return len(self._kept)

    async def aclose(self) -> None:
        """Refuse new messages and end every wait. A further call does nothing."""
        self._bind_to_running_loop()
        self._closed = True
        for queue in [self._kept, *self._queues]:
            queue.notify()

    def check_open(self) -> None:
        """Raise `BrokerClosed` if the broker is closed."""
        if self._closed:
            raise BrokerClosed("this broker is closed")

    def _bind_to_running_loop(self) -> None:
        """Use the running event loop. End what has been left over from an earlier one, which may not have ended it."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        check_has_ended(self._loop)
        self._loop = loop
        for queue in [self._kept, *self._queues]:
            queue.bind_to(loop)
        for subscription in [*self._subscriptions]:
            self._end(subscription)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """
    A dead-lettered message, unchanged.

    Attributes:
        topic: The topic that it was sent to.
        body: The encoded message.
        attempts: How often it was delivered.
        reason: Why it was dead-lettered.
    """

    topic: Topic
    body: bytes = field(repr=False)
    attempts: int
    reason: str


@dataclass(slots=True, eq=False)
class _Entry:
    topic: Topic
    body: bytes
    codec: Codec | None = None
    attempt: int = 1


class _Queue:
    """The messages that wait for the consumers of one group, in order."""

    def __init__(self) -> None:
        self.topics: set[Topic] = set()
        self.waiting: deque[_Entry] = deque()
        self._delayed: dict[_Entry, float] = {}  # when each is due, by the time of the event loop
        self._changed = asyncio.Event()

    def bind_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use *loop* from now on, for everything that waits."""
        self._changed = asyncio.Event()
        for entry, due in self._delayed.items():
            loop.call_at(due, self._requeue_due, entry)

    def __len__(self) -> int:
        return len(self.waiting)

    def put(self, entry: _Entry) -> None:
        self.waiting.append(entry)
        self._changed.set()

    def requeue(self, entries: Collection[_Entry]) -> None:
        """Put back entries that were delivered, in front of everything that was sent later, as the next attempt."""
        for entry in entries:
            entry.attempt += 1
        self.waiting.extendleft(reversed([*entries]))
        self._changed.set()

    def requeue_later(self, entry: _Entry, after: float) -> None:
        """Put back an entry as `requeue` does, in *after* seconds."""
        loop = asyncio.get_running_loop()
        self._delayed[entry] = due = loop.time() + after
        loop.call_at(due, self._requeue_due, entry)

    def _requeue_due(self, entry: _Entry) -> None:
        if self._delayed.pop(entry, None) is not None:  # otherwise an earlier event loop is running again
            self.requeue([entry])

    def take(self) -> _Entry:
        return self.waiting.popleft()

    def take_first(self, topics: Collection[Topic]) -> _Entry | None:
        """Remove and return the oldest entry of *topics*; None if there is none."""
        waiting = self.waiting
        if waiting and waiting[0].topic in topics:
            return waiting.popleft()
        for place, entry in enumerate(waiting):
            if entry.topic in topics:
                del waiting[place]
                return entry
        return None

    def take_all(self, topics: Collection[Topic]) -> list[_Entry]:
        """Remove and return all entries of *topics*, in order."""
        taken = [entry for entry in self.waiting if entry.topic in topics]
        self.waiting = deque(entry for entry in self.waiting if entry.topic not in topics)
        return taken

    async def wait_for_change(self) -> None:
        """Wait until an entry is added or room is freed, or until `notify`."""
        self._changed.clear()
        await self._changed.wait()

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()


class _Subscription:
    """A subscription: the iterator of its deliveries, and their settler."""

    def __init__(self, broker: MemoryMessageBroker, queue: _Queue, topics: Collection[Topic], prefetch: int) -> None:
        self._broker = broker
        self.queue = queue
        self.topics = {*topics}
        self._prefetch = self._most_unsettled = prefetch
        self.unsettled: dict[Delivery, _Entry] = {}
        self._postponed: set[Delivery] = set()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    def receive_nowait(self) -> Delivery | None:
        """See `ResilientSubscription.receive_nowait`."""
        if len(self.unsettled) >= self._most_unsettled or self._ended:
            return None
        if (entry := self.queue.take_first(self.topics)) is None:
            return None
        delivery = Delivery(topic=entry.topic, body=entry.body, headers={}, attempt=entry.attempt, settler=self)
        self.unsettled[delivery] = entry
        return delivery

    async def __anext__(self) -> Delivery:
        while (delivery := self.receive_nowait()) is None:
            if self._ended:
                raise StopAsyncIteration
            self._broker.check_open()
            await self.queue.wait_for_change()
        return delivery

    def make_room(self, deliveries: int) -> None:
        """See `ResilientSubscription.make_room`."""
        self._most_unsettled = self._prefetch + deliveries + len(self._postponed)
        self.queue.notify()

    def postpone(self, delivery: Delivery) -> None:
        """See `ResilientSubscription.postpone`."""
        self._postponed.add(delivery)
        self._most_unsettled += 1

    def resume(self, delivery: Delivery) -> bool:
        """See `ResilientSubscription.resume`. Nothing is withdrawn here: there is no connection to lose."""
        self._postponed.remove(delivery)
        self._most_unsettled -= 1
        return True

    async def ack(self, delivery: Delivery, /) -> None:
        self._release(delivery)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        if entry := self._release(delivery):
            if after > 0:
                self.queue.requeue_later(entry, after)
            else:
                self.queue.requeue([entry])

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        if entry := self._release(delivery):
            letter = DeadLetter(topic=entry.topic, body=entry.body, attempts=entry.attempt, reason=reason)
            self._broker.dead_letters.append(letter)

    def leave(self) -> None:
        """End the subscription. Its unsettled messages go to other consumers, in order."""
        self._ended = True
        for delivery in self._postponed & self.unsettled.keys():
            self.unsettled[delivery].attempt -= 1  # it was not delivered
        self.queue.requeue(self.unsettled.values())
        self.unsettled.clear()

    def _release(self, delivery: Delivery) -> _Entry | None:
        """Return the entry of *delivery*, once; None if the subscription has ended and no longer holds it."""
        self.queue.notify()  # a settled delivery makes room for the next one
        return self.unsettled.pop(delivery, None)
