from typing import Self

from with_diator import Diator

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker


class RabbitMQ(Diator):
    def broker_for(self, url: str, name: str) -> RabbitMQMessageBroker:
        return RabbitMQMessageBroker(url, name)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        async with self.broker.subscribe({Topic("notification_event", "UserJoined")}, group=self.group):
            return self  # its queue is declared now
