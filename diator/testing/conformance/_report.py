"""The report on a transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from diator.brokers.capabilities import Capabilities
from diator.testing._suite.report import BaseReport, Result
from diator.testing._suite.scenario import Catalogue
from diator.testing.conformance._harness import Harness
from diator.testing.conformance._scenario import SCENARIOS

SUITE_VERSION = "2026.11"
"""The version of the catalogue. It changes whenever a scenario requires something new."""


@dataclass(frozen=True, kw_only=True)
class Report(BaseReport):
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

    version = SUITE_VERSION
    catalogue: ClassVar[Catalogue] = SCENARIOS

    transport: str
    broker: str | None
    capabilities: Capabilities | None

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

    @property
    def is_available(self) -> bool:
        """Whether the service was available."""
        return self.broker is not None

    def tested(self) -> dict[str, Any]:
        """Return what was tested, as plain JSON values, and the result."""
        return {
            "transport": self.transport,
            "broker": self.broker,
            "driver": self.driver,
            "result": self.result(),
            "capabilities": _plain(self.capabilities),
        }


def _plain(capabilities: Capabilities | None) -> dict[str, Any] | None:
    if capabilities is None:
        return None
    values = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in values.items()}
