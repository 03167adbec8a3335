"""The suite of transports: what it adds to every suite."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import ClassVar

from diator.brokers.capabilities import Capabilities
from diator.testing._suite.environment import Environment
from diator.testing._suite.errors import Nonconformance
from diator.testing._suite.report import Result
from diator.testing._suite.runner import RunScenario, RunSuite, Suite
from diator.testing._suite.scenario import Catalogue, Level, Scenario
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Harness
from diator.testing.conformance._refusals import verify_refusal
from diator.testing.conformance._report import Report
from diator.testing.conformance._rules import CONTRACT, NOTHING_REMAINS
from diator.testing.conformance._scenario import LEVELS, SCENARIOS
from diator.testing.conformance._shape import check_broker


class _Transports(Suite[Harness]):
    """The suite of transports."""

    module = "diator.testing.conformance"
    proves = "Prove that a transport keeps the contract of diator."
    levels: ClassVar[Mapping[Level, str]] = LEVELS
    catalogue: ClassVar[Catalogue] = SCENARIOS
    contract: ClassVar = CONTRACT
    harness: ClassVar[type[Environment]] = Harness
    never_blocks = "MessageBroker: It never blocks"
    cancelled = "MessageBroker: A cancelled call"
    nothing_remains = NOTHING_REMAINS

    async def open(self, harness: Harness, seed: int, resources: AsyncExitStack) -> Context:
        """Return the context of a scenario."""
        broker = harness.transport()
        check_broker(broker)
        resources.push_async_callback(broker.aclose)
        return Context(harness, broker.capabilities, seed=seed, resources=resources)

    async def lacks(self, context: Context, scenario: Scenario) -> Sequence[str]:
        """Return the capabilities that *scenario* needs and the transport lacks and refuses."""
        if lacks := context.capabilities.missing(scenario.needs):
            try:
                await verify_refusal(context, scenario.needs)
            except Nonconformance as error:
                error.rule = "Capabilities: Each field defaults"
                raise
        return lacks

    def report(self, harness: Harness, results: Sequence[Result], *, available: bool) -> Report:
        """Return the report on *results*."""
        capabilities = asyncio.run(_capabilities(harness)) if available else None
        return Report.of(harness, results, available=available, capabilities=capabilities)


async def _capabilities(harness: Harness) -> Capabilities:
    broker = harness.transport()
    try:
        return broker.capabilities
    finally:
        await broker.aclose()


SUITE = _Transports()
run_scenario: RunScenario[Harness] = SUITE.run_scenario
run_suite: RunSuite[Harness] = SUITE.run_suite
