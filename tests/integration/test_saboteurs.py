"""Tests of the conformance suite: it catches the defects that it is made for."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import ClassVar

import pytest

from diator.brokers.connecting import ClientConnection
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerUnavailable
from diator.testing.conformance import SCENARIOS, EnvironmentMissing, Limits, run_scenario, run_suite, select
from diator.testing.saboteurs import SABOTEURS, Saboteur
from diator.testing.saboteurs._base import subscription_of
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
            """Return a broker that shares its service with the other brokers of the scenario."""
            made = saboteur()
            return made.share_service(self.services.setdefault(asyncio.get_running_loop(), made))

        def full(self, room):
            return saboteur(capacity=room)

        def retaining(self, room):
            return saboteur(capacity=room)

        async def crash(self, transport):
            transport.crash()

    sabotaged = Sabotaged()
    sabotaged.limits = limits
    sabotaged.deviations = {}
    return sabotaged


@pytest.mark.parametrize(("saboteur", "id_"), PAIRS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_saboteur_is_caught(saboteur, id_):
    """Each saboteur fails the scenarios that it names."""
    hurried = Limits(scale=0.02, quiet=0.03, redelivery=0.3, lag=0.3, absence=0.3, standstill=2.0)

    result = run_scenario(SCENARIOS[id_], harness_of(saboteur, hurried), seed=1)

    assert (result.outcome, saboteur.__doc__) == ("FAIL", saboteur.__doc__)


def test_the_base_of_the_saboteurs_passes():
    """The base class has no defect except for the known deviations of the in-memory broker."""
    healthy = harness_of(Saboteur, MemoryHarness.limits)

    results = run_suite(healthy, [each for each in select() if each.level != "S"], seed=1)

    assert {result.scenario.id for result in results if result.outcome == "FAIL"} == {*MemoryHarness.deviations}


def test_every_scenario_has_a_saboteur():
    """Each core scenario and each scenario of a capability has a transport that fails it."""
    proved = {id_ for saboteur in SABOTEURS for id_ in saboteur.caught_by}

    assert {each.id for each in select() if each.level in "CX"} <= proved


class Inert:
    """A proxy and a service whose faults have no effect."""

    accepted = connections = clients = 1
    passed: ClassVar = Counter()
    lost: ClassVar = passed

    def withhold(self, *_): ...

    black_hole = refuse = reject = black_hole_existing = cut = reset = delay = cut_after = withhold

    async def heal(self): ...

    stop = kill = start = pause = resume = heal


class Bold(Saboteur):
    """Promises every capability that a scenario with faults may need."""

    @property
    def capabilities(self):
        redelivery = frozenset({"retry", "close", "crash", "deadline"})
        return replace(super().capabilities, durability="crash", redelivery=redelivery)


class Calm(MemoryHarness):
    """Offers every facility for faults, but no fault has an effect. Each process has its own service."""

    faults = frozenset({"proxy", "crash", "processes", "outages", "operator", "topology", "alarm", "security"})
    facilities = MemoryHarness.facilities | faults
    limits = Limits(scale=0.04, quiet=0.03, lag=0.3, timeout=0.5, liveness=0.5, recovery=0.5, max_delay=0.05)
    deviations: ClassVar = {}
    services: ClassVar = {}
    password = "never-used"
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
def test_a_fault_without_an_effect_fails_the_scenario(scenario):
    """A scenario with faults checks that the fault had an effect, so it fails in an environment without effects."""
    harness = Calm()
    harness.broker = Saboteur if scenario.id == "DUR-06" else Bold  # DUR-06 is for transports without durability

    assert run_scenario(scenario, harness, seed=1).outcome == "FAIL"


def test_every_scenario_with_faults_is_tried_without_them():
    """The test above covers every scenario with faults, except for scenarios that need only the service itself."""
    assert {each.id for each in select() if each.level == "F"} - {each.id for each in FAULTS} == {"SEC-09"}


class Outage(Inert):
    """A service that can be down and restarts with its data, or without it if it *forgets*."""

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
    """Raises `BrokerUnavailable` while the service is down."""

    outage = Outage(forgets=False)

    async def send_message(self, message, /):
        if self.outage.down:
            raise BrokerUnavailable("the service is down", message_id=message.message_id)
        await super().send_message(message)


def restarted(broker, *, forgets):
    """Return an environment whose service can be down, with transports of the class *broker*."""

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
def test_a_service_that_loses_its_data_is_caught(id_, forgets, outcome):
    """Here the fault has an effect, and more messages are lost than may be lost."""
    assert run_scenario(SCENARIOS[id_], restarted(Breakable, forgets=forgets), seed=1).outcome == outcome


@pytest.mark.parametrize("id_", ["FLT-05", "FLT-06"])
def test_a_gap_that_is_not_reported_is_caught(id_):
    """A transport that delivers at most once has to report when messages may be missing."""

    class Silent(Breakable):
        @property
        def capabilities(self):
            return replace(super().capabilities, guarantee="at_most_once")

    result = run_scenario(SCENARIOS[id_], restarted(Silent, forgets=False), seed=1)

    assert (result.outcome, "reported no gap" in result.reason) == ("FAIL", True)


class BadLink(Inert):
    """A link that stalls or resets, and knows the connections of the broker behind it."""

    def __init__(self):
        self.fault = None
        self.accepted = self.clients = 1  # the subscription has one, which knows no fault
        self.healed = asyncio.Event()

    def withhold(self, *_):
        self.fault = "stall"
        self.healed.clear()

    black_hole = withhold

    def reject(self):
        self.fault = "reject"

    def refuse(self):
        self.fault = "refuse"

    async def heal(self):
        self.fault = None
        self.healed.set()

    async def connect(self):
        """Open a connection, which is closed at once: nobody keeps one here."""
        self.accepted += self.fault != "refuse"
        self.clients += 1
        try:
            if self.fault == "stall":
                await self.healed.wait()
            elif self.fault:
                raise ConnectionError(self.fault)
        finally:
            self.clients -= 1


class Sharing(ClientConnection[None]):
    """Makes one attempt to connect at a time, for all callers."""

    link: BadLink

    async def open(self):
        await self.connect()

    async def connect(self):
        loop = self._bind_to_running_loop()
        attempts = self._attempts
        async with asyncio.timeout_at(loop.time() + self.timeout), self._lock:
            if self.link.fault:
                self._link = None
            await self._connected(attempts)

    async def _connect(self):
        await self.link.connect()
        return True

    async def _close(self):
        async with self._lock:
            await self._take_link()


class Storming(Sharing):
    """Each caller makes an attempt of its own."""

    async def connect(self):
        self._bind_to_running_loop()
        async with asyncio.timeout(self.timeout):
            await self.link.connect()


class Hurrying(Sharing):
    """Makes one attempt at a time, for as long as a caller waits, and the next one without a delay."""

    async def connect(self):
        self._bind_to_running_loop()
        async with asyncio.timeout(self.timeout), self._lock:
            await self.link.connect()


def behind_a_bad_link(kind):
    link = BadLink()
    policy = ReconnectPolicy(connect_timeout=0.5, first_delay=0.01, max_delay=0.2)

    class Broker(Bold):
        def __init__(self, **options):
            super().__init__(**options)
            self.connection = kind("a bad link", timeout=0.5, reconnect=policy)
            self.connection.link = link

        async def send_message(self, message, /):
            try:
                await self.connection.connect()
            except OSError as error:
                raise BrokerUnavailable("no connection", message_id=message.message_id) from error
            await super().send_message(message)

        async def aclose(self):
            await self.connection.aclose()
            await super().aclose()

    class Behind(Calm):
        broker = Broker
        limits = replace(Calm.limits, scale=1.0, max_delay=0.2)

        @asynccontextmanager
        async def proxied(self):
            yield link

    return Behind()


@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [(Sharing, ("PASS", "PASS")), (Storming, ("FAIL", "FAIL")), (Hurrying, ("FAIL", "FAIL"))],
)
def test_a_storm_of_connections_is_caught(kind, outcomes):
    results = [run_scenario(SCENARIOS[id_], behind_a_bad_link(kind), seed=1) for id_ in ("FLT-23", "FLT-24")]

    assert tuple(result.outcome for result in results) == outcomes, [result.reason for result in results]


class Resetting(Inert):
    """A link whose resets make the service charge attempts to everything that it had sent."""

    def __init__(self, charged):
        self.accepted = 1
        self.charged = charged
        self.brokers = []

    def reset(self):
        self.accepted += 1
        for queue in {id(queue): queue for broker in self.brokers for queue in broker._queues}.values():
            for entry in queue.waiting:
                entry.attempt += self.charged


@pytest.mark.parametrize(("charged", "outcome"), [(0, "PASS"), (1, "FAIL")])
def test_a_count_of_what_was_not_handed_out_is_caught(charged, outcome):
    class Flapping(Calm):
        link = Resetting(charged)

        @asynccontextmanager
        async def proxied(self):
            yield self.link

        def transport(self):
            self.link.brokers.append(super().transport())
            return self.link.brokers[-1]

    result = run_scenario(SCENARIOS["ACK-27"], Flapping(), seed=1)

    assert result.outcome == outcome, result.reason
    assert outcome == "PASS" or "only the first was handed out" in result.reason


@pytest.mark.parametrize(("lost", "outcome"), [(False, "PASS"), (True, "FAIL")])
def test_a_message_that_is_lost_with_its_acknowledgement_is_caught(lost, outcome):
    class Broken(Inert):
        def __init__(self):
            self.accepted, self.subscriptions, self.held = 1, [], set()

        def reset(self):
            self.accepted += 1
            self.held.update(*(subscription.unsettled for subscription in self.subscriptions))

    class Losing(Bold):
        async def on_subscribed(self, subscription, topics):
            self.link.subscriptions.append(subscription)

        async def ack(self, settle, delivery):
            if delivery not in self.link.held:
                return await super().ack(settle, delivery)
            if lost:
                subscription_of(settle).unsettled.pop(delivery)
            raise BrokerUnavailable("the connection of this delivery is lost")

    class Behind(Calm):
        broker = Losing
        limits = replace(Calm.limits, scale=1.0, redelivery=0.5)

        @asynccontextmanager
        async def proxied(self):
            yield Losing.link

    Losing.link = Broken()
    result = run_scenario(SCENARIOS["ACK-07"], Behind(), seed=1)

    assert result.outcome == outcome, result.reason
    assert outcome == "PASS" or "the redelivery of what could not be acknowledged" in result.reason


def test_every_saboteur_describes_its_defect():
    assert all(saboteur.caught_by and saboteur.__doc__ for saboteur in SABOTEURS)
    assert len({saboteur.__name__ for saboteur in SABOTEURS}) == len(SABOTEURS)


def test_a_missing_environment_proves_nothing():
    """A run without its service passes nothing."""

    class Absent(MemoryHarness):
        def start(self):
            raise EnvironmentMissing("no service")

    assert {result.outcome for result in run_suite(Absent(), select())} == {"NOT_RUN"}
