"""
Kafka. Needs the extra `kafka`.

One topic for each kind and name of messages, `<prefix>.<message_type>.<message_name>`, which all groups share. Each
group adds topics of its own: `….<group>-retry` for messages that wait for a delayed retry, `….<group>-dlq` for
dead-lettered messages.
"""

from diator._extras import importing as _importing

with _importing("diator.brokers.kafka", "kafka", "aiokafka"):
    from diator.brokers.kafka._broker import KafkaMessageBroker

__all__ = ["KafkaMessageBroker"]
