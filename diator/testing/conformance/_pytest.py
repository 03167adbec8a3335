"""The suite as a class of tests. It needs pytest, and no plugin of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diator.exceptions import MissingExtra
from diator.testing.conformance._harness import Deviation, EnvironmentMissing, Harness
from diator.testing.conformance._runner import check_deviations, run_scenario
from diator.testing.conformance._scenario import Scenario, select

try:
    import pytest
except ImportError as error:  # pragma: no cover  # the tests run by it
    raise MissingExtra("diator.testing.conformance", "testing") from error


class TransportConformance:
    """
    Derive a class whose name begins with `Test`, name the *harness*, and pytest runs every scenario, by its id.

    That class says nothing else: a scenario that is known to fail is said in *deviations*, not by overriding. With
    *required*, a service that is not to be had fails the tests instead of skipping them.
    """

    harness: ClassVar[type[Harness]]
    deviations: ClassVar[Mapping[str, Deviation]] = {}
    """Beside those of the harness."""
    required: ClassVar[bool] = False
    only: ClassVar[str] = ""
    """Only scenarios whose id or title has one of these words: for a second configuration of a transport."""

    _running: ClassVar[Harness | None] = None
    _missing: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        settings = {"harness", "deviations", "required", "only", "pytestmark"}
        own = {name for name in vars(cls) if not name.startswith("__")} - settings
        if shadowed := sorted(own):
            raise TypeError(
                f"{cls.__name__} defines {', '.join(shadowed)}; the suite's members cannot be replaced, and tests of "
                "your own belong into a class of their own. Say what is known to fail in `deviations`"
            )
        check_deviations(cls.deviations)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each scenario."""
        if "conformance_scenario" in metafunc.fixturenames:
            scenarios = select(self.only)
            metafunc.parametrize("conformance_scenario", scenarios, ids=[each.id for each in scenarios])

    @classmethod
    def setup_class(cls) -> None:
        """Bring up the environment."""
        harness = cls.harness()
        harness.deviations = {**harness.deviations, **cls.deviations}
        check_deviations(harness.deviations)
        try:
            harness.start()
        except EnvironmentMissing as missing:
            cls._missing = f"no service: {missing}"
        else:
            cls._running = harness

    @classmethod
    def teardown_class(cls) -> None:
        """Take the environment down."""
        if cls._running is not None:
            cls._running.stop()
            cls._running = None

    def test_scenario(self, conformance_scenario: Scenario) -> None:
        """Run one scenario of the catalogue."""
        if self._running is None:
            give_up = pytest.fail if self.required else pytest.skip
            give_up(self._missing)
        result = run_scenario(conformance_scenario, self._running)
        if result.outcome == "FAIL":
            told = f"{conformance_scenario.id}: {result.reason}\n\n{conformance_scenario.catches}\n\nseed {result.seed}"
            raise AssertionError(told) from result.error
        if result.outcome in {"DEVIATION", "PROVISIONAL"}:
            pytest.xfail(f"{result.outcome}: {result.reason}")
        if result.outcome != "PASS":
            pytest.skip(f"{result.outcome}: {result.reason}")
