"""A connection to PostgreSQL that listens for stored messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from diator.outbox.sqlalchemy._sessions import connected

#: A connection that was lost without a sign, as behind a gateway that drops idle ones, is replaced after this time.
_SECONDS = 300.0


class Listener:
    """
    Calls *notify* for each notification on *channel*, and when the connection is lost: then something may be missed.

    The connection is not one of the pool any more.
    """

    def __init__(self, engine: AsyncEngine, channel: str, notify: Callable[[], None]) -> None:
        self._engine, self._channel, self._notify = engine, channel, notify
        self._driver: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it listens, as far as it knows."""
        if self._driver is None or asyncio.get_running_loop().time() > self._until:
            return False
        if self._reading is None:
            return not self._driver.is_closed()
        return not self._reading.done()

    async def open(self) -> None:
        """Listen, by a new connection."""
        await self.close()
        connection = await connected(self._engine.raw_connection())
        driver: Any = connection.driver_connection
        self._driver = driver
        connection.detach()
        try:
            if self._engine.dialect.driver == "asyncpg":
                await driver.add_listener(self._channel, self._received)
                driver.add_termination_listener(self._received)
            else:
                await driver.set_autocommit(True)
                await driver.execute(f'LISTEN "{self._channel}"')
                self._reading = asyncio.create_task(self._read(driver), name="diator: listening to PostgreSQL")
        except BaseException:
            await asyncio.shield(self.close())
            raise
        self._until = asyncio.get_running_loop().time() + _SECONDS

    def _received(self, *_: object) -> None:
        self._notify()

    async def _read(self, driver: Any) -> None:
        with suppress(Exception):  # the connection is lost: `is_open` says so
            async for _ in driver.notifies():
                self._notify()
        self._notify()

    async def close(self) -> None:
        """Close the connection. `open` may be called again."""
        driver, reading = self._driver, self._reading
        self.forget()
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])
        if driver is not None:
            with suppress(Exception):  # it was lost
                await driver.close()

    def forget(self) -> None:
        """Forget the connection, which belongs to an event loop that has ended."""
        self._driver = self._reading = None
