"""The suite as a test class for pytest. It needs no pytest plugin."""

from __future__ import annotations

from typing import Any, ClassVar

from diator.testing._suite.for_pytest import Conformance
from diator.testing._suite.runner import Suite
from diator.testing.outbox._harness import StoreHarness
from diator.testing.outbox._suite import SUITE


class StoreConformance(Conformance):
    """
    The base of a test class that runs every scenario, one test for each.

    Derive a class whose name begins with `Test` and set *harness*. The derived class may set the attributes below and
    nothing else: declare a scenario that is known to fail in *deviations* instead of overriding a test.

    Attributes:
        harness: The harness class.
        deviations: Deviations in addition to those that the harness declares.
        required: Whether a missing environment fails the tests instead of skipping them.
        only: If not empty, run only the scenarios whose id or title contains one of these words.
        levels: If not empty, run only the scenarios of these levels, such as `CX`; see `Scenario.level`.
    """

    suite: ClassVar[Suite[Any]] = SUITE
    harness: ClassVar[type[StoreHarness]]
