"""Make a broker from an address, for tests that pass an address to another process."""

from typing import Any


def broker_for(address: str, prefix: str, **options: Any) -> Any:
    """Return a broker for `redis://…`, `redis-streams://…`, `amqp://…` or `kafka://…` that uses names with *prefix*."""
    scheme, _, rest = address.partition("://")
    match scheme:
        case "redis":
            from diator.brokers.redis import RedisMessageBroker

            return RedisMessageBroker.from_url(address, prefix, **options)
        case "redis-streams":
            from diator.brokers.redis_streams import RedisStreamMessageBroker

            return RedisStreamMessageBroker.from_url(f"redis://{rest}", prefix, **{"lease": 1.0, **options})
        case "amqp":
            from diator.brokers.rabbitmq import RabbitMQMessageBroker

            return RabbitMQMessageBroker(address, prefix, **options)
        case "kafka":
            from diator.brokers.kafka import KafkaMessageBroker

            return KafkaMessageBroker(
                rest, prefix, **{"session_timeout": 6.0, "heartbeat_interval": 0.3, "drain_timeout": 5.0, **options}
            )
    raise ValueError(scheme)
