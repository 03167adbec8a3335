"""The environment of a suite: what every harness has."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class EnvironmentMissing(Exception):
    """The service, or something else that the harness needs, is not available on this machine. Nothing was proved."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """
    A scenario that is known to fail, with the reason.

    The scenario fails the run if it passes, or if it fails in another way than declared.

    Attributes:
        reason: Why the scenario fails.
        raises: The error that the scenario fails with.
        sometimes: Whether the scenario passes in some runs, because its failure is a race. Then it may pass.
        issue: Where the problem is tracked, such as the address of an issue; may be empty.
    """

    reason: str
    raises: type[BaseException] = AssertionError
    sometimes: bool = False
    issue: str = ""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """
    How fast an environment is, as far as every suite asks. All times are in seconds.

    Attributes:
        scale: The factor for the timeout of every scenario. `DIATOR_CONFORMANCE_SCALE` sets the default.
        standstill: The longest time that the event loop may stand still. The suite interrupts what blocks it longer.
        lag: How late something may be on a busy machine, in scenarios where one task must not hold up another.
    """

    scale: float = float(os.environ.get("DIATOR_CONFORMANCE_SCALE", "1"))
    standstill: float = 15.0
    lag: float = 1.0


class Environment(ABC):
    """
    What every harness has.

    Attributes:
        name: The name of what is tested, in the report.
        facilities: The names of the optional things that the harness can do.
        limits: How fast the environment is: a `Pace`, or more.
        deviations: The scenarios that are known to fail, by id.
    """

    name: ClassVar[str]
    facilities: ClassVar[frozenset[str]] = frozenset()
    limits: Any = Pace()
    deviations: Mapping[str, Deviation] = {}

    def start(self) -> None:  # noqa: B027  # many harnesses have nothing to start
        """
        Start the environment. The suite calls this once, before the first scenario.

        With the facility `processes`, each child process calls it too, in a harness of its own.

        Raises:
            EnvironmentMissing: The environment is not available on this machine.
        """

    def stop(self) -> None:  # noqa: B027
        """Stop the environment. A child process of `processes` calls this too: stop only what it has started itself."""

    def prepare(self, facility: str) -> None:  # noqa: B027
        """
        Start what *facility* needs, unless it is running: a service that may be broken, or certificates.

        The suite calls this before each scenario that needs *facility*, outside of the scenario's event loop and
        timeout. Resources that it opens may stay open until `stop`.

        Raises:
            EnvironmentMissing: The facility is not available on this machine. The scenario is not run.
        """

    def service(self) -> str:
        """Return the name and version of the service, for the report."""
        return "in process"

    def driver(self) -> str:
        """Return the name and version of the client library, for the report; empty if there is none."""
        return ""
