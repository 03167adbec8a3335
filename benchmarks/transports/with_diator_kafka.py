from with_diator import Diator

from diator.brokers.kafka import KafkaMessageBroker


class Kafka(Diator):
    def broker_for(self, servers: str, name: str) -> KafkaMessageBroker:
        return KafkaMessageBroker(servers, name)
