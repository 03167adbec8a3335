"""Redis Pub/Sub. Needs the extra `redis`. Redis Streams are in `diator.brokers.redis_streams`."""

from diator._extras import importing as _importing

with _importing("diator.brokers.redis", "redis", "redis"):
    from diator.brokers.redis._pubsub import RedisMessageBroker

__all__ = ["RedisMessageBroker"]
