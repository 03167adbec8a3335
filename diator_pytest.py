"""
pytest fixtures of diator's test kit. pytest loads this module by its entry point wherever diator is installed.

The module imports diator only when a test uses a fixture. So it costs other test runs nothing, and a coverage run of
diator itself starts before diator is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diator.testing import FaultyMessageBroker, Recorder


@pytest.fixture
def diator_broker(request: pytest.FixtureRequest) -> Iterator[FaultyMessageBroker]:
    """Return a broker with scripted faults. The test fails at its end if a scripted fault did not happen."""
    from diator.testing import FaultyMessageBroker  # noqa: PLC0415  # only when a test uses the fixture

    broker = FaultyMessageBroker()
    failed = request.session.testsfailed
    yield broker
    if request.session.testsfailed == failed:  # a failed test may have stopped before its faults
        broker.verify()


@pytest.fixture
def diator_recorder() -> Recorder:
    """Return a broker that records the messages it is sent."""
    from diator.testing import Recorder  # noqa: PLC0415  # as above

    return Recorder()
