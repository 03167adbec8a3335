"""Which messages Kafka has not confirmed, and where each of them is: without a client, an event loop or a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar
from uuid import UUID

import msgspec

P = TypeVar("P")
"""A producer. The table only distinguishes producers."""

Place: TypeAlias = tuple[str, int]
"""A topic and the number of its partition: what aiokafka calls a TopicPartition."""


class Call(msgspec.Struct, eq=False):
    """
    A message, and the caller who waits for its confirmation.

    Attributes:
        place: The partition that the message goes to.
        size: How many bytes the message takes in a batch, at most.
        deadline: When the call must have ended, by the clock of the event loop.
        confirmed: What the caller waits for.
        is_alone: Whether the message needs a batch of its own: Kafka refused a batch that held it and did not name the
            message that it refused.
    """

    place: Place
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] | None
    size: int
    message_id: UUID | None
    deadline: float
    confirmed: asyncio.Future[None]
    is_alone: bool = False


class Batch(Generic[P]):
    """
    The messages that go to one partition at once and are confirmed at once.

    Attributes:
        producer: The producer that sends the batch.
        place: The partition that the batch goes to.
        calls: Its messages in their order, at least one. None are left once the batch was withdrawn.
        size: How many bytes the messages take, at most.
        room: How many bytes the batch may have. A first message may have more.
        is_open: Whether the batch may take another message.
        is_sent: Whether the producer has begun to send it, so that its messages may have arrived.
    """

    __slots__ = ("calls", "is_open", "is_sent", "place", "producer", "room", "size")

    def __init__(self, producer: P, first: Call, room: int) -> None:
        self.producer = producer
        self.place = first.place
        self.calls = [first]
        self.size = first.size
        self.room = room
        self.is_open = not first.is_alone
        self.is_sent = False

    @property
    def deadline(self) -> float:
        """When the oldest of its calls must have ended."""
        return self.calls[0].deadline

    def seal(self) -> None:
        """Note that the producer begins to send the batch. It takes no more messages."""
        self.is_open = False
        self.is_sent = True

    def take(self, call: Call) -> bool:
        """Add *call*, and return whether the batch had room for it."""
        size = self.size + call.size
        if size > self.room or call.is_alone:
            return False
        self.calls.append(call)
        self.size = size
        return True

    def withdraw(self) -> list[Call]:
        """Return its calls. The producer finds the batch empty, and sends nothing."""
        self.is_open = False
        calls, self.calls = self.calls, []
        return calls


class Unconfirmed(Generic[P]):
    """
    The calls whose messages Kafka has not confirmed.

    Each call is in one place: in a batch of a producer, or in `waiting`, for the next producer. A call stays in the
    table from `add` until a method returns it as ended, which happens once; so the table knows how many are in flight.
    Messages of one partition keep the order of their calls.

    A batch that was sent ends with `end`, by its producer's answer, or with `abandon`. What a retired producer has not
    begun to send goes to the next one. A message that was sent goes to another producer in one case only: Kafka has
    refused its batch, so that it stored none of it (`split`).

    Args:
        max_in_flight: How many calls the table holds before it `is_full`. The table does not enforce it.
        batch_bytes: How many bytes a batch may have. One message may have more.

    Attributes:
        in_flight: How many calls are in the table.
        waiting: The calls that wait for the next producer, in their order.
    """

    def __init__(self, *, max_in_flight: int, batch_bytes: int) -> None:
        self.in_flight = 0
        self.waiting: list[Call] = []
        self._max_in_flight = max_in_flight
        self._batch_bytes = batch_bytes
        self._batches: dict[Batch[P], None] = {}  # in the order in which they were opened
        self._latest: dict[Place, Batch[P]] = {}  # the newest batch of each partition

    @property
    def is_full(self) -> bool:
        """Whether a new call has to wait until another one has ended."""
        return self.in_flight >= self._max_in_flight

    @property
    def batches(self) -> list[Batch[P]]:
        """The batches that have not ended, the oldest first."""
        return [*self._batches]

    def __contains__(self, batch: Batch[P]) -> bool:
        """Tell whether *batch* has neither ended nor been withdrawn."""
        return batch in self._batches

    def is_used(self, producer: P) -> bool:
        """Tell whether a batch of *producer* has not ended."""
        return any(batch.producer is producer for batch in self._batches)

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of all calls. None if there are none."""
        deadlines = [batch.deadline for batch in self._batches]
        deadlines += [call.deadline for call in self.waiting]
        return min(deadlines, default=None)

    # -- the way of a call -------------------------------------------------------------------------------------------

    def add(self, call: Call, producer: P) -> Batch[P] | None:
        """
        Hold a new call, whose message *producer* is to send.

        Returns the batch that was opened for it, which has to be given to *producer*; None if the message joined one
        that the producer already has. No call may be `waiting`: the new one would pass it.
        """
        self.in_flight += 1
        batch = self._latest.get(call.place)
        if batch is not None and batch.is_open and batch.take(call):
            return None
        return self._opened(call, producer)

    def hand_over(self, producer: P) -> list[Batch[P]]:
        """Give all that is `waiting` to *producer*. Returns the batches that were opened for it, in their order."""
        calls, self.waiting = self.waiting, []
        self.in_flight -= len(calls)
        return [batch for call in calls if (batch := self.add(call, producer)) is not None]

    def end(self, batch: Batch[P]) -> list[Call]:
        """Return the calls of *batch* as ended."""
        self._forget(batch)
        return self._ended(batch.calls)

    def split(self, batch: Batch[P], *, is_too_large: bool) -> None:
        """
        Have the messages of a batch that Kafka refused wait for the next producer, before all that waits already.

        If the batch *is_too_large*, batches are at most half of its size from now on. Otherwise each of its messages
        gets a batch of its own, so that only the messages that Kafka refuses fail.
        """
        self._forget(batch)
        if is_too_large:
            self._batch_bytes = min(self._batch_bytes, batch.size // 2)
        for call in batch.calls:
            call.is_alone = not is_too_large
        self.waiting[:0] = batch.calls

    # -- the end of a producer ---------------------------------------------------------------------------------------

    def retire(self, producer: P) -> list[Batch[P]]:
        """
        Have all that *producer* has not begun to send wait for the next one.

        Returns the batches that were withdrawn. They are empty: the producer may drop them or skip them.
        """
        return self._withdraw(lambda batch: batch.producer is producer)

    def abandon(self, producer: P) -> list[Call]:
        """Return the calls of all batches of *producer* as ended."""
        batches = [batch for batch in self._batches if batch.producer is producer]
        return [call for batch in batches for call in self.end(batch)]

    def take_waiting(self, topic: str | None = None) -> list[Call]:
        """Return the calls that are `waiting` as ended: those of *topic*, or all of them."""
        return self._take_waiting(lambda call: topic is None or call.place[0] == topic)

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def stuck(self, now: float) -> list[P]:
        """Return the producers that began to send a message whose deadline is over, each once."""
        return [*{batch.producer: None for batch in self._batches if batch.is_sent and batch.deadline <= now}]

    def expire(self, now: float) -> tuple[list[Call], list[Batch[P]]]:
        """
        End the calls whose deadline is over and whose messages no producer has begun to send.

        What was behind such a message in its partition waits for a producer again. Returns the calls that have ended,
        and the batches that were withdrawn.
        """
        late = {batch.place for batch in self._batches if not batch.is_sent and batch.deadline <= now}
        withdrawn = self._withdraw(lambda batch: batch.place in late) if late else []
        return self._take_waiting(lambda call: call.deadline <= now), withdrawn

    # ----------------------------------------------------------------------------------------------------------------

    def _opened(self, call: Call, producer: P) -> Batch[P]:
        batch = self._latest[call.place] = Batch(producer, call, self._batch_bytes)
        self._batches[batch] = None
        return batch

    def _withdraw(self, wanted: Callable[[Batch[P]], bool]) -> list[Batch[P]]:
        withdrawn = [batch for batch in self._batches if not batch.is_sent and wanted(batch)]
        for batch in withdrawn:
            self._forget(batch)
            self.waiting += batch.withdraw()
        return withdrawn

    def _take_waiting(self, wanted: Callable[[Call], bool]) -> list[Call]:
        taken = [call for call in self.waiting if wanted(call)]
        if taken:
            self.waiting = [call for call in self.waiting if not wanted(call)]
        return self._ended(taken)

    def _forget(self, batch: Batch[P]) -> None:
        del self._batches[batch]
        if self._latest.get(batch.place) is batch:
            del self._latest[batch.place]

    def _ended(self, calls: list[Call]) -> list[Call]:
        self.in_flight -= len(calls)
        return calls
