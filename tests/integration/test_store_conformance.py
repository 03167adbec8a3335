"""The conformance suite of stores against the stores of diator. `-k STO-KEY` runs one part."""

import pytest

from diator.testing.outbox import StoreConformance
from tests.integration.harnesses.sql_stores import AsyncpgHarness, PsycopgHarness, SqliteHarness
from tests.integration.harnesses.stores import MemoryStoreHarness
from tests.services import required

pytestmark = pytest.mark.timeout(600)


class TestMemoryStore(StoreConformance):
    harness = MemoryStoreHarness


class TestAsyncpg(StoreConformance):
    harness = AsyncpgHarness
    required = "postgres" in required()


class TestPsycopg(StoreConformance):
    harness = PsycopgHarness
    required = "postgres" in required()


class TestSqlite(StoreConformance):
    harness = SqliteHarness
