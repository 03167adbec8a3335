"""diator on every transport: an emitter sends, and a consumer runs the handlers of an event map."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Self

from measuring import GREETING, NICKNAME, Finished, Handle, Settled

from diator.consumer import Consumer
from diator.events import EventEmitter, EventHandler, EventMap, NotificationEvent
from diator.instruments import Instrument


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    number: int
    sent_at: float
    nickname: str
    greeting: str


class Diator:
    group: str | None = "benchmark"
    instrument: Instrument | None = None

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.broker = self.broker_for(url, name)
        self._emitter = EventEmitter(EventMap(), message_broker=self.broker, instrument=self.instrument)

    async def __aenter__(self) -> Self:
        await self.broker.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.aclose()

    async def send(self, number: int) -> None:
        event = UserJoined(number=number, sent_at=perf_counter(), nickname=NICKNAME, greeting=GREETING)
        await self._emitter.emit(event)

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        class OnUserJoined(EventHandler[UserJoined]):
            async def handle(self, event: UserJoined) -> None:
                await handle(event)
                settled()

        async def finished() -> None:
            consumer.stop()
            await running

        events = EventMap()
        events.bind(UserJoined, OnUserJoined)
        consumer = Consumer(
            self.broker, event_map=events, group=self.group, concurrency=concurrency, instrument=self.instrument
        )
        running = asyncio.create_task(consumer.run())
        await consumer.ready()
        yield finished
        await finished()
