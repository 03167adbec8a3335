from typing import Any, Self

from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from with_faststream import GROUP, FastStream


class Kafka(FastStream):
    def broker_for(self, concurrency: int) -> KafkaBroker:
        return KafkaBroker(self.url, acks="all", enable_idempotence=True, logger=None)

    async def __aenter__(self) -> Self:
        await self.broker.start()
        return self

    async def publish(self, event: dict[str, Any]) -> None:
        await self.broker.publish(event, topic=self.name)

    def subscriber(self, broker: KafkaBroker, concurrency: int) -> Any:
        # Each worker that acknowledges after handling is a consumer, so no more of them work than there are partitions.
        return broker.subscriber(
            self.name,
            group_id=GROUP,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.ACK,
            max_workers=min(concurrency, 4),
        )
