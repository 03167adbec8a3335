"""
How pytest-xdist distributes the tests among processes.

Tests that break the same service form a unit, which runs in one process. Long units start first, so that no process is
left with one at the end.
"""

import importlib
from functools import cache
from typing import Any

from xdist.scheduler import LoadScopeScheduling

from diator.testing.conformance import SCENARIOS

#: The beginnings of the names of long units, the longest first.
LONG = (
    "tests/integration/test_kills.py",
    "TestRabbitMQ breaks",
    "TestKafka breaks",
    "TestPsycopg",
    "TestAsyncpg",
    "tests/integration/test_saboteurs.py",
    "tests/integration/test_store_saboteurs.py",
    "tests/integration/test_grid.py",
    "tests/integration/kafka/",
    "TestRabbitMQ FLT",
    "TestKafka",
    "tests/integration/",
    "TestRabbitMQ",
    "tests/unit/brokers/test_codec.py",
    "tests/unit/test_layers.py",
    "Test",
)


class ByService(LoadScopeScheduling):
    """Distributes the units of `unit_of`, in the order of the collected tests."""

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """Return the name of the unit of the test *nodeid*."""
    file, _, name = nodeid.partition("::")
    if "::test_scenario[" in name:
        return _conformance(file, *name.removesuffix("]").split("::test_scenario["))
    return file


def turn_of(nodeid: str) -> int:
    """Return what to sort the collected tests by: how soon the unit of *nodeid* starts."""
    unit = unit_of(nodeid)
    return next((turn for turn, beginning in enumerate(LONG) if unit.startswith(beginning)), len(LONG))


@cache
def _conformance(file: str, class_: str, scenario: str) -> str:
    """Scenarios that break a service, or log in to a guarded one, start containers: together, each only once."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    breaking = getattr(getattr(module, class_).harness, "breaking", frozenset())
    if scenario not in SCENARIOS:  # one of the stores of an outbox, which share their database
        return class_
    facilities = SCENARIOS[scenario].facilities
    if broken := facilities & breaking:
        return f"{class_} breaks {' '.join(sorted(broken))}"
    return f"{class_} {'security' if 'security' in facilities else SCENARIOS[scenario].group}"
