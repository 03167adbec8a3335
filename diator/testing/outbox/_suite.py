"""The suite of stores: what it adds to every suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from diator.testing._suite.environment import Environment
from diator.testing._suite.report import BaseReport, Result
from diator.testing._suite.runner import RunScenario, RunSuite, Suite
from diator.testing._suite.scenario import Catalogue, Level
from diator.testing.outbox._context import Context
from diator.testing.outbox._harness import StoreHarness
from diator.testing.outbox._rules import CONTRACT
from diator.testing.outbox._scenario import LEVELS, SCENARIOS

SUITE_VERSION = "2026.11"
"""The version of the catalogue. It changes whenever a scenario requires something new."""


@dataclass(frozen=True, kw_only=True)
class StoreReport(BaseReport):
    """
    The results of one run, in the form in which they are compared and published.

    Attributes:
        store: The name of the store.
        database: The name and version of the database; None if it was not available.
        facilities: The facilities of the harness, sorted.
        results: One result for each scenario.
        driver: The name and version of the client library; None if there is none.
    """

    version = SUITE_VERSION
    catalogue: ClassVar[Catalogue] = SCENARIOS

    store: str
    database: str | None

    @property
    def is_available(self) -> bool:
        """Whether the database was available."""
        return self.database is not None

    def tested(self) -> dict[str, Any]:
        """Return what was tested, as plain JSON values, and the result."""
        return {"store": self.store, "database": self.database, "driver": self.driver, "result": self.result()}


class _Stores(Suite[StoreHarness]):
    """The suite of stores."""

    module = "diator.testing.outbox"
    proves = "Prove that a store keeps the contract of an outbox and an inbox."
    levels: ClassVar[Mapping[Level, str]] = LEVELS
    catalogue: ClassVar[Catalogue] = SCENARIOS
    contract: ClassVar = CONTRACT
    harness: ClassVar[type[Environment]] = StoreHarness
    never_blocks = "Store: It can be made without"
    cancelled = "Store: Any error of the database"
    nothing_remains = "close"

    async def open(self, harness: StoreHarness, seed: int, resources: AsyncExitStack) -> Context:
        """Return the context of a scenario, with a new database."""
        database = await resources.enter_async_context(harness.database())
        return Context(harness, database, seed=seed, resources=resources)

    def report(self, harness: StoreHarness, results: Sequence[Result], *, available: bool) -> StoreReport:
        """Return the report on *results*."""
        return StoreReport(
            store=harness.name,
            database=harness.service() if available else None,
            facilities=sorted(harness.facilities),
            results=results,
            driver=harness.driver() or None,
        )


SUITE = _Stores()
run_scenario: RunScenario[StoreHarness] = SUITE.run_scenario
run_suite: RunSuite[StoreHarness] = SUITE.run_suite
