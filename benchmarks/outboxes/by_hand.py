"""What a program writes itself: an INSERT, and a loop of SELECT … FOR UPDATE SKIP LOCKED, publish, DELETE."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import aio_pika
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

metadata = sa.MetaData()
work = sa.Table("work", metadata, sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", sa.Text))
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("message_id", sa.Uuid, nullable=False),
    sa.Column("key", sa.Text),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
)
BATCH = 100


@asynccontextmanager
async def opened(database: str, broker: str) -> AsyncIterator[Any]:
    engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    connection = await aio_pika.connect(broker)
    channel = await connection.channel()
    exchange = await channel.declare_exchange("by-hand", aio_pika.ExchangeType.DIRECT, auto_delete=True)
    queue = await channel.declare_queue("by-hand", exclusive=True)
    await queue.bind(exchange, "by-hand")
    try:
        yield ByHand(engine, exchange)
    finally:
        await connection.close()
        await engine.dispose()


class ByHand:
    def __init__(self, engine: Any, exchange: Any) -> None:
        self.sessions = async_sessionmaker(engine, expire_on_commit=False)
        self.exchange = exchange

    def row(self, key: str | None, number: int) -> dict[str, object]:
        payload = json.dumps({"event_id": str(uuid4()), "user_id": number, "greeting": "welcome to the meeting"})
        return {"message_id": uuid4(), "key": key, "name": "UserJoined", "payload": payload}

    async def fill(self, rows: int, keys: int) -> None:
        async with self.sessions.begin() as session:
            for start in range(0, rows, 1000):
                numbers = range(start, min(start + 1000, rows))
                given = [self.row(f"key-{number % keys}" if keys else None, number) for number in numbers]
                await session.execute(outbox.insert(), given)

    async def store(self, number: int) -> None:
        async with self.sessions.begin() as session:
            await session.execute(work.insert(), {"name": f"user {number}"})
            await session.execute(outbox.insert(), [self.row(f"key-{number % 8}", number)])

    async def publish(self, row: Any) -> None:
        message = aio_pika.Message(
            row.payload.encode(), message_id=str(row.message_id), delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        await self.exchange.publish(message, "by-hand")

    async def relay(self, rows: int) -> None:
        claim = sa.select(outbox).order_by(outbox.c.id).limit(BATCH).with_for_update(skip_locked=True)
        while rows > 0:
            async with self.sessions.begin() as session:
                found = (await session.execute(claim)).all()
                groups = {}
                for row in found:
                    groups.setdefault(row.key or row.id, []).append(row)
                await asyncio.gather(*map(self.publish_in_order, groups.values()))
                await session.execute(sa.delete(outbox).where(outbox.c.id.in_([row.id for row in found])))
            rows -= len(found)

    async def publish_in_order(self, group: Any) -> None:
        for row in group:
            await self.publish(row)
