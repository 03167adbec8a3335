"""Tests of the conformance suite of stores: it catches the mistakes that it is made for."""

from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from diator.testing.outbox import SCENARIOS, run_scenario, run_suite, select
from diator.testing.outbox._rules import CONTRACT
from diator.testing.outbox.saboteurs import SABOTEURS, Saboteur
from tests.integration.harnesses.stores import MemoryStoreHarness, MemoryTables

#: Scenarios with a fault that memory does not have. The last test here is about them.
FAULTS = {each.id for each in select() if each.facilities & {"connections", "processes"}}


class Tables(MemoryTables):
    """Tables in memory, which have savepoints, can be spoiled, and count what is looked at."""

    def __init__(self, kind):
        super().__init__(kind(clock=lambda: datetime.now(UTC)))
        self._kind = kind

    def store(self):
        """Return the store of all. A new one is made for a check of how it is made."""
        self._kind(clock=self._store._database.clock)
        return self._store

    def savepoint(self, session):
        return self._store.savepoint(session)

    async def pid(self, session):
        return id(session.transaction)

    async def spoil(self, how):
        self._store.spoiled = how

    async def cost(self, doing):
        before = self._store.looked_at
        await doing(self._store)
        return self._store.looked_at - before


def harness_of(kind, **limits):
    class Sabotaged(MemoryStoreHarness):
        facilities = MemoryStoreHarness.facilities | {"savepoints", "tables", "cost", "clock", "pids"}

        @asynccontextmanager
        async def database(self):
            yield Tables(kind)

    sabotaged = Sabotaged()
    sabotaged.limits = replace(MemoryStoreHarness.limits, **limits)
    return sabotaged


def failed_by(saboteur, ids, **limits):
    harness = harness_of(saboteur, **limits)
    results = [run_scenario(SCENARIOS[each], harness, seed=1) for each in ids]
    return {each.scenario.id for each in results if each.outcome == "FAIL"}


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda each: each.__name__)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_saboteur_is_caught(saboteur):
    """Of the parts of the catalogue that a saboteur names, exactly the named scenarios fail."""
    named = {*saboteur.caught_by}
    parts = {SCENARIOS[each].group for each in named}
    failed = failed_by(saboteur, [each.id for each in select() if each.group in parts], lag=0.5, scale=0.1, brief=0.015)

    assert named <= failed
    assert failed_by(saboteur, failed - named) == set(), "it passes with time"


def test_the_base_of_the_saboteurs_passes():
    results = run_suite(harness_of(Saboteur), select(), seed=1)

    assert {each.scenario.id: each.reason for each in results if each.outcome == "FAIL"} == {}
    assert {each.scenario.id for each in results if each.outcome == "NOT_RUN"} == FAULTS


def test_every_scenario_has_a_saboteur():
    caught = {id_ for saboteur in SABOTEURS for id_ in saboteur.caught_by}

    assert {*SCENARIOS} - FAULTS == caught


def test_every_saboteur_describes_its_mistake():
    assert all(saboteur.caught_by and saboteur.__doc__ for saboteur in SABOTEURS)
    assert len({saboteur.__name__ for saboteur in SABOTEURS}) == len(SABOTEURS)


def test_a_lost_connection_without_an_effect_is_caught():
    """A scenario with a fault checks that the fault had an effect."""

    class Inert(Tables):
        async def disconnect(self): ...

    class Calm(MemoryStoreHarness):
        facilities = MemoryStoreHarness.facilities | {"connections"}

        @asynccontextmanager
        async def database(self):
            yield Inert(Saboteur)

    assert run_scenario(SCENARIOS["STO-TXN-08"], Calm()).outcome == "FAIL"


def test_every_scenario_names_the_rule_that_it_proves():
    for id_ in SCENARIOS:
        rule = CONTRACT.rule_of(id_)
        assert rule.text, id_
        assert rule.place.split(",")[1].strip().startswith("diator/outbox/store.py"), id_
