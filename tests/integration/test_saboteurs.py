"""The conformance suite finds what it is there to find."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import ClassVar

import pytest

from diator.exceptions import BrokerUnavailable
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
            return made.share_service(self.services.setdefault(asyncio.get_running_loop(), made))

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
    hurried = Limits(scale=0.04, quiet=0.03, redelivery=0.3, lag=0.3)

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
    """A proxy, and a service, that do nothing of what they are told."""

    accepted = connections = 1
    passed: ClassVar = Counter()
    lost: ClassVar = passed

    def withhold(self, *_): ...

    black_hole = refuse = reject = black_hole_existing = cut = reset = delay = cut_after = withhold

    async def heal(self): ...

    stop = kill = start = pause = resume = heal


class Bold(Saboteur):
    """Promises everything that a scenario of faults may ask for."""

    @property
    def capabilities(self):
        redelivery = frozenset({"retry", "close", "crash", "deadline"})
        return replace(super().capabilities, durability="crash", redelivery=redelivery)


class Calm(MemoryHarness):
    """Offers every facility for faults, and nothing ever happens. The service of each process is its own."""

    faults = frozenset({"proxy", "crash", "processes", "outages", "operator", "topology", "alarm", "security"})
    facilities = MemoryHarness.facilities | faults
    limits = Limits(scale=0.04, quiet=0.03, lag=0.3, timeout=0.5, liveness=0.5, recovery=0.5, max_delay=0.05)
    deviations: ClassVar = {}
    services: ClassVar = {}
    password = "nobody-asks-for-it"
    broker = Bold

    def transport(self):
        made = self.broker()
        return made.share_service(self.services.setdefault(asyncio.get_running_loop(), made))

    @asynccontextmanager
    async def inert(self):
        yield Inert()

    proxied = private = alarm = inert

    async def nothing(self, *_): ...

    crash = disconnect = delete = nothing

    def guarded(self, access):
        return self.transport()


FAULTS = [each for each in select() if each.facilities & Calm.faults]


@pytest.mark.parametrize("scenario", FAULTS, ids=lambda each: each.id)
def test_a_fault_that_did_not_happen_proves_nothing(scenario):
    """A scenario of faults fails where its environment does nothing: it wants to see that the fault was felt."""
    harness = Calm()
    harness.broker = Saboteur if scenario.id == "DUR-06" else Bold  # one is for those who promise no durability

    assert run_scenario(scenario, harness, seed=1).outcome == "FAIL"


def test_every_fault_is_tried_without_it():
    """No scenario of faults is left out above: those that need no more than the service has are of another kind."""
    assert {each.id for each in select() if each.level == "F"} - {each.id for each in FAULTS} == {"SEC-09"}


class Outage(Inert):
    """A service that is out when it is told to be, and comes back with what it had, or without."""

    def __init__(self, forgets):
        self.forgets = forgets
        self.down = False
        self.brokers = []

    async def stop(self):
        self.down = True

    kill = stop

    async def start(self):
        self.down = False
        for broker in self.brokers * self.forgets:
            broker._queues.clear()
            broker._groups.clear()


class Breakable(Bold):
    """Cannot reach a service that is out."""

    outage = Outage(forgets=False)

    async def send_message(self, message, /):
        if self.outage.down:
            raise BrokerUnavailable("it is out", message_id=message.message_id)
        await super().send_message(message)


def restarted(broker, *, forgets):
    """An environment whose service can be out, with transports that are *broker*."""

    class Restarted(Calm):
        outage = Outage(forgets)

        @asynccontextmanager
        async def private(self):
            yield self.outage

        def transport(self):
            made = broker()
            made.outage = self.outage
            self.outage.brokers.append(made)
            return made.share_service(self.services.setdefault(asyncio.get_running_loop(), made))

    return Restarted()


@pytest.mark.parametrize(("forgets", "outcome"), [(False, "PASS"), (True, "FAIL")])
@pytest.mark.parametrize("id_", ["DUR-01", "DUR-02", "DUR-05"])
def test_a_service_that_comes_back_without_what_it_had_is_found(id_, forgets, outcome):
    """The other half of that proof: the fault did happen, and more was lost than may be."""
    assert run_scenario(SCENARIOS[id_], restarted(Breakable, forgets=forgets), seed=1).outcome == outcome


@pytest.mark.parametrize("id_", ["FLT-05", "FLT-06"])
def test_a_gap_that_is_not_told_is_found(id_):
    """Whoever promises little has to say when it was too little."""

    class Silent(Breakable):
        @property
        def capabilities(self):
            return replace(super().capabilities, guarantee="at_most_once")

    result = run_scenario(SCENARIOS[id_], restarted(Silent, forgets=False), seed=1)

    assert (result.outcome, "was not told" in result.reason) == ("FAIL", True)


def test_every_saboteur_says_what_is_wrong_with_it():
    assert all(saboteur.caught_by and saboteur.__doc__ for saboteur in SABOTEURS)
    assert len({saboteur.__name__ for saboteur in SABOTEURS}) == len(SABOTEURS)


def test_an_environment_that_is_absent_proves_nothing():
    """A run that reached no service is not green."""

    class Absent(MemoryHarness):
        def start(self):
            raise EnvironmentMissing("nobody is there")

    assert {result.outcome for result in run_suite(Absent(), select())} == {"NOT_RUN"}
