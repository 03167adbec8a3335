"""The report of a run, for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import diator
from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._harness import Harness
from diator.testing.conformance._runner import Outcome, Result
from diator.testing.conformance._scenario import SCENARIOS

SUITE_VERSION = "2026.11"
"""The version of the catalogue. It changes whenever a scenario requires something new."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """
    The results of one run, in the form in which they are compared and published.

    Attributes:
        transport: The name of the transport.
        broker: The name and version of the service; None if it was not available.
        capabilities: The capabilities of the transport; None if the service was not available.
        facilities: The facilities of the harness, sorted.
        results: One result for each scenario.
        driver: The name and version of the client library; None if there is none.
    """

    transport: str
    broker: str | None
    capabilities: Capabilities | None
    facilities: Sequence[str]
    results: Sequence[Result]
    driver: str | None = None

    @classmethod
    def of(
        cls, harness: Harness, results: Sequence[Result], *, available: bool, capabilities: Capabilities | None
    ) -> Report:
        """Return the report on *results* of *harness*. *available* is whether its service was available."""
        return cls(
            transport=harness.name,
            broker=harness.service() if available else None,
            capabilities=capabilities,
            facilities=sorted(harness.facilities),
            results=results,
            driver=harness.driver() or None,
        )

    def result(self) -> Literal["success", "partial", "failure"]:
        """
        Return the result of the whole run.

        `failure`: a scenario failed, or the service was not available. `success`: the environment could run every core
        scenario, and no deviation is declared for a core scenario or a capability. `partial`: anything else.
        """
        if self.broker is None or self.totals()["FAIL"]:
            return "failure"
        proved = {result.scenario.id for result in self.results if result.outcome != "NOT_RUN" or not result.applicable}
        missing = {each.id for each in SCENARIOS.values() if each.level == "C"} - proved
        deviates = any(each.outcome == "DEVIATION" and each.scenario.level in "CX" for each in self.results)
        return "partial" if missing or deviates else "success"

    def totals(self) -> dict[str, int]:
        """Return the number of results for each outcome, also for outcomes without a result."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome: counted[outcome] for outcome in get_args(Outcome)}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "suite_version": SUITE_VERSION,
            "diator_version": diator.__version__,
            "transport": self.transport,
            "broker": self.broker,
            "driver": self.driver,
            "result": self.result(),
            "capabilities": _plain(self.capabilities),
            "facilities": [*self.facilities],
            "totals": self.totals(),
            "scenarios": [
                {
                    "id": result.scenario.id,
                    "title": result.scenario.title,
                    "level": result.scenario.level,
                    "outcome": result.outcome,
                    "reason": result.reason,
                    "seconds": round(result.seconds, 4),
                    "seed": result.seed,
                }
                for result in self.results
            ],
        }

    def as_json(self) -> str:
        """Return the report as the content of a JSON file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def _plain(capabilities: Capabilities | None) -> dict[str, Any] | None:
    if capabilities is None:
        return None
    values = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in values.items()}
