"""One producer of aiokafka that many callers use at once, with what it lacks: an end to every call."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaProducer

from diator.brokers._kafka_client import (
    CLIENT_ERRORS,
    HEADERS_BYTES,
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
        self._calls: dict[asyncio.Future[Any], tuple[float, UUID | None]] = {}
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
        if producer is None or self._queued or self._is_full or topic not in self._known:
            producer = await self._in_turn(topic, message_id, deadline)
        if partition is not None:
            there = producer.client.cluster.partitions_for_topic(topic) or {partition}
            partition = min(partition, max(there))  # others may have created it, with fewer
        elif key is None:
            partition = self._partition_of(producer, topic)
        self._entering += 1
        try:
            confirmed: asyncio.Future[Any] = await producer.send(topic, value, key, partition, None, headers)
        except CLIENT_ERRORS as error:
            self._known.discard(topic)
            raise verdict(error, message_id, handed_over=False) from error
        finally:
            self._entering -= 1
        self._calls[confirmed] = deadline, message_id
        if self._sweeper is None:
            self._sweeper = loop.call_at(deadline, self._sweep)
        try:
            await confirmed
        except CLIENT_ERRORS as error:
            if not refused(error):
                self._give_up(producer)
            raise verdict(error, message_id, handed_over=True) from error
        finally:
            self._calls.pop(confirmed, None)
            self._freed.set()

    @property
    def _is_full(self) -> bool:
        return len(self._calls) + self._entering >= self._max_in_flight

    def _partition_of(self, producer: Any, topic: str) -> int | None:
        """
        Choose where messages without a key go, and stay there for a while; None leaves it to aiokafka.

        aiokafka chooses anew for each, so that many callers fill many small batches instead of few large ones.
        """
        partition, left = self._stays.get(topic, (-1, 0))
        if not left or not self._calls:
            partitions = producer.client.cluster.available_partitions_for_topic(topic)
            if not partitions:
                return None
            partition, left = random.choice([*partitions]), _STAY  # noqa: S311
        self._stays[topic] = partition, left - 1
        return partition

    async def _in_turn(self, topic: str, message_id: UUID | None, deadline: float) -> Any:
        """Wait for a producer that knows *topic*, and for room."""
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._turn:
                producer = await self._connected(message_id)
                if topic not in self._known:
                    await ensure_topics(self._cluster, self._policy, [topic])
                    await producer.partitions_for(topic)
                    self._known.add(topic)
                while self._is_full:
                    self._freed.clear()
                    await self._freed.wait()
                return await self._connected(message_id)
        except (*CLIENT_ERRORS, MessageRejected) as error:
            raise verdict(error, message_id, handed_over=False) from error
        finally:
            self._queued -= 1

    async def _connected(self, message_id: UUID | None) -> Any:
        """Called by one at a time."""
        if self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        if self._producer is None:
            producer = AIOKafkaProducer(
                **self._cluster.settings(),
                acks="all",
                enable_idempotence=True,
                linger_ms=0,
                max_batch_size=_BATCH,
                max_request_size=self._policy.max_message_bytes + 16 * HEADERS_BYTES,
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
        deadline, _ = next(iter(self._calls.values()))
        if deadline <= self._loop.time():
            self._give_up(self._producer)
        else:
            self._sweeper = self._loop.call_at(deadline, self._sweep)

    def _give_up(self, producer: Any) -> None:
        """Tell everybody who waits that nobody knows, and make another producer next time."""
        if producer is None or producer is not self._producer:
            return
        self._producer = None
        self._known.clear()
        self._stays.clear()
        for confirmed, (_, message_id) in self._calls.items():
            if not confirmed.done():
                unknown = f"Kafka did not confirm it within {self._timeout:g} s; it may have arrived"
                confirmed.set_exception(OutcomeUnknown(unknown, message_id=message_id))
        self._beside.begin(self._tear_down(producer), "giving up a producer")

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
