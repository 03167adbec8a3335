"""What the tests of the relay share: a store on virtual time, which may fail, and a broker that does as it is told."""

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

from diator.brokers import Message
from diator.outbox import Outbox, Relay
from diator.outbox.memory import MemoryStore

MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)


async def until(holds):
    """Wait until a condition is true, however long that takes on virtual time."""
    while not holds():  # noqa: ASYNC110  # nobody sets an event for it
        await asyncio.sleep(0.001)


def now():
    return asyncio.get_running_loop().time()


class Store(MemoryStore):
    """A store whose calls take *takes* seconds, and fail while *failing* says so. It notes when they begin and end."""

    def __init__(self, takes=0.0):
        super().__init__(clock=lambda: MIDNIGHT + timedelta(seconds=now()))
        self.takes = takes
        self.calls = []
        self.failing = {}

    async def note(self, call, *details):
        self.calls.append((f"{call} begins", now(), *details))
        await asyncio.sleep(self.takes)
        if call in self.failing:
            raise self.failing[call]
        self.calls.append((call, now(), *details))

    def times(self, call):
        return [each[1] for each in self.calls if each[0] == call]

    async def check(self):
        await self.note("check")

    async def claim(self, **options):
        await self.note("claim", options["limit"])
        return await super().claim(**options)

    async def finish(self, lease, /, **results):
        await self.note("finish", {name: len(each) for name, each in results.items()})
        return await super().finish(lease, **results)

    async def close(self):
        await self.note("close")
        await super().close()

    async def fill(self, *rows, due=None):
        """Store messages: numbers, or pairs of a number and a key."""
        messages = [message(*(row if isinstance(row, tuple) else (row, None))) for row in rows]
        async with self.begin() as session:
            await self.add(messages, [due] * len(messages), session)

    async def has_dead(self, count):
        """Wait until so many messages are dead."""
        while True:
            if (await self.status()).dead >= count:
                return
            await asyncio.sleep(0.01)

    async def is_settled(self, on_dead):
        """Wait until no message is left but the dead ones, and those that wait behind them if *on_dead* says so."""
        while True:
            status = await self.status()
            if status.pending + status.scheduled == (status.blocked if on_dead == "block" else 0):
                return
            await asyncio.sleep(0.01)

    async def is_empty(self):
        """Wait until no message is left."""
        while True:
            status = await self.status()
            if not status.pending + status.scheduled + status.dead:
                return
            await asyncio.sleep(0.01)


def message(number, key=None):
    payload = {"secret": "of-the-payload"}
    return Message.create(message_name="Counted", payload=payload, message_id=UUID(int=number), key=key)


class Broker:
    """
    A broker whose sends take *takes* seconds. *fails* returns the error of a message, or None.

    It notes what it is asked to send (`tried`), and what it has sent, with the time; and what it was asked to send
    while a message with the same key was being sent (`beside`).
    """

    timeout = 10.0

    def __init__(self, fails=lambda number, attempt: None, takes=0.001):
        self.fails = fails
        self.takes = takes
        self.tried = []
        self.sent = []
        self.messages = []
        self.sending = set()
        self.most_at_once = 0
        self.beside = []

    async def send_message(self, message, /):
        number = message.message_id.int
        self.tried.append((now(), number))
        key = message.key or number
        if key in self.sending:
            self.beside.append(number)
        self.sending.add(key)
        self.most_at_once = max(self.most_at_once, len(self.sending))
        try:
            await asyncio.sleep(self.takes)
            if error := self.fails(number, sum(each == number for _, each in self.tried)):
                raise error
            self.sent.append((now(), number))
            self.messages.append(message)
        finally:
            self.sending.discard(key)

    @property
    def numbers(self):
        return [number for _, number in self.sent]

    async def has_sent(self, count):
        await until(lambda: len(self.sent) >= count)


@asynccontextmanager
async def relaying(store, broker, **options):
    async with Relay(Outbox(store, broker), **options) as relay:
        yield relay
