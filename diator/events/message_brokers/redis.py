"""The older place of what is now in `diator.brokers` and `diator.brokers.redis`."""

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker

__all__ = ["Message", "RedisMessageBroker"]
