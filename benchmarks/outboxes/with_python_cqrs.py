"""python-cqrs' outbox: its repository, and the loop of its documentation."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import cqrs
from cqrs.adapters.amqp import amqp_publisher_factory
from cqrs.message_brokers.amqp import AMQPMessageBroker
from cqrs.outbox.sqlalchemy import Base, SqlAlchemyOutboxedEventRepository
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine


@dataclass
class Joined:
    user_id: int
    greeting: str = "welcome to the meeting"


Event = cqrs.NotificationEvent[Joined]
cqrs.OutboxedEventMap.register("UserJoined", Event)


@asynccontextmanager
async def opened(database: str, broker: str) -> AsyncIterator[Any]:
    engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    yield WithPythonCqrs(async_sessionmaker(engine), AMQPMessageBroker(amqp_publisher_factory(broker), "python-cqrs"))
    await engine.dispose()


class WithPythonCqrs:
    def __init__(self, sessions: Any, broker: Any) -> None:
        self.sessions = sessions
        self.broker = broker

    async def fill(self, rows: int, keys: int) -> None:  # it knows no keys
        async with self.sessions() as session:
            repository = SqlAlchemyOutboxedEventRepository(session)
            for number in range(rows):
                event = Event(event_name="UserJoined", topic="python-cqrs", payload=Joined(user_id=number))
                repository.add(event)
            await repository.commit()

    async def relay(self, rows: int) -> None:
        while rows > 0:
            async with self.sessions() as session:
                repository = SqlAlchemyOutboxedEventRepository(session)
                producer = cqrs.EventProducer(self.broker, repository)
                events = await repository.get_many(100)
                for event in events:
                    await producer.send_message(event)
                    rows -= 1
                await repository.commit()
            await asyncio.sleep(0)
