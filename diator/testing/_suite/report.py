"""The results of a run, and the report on them, for machines."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import diator
from diator.brokers.capabilities import Capabilities
from diator.testing._suite.scenario import Catalogue, Scenario

Outcome: TypeAlias = Literal["PASS", "FAIL", "UNSUPPORTED", "NOT_RUN", "DEVIATION", "PROVISIONAL"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    The result of one scenario.

    Attributes:
        scenario: The scenario.
        outcome: How the scenario ended.
        reason: Why the outcome is not a pass; empty for a pass.
        seconds: How long the scenario took.
        seed: The seed of the run.
        error: The error of a failure.
        observed: What was sent, received and handled until the failure.
        capabilities: What a transport promised; None if the scenario failed before it was asked.
        applicable: False if the scenario has nothing to prove here.
    """

    scenario: Scenario
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    seed: int = 0
    error: BaseException | None = field(default=None, repr=False)
    observed: str = ""
    capabilities: Capabilities | None = field(default=None, repr=False)
    applicable: bool = True


@dataclass(frozen=True, kw_only=True)
class BaseReport(ABC):
    """
    The results of one run, in the form in which they are compared and published.

    Attributes:
        facilities: The facilities of the harness, sorted.
        results: One result for each scenario.
        driver: The name and version of the client library; None if there is none.
    """

    version: ClassVar[str]
    catalogue: ClassVar[Catalogue]

    facilities: Sequence[str]
    results: Sequence[Result]
    driver: str | None = None

    @property
    @abstractmethod
    def is_available(self) -> bool:
        """Whether the service was available."""

    @abstractmethod
    def tested(self) -> dict[str, Any]:
        """Return what was tested, as plain JSON values, and the result."""

    def result(self) -> Literal["success", "partial", "failure"]:
        """
        Return the result of the whole run.

        `failure`: a scenario failed, or the service was not available. `success`: the environment could run every core
        scenario, and no deviation is declared for a core scenario or an extra one. `partial`: anything else.
        """
        if not self.is_available or self.totals()["FAIL"]:
            return "failure"
        proved = {result.scenario.id for result in self.results if result.outcome != "NOT_RUN" or not result.applicable}
        missing = {each.id for each in self.catalogue.values() if each.level == "C"} - proved
        deviates = any(each.outcome == "DEVIATION" and each.scenario.level in "CX" for each in self.results)
        return "partial" if missing or deviates else "success"

    def totals(self) -> dict[str, int]:
        """Return the number of results for each outcome, also for outcomes without a result."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome: counted[outcome] for outcome in get_args(Outcome)}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "suite_version": self.version,
            "diator_version": diator.__version__,
            **self.tested(),
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
