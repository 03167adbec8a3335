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
    Calls *notify* for each notification on *channel*.

    It also does so when it begins to listen, and when the connection is lost: then something may be missed. The
    connection is not one of the pool any more.
    """

    def __init__(self, engine: AsyncEngine, channel: str, notify: Callable[[], None]) -> None:
        self._engine, self._channel, self._notify = engine, channel, notify
        self._driver: Any = None
        self._opening: asyncio.Task[None] | None = None
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

    def open(self) -> asyncio.Task[None]:
        """
        Begin to listen by a new connection, unless that has begun.

        The task outlives who waits for it: a relay that waits for a shorter time would never get a connection, and two
        relays would get two.
        """
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open(), name="diator: connecting to PostgreSQL")
            self._opening.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return self._opening

    async def _open(self) -> None:
        await self._close()
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
            await asyncio.shield(self._close())
            raise
        self._until = asyncio.get_running_loop().time() + _SECONDS
        self._notify()  # for what was stored before

    def _received(self, *_: object) -> None:
        self._notify()

    async def _read(self, driver: Any) -> None:
        with suppress(Exception):  # the connection is lost: `is_open` says so
            async for _ in driver.notifies():
                self._notify()
        self._notify()

    async def close(self) -> None:
        """Close the connection. `open` may be called again."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        await self._close()

    async def _close(self) -> None:
        driver, reading = self._driver, self._reading
        self._driver = self._reading = None
        self._until = 0.0
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])
        if driver is not None:
            with suppress(Exception):  # it was lost
                await driver.close()

    def forget(self) -> None:
        """Forget the connection, which belongs to an event loop that has ended."""
        self._driver = self._opening = self._reading = None
