"""Unit tests run on virtual time, and the property tests are small by default."""

import asyncio
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.virtual_time import VirtualTimeLoop

# `HYPOTHESIS_PROFILE` chooses one. None of them measures how long an example takes: that depends on the machine.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=20, **_PATIENT)
settings.register_profile("ci", max_examples=100, **_PATIENT)
settings.register_profile("nightly", max_examples=5_000, **_PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def loop_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the library's own measurements follow the clock of the event loop."""
    for module in (
        "diator._deadlines",
        "diator._handling",
        "diator.brokers.leases",
        "diator.consumer",
        "diator.outbox._relay",
    ):
        monkeypatch.setattr(f"{module}.monotonic", lambda: asyncio.get_running_loop().time())


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test on virtual time, unless it is marked as `real_time`."""
    if item.get_closest_marker("real_time"):
        return {"real time": asyncio.new_event_loop}
    return {"virtual time": VirtualTimeLoop}
