"""What a run says to machines."""

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
"""Changes whenever a scenario asks for something new."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, in the shape in which reports are compared and published."""

    transport: str
    broker: str | None
    """The service and its version; None if it was not to be had."""
    capabilities: Capabilities | None
    facilities: Sequence[str]
    results: Sequence[Result]
    driver: str | None = None
    """The client library and its version, where the harness names one."""

    @classmethod
    def of(
        cls, harness: Harness, results: Sequence[Result], *, available: bool, capabilities: Capabilities | None
    ) -> Report:
        """Make the report on *results* of *harness*."""
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
        Sum it up.

        A failure is a scenario that failed, or a service that was not to be had. A success is the whole catalogue of
        core scenarios without one that the environment could not run, and no deviation from them or from a promise.
        What is between is partial.
        """
        if self.broker is None or self.totals()["FAIL"]:
            return "failure"
        proved = {result.scenario.id for result in self.results if result.outcome != "NOT_RUN" or not result.applicable}
        missing = {each.id for each in SCENARIOS.values() if each.level == "C"} - proved
        deviates = any(each.outcome == "DEVIATION" and each.scenario.level in "CX" for each in self.results)
        return "partial" if missing or deviates else "success"

    def totals(self) -> dict[str, int]:
        """Count the results by outcome; each outcome is there, with 0 too."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome: counted[outcome] for outcome in get_args(Outcome)}

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain JSON values."""
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
        """Give it as a file's content."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def _plain(capabilities: Capabilities | None) -> dict[str, Any] | None:
    if capabilities is None:
        return None
    values = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in values.items()}
