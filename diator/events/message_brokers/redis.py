"""The older place of what is now `diator.brokers.redis`."""

from diator.brokers.redis import RedisMessageBroker

__all__ = ["RedisMessageBroker"]
