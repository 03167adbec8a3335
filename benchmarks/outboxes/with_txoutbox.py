"""txoutbox, with the settings that its documentation recommends: its own tables, and deletion of what was sent."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import aio_pika
import asyncpg
from txoutbox import Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage


@asynccontextmanager
async def opened(database: str, broker: str) -> AsyncIterator[Any]:
    pool = await asyncpg.create_pool(database)
    storage = PostgresStorage(pool, table="txoutbox", delete_on_ack=True)
    await pool.execute("DROP TABLE IF EXISTS txoutbox")
    await storage.create_schema()
    connection = await aio_pika.connect(broker)
    channel = await connection.channel()
    exchange = await channel.declare_exchange("txoutbox", aio_pika.ExchangeType.DIRECT, auto_delete=True)
    queue = await channel.declare_queue("txoutbox", exclusive=True)
    await queue.bind(exchange, "txoutbox")
    try:
        yield WithTxoutbox(storage, exchange)
    finally:
        await connection.close()
        await pool.close()


class WithTxoutbox:
    def __init__(self, storage: Any, exchange: Any) -> None:
        self.storage = storage
        self.exchange = exchange

    async def fill(self, rows: int, keys: int) -> None:
        async with self.storage.pool.acquire() as connection, connection.transaction():
            for number in range(rows):
                payload = {"event_id": str(uuid4()), "user_id": number, "greeting": "welcome to the meeting"}
                key = f"key-{number % keys}" if keys else None
                await self.storage.insert(connection, "UserJoined", json.dumps(payload), key=key)

    async def relay(self, rows: int) -> None:
        enough, left = asyncio.Event(), rows

        async def publish(row: Any) -> None:
            nonlocal left
            message = aio_pika.Message(row.payload, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await self.exchange.publish(message, "txoutbox")
            left -= 1
            if not left:
                enough.set()

        relay = Relay(self.storage, publish, config=RelayConfig(batch_size=100))
        running = asyncio.create_task(relay.run())
        await enough.wait()
        relay.stop()
        await running
