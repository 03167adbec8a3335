"""
The programs of the grid: one that works and raises an event for each piece of work, a relay, and a consumer.

Each is a process of its own, as ``python -m tests.grid.program ROLE SETTINGS``. It writes one line for each thing that
the grid counts, so that nothing is lost when the process is killed.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

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
from tests.grid.ledger import BeforeCommit, Fate, Settings, effects, engine_of, say, unreliably, work, work_under_keys

#: The brokers. What a dead consumer has taken comes back after the lease of Redis Streams: a minute by default.
BROKERS = {
    "streams": partial(RedisStreamMessageBroker, timeout=5.0, lease=6.0),
    "rabbitmq": partial(RabbitMQMessageBroker, timeout=5.0),
    "kafka": partial(KafkaMessageBroker, timeout=5.0),
}

_before_commit: ContextVar[BeforeCommit] = ContextVar("before_commit")


@dataclass(frozen=True, kw_only=True)
class Worked(NotificationEvent):
    message_key: ClassVar[str] = "key"
    key: str
    number: int


@dataclass(frozen=True)
class Work(Request[None]):
    key: str
    number: int


class Fallible(Wrapped):
    """A broker some of whose sends fail, before or after the message has arrived, and that may kill its process."""

    def __init__(self, broker: Any, fails: float, fate: Fate) -> None:
        super().__init__(broker)
        self._fails = fails
        self._fate = fate

    async def send_message(self, message: Message, /) -> None:
        send = partial(super().send_message, message)
        error = partial(OutcomeUnknown, message_id=message.message_id)
        await unreliably(send, self._fails, self._fate, error)


def container_of(engine: Any) -> Container:
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as opened:
            yield opened
            if (wait := _before_commit.get(None)) is not None:
                await wait()

    container = Container()
    container.register(AsyncSession, session)
    return container


def broker_of(settings: Settings, *, fate: Fate) -> Any:
    return Fallible(BROKERS[settings.service](settings.address), settings.fails, fate)


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

    async def do_one(key: str, number: int, before_commit: BeforeCommit) -> None:
        _before_commit.set(before_commit)
        try:
            await mediator.send(Work(key, number))
        except EventsNotSent as error:
            say("confirmed", key=key, number=number, unsent=type(error.__cause__).__name__)
        except Exception as error:  # noqa: BLE001  # the program goes on, and the grid reads what was committed
            say("failed", key=key, number=number, error=type(error).__name__)
        else:
            say("confirmed", key=key, number=number)

    async with broker:
        await work_under_keys(settings, do_one)
    await engine.dispose()


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
