"""
What the programs of the grid have in common: their settings, their tables, and what they say.

The programs with other libraries import it in environments without diator.
"""

import asyncio
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

#: Called when a piece of work and its event are stored, before the commit.
BeforeCommit: TypeAlias = Callable[[], Awaitable[None]]
#: Does a piece of work, by its key and number.
Do: TypeAlias = Callable[[str, int, BeforeCommit], Coroutine[Any, Any, object]]

metadata = sa.MetaData()
#: What the program has done, each piece with its key and its place in the order of the key.
work = sa.Table(
    "work",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
)
#: What the consumer has done: one row for each time that a handler succeeded.
effects = sa.Table(
    "effects",
    metadata,
    sa.Column("place", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    What a process of the grid needs to know.

    Attributes:
        service, address: The message broker, and its address for this process.
        database: The address of the database.
        name: The wire name of the events, which no other cell uses.
        has_outbox, has_inbox: Whether there is one.
        first: The number of the first piece of work of each key.
        keys, count: How many keys there are, and how many pieces of work each of them has.
        pause: How long the sender waits between two pieces of work of a key, in seconds.
        dies_at: Which of its steps the process does not survive: a sender and a consumer die after the commit of a
            transaction, a relay dies after a send.
        fails: What share of the sends fails, one half of them after the message has arrived.
        ahead: By how many seconds the clock of the process is ahead.
        lasts: How long the first transaction of each key stays open after its event was stored, in seconds.
    """

    service: str
    address: str
    database: str
    name: str
    has_outbox: bool
    has_inbox: bool
    first: int = 0
    keys: int = 8
    count: int = 40
    pause: float = 0.1
    dies_at: int | None = None
    fails: float = 0.0
    ahead: float = 0.0
    lasts: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def say(word: str, **facts: object) -> None:
    """Write one line, at once: the process may be killed next."""
    os.write(1, f"{json.dumps({'what': word, **facts})}\n".encode())


class Fate:
    """Kills the process at one of its steps, as `kill -9` would."""

    def __init__(self, dies_at: int | None) -> None:
        self._left = dies_at

    def step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                say("died")
                os.kill(os.getpid(), signal.SIGKILL)

    async def after_the_commit(self, message: Any, handle: Any, /) -> Any:
        """Surround a unit of work, as a middleware: its transaction was committed inside."""
        result = await handle(message)
        self.step()
        return result


async def unreliably(
    send: Callable[[], Awaitable[object]], fails: float, fate: Fate, error: Callable[[str], Exception] = ConnectionError
) -> None:
    """Call *send*, or let it fail, before or after the message has arrived; the process may not survive it."""
    luck = random.random()
    if luck < fails / 2:
        raise error("the grid let this send fail before it began")
    await send()
    fate.step()
    if luck < fails:
        raise error("the grid let this send fail after it ended")


async def work_under_keys(settings: Settings, do: Do) -> None:
    """Do the work of a sender."""
    await asyncio.gather(*(_work_under(f"key-{number}", settings, do) for number in range(settings.keys)))


async def _work_under(key: str, settings: Settings, do: Do) -> None:
    async with asyncio.TaskGroup() as slow:
        for number in range(settings.first, settings.first + settings.count):
            if settings.lasts and number == settings.first:
                is_stored = asyncio.Event()
                slow.create_task(do(key, number, partial(_stay_open, is_stored, settings.lasts)))
                await is_stored.wait()  # the next one has to come behind it
            else:
                await do(key, number, _at_once)
            await asyncio.sleep(settings.pause)


async def _stay_open(is_stored: asyncio.Event, lasts: float) -> None:
    is_stored.set()
    await asyncio.sleep(lasts)


async def _at_once() -> None: ...


def engine_of(settings: Settings) -> Any:
    return create_async_engine(
        settings.database, pool_pre_ping=True, connect_args={"timeout": 5, "command_timeout": 10}
    )
