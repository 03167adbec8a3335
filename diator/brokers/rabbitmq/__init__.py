"""
RabbitMQ. Needs the extra `rabbitmq`.

One durable topic exchange, named by the prefix, to which messages go by `<message_type>.<message_name>`. A group has a
queue for each topic, `<prefix>:<message_type>:<message_name>:<group>`. The queue `…:dead` holds its dead-lettered
messages, and `…:retry:<ms>` the messages that wait for a delayed retry.
"""

from diator._extras import importing as _importing

with _importing("diator.brokers.rabbitmq", "rabbitmq", "aiormq", "pamqp", "yarl"):
    from diator.brokers.rabbitmq._broker import RabbitMQMessageBroker

__all__ = ["RabbitMQMessageBroker"]
