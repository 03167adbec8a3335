"""
The client of one connection that reads: a consumer of aiokafka, behind methods with names.

Every private name of aiokafka that reading uses is in this file. aiokafka's own `stop` and `commit` are not used: they
can wait for ever, and they raise cancellations that nobody asked for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.client import ConnectionGroup
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest
from aiokafka.structs import OffsetAndMetadata

from diator._extras import require_internals
from diator.brokers.kafka._client import Cluster, close_client, end_tasks, pace, started, with_reasons
from diator.brokers.kafka._fetched import Fetched, Headers
from diator.brokers.kafka._topic_ids import TopicIds, topic_ids
from diator.brokers.kafka._topics import HEADERS_BYTES
from diator.exceptions import ConfigurationError

INTERNALS = {
    "aiokafka.client": ("AIOKafkaClient._conns", "AIOKafkaClient._wait_on_metadata"),
    "aiokafka.consumer.consumer": (
        "AIOKafkaConsumer._client",
        "AIOKafkaConsumer._closed",
        "AIOKafkaConsumer._coordinator",
        "AIOKafkaConsumer._fetcher",
        "AIOKafkaConsumer._subscription",
    ),
    "aiokafka.consumer.fetcher": (
        "FetchResult._partition_records",
        "FetchResult._topic_partition",
        "Fetcher._create_fetch_waiter",
        "Fetcher._fetch_task",
        "Fetcher._pending_tasks",
        "Fetcher._records",
    ),
    "aiokafka.consumer.group_coordinator": (
        "GroupCoordinator._commit_refresh_task",
        "GroupCoordinator._coordination_task",
        "GroupCoordinator._do_commit_offsets",
        "GroupCoordinator._heartbeat_task",
        "GroupCoordinator.check_errors",
        "GroupCoordinator.coordinator_id",
        "GroupCoordinator.ensure_coordinator_known",
        "GroupCoordinator.fetch_committed_offsets",
        "GroupCoordinator.generation",
        "GroupCoordinator.group_id",
        "GroupCoordinator.member_id",
        "NoGroupCoordinator._reset_committed_task",
    ),
    "aiokafka.consumer.subscription_state": ("Subscription.assignment", "SubscriptionState.subscription"),
}
require_internals("aiokafka", INTERNALS)

_JOINING = frozenset({JoinGroupRequest, SyncGroupRequest})
_DECOMPRESSED_BYTES = 8 * 1024 * 1024
"""How many bytes a batch may have when it is decompressed, unless `max_message_bytes` is more than half of it."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """
    How a subscription reads: options of its broker. Times are in seconds.

    Attributes:
        session_timeout: The time without a heartbeat after which a consumer counts as dead.
        heartbeat_interval: How often a consumer sends a heartbeat.
        drain_timeout: How long a rebalance waits for the deliveries of a partition that goes to another consumer.
        max_unacked_per_partition: How far a partition is read beyond its oldest unsettled message.
        extra_prefetch: How many deliveries are received beyond those that the program may hold.
        in_place: Whether a retry waits in the partition, and the later messages of its key behind it.
        metadata_max_age: How often the client looks for new topics and partitions.
        max_message_bytes: The largest body that the broker sends or receives.
        assignment_timeout: How long a new consumer waits for its first partitions. Then its subscription is ready
            without any.
    """

    session_timeout: float
    heartbeat_interval: float
    drain_timeout: float
    max_unacked_per_partition: int
    extra_prefetch: int
    in_place: bool
    metadata_max_age: float
    max_message_bytes: int
    assignment_timeout: float

    @property
    def rebalance_bound(self) -> float:
        """The longest time that a rebalance takes: dead consumers are noticed, and the slowest of the others drains."""
        return self.session_timeout + self.drain_timeout + 30.0


class Record(Protocol):
    """One message as the client returns it: those of its attributes that are used here."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...  # milliseconds since 1970
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class KafkaConsumer:
    """
    A consumer of aiokafka. Its errors are the client's: see `CLIENT_ERRORS`.

    Attributes:
        metadata_changed: Set when the client has asked about the topics again, as it does after most errors.
        problems: The partitions of which nothing more can be read, and why: a package is missing.
    """

    def __init__(self, cluster: Cluster, options: ReadOptions, group_id: str | None) -> None:
        self.metadata_changed = asyncio.Event()
        self.problems: dict[TopicPartition, ConfigurationError] = {}
        self._group_id = group_id
        # The next heartbeat must arrive, on another connection, before the session ends.
        self._answer_within = 0.8 * (options.session_timeout - options.heartbeat_interval)
        self._consumer: Any = AIOKafkaConsumer(**consumer_settings(cluster, options, group_id))
        with_reasons(self._consumer._client, cluster)  # noqa: SLF001
        pace(self._consumer._client, cluster)  # noqa: SLF001
        self._most = max(_DECOMPRESSED_BYTES, 2 * options.max_message_bytes)
        self._answers = defaultdict[TopicPartition, dict[int, bytes]](dict)  # by the offset that was asked for
        self._corrupt: set[tuple[TopicPartition, int]] = set()
        self._joining: asyncio.Task[Any] | None = None  # the last request that Kafka may answer when others have joined
        self._ask = self._consumer._client.send  # noqa: SLF001
        self._consumer._client.send = self._send  # noqa: SLF001

    async def _send(self, node: Any, request: Any, **options: Any) -> Any:
        """
        Send a request of the client, and keep what Kafka answers to a fetch: the client does not show its bytes.

        The former leader of a partition may answer later than the new one, so there may be several answers. A request
        to join the group goes on if the client is cancelled: see `leave_group`. Other requests to the group have an
        answer while its session lasts: the client itself would wait for one as long as for a join.
        """
        if type(request) in _JOINING:
            self._joining = asyncio.create_task(self._ask(node, request, **options), name="diator: joining a group")
            return await asyncio.shield(self._joining)
        if options.get("group") is ConnectionGroup.COORDINATION:
            try:
                async with asyncio.timeout(self._answer_within):
                    return await self._ask(node, request, **options)
            except TimeoutError as error:  # the connection may be half-open, and the other ones are not
                if connection := self._consumer._client._conns.get((node, ConnectionGroup.COORDINATION)):  # noqa: SLF001
                    connection.close()
                raise errors.RequestTimedOutError from error
        answer = await self._ask(node, request, **options)
        if type(request) is FetchRequest:
            asked = {(topic, number): offset for topic, places in request.topics for number, offset, _ in places}
            for topic, partitions in answer.topics:
                for number, *_, records in partitions:
                    if records:
                        self._answers[TopicPartition(topic, number)][asked[topic, number]] = records
        return answer

    async def start(self) -> None:
        """Connect."""
        await started(self._consumer.start())
        self._consumer._client.cluster.add_listener(self._note_metadata)  # noqa: SLF001

    def _note_metadata(self, _: object) -> None:
        self.metadata_changed.set()

    async def end(self) -> None:
        """End the tasks of the client and close its connections, in whatever state it is. It does not leave a group."""
        self._consumer._closed = True  # noqa: SLF001  # else it complains that nobody called `stop`
        for _ in range(2):  # a task that is ending may start another one: the group's coordination starts two
            await end_tasks(self._client_tasks())
        await close_client(self._consumer._client)  # noqa: SLF001

    def _client_tasks(self) -> list[asyncio.Task[Any] | None]:
        fetcher, coordinator = self._consumer._fetcher, self._consumer._coordinator  # noqa: SLF001
        tasks: list[asyncio.Task[Any] | None] = [self._joining]
        if fetcher is not None:
            tasks += [fetcher._fetch_task, *fetcher._pending_tasks]  # noqa: SLF001
        if coordinator is not None and self._group_id is None:
            tasks += [coordinator._reset_committed_task]  # noqa: SLF001
        elif coordinator is not None:
            tasks += [coordinator._coordination_task, coordinator._heartbeat_task, coordinator._commit_refresh_task]  # noqa: SLF001
        return tasks

    # -- topics --------------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether any connection to Kafka is open."""
        return any(each.connected() for each in self._consumer._client._conns.values())  # noqa: SLF001

    def has_topic(self, topic: str) -> bool:
        """Return whether *topic* exists, as far as the client knows."""
        return bool(self._consumer.partitions_for_topic(topic))

    def count_partitions(self, topic: str) -> int:
        """Return how many partitions *topic* has, as far as the client knows."""
        return len(self._consumer.partitions_for_topic(topic) or ())

    async def partitions_of(self, topic: str) -> Collection[int]:
        """Return the numbers of the partitions of *topic*. Ask Kafka only if the client does not know the topic."""
        known: Collection[int] | None = self._consumer.partitions_for_topic(topic)
        return known or await self._consumer._client._wait_on_metadata(topic)  # noqa: SLF001

    async def refresh_metadata(self) -> bool:
        """Ask Kafka about the topics that are read. Return whether it answered."""
        return bool(await self._consumer._client.force_metadata_update())  # noqa: SLF001  # the public way asks for all

    async def topic_ids(self, topics: Collection[str]) -> TopicIds:
        """Ask Kafka for the ids of *topics*."""
        return await topic_ids(self._consumer._client, topics)  # noqa: SLF001

    async def oldest_offsets(self, places: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Return the offset of the oldest message of each partition."""
        offsets: Mapping[TopicPartition, int] = await self._consumer.beginning_offsets([*places])
        return offsets

    async def end_offsets(self, places: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Return the offset that the next message of each partition will have."""
        offsets: Mapping[TopicPartition, int] = await self._consumer.end_offsets([*places])
        return offsets

    # -- reading -------------------------------------------------------------------------------------------------

    def assign(self, places: Collection[TopicPartition]) -> None:
        """Read these partitions from now on, without a group."""
        self._consumer.assign([*places])

    def seek(self, place: TopicPartition, offset: int) -> None:
        """Read on at *offset*."""
        self._consumer.seek(place, offset)

    async def position(self, place: TopicPartition) -> int:
        """Return the offset that is read next."""
        position: int = await self._consumer.position(place)
        return position

    def pause(self, place: TopicPartition) -> None:
        """Fetch nothing more of a partition until `resume`."""
        self._consumer.pause(place)

    def resume(self, place: TopicPartition) -> None:
        """Fetch from a paused partition again."""
        self._consumer.resume(place)

    def take(self, most: int) -> Awaitable[Mapping[TopicPartition, Sequence[Record]]]:
        """
        Return at most *most* of the records that were fetched already, by partition. It waits for no others.

        Taking the last record of a partition makes the client fetch the next ones.
        """
        for result in self._consumer._fetcher._records.values():  # noqa: SLF001
            if type(result) is FetchResult and type(parsing := result._partition_records) is PartitionRecords:  # noqa: SLF001
                place = result._topic_partition  # noqa: SLF001
                answer = self._answers.pop(place)[parsing.next_fetch_offset]
                result._partition_records = Fetched(  # noqa: SLF001
                    place, parsing, answer, most=self._most, corrupt=self._corrupt, problems=self.problems
                )
        records: Awaitable[Mapping[TopicPartition, Sequence[Record]]] = self._consumer.getmany(max_records=most)
        return records

    def fetched(self) -> asyncio.Future[None]:
        """Return a future that is done when records were fetched. Cancel it, or await it."""
        future: asyncio.Future[None] = self._consumer._fetcher._create_fetch_waiter()  # noqa: SLF001
        return future

    # -- the group -----------------------------------------------------------------------------------------------

    def join(self, topics: Collection[str], listener: ConsumerRebalanceListener, *, member_id: str) -> None:
        """
        Read *topics* from now on, as a consumer of the group. *listener* learns which partitions come and go.

        *member_id* is empty for a new consumer. If Kafka does not know it any more, this consumer is a new one, too.
        """
        self._consumer._coordinator.member_id = member_id  # noqa: SLF001
        self._consumer.subscribe([*topics], listener=listener)

    async def wait_for_group(self, assigned: asyncio.Event, *, within: float) -> None:
        """
        Wait for *assigned*, for *within* seconds at most.

        Raises:
            KafkaError: Kafka refuses this consumer, which may not read the group, for one.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + within
        while not assigned.is_set() and loop.time() < ends:
            await asyncio.sleep(0.02)  # the client has no event for its errors
            self.check_group()

    def check_group(self) -> None:
        """
        Check that the client still tries to be in the group.

        Raises:
            KafkaError: Kafka refuses this consumer. The client waits until somebody has looked at this error.
        """
        self._consumer._coordinator.check_errors()  # noqa: SLF001

    @property
    def member_id(self) -> str:
        """The name of this consumer in the group."""
        member_id: str = self._consumer._coordinator.member_id  # noqa: SLF001
        return member_id

    def assignment(self) -> Collection[TopicPartition]:
        """Return the partitions that this consumer has now."""
        places: Collection[TopicPartition] = self._consumer.assignment()
        return places

    async def committed(self, places: Collection[TopicPartition]) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """Return what the group has committed of each partition. The client's `committed` withholds the metadata."""
        offsets: Mapping[TopicPartition, OffsetAndMetadata]
        offsets = await self._consumer._coordinator.fetch_committed_offsets([*places])  # noqa: SLF001
        return offsets

    async def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """
        Commit *offsets*, once. The client's `commit` tries for ever, in a task that outlives its caller.

        A consumer that the group has excluded, because it stood still beyond its session, has no generation. It must
        not commit: while the group is empty, Kafka accepts such a commit from anybody, and what the other consumers
        have acknowledged meanwhile would be delivered again.
        """
        coordinator = self._consumer._coordinator  # noqa: SLF001
        assignment = self._consumer._subscription.subscription.assignment  # noqa: SLF001
        await coordinator.ensure_coordinator_known()
        if coordinator.generation < 0:
            raise errors.IllegalGenerationError(coordinator.group_id)
        await coordinator._do_commit_offsets(assignment, offsets)  # noqa: SLF001

    async def leave_group(self) -> None:
        """Tell the group that this consumer leaves, so that its partitions go to others at once."""
        coordinator = self._consumer._coordinator  # noqa: SLF001
        if coordinator is None:
            return  # it never started
        # The client's own way waits for a rebalance that is under way.
        await end_tasks([coordinator._coordination_task, coordinator._heartbeat_task])  # noqa: SLF001
        member_id, joining = coordinator.member_id, self._joining
        if joining is not None and not member_id:
            await asyncio.wait([joining])  # Kafka answers at once with an id, for which the whole group waits
            member_id = "" if joining.exception() else joining.result().member_id
        if member_id and coordinator.coordinator_id is not None:
            # On each connection Kafka answers one request after the other: there after a join, here after a fetch.
            is_free = joining is None or joining.done()
            await self._consumer._client.send(  # noqa: SLF001
                coordinator.coordinator_id,
                LeaveGroupRequest(coordinator.group_id, member_id),
                group=ConnectionGroup.COORDINATION if is_free else ConnectionGroup.DEFAULT,
            )


def consumer_settings(cluster: Cluster, options: ReadOptions, group_id: str | None) -> dict[str, Any]:
    """Return the arguments of aiokafka's consumer."""
    rebalance_timeout = options.drain_timeout + 10.0
    # Kafka answers a join when the slowest consumer of the group has joined. A shorter timeout would end each join.
    settings = cluster.settings(request_timeout=max(40.0, rebalance_timeout + 10.0))
    settings |= {
        "enable_auto_commit": False,
        "retry_backoff_ms": 250,  # until the subscription reconnects, with delays that grow
        "auto_offset_reset": "none",  # the other values skip what retention has removed, without a word
        "isolation_level": "read_committed",
        "fetch_max_wait_ms": 200,
        "max_partition_fetch_bytes": options.max_message_bytes + 16 * HEADERS_BYTES,
        "metadata_max_age_ms": round(options.metadata_max_age * 1000),
    }
    if group_id is not None:
        settings |= {
            "group_id": group_id,
            "session_timeout_ms": round(options.session_timeout * 1000),
            "heartbeat_interval_ms": round(options.heartbeat_interval * 1000),
            "rebalance_timeout_ms": round(rebalance_timeout * 1000),
            # A heartbeat shows that the process lives. The program's `Consumer` shows whether its handlers do.
            "max_poll_interval_ms": 2**31 - 1,
            # Not the sticky assignor: aiokafka keeps its state in the class, so that groups would mix.
            "partition_assignment_strategy": (RoundRobinPartitionAssignor,),
        }
    return settings
