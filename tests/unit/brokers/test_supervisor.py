"""The supervisor, over connections that do what the test says."""

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile

import pytest

from diator.brokers.base import Delivery, Topic
from diator.brokers.supervisor import MessagesMissed, ReconnectPolicy, ResilientSubscription, close_all
from diator.exceptions import BrokerClosed, BrokerUnavailable, ConfigurationError, MessageRejected

PATIENT = ReconnectPolicy(connect_timeout=5, idle_timeout=5, probe_timeout=5, first_delay=0, max_delay=0)
WATCHFUL = replace(PATIENT, idle_timeout=0.05, probe_timeout=0.05)
PROMPTLY = 0.25
"""Seconds in which a busy machine does what has nothing to wait for."""


def delivery(number):
    return Delivery(topic=Topic("event", "counted"), body=b"%d" % number, headers={}, attempt=1, settler=None)


class Link:
    """One connection. What it is told arrives, in that order; an error ends it."""

    def __init__(self):
        self.arriving = []
        self.something = asyncio.Event()
        self.asked_for = []
        self.probes = 0
        self.on_probe = self.answer

    def tell(self, *what):
        self.arriving += what
        self.something.set()

    async def answer(self):
        self.tell(None)

    async def receive(self, most):
        self.asked_for.append(most)
        while not self.arriving:
            self.something.clear()
            await self.something.wait()
        if isinstance(self.arriving[0], BaseException):
            raise self.arriving[0]
        if self.arriving[0] is None:
            del self.arriving[0]
            return []
        taken = [*takewhile(lambda what: isinstance(what, int), self.arriving[:most])]
        del self.arriving[: len(taken)]
        return [delivery(number) for number in taken]

    async def probe(self):
        self.probes += 1
        await self.on_probe()


class Service:
    """What is connected to. Each attempt takes one of *fates*: an error, a function to await, or None to succeed."""

    def __init__(self, *fates):
        self.fates = [*fates]
        self.links = []
        self.attempts = []
        self.live = self.most_live = 0
        self.connected = asyncio.Event()
        self.on_close = None
        self.prepare = lambda link: None
        self.registry = set()

    @asynccontextmanager
    async def connection(self):
        self.attempts.append(asyncio.get_running_loop().time())
        self.live += 1
        self.most_live = max(self.live, self.most_live)
        try:
            fate = self.fates.pop(0) if self.fates else None
            if isinstance(fate, BaseException):
                raise fate
            if fate is not None:
                await fate()
            link = Link()
            self.prepare(link)
            self.links.append(link)
            self.connected.set()
            yield link
        finally:
            self.live -= 1
            if self.on_close is not None:
                raise self.on_close

    async def next_link(self):
        """Wait for a connection that was not there when this was asked."""
        self.connected.clear()
        async with asyncio.timeout(2):
            await self.connected.wait()
        return self.links[-1]

    async def flap(self, error=None):
        """Lose the connection, and wait for the next."""
        self.links[-1].tell(error or ConnectionError("lost"))
        return await self.next_link()

    def supervised(self, **options):
        defaults = {"lossy": True, "prefetch": 10, "reconnect": PATIENT, "on_gap": None, "registry": self.registry}
        topics = options.pop("topics", [Topic("notification_event", "Counted")])
        return Subscription(self, topics, options.pop("group", None), **defaults | options)


class Subscription(ResilientSubscription):
    """What a transport would write: how it connects to the service, and what it does when it leaves."""

    def __init__(self, service, *arguments, leave=None, **options):
        super().__init__(*arguments, **options)
        self.service = service
        self.on_leave = leave

    def connect(self):
        return self.service.connection()

    async def leave(self, not_given_out):
        if self.on_leave is not None:
            await self.on_leave(not_given_out)


async def forever():
    await asyncio.Event().wait()


async def take(deliveries, count):
    async with asyncio.timeout(2):
        return [int((await anext(deliveries)).body) for _ in range(count)]


# -- the first connection --------------------------------------------------------------------------------------------


async def test_a_first_connection_that_fails():
    """It is told at once, with what the client library said; nobody tries again behind the caller's back."""
    service, refused = Service(OSError("nobody there")), None

    with pytest.raises(BrokerUnavailable, match="OSError: nobody there") as raised:
        async with service.supervised():
            pass

    refused = raised.value.__cause__
    assert isinstance(refused, OSError)
    assert (len(service.attempts), service.live) == (1, 0)


@pytest.mark.parametrize(
    "error", [BrokerClosed("closed"), MessageRejected("no permission"), ConfigurationError("no quorum")]
)
async def test_an_error_of_ours_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        async with Service(error).supervised():
            pass

    assert raised.value is error


async def test_a_first_connection_that_never_comes():
    service = Service(forever)

    async with asyncio.timeout(0.1 + PROMPTLY):
        with pytest.raises(BrokerUnavailable):
            async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.1)):
                pass

    assert service.live == 0


async def test_patience_with_a_connection_is_none_with_messages():
    """Once it is there, the time for connecting is over and done with."""
    service = Service()
    async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.05)) as deliveries:
        await asyncio.sleep(0.15)
        service.links[0].tell(1)

        assert await take(deliveries, 1) == [1]
    assert len(service.attempts) == 1


# -- again and again -------------------------------------------------------------------------------------------------


async def test_what_was_received_survives_the_connection():
    service = Service()
    async with service.supervised() as deliveries:
        service.links[0].tell(1, 2)
        assert await take(deliveries, 1) == [1]
        service.links[0].tell(3)
        (await service.flap()).tell(4)

        assert await take(deliveries, 3) == [2, 3, 4]


@pytest.mark.parametrize(
    ("names", "group", "named"),
    [
        (["Paid"], None, "the subscription to Paid"),
        (["Paid", "Joined"], "billing", "the subscription of billing to Joined, Paid"),
        (["A", "B", "C", "D", "E"], "billing", "the subscription of billing to A, B, C and 2 more"),
    ],
)
async def test_logs_name_the_subscription_that_lost_its_connection(names, group, named, caplog):
    caplog.set_level("INFO")
    service = Service()
    async with service.supervised(topics=[Topic("notification_event", name) for name in names], group=group):
        await service.flap(OSError("gone"))
        await asyncio.sleep(0)

    assert f"{named} has no connection (OSError: gone); reconnecting" in caplog.messages
    assert f"{named} is reconnected" in caplog.messages


async def test_one_connection_after_any_number_of_flaps():
    refusals = [random.choice([None, OSError(), ValueError("not even its own error")]) for _ in range(50)]
    service = Service(None, *refusals)
    async with service.supervised() as deliveries:
        for number in range(50):
            (await service.flap()).tell(number)
            assert await take(deliveries, 1) == [number]
            assert service.live == 1

    assert (service.most_live, service.live) == (1, 0)


async def test_a_client_library_that_cancels_what_is_its_own():
    """Nobody has cancelled the subscription: it is a connection that is lost, or not to be had."""
    service = Service(None, asyncio.CancelledError(), None)
    async with service.supervised() as deliveries:
        service.links[0].tell(1)
        assert await take(deliveries, 1) == [1]
        link = await service.flap(asyncio.CancelledError())
        link.tell(2)
        assert await take(deliveries, 1) == [2]

    with pytest.raises(BrokerUnavailable):
        await Service(asyncio.CancelledError()).supervised().__aenter__()


async def test_a_connection_whose_closing_fails():
    service = Service()
    async with service.supervised() as deliveries:
        service.on_close = RuntimeError("the transport is closed")
        link = await service.flap()
        service.on_close = None
        link.tell(1)

        assert await take(deliveries, 1) == [1]


async def test_connecting_again_that_never_comes_is_given_up_and_tried_again():
    service = Service(None, forever, forever)
    async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.05)) as deliveries:
        (await service.flap()).tell(1)

        assert await take(deliveries, 1) == [1]
    assert len(service.attempts) == 4


async def test_pauses_grow_up_to_a_limit(monkeypatch):
    """The longest of each, for the test; in life they are anywhere below."""
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    service = Service(None, *[OSError()] * 5)
    async with service.supervised(reconnect=replace(PATIENT, first_delay=0.02, max_delay=0.1)):
        await service.flap()

    pauses = [later - earlier for earlier, later in pairwise(service.attempts)][1:]
    for pause, expected in zip(pauses, [0.04, 0.08, 0.1, 0.1, 0.1], strict=True):
        assert expected * 0.9 < pause < expected + 0.08


async def test_pauses_grow_with_connections_that_do_not_last(monkeypatch):
    """A service that accepts and hangs up is in as much trouble as one that refuses."""
    asked = noted_pauses(monkeypatch)
    service = Service()
    async with service.supervised():
        for _ in range(4):
            await service.flap()

    assert asked == [0, 1, 2, 3]


async def test_pauses_begin_anew_after_a_healthy_time(monkeypatch):
    asked = noted_pauses(monkeypatch)
    service = Service(None, OSError(), OSError())
    async with service.supervised(reconnect=replace(PATIENT, reset_after=0.1)):
        await service.flap()
        await asyncio.sleep(0.15)
        await service.flap()
        await service.flap()

    assert asked == [0, 1, 2, 0, 1]


async def test_a_service_that_was_away_for_long_is_not_a_healthy_connection(monkeypatch):
    """What counts is how long a connection lived, not how long it took to fail."""
    asked = noted_pauses(monkeypatch)

    async def fail_slowly():
        await asyncio.sleep(0.1)
        raise OSError

    service = Service(None, fail_slowly, fail_slowly)
    async with service.supervised(reconnect=replace(PATIENT, reset_after=0.05)):
        await service.flap()

    assert asked == [0, 1, 2]


def noted_pauses(monkeypatch):
    """Pause for no time, and note for the how-manieth failure in a row."""
    asked = []
    monkeypatch.setattr(ReconnectPolicy, "delay", lambda self, failures: asked.append(failures) or 0)
    return asked


def test_pauses_are_anywhere_below_their_limit():
    """Full jitter: who lost the same service does not come back at the same moment."""
    reconnect = ReconnectPolicy(first_delay=0.1, max_delay=30)
    for failures, longest in [(0, 0.1), (3, 0.8), (8, 25.6), (9, 30), (10_000, 30)]:
        pauses = [reconnect.delay(failures) for _ in range(1_000)]
        assert 0 <= min(pauses) < longest * 0.1
        assert longest * 0.9 < max(pauses) <= longest


# -- gaps ------------------------------------------------------------------------------------------------------------


async def test_a_gap_is_told_once_a_loss():
    """However many attempts it took, from the first loss to the new connection, with the first reason."""
    gaps = []
    service = Service(None, *[OSError("not yet")] * 3)
    before = datetime.now(UTC)
    async with service.supervised(on_gap=gaps.append):
        await service.flap(ConnectionError("cut"))
        await asyncio.sleep(0)
        [gap] = gaps
        await service.flap(ConnectionError("cut again"))
        await asyncio.sleep(0)

    assert before - timedelta(seconds=0.05) <= gap.since <= gap.until <= datetime.now(UTC)
    assert [each.reason for each in gaps] == ["ConnectionError: cut", "ConnectionError: cut again"]
    assert gaps[1].since >= gap.since


async def test_the_gap_lasts_until_there_is_a_connection():
    gaps = []

    async def slowly():
        await asyncio.sleep(0.1)
        assert gaps == []

    service = Service(None, slowly)
    async with service.supervised(on_gap=gaps.append):
        await service.flap()
        await asyncio.sleep(0)

    assert 0.1 <= (gaps[0].until - gaps[0].since).total_seconds() < 0.1 + PROMPTLY


async def test_a_gap_where_a_service_has_lost_messages_though_its_connections_lose_none():
    """It is told with the first reason, and the next loss of a connection alone is none again."""
    gaps = []
    service = Service(None, MessagesMissed("and still gone"))
    async with service.supervised(lossy=False, on_gap=gaps.append):
        await service.flap(MessagesMissed("the queue is gone"))
        await asyncio.sleep(0)
        await service.flap(ConnectionError("cut"))
        await asyncio.sleep(0)

    assert [each.reason for each in gaps] == ["MessagesMissed: the queue is gone"]


async def test_what_is_taken_back_is_given_to_nobody():
    service = Service()
    async with service.supervised(lossy=False) as deliveries:
        service.links[0].tell(1, 2, 3)
        assert await take(deliveries, 1) == [1]
        taken = deliveries.remove_prefetched()
        service.links[0].tell(4)

        assert [int(each.body) for each in taken] == [2, 3]
        assert await take(deliveries, 1) == [4]


async def test_no_gap_where_nothing_is_missed():
    gaps = []
    service = Service()
    async with service.supervised(lossy=False, on_gap=gaps.append):
        await service.flap()
        await service.flap()

    assert gaps == []


async def test_a_gap_that_nobody_wants_to_know_of():
    service = Service()
    async with service.supervised(on_gap=None) as deliveries:
        (await service.flap()).tell(1)

        assert await take(deliveries, 1) == [1]


async def test_a_gap_is_told_before_what_comes_after_it():
    told = []
    service = Service()
    service.prepare = lambda link: link.tell(len(service.links))
    async with service.supervised(on_gap=lambda gap: told.append("gap")) as deliveries:
        told += await take(deliveries, 1)
        service.links[0].tell(ConnectionError())
        told += await take(deliveries, 1)

    assert told == [0, "gap", 1]


async def test_who_cannot_hear_of_a_gap_does_not_end_the_subscription():
    """A program's mistake in *on_gap* costs no connection, and certainly not every further one."""
    told = []

    def fail(gap):
        told.append(gap)
        raise ValueError("a mistake of the program's")

    service = Service()
    async with service.supervised(on_gap=fail) as deliveries:
        (await service.flap()).tell(1)

        assert await take(deliveries, 1) == [1]
    assert (len(told), len(service.attempts)) == (1, 2)


async def test_the_gap_of_a_dead_peer_begins_when_it_was_last_heard():
    """What it sent since then is lost, although nobody knew."""
    gaps = []
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, on_gap=gaps.append) as deliveries:
        service.links[0].on_probe = forever
        service.links[0].tell(1)
        await take(deliveries, 1)
        heard = datetime.now(UTC)
        await service.next_link()
        await asyncio.sleep(0)

    assert (gaps[0].since - heard).total_seconds() < WATCHFUL.idle_timeout


# -- silence ---------------------------------------------------------------------------------------------------------


async def fail_to_ask():
    raise OSError("broken pipe")


async def ask_in_vain():
    pass


@pytest.mark.parametrize(("on_probe", "after"), [(ask_in_vain, 0.1), (forever, 0.1), (fail_to_ask, 0.05)])
async def test_a_silent_peer_is_asked_and_then_given_up(on_probe, after):
    service = Service()
    async with service.supervised(reconnect=WATCHFUL) as deliveries:
        [dead] = service.links
        dead.on_probe = on_probe
        started = asyncio.get_running_loop().time()
        link = await service.next_link()
        link.tell(1)

        assert after * 0.9 < service.attempts[-1] - started < after + PROMPTLY
        assert await take(deliveries, 1) == [1]
    assert dead.probes == 1


async def test_a_quiet_peer_that_answers_is_alive():
    service = Service()
    async with service.supervised(reconnect=WATCHFUL):
        await asyncio.sleep(0.5)

    [link] = service.links
    assert 3 <= link.probes <= 10


async def test_a_busy_peer_is_not_asked():
    service = Service()
    async with service.supervised(reconnect=replace(WATCHFUL, idle_timeout=0.15), buffer_size=100) as deliveries:
        for number in range(20):
            await asyncio.sleep(0.02)
            service.links[0].tell(number)
            await take(deliveries, 1)

    assert [link.probes for link in service.links] == [0]


async def test_a_slow_consumer_is_not_taken_for_a_silent_peer():
    """Nobody listens while there is no room; then the connection is as good as before."""
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=2) as deliveries:
        [link] = service.links
        link.tell(*range(6))
        for number in range(6):
            await asyncio.sleep(0.15 if number < 4 else 0)
            assert await take(deliveries, 1) == [number]

    assert service.links == [link]


async def test_a_peer_that_died_behind_a_slow_consumer_is_noticed_afterwards():
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=2) as deliveries:
        service.links[0].on_probe = forever
        service.links[0].tell(1, 2)
        await asyncio.sleep(0.2)
        assert len(service.links) == 1
        assert await take(deliveries, 2) == [1, 2]
        (await service.next_link()).tell(3)

        assert await take(deliveries, 1) == [3]


# -- what is held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3, 10])
async def test_no_more_is_prefetched_than_was_allowed(prefetch):
    service = Service()
    async with service.supervised(prefetch=prefetch) as deliveries:
        [link] = service.links
        link.tell(*range(100))
        for taken in range(0, 50, 5):
            await asyncio.sleep(0.01)
            assert len(link.arriving) == 100 - taken - prefetch
            assert await take(deliveries, 5) == [*range(taken, taken + 5)]
        assert await take(deliveries, 50) == [*range(50, 100)]

    assert 0 < min(link.asked_for) <= max(link.asked_for) <= prefetch


async def test_it_receives_again_when_half_is_gone():
    """Many at a time, and not each by itself. Until then nobody listens, and no peer is taken for a silent one."""
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=10) as deliveries:
        [link] = service.links
        link.on_probe = forever
        link.tell(*range(30))
        assert await take(deliveries, 4) == [*range(4)]
        await asyncio.sleep(0.3)
        assert len(link.arriving) == 20

        assert await take(deliveries, 1) == [4]
        await asyncio.sleep(0.01)
        assert len(link.arriving) == 15

    assert service.links == [link]


async def test_prefetching_is_bounded_over_all_connections():
    service = Service()
    service.prepare = lambda link: link.tell(*range(2), ConnectionError())
    async with service.supervised(prefetch=5) as deliveries:
        await asyncio.sleep(0.05)

        assert len(deliveries._received) == 5
        assert await take(deliveries, 8) == [0, 1, 0, 1, 0, 1, 0, 1]


async def test_cancelling_a_wait_loses_nothing():
    service, taken = Service(), []
    async with service.supervised(prefetch=3) as deliveries:

        async def tell():
            for number in range(200):
                service.links[-1].tell(number)
                await asyncio.sleep(random.choice([0, 0, 0.001]))

        telling = asyncio.create_task(tell())
        async with asyncio.timeout(5):
            while len(taken) < 200:
                try:
                    async with asyncio.timeout(random.choice([0, 0.0002, 0.001])):
                        taken.append(int((await anext(deliveries)).body))
                except TimeoutError:
                    pass
        await telling

    assert taken == [*range(200)]


# -- the end ---------------------------------------------------------------------------------------------------------


async def connecting(service):
    service.fates = [forever]
    service.links[0].tell(OSError())


async def receiving(service):
    pass


async def pausing(service):
    service.fates = [OSError()]
    service.links[0].tell(OSError())


async def full(service):
    service.links[0].tell(*range(100))


async def probing(service):
    service.links[0].on_probe = forever


@pytest.mark.parametrize("busy", [connecting, receiving, pausing, full, probing])
@pytest.mark.parametrize("raised", [None, ZeroDivisionError()])
async def test_the_end_is_prompt(monkeypatch, busy, raised):
    """Whatever it is doing; what ended it goes on as it was. That no task is left is a fixture's to see."""
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    service = Service()
    reconnect = ReconnectPolicy(connect_timeout=60, idle_timeout=0.02, probe_timeout=60, first_delay=60, max_delay=60)
    error = None
    try:
        async with service.supervised(reconnect=reconnect):
            await busy(service)
            await asyncio.sleep(0.1)
            ending = asyncio.get_running_loop().time()
            if raised is not None:
                raise raised
    except ZeroDivisionError as caught:
        error = caught

    assert error is raised
    assert asyncio.get_running_loop().time() - ending < PROMPTLY
    assert service.live == 0


async def test_entering_can_be_cancelled():
    service = Service(forever)
    entering = asyncio.create_task(service.supervised().__aenter__())
    await asyncio.sleep(0.02)

    entering.cancel()
    async with asyncio.timeout(PROMPTLY):
        await asyncio.wait([entering])

    assert entering.cancelled()
    assert service.live == 0


@pytest.mark.parametrize("error", [BrokerClosed("this broker is closed"), ConfigurationError("a classic queue")])
async def test_what_does_not_come_right_by_itself_ends_the_iterator(error):
    """After what was received; for those who wait, and for those who come later."""
    service = Service(None, OSError(), error)
    async with service.supervised() as deliveries:
        service.links[0].tell(1, 2, ConnectionError())
        assert await take(deliveries, 2) == [1, 2]
        for _ in range(3):
            with pytest.raises(type(error)) as raised:
                await take(deliveries, 1)
            assert raised.value is error

    assert len(service.attempts) == 3


async def test_it_tells_whether_it_is_connected():
    """A health check asks it."""
    service = Service(None, forever)
    async with service.supervised() as deliveries:
        assert deliveries.connected
        service.links[0].tell(ConnectionError())
        while deliveries.connected:  # noqa: ASYNC110  # it is asked, as by a health check
            await asyncio.sleep(0)
        assert len(service.attempts) <= 2


async def test_a_broker_that_is_closed_while_receiving_ends_the_iterator():
    service = Service()
    async with service.supervised() as deliveries:
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0.01)
        service.links[0].tell(BrokerClosed("this broker is closed"))

        with pytest.raises(BrokerClosed):
            await waiting
    assert len(service.attempts) == 1


# -- leaving ---------------------------------------------------------------------------------------------------------


class Leaving:
    """What a transport does at the end: notes who is connected by then, and what nobody has seen."""

    def __init__(self, service):
        self.service = service
        self.calls = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, not_given_out):
        self.calls.append((self.service.live, [int(each.body) for each in not_given_out]))
        await self.may_end.wait()


async def test_the_transport_leaves_after_the_last_connection():
    """Once, with what was received and given to nobody."""
    service = Service()
    leave = Leaving(service)
    async with service.supervised(leave=leave) as deliveries:
        service.links[0].tell(1, 2, 3)
        await take(deliveries, 1)
        assert service.registry == {deliveries}

    assert leave.calls == [(0, [2, 3])]
    assert service.registry == set()


async def test_a_transport_that_never_was_connected_leaves_too():
    service = Service(OSError())
    leave = Leaving(service)
    with pytest.raises(BrokerUnavailable):
        await service.supervised(leave=leave).__aenter__()

    assert leave.calls == [(0, [])]
    assert service.registry == set()


async def test_a_broker_ends_its_subscriptions():
    """Those who wait hear it, and those who come later; what was received is given to nobody, and it leaves once."""
    service, other = Service(), Service()
    leave = Leaving(service)
    other.registry = service.registry
    async with service.supervised(leave=leave) as deliveries, other.supervised() as others:
        waiting = asyncio.create_task(take(others, 1))
        service.links[0].tell(1, 2)
        await take(deliveries, 1)

        await close_all(service.registry)

        assert service.live == other.live == 0
        assert leave.calls == [(0, [2])]
        with pytest.raises(BrokerClosed):
            await waiting
        for _ in range(2):
            with pytest.raises(BrokerClosed):
                await take(deliveries, 1)
    assert len(leave.calls) == 1


async def test_leaving_goes_on_when_who_ended_it_is_cancelled():
    service = Service()
    leave = Leaving(service)
    leave.may_end.clear()
    deliveries = await service.supervised(leave=leave).__aenter__()
    ending = asyncio.create_task(deliveries.__aexit__(None, None, None))
    await asyncio.sleep(0.01)
    ending.cancel()
    await asyncio.wait([ending])
    again = asyncio.create_task(deliveries.aclose())
    await asyncio.sleep(0.01)
    assert not again.done()

    leave.may_end.set()
    await again
    assert len(leave.calls) == 1


async def test_what_asks_after_the_end_is_told_that_there_is_no_more():
    service = Service()
    async with service.supervised() as deliveries:
        service.links[0].tell(1)
        await take(deliveries, 1)
        waiting = asyncio.create_task(anext(deliveries))
        await asyncio.sleep(0.01)

    for asking in (waiting, anext(deliveries)):
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(1):
                await asking


# -- holding back ----------------------------------------------------------------------------------------------------


async def test_no_more_than_prefetch_are_given_out_and_not_settled():
    service = Service()
    async with service.supervised(prefetch=2, buffer_size=4) as deliveries:
        service.links[0].tell(1, 2, 3, 4)
        await asyncio.sleep(0.01)
        deliveries.unsettled = 4
        assert await take(deliveries, 2) == [1, 2]
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0.01)
        assert not waiting.done()

        deliveries.unsettled -= 1
        deliveries.notify_settled()
        assert await waiting == [3]


def test_prefetch_is_at_least_one():
    with pytest.raises(ConfigurationError, match="prefetch"):
        Service().supervised(prefetch=0)
