"""The suite as a test class for pytest. It needs no pytest plugin."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from diator.exceptions import MissingExtra
from diator.testing.conformance._harness import Deviation, EnvironmentMissing, Harness
from diator.testing.conformance._runner import check_deviations, check_harness, explained, run_scenario
from diator.testing.conformance._scenario import Scenario, select

try:
    import pytest
except ImportError as error:  # pragma: no cover  # the tests themselves need pytest
    raise MissingExtra("diator.testing.conformance", "testing") from error


class TransportConformance:
    """
    The base of a test class that runs every scenario, one test for each.

    Derive a class whose name begins with `Test` and set *harness*. The derived class may set the attributes below and
    nothing else: declare a scenario that is known to fail in *deviations* instead of overriding a test.

    Attributes:
        harness: The harness class.
        deviations: Deviations in addition to those that the harness declares.
        required: Whether a missing environment fails the tests instead of skipping them.
        only: If not empty, run only the scenarios whose id or title contains one of these words. Useful for a second
            configuration of a transport.
        levels: If not empty, run only the scenarios of these levels, such as `CX`; see `Scenario.level`.
    """

    harness: ClassVar[type[Harness]]
    deviations: ClassVar[Mapping[str, Deviation]] = {}
    required: ClassVar[bool] = False
    only: ClassVar[str] = ""
    levels: ClassVar[str] = ""

    _running: ClassVar[Harness | None] = None
    _missing: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        settings = {"harness", "deviations", "required", "only", "levels", "pytestmark"}
        own = {name for name in vars(cls) if not name.startswith("__")} - settings
        if shadowed := sorted(own):
            raise TypeError(
                f"{cls.__name__} defines {', '.join(shadowed)}, but tests of the suite cannot be replaced; declare "
                "scenarios that are known to fail in `deviations`, and put your own tests into another class"
            )
        check_deviations(cls.deviations)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize the test with every scenario."""
        if "conformance_scenario" in metafunc.fixturenames:
            scenarios = select(self.only, self.levels)
            metafunc.parametrize("conformance_scenario", scenarios, ids=[each.id for each in scenarios])

    @classmethod
    def setup_class(cls) -> None:
        """Start the environment."""
        harness = cls.harness()
        harness.deviations = {**harness.deviations, **cls.deviations}
        check_harness(harness)
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
        result = run_scenario(conformance_scenario, self._running, uncaptured=uncaptured)
        if result.outcome == "FAIL":
            title = f"{conformance_scenario.id}: {conformance_scenario.title}"
            lines = [result.reason, title, *explained(result), f"seed {result.seed}"]
            pytest.fail("\n".join(lines), pytrace=False)
        if result.outcome in {"DEVIATION", "PROVISIONAL"}:
            pytest.xfail(f"{result.outcome}: {result.reason}")
        if result.outcome != "PASS":
            pytest.skip(f"{result.outcome}: {result.reason}")
