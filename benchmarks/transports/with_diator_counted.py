from prometheus_client import CollectorRegistry
from with_diator_memory import Memory

from diator.telemetry import Prometheus


class CountedInMemory(Memory):
    def __init__(self, url: str, name: str) -> None:
        self.instrument = Prometheus(CollectorRegistry())
        super().__init__(url, name)
