"""
The conformance suite: scenarios that prove the contract of a transport against any implementation.

The author of a transport writes a `Harness`, which makes a broker for the suite, and pytest runs the scenarios:

    class NatsHarness(Harness):
        name = "nats"

        def transport(self) -> Transport:
            return NatsMessageBroker("nats://localhost")

    class TestNats(TransportConformance):
        harness = NatsHarness

The suite also runs without pytest and writes a report in JSON:
`python -m diator.testing.conformance MODULE:HARNESS --report FILE`.

The suite proves what a transport promises in its `capabilities`. A transport has to refuse what it does not promise. A
scenario that a transport is known to fail is declared as a `Deviation` with a reason. The declaration becomes an error
as soon as the scenario passes.
"""

from diator.brokers.base import Transport
from diator.testing._suite.environment import Deviation, EnvironmentMissing
from diator.testing._suite.errors import Nonconformance
from diator.testing._suite.report import Result
from diator.testing._suite.runner import UnknownScenario
from diator.testing.conformance import scenarios
from diator.testing.conformance._context import ConsumerRun, Context
from diator.testing.conformance._harness import Access, DeadLettered, Foreign, Harness, Limits, Outages, Proxy
from diator.testing.conformance._ledger import Comparison, Ledger, Received
from diator.testing.conformance._pytest import TransportConformance
from diator.testing.conformance._reader import Reader
from diator.testing.conformance._report import SUITE_VERSION, Report
from diator.testing.conformance._scenario import LEVELS, SCENARIOS, Scenario, select
from diator.testing.conformance._suite import run_scenario, run_suite

__all__ = [  # noqa: RUF022  # plainly sorted
    "Access",
    "Comparison",
    "ConsumerRun",
    "Context",
    "DeadLettered",
    "Deviation",
    "EnvironmentMissing",
    "Foreign",
    "Harness",
    "LEVELS",
    "Ledger",
    "Limits",
    "Nonconformance",
    "Outages",
    "Proxy",
    "Reader",
    "Received",
    "Report",
    "Result",
    "SCENARIOS",
    "SUITE_VERSION",
    "Scenario",
    "Transport",
    "TransportConformance",
    "UnknownScenario",
    "run_scenario",
    "run_suite",
    "scenarios",
    "select",
]
