"""One idempotent producer of aiokafka, from its connection to its end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Self

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import DefaultPartitioner

from diator.brokers.kafka._batch import Records
from diator.brokers.kafka._client import (
    Cluster,
    drop_empty,
    enqueue,
    pace,
    sender_of,
    started,
    tear_down,
    with_reasons,
    without_own_end,
)
from diator.brokers.kafka._topics import TopicPolicy, create_missing
from diator.brokers.kafka._unconfirmed import Batch, Place

_STAY = 100
"""How many messages without a key go to one partition before another one is chosen."""
_NO_LEADER = (None, -1)

_partition_of_key: Callable[[bytes, Sequence[int], Sequence[int]], int] = DefaultPartitioner()


class _Stay:
    """Where the messages without a key of a topic go at present, and how many more go there."""

    __slots__ = ("left", "place")

    def __init__(self, place: TopicPartition) -> None:
        self.place = place
        self.left = _STAY


class IdempotentProducer:
    """
    A producer of aiokafka that numbers its batches, so that Kafka stores a repeated one once.

    Attributes:
        answered: Set when no batch of a retired producer waits for its confirmation any more.
    """

    def __init__(self, producer: Any) -> None:
        self.answered = asyncio.Event()
        self._producer = producer
        self._cluster = producer.client.cluster
        self._sender = sender_of(producer)
        self._known: set[str] = set()
        self._stays: dict[str, _Stay] = {}
        self._asking = asyncio.Lock()
        self._is_retired = False

    @classmethod
    async def connect(cls, cluster: Cluster, *, on_failure: Callable[[Self, BaseException], None]) -> Self:
        """Return a producer that is connected. *on_failure* is called if its work ends with an error."""
        settings = cluster.settings()
        producer = without_own_end(AIOKafkaProducer(**settings, acks="all", enable_idempotence=True, linger_ms=0))
        with_reasons(producer.client, cluster)
        pace(producer.client, cluster)
        try:
            await started(producer.start())
        except BaseException:
            await tear_down(producer)
            raise
        connected = cls(producer)
        sender_of(producer).add_done_callback(partial(connected._on_end_of_sender, on_failure))
        return connected

    def _on_end_of_sender(self, on_failure: Callable[[Self, BaseException], None], sender: asyncio.Task[None]) -> None:
        self._known.clear()  # nothing takes a message out of the queues
        # If it was cancelled, the program may be cancelling all tasks because it ends. The next caller reconnects.
        if not sender.cancelled() and (error := sender.exception()) is not None:
            on_failure(self, error)

    @property
    def has_ended(self) -> bool:
        """Whether its work has ended, be it by an error or because somebody cancelled it. It sends nothing any more."""
        return self._sender.done()

    # -- where a message goes ----------------------------------------------------------------------------------------

    def place(self, topic: str, key: bytes | None, partition: int | None, may_stay: bool) -> TopicPartition | None:  # noqa: FBT001
        """
        Choose the partition of a message: that of its *key*. Messages without a key stay in one partition for a while.

        aiokafka chooses anew for each, so that many callers fill many small batches instead of few large ones.

        Returns None if the partitions of *topic* must be looked up first: aiokafka has not seen them, or has forgotten
        them after an answer of a Kafka that has just started.
        """
        if topic not in self._known:
            return None
        if key is None and partition is None:
            stay = self._stays.get(topic)
            if (
                stay is None
                or not stay.left
                or not may_stay
                or self._cluster.leader_for_partition(stay.place) in _NO_LEADER
            ):
                usable = self._cluster.available_partitions_for_topic(topic)
                usable = usable or self._cluster.partitions_for_topic(topic)
                if not usable:
                    return None
                stay = self._stays[topic] = _Stay(TopicPartition(topic, random.choice([*usable])))  # noqa: S311
            stay.left -= 1
            return stay.place
        partitions = sorted(self._cluster.partitions_for_topic(topic) or ())
        if not partitions:
            return None
        if partition is not None:
            return TopicPartition(topic, min(partition, partitions[-1]))  # others may have created it, with fewer
        return TopicPartition(topic, _partition_of_key(key or b"", partitions, []))

    def has_leader(self, place: Place) -> bool:
        """Tell whether any broker is the leader of a partition, as far as aiokafka knows."""
        return self._cluster.leader_for_partition(TopicPartition(*place)) not in _NO_LEADER

    def knows(self, topic: str) -> bool:
        """Tell whether the partitions of *topic* have been looked up."""
        return topic in self._known

    async def create_missing(self, cluster: Cluster, policy: TopicPolicy, topic: str) -> None:
        """Create *topic*, if it is missing. Do nothing once this producer is retired."""
        async with self._asking:
            if not self._is_retired:
                await create_missing(self._producer.client, cluster, policy, [topic])

    async def look_up(self, topic: str) -> None:
        """Look up the partitions of *topic*. Do nothing once this producer is retired."""
        async with self._asking:  # aiokafka leaves a question without an answer if its client is closed meanwhile
            if not self._is_retired:
                await self._producer.partitions_for(topic)
        if not self._is_retired and not self.has_ended:
            self._known.add(topic)

    # -- batches -----------------------------------------------------------------------------------------------------

    def send(self, batch: Batch[Any], settle: Callable[[Batch[Any], BaseException | None], None]) -> None:
        """Queue *batch*. It may take messages until it is sent. *settle* is called with the answer."""
        enqueue(self._producer, Records(batch, settle), batch.place)

    def drop(self, withdrawn: Collection[Batch[Any]]) -> None:
        """Remove *withdrawn* batches from the queue. aiokafka would send nothing else of a partition in their turn."""
        if withdrawn:
            # aiokafka may be going through its queues now.
            asyncio.get_running_loop().call_soon(drop_empty, self._producer, {batch.place for batch in withdrawn})

    # -- the end -----------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Take no more messages."""
        self._is_retired = True
        self._known.clear()

    async def close(self) -> None:
        """End without sending what is queued, and close the connections."""
        self.retire()
        async with self._asking:
            pass
        await tear_down(self._producer)
