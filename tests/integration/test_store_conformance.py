"""The conformance suite of stores against the stores of diator. `-k STO-KEY` runs one part."""

from diator.testing.outbox import StoreConformance
from tests.integration.harnesses.stores import MemoryStoreHarness


class TestMemoryStore(StoreConformance):
    harness = MemoryStoreHarness
