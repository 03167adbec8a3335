from typing import Any

from faststream.redis import PubSub as Channel
from faststream.redis import RedisBroker, StreamSub
from with_faststream import GROUP, FastStream


class PubSub(FastStream):
    def broker_for(self, concurrency: int) -> RedisBroker:
        # With the default pool of 100 connections it fails at 512 concurrent calls.
        return RedisBroker(self.url, max_connections=1000, logger=None, middlewares=self.middlewares)

    async def publish(self, event: dict[str, Any]) -> None:
        await self.broker.publish(event, channel=self.name)

    def subscriber(self, broker: RedisBroker, concurrency: int) -> Any:
        return broker.subscriber(Channel(self.name), max_workers=concurrency)


class Streams(PubSub):
    async def publish(self, event: dict[str, Any]) -> None:
        await self.broker.publish(event, stream=self.name)

    def subscriber(self, broker: RedisBroker, concurrency: int) -> Any:
        # Without a limit it reads the whole stream at once.
        stream = StreamSub(self.name, group=GROUP, consumer="member", max_records=100)
        return broker.subscriber(stream=stream, max_workers=concurrency)
