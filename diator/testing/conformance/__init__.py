"""
The contract of a transport, as scenarios that run against any implementation.

Somebody who wrote a transport tells the suite how to get one, in a `Harness`, and has pytest run all of it:

    class NatsHarness(Harness):
        name = "nats"

        def transport(self) -> Transport:
            return NatsMessageBroker("nats://localhost")

    class TestNats(TransportConformance):
        harness = NatsHarness

Without pytest, and with a report for machines: `python -m diator.testing.conformance MODULE:HARNESS --report FILE`.

What a transport promises in its `capabilities` is proved; what it does not promise, it has to refuse. A scenario that
a transport is known to fail is a `Deviation`, which is data, has a reason, and is an error once it is not needed.
"""

from diator.brokers.base import Transport
from diator.testing.conformance import scenarios
from diator.testing.conformance._context import ConsumerRun, Context
from diator.testing.conformance._harness import (
    Access,
    DeadLettered,
    Deviation,
    EnvironmentMissing,
    Harness,
    Limits,
    Outages,
    Proxy,
)
from diator.testing.conformance._ledger import Comparison, Ledger, Nonconformance, Received
from diator.testing.conformance._pytest import TransportConformance
from diator.testing.conformance._reader import Reader
from diator.testing.conformance._report import SUITE_VERSION, Report
from diator.testing.conformance._runner import Result, UnknownScenario, run_scenario, run_suite
from diator.testing.conformance._scenario import SCENARIOS, Scenario, select

__all__ = [  # noqa: RUF022  # plainly sorted
    "Access",
    "Comparison",
    "ConsumerRun",
    "Context",
    "DeadLettered",
    "Deviation",
    "EnvironmentMissing",
    "Harness",
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
