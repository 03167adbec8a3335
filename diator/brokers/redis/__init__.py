"""Redis Pub/Sub. Needs the extra `redis`. Redis Streams are in `diator.brokers.redis_streams`."""

from diator._extras import require_extra as _require_extra

_require_extra("diator.brokers.redis", "redis", "redis")

from diator.brokers.redis._pubsub import RedisMessageBroker  # noqa: E402  # first the check above

__all__ = ["RedisMessageBroker"]
