"""diator's outbox, with its defaults."""

import asyncio
import resource
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker
from diator.container import Container
from diator.events import Events, NotificationEvent
from diator.mediator import Mediator
from diator.outbox import Outbox, Relay
from diator.outbox.sqlalchemy import SqlAlchemyStore
from diator.requests import Request, RequestMap

metadata = sa.MetaData()
work = sa.Table("work", metadata, sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", sa.Text))


@dataclass(frozen=True, kw_only=True)
class Keyed(NotificationEvent):
    message_key: ClassVar[str] = "key"
    message_name: ClassVar[str] = "UserJoined"
    key: str | None
    user_id: int
    greeting: str = "welcome to the meeting"


@dataclass(frozen=True)
class Work(Request[None]):
    key: str | None
    number: int
    count: int = 1


@asynccontextmanager
async def opened(database: str, broker: str) -> AsyncIterator[Any]:
    engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    store = SqlAlchemyStore(engine, metadata)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    async with RabbitMQMessageBroker(broker) as rabbit:
        async with rabbit.subscribe({Topic("notification_event", "UserJoined")}, group="benchmark"):
            pass  # from now on, the messages have a queue
        yield WithDiator(engine, store, rabbit, database)
    await engine.dispose()


class WithDiator:
    def __init__(self, engine: Any, store: Any, broker: Any, database: str) -> None:
        self.database = database
        self.store_of = store
        self.outbox = Outbox(store, to=broker)
        sessions = async_sessionmaker(engine, expire_on_commit=False)

        async def session() -> AsyncIterator[AsyncSession]:
            async with sessions.begin() as opened:
                yield opened

        container, requests = Container(), RequestMap()
        container.register(AsyncSession, session)

        @requests.handler
        async def do(request: Work, session: AsyncSession, events: Events) -> None:
            await session.execute(work.insert(), {"name": f"user {request.number}"})
            for number in range(request.number, request.number + request.count):
                key = request.key and f"{request.key}-{number % 100}" if request.count > 1 else request.key
                events.append(Keyed(key=key, user_id=number))

        self.mediator = Mediator(requests, container, message_broker=self.outbox)

    async def fill(self, rows: int, keys: int) -> None:
        for start in range(0, rows, 1000):
            await self.mediator.send(Work("key" if keys else None, start, min(1000, rows - start)))

    async def store(self, number: int) -> None:
        await self.mediator.send(Work(f"key-{number % 8}", number))

    async def relay(self, rows: int) -> None:
        enough, left = asyncio.Event(), rows

        def count(relayed: Any) -> None:
            nonlocal left
            left -= relayed.outcome == "sent"
            if not left:
                enough.set()

        relay = Relay(self.outbox, on_relayed=count)
        async with relay:
            await enough.wait()

    async def latency(self, rate: float, count: int) -> dict[str, float]:
        """Return the median time from a commit to its confirmed send, in seconds."""
        committed, took = {}, []

        def note(relayed: Any) -> None:
            took.append(perf_counter() - committed[relayed.position])

        numbers = iter(range(1, count + 1))
        connection = await asyncpg.connect(self.database)
        first = await connection.fetchval("SELECT coalesce(max(seq), 0) FROM diator_outbox")
        async with Relay(self.outbox, on_relayed=note):
            for number in numbers:
                began = perf_counter()
                await self.store(number)
                committed[first + number] = perf_counter()
                await asyncio.sleep(max(0.0, 1 / rate - (perf_counter() - began)))
            while len(took) < count:  # noqa: ASYNC110  # two lines, instead of an event
                await asyncio.sleep(0.01)
        await connection.close()
        return {"p50": statistics.median(took), "p99": sorted(took)[int(0.99 * count)]}

    async def idle(self, seconds: float) -> dict[str, float]:
        """Return how many transactions a second a relay makes that has nothing to do."""
        connection = await asyncpg.connect(self.database)
        ask = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        async with Relay(self.outbox):
            await asyncio.sleep(15)  # until it waits as long as it ever does
            before = await connection.fetchval(ask)
            await asyncio.sleep(seconds)
            after = await connection.fetchval(ask)
        await connection.close()
        return {"rate": (after - before - 1) / seconds}

    async def memory(self, rows: int) -> dict[str, list[float]]:
        """Return the memory after each tenth of *rows*, in MiB."""
        resident = []
        for _ in range(10):
            await self.fill(rows // 10, 1)
            await self.relay(rows // 10)
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return {"resident_mib": resident}
