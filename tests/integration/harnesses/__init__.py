"""The harnesses of the transports of diator for the conformance suite."""

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
