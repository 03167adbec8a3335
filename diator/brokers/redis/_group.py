"""A consumer group of Redis Streams: the commands that one of its consumers sends."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

from diator.brokers.redis._names import encoded, of_group
from diator.brokers.redis._scripts import ACK, DEAD_LETTER, FORGET, MOVE_DUE, RETRY
from diator.exceptions import MessageRejected

Execute: TypeAlias = Callable[..., Awaitable[Any]]

_MOST_PENDING = b"100000"
# An id that no entry comes after.
_NO_ENTRY = b"18446744073709551615-18446744073709551614"
# How many due messages one script moves; between two scripts Redis does something else.
_MOVED_AT_ONCE = 100
# How many arguments a script can pass on at once. Lua's `unpack` has a limit of about 8,000.
_MOST_OF_LUA = 4_000


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

    async def still_ours(self, stream: bytes, ids: Sequence[bytes]) -> list[bytes]:
        """Return those of *ids* that no other consumer has claimed meanwhile. Claimed back, they would run twice."""
        if not ids:
            return []
        ours = {entry[0] for entry in await self.pending(stream)}
        return [id_ for id_ in ids if id_ in ours]

    async def renew(self, stream: bytes, ids: Sequence[bytes], *options: bytes, idle_ms: int) -> None:
        """Set for how long *ids* count as idle, and *options* of XCLAIM. Redis does not count it as a delivery."""
        if ids:
            claim = (b"XCLAIM", stream, self.name, self.consumer, b"0", *ids, b"IDLE", b"%d" % idle_ms)
            await self.execute(*claim, *options, b"JUSTID")

    async def redeliver(self, stream: bytes, id_: bytes, attempt: int) -> list[tuple[bytes, Any]]:
        """Return an entry of this consumer once more, as its delivery number *attempt*."""
        count = (b"RETRYCOUNT", b"%d" % attempt)
        found: list[tuple[bytes, Any]] = await self.execute(
            b"XCLAIM", stream, self.name, self.consumer, b"0", id_, *count
        )
        return found

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

    async def retry(self, stream: bytes, id_: bytes, keys: Sequence[bytes], kept: bytes, after: float) -> bool:
        """
        Move an entry to a key of the group, to be retried. Return whether it did.

        The first of *keys* is for messages that wait, *after* seconds; the second for those that do not.
        """
        return bool(await self._run(RETRY, [stream, *keys], [self.name, self.consumer, id_, kept, ms(after)]))

    async def dead_letter(self, stream: bytes, id_: bytes, dead: bytes, fields: Sequence[bytes]) -> bool:
        """Move an entry to the stream *dead*, with other *fields*. Return whether it did."""
        if len(fields) <= _MOST_OF_LUA:
            return bool(await self._run(DEAD_LETTER, [stream, dead], [self.name, self.consumer, id_, *fields]))
        if not await self.still_ours(stream, [id_]):
            return False
        await self.execute(b"XADD", dead, b"*", *fields)
        await self.execute(b"XACK", stream, self.name, id_)
        return True

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


def _order(id_: bytes) -> tuple[int, int]:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds), int(number or 0)


def ms(seconds: float) -> bytes:
    """Write *seconds* as milliseconds, rounded up."""
    return b"%d" % math.ceil(seconds * 1000)
