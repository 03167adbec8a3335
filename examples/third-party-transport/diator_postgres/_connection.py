"""One connection to PostgreSQL that many callers share, and the send error of a statement that failed on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg

from diator.brokers.connecting import ClientConnection
from diator.brokers.supervisor import ReconnectPolicy, close_all
from diator.exceptions import BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown

# PostgreSQL rejects the values themselves: they are invalid, too long, or a constraint forbids them.
_REFUSALS = asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError


class Connection(ClientConnection[Any]):
    """
    A connection that opens at its first use, and again after it was lost. Statements run one after the other.

    A statement that has begun runs to its end, even if its caller is cancelled: so no answer is left behind for the
    next caller. Each call ends within *timeout* seconds, or by the deadline *until* in the event loop's time. If it
    fails, it raises a send error.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Any]],
        prepare: Callable[[Any], Awaitable[None]],
        *,
        timeout: float,
        reconnect: ReconnectPolicy,
    ) -> None:
        super().__init__("PostgreSQL", timeout=timeout, reconnect=reconnect)
        self._make, self._prepare = make, prepare
        self._is_over = False

    @property
    def raw(self) -> Any:
        """The connection of asyncpg; None before the first use and after a loss."""
        return self._link

    async def open(self) -> None:
        await self.run("SELECT")

    async def run(self, statement: str, *arguments: object, until: float | None = None) -> Sequence[Any]:
        loop = self._bind_to_running_loop()
        until = loop.time() + self.timeout if until is None else until
        running = loop.create_task(self._run(statement, arguments, until), name="diator: asking PostgreSQL")
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be cancelled
        return await asyncio.shield(running)

    async def _run(self, statement: str, arguments: Sequence[object], until: float) -> Sequence[Any]:
        written = answered = False
        attempts = self._attempts
        try:
            async with asyncio.timeout_at(until), self._lock:
                if self._is_over:
                    raise BrokerClosed("this broker is closed")
                if self.raw is not None and self.raw.is_closed():
                    self.abort()
                raw = await self._connected(attempts)
                try:
                    written = True
                    rows: Sequence[Any] = await raw.fetch(statement, *arguments)
                    answered = True
                except asyncpg.PostgresError as error:
                    # An ERROR was rolled back. Before a FATAL the statement may have committed.
                    answered = written and error.severity_en == "ERROR"
                    raise
                finally:
                    if not answered:
                        self.abort()
            return rows
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # TimeoutError is an OSError
            name = type(error).__name__  # its text may quote the message
            if written and not answered:
                raise OutcomeUnknown(f"PostgreSQL did not answer: {name}") from error
            if written and isinstance(error, _REFUSALS):
                raise MessageRejected(f"PostgreSQL refused the message: {name}") from error
            raise BrokerUnavailable(name) from error

    def abort(self) -> None:
        """Close the connection at once, without a goodbye."""
        raw, self._link = self._link, None
        if raw is not None:
            raw.terminate()

    async def _connect(self) -> Any:
        raw = await self._make()
        try:
            await self._prepare(raw)
        except BaseException:
            raw.terminate()
            raise
        return raw

    async def _close(self) -> None:
        await close_all(self.subscriptions)  # first, because they need this connection to end
        async with self._lock:
            self._is_over = True
            if (raw := await self._take_link()) is not None:
                raw.terminate()
