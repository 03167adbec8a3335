"""FastStream on every transport. It publishes a dictionary and handles a pydantic model."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Self
from uuid import UUID, uuid4

from measuring import GREETING, NICKNAME, Finished, Handle, Settled, nothing
from pydantic import BaseModel

GROUP = "benchmark"


class UserJoined(BaseModel):
    event_id: UUID
    event_timestamp: datetime
    number: int
    sent_at: float
    nickname: str
    greeting: str


class FastStream:
    middlewares: Sequence[Any] = ()

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.broker = self.broker_for(1)

    async def __aenter__(self) -> Self:
        await self.broker.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.stop()

    async def send(self, number: int) -> None:
        event = {
            "event_id": uuid4(),
            "event_timestamp": datetime.now(UTC),
            "number": number,
            "sent_at": perf_counter(),
            "nickname": NICKNAME,
            "greeting": GREETING,
        }
        await self.publish(event)

    @asynccontextmanager
    async def consuming(self, handle: Handle, settled: Settled, concurrency: int) -> AsyncGenerator[Finished, None]:
        broker = self.broker_for(concurrency)

        @self.subscriber(broker, concurrency)
        async def on_user_joined(event: UserJoined) -> None:
            await handle(event)
            settled()  # it acknowledges afterwards, so its clock stops a little early

        await broker.start()
        yield nothing
        await asyncio.sleep(0.2)  # until the last acknowledgement is sent
        await broker.stop()
