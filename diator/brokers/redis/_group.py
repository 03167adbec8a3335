"""A consumer group of Redis Streams: the commands that one of its consumers sends."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

from diator.brokers.leases import Leased
from diator.brokers.redis._names import AGAIN, DEAD, DELAYED, encoded, of_group
from diator.brokers.redis._scripts import ACK, CHECK, DEAD_LETTER, FORGET, MOVE_DUE, RENEW, RETRY
from diator.brokers.settling import ALL_OMITTED, OMITTED
from diator.exceptions import ConfigurationError, MessageRejected

Execute: TypeAlias = Callable[..., Awaitable[Any]]

_MOST_PENDING = b"100000"
# An id that no entry comes after.
_NO_ENTRY = b"18446744073709551615-18446744073709551614"
# How many due messages one script moves; between two scripts Redis does something else.
_MOVED_AT_ONCE = 100
# How many arguments a script can pass on at once. Lua's `unpack` has a limit of about 8,000.
_MOST_OF_LUA = 4_000


class Entry(Leased, eq=False, gc=False):  # nothing that it refers to refers back
    """
    An entry that a consumer holds: the token of a delivery.

    Attributes:
        stream: The stream that has the entry.
        id: Its id there.
        first: The stream that all groups share. Another *stream* is that of the retried messages of one group.
        pairs: The fields of the message: a name, its value, the next name and so on.
        origin: The id of the message's first entry; of a retried message that is another than *id*.
        is_suspect: Whether it was taken over after a delivery elsewhere: it may be a poison message.
    """

    stream: bytes
    id: bytes
    first: bytes
    pairs: Sequence[bytes]
    origin: bytes
    is_suspect: bool = False

    @property
    def is_retried(self) -> bool:
        return self.stream != self.first


class Group:
    """
    One consumer of one group.

    Attributes:
        execute: Sends a command, and returns its reply.
        name: The name of the group.
        consumer: The name of this consumer, which no other has.
    """

    def __init__(self, execute: Execute, name: str) -> None:
        self.execute = execute
        self._name = name
        self.name = encoded(name)
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}".encode()

    def key(self, stream: bytes, what: bytes) -> bytes:
        """Return the key of this group's own stream or sorted set *what* for *stream*."""
        return of_group(stream, self._name, what)

    async def create(self, streams: Iterable[bytes]) -> list[bytes]:
        """Create the group where it is missing, at the oldest entry so that nothing is missed. Return where it was."""
        created: list[bytes] = []
        for stream in streams:
            try:
                await self.execute(b"XGROUP", b"CREATE", stream, self.name, b"0", b"MKSTREAM")
                created.append(stream)
            except MessageRejected as error:
                if "BUSYGROUP" not in str(error):
                    raise
        return created

    async def check_access(self, streams: Sequence[bytes]) -> None:
        """Read what cannot be there. AccessRefused if the user may not read, at once and not with the first message."""
        nothing = [_NO_ENTRY] * len(streams)
        await self.execute(b"XREADGROUP", b"GROUP", self.name, self.consumer, b"STREAMS", *streams, *nothing)

    async def check_keys(self, stream: bytes) -> None:
        """
        Check *stream*, and the keys that this group has for it.

        Raises:
            AccessRefused: The user may not use one of them.
            ConfigurationError: Another program has made one of them something else.
        """
        keys = [stream, *(self.key(stream, what) for what in (DELAYED, AGAIN, DEAD))]
        if found := await self._run(CHECK, keys, [b"stream", b"zset", b"stream", b"stream"]):
            key, problem = (text.decode(errors="replace") for text in found)
            raise ConfigurationError(
                f"the key {key} {problem}, but a consumer group needs it; delete or rename that key"
            )

    # -- what this consumer holds --------------------------------------------------------------------------------

    async def pending(self, stream: bytes) -> list[Any]:
        """Return what Redis has delivered to this consumer and it has not settled: id, consumer, idle, deliveries."""
        pending: list[Any] = await self.execute(
            b"XPENDING", stream, self.name, b"-", b"+", _MOST_PENDING, self.consumer
        )
        return pending

    async def deliveries_of(self, stream: bytes, id_: bytes) -> int | None:
        """Return how often an entry of this consumer was delivered; None if it is no longer this consumer's."""
        found = await self.execute(b"XPENDING", stream, self.name, id_, id_, b"1", self.consumer)
        return found[0][3] if found else None

    async def renew(self, entries: Sequence[Entry]) -> Collection[Entry]:
        """Renew the leases of *entries* of one stream. Return those that other consumers may have claimed meanwhile."""
        by_id = {entry.id: entry for entry in entries}
        leased = {entry.id for entry in entries if entry.is_leased}  # so nobody has claimed them before
        ids = [*by_id]
        for start in range(0, len(ids), _MOST_OF_LUA):
            some = ids[start : start + _MOST_OF_LUA]
            ours, removed = await self._run(RENEW, [entries[0].stream], [self.name, self.consumer, *some])
            for id_ in [*ours, *leased.intersection(removed)]:
                del by_id[id_]
        return by_id.values()

    async def let_go(self, stream: bytes, id_: bytes, times: int, idle_ms: int) -> None:
        """Let others claim an entry that counts as delivered so many *times*."""
        options = (b"IDLE", b"%d" % idle_ms, b"RETRYCOUNT", b"%d" % times, b"JUSTID")
        await self.execute(b"XCLAIM", stream, self.name, self.consumer, b"0", id_, *options)

    async def redeliver(self, stream: bytes, id_: bytes, attempt: int) -> list[tuple[bytes, Any]]:
        """Return an entry of this consumer once more, as its delivery number *attempt*; nothing if it was removed."""
        count = (b"RETRYCOUNT", b"%d" % attempt)
        found = await self.execute(b"XCLAIM", stream, self.name, self.consumer, b"0", id_, *count)
        return [entry for entry in found if entry]

    async def take_over(
        self, stream: bytes, lease: float, cursor: bytes, most: int
    ) -> tuple[bytes, list[tuple[bytes, Any]], list[bytes]]:
        """Claim entries whose *lease* is over. Return the next cursor, the entries, and the ids of removed ones."""
        claim = (b"XAUTOCLAIM", stream, self.name, self.consumer, ms(lease), cursor, b"COUNT", b"%d" % most)
        cursor, entries, gone = await self.execute(*claim)
        return cursor, entries, gone

    # -- settling: each only if the entry is still this consumer's ------------------------------------------------

    async def ack(self, stream: bytes, ids: Sequence[bytes], *, remove: bool) -> None:
        """Acknowledge *ids*, and *remove* them from the stream."""
        await self._run(ACK, [stream], [self.name, self.consumer, b"XDEL" if remove else b"", *ids])

    async def retry(self, entry: Entry, kept: bytes, after: float) -> None:
        """Requeue an entry: at once, or *after* so many seconds. Until then it waits in the form *kept*."""
        keys = [entry.stream, self.key(entry.first, DELAYED), self.key(entry.first, AGAIN)]
        await self._run(RETRY, keys, [self.name, self.consumer, *_how(entry), kept, ms(after)])

    async def dead_letter(self, entry: Entry, why: Sequence[bytes]) -> None:
        """
        Move an entry to the dead-letter stream, with the further fields *why*.

        If Redis refuses that for good, the dead letter contains only those; the entry itself stays in its stream.
        """
        try:
            if len(entry.pairs) + len(why) > _MOST_OF_LUA:
                await self._dead_letter_many_fields(entry, [*entry.pairs, *why])
            # A first entry is copied inside Redis, since it may be as large as its sender likes.
            elif entry.is_retried or await self.copy_dead_letters([(entry, why)]):
                await self._dead_letter(entry, [*entry.pairs, *why])
        except MessageRejected:
            await self.check_keys(entry.first)
            await self._dead_letter(entry, [*why, OMITTED.encode(), ALL_OMITTED.encode()])

    async def copy_dead_letters(self, entries: Sequence[tuple[Entry, Sequence[bytes]]]) -> Collection[bytes]:
        """
        Copy entries of one stream, each with its further fields, to the dead-letter stream.

        Return the ids of those that cannot be copied because they were removed.
        """
        first, arguments = entries[0][0], [self.name, self.consumer]
        for entry, why in entries:
            arguments += [*_how(entry), b"copy", b"%d" % len(why), *why]
        removed: Collection[bytes] = await self._run(DEAD_LETTER, self._dead_letter_keys(first), arguments)
        return removed

    async def _dead_letter(self, entry: Entry, fields: Sequence[bytes]) -> None:
        arguments = [self.name, self.consumer, *_how(entry), b"", b"%d" % len(fields), *fields]
        await self._run(DEAD_LETTER, self._dead_letter_keys(entry), arguments)

    async def _dead_letter_many_fields(self, entry: Entry, fields: Sequence[bytes]) -> None:
        if await self.deliveries_of(entry.stream, entry.id) is not None:
            await self.execute(b"XADD", self._dead_letter_keys(entry)[1], b"*", *fields)
            await self.ack(entry.stream, [entry.id], remove=entry.is_retried)

    def _dead_letter_keys(self, entry: Entry) -> Sequence[bytes]:
        return [entry.stream, self.key(entry.first, DEAD)]

    # -- the group -----------------------------------------------------------------------------------------------

    async def move_due(self, delayed: bytes, again: bytes) -> None:
        """Move the delayed messages that are due to the stream *again*."""
        while await self._run(MOVE_DUE, [delayed, again], [b"%d" % _MOVED_AT_ONCE]) == _MOVED_AT_ONCE:
            pass  # there may be more

    async def forget(self, stream: bytes, idle: float) -> None:
        """Delete this consumer, and those that have been idle for so many seconds, unless they hold entries."""
        await self._run(FORGET, [stream], [self.name, ms(idle), self.consumer])

    async def trim(self, stream: bytes, retention: float) -> None:
        """Remove the entries that are older than *retention* seconds and acknowledged by every group of the stream."""
        now, _ = await self.execute(b"TIME")
        oldest = [b"%d-0" % ((int(now) - retention) * 1000)]
        for group in await self.execute(b"XINFO", b"GROUPS", stream):
            about = group if isinstance(group, dict) else dict(zip(group[::2], group[1::2], strict=True))
            pending = await self.execute(b"XPENDING", stream, about[b"name"])
            oldest.append(pending[1] if pending[0] else about[b"last-delivered-id"])
        await self.execute(b"XTRIM", stream, b"MINID", min(oldest, key=_order))

    async def _run(self, script: bytes, keys: Sequence[bytes], arguments: Iterable[bytes]) -> Any:
        return await self.execute(b"EVAL", script, b"%d" % len(keys), *keys, *arguments)


def _how(entry: Entry) -> Sequence[bytes]:
    """Return the arguments of a script that settles an entry: its id, and how."""
    remove = b"XDEL" if entry.is_retried else b""  # no other group reads that stream
    return entry.id, b"leased" if entry.is_leased else b"", remove


def _order(id_: bytes) -> tuple[int, int]:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds), int(number or 0)


def ms(seconds: float) -> bytes:
    """Write *seconds* as milliseconds, rounded up."""
    return b"%d" % math.ceil(seconds * 1000)
