"""Reading Redis Streams: a subscription is one consumer of a group, and a connection of it waits for entries."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, cast

import msgspec

from diator._hints import name_of
from diator._text import counted
from diator.brokers.base import Delivery, Topic
from diator.brokers.leases import Leases
from diator.brokers.redis._client import (
    Client,
    RedisConnection,
    close_connection,
    hang_up,
    read_reply,
    require_pool,
    send_command,
    subscribing_connection,
)
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._group import Entry, Group, ms
from diator.brokers.redis._names import AGAIN, DELAYED
from diator.brokers.settling import Acknowledgements, dead_letter_headers
from diator.brokers.supervisor import CLEANING_UP, MessagesMissed, ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import DiatorError

logger: logging.Logger = logging.getLogger(__name__)

BODY = b"body"
# How often, in seconds, a consumer looks for entries whose lease is over, and for retries that are due.
SCAN_EVERY = 1.0
# The same while it takes entries over: it takes as many at once as it can start.
_SCAN_AGAIN = 0.05
_FORGOTTEN_AFTER = 3600.0
# An entry with more names and values of fields is dead-lettered by itself.
_MOST_COPIED = 200


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """
    How the subscriptions of a broker read.

    Attributes:
        lease: Seconds after which others may take over the entries of a consumer that does not renew them.
        retention: Seconds for which acknowledged entries are kept; None keeps them for good.
        extra_prefetch: Messages that are received beyond those that the program may hold.
    """

    lease: float
    retention: float | None
    extra_prefetch: int


class _Kept(msgspec.Struct):
    """A message that waits for its retry, whole, so that its first entry may be removed."""

    fields: list[tuple[bytes, bytes]]
    attempt: Annotated[int, msgspec.Meta(ge=2, lt=2**31)]
    # The id of its first entry, which also keeps two messages of the same content apart.
    origin: Annotated[str, msgspec.Meta(pattern=r"\A\d{1,20}-\d{1,20}\Z")]


class Subscription(ResilientSubscription):
    """
    One consumer of a group, on one connection after another: what it holds, and how that is settled.

    Attributes:
        group: The consumer's commands.
        options: How it reads.
        streams: The streams that all groups share, one for each topic.
        leases: What it holds.
        topics: Every stream that this consumer reads, with its topic: also the group's streams of retried messages.
    """

    def __init__(
        self,
        settings: SubscriptionSettings,
        service: CommandConnection,
        client: Client,
        streams: Mapping[bytes, Topic],
        options: ReadOptions,
        *,
        verify: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(settings, lossy=False, buffer_size=settings.prefetch + options.extra_prefetch)
        require_pool(client)
        self._service = service
        self._client = client
        self._verify = verify
        self.options = options
        self.group = Group(service.execute, str(settings.group))
        self.streams = tuple(streams)
        self._first = {self.group.key(stream, AGAIN): stream for stream in streams}
        self.topics = {**streams, **{again: streams[stream] for again, stream in self._first.items()}}
        self._cursors = dict.fromkeys(self.topics, b"0-0")
        self.leases: Leases[Entry] = Leases(self, options.lease, self._renew)
        self._suspects: set[Entry] = set()
        self._not_settled: set[bytes] = set()
        self._acked: Acknowledgements[Entry] = Acknowledgements(self._send_acked, self.log_fields)

    @property
    def is_taking_over(self) -> bool:
        """Return whether it holds entries of a dead consumer. There may be more of them."""
        return bool(self._suspects)

    @property
    def oldest_message(self) -> float | None:
        """See `ResilientSubscription.oldest_message`."""
        added = [_added(entry.id) for entry in self.leases]
        return max(0.0, time.time() - min(added) / 1000) if added else 0.0

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Source, None]:
        """
        Create the group where it is missing, and take a connection of the client's pool for blocking reads.

        Raises:
            MessagesMissed: The group existed before, and Redis had lost it.
        """
        await self._verify()
        for stream in self.streams:
            await self.group.check_keys(stream)
        created = await self.group.create(self.topics)
        await self.group.check_access([*self.topics])
        if created and self.leases.have_begun:
            raise MessagesMissed(f"Redis had lost {created[0].decode()}, or its group; both are there again")
        self.leases.begin()
        connection = await subscribing_connection(self._client, within=self.settings.reconnect.connect_timeout)
        try:
            yield Connection(connection, self)
        finally:
            try:
                if self.is_ending:  # `leave` must see all that was delivered on this connection
                    await hang_up(connection, within=min(self._service.timeout, CLEANING_UP) / 2)
            finally:
                await close_connection(self._client, connection)

    def delivery(self, stream: bytes, id_: bytes, pairs: Sequence[bytes], times: int) -> Delivery:
        """Make a delivery of an entry that Redis has delivered *times* times."""
        first = self._first.get(stream, stream)
        origin, attempt = id_, times
        if first != stream:
            try:
                kept = msgspec.msgpack.decode(pairs[1], type=_Kept)
                pairs = [part for field in kept.fields for part in field]
                origin, attempt = kept.origin.encode(), kept.attempt + times - 1
            except (msgspec.DecodeError, IndexError):
                what = f"{stream.decode()} has an entry that diator did not write"
                self.lines.log(
                    logging.WARNING, what, "%s: %s", what, id_.decode(), fields=lambda: {"source": stream.decode()}
                )
        body: bytes | None = None
        headers: dict[str, str] = {}
        parts = iter(pairs)
        for name in parts:
            value = next(parts)
            if body is None and name == BODY:  # the first is the body; another one is a header of that name
                body = value
            else:
                headers[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        return Delivery(
            topic=self.topics[stream],
            body=body or b"",
            headers=headers,
            attempt=attempt,
            settler=self,
            token=Entry(stream, id_, first, pairs, origin),
        )

    def sent_at(self, delivery: Delivery) -> float:
        """See `Settler`: the time in the id of the first entry."""
        return _added(cast("Entry", delivery.token).origin) / 1000

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        self._acked.add(self._release(delivery))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        entry = self._release(delivery)
        fields = [*zip(entry.pairs[::2], entry.pairs[1::2], strict=True)]
        kept = msgspec.msgpack.encode(_Kept(fields, delivery.attempt + 1, entry.origin.decode()))
        with self._noting_failure(entry):
            await self.group.retry(entry, kept, after)

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        entry = self._release(delivery)  # if what follows fails, the lease runs out and the message is redelivered
        with self._noting_failure(entry):
            await self.group.dead_letter(entry, self._why(delivery, reason))

    async def dead_letter_all(self, reasons: Mapping[Delivery, str], /) -> Collection[Delivery]:
        by_stream: dict[bytes, list[tuple[Delivery, Entry, Sequence[bytes]]]] = defaultdict(list)
        for delivery, reason in reasons.items():
            entry = self._release(delivery)
            if not entry.is_retried and len(entry.pairs) <= _MOST_COPIED:
                by_stream[entry.stream].append((delivery, entry, self._why(delivery, reason)))
        stored: set[Delivery] = set()
        for those in by_stream.values():
            entries = [(entry, why) for _, entry, why in those]
            with self._noting_failure(*(entry for entry, _ in entries)):
                removed = await self.group.copy_dead_letters(entries)
            stored |= {delivery for delivery, entry, _ in those if entry.id not in removed}
        return stored

    def _why(self, delivery: Delivery, reason: str) -> Sequence[bytes]:
        entry = cast("Entry", delivery.token)
        source, group, origin = entry.first.decode(), self.group.name.decode(), entry.origin.decode()
        headers = dead_letter_headers(delivery, reason, source=source, group=group, entry_id=origin)
        return [part.encode() for pair in headers.items() for part in pair]

    @contextmanager
    def _noting_failure(self, *entries: Entry) -> Generator[None, None, None]:
        """Remember entries that could not be settled: unlike one that got lost on its way here, they were delivered."""
        ids = [entry.id for entry in entries]
        self._not_settled.update(ids)
        try:
            yield
        except BaseException:
            for entry in entries:
                entry.leased_until = 0.0  # it may be settled although no reply says so
            raise
        self._not_settled.difference_update(ids)

    def _release(self, delivery: Delivery) -> Entry:
        entry: Entry = delivery.token  # type: ignore[assignment]  # `cast` is a call, for each message
        self.leases.release(entry)
        if self._suspects:
            self._suspects.discard(entry)
        return entry

    async def _send_acked(self, entries: Sequence[Entry]) -> None:
        by_stream: dict[bytes, list[bytes]] = defaultdict(list)
        for entry in entries:
            by_stream[entry.stream].append(entry.id)
        for stream, ids in by_stream.items():
            try:
                await self.group.ack(stream, ids, remove=stream in self._first)  # no other group reads that stream
            except DiatorError as error:
                logger.warning(
                    "%s did not reach Redis; %s redelivered: %s",
                    counted(len(ids), "acknowledgement"),
                    "this message is" if len(ids) == 1 else "these messages are",
                    error,
                    extra={**self._error_fields(stream, error), "messages": len(ids)},
                )

    # -- holding -------------------------------------------------------------------------------------------------

    async def _renew(self, held: Collection[Entry]) -> Collection[Entry]:
        by_stream: dict[bytes, list[Entry]] = defaultdict(list)
        for entry in held:
            by_stream[entry.stream].append(entry)
        lost = [entry for entries in by_stream.values() for entry in await self.group.renew(entries)]
        self._suspects.difference_update(lost)
        return lost

    async def leave(self, prefetched: Collection[Delivery], /) -> None:
        """
        Send the outstanding acknowledgements, and leave the rest to other consumers at once, before the lease is over.

        It takes at most one `timeout` of the broker.
        """
        if not self.leases.have_begun:
            return  # this consumer never joined
        try:
            async with asyncio.timeout(self._service.timeout):
                await self.leases.end()
                await self._acked.flush()
                held = {*self.leases}.difference(cast("Entry", delivery.token) for delivery in prefetched)
                delivered = self._not_settled.union(entry.id for entry in held)
                for stream in self.topics:
                    await self._leave(stream, delivered)
        except TimeoutError:
            logger.warning(
                "Redis does not answer; others take over the unsettled messages when their lease is over",
                extra={**self.log_fields, "error_type": "TimeoutError"},
            )

    async def _leave(self, stream: bytes, delivered: Collection[bytes]) -> None:
        try:
            for id_, _, _, times in await self.group.pending(stream):
                # A message that the program has not seen was not delivered, whether it waited here or was on its way.
                lease_ms = math.ceil(self.options.lease * 1000)
                await self.group.let_go(stream, id_, times if id_ in delivered else times - 1, lease_ms)
            await self.group.forget(stream, _FORGOTTEN_AFTER)
        except DiatorError as error:
            logger.warning(
                "others take over the unsettled messages of %s when their lease is over, not now: %s",
                stream.decode(),
                error,
                extra=self._error_fields(stream, error),
            )

    def _error_fields(self, stream: bytes, error: DiatorError) -> Mapping[str, object]:
        """Return the attributes of a log record."""
        return {**self.log_fields, "source": stream.decode(), "error_type": name_of(type(error))}

    async def lost_on_the_way(self, stream: bytes) -> list[Delivery]:
        """Return what Redis has delivered to this consumer on a connection that broke before it arrived."""
        found: list[Delivery] = []
        held = self._held_of(stream)
        await self._acked.flush()  # of what was not held any more
        for id_, _, _, times in await self.group.pending(stream):
            if id_ not in held:
                attempt = times + (id_ in self._not_settled)
                claimed = await self.group.redeliver(stream, id_, attempt)
                self._not_settled.discard(id_)
                if not claimed:
                    self._report_removed(stream, [id_])
                found += [self.delivery(stream, id_, pairs or (), attempt) for id_, pairs in claimed]
        return self._hold(found)

    def _held_of(self, stream: bytes) -> Collection[bytes]:
        return {entry.id for entry in self.leases if entry.stream == stream}

    def _hold(self, found: list[Delivery]) -> list[Delivery]:
        """Hold all that was *found*. If finding fails half-way, nothing is held, and the leases end."""
        entries = [cast("Entry", delivery.token) for delivery in found]
        self.leases.hold(entries)
        self._suspects.update(entry for entry in entries if entry.is_suspect)
        return found

    # -- looking after the group ---------------------------------------------------------------------------------

    async def scan(self, most: int) -> list[Delivery]:
        """
        Move the retries that are due to their stream, and take over entries whose lease is over, at most *most*.

        It takes over no more than can start now. One of them may be a poison message that has crashed its consumer and
        will crash this one. The entries that were not taken over by then are charged no delivery.
        """
        for stream in self.streams:
            await self.group.move_due(self.group.key(stream, DELAYED), self.group.key(stream, AGAIN))
        most = min(most, self.settings.prefetch - len(self._suspects))
        found: list[Delivery] = []
        for stream in self.topics:
            if len(found) < most:
                found += await self._take_over(stream, most - len(found))
        return self._hold(found)

    async def _take_over(self, stream: bytes, most: int) -> list[Delivery]:
        self._cursors[stream], entries, gone = await self.group.take_over(
            stream, self.options.lease, self._cursors[stream], most
        )
        held, found = self._held_of(stream), list[Delivery]()
        # XAUTOCLAIM takes all removed entries out of the group, those that are still being handled, too.
        if lost := [id_ for id_ in gone if id_ not in held and id_ not in self._not_settled]:
            self._report_removed(stream, lost)
        for id_, pairs in entries:
            if id_ in held:
                continue  # this consumer's own, renewed late; its handler is running
            times = await self.group.deliveries_of(stream, id_)  # None if its old owner has acknowledged it by now
            if times is not None:
                found.append(self.delivery(stream, id_, pairs, times))
                cast("Entry", found[-1].token).is_suspect = times > 1  # else its old owner's program never saw it
        return found

    def _report_removed(self, stream: bytes, ids: Sequence[bytes]) -> None:
        """Report entries that another program has removed from the stream before they were acknowledged."""
        source, is_one = stream.decode(), len(ids) == 1
        removed = f"{counted(len(ids), 'message')} of {source} {'was' if is_one else 'were'} removed from the stream"
        reason = f"{removed} before {'it was' if is_one else 'they were'} acknowledged"
        fields = {**self.log_fields, "source": source, "messages": len(ids), "reason": reason}
        logger.error("%s", reason, extra=fields)
        now = datetime.now(UTC)
        sent = min(int(id_.partition(b"-")[0]) for id_ in ids) / 1000  # a sender may choose an id of the far future
        self.report_gap(datetime.fromtimestamp(min(sent, now.timestamp()), UTC), reason)

    async def trim(self) -> None:
        """Remove entries that are older than the retention and acknowledged by every group."""
        if self.options.retention is not None:
            for stream in self.streams:
                try:
                    await self.group.trim(stream, self.options.retention)
                except DiatorError as error:
                    what = f"{stream.decode()} could not be trimmed"
                    fields = partial(self._error_fields, stream, error)
                    self.lines.log(logging.WARNING, what, "%s: %s", what, error, fields=fields)


def _added(id_: bytes) -> int:
    """Return when an entry was added, in milliseconds since 1970: an id that Redis makes begins with the time."""
    return int(id_.partition(b"-")[0])


class Connection:
    """One connection that waits for entries."""

    def __init__(self, connection: RedisConnection, subscription: Subscription) -> None:
        self._connection = connection
        self._subscription = subscription
        self._next_scan = 0.0
        self._empty = 0  # replies without an entry, one after the other
        self._unchecked = [*subscription.topics]  # for entries that the last connection lost on the way
        # Redis may have that connection still: its read waits there for a time, and takes the next entry.
        self._check_again_at = asyncio.get_running_loop().time() + SCAN_EVERY if subscription.reconnects else math.inf
        self._command = (b"XREADGROUP", b"GROUP", subscription.group.name, subscription.group.consumer, b"COUNT")
        self._streams = [*subscription.topics]
        self._busy: bytes | None = None  # a stream that alone had as many entries as were asked for, and may have more

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._check_again_at:
            self._check_again_at, self._unchecked = math.inf, [*self._subscription.topics]
        while self._unchecked:
            if lost := await self._subscription.lost_on_the_way(self._unchecked.pop()):
                return lost
        if loop.time() >= self._next_scan:
            if found := await self._subscription.scan(most):
                return found  # and scan again at once
            self._next_scan = loop.time() + self._until_next_scan
            await self._subscription.trim()
        streams, block = self._to_ask(most)
        count = max(1, min(most, 100) // len(streams))  # for each stream
        last = [b">"] * len(streams)
        await send_command(self._connection, *self._command, b"%d" % count, *block, b"STREAMS", *streams, *last)
        # BLOCK ends after a second at the latest, so a peer that is silent for longer is dead.
        reply = await read_reply(self._connection)
        self._empty = 0 if reply else self._empty + 1
        answered = [*(reply.items() if isinstance(reply, dict) else reply or ())]
        if len(streams) > 1 and len(answered) == 1 and len(answered[0][1]) == count:
            self._busy = answered[0][0]
        subscription = self._subscription
        received = [
            subscription.delivery(stream, id_, pairs or (), 1) for stream, entries in answered for id_, pairs in entries
        ]
        subscription.leases.hold([delivery.token for delivery in received])  # type: ignore[misc]  # as `_release`
        return received

    def _to_ask(self, most: int) -> tuple[list[bytes], tuple[bytes, ...]]:
        """
        Choose the streams to ask, and whether to wait for an entry there.

        A busy stream is asked alone every other time, since together with the others it returns only its share. If
        there is room for fewer entries than there are streams, some are asked, then others. If all of them were empty,
        all are asked, and Redis waits for the first entry.
        """
        if self._busy is not None:
            streams, self._busy = [self._busy], None
            return streams, ()
        several = min(len(self._streams), most)
        if several == len(self._streams) or self._empty * several >= len(self._streams):
            return self._streams, (b"BLOCK", ms(self._until_next_scan))
        streams = self._streams[:several]
        self._streams = self._streams[several:] + streams
        return streams, ()

    @property
    def _until_next_scan(self) -> float:
        return _SCAN_AGAIN if self._subscription.is_taking_over else SCAN_EVERY

    async def probe(self) -> None:
        """Do nothing: a reply is due anyway."""
