"""One connection to PostgreSQL, and what became of a statement on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg

from diator.brokers.connecting import ClientConnection
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown

_REFUSALS = asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError
"""What PostgreSQL says about the values themselves: wrong, forbidden by a constraint, too long."""


class Link(ClientConnection):
    """
    One connection, made when it is first used and again after it was lost. Statements run one after the other.

    What was begun is finished, whoever waits for it: a cancelled call leaves no answer behind for the next one. Each
    call ends within *timeout* seconds, or at the time *until* of the event loop's clock, with a verdict.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Any]], prepare: Callable[[Any], Awaitable[None]], *, timeout: float
    ) -> None:
        super().__init__()
        self._connect, self._prepare, self.timeout = connect, prepare, timeout
        self.connection: Any = None
        self._is_over = False

    async def open(self) -> None:
        await self.run("SELECT")

    async def run(self, statement: str, *arguments: object, until: float | None = None) -> Sequence[Any]:
        loop = self._bind_to_running_loop()
        until = loop.time() + self.timeout if until is None else until
        running = loop.create_task(self._run(statement, arguments, until), name="diator: asking PostgreSQL")
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        return await asyncio.shield(running)

    async def _run(self, statement: str, arguments: Sequence[object], until: float) -> Sequence[Any]:
        written = answered = False
        try:
            async with asyncio.timeout_at(until), self._lock:
                if self._is_over:
                    raise BrokerClosed("this broker is closed")
                try:
                    if self.connection is None or self.connection.is_closed():
                        self.connection = await self._connect()
                        await self._prepare(self.connection)
                    written = True
                    rows: Sequence[Any] = await self.connection.fetch(statement, *arguments)
                    answered = True
                except asyncpg.PostgresError as error:
                    # An ERROR was rolled back; before a FATAL it may have committed.
                    answered = written and error.severity_en == "ERROR"
                    raise
                finally:
                    if not answered:
                        self.break_off()
            return rows
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # TimeoutError is an OSError
            what = type(error).__name__  # its text may quote the message
            if written and not answered:
                raise OutcomeUnknown(f"no answer: {what}") from error
            if written and isinstance(error, _REFUSALS):
                raise MessageRejected(f"PostgreSQL refuses it: {what}") from error
            raise BrokerUnavailable(what) from error

    def break_off(self) -> None:
        """End the connection without a word."""
        if self.connection is not None:
            self.connection.terminate()
            self.connection = None

    def _reset(self) -> None:
        self.connection = None

    async def _close(self) -> None:
        await close_all(self.subscriptions)  # with the help of this
        async with self._lock:
            self._is_over = True
            self.break_off()
