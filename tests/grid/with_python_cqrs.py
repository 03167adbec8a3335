"""The programs of the grid with python-cqrs: its outbox, the loop of its readme, and its consumer."""

import asyncio
import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import cqrs
from cqrs.adapters.amqp import amqp_consumer_factory, amqp_publisher_factory
from cqrs.message_brokers.amqp import AMQPMessageBroker
from cqrs.outbox.sqlalchemy import Base
from sqlalchemy.ext.asyncio import async_sessionmaker

from tests.grid.ledger import BeforeCommit, Fate, Settings, effects, engine_of, say, unreliably, work, work_under_keys


@dataclass
class Piece:
    key: str
    number: int


Worked = cqrs.NotificationEvent[Piece]
cqrs.OutboxedEventMap.register("Worked", Worked)


async def send(settings: Settings) -> None:
    engine, fate = engine_of(settings), Fate(settings.dies_at)
    sessions = async_sessionmaker(engine)

    async def do(key: str, number: int, before_commit: BeforeCommit) -> None:
        try:
            async with sessions() as session:
                await session.execute(work.insert(), {"key": key, "number": number})
                outbox = cqrs.SqlAlchemyOutboxedEventRepository(session)
                outbox.add(Worked(event_name="Worked", topic=settings.name, payload=Piece(key=key, number=number)))
                await session.flush()
                await before_commit()
                await outbox.commit()
        except Exception as error:  # noqa: BLE001  # the program goes on, and the grid reads what was committed
            say("failed", key=key, number=number, error=type(error).__name__)
            return
        fate.step()
        say("confirmed", key=key, number=number)

    await work_under_keys(settings, do)
    await engine.dispose()


class Fallible(AMQPMessageBroker):
    def __init__(self, settings: Settings) -> None:
        super().__init__(amqp_publisher_factory(settings.address), exchange_name="grid")
        self._fails, self._fate = settings.fails, Fate(settings.dies_at)

    async def send_message(self, message: Any) -> None:
        await unreliably(partial(super().send_message, message), self._fails, self._fate)


async def relay(settings: Settings) -> None:
    async with async_sessionmaker(engine_of(settings))() as session:
        producer = cqrs.EventProducer(Fallible(settings), cqrs.SqlAlchemyOutboxedEventRepository(session))
        async for messages in producer.event_batch_generator():
            for message in messages:
                await producer.send_message(message)
            await producer.repository.commit()
            await asyncio.sleep(10)  # as in its readme


async def consume(settings: Settings) -> None:
    engine, fate = engine_of(settings), Fate(settings.dies_at)
    async with engine.begin() as connection:  # before the other processes start
        await connection.run_sync(Base.metadata.create_all)

    async def on_message(message: Any) -> None:
        piece = json.loads(message.body)["payload"]
        async with engine.begin() as connection:
            await connection.execute(effects.insert(), piece)
        fate.step()
        await message.ack()
        say("handled", outcome="handled")

    say("ready")
    await amqp_consumer_factory(settings.address).consume(on_message, settings.name)


if __name__ == "__main__":
    roles = {"send": send, "relay": relay, "consume": consume}
    asyncio.run(roles[sys.argv[1]](Settings(**json.loads(sys.argv[2]))))
