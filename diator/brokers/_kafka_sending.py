"""One producer of aiokafka that many callers use at once, with what it lacks: an end to every call."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import DefaultPartitioner

from diator.brokers._kafka_client import (
    CLIENT_ERRORS,
    NO_RIGHT,
    Cluster,
    Policy,
    close_client,
    end_tasks,
    ensure_topics,
    refused,
    started,
    verdict,
)
from diator.brokers.shared import Shared
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed, MessageRejected, OutcomeUnknown

logger: logging.Logger = logging.getLogger(__name__)

_BATCH = 128 * 1024
"""Bytes of a batch. All callers of a full one wake together, so that small ones collapse with many callers."""
_STAY = 100
"""How many messages without a key go to one partition before another is chosen."""

_partition_of_key: Callable[[bytes, Sequence[int], Sequence[int]], int] = DefaultPartitioner()


class SharedProducer(Shared):
    """
    The sending half of the transport.

    It is idempotent: aiokafka repeats a request whose answer was lost, and Kafka knows the repeat by its number and
    stores it once. Without that, each lost answer would be a second message. The price is that aiokafka then tries for
    ever. So the deadline is kept here: when the oldest call is overdue, all who wait hear *outcome unknown*, and the
    producer is torn down with whatever it still holds. The next call makes a new one.
    """

    def __init__(self, cluster: Cluster, policy: Policy, *, max_in_flight: int) -> None:
        super().__init__()
        self._cluster = cluster
        self._policy = policy
        self._timeout = cluster.timeout
        self._max_in_flight = max_in_flight
        self._producer: Any = None
        self._calls: dict[asyncio.Future[Any], tuple[float, UUID | None, Any]] = {}
        """Who waits: until when, for which message, and of which producer. The oldest is the first."""
        self._entering = 0
        self._known: set[str] = set()
        self._stays: dict[str, tuple[int, int]] = {}
        self._freed = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        self._on_this_loop()
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                await self._connected(None)
        except CLIENT_ERRORS as error:
            raise verdict(error, None, handed_over=False) from error

    async def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
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
        loop = self._on_this_loop()
        if self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        deadline = loop.time() + self._timeout
        producer = self._producer
        if producer is None or self._queued or self._has_no_room or not self._is_known(producer, topic):
            producer = await self._in_turn(topic, message_id, deadline)
        self._entering += 1
        try:
            place = self._place(producer, topic, key, partition)
            # What `producer.send` does before that, for each message, is done here for each topic.
            put = producer._message_accumulator.add_message  # noqa: SLF001
            confirmed: asyncio.Future[Any] = await put(place, key, value, deadline - loop.time(), None, [*headers])
        except CLIENT_ERRORS as error:
            self._retire(producer)
            raise verdict(error, message_id, handed_over=False) from error
        finally:
            self._entering -= 1
            self._freed.set()
        self._calls[confirmed] = deadline, message_id, producer
        if self._sweeper is None:
            self._sweeper = loop.call_at(deadline, self._sweep)
        try:
            await confirmed
        except CLIENT_ERRORS as error:
            if not refused(error):
                self._give_up(producer, f"Kafka did not confirm it ({type(error).__name__}); it may have arrived")
            elif not isinstance(error, NO_RIGHT):
                self._retire(producer)
            raise verdict(error, message_id, handed_over=True) from error
        finally:
            self._calls.pop(confirmed, None)
            self._freed.set()

    @property
    def _has_no_room(self) -> bool:
        """Who waits to be put into a batch must not be passed."""
        return self._entering > 0 or len(self._calls) >= self._max_in_flight

    def _is_known(self, producer: Any, topic: str) -> bool:
        """A broker that has just started, or has not heard of a new topic, can make the client forget where it is."""
        return topic in self._known and bool(producer.client.cluster.partitions_for_topic(topic))

    def _place(self, producer: Any, topic: str, key: bytes | None, partition: int | None) -> TopicPartition:
        """
        Choose a partition: the one of *key*. What has no key goes where the one before it went, for a while.

        aiokafka chooses anew for each, so that many callers fill many small batches instead of few large ones.
        """
        partitions = producer.client.cluster.partitions_for_topic(topic)
        if partition is not None:
            return TopicPartition(topic, min(partition, max(partitions)))  # others may have created it, with fewer
        if key is not None:
            return TopicPartition(topic, _partition_of_key(key, sorted(partitions), []))
        chosen, left = self._stays.get(topic, (-1, 0))
        if not left or not self._calls or chosen not in partitions:
            usable = producer.client.cluster.available_partitions_for_topic(topic) or partitions
            chosen, left = random.choice([*usable]), _STAY  # noqa: S311
        self._stays[topic] = chosen, left - 1
        return TopicPartition(topic, chosen)

    async def _in_turn(self, topic: str, message_id: UUID | None, deadline: float) -> Any:
        """Wait for a producer that knows *topic*, and for room."""
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._turn:
                while True:
                    producer = await self._connected(message_id)
                    if not self._is_known(producer, topic):
                        await ensure_topics(self._cluster, self._policy, [topic])
                        await producer.partitions_for(topic)
                        self._known.add(topic)
                    elif self._has_no_room:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        return producer
        except (*CLIENT_ERRORS, MessageRejected) as error:
            raise verdict(error, message_id, handed_over=False) from error
        finally:
            self._queued -= 1

    async def _connected(self, message_id: UUID | None) -> Any:
        """Called by one at a time."""
        if self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        if self._producer is None:
            await self._beside.done()  # what the one before still has of a key comes first
            producer = AIOKafkaProducer(
                **self._cluster.settings(),
                acks="all",
                enable_idempotence=True,
                linger_ms=0,
                max_batch_size=_BATCH,
            )
            try:
                await started(producer.start())
            except BaseException:
                await self._tear_down(producer)
                raise
            self._producer = producer
        return self._producer

    def _sweep(self) -> None:
        """Look at the oldest call: one timer for all of them, instead of one each."""
        self._sweeper = None
        if not self._calls or self._loop is None:
            return
        deadline, _, producer = next(iter(self._calls.values()))
        if deadline > self._loop.time():
            self._sweeper = self._loop.call_at(deadline, self._sweep)
            return
        self._tell(producer, f"Kafka did not confirm it within {self._timeout:g} s; it may have arrived")
        self._retire(producer)
        self._sweeper = self._loop.call_later(0, self._sweep)

    def _give_up(self, producer: Any, why: str) -> None:
        """Part with *producer*, unless that was done: who waits for one that is retired may still hear of success."""
        if producer is self._producer:
            self._tell(producer, why)
            self._retire(producer)

    def _tell(self, producer: Any, unknown: str) -> None:
        """Tell everybody who waits for *producer* that nobody knows."""
        for confirmed, (_, message_id, of) in self._calls.items():
            if of is producer and not confirmed.done():
                confirmed.set_exception(OutcomeUnknown(unknown, message_id=message_id))

    def _retire(self, producer: Any) -> None:
        """
        Make another producer for the next call. This one ends when nobody waits for it any more.

        aiokafka goes on counting after a message that Kafka has refused, so that Kafka refuses what follows it, too.
        """
        if producer is self._producer:
            self._producer = None
            self._known.clear()
            self._stays.clear()
            self._beside.begin(self._end_of(producer), "the end of a producer")

    async def _end_of(self, producer: Any) -> None:
        while any(of is producer for _, _, of in self._calls.values()):
            self._freed.clear()
            await self._freed.wait()
        await self._tear_down(producer)

    @staticmethod
    async def _tear_down(producer: Any) -> None:
        """End *producer* without sending what it holds: its own `stop` waits until that is delivered."""
        producer._closed = True  # noqa: SLF001  # else it complains that nobody has stopped it
        await end_tasks([producer._sender.sender_task])  # noqa: SLF001
        await close_client(producer.client)

    async def _close(self) -> None:
        reading = asyncio.create_task(close_all(self.subscriptions))
        async with self._turn:  # behind those who were there before
            while self._calls or self._entering:
                self._freed.clear()
                await self._freed.wait()
            producer, self._producer = self._producer, None
        if self._sweeper is not None:
            self._sweeper.cancel()
        if producer is not None:
            await self._tear_down(producer)
        await self._beside.done()
        await reading

    def _begin_anew(self) -> None:
        if self._producer is not None:
            self._producer._closed = True  # noqa: SLF001
        self._producer, self._freed = None, asyncio.Event()
        self._calls, self._entering, self._sweeper = {}, 0, None
        self._known.clear()
