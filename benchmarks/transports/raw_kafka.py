"""aiokafka as its documentation uses it: acks=all, idempotent, a commit after each handled batch."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from by_hand import decoded, encoded
from measuring import Finished, Handle, Settled, end, nothing

GROUP = "benchmark"


class Kafka:
    def __init__(self, servers: str, name: str) -> None:
        self._servers, self._name = servers, name

    async def __aenter__(self) -> Self:
        self._producer = AIOKafkaProducer(bootstrap_servers=self._servers, acks="all", enable_idempotence=True)
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()

    async def send(self, number: int) -> None:
        await self._producer.send_and_wait(self._name, encoded(number))

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        free = asyncio.Semaphore(concurrency)

        async def run(record: ConsumerRecord[bytes, bytes]) -> None:
            async with free:
                await handle(decoded(record.value))

        async def read() -> None:
            while True:
                batch = await consumer.getmany(timeout_ms=1000, max_records=500)
                records = [record for several in batch.values() for record in several]
                if concurrency == 1:
                    for record in records:
                        await handle(decoded(record.value))
                else:
                    await asyncio.gather(*map(run, records))
                if records:
                    await consumer.commit()
                for _ in records:
                    settled()

        consumer = AIOKafkaConsumer(
            self._name,
            bootstrap_servers=self._servers,
            group_id=GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        async with consumer, asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            yield nothing
            await end(reading)
