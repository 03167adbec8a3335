from with_diator import Diator

from diator.brokers.memory import MemoryMessageBroker


class Memory(Diator):
    def broker_for(self, _: str, __: str) -> MemoryMessageBroker:
        return MemoryMessageBroker(capacity=1_000_000)
