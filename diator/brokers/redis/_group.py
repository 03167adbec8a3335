"""One member of a group of Redis Streams: what it holds, how that is settled, and how it looks after its group."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import msgspec

from diator.brokers.base import Delivery, Topic
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._scripts import ACK, DEAD_LETTER, FORGET, MOVE_DUE, RETRY
from diator.brokers.settling import Acknowledgements, dead_letter_headers
from diator.brokers.supervisor import MessagesMissed
from diator.exceptions import BrokerError, MessageRejected

logger: logging.Logger = logging.getLogger(__name__)

BODY = b"body"
_AGAIN = b"again"
_FORGOTTEN_AFTER = 3600.0
_MOST_PENDING = b"100000"
_NO_ENTRY = b"18446744073709551615-18446744073709551614"
"""An id that no entry comes after."""
_MOVED_AT_ONCE = 100
"""How many messages that are due a script moves, before Redis does something else."""
_MOST_OF_LUA = 4_000
"""How many arguments a script can hand on at once: `unpack` has a limit of about 8,000."""


class _Held(msgspec.Struct):
    """What is kept of a message that is handled again later: everything, so that its first entry may go."""

    fields: list[tuple[bytes, bytes]]
    attempt: int
    origin: bytes
    """The id of its first entry. It also keeps two messages of one content apart."""


@dataclass(slots=True, eq=False)
class Entry:
    """By what a delivery is known: where it is, what it holds."""

    stream: bytes
    id: bytes
    fields: list[tuple[bytes, bytes]]
    origin: bytes
    """As in `_Held`."""


class Subscription:
    """One member of a group: what it holds, and how that is settled. It outlives its connections."""

    def __init__(
        self,
        connection: CommandConnection,
        topics: Mapping[bytes, Topic],
        group: str,
        *,
        lease: float,
        prefetch: int,
        timeout: float,
    ) -> None:
        self.execute = connection.execute
        self.group = group.encode()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}".encode()
        self.lease = lease
        self._prefetch = prefetch
        self._timeout = timeout
        self._suspects: set[bytes] = set()
        self.streams = tuple(topics)
        self._first = {self.key(stream, _AGAIN): stream for stream in topics}
        self.topics = {**topics, **{again: topics[stream] for again, stream in self._first.items()}}
        self._cursors = dict.fromkeys(self.topics, b"0-0")
        self._not_settled: set[bytes] = set()
        self.on_settled: Callable[[], None] = lambda: None
        self._held: dict[bytes, dict[bytes, Delivery]] = {stream: {} for stream in self.topics}
        self.holds = 0
        """How many deliveries are not settled, given out or not."""
        self._acked: Acknowledgements[Entry] = Acknowledgements(self._tell_acked)
        self._renewing: asyncio.Task[None] | None = None

    @property
    def is_taking_over(self) -> bool:
        """Whether it holds what somebody had begun, or may have: there may be more."""
        return bool(self._suspects)

    def key(self, stream: bytes, what: bytes) -> bytes:
        """Name what belongs to this group alone."""
        return b"%b:%b:%b" % (stream, self.group, what)

    async def create_groups(self) -> None:
        """
        Create the groups that are not there: at the oldest message, so that nothing is missed.

        Raises:
            MessagesMissed: One was there before, and is not any more.
        """
        created: list[bytes] = []
        for stream in self.topics:
            try:
                await self.execute(b"XGROUP", b"CREATE", stream, self.group, b"0", b"MKSTREAM")
                created.append(stream)
            except MessageRejected as error:
                if "BUSYGROUP" not in str(error):
                    raise
        # Nothing can be there, so this asks only whether it may be read: whoever may not is to hear so at once.
        nothing = [_NO_ENTRY] * len(self.topics)
        await self.execute(b"XREADGROUP", b"GROUP", self.group, self.name, b"STREAMS", *self.topics, *nothing)
        if created and self._renewing is not None:
            raise MessagesMissed(f"Redis had lost {created[0].decode()}, or its group; both are there again")
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._keep_renewing(), name="diator: renewing leases")

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
        body: bytes | None = None
        headers: dict[str, str] = {}
        for name, value in fields:
            if body is None and name == BODY:  # ours is the first; another one is a header of that name
                body = value
            else:
                headers[name.decode(errors="replace")] = value.decode(errors="replace")
        delivery = Delivery(
            topic=self.topics[stream],
            body=body or b"",
            headers=headers,
            attempt=attempt,
            settler=self,
            token=Entry(stream, id_, fields, origin),
        )
        ours = self._held[stream]
        self.holds += id_ not in ours
        ours[id_] = delivery
        return delivery

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        self._acked.add(self._let_go(delivery))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        entry = self._let_go(delivery)
        held = msgspec.msgpack.encode(_Held(entry.fields, delivery.attempt + 1, entry.origin))
        first = self._first.get(entry.stream, entry.stream)
        keys = [entry.stream, self.key(first, b"delayed"), self.key(first, _AGAIN)]
        with self._noting_failure(entry):
            was_ours = await self._eval(RETRY, keys, [self.group, self.name, entry.id, held, ms(after)])
        if was_ours:
            await self._remove(entry.stream, [entry.id])

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        entry = self._let_go(delivery)  # should that fail, it is nobody's once the lease is over, and comes again
        stream = self._first.get(entry.stream, entry.stream)
        why = dead_letter_headers(
            delivery, reason, source=stream.decode(), group=self.group.decode(), entry_id=entry.origin.decode()
        )
        fields = [part for pair in entry.fields for part in pair]
        fields += [part.encode(errors="replace") for pair in why.items() for part in pair]
        dead = self.key(stream, b"dead")
        with self._noting_failure(entry):
            if len(fields) <= _MOST_OF_LUA:
                was_ours = await self._eval(
                    DEAD_LETTER, [entry.stream, dead], [self.group, self.name, entry.id, *fields]
                )
            elif was_ours := bool(await self._still_ours(entry.stream, [entry.id])):
                await self.execute(b"XADD", dead, b"*", *fields)
                await self.execute(b"XACK", entry.stream, self.group, entry.id)
        if was_ours:
            await self._remove(entry.stream, [entry.id])

    @contextmanager
    def _noting_failure(self, entry: Entry) -> Generator[None, None, None]:
        """What could not be settled is pending and not held, and yet was delivered, unlike what was lost on its way."""
        self._not_settled.add(entry.id)
        yield
        self._not_settled.discard(entry.id)

    async def _remove(self, stream: bytes, ids: Sequence[bytes]) -> None:
        """What was read again is of no use to any other group."""
        if stream in self._first:
            await self.execute(b"XDEL", stream, *ids)

    def _let_go(self, delivery: Delivery) -> Entry:
        entry = cast("Entry", delivery.token)
        if self._held[entry.stream].pop(entry.id, None) is not None:
            self.holds -= 1
        self._suspects.discard(entry.id)
        self.on_settled()
        return entry

    async def _tell_acked(self, entries: Sequence[Entry]) -> None:
        by_stream: dict[bytes, list[bytes]] = defaultdict(list)
        for entry in entries:
            by_stream[entry.stream].append(entry.id)
        for stream, ids in by_stream.items():
            then = b"XDEL" if stream in self._first else b""  # what was read again is of no use to any other group
            try:
                await self._eval(ACK, [stream], [self.group, self.name, then, *ids])
            except BrokerError as error:
                logger.warning("%d acknowledgements did not reach Redis; they come again: %s", len(ids), error)

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

    async def leave(self, not_given_out: Collection[Delivery]) -> None:
        """
        Have what was acknowledged told, and leave the rest to others at once, instead of when the lease is over.

        It takes at most *timeout* seconds.
        """
        if self._renewing is None:
            return  # it never was a member
        self._renewing.cancel()
        unseen = {cast("Entry", delivery.token).id for delivery in not_given_out}
        try:
            async with asyncio.timeout(self._timeout):
                await self._acked.flush()
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
            await self._eval(FORGET, [stream], [self.group, ms(_FORGOTTEN_AFTER), self.name])
        except BrokerError as error:
            logger.warning("what was not handled of %s is taken by others when its lease is over: %s", stream, error)

    async def unheld(self, stream: bytes) -> list[Delivery]:
        """Take what Redis has given to this member, and a connection that broke has lost on the way."""
        with self._finding() as found:
            for id_, _, _, times in await self._pending(stream):
                if id_ not in self._held[stream]:
                    attempt = times + (id_ in self._not_settled)
                    count = (b"RETRYCOUNT", str(attempt).encode())
                    claimed = await self.execute(b"XCLAIM", stream, self.group, self.name, b"0", id_, *count)
                    self._not_settled.discard(id_)
                    found += [self.delivery(stream, id_, pairs or (), attempt) for id_, pairs in claimed]
        return found

    @contextmanager
    def _finding(self) -> Generator[list[Delivery], None, None]:
        """Give a list for what is found. If that fails half-way nobody gets it, so that it must not be renewed."""
        found: list[Delivery] = []
        try:
            yield found
        except BaseException:
            for delivery in found:
                self._let_go(delivery)
            raise

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
        """
        Move what is due, and take over entries whose lease is over, at most *most*.

        As many as can begin, and no more: one of them may have killed who had it, and will kill this process. What has
        not been taken over by then is not counted as delivered again, and so is not taken for a killer.
        """
        for stream in self.streams:
            keys = [self.key(stream, b"delayed"), self.key(stream, b"again")]
            while await self._eval(MOVE_DUE, keys, [b"%d" % _MOVED_AT_ONCE]) == _MOVED_AT_ONCE:
                pass  # there may be more
        most = min(most, self._prefetch - len(self._suspects))
        with self._finding() as found:
            for stream in self.topics:
                if len(found) < most:
                    await self._take_over(stream, most - len(found), found)
        return found

    async def _take_over(self, stream: bytes, most: int, found: list[Delivery]) -> None:
        count = str(most).encode()
        claim = (b"XAUTOCLAIM", stream, self.group, self.name, ms(self.lease), self._cursors[stream], b"COUNT", count)
        self._cursors[stream], entries, gone = await self.execute(*claim)
        if gone:
            logger.error("%d messages of %s were removed from the stream before they were handled", len(gone), stream)
        for id_, pairs in entries:
            if id_ in self._held[stream]:
                continue  # our own, whose renewal was late; it is being handled
            # By now who had it may have acknowledged it.
            for _, _, _, times in await self.execute(b"XPENDING", stream, self.group, id_, id_, b"1", self.name):
                found.append(self.delivery(stream, id_, pairs, times))
                if times > 1:  # and not left by somebody who had never seen it
                    self._suspects.add(id_)

    async def trim(self, stream: bytes, retention: float) -> None:
        """Remove what is older than *retention* and was acknowledged by every group."""
        now, _ = await self.execute(b"TIME")
        oldest = [b"%d-0" % ((int(now) - retention) * 1000)]
        for group in await self.execute(b"XINFO", b"GROUPS", stream):
            about = group if isinstance(group, dict) else dict(zip(group[::2], group[1::2], strict=True))
            pending = await self.execute(b"XPENDING", stream, about[b"name"])
            oldest.append(pending[1] if pending[0] else about[b"last-delivered-id"])
        await self.execute(b"XTRIM", stream, b"MINID", min(oldest, key=_order))


def _order(id_: bytes) -> tuple[int, int]:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds), int(number or 0)


def ms(seconds: float) -> bytes:
    return str(math.ceil(seconds * 1000)).encode()
