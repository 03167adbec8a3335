"""One producer of aiokafka that many callers use at once, with what it lacks: an end to every call."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import DefaultPartitioner

from diator.brokers.connecting import ClientConnection
from diator.brokers.kafka._batch import Batch, Call, sender_of, tear_down
from diator.brokers.kafka._client import Cluster, started
from diator.brokers.kafka._errors import CLIENT_ERRORS, NO_RIGHT, TOO_LARGE, refused, send_error
from diator.brokers.kafka._topics import TopicPolicy, ensure_topics
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed, BrokerError, OutcomeUnknown

logger: logging.Logger = logging.getLogger(__name__)

_BATCH = 128 * 1024
"""Bytes of a batch, until a topic takes less."""
_STAY = 100
"""How many messages without a key go to one partition before another is chosen."""

_NO_LEADER = (None, -1)

_partition_of_key: Callable[[bytes, Sequence[int], Sequence[int]], int] = DefaultPartitioner()


class Producer(ClientConnection):
    """
    The sending half of the transport.

    It is idempotent: aiokafka repeats a request whose answer was lost, and Kafka knows the repeat by its number and
    stores it once. Without that, each lost answer would be a second message. The price is that aiokafka then tries for
    ever. So the deadline is kept here: when the oldest call is overdue, all who wait for what was sent hear *outcome
    unknown*, and the producer is torn down. What it had not sent goes to the next one, before all that comes later.
    """

    def __init__(self, cluster: Cluster, policy: TopicPolicy, *, max_in_flight: int) -> None:
        super().__init__()
        self._cluster = cluster
        self._policy = policy
        self._timeout = cluster.timeout
        self._max_in_flight = max_in_flight
        self._batch_bytes = _BATCH
        self._producer: Any = None
        self._known: set[str] = set()
        self._stays: dict[str, tuple[TopicPartition, int]] = {}
        self._latest: dict[TopicPartition, Batch] = {}
        self._batches: dict[Batch, None] = {}
        """All that have no verdict, those of retired producers, too."""
        self._left: list[Call] = []
        """What a retired producer had not sent, in the order of the calls."""
        self._handing_on: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._freed = asyncio.Event()
        """Something has ended that somebody may wait for."""
        self._asked: Any = None
        """The producer that is just asked where a topic is."""
        self._sweeper: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        self._bind_to_running_loop()
        try:
            async with asyncio.timeout(self._timeout), self._lock:
                if self.is_closed:
                    raise BrokerClosed("this broker is closed")
                await self._connected()
        except CLIENT_ERRORS as error:
            raise send_error(error, None, handed_over=False) from error

    async def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: list[tuple[str, bytes]] | None = None,
        partition: int | None = None,
        message_id: UUID | None = None,
    ) -> None:
        """
        Have *value* stored by every replica that is in sync.

        Raises:
            BrokerUnavailable: It was not handed over.
            MessageRejected: Kafka refused it.
            OutcomeUnknown: It was handed over, and not confirmed in time.
            BrokerClosed: `aclose` was called before.
        """
        loop = self._bind_to_running_loop()
        if self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        deadline = loop.time() + self._timeout
        place = None if self._queued or self._left or self._is_full else self._place(topic, key, partition)
        if place is None:
            place = await self._in_turn(topic, key, partition, message_id, deadline)
        call = Call(place, key, value, headers, message_id, deadline, loop.create_future())
        self._put(call)
        self._in_flight += 1
        await call.confirmed

    @property
    def _is_full(self) -> bool:
        return self._in_flight >= self._max_in_flight

    def _place(self, topic: str, key: bytes | None, partition: int | None) -> TopicPartition | None:
        """
        Choose a partition: the one of *key*. What has no key goes where the one before it went, for a while.

        aiokafka chooses anew for each, so that many callers fill many small batches instead of few large ones. None if
        it has to be asked where *topic* is: a Kafka that has just started can make the client forget it.
        """
        if topic not in self._known:  # by this producer: of another one nothing is known
            return None
        cluster = self._producer.client.cluster
        if key is None and partition is None:
            place, left = self._stays.get(topic, (None, 0))
            if place is None or not left or not self._batches or cluster.leader_for_partition(place) in _NO_LEADER:
                usable = cluster.available_partitions_for_topic(topic) or cluster.partitions_for_topic(topic)
                if not usable:
                    return None
                place, left = TopicPartition(topic, random.choice([*usable])), _STAY  # noqa: S311
            self._stays[topic] = place, left - 1
            return place
        partitions = sorted(cluster.partitions_for_topic(topic) or ())
        if not partitions:
            return None
        if partition is not None:
            return TopicPartition(topic, min(partition, partitions[-1]))  # others may have created it, with fewer
        return TopicPartition(topic, _partition_of_key(key or b"", partitions, []))

    async def _in_turn(
        self, topic: str, key: bytes | None, partition: int | None, message_id: UUID | None, deadline: float
    ) -> TopicPartition:
        """Wait for a producer that knows *topic*, and for room."""
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                while not self.is_closed:
                    await self._connected()
                    place = self._place(topic, key, partition)
                    if place is None:
                        await ensure_topics(self._cluster, self._policy, [topic])
                        await self._look_for(topic)
                    elif self._is_full:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        return place
                raise BrokerClosed("this broker is closed")
        except CLIENT_ERRORS as error:
            raise send_error(error, message_id, handed_over=False) from error
        except BrokerError as error:
            raise send_error(error, message_id, handed_over=False) from error.__cause__
        finally:
            self._queued -= 1

    async def _connected(self) -> None:
        """See that there is a producer, and that it has what is left. Called by one at a time."""
        if self._producer is not None and sender_of(self._producer).done():
            self._give_up(self._producer, OutcomeUnknown("its sender was cancelled; it may have arrived"))
        if self._producer is None:
            await self._background.wait()  # what the one before still has of a key comes first
            producer = AIOKafkaProducer(
                **self._cluster.settings(),
                acks="all",
                enable_idempotence=True,
                linger_ms=0,
                max_batch_size=self._batch_bytes,
            )
            producer._closed = True  # noqa: SLF001  # else it complains that nobody has called `stop`: see `tear_down`
            try:
                await started(producer.start())
            except BaseException:
                await tear_down(producer)
                raise
            self._producer = producer
            sender_of(producer).add_done_callback(partial(self._on_end_of_sender, producer))
        for topic in {call.place.topic for call in self._left} - self._known:
            try:
                await self._look_for(topic)
            except CLIENT_ERRORS as error:
                self._tell(self._take_left(topic), error, handed_over=False)
        if self._producer is not None:
            for call in self._take_left():
                self._put(call)

    async def _look_for(self, topic: str) -> None:
        """Have the producer know where *topic* is. It does not end meanwhile: nobody would answer."""
        producer = self._asked = self._producer
        if producer is None:
            return  # it has been retired meanwhile
        try:
            await producer.partitions_for(topic)
        finally:
            self._asked = None
            self._freed.set()
        if producer is self._producer:
            self._known.add(topic)

    # -- what was sent, and what becomes of it -----------------------------------------------------------------------

    def _put(self, call: Call) -> None:
        batch = self._latest.get(call.place)
        if batch is None or not batch.takes(call):
            batch = self._latest[call.place] = Batch(self._producer, call, self._settle)
            self._batches[batch] = None
            self._sweep_at(call.deadline)

    def _take_back(self, place: TopicPartition | None = None) -> list[Call]:
        """Give the calls whose messages were not on their way yet, of *place* or of all: now they never will be."""
        calls: list[Call] = []
        for batch in [each for each in self._batches if not each.is_sent and place in (None, each.place)]:
            self._forget(batch)
            batch.take_back()
            calls += batch.calls
        return calls

    def _take_left(self, topic: str | None = None) -> list[Call]:
        taken = [call for call in self._left if topic in (None, call.place.topic)]
        self._left = [call for call in self._left if topic not in (None, call.place.topic)]
        return taken

    def _forget(self, batch: Batch) -> None:
        del self._batches[batch]
        if self._latest.get(batch.place) is batch:
            del self._latest[batch.place]

    def _settle(self, batch: Batch, error: BaseException | None) -> None:
        """Tell all who wait for *batch*, unless they have been told."""
        if batch not in self._batches:
            return
        if error is not None and sender_of(batch.producer).done():
            self._give_up(batch.producer, error)
            return
        self._forget(batch)
        if error is not None and len(batch.calls) > 1 and refused(error) and not isinstance(error, NO_RIGHT):
            # It is not for all of them to hear that. What was sent after it is not sent again before it.
            if isinstance(error, TOO_LARGE):
                self._batch_bytes = min(self._batch_bytes, batch.size // 2)
            for call in batch.calls:
                call.is_alone = not isinstance(error, TOO_LARGE)
            self._left[:0] = batch.calls
        else:
            self._tell(batch.calls, error, handed_over=True)
        if error is not None and not isinstance(error, NO_RIGHT):
            self._retire(batch.producer)

    def _tell(self, calls: Sequence[Call], error: BaseException | None, *, handed_over: bool) -> None:
        self._in_flight -= len(calls)
        self._freed.set()
        for call in calls:
            if call.confirmed.done():
                continue  # its caller has gone
            if error is None:
                call.confirmed.set_result(None)
            else:
                call.confirmed.set_exception(send_error(error, call.message_id, handed_over=handed_over))

    def _sweep_at(self, deadline: float) -> None:
        """One timer for all calls, instead of one each: for the one that is due first."""
        if self._sweeper is not None and self._sweeper.when() > deadline:
            self._sweeper.cancel()
            self._sweeper = None
        if self._sweeper is None and self._loop is not None:
            self._sweeper = self._loop.call_at(deadline, self._sweep)

    def _sweep(self) -> None:
        """Tell whoever is overdue."""
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        late = TimeoutError(f"it was not sent within {self._timeout:g} s")
        for batch in [batch for batch in self._batches if batch.calls[0].deadline <= now]:
            if batch not in self._batches:
                continue  # it went with one before it
            if batch.is_sent:
                why = f"Kafka did not confirm it within {self._timeout:g} s; it may have arrived"
                self._give_up(batch.producer, OutcomeUnknown(why))
                continue
            calls = self._take_back(batch.place)  # in vain its leader is looked for
            self._tell([call for call in calls if call.deadline <= now], late, handed_over=False)
            for call in calls:
                if call.deadline > now:
                    self._put(call)
        overdue = [call for call in self._left if call.deadline <= now]
        self._left = [call for call in self._left if call.deadline > now]
        self._tell(overdue, late, handed_over=False)
        deadlines = [call.deadline for call in self._left] + [batch.calls[0].deadline for batch in self._batches]
        if deadlines:
            self._sweep_at(min(deadlines))

    def _give_up(self, producer: Any, why: BaseException) -> None:
        """Tell everybody who waits for what *producer* has sent that nobody knows."""
        self._retire(producer)
        for batch in [batch for batch in self._batches if batch.producer is producer]:
            self._forget(batch)
            self._tell(batch.calls, why, handed_over=True)

    def _on_end_of_sender(self, producer: Any, sender: asyncio.Task[None]) -> None:
        """Part with a producer whose work has ended by itself: nobody would take a message from it."""
        if not sender.cancelled() and (error := sender.exception()) is not None:
            self._give_up(producer, error)
        elif producer is self._producer:
            self._known.clear()  # somebody has cancelled it; whoever sends next sees to that

    def _retire(self, producer: Any) -> None:
        """
        Make another producer for what was not sent yet. This one ends when nobody waits for it any more.

        aiokafka goes on counting after a message that Kafka has refused, so that Kafka refuses what follows it, too.
        """
        if producer is self._producer:
            self._producer = None
            self._left += self._take_back()
            for known in (self._known, self._stays, self._latest):
                known.clear()
            self._background.start(self._end_of(producer), "the end of a producer")
        if self._left and (self._handing_on is None or self._handing_on.done()):
            self._handing_on = asyncio.create_task(self._hand_on(), name="diator: handing on what was not sent")
        self._freed.set()

    async def _hand_on(self) -> None:
        """See that there is a producer for what is left, or that its callers hear of it."""
        while self._left:
            try:
                async with asyncio.timeout(self._timeout), self._lock:
                    await self._connected()
            except TimeoutError:
                continue  # who is overdue has been told
            except CLIENT_ERRORS as error:
                self._tell(self._take_left(), error, handed_over=False)

    async def _end_of(self, producer: Any) -> None:
        while self._asked is producer or any(batch.producer is producer for batch in self._batches):
            self._freed.clear()
            await self._freed.wait()
        await tear_down(producer)

    async def _close(self) -> None:
        reading = asyncio.create_task(close_all(self.subscriptions))
        async with self._lock:
            pass  # those who were there before have a batch now, or a verdict
        while self._batches or self._left:
            self._freed.clear()
            await self._freed.wait()
        if self._handing_on is not None:
            self._handing_on.cancel()  # nothing is left to be handed on
            await asyncio.wait([self._handing_on])
        producer, self._producer = self._producer, None
        if self._sweeper is not None:
            self._sweeper.cancel()
        if producer is not None:
            await tear_down(producer)
        await self._background.wait()
        await reading

    def _reset(self) -> None:
        self._producer, self._asked, self._handing_on, self._sweeper = None, None, None, None
        self._in_flight, self._freed = 0, asyncio.Event()
        for gone in (self._known, self._stays, self._latest, self._batches, self._left):
            gone.clear()
