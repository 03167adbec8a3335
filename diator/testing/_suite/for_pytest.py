"""A suite as a test class for pytest. It needs no pytest plugin."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from diator.exceptions import MissingExtra
from diator.testing._suite.environment import Deviation, Environment, EnvironmentMissing
from diator.testing._suite.runner import Suite
from diator.testing._suite.scenario import Scenario

try:
    import pytest
except ImportError as error:  # pragma: no cover  # the tests themselves need pytest
    raise MissingExtra("diator.testing.conformance and diator.testing.outbox", "testing") from error


class Conformance:
    """
    The base of the test classes of every suite, one test for each scenario.

    Attributes:
        suite: The suite.
        harness, deviations, required, only, levels: See `TransportConformance`.
    """

    suite: ClassVar[Suite[Any]]
    harness: ClassVar[Any]
    deviations: ClassVar[Mapping[str, Deviation]] = {}
    required: ClassVar[bool] = False
    only: ClassVar[str] = ""
    levels: ClassVar[str] = ""

    _running: ClassVar[Environment | None] = None
    _missing: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        settings = {"suite", "harness", "deviations", "required", "only", "levels", "pytestmark"}
        own = {name for name in vars(cls) if not name.startswith("__")} - settings
        if shadowed := sorted(own):
            raise TypeError(
                f"{cls.__name__} defines {', '.join(shadowed)}, but tests of the suite cannot be replaced; declare "
                "scenarios that are known to fail in `deviations`, and put your own tests into another class"
            )
        cls.suite.check_deviations(cls.deviations)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize the test with every scenario."""
        if "conformance_scenario" in metafunc.fixturenames:
            scenarios = self.suite.catalogue.select(self.only, self.levels)
            metafunc.parametrize("conformance_scenario", scenarios, ids=[each.id for each in scenarios])

    @classmethod
    def setup_class(cls) -> None:
        """Start the environment."""
        harness = cls.harness()
        harness.deviations = {**harness.deviations, **cls.deviations}
        cls.suite.check_harness(harness)
        try:
            harness.start()
        except EnvironmentMissing as missing:
            cls._missing = f"no service: {missing}"
        else:
            cls._running = harness

    @classmethod
    def teardown_class(cls) -> None:
        """Stop the environment."""
        if cls._running is not None:
            cls._running.stop()
            cls._running = None

    def test_scenario(self, conformance_scenario: Scenario, pytestconfig: pytest.Config) -> None:
        """Run one scenario of the catalogue."""
        if self._running is None:
            missing = pytest.fail if self.required else pytest.skip
            missing(self._missing)
        capture: Any = pytestconfig.pluginmanager.getplugin("capturemanager")
        uncaptured = capture.global_and_fixture_disabled() if capture else nullcontext()
        result = self.suite.run_scenario(conformance_scenario, self._running, uncaptured=uncaptured)
        if result.outcome == "FAIL":
            title = f"{conformance_scenario.id}: {conformance_scenario.title}"
            lines = [result.reason, title, *self.suite.explained(result), f"seed {result.seed}"]
            pytest.fail("\n".join(lines), pytrace=False)
        if result.outcome in {"DEVIATION", "PROVISIONAL"}:
            pytest.xfail(f"{result.outcome}: {result.reason}")
        if result.outcome != "PASS":
            pytest.skip(f"{result.outcome}: {result.reason}")
