"""One connection to PostgreSQL, and what became of a statement on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import asyncpg

from diator.exceptions import BrokerClosed, BrokerError, BrokerUnavailable, MessageRejected, OutcomeUnknown

_REFUSALS = {"22", "23", "54"}
"""The classes of what PostgreSQL says about the values themselves: wrong, forbidden by a constraint, too long."""

Prepare: TypeAlias = Callable[[Any], Awaitable[None]]


class Link:
    """
    One connection, made when it is first used and again after it was lost. Statements run one after the other.

    What was begun is finished, whoever waits for it: a cancelled call leaves no answer behind for the next one. Each
    call ends within *timeout* seconds, or at the time *until* of the event loop's clock, with a verdict.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]], *preparations: Prepare, timeout: float) -> None:
        self._connect, self._timeout = connect, timeout
        self._prepared = dict.fromkeys(preparations, False)
        self._connection: Any = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def run(self, statement: str, *arguments: object, until: float | None = None) -> Sequence[Any]:
        return await asyncio.shield(self.begin(statement, *arguments, until=until))

    def begin(self, statement: str, *arguments: object, until: float | None = None) -> asyncio.Task[Sequence[Any]]:
        """Run *statement*, whether or not somebody waits for it."""
        if until is None:
            until = asyncio.get_running_loop().time() + self._timeout
        running = asyncio.create_task(self._run(statement, arguments, until), name="diator: asking PostgreSQL")
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # it need not be retrieved
        return running

    async def _run(self, statement: str, arguments: Sequence[object], until: float) -> Sequence[Any]:
        written = answered = False
        try:
            async with asyncio.timeout_at(until), self._one_at_a_time:
                if self._closed:
                    raise BrokerClosed("this broker is closed")
                try:
                    if self._connection is None or self._connection.is_closed():
                        self._connection = await self._connect()
                        self._prepared = dict.fromkeys(self._prepared, False)
                    for prepare in [each for each, is_done in self._prepared.items() if not is_done]:
                        await prepare(self._connection)
                        self._prepared[prepare] = True
                    written = True
                    rows: Sequence[Any] = await self._connection.fetch(statement, *arguments)
                    answered = True
                except asyncpg.PostgresError as error:
                    answered = error.severity_en == "ERROR"  # and rolled back; before a FATAL it may have committed
                    raise
                finally:
                    if not answered:
                        self.break_off()
            return rows
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # TimeoutError is an OSError
            raise _verdict(error, written=written, answered=answered) from error

    def prepare_by(self, prepare: Prepare) -> None:
        """Have *prepare* called for each connection, this one and those to come, before it is used again."""
        self._prepared.setdefault(prepare, False)

    def forget(self, prepare: Prepare) -> None:
        self._prepared.pop(prepare, None)

    def break_off(self) -> None:
        """End the connection without a word."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        """Wait for what is running, and end the connection. What comes later is refused."""
        async with self._one_at_a_time:
            self._closed = True
            self.break_off()


def _verdict(error: Exception, *, written: bool, answered: bool) -> BrokerError:
    """Say it without the text of *error*, which may quote the message."""
    state = getattr(error, "sqlstate", None) or ""
    if written and not answered:
        return OutcomeUnknown(f"no answer: {type(error).__name__}")
    if written and state[:2] in _REFUSALS:
        return MessageRejected(f"PostgreSQL refuses it: {type(error).__name__}")
    return BrokerUnavailable(f"{type(error).__name__} {state}".rstrip())
