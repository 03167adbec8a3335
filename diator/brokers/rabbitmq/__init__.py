"""
RabbitMQ. Needs the extra `rabbitmq`.

Messages are published to one durable topic exchange, named by the prefix, with the routing key
`<message_type>.<message_name>`. A group has a queue for each topic, `<prefix>:<message_type>:<message_name>:<group>`.
The queue `…:dead` contains the dead-lettered messages of the group, and the queues `…:retry:<ms>` contain the messages
that wait for a delayed retry.
"""

from diator._extras import importing as _importing

with _importing("diator.brokers.rabbitmq", "rabbitmq", "aiormq", "pamqp", "yarl"):
    from diator.brokers.rabbitmq._broker import RabbitMQMessageBroker

__all__ = ["RabbitMQMessageBroker"]
