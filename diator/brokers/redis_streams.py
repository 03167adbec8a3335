"""
Redis Streams. Needs the extra `redis`.

One stream a topic, `<prefix>:<message_type>:<message_name>`, which all groups share. Beside it each group has keys of
its own: `…:<group>:delayed` is what is handled again later, by the time when it is due; `…:<group>:again` is what is
due, a stream that the group reads like the first; `…:<group>:dead` is what was put aside.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Self, cast
from uuid import uuid4

import msgspec

from diator.brokers._dead_letters import provenance
from diator.brokers._redis_connection import Client, Connection, SharedConnection, check_client, client_from_url
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities, require
from diator.brokers.codec import MAX_MESSAGE_BYTES, encode, headers_with_key
from diator.brokers.message import Message
from diator.brokers.sending import send_together
from diator.brokers.supervisor import Patience, Source, Supervised
from diator.exceptions import BrokerClosed, BrokerError, EncodingError, MessageRejected, WiringError

logger: logging.Logger = logging.getLogger(__name__)

_BODY = b"body"
_AGAIN = b"again"


class RedisStreamMessageBroker:
    """
    Appends each message to a Redis stream, and reads streams as a member of a group.

    At least once: a message is the group's until a member has acknowledged it. A member that dies is noticed when its
    *lease* (seconds) is over, and others take what it held; a member that lives keeps its lease, however long a handler
    takes. A group begins at the oldest message, and collects while no member is there.

    What Redis keeps of confirmed messages over a restart is a matter of its configuration: with `appendonly yes` they
    survive the death of its process. Nothing is removed from a stream unless *retention* (seconds) says so, and then
    only what is older and was acknowledged by every group.

    The other options are those of `RedisMessageBroker`; *read_ahead* is the number of messages that are held, under
    this member's lease, beyond those that are being handled.
    """

    def __init__(
        self,
        client: Client,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        lease: float = 60.0,
        retention: float | None = None,
        read_ahead: int = 100,
        patience: Patience | None = None,
    ) -> None:
        check_client(client)
        if read_ahead < 0 or max_in_flight < 1 or timeout <= 0 or lease <= 0:
            raise WiringError("read_ahead is at least 0, max_in_flight at least 1, timeout and lease above 0")
        self._client = client
        self._owns_client = False
        self._prefix = prefix
        self._max_message_bytes = max_message_bytes
        self._timeout = timeout
        self._lease = lease
        self._retention = retention
        self._read_ahead = read_ahead
        self._patience = patience or Patience(connect=timeout)
        self._connection = SharedConnection(client, timeout=timeout, max_in_flight=max_in_flight)

    @classmethod
    def from_url(
        cls,
        url: str,
        prefix: str = "diator",
        *,
        timeout: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_in_flight: int = 1024,
        lease: float = 60.0,
        retention: float | None = None,
        read_ahead: int = 100,
        patience: Patience | None = None,
    ) -> Self:
        """Make a broker with a client of its own for `redis://…`, `rediss://…` or `unix://…`; `aclose` closes it."""
        broker = cls(
            client_from_url(url, timeout=timeout),
            prefix,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            lease=lease,
            retention=retention,
            read_ahead=read_ahead,
            patience=patience,
        )
        broker._owns_client = True
        return broker

    @property
    def capabilities(self) -> Capabilities:
        """What Redis Streams promise. Durability is not among it: that is the server's configuration."""
        return Capabilities(
            guarantee="at_least_once",
            receipt="accepted",
            settlement="individual",
            redelivery=frozenset({"retry", "close", "crash", "deadline"}),
            redelivery_bound=self._lease + 2 * _SCAN,
            delayed_retry=True,
            dead_letter=True,
            delivery_count="exact",
            ordering="destination",
            distribution=frozenset({"competing"}),
            subscription="durable",
            replay="earliest",
            unroutable="retained",
            headers="native",
            backpressure="pull",
            max_message_bytes=self._max_message_bytes,
            multi_process=True,
            network=True,
        )

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`."""
        body = encode(message, max_bytes=self._max_message_bytes)
        fields = [_BODY, body]
        try:
            for name, value in headers_with_key(message).items():
                fields += [name.encode(), value.encode()]
        except UnicodeEncodeError as error:
            raise EncodingError(f"{message.message_name}.headers", str(error)) from error
        stream = self._stream(Topic(message.message_type, message.message_name))
        await self._connection.execute(b"XADD", stream, b"*", *fields, message_id=message.message_id)

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """See `BatchMessageBroker.send_messages`: in one write, in their order."""
        await send_together(self.send_message, messages)

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """See `ReadableBroker.subscribe`. *group* is needed: without one nobody knows what was handled."""
        if group is None:
            broadcast = Capabilities(distribution=frozenset({"broadcast"}))
            remedy = "name a group, one for each service, or use Redis Pub/Sub"
            require(self, self.capabilities, broadcast, for_="subscribe() without a group", remedy=remedy)
        if prefetch < 1:
            raise WiringError("prefetch is at least 1")
        member = _Member(self._connection, {self._stream(topic): topic for topic in topics}, str(group), self._lease)
        supervised = Supervised(
            lambda: self._reading(member),
            lossy=False,
            ahead=prefetch + self._read_ahead,
            patience=self._patience,
            on_gap=on_gap,
            is_full=lambda waiting: member.holds - waiting >= prefetch,
        )
        member.on_settled = supervised.look_again
        self._connection.subscriptions.add(supervised)
        try:
            async with supervised as deliveries:
                yield deliveries
        finally:
            self._connection.subscriptions.discard(supervised)
            await member.leave(supervised.not_given_out, within=self._timeout)

    @asynccontextmanager
    async def _reading(self, member: _Member) -> AsyncGenerator[Source, None]:
        """Take a connection of the client's pool for blocking reads, and see that the groups are there."""
        if self._connection.is_closed:
            raise BrokerClosed("this broker is closed")
        await member.create_groups()
        connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            yield _Reading(connection, member, self._retention)
        finally:
            await connection.disconnect(nowait=True)
            await self._client.connection_pool.release(connection)

    def _stream(self, topic: Topic) -> bytes:
        return f"{self._prefix}:{topic.message_type}:{topic.message_name}".encode()

    async def aclose(self) -> None:
        """Refuse further messages and wait, at most *timeout*, for the answers that are due. Again: does nothing."""
        await self._connection.aclose()
        if self._owns_client:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        await self._connection.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


# -- what must happen whole, or not at all -----------------------------------------------------------------------

# Take an entry from the group and keep it for later. KEYS: stream, delayed. ARGV: group, id, due (ms), what to keep.
_RETRY_LATER = b"""
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
"""
# Have what is due read again. KEYS: delayed, again. ARGV: now (ms), how many at most.
_MOVE_DUE = b"""
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
for _, kept in ipairs(due) do
  redis.call('XADD', KEYS[2], '*', 'again', kept)
  redis.call('ZREM', KEYS[1], kept)
end
return #due
"""
# Put an entry aside. KEYS: stream, dead. ARGV: group, id, then the fields.
_PUT_ASIDE = b"""
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
"""
# Forget members that are gone and hold nothing. KEYS: stream. ARGV: group, idle (ms), name of one that goes now.
_FORGET = b"""
for _, member in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, pending, idle = member[2], member[4], member[6]
  if pending == 0 and (name == ARGV[3] or idle > tonumber(ARGV[2])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""

_SCAN = 1.0
"""How often, in seconds, a member looks for what others left behind, and for what is due."""
_FORGOTTEN_AFTER = 3600.0
_ACK_DELAY = 0.002
_ACK_BATCH = 100
_MOST_PENDING = b"100000"
_MOST_OF_LUA = 4_000
"""How many arguments a script can hand on at once: `unpack` has a limit of about 8,000."""


class _Held(msgspec.Struct):
    """What is kept of a message that is handled again later: everything, so that its first entry may go."""

    fields: list[tuple[bytes, bytes]]
    attempt: int
    origin: bytes
    """The id of its first entry. It also keeps two messages of one content apart."""


class _Entry:
    """By what a delivery is known: where it is, what it holds."""

    __slots__ = ("fields", "id", "origin", "stream", "times")

    def __init__(self, stream: bytes, id_: bytes, fields: list[tuple[bytes, bytes]], origin: bytes, times: int) -> None:
        self.times = times
        self.stream = stream
        self.id = id_
        self.fields = fields
        self.origin = origin


class _Member:
    """One member of a group: what it holds, and how that is settled. It outlives its connections."""

    def __init__(self, connection: SharedConnection, topics: Mapping[bytes, Topic], group: str, lease: float) -> None:
        self.execute = connection.execute
        self.group = group.encode()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}".encode()
        self.lease = lease
        self.streams = tuple(topics)
        self._first = {self.key(stream, _AGAIN): stream for stream in topics}
        self.topics = {**topics, **{again: topics[stream] for again, stream in self._first.items()}}
        self._cursors = dict.fromkeys(self.topics, b"0-0")
        self._joined = False
        self._not_settled: set[bytes] = set()
        self.on_settled: Callable[[], None] = lambda: None
        self._held: dict[bytes, dict[bytes, Delivery]] = {stream: {} for stream in self.topics}
        self._acked: dict[bytes, list[bytes]] = defaultdict(list)
        self._flushing: asyncio.TimerHandle | None = None
        self._flushes: set[asyncio.Task[None]] = set()
        self._renewing = asyncio.create_task(self._keep_renewing(), name="diator: renewing leases")

    @property
    def holds(self) -> int:
        """How many deliveries are not settled, given out or not."""
        return sum(map(len, self._held.values()))

    def key(self, stream: bytes, what: bytes) -> bytes:
        """Name what belongs to this group alone."""
        return b"%b:%b:%b" % (stream, self.group, what)

    async def create_groups(self) -> None:
        """Create the groups that are not there: at the oldest message, so that nothing is missed."""
        for stream in self.topics:
            try:
                await self.execute(b"XGROUP", b"CREATE", stream, self.group, b"0", b"MKSTREAM")
            except MessageRejected as error:
                if "BUSYGROUP" not in str(error):
                    raise
        self._joined = True

    def delivery(self, stream: bytes, id_: bytes, pairs: Sequence[bytes], times: int) -> Delivery:
        """Make a delivery of an entry that was delivered *times* times."""
        fields = [*zip(pairs[::2], pairs[1::2], strict=False)]
        origin, attempt = id_, times
        if stream in self._first:
            try:
                held = msgspec.msgpack.decode(fields[0][1], type=_Held)
                fields, origin, attempt = held.fields, held.origin, held.attempt + times - 1
            except (msgspec.DecodeError, IndexError):
                logger.warning("an entry of %s is not one of ours", stream)
        body, headers = None, {}
        for name, value in fields:
            if name == _BODY and body is None:  # ours is the first; another one is a header of that name
                body = value
            else:
                headers[name.decode(errors="replace")] = value.decode(errors="replace")
        delivery = Delivery(
            topic=self.topics[stream],
            body=body or b"",
            headers=headers,
            attempt=attempt,
            settler=self,
            token=_Entry(stream, id_, fields, origin, times),
        )
        self._held[stream][id_] = delivery
        return delivery

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        """Noted here, and told together with others: a round trip for each would be all that a consumer does."""
        entry = self._let_go(delivery)
        ids = self._acked[entry.stream]
        ids.append(entry.id)
        if len(ids) >= _ACK_BATCH:
            self._flush()
        elif self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(_ACK_DELAY, self._flush)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        entry = self._let_go(delivery)
        held = msgspec.msgpack.encode(_Held(entry.fields, delivery.attempt + 1, entry.origin))
        due = str(math.ceil(_now_ms() + after * 1000)).encode()
        delayed = self.key(self._first.get(entry.stream, entry.stream), b"delayed")
        with self._noting_failure(entry):
            await self._eval(_RETRY_LATER, [entry.stream, delayed], [self.group, entry.id, due, held])
        await self._remove(entry.stream, [entry.id])

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        entry = self._let_go(delivery)  # should that fail, it is nobody's once the lease is over, and comes again
        stream = self._first.get(entry.stream, entry.stream)
        about = provenance(
            reason=reason,
            source=stream.decode(),
            entry_id=entry.origin.decode(),
            group=self.group.decode(),
            attempts=delivery.attempt,
        )
        fields = [part for pair in entry.fields for part in pair]
        fields += [part.encode(errors="replace") for pair in about.items() for part in pair]
        dead = self.key(stream, b"dead")
        with self._noting_failure(entry):
            if len(fields) <= _MOST_OF_LUA:
                await self._eval(_PUT_ASIDE, [entry.stream, dead], [self.group, entry.id, *fields])
            else:
                await self.execute(b"XADD", dead, b"*", *fields)
                await self.execute(b"XACK", entry.stream, self.group, entry.id)
        await self._remove(entry.stream, [entry.id])

    @contextmanager
    def _noting_failure(self, entry: _Entry) -> Generator[None, None, None]:
        """What could not be settled is pending and not held, and yet was delivered, unlike what was lost on its way."""
        self._not_settled.add(entry.id)
        yield
        self._not_settled.discard(entry.id)

    async def _remove(self, stream: bytes, ids: Sequence[bytes]) -> None:
        """What was read again is of no use to any other group."""
        if stream in self._first:
            await self.execute(b"XDEL", stream, *ids)

    def _let_go(self, delivery: Delivery) -> _Entry:
        entry = cast("_Entry", delivery.token)
        self._held[entry.stream].pop(entry.id, None)
        self.on_settled()
        return entry

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        for stream, ids in self._acked.items():
            if ids:
                flush = asyncio.create_task(self._tell_acked(stream, [*ids]))
                self._flushes.add(flush)
                flush.add_done_callback(self._flushes.discard)
                ids.clear()

    async def _tell_acked(self, stream: bytes, ids: Sequence[bytes]) -> None:
        try:
            await self.execute(b"XACK", stream, self.group, *ids)
            await self._remove(stream, ids)
        except BrokerError as error:
            logger.warning("%d acknowledgements did not reach Redis; those messages come again: %s", len(ids), error)

    # -- holding -------------------------------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        """As long as this process lives, what it holds is its own, however long a handler takes."""
        while True:
            await asyncio.sleep(self.lease / 3)
            for stream, held in self._held.items():
                try:
                    await self._claim(stream, await self._still_ours(stream, [*held]), idle_ms=0)
                except BrokerError as error:
                    logger.warning("leases on %d messages could not be renewed: %s", len(held), error)

    async def leave(self, not_given_out: Collection[Delivery], *, within: float) -> None:
        """Have what was acknowledged told, and leave the rest to others at once, instead of when the lease is over."""
        self._renewing.cancel()
        self._flush()
        if not self._joined:
            return
        unseen = {cast("_Entry", delivery.token).id for delivery in not_given_out}
        try:
            async with asyncio.timeout(within):
                if self._flushes:
                    await asyncio.wait(self._flushes)
                for stream in self.topics:
                    await self._leave(stream, unseen)
        except TimeoutError:
            logger.warning("Redis does not answer; what was not handled is taken by others when its lease is over")

    async def _leave(self, stream: bytes, unseen: Collection[bytes]) -> None:
        try:
            for id_, _, _, times in await self._pending(stream):
                # What nobody has seen was not delivered: neither what waited here nor what was on its way.
                begun = id_ in self._held[stream] and id_ not in unseen
                count = str(times if begun else times - 1).encode()
                await self._claim(stream, [id_], b"RETRYCOUNT", count, idle_ms=math.ceil(self.lease * 1000))
            await self._eval(_FORGET, [stream], [self.group, _ms(_FORGOTTEN_AFTER), self.name])
        except BrokerError as error:
            logger.warning("what was not handled of %s is taken by others when its lease is over: %s", stream, error)

    async def unheld(self, stream: bytes) -> list[Delivery]:
        """Take what Redis has given to this member, and a connection that broke has lost on the way."""
        found: list[Delivery] = []
        for id_, _, _, times in await self._pending(stream):
            if id_ not in self._held[stream]:
                attempt = times + (id_ in self._not_settled)
                self._not_settled.discard(id_)
                count = (b"RETRYCOUNT", str(attempt).encode())
                claimed = await self.execute(b"XCLAIM", stream, self.group, self.name, b"0", id_, *count)
                found += [self.delivery(stream, id_, pairs or (), attempt) for id_, pairs in claimed]
        return found

    async def _pending(self, stream: bytes) -> list[Any]:
        pending: list[Any] = await self.execute(b"XPENDING", stream, self.group, b"-", b"+", _MOST_PENDING, self.name)
        return pending

    async def _still_ours(self, stream: bytes, ids: Sequence[bytes]) -> list[bytes]:
        """Of *ids*, those that nobody else has taken: renewing the others would take them back while they run there."""
        if not ids:
            return []
        pending = await self._pending(stream)
        ours = {entry[0] for entry in pending}
        return [id_ for id_ in ids if id_ in ours]

    async def _claim(self, stream: bytes, ids: Sequence[bytes], *options: bytes, idle_ms: int) -> None:
        if ids:
            # JUSTID: a renewed lease is no delivery, and does not count as one.
            idle = str(idle_ms).encode()
            claim = (b"XCLAIM", stream, self.group, self.name, b"0", *ids, b"IDLE", idle, *options, b"JUSTID")
            await self.execute(*claim)

    async def _eval(self, script: bytes, keys: Sequence[bytes], arguments: Iterable[bytes]) -> Any:
        return await self.execute(b"EVAL", script, str(len(keys)).encode(), *keys, *arguments)

    # -- looking after the group ---------------------------------------------------------------------------------

    async def scan(self, most: int) -> list[Delivery]:
        """Move what is due, and take over at most *most* entries whose lease is over."""
        found: list[Delivery] = []
        for stream in self.streams:
            keys = [self.key(stream, b"delayed"), self.key(stream, b"again")]
            await self._eval(_MOVE_DUE, keys, [str(_now_ms()).encode(), b"100"])
        try:
            for stream in self.topics:
                if len(found) < most:
                    await self._take_over(stream, most - len(found), found)
        except BaseException:
            for delivery in found:  # nobody gets them from here, so they must not be renewed
                self._let_go(delivery)
            raise
        return found

    async def _take_over(self, stream: bytes, most: int, found: list[Delivery]) -> None:
        count = str(most).encode()
        claim = (b"XAUTOCLAIM", stream, self.group, self.name, _ms(self.lease), self._cursors[stream], b"COUNT", count)
        self._cursors[stream], entries, gone = await self.execute(*claim)
        if gone:
            logger.error("%d messages of %s were removed from the stream before they were handled", len(gone), stream)
        for id_, pairs in entries:
            if id_ in self._held[stream]:
                continue  # our own, whose renewal was late; it is being handled
            ((_, _, _, times),) = await self.execute(b"XPENDING", stream, self.group, id_, id_, b"1")
            found.append(self.delivery(stream, id_, pairs, times))

    async def trim(self, stream: bytes, retention: float) -> None:
        """Remove what is older than *retention* and was acknowledged by every group."""
        oldest = [f"{_now_ms() - int(retention * 1000)}-0".encode()]
        for group in await self.execute(b"XINFO", b"GROUPS", stream):
            about = group if isinstance(group, dict) else dict(zip(group[::2], group[1::2], strict=True))
            pending = await self.execute(b"XPENDING", stream, about[b"name"])
            oldest.append(pending[1] if pending[0] else about[b"last-delivered-id"])
        await self.execute(b"XTRIM", stream, b"MINID", min(oldest, key=_order))


class _Reading:
    """One connection that waits for entries."""

    def __init__(self, connection: Connection, member: _Member, retention: float | None) -> None:
        self._connection = connection
        self._member = member
        self._retention = retention
        self._next_scan = 0.0
        self._empty = 0
        self._to_look_for_lost = [*member.topics]
        self._command = (b"XREADGROUP", b"GROUP", member.group, member.name, b"COUNT")
        self._streams = [*member.topics]

    async def receive(self, most: int, /) -> Sequence[Delivery]:
        while self._to_look_for_lost:
            if lost := await self._member.unheld(self._to_look_for_lost.pop()):
                return lost
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next_scan:
            self._next_scan = loop.time() + _SCAN
            found = await self._member.scan(most)
            if found:
                return found
            await self._trim()
        # COUNT is for each stream. Where there is room for fewer than one of each, some are asked, then others; only
        # when none of them has anything, all are waited for.
        several = min(len(self._streams), most)
        if several < len(self._streams) and self._empty * several < len(self._streams):
            block: tuple[bytes, ...] = ()
        else:
            several, block = len(self._streams), (b"BLOCK", _ms(_SCAN))
        streams, count = self._streams[:several], str(max(1, min(most, 100) // several)).encode()
        self._streams = self._streams[several:] + streams
        await self._connection.send_command(
            *self._command, count, *block, b"STREAMS", *streams, *[b">"] * several, check_health=False
        )
        # BLOCK ends after a second at the latest, so a peer that says nothing for longer is dead.
        reply = await self._connection.read_response(disable_decoding=True, timeout=math.inf, disconnect_on_error=False)
        self._empty = 0 if reply else self._empty + 1
        answered = reply.items() if isinstance(reply, dict) else reply or ()
        return [
            self._member.delivery(stream, id_, pairs or (), 1) for stream, entries in answered for id_, pairs in entries
        ]

    async def _trim(self) -> None:
        if self._retention is not None:
            for stream in self._member.streams:
                try:
                    await self._member.trim(stream, self._retention)
                except BrokerError as error:
                    logger.warning("%s could not be trimmed: %s", stream, error)

    async def probe(self) -> None:
        """Nothing to ask: an answer is due anyway."""


def _order(id_: bytes) -> tuple[int, int]:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds), int(number or 0)


def _now_ms() -> int:
    return math.floor(datetime.now(UTC).timestamp() * 1000)


def _ms(seconds: float) -> bytes:
    return str(math.ceil(seconds * 1000)).encode()
