"""The store of the page about writing one passes the suite."""

import sys
from pathlib import Path

import pytest

from diator.testing.outbox import StoreConformance
from tests.integration.private_services import PrivateServices
from tests.services import required

EXAMPLE = Path(__file__).parents[2] / "examples" / "asyncpg-store"
sys.path.insert(0, str(EXAMPLE))

from diator_asyncpg_harness import AsyncpgHarness  # noqa: E402  # it stands in the folder of the example

pytestmark = pytest.mark.timeout(600)


class ExampleHarness(AsyncpgHarness):
    """The example with a server that nobody else writes to."""

    def __init__(self):
        self._services = PrivateServices()

    def start(self):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("DIATOR_TEST_POSTGRES_URL", self._services.get("database", "postgres").url)
            super().start()

    def stop(self):
        self._services.close()


class TestExample(StoreConformance):
    harness = ExampleHarness
    required = "postgres" in required()


def test_the_example_is_as_short_as_the_page_says():
    assert len((EXAMPLE / "diator_asyncpg.py").read_text().splitlines()) <= 250
