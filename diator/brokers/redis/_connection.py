"""One connection to Redis that many callers use at once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, cast
from uuid import UUID

from diator._hints import name_of
from diator._text import counted, explained
from diator.brokers.pipelining import Pipeline, PipelinedConnection
from diator.brokers.redis._client import (
    CLIENT_ERRORS,
    NO_FAULT,
    REPLIES,
    Client,
    RedisConnection,
    close_connection,
    connect_error,
    exchange,
    execute_by_itself,
    is_outdated,
    pool_size,
    release_connection,
    send_error,
    sends_by_itself,
    take_connection,
    where,
    why_not_shared,
    wire_of,
)
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import (
    AccessRefused,
    BrokerError,
    BrokerUnavailable,
    DiatorError,
    MessageRejected,
    OutcomeUnknown,
)

logger: logging.Logger = logging.getLogger(__name__)

# A connection whose server cannot execute commands now is replaced, but not before this age, in seconds.
_MIN_AGE = 1.0
# How often the role of the server is asked for while messages are sent, in seconds.
_ROLE_EVERY = 0.1
# How many connections of the client's pool are borrowed at once, where commands do not share one.
_MOST_BORROWED = 16
# How much of the timeout a command waits for replicas.
_WAIT_SHARE = 0.4


class CommandConnection(PipelinedConnection["_Connection | _Unshared"]):
    """
    One connection of a client's pool, which concurrent callers use at once.

    The commands of one turn of the event loop go out in one write, and the replies come back in that order; a lone
    command is written at once. At most *max_in_flight* commands, and about 4 MiB, wait for their replies; further ones
    queue for room, in their order. Every call ends within *timeout* seconds. A command without a reply by then raises
    `OutcomeUnknown`; if Redis has replied to nothing for half of that time, the connection is closed, and so does every
    call that waits on it. Nothing is sent twice.

    If the pool has only one connection, each command borrows it. A client that is not redis-py's own (a fake, a
    cluster, a subclass with an `execute_command` of its own) is used through its `execute_command`, for at most 16
    commands at once. Both are slower, so the log names the reason once, at INFO: the program chose its client, and
    nothing is wrong.

    With *owns_client*, `aclose` closes the client, too.
    """

    def __init__(
        self, client: Client, *, owns_client: bool, timeout: float, max_in_flight: int, reconnect: ReconnectPolicy
    ) -> None:
        super().__init__(where(client), timeout=timeout, reconnect=reconnect)
        self._client = client
        self._owns_client = owns_client
        self._max_in_flight = max_in_flight
        self._sends_by_itself = sends_by_itself(client)
        connections = pool_size(client)
        self._at_once = min(max_in_flight, connections or max_in_flight, _MOST_BORROWED)
        self._shares = True
        self._was_at_fault = False
        if self._sends_by_itself:
            self._do_not_share(f"{type(client).__name__} has an execute_command of its own")
        elif connections == 1:  # and the program needs that itself
            self._do_not_share("the client's pool has only one connection")
        self._is_replica = False
        self._ask_role_at = 0.0

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        deadline = self._bind_to_running_loop().time() + self.timeout
        link = await self._ready(deadline)
        if isinstance(link, _Unshared):
            try:
                async with asyncio.timeout_at(deadline):
                    await link.ping()
            except CLIENT_ERRORS as error:
                raise self._not_sent(error, None) from error

    async def execute(self, *command: bytes, message_id: UUID | None = None, replicas: int = 0) -> Any:
        """
        Send *command*, and return its reply, after at least so many *replicas* have what the command wrote.

        Raises:
            BrokerUnavailable: It was not sent.
            MessageRejected: Redis answered with an error.
            OutcomeUnknown: It was sent, and there is no reply, or fewer replicas have it.
            BrokerClosed: `aclose` was called before.
        """
        deadline = self._bind_to_running_loop().time() + self.timeout
        link = self._link
        if link is None or self._queued or not link.has_room:  # this saves a coroutine for each message
            link = await self._ready(deadline, message_id)
        try:
            reply = link.call(command, message_id, deadline, replicas)
        except CLIENT_ERRORS as error:
            raise self._not_sent(error, message_id) from error
        return await reply

    def is_replica(self) -> bool:
        """
        Return whether the server was a replica when it was last asked, and ask again, without waiting for the reply.

        A server that becomes a replica keeps its connections, and only writes fail there. A publish does not.
        """
        now = asyncio.get_running_loop().time()
        if now < self._ask_role_at:
            return self._is_replica
        link = self._link
        alone = self._max_in_flight == 1 and self._queued  # then the question would take the place of a command
        if not alone and isinstance(link, _Connection):
            self._ask_role_at = now + _ROLE_EVERY
            with suppress(*CLIENT_ERRORS):  # a lost connection; the next one is asked
                cast("asyncio.Future[Any]", link.call((b"ROLE",), None, now + self.timeout)).add_done_callback(
                    self._note_role
                )
        return self._is_replica

    def _note_role(self, reply: asyncio.Future[Any]) -> None:
        error = reply.exception()
        if error is None:
            self._is_replica = reply.result()[0] == b"slave"
            if self._is_replica and isinstance(self._link, _Connection):
                self._link.renew()
        elif isinstance(error, (AccessRefused, MessageRejected)):
            self._ask_role_at = math.inf
            logger.info(
                "senders cannot notice that Redis becomes a replica, since it refuses ROLE: %s",
                error,
                extra={**self.log_fields, "error_type": name_of(type(error))},
            )

    async def _close(self) -> None:
        await super()._close()
        if self._owns_client:
            await self._client.aclose()

    async def _connect(self) -> _Connection | _Unshared:
        if self._shares:
            connection = await take_connection(self._client)
            reason = why_not_shared(connection)
            if reason is None:
                close = partial(close_connection, self._client, connection)
                return _Connection(connection, close, self.retire, self.timeout, self._max_in_flight)
            await release_connection(self._client, connection)
            self._do_not_share(reason)
        link = _Unshared(
            self._client,
            self._drop_unshared,
            by_itself=self._sends_by_itself,
            at_once=self._at_once,
            timeout=self.timeout,
        )
        if self._was_at_fault:  # else the first command finds out: a fake may know no PING
            await link.ping()
        return link

    def _not_sent(self, error: Exception, message_id: UUID | None) -> DiatorError:
        if isinstance(error, asyncio.TimeoutError) and self._link is None:
            error = TimeoutError(self._no_connection())
        return connect_error(error, self._client, message_id, within=self.timeout)

    def _do_not_share(self, reason: str) -> None:
        self._shares = False
        fields = {**self.log_fields, "reason": reason}
        logger.info("commands to Redis do not share one connection, which is slower: %s", reason, extra=fields)

    def retire(self, link: _Connection | _Unshared) -> None:
        """See `PipelinedConnection.retire`."""
        if link is self._link and isinstance(link, _Connection) and not link.is_lost:
            self._backoff.reset()
        super().retire(link)

    def _drop_unshared(self, link: _Unshared) -> None:
        self._was_at_fault = True
        if self._link is link:
            self._link = None


class _Unshared:
    """
    Stands for the connection where commands do not share one: each borrows one of the client's pool, at most *at_once*.

    With *by_itself*, each goes through the client's `execute_command`. After a fault of a connection, *drop* is called,
    so that further commands wait until one attempt to connect has succeeded.
    """

    def __init__(
        self,
        client: Client,
        drop: Callable[[_Unshared], None],
        *,
        by_itself: bool,
        at_once: int,
        timeout: float,
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._drop = drop
        self._by_itself = by_itself
        self._at_once = at_once
        self._running: set[asyncio.Task[Any]] = set()
        self._room = asyncio.Event()

    @property
    def has_room(self) -> bool:
        return len(self._running) < self._at_once

    async def room(self) -> None:
        """Wait until a command has ended."""
        self._room.clear()
        await self._room.wait()

    async def ping(self) -> None:
        """Prove that Redis answers, if only with an error."""
        with suppress(*NO_FAULT):
            async with self._borrowed() as send:
                await send(b"PING")

    def call(
        self, command: Sequence[bytes], message_id: UUID | None, deadline: float, replicas: int
    ) -> asyncio.Future[Any]:
        """Send *command*."""
        executing = self._execute(command, message_id, deadline, replicas)
        task = asyncio.create_task(executing, name="diator: asking Redis")
        self._running.add(task)
        task.add_done_callback(self._end)
        return task

    async def finish(self) -> None:
        """Wait for the replies that are due."""
        while self._running:
            await self.room()

    async def close(self) -> None:
        """Do nothing: the client keeps its connections."""

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._room.set()
        if not task.cancelled():
            task.exception()  # its caller may be gone

    async def _execute(self, command: Sequence[bytes], message_id: UUID | None, deadline: float, replicas: int) -> Any:
        written = False
        try:
            async with asyncio.timeout_at(deadline), self._borrowed() as send:
                written = True  # diator cannot see when a client writes that sends by itself
                reply = await send(*command)
                if replicas:
                    await _replicated(send(*_wait(replicas, self._timeout)), message_id, replicas)
                return reply
        except CLIENT_ERRORS as error:
            if not isinstance(error, NO_FAULT):
                self._drop(self)
            if not written:
                raise connect_error(error, self._client, message_id, within=self._timeout) from error
            raise send_error(error, message_id, written=True) from error

    @asynccontextmanager
    async def _borrowed(self) -> AsyncGenerator[Callable[..., Awaitable[Any]], None]:
        if self._by_itself:
            yield partial(execute_by_itself, self._client)
            return
        connection = await take_connection(self._client)
        try:
            yield partial(exchange, connection)
        except BaseException:
            await close_connection(self._client, connection)
            raise
        await release_connection(self._client, connection)


class _Connection(Pipeline[int]):
    """One connection: the commands that wait to be written, and the callers that wait for a reply."""

    def __init__(
        self,
        connection: RedisConnection,
        close: Callable[[], Awaitable[None]],
        retire: Callable[[_Connection], None],
        timeout: float,
        max_in_flight: int,
    ) -> None:
        super().__init__(retire, silence=timeout / 2, max_in_flight=max_in_flight)
        self._connection = connection
        self._close = close
        self._timeout = timeout
        self._unwritten: list[bytes] = []
        self._commands = self._replies = 0
        self._may_retire_at = self._loop.time() + _MIN_AGE
        self._wait: asyncio.Task[int] | None = None  # a WAIT that is not written yet
        self._last_wait: asyncio.Task[int] | None = None
        self._write, self._read, self._abort = wire_of(connection)
        self._reader = self._loop.create_task(self._read_replies(), name="diator: replies from Redis")

    def call(
        self, command: Sequence[bytes], message_id: UUID | None, deadline: float, replicas: int = 0
    ) -> Awaitable[Any]:
        """Write *command*: at once if no reply is due, else together with the others of this turn of the loop."""
        packed = _pack(command)
        if self.in_flight:
            if not self._unwritten:
                self._loop.call_soon(self._flush)
            self._unwritten.append(packed)
        else:
            self._write(packed)
        self._commands += 1
        reply = self.expect(self._commands, message_id, len(packed), deadline)
        if not replicas:
            return reply
        return self._reply_when_replicated(reply, message_id, replicas, self._wait_once(replicas, deadline))

    def _wait_once(self, replicas: int, deadline: float) -> asyncio.Task[int]:
        """
        Write one WAIT for all commands until then, which covers every earlier write of the connection.

        It is written in the next turn of the loop, or after the reply to the last one: Redis executes nothing else
        while it waits, so several of them would add up.
        """
        if self._wait is None:
            asking = self._ask_replicas(replicas, deadline, self._last_wait)
            self._wait = self._last_wait = self._loop.create_task(asking, name="diator: asking replicas")
            self._wait.add_done_callback(lambda wait: wait.cancelled() or wait.exception())  # callers may be gone
        return self._wait

    async def _ask_replicas(self, replicas: int, deadline: float, last: asyncio.Task[int] | None) -> int:
        if last is not None:
            await asyncio.wait([last])
        self._wait = None
        if self.is_lost:
            raise ConnectionError("the connection is lost")
        count: int = await self.call(_wait(replicas, self._timeout), None, deadline)
        return count

    async def _reply_when_replicated(
        self, reply: Awaitable[Any], message_id: UUID | None, replicas: int, wait: asyncio.Task[int]
    ) -> Any:
        result = await reply
        await _replicated(asyncio.shield(wait), message_id, replicas)
        return result

    def renew(self) -> None:
        """Let another connection take over, unless this one has just been made."""
        if self._loop.time() >= self._may_retire_at:
            self._retire(self)

    async def close(self) -> None:
        """See `Pipeline.close`."""
        self._reader.cancel()
        await asyncio.wait([self._reader])
        try:
            await self._close()
        except CLIENT_ERRORS as error:
            logger.debug("returning a connection to the pool of the Redis client failed: %r", error)

    def _flush(self) -> None:
        if self._unwritten:
            try:
                self._write(b"".join(self._unwritten))
                self._unwritten.clear()
            except CLIENT_ERRORS as error:
                self.lose(send_error(error, None, written=True))

    def check_deadlines(self) -> None:
        """See `Pipeline.check_deadlines`."""
        super().check_deadlines()
        if is_outdated(self._connection):
            self._retire(self)

    async def _read_replies(self) -> None:
        try:
            while True:
                try:
                    reply = await self._read(disable_decoding=True)
                except REPLIES as error:
                    reply = error
                self._settle(reply)
        except CLIENT_ERRORS as error:
            self.lose(send_error(error, None, written=True))
        finally:
            self.lose(OutcomeUnknown("the connection was closed; it may have arrived"))  # whoever has cancelled this

    def _settle(self, reply: Any) -> None:
        self._replies += 1
        if not isinstance(reply, Exception):
            self.answered(self._replies, reply)
            return
        call = self.in_flight.get(self._replies)
        error = send_error(reply, None if call is None else call.message_id, written=True)
        if isinstance(error, (BrokerUnavailable, AccessRefused)):
            self.renew()  # the address may lead to another server by now, such as the new primary
        self.answered(self._replies, error=error)

    def lose(self, error: BrokerError) -> None:
        """See `Pipeline.lose`. A command that was written may have arrived; one that was not has not."""
        for call in [*self.in_flight.values()][len(self.in_flight) - len(self._unwritten) :]:
            call.fail(BrokerUnavailable("the connection to Redis was lost before it was sent"))
        self._unwritten.clear()
        self._abort()  # the peer may take nothing any more
        super().lose(error)


def _wait(replicas: int, timeout: float) -> tuple[bytes, ...]:
    """Return WAIT, for less than half of *timeout*: a command may have to wait for an earlier WAIT and for its own."""
    return b"WAIT", b"%d" % replicas, b"%d" % (timeout * _WAIT_SHARE * 1000)


async def _replicated(wait: Awaitable[int], message_id: UUID | None, replicas: int) -> None:
    """Raise OutcomeUnknown unless *wait*, the reply to WAIT, says that so many *replicas* have the message."""
    try:
        count = await wait
    except (*CLIENT_ERRORS, DiatorError) as error:
        problem = f"Redis has it, and did not say how many replicas have it ({explained(error)})"
        raise OutcomeUnknown(problem, message_id=message_id) from error
    if count < replicas:
        of_all = counted(replicas, "replica")
        problem = f"Redis has it, but only {count} of {of_all} confirmed it in time; a failover may lose it"
        raise OutcomeUnknown(problem, message_id=message_id)


def _pack(command: Sequence[bytes]) -> bytes:
    """Encode a command (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""
    return b"*%d\r\n" % len(command) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in command])
