"""
A consumer in a separate process: `consuming_worker.py ADDRESS PREFIX LEDGER SECONDS [careless]`.

ADDRESS is as in `transports.py`. Each handler writes a line into the file LEDGER when it starts, takes SECONDS, and
writes a line when it finishes. Gaps are written too. Each line is one write, so that it survives the death of the
process. With `careless`, the consumer acknowledges each delivery before handling it.
"""

import asyncio
import logging
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time

from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from tests.integration.transports import broker_for


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


class Careless:
    """A broker that acknowledges each delivery before the consumer receives it, like auto-commit or no-ack."""

    def __init__(self, broker):
        self.broker = broker
        self.capabilities = broker.capabilities
        self.send_message = broker.send_message

    @asynccontextmanager
    async def subscribe(self, topics, /, **options):
        async with self.broker.subscribe(topics, **options) as deliveries:
            yield self.acknowledged(deliveries)

    @staticmethod
    async def acknowledged(deliveries):
        async for delivery in deliveries:
            await delivery.ack()
            yield delivery


async def consume(address: str, prefix: str, ledger: int, seconds: float, *, careless: bool) -> None:
    def write(*words: object) -> None:
        os.write(ledger, (" ".join(map(str, words)) + "\n").encode())

    async def handle(event: Counted) -> None:
        write("begin", event.number, time())
        await asyncio.sleep(seconds)
        write("end", event.number, time())

    event_map = EventMap()
    event_map.bind(Counted, handle)
    async with broker_for(address, prefix) as broker:
        consumer = Consumer(
            Careless(broker) if careless else broker,
            event_map=event_map,
            concurrency=16,
            on_gap=lambda gap: write("gap", gap.since.timestamp(), gap.until.timestamp()),
        )
        await consumer.run()


logging.basicConfig(level=logging.WARNING)
_, address, prefix, ledger, seconds, *more = sys.argv
file = os.open(ledger, os.O_WRONLY | os.O_APPEND)
asyncio.run(consume(address, prefix, file, float(seconds), careless=more == ["careless"]))
