"""
Gives pytest the fixtures of diator's test kit. Found by its entry point, in every run where diator is installed.

Therefore a module of its own, which imports nothing of diator before a test asks for a fixture: it costs the others
nothing, and coverage of diator itself sees all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diator.testing import FaultyMessageBroker, Recorder


@pytest.fixture
def diator_broker(request: pytest.FixtureRequest) -> Iterator[FaultyMessageBroker]:
    """A broker that fails as the test tells it to. What the test has scripted has to have happened at its end."""
    from diator.testing import FaultyMessageBroker  # noqa: PLC0415  # not before somebody asks

    broker = FaultyMessageBroker()
    failed = request.session.testsfailed
    yield broker
    if request.session.testsfailed == failed:  # a test that failed need not hear why it did not come so far
        broker.verify()


@pytest.fixture
def diator_recorder() -> Recorder:
    """A broker that keeps what it is sent."""
    from diator.testing import Recorder  # noqa: PLC0415  # as above

    return Recorder()
