from typing import Any, Self

from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from with_faststream import FastStream


class RabbitMQ(FastStream):
    def broker_for(self, concurrency: int) -> RabbitBroker:
        # The prefetch limit is its only limit of concurrency.
        channel = Channel(prefetch_count=concurrency, on_return_raises=True)
        return RabbitBroker(self.url, default_channel=channel, logger=None)

    @property
    def queue(self) -> RabbitQueue:
        return RabbitQueue(self.name, queue_type=QueueType.QUORUM, durable=True)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.broker.declare_queue(self.queue)
        return self

    async def publish(self, event: dict[str, Any]) -> None:
        await self.broker.publish(event, queue=self.name, persist=True)

    def subscriber(self, broker: RabbitBroker, concurrency: int) -> Any:
        return broker.subscriber(self.queue)
