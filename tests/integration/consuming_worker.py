"""
A consumer in a process of its own: `consuming_worker.py ADDRESS PREFIX LEDGER SECONDS`.

ADDRESS is `redis://…`, or `redis-streams://…`. Each handler writes into the file LEDGER when it begins, takes SECONDS,
and writes when it ends; gaps are written too. A line is one write, so that what was written survives the process.
"""

import asyncio
import logging
import os
import sys
from dataclasses import dataclass

from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


async def consume(address: str, prefix: str, ledger: int, seconds: float) -> None:
    def write(*words: object) -> None:
        os.write(ledger, (" ".join(map(str, words)) + "\n").encode())

    async def handle(event: Counted) -> None:
        write("begin", event.number)
        await asyncio.sleep(seconds)
        write("end", event.number)

    event_map = EventMap()
    event_map.bind(Counted, handle)
    streams = address.startswith("redis-streams")
    url = address.replace("redis-streams", "redis") + f"?client_name={prefix}"
    broker = (
        RedisStreamMessageBroker.from_url(url, prefix, lease=1) if streams else RedisMessageBroker.from_url(url, prefix)
    )
    async with broker:
        consumer = Consumer(
            broker,
            event_map=event_map,
            concurrency=16,
            on_gap=lambda gap: write("gap", gap.since.timestamp(), gap.until.timestamp()),
        )
        await consumer.run()


logging.basicConfig(level=logging.WARNING)
asyncio.run(consume(sys.argv[1], sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND), float(sys.argv[4])))
