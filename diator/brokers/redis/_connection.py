"""One connection to Redis that many callers use at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from diator.brokers.connecting import ClientConnection
from diator.brokers.redis._client import CLIENT_ERRORS, NOT_EXECUTED, Client, RedisConnection, give_back, send_error
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed

logger: logging.Logger = logging.getLogger(__name__)


class CommandConnection(ClientConnection):
    """
    One connection of a client's pool, which concurrent callers use at once.

    What is called in one turn of the event loop goes out in one write, and the replies come back in that order; a
    lone call is written at once. At most *max_in_flight* calls, and about 4 MiB, wait for their replies; further ones
    queue for room, in their order. Every call ends within *timeout* seconds, all told: if the oldest one has no reply
    by then, the connection is given up, and every call that waits on it hears *outcome unknown*. Nothing is sent twice.

    Of a pool that has only one connection, calls borrow it, one after the other. A client that is not redis-py's own (a
    fake one, a cluster, one with commands of its own) is used through its `execute_command`, as it wants to be.
    """

    def __init__(self, client: Client, *, timeout: float, max_in_flight: int) -> None:
        super().__init__()
        self._client = client
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        self._plain = getattr(type(client), "execute_command", None) is Client.execute_command
        connections = getattr(getattr(client, "connection_pool", None), "max_connections", max_in_flight)
        self._shareable = self._plain and connections > 1  # the last one is the program's
        self._alone_at_once = max(1, min(connections, max_in_flight))
        self._alone = asyncio.Semaphore(self._alone_at_once)
        self._link: _Connection | None = None
        self.owns_client = False
        """Whether closing this closes the client too."""
        self._closed = False
        """Whether nothing goes out any more."""

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        self._bind_to_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                async with self._lock:
                    link = await self._connected(None)
                if link is None:
                    await self._client.ping()
        except CLIENT_ERRORS as error:
            raise send_error(error, None, written=False) from error

    async def execute(self, *command: bytes, message_id: UUID | None = None) -> Any:
        """
        Send *command* and give its reply.

        Raises:
            BrokerUnavailable: It was not sent.
            MessageRejected: Redis answered with an error.
            OutcomeUnknown: It was sent, and there is no reply.
            BrokerClosed: `aclose` was called before.
        """
        loop = self._bind_to_running_loop()
        deadline = loop.time() + self._timeout
        link = self._link
        reply: asyncio.Future[Any] | None
        try:
            if link is not None and link.has_room and not self._queued:
                reply = link.call(_pack(command), message_id, deadline)
            else:
                reply = await self._call_in_turn(command, message_id, deadline)
        except CLIENT_ERRORS as error:
            raise send_error(error, message_id, written=False) from error
        return await (self._execute_alone(command, message_id, deadline) if reply is None else reply)

    async def _close(self) -> None:
        await close_all(self.subscriptions)  # with the help of this
        self._closed = True
        async with self._lock:  # behind those who were there before
            link, self._link = self._link, None
        if link is not None:
            await link.finish()
        await self._background.wait()
        if self.owns_client:
            await self._client.aclose()

    def _reset(self) -> None:
        self._link, self._alone = None, asyncio.Semaphore(self._alone_at_once)

    async def _call_in_turn(
        self, command: Sequence[bytes], message_id: UUID | None, deadline: float
    ) -> asyncio.Future[Any] | None:
        """Wait for a connection with room, and call; None if calls have to go alone."""
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                while (link := await self._connected(message_id)) and not link.has_room:
                    await link.room()
                return None if link is None else link.call(_pack(command), message_id, deadline)
        finally:
            self._queued -= 1

    async def _connected(self, message_id: UUID | None) -> _Connection | None:
        """Called by one at a time."""
        if not self._closed and self._link is None and self._shareable:
            connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
            if _can_be_shared(connection) and not self._closed:
                self._link = _Connection(connection, self._timeout, self._max_in_flight, self._retire, self._give_back)
            else:
                self._shareable = self._closed
                await self._client.connection_pool.release(connection)
        if self._closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        return self._link

    def _retire(self, link: _Connection) -> None:
        """Use another connection from now on, and give this one back when its replies are in."""
        if self._link is link:
            self._link = None
            self._background.start(link.finish(), "the last replies of a connection to Redis")

    async def _give_back(self, link: _Connection, connection: RedisConnection) -> None:
        if self._link is link:
            self._link = None
        await give_back(self._client, connection)

    async def _execute_alone(self, command: Sequence[bytes], message_id: UUID | None, deadline: float) -> Any:
        written = not self._plain  # of a client of another kind nobody knows
        try:
            async with asyncio.timeout_at(deadline), self._alone:
                if not self._plain:
                    return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
                connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                try:
                    written = True
                    await connection.send_command(*command)
                    return await connection.read_response(disable_decoding=True)
                finally:
                    await self._client.connection_pool.release(connection)
        except CLIENT_ERRORS as error:
            raise send_error(error, message_id, written=written) from error


class _Connection:
    """A connection while it lives: what waits to be written, and who waits for which reply."""

    _MAX_BYTES_IN_FLIGHT = 4 * 1024 * 1024

    def __init__(
        self,
        connection: RedisConnection,
        timeout: float,
        max_in_flight: int,
        retire: Callable[[_Connection], None],
        give_back: Callable[[_Connection, RedisConnection], Awaitable[None]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        self._retire = retire
        self._give_back = give_back
        self._unwritten: list[bytes] = []
        self._waiting: deque[_Call] = deque()
        self._bytes_in_flight = 0
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        parts: Any = connection  # private ones of redis-py, guarded by `_can_be_shared`
        self._write: Callable[[bytes], None] = parts._writer.write  # noqa: SLF001
        self._abort: Callable[[], None] = parts._writer.transport.abort  # noqa: SLF001
        self._read: Callable[..., Awaitable[Any]] = parts._parser.read_response  # noqa: SLF001
        self._broken: Exception | None = None
        self._reader = self._loop.create_task(self._read_replies(), name="diator: replies from Redis")

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < self._max_in_flight and self._bytes_in_flight < self._MAX_BYTES_IN_FLIGHT

    async def room(self) -> None:
        """Wait until calls have been answered, or the connection is gone."""
        self._room.clear()
        await self._room.wait()

    def call(self, command: bytes, message_id: UUID | None, deadline: float) -> asyncio.Future[Any]:
        """Write *command*: at once if nothing is on its way, else with whatever this turn of the loop brings."""
        reply = self._loop.create_future()
        if self._waiting:
            if not self._unwritten:
                self._loop.call_soon(self._flush)
            self._unwritten.append(command)
        else:
            self._write(command)
            if self._sweeper is None:
                self._sweeper = self._loop.call_at(deadline, self._sweep)
        self._waiting.append((reply, deadline, len(command), message_id))
        self._bytes_in_flight += len(command)
        return reply

    async def finish(self) -> None:
        """Wait for the replies that are due, and let go of the connection."""
        while self._waiting:
            self._idle.clear()
            await self._idle.wait()
        self._reader.cancel()
        await asyncio.wait([self._reader])

    def _flush(self) -> None:
        if self._unwritten:
            try:
                self._write(b"".join(self._unwritten))
                self._unwritten.clear()
            except CLIENT_ERRORS as error:
                self._give_up(error)

    def _sweep(self) -> None:
        """Look at the oldest call: one timer for all of them, instead of one each."""
        self._sweeper = None
        if self._connection.should_reconnect() or getattr(self._connection, "_re_auth_token", None):  # type: ignore[no-untyped-call]
            self._retire(self)  # its server is about to move, or its credentials were renewed
        if not self._waiting:
            return
        deadline = self._waiting[0][1]
        if deadline <= self._loop.time():
            self._give_up(TimeoutError(f"no reply within {self._timeout:g} s"))
        else:
            self._sweeper = self._loop.call_at(deadline, self._sweep)

    def _give_up(self, error: Exception) -> None:
        self._broken = error
        self._reader.cancel()

    async def _read_replies(self) -> None:
        try:
            while True:
                self._settle(await self._read(disable_decoding=True))
        except CLIENT_ERRORS as error:
            self._broken = error
        except asyncio.CancelledError:
            if self._broken is None:
                raise
        finally:
            closed = ConnectionError("the connection was closed")
            self._fail(closed if self._broken is None else self._broken)
            if self._broken is not None:
                self._abort()  # closing would wait for what was not written, and nobody takes it
            try:
                await self._give_back(self, self._connection)
            except CLIENT_ERRORS as error:
                logger.debug("giving a connection back to the Redis client failed: %r", error)

    def _settle(self, reply: Any) -> None:
        future, _, size, message_id = self._waiting.popleft()
        self._bytes_in_flight -= size
        if not future.done():  # its caller may have been cancelled
            if isinstance(reply, Exception):
                future.set_exception(send_error(reply, message_id, written=True))
            else:
                future.set_result(reply)
        self._room.set()
        if not self._waiting:
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits: what was written may have arrived, what was not has not."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        written = len(self._waiting) - len(self._unwritten)
        for position, (future, _, _, message_id) in enumerate(self._waiting):
            if not future.done():
                future.set_exception(send_error(error, message_id, written=position < written))
            if isinstance(error, NOT_EXECUTED):  # this was the answer to the oldest call; the others have none
                error = ConnectionError(f"the connection was given up after {type(error).__name__}")
        self._waiting.clear()
        self._unwritten.clear()
        self._room.set()  # who waits for it finds another connection, or the reason why there is none
        self._idle.set()


_Call: TypeAlias = tuple["asyncio.Future[Any]", float, int, "UUID | None"]
"""Who waits for the reply, until when, how many bytes were sent, and for which message."""


def _pack(command: Sequence[bytes]) -> bytes:
    """Write a command as Redis reads it (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""
    return b"*%d\r\n" % len(command) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in command])


def _can_be_shared(connection: object) -> bool:
    """Tell whether *connection* is made of what `_Connection` uses of it. Parts of it are private to redis-py."""
    return (
        isinstance(connection, RedisConnection)
        and type(connection).send_packed_command is RedisConnection.send_packed_command
        and isinstance(getattr(connection, "_writer", None), asyncio.StreamWriter)
        and callable(getattr(getattr(connection, "_parser", None), "read_response", None))
    )
