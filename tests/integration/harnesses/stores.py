"""The harness of the store in memory."""

from contextlib import asynccontextmanager

from diator.outbox.memory import MemoryStore
from diator.testing.outbox import Database, StoreHarness, StoreLimits


class MemoryStoreHarness(StoreHarness):
    """The store in memory. Each scenario has one, which is its own database."""

    name = "memory"
    facilities = frozenset({"writers", "wakes", "transactions"})
    limits = StoreLimits(brief=0.03)

    @asynccontextmanager
    async def database(self):
        yield MemoryTables(MemoryStore())


class MemoryTables(Database):
    def __init__(self, store):
        self._store = store

    def store(self):
        return self._store

    def session(self):
        return self._store.begin()

    async def transactions(self):
        return len(self._store._database.transactions)
