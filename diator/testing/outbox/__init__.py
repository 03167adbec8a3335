"""
The conformance suite of stores: scenarios that prove the contract of `diator.outbox.store.Store` for any of them.

The author of a store writes a `StoreHarness`, which makes a database for each scenario, and pytest runs the scenarios:

    class TestMyStore(StoreConformance):
        harness = MyHarness

The suite also runs without pytest and writes a report in JSON:
`python -m diator.testing.outbox MODULE:HARNESS --report FILE`.
"""

from diator.testing._suite.environment import Deviation, EnvironmentMissing
from diator.testing._suite.errors import Nonconformance
from diator.testing._suite.report import Result
from diator.testing._suite.scenario import Scenario
from diator.testing.outbox import scenarios
from diator.testing.outbox._context import Context
from diator.testing.outbox._harness import Database, Spoiled, StoreHarness, StoreLimits
from diator.testing.outbox._pytest import StoreConformance
from diator.testing.outbox._scenario import LEVELS, SCENARIOS, select
from diator.testing.outbox._suite import SUITE_VERSION, StoreReport, run_scenario, run_suite

__all__ = [  # noqa: RUF022  # plainly sorted
    "Context",
    "Database",
    "Deviation",
    "EnvironmentMissing",
    "LEVELS",
    "Nonconformance",
    "Result",
    "SCENARIOS",
    "SUITE_VERSION",
    "Scenario",
    "Spoiled",
    "StoreConformance",
    "StoreHarness",
    "StoreLimits",
    "StoreReport",
    "run_scenario",
    "run_suite",
    "scenarios",
    "select",
]
