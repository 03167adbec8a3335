"""The conformance suite finds what it is there to find."""

import asyncio
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from diator.testing.conformance import SCENARIOS, EnvironmentMissing, Limits, run_scenario, run_suite, select
from diator.testing.saboteurs import SABOTEURS, Saboteur
from tests.integration.harnesses import MemoryHarness

PAIRS = [
    pytest.param(saboteur, id_, id=f"{saboteur.__name__}-{id_}") for saboteur in SABOTEURS for id_ in saboteur.caught_by
]


def harness_of(saboteur, limits):
    class Sabotaged(MemoryHarness):
        facilities = MemoryHarness.facilities | {"crash"}
        consumer = saboteur.consumer
        services: ClassVar = {}

        def transport(self):
            """Brokers of one scenario share a service."""
            made = saboteur()
            return made.beside(self.services.setdefault(asyncio.get_running_loop(), made))

        def full(self, room):
            return saboteur(capacity=room)

        async def crash(self, transport):
            transport.crash()

    sabotaged = Sabotaged()
    sabotaged.limits = limits
    sabotaged.deviations = {}
    return sabotaged


@pytest.mark.parametrize(("saboteur", "id_"), PAIRS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_is_caught(saboteur, id_):
    """Each transport with a defect fails the scenarios that it names."""
    hurried = Limits(scale=0.04, settle=0.03, redelivery=0.3, lag=0.3)

    result = run_scenario(SCENARIOS[id_], harness_of(saboteur, hurried), seed=1)

    assert (result.outcome, saboteur.__doc__) == ("FAIL", saboteur.__doc__)


def test_the_healthy_one_is_not():
    """What the saboteurs are made of has no defect, but for what the broker inside has."""
    healthy = harness_of(Saboteur, MemoryHarness.limits)

    results = run_suite(healthy, [each for each in select() if each.level != "S"], seed=1)

    assert {result.scenario.id for result in results if result.outcome == "FAIL"} == {*MemoryHarness.deviations}


def test_every_scenario_is_proved():
    """For each core scenario, and for each that depends on a promise, there is a transport that fails it."""
    proved = {id_ for saboteur in SABOTEURS for id_ in saboteur.caught_by}

    assert {each.id for each in select() if each.level in "CX"} <= proved


class Inert:
    """A proxy that does nothing of what it is told."""

    accepted = connections = 1

    def withhold(self): ...

    black_hole = refuse = cut = reset = withhold

    async def heal(self): ...


@pytest.mark.parametrize(
    "scenario", [each for each in select() if "proxy" in each.facilities], ids=lambda each: each.id
)
def test_a_fault_that_did_not_happen_proves_nothing(scenario):
    """A scenario of faults fails where its proxy does nothing: it wants to see that the fault was felt."""

    class Calm(MemoryHarness):
        facilities = frozenset({"proxy"})
        limits = Limits(scale=0.04, settle=0.03, lag=0.3, timeout=0.5, liveness=0.5, recovery=0.5)
        deviations: ClassVar = {}

        @asynccontextmanager
        async def proxied(self):
            yield Inert()

    assert run_scenario(scenario, Calm(), seed=1).outcome == "FAIL"


def test_every_saboteur_says_what_is_wrong_with_it():
    assert all(saboteur.caught_by and saboteur.__doc__ for saboteur in SABOTEURS)
    assert len({saboteur.__name__ for saboteur in SABOTEURS}) == len(SABOTEURS)


def test_an_environment_that_is_absent_proves_nothing():
    """A run that reached no service is not green."""

    class Absent(MemoryHarness):
        def start(self):
            raise EnvironmentMissing("nobody is there")

    assert {result.outcome for result in run_suite(Absent(), select())} == {"NOT_RUN"}
