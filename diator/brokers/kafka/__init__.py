"""
Kafka. Needs the extra `kafka`.

Messages of one type and name have one topic in Kafka, `<prefix>.<message_type>.<message_name>`, which all groups share.
Each group also has topics of its own: `….<group>-retry` for messages that wait for a delayed retry, and
`….<group>-dlq` for dead-lettered messages.
"""

from diator._extras import importing as _importing

with _importing("diator.brokers.kafka", "kafka", "aiokafka"):
    from diator.brokers.kafka._broker import KafkaMessageBroker

__all__ = ["KafkaMessageBroker"]
