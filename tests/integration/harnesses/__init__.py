"""How the conformance suite gets diator's own transports."""

from tests.integration.harnesses.kafka import KafkaHarness, KafkaInPlaceHarness
from tests.integration.harnesses.memory import MemoryHarness, PlainHarness
from tests.integration.harnesses.rabbitmq import RabbitMQHarness
from tests.integration.harnesses.redis import RedisHarness, RedisStreamHarness

__all__ = [
    "KafkaHarness",
    "KafkaInPlaceHarness",
    "MemoryHarness",
    "PlainHarness",
    "RabbitMQHarness",
    "RedisHarness",
    "RedisStreamHarness",
]
