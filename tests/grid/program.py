"""
The programs of the grid: one that works and raises an event for each piece of work, a relay, and a consumer.

Each is a process of its own, as ``python -m tests.grid.program ROLE SETTINGS``. It writes one line for each thing that
the grid counts, so that nothing is lost when the process is killed.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.message import Message
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.consumer import Consumer
from diator.container import Container
from diator.context import MessageContext
from diator.events import EventMap, Events, NotificationEvent
from diator.exceptions import EventsNotSent, OutcomeUnknown
from diator.mediator import Mediator
from diator.outbox import Inbox, Outbox, Relay
from diator.outbox.sqlalchemy import SqlAlchemyStore
from diator.requests import Request, RequestMap
from diator.retrying import RetryPolicy

#: The brokers. What a dead consumer has taken comes back after the lease of Redis Streams: a minute by default.
BROKERS = {
    "streams": partial(RedisStreamMessageBroker, timeout=5.0, lease=6.0),
    "rabbitmq": partial(RabbitMQMessageBroker, timeout=5.0),
    "kafka": partial(KafkaMessageBroker, timeout=5.0),
}

#: Called at the end of a unit of work, before its transaction is committed.
_before_commit: ContextVar[Callable[[], Awaitable[None]] | None] = ContextVar("before_commit", default=None)

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


@dataclass(frozen=True, kw_only=True)
class Worked(NotificationEvent):
    message_key: ClassVar[str] = "key"
    key: str
    number: int


@dataclass(frozen=True)
class Work(Request[None]):
    key: str
    number: int


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


class Fallible(Wrapped):
    """A broker some of whose sends fail, before or after the message has arrived, and that may kill its process."""

    def __init__(self, broker: Any, fails: float, fate: Fate) -> None:
        super().__init__(broker)
        self._fails = fails
        self._fate = fate

    async def send_message(self, message: Message, /) -> None:
        luck = random.random()
        if luck < self._fails / 2:
            raise OutcomeUnknown("the grid let this send fail before it began", message_id=message.message_id)
        await super().send_message(message)
        self._fate.step()
        if luck < self._fails:
            raise OutcomeUnknown("the grid let this send fail after it ended", message_id=message.message_id)


def container_of(engine: Any) -> Container:
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as opened:
            yield opened
            if (wait := _before_commit.get()) is not None:
                await wait()

    container = Container()
    container.register(AsyncSession, session)
    return container


def broker_of(settings: Settings, *, fate: Fate) -> Any:
    return Fallible(BROKERS[settings.service](settings.address), settings.fails, fate)


def engine_of(settings: Settings) -> Any:
    return create_async_engine(
        settings.database, pool_pre_ping=True, connect_args={"timeout": 5, "command_timeout": 10}
    )


async def send(settings: Settings) -> None:
    """Do work under several keys, and raise an event for each piece of it."""
    engine = engine_of(settings)
    never = Fate(None)
    broker = broker_of(settings, fate=never)
    requests = RequestMap()

    @requests.handler
    async def do(request: Work, session: AsyncSession, events: Events) -> None:
        await session.execute(work.insert(), {"key": request.key, "number": request.number})
        events.append(Worked(key=request.key, number=request.number))

    container = container_of(engine)
    mediator = Mediator(
        requests,
        container,
        message_broker=Outbox(SqlAlchemyStore(engine), to=broker) if settings.has_outbox else broker,
        middlewares=[Fate(settings.dies_at).after_the_commit],
    )

    async with broker:
        await asyncio.gather(*(work_under(f"key-{number}", mediator, settings) for number in range(settings.keys)))
    await engine.dispose()


async def work_under(key: str, mediator: Mediator, settings: Settings) -> None:
    async with asyncio.TaskGroup() as slow:
        for number in range(settings.first, settings.first + settings.count):
            if settings.lasts and number == settings.first:
                is_stored = asyncio.Event()
                slow.create_task(do_slowly(Work(key, number), mediator, is_stored, settings.lasts))
                await is_stored.wait()  # the next one has to come behind it
            else:
                await do_one(Work(key, number), mediator)
            await asyncio.sleep(settings.pause)


async def do_slowly(request: Work, mediator: Mediator, is_stored: asyncio.Event, lasts: float) -> None:
    async def stay_open() -> None:
        is_stored.set()
        await asyncio.sleep(lasts)

    _before_commit.set(stay_open)
    await do_one(request, mediator)


async def do_one(request: Work, mediator: Mediator) -> None:
    try:
        await mediator.send(request)
    except EventsNotSent as error:
        say("confirmed", key=request.key, number=request.number, unsent=type(error.__cause__).__name__)
    except Exception as error:  # noqa: BLE001  # the program goes on, and the grid reads what was committed
        say("failed", key=request.key, number=request.number, error=type(error).__name__)
    else:
        say("confirmed", key=request.key, number=request.number)


async def relay(settings: Settings) -> None:
    """Send what the outbox has."""
    engine = engine_of(settings)
    fate = Fate(settings.dies_at)
    async with broker_of(settings, fate=fate) as broker:
        await Relay(Outbox(SqlAlchemyStore(engine), to=broker), lease=12.0, batch=50).run()
    await engine.dispose()


async def consume(settings: Settings) -> None:
    """Have one effect for each message, and say which duplicates were refused."""
    engine = engine_of(settings)
    events = EventMap()

    @events.handler
    async def on_worked(event: Worked, session: AsyncSession, context: MessageContext) -> None:
        await session.execute(effects.insert(), {"key": event.key, "number": event.number})

    async with BROKERS[settings.service](settings.address) as broker:
        consumer = Consumer(
            broker,
            event_map=events,
            container=container_of(engine),
            group="grid",
            concurrency=4,
            middlewares=[Fate(settings.dies_at).after_the_commit],
            inbox=Inbox(SqlAlchemyStore(engine)) if settings.has_inbox else None,
            retry=RetryPolicy(immediate_retries=2, delayed_retries=8, first_delay=0.5, max_delay=2.0),
            on_handled=lambda handled: say("handled", outcome=handled.outcome),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(consumer.run())
            await consumer.ready()
            say("ready")
    await engine.dispose()


def main() -> None:
    role, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    Worked.message_name = settings.name  # type: ignore[attr-defined]
    if settings.ahead:
        now = time.time
        time.time = lambda: now() + settings.ahead
    with suppress(KeyboardInterrupt):
        asyncio.run({"send": send, "relay": relay, "consume": consume}[role](settings))


if __name__ == "__main__":
    main()
