"""The supervisor, with connections that do what the test scripts."""

import asyncio
import gc
import logging
import random
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile

import pytest

from diator.brokers.base import Delivery, Topic
from diator.brokers.supervisor import (
    MessagesMissed,
    ReconnectPolicy,
    ResilientSubscription,
    SubscriptionSettings,
    close_all,
)
from diator.exceptions import AccessRefused, BrokerClosed, BrokerUnavailable, ConfigurationError, MessageRejected
from tests.records import fields

PATIENT = ReconnectPolicy(connect_timeout=5, idle_timeout=5, probe_timeout=5, first_delay=0, max_delay=0)
#: Powers of two, so that the times are exact.
WATCHFUL = replace(PATIENT, idle_timeout=0.0625, probe_timeout=0.0625)
#: Within so many seconds of virtual time all work is finished that has nothing to wait for.
PROMPTLY = 0.25


def delivery(number):
    return Delivery(topic=Topic("event", "counted"), body=b"%d" % number, headers={}, attempt=1, settler=None)


class Link:
    """One connection. It receives what the test puts in, in that order; an error breaks it."""

    def __init__(self):
        self.arriving = []
        self.something = asyncio.Event()
        self.limits = []
        self.probes = 0
        self.on_probe = self.answer

    def put(self, *items):
        self.arriving += items
        self.something.set()

    async def answer(self):
        self.put(None)

    async def receive(self, limit):
        self.limits.append(limit)
        while not self.arriving:
            self.something.clear()
            await self.something.wait()
        if isinstance(self.arriving[0], BaseException):
            raise self.arriving[0]
        if self.arriving[0] is None:
            del self.arriving[0]
            return []
        taken = [*takewhile(lambda item: isinstance(item, int), self.arriving[:limit])]
        del self.arriving[: len(taken)]
        return [delivery(number) for number in taken]

    async def probe(self):
        self.probes += 1
        await self.on_probe()


class Service:
    """A service. Each attempt to connect takes one of *fates*: an error, a function to await, or None to succeed."""

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
        """Wait for a new connection."""
        self.connected.clear()
        async with asyncio.timeout(2):
            await self.connected.wait()
        return self.links[-1]

    async def flap(self, error=None):
        """Break the connection, and wait for the next one."""
        self.links[-1].put(error or ConnectionError("lost"))
        return await self.next_link()

    def supervised(self, kind=None, **options):
        defaults = {
            "group": None,
            "broker": "Fake",
            "prefetch": 10,
            "reconnect": PATIENT,
            "on_gap": None,
            "registry": self.registry,
        }
        defaults["topics"] = [Topic("notification_event", "Counted")]
        settings = {name: options.pop(name, default) for name, default in defaults.items()}
        return (kind or Subscription)(self, SubscriptionSettings(**settings), **{"lossy": True} | options)


class Subscription(ResilientSubscription):
    """The part that a transport writes: how it connects to the service, and what it does at the end."""

    def __init__(self, service, settings, leave=None, **options):
        super().__init__(settings, **options)
        self.service = service
        self.on_leave = leave

    def connect(self):
        return self.service.connection()

    async def leave(self, prefetched, /):
        if self.on_leave is not None:
            await self.on_leave(prefetched)


async def forever():
    await asyncio.Event().wait()


async def take(deliveries, count):
    async with asyncio.timeout(2):
        return [int((await anext(deliveries)).body) for _ in range(count)]


# -- the first connection --------------------------------------------------------------------------------------------


async def test_a_failed_first_connection_raises_at_once():
    """The error contains the error of the client library. There is no second attempt."""
    service, refused = Service(OSError("nobody there")), None

    with pytest.raises(BrokerUnavailable, match="OSError: nobody there") as raised:
        async with service.supervised():
            pass

    refused = raised.value.__cause__
    assert isinstance(refused, OSError)
    assert str(raised.value) == "the subscription to Counted cannot start (OSError: nobody there)"
    assert (len(service.attempts), service.live) == (1, 0)


@pytest.mark.parametrize(
    "error", [BrokerClosed("closed"), MessageRejected("no permission"), ConfigurationError("no quorum")]
)
async def test_an_error_of_diator_is_raised_unchanged(error):
    with pytest.raises(type(error)) as raised:
        async with Service(error).supervised():
            pass

    assert raised.value is error


async def test_a_first_connection_that_hangs_ends_at_its_timeout():
    service = Service(forever)

    async with asyncio.timeout(0.1 + PROMPTLY):
        with pytest.raises(BrokerUnavailable):
            async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.1)):
                pass

    assert service.live == 0


async def test_the_connect_timeout_does_not_limit_the_wait_for_messages():
    service = Service()
    async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.05)) as deliveries:
        await asyncio.sleep(0.15)
        service.links[0].put(1)

        assert await take(deliveries, 1) == [1]
    assert len(service.attempts) == 1


# -- reconnecting ----------------------------------------------------------------------------------------------------


async def test_received_deliveries_survive_their_connection():
    service = Service()
    async with service.supervised() as deliveries:
        service.links[0].put(1, 2)
        assert await take(deliveries, 1) == [1]
        service.links[0].put(3)
        (await service.flap()).put(4)

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
        for _ in range(2):
            await service.flap(OSError("gone"))
            await asyncio.sleep(0)

    told = [f"{named} has no connection (OSError: gone); reconnecting", f"{named} is reconnected"]
    assert caplog.messages == told * 2
    assert {record.name for record in caplog.records} == {"diator.brokers.supervisor"}
    of_all = {"broker": "Fake", "group": group, "message_names": sorted(names)}
    lost = {**of_all, "reason": "OSError: gone", "error_type": "OSError"}
    assert [*map(fields, caplog.records)] == [lost, of_all] * 2


async def test_there_is_one_connection_after_any_number_of_losses():
    refusals = [random.choice([None, OSError(), ValueError("not even its own error")]) for _ in range(50)]
    service = Service(None, *refusals)
    async with service.supervised() as deliveries:
        for number in range(50):
            (await service.flap()).put(number)
            assert await take(deliveries, 1) == [number]
            assert service.live == 1
        assert deliveries.reconnects == len(service.attempts) - 1

    assert (service.most_live, service.live) == (1, 0)


async def test_a_cancellation_by_the_client_library_counts_as_a_lost_connection():
    service = Service(None, asyncio.CancelledError(), None)
    async with service.supervised() as deliveries:
        service.links[0].put(1)
        assert await take(deliveries, 1) == [1]
        link = await service.flap(asyncio.CancelledError())
        link.put(2)
        assert await take(deliveries, 1) == [2]

    with pytest.raises(BrokerUnavailable):
        await Service(asyncio.CancelledError()).supervised().__aenter__()


async def test_an_error_while_closing_the_connection_does_not_end_the_subscription():
    service = Service()
    async with service.supervised() as deliveries:
        service.on_close = RuntimeError("the transport is closed")
        link = await service.flap()
        service.on_close = None
        link.put(1)

        assert await take(deliveries, 1) == [1]


async def test_reconnecting_that_hangs_is_tried_again_after_the_timeout():
    service = Service(None, forever, forever)
    async with service.supervised(reconnect=replace(PATIENT, connect_timeout=0.05)) as deliveries:
        (await service.flap()).put(1)

        assert await take(deliveries, 1) == [1]
    assert len(service.attempts) == 4


async def test_delays_grow_up_to_max_delay(monkeypatch):
    """The test makes each delay as long as possible; otherwise it is random."""
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    service = Service(None, *[OSError()] * 5)
    async with service.supervised(reconnect=replace(PATIENT, first_delay=0.02, max_delay=0.1)):
        await service.flap()

    delays = [later - earlier for earlier, later in pairwise(service.attempts)][1:]
    assert delays == pytest.approx([0.04, 0.08, 0.1, 0.1, 0.1])


async def test_delays_grow_if_connections_do_not_last(monkeypatch):
    """A service that accepts a connection and closes it counts like one that refuses connections."""
    failures = recorded_failures(monkeypatch)
    service = Service()
    async with service.supervised():
        for _ in range(4):
            await service.flap()

    assert failures == [0, 1, 2, 3]


async def test_the_backoff_starts_again_after_reset_after(monkeypatch):
    failures = recorded_failures(monkeypatch)
    service = Service(None, OSError(), OSError())
    async with service.supervised(reconnect=replace(PATIENT, reset_after=0.5)):
        await service.flap()
        await asyncio.sleep(0.5)
        await service.flap()
        await service.flap()

    assert failures == [0, 1, 2, 0, 1]


async def test_a_slow_failure_to_connect_does_not_reset_the_backoff(monkeypatch):
    """Only the time that a connection lived counts."""
    failures = recorded_failures(monkeypatch)

    async def fail_slowly():
        await asyncio.sleep(0.1)
        raise OSError

    service = Service(None, fail_slowly, fail_slowly)
    async with service.supervised(reconnect=replace(PATIENT, reset_after=0.05)):
        await service.flap()

    assert failures == [0, 1, 2]


def recorded_failures(monkeypatch):
    """Make every delay 0, and record the number of failures in a row."""
    recorded = []
    monkeypatch.setattr(ReconnectPolicy, "delay", lambda self, failures: recorded.append(failures) or 0)
    return recorded


def test_delays_are_random_below_their_limit():
    """Full jitter: clients that lost the same service do not return at the same moment."""
    reconnect = ReconnectPolicy(first_delay=0.1, max_delay=30)
    for failures, longest in [(0, 0.1), (3, 0.8), (8, 25.6), (9, 30), (10_000, 30)]:
        delays = [reconnect.delay(failures) for _ in range(1_000)]
        assert 0 <= min(delays) < longest * 0.1
        assert longest * 0.9 < max(delays) <= longest


@pytest.mark.parametrize(("limit", "longest"), [(1.5, 1.5), (60.0, 30.0)])
def test_a_delay_can_be_limited_further(limit, longest):
    policy = ReconnectPolicy(first_delay=0.5, max_delay=30.0)

    assert policy.capped(limit) == replace(policy, max_delay=longest)


# -- gaps ------------------------------------------------------------------------------------------------------------


async def test_each_loss_reports_one_gap():
    """From the loss to the new connection, with the first reason, however many attempts it took."""
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


@pytest.mark.real_time  # a gap has times of day
async def test_a_gap_lasts_until_the_next_connection():
    gaps = []

    async def slowly():
        await asyncio.sleep(0.1)
        assert gaps == []

    service = Service(None, slowly)
    async with service.supervised(on_gap=gaps.append):
        await service.flap()
        await asyncio.sleep(0)

    assert (gaps[0].until - gaps[0].since).total_seconds() >= 0.1


async def test_a_service_that_lost_messages_causes_a_gap_even_if_its_connections_lose_none():
    """The gap has the first reason. The next loss of a connection alone reports no gap."""
    gaps = []
    service = Service(None, MessagesMissed("and still gone"))
    async with service.supervised(lossy=False, on_gap=gaps.append):
        await service.flap(MessagesMissed("the queue is gone"))
        await asyncio.sleep(0)
        await service.flap(ConnectionError("cut"))
        await asyncio.sleep(0)

    assert [each.reason for each in gaps] == ["MessagesMissed: the queue is gone"]


async def test_removed_deliveries_are_never_handed_out():
    service = Service()
    async with service.supervised(lossy=False) as deliveries:
        service.links[0].put(1, 2, 3)
        assert await take(deliveries, 1) == [1]
        taken = deliveries.remove_prefetched()
        service.links[0].put(4)

        assert [int(each.body) for each in taken] == [2, 3]
        assert await take(deliveries, 1) == [4]


async def test_there_is_no_gap_if_nothing_is_missed():
    gaps = []
    service = Service()
    async with service.supervised(lossy=False, on_gap=gaps.append):
        await service.flap()
        await service.flap()

    assert gaps == []


async def test_on_gap_is_optional():
    service = Service()
    async with service.supervised(on_gap=None) as deliveries:
        (await service.flap()).put(1)

        assert await take(deliveries, 1) == [1]


async def test_a_gap_is_reported_before_the_messages_after_it():
    reported = []
    service = Service()
    service.prepare = lambda link: link.put(len(service.links))
    async with service.supervised(on_gap=lambda gap: reported.append("gap")) as deliveries:
        reported += await take(deliveries, 1)
        service.links[0].put(ConnectionError())
        reported += await take(deliveries, 1)

    assert reported == [0, "gap", 1]


async def test_an_error_in_on_gap_does_not_end_the_subscription(caplog):
    """It does not break the connection either."""
    reported = []

    def fail(gap):
        reported.append(gap)
        raise ValueError("a mistake in the program")

    service = Service()
    async with service.supervised(on_gap=fail) as deliveries:
        (await service.flap()).put(1)

        assert await take(deliveries, 1) == [1]
    assert (len(reported), len(service.attempts)) == (1, 2)
    assert caplog.messages[-1] == "on_gap failed"
    assert fields(caplog.records[-1]) == {"broker": "Fake", "group": None, "message_names": ["Counted"]}
    assert str(caplog.records[-1].exc_info[1]) == "a mistake in the program"


async def test_the_gap_of_a_dead_connection_begins_when_it_last_received():
    """Messages that were sent since then are lost, although nobody knew it at the time."""
    gaps = []
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, on_gap=gaps.append) as deliveries:
        service.links[0].on_probe = forever
        service.links[0].put(1)
        await take(deliveries, 1)
        last_received = datetime.now(UTC)
        await service.next_link()
        await asyncio.sleep(0)

    assert (gaps[0].since - last_received).total_seconds() < WATCHFUL.idle_timeout


async def test_the_gap_begins_with_the_last_probe_that_was_answered():
    """Silence proves nothing: a message may wait at a service, a link or a process that stands still."""
    gaps = []
    service = Service()
    async with service.supervised(reconnect=replace(WATCHFUL, idle_timeout=60), on_gap=gaps.append) as deliveries:
        [link] = service.links
        await asyncio.sleep(0.5)
        link.put(1)
        await asyncio.sleep(1)
        link.on_probe = send_without_answer
        link.put(2)
        await take(deliveries, 2)
        await asyncio.sleep(2)
        await service.flap()
        await asyncio.sleep(0)

    assert link.probes == 2
    assert (gaps[0].until - gaps[0].since).total_seconds() == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(("lossy", "probes"), [(True, 5), (False, 0)])
async def test_a_lossy_subscription_proves_every_second_that_it_has_missed_nothing(lossy, probes):
    """While nothing comes, too: a gap should not begin earlier than it must. Others are only probed in silence."""
    service = Service()
    async with service.supervised(lossy=lossy, reconnect=replace(PATIENT, idle_timeout=60)):
        await asyncio.sleep(5.5)

    assert service.links[0].probes == probes


# -- dead connections ------------------------------------------------------------------------------------------------


async def fail_to_send():
    raise OSError("broken pipe")


async def send_without_answer():
    pass


async def send_slowly():
    await asyncio.sleep(0.03125)


@pytest.mark.parametrize(
    ("on_probe", "after"),
    [(send_without_answer, 0.125), (send_slowly, 0.125), (forever, 0.125), (fail_to_send, 0.0625)],
)
async def test_a_silent_connection_is_probed_and_then_replaced(on_probe, after, caplog):
    caplog.set_level("DEBUG")
    service = Service()
    async with service.supervised(reconnect=WATCHFUL) as deliveries:
        [dead] = service.links
        dead.on_probe = on_probe
        await asyncio.sleep(WATCHFUL.idle_timeout / 2)
        dead.put(0)
        await take(deliveries, 1)
        started = asyncio.get_running_loop().time()
        link = await service.next_link()
        link.put(1)

        assert service.attempts[-1] - started == after
        assert await take(deliveries, 1) == [1]
    assert dead.probes == 1
    failed = "probing the connection failed: OSError('broken pipe')"
    assert caplog.messages.count(failed) == (on_probe is fail_to_send)


async def test_a_quiet_connection_that_answers_the_probe_is_kept():
    service = Service()
    async with service.supervised(reconnect=WATCHFUL):
        await asyncio.sleep(0.52)

    [link] = service.links
    assert 8 <= link.probes <= 10


async def test_a_busy_connection_is_not_probed():
    service = Service()
    async with service.supervised(reconnect=replace(WATCHFUL, idle_timeout=0.15), buffer_size=100) as deliveries:
        for number in range(20):
            await asyncio.sleep(0.02)
            service.links[0].put(number)
            await take(deliveries, 1)

    assert [link.probes for link in service.links] == [0]


async def test_a_slow_consumer_is_not_taken_for_a_dead_connection():
    """While the buffer is full nothing is received. Afterwards the connection is still used."""
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=2) as deliveries:
        [link] = service.links
        link.put(*range(6))
        for number in range(6):
            await asyncio.sleep(0.15 if number < 4 else 0)
            assert await take(deliveries, 1) == [number]

    assert service.links == [link]


async def test_a_connection_that_died_behind_a_slow_consumer_is_detected_afterwards():
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=2) as deliveries:
        service.links[0].on_probe = forever
        service.links[0].put(1, 2)
        await asyncio.sleep(0.2)
        assert len(service.links) == 1
        assert await take(deliveries, 2) == [1, 2]
        (await service.next_link()).put(3)

        assert await take(deliveries, 1) == [3]


# -- prefetched deliveries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3, 10])
async def test_at_most_buffer_size_deliveries_are_prefetched(prefetch):
    service = Service()
    async with service.supervised(prefetch=prefetch) as deliveries:
        [link] = service.links
        link.put(*range(100))
        for taken in range(0, 50, 5):
            await asyncio.sleep(0.01)
            assert len(link.arriving) == 100 - taken - prefetch
            assert await take(deliveries, 5) == [*range(taken, taken + 5)]
        assert await take(deliveries, 50) == [*range(50, 100)]

    assert 0 < min(link.limits) <= max(link.limits) <= prefetch


async def test_it_receives_again_when_the_buffer_is_half_empty():
    """So it receives many at a time. Until then the connection does not count as silent."""
    service = Service()
    async with service.supervised(reconnect=WATCHFUL, buffer_size=10) as deliveries:
        [link] = service.links
        link.on_probe = forever
        link.put(*range(30))
        assert await take(deliveries, 4) == [*range(4)]
        await asyncio.sleep(0.3)
        assert len(link.arriving) == 20

        assert await take(deliveries, 1) == [4]
        await asyncio.sleep(0.01)
        assert len(link.arriving) == 15

    assert service.links == [link]


async def test_waiting_for_more_keeps_no_delivery_alive():
    service, numbers = Service(), range(7_000, 7_008)  # no other test uses them
    async with service.supervised(prefetch=8) as deliveries:
        service.links[0].put(*numbers)
        assert await take(deliveries, 8) == [*numbers]
        await asyncio.sleep(PROMPTLY)
        gc.collect()
        alive = [each.body for each in gc.get_objects() if type(each) is Delivery]

    assert not {b"%d" % number for number in numbers}.intersection(alive)


async def test_the_buffer_is_bounded_over_all_connections():
    service = Service()
    service.prepare = lambda link: link.put(*range(2), ConnectionError())
    async with service.supervised(prefetch=5) as deliveries:
        await asyncio.sleep(0.05)

        assert len(deliveries._received) == 5
        assert await take(deliveries, 8) == [0, 1, 0, 1, 0, 1, 0, 1]


async def test_waiting_counts_from_the_first_delivery_that_is_there():
    """Not from the connection, nor from the last delivery."""
    service = Service()
    assert service.supervised().waiting == 0
    async with service.supervised() as deliveries:
        await asyncio.sleep(1)
        seen = [deliveries.waiting]
        for number in range(3):
            service.links[0].put(number)
            await asyncio.sleep(0.5)
            seen.append(deliveries.waiting)
        await take(deliveries, 3)
        seen.append(deliveries.waiting)
        service.links[0].put(3)
        await asyncio.sleep(0.25)
        seen.append(deliveries.waiting)

    assert seen == [0, 0.5, 1, 1.5, 0, 0.25]


async def test_cancelling_a_wait_loses_nothing():
    service, taken = Service(), []
    async with service.supervised(prefetch=3) as deliveries:

        async def send():
            for number in range(200):
                service.links[-1].put(number)
                await asyncio.sleep(random.choice([0, 0, 0.001]))

        sending = asyncio.create_task(send())
        async with asyncio.timeout(5):
            while len(taken) < 200:
                try:
                    async with asyncio.timeout(random.choice([0, 0.0002, 0.001])):
                        taken.append(int((await anext(deliveries)).body))
                except TimeoutError:
                    pass
        await sending

    assert taken == [*range(200)]


# -- the end ---------------------------------------------------------------------------------------------------------


async def connecting(service):
    service.fates = [forever]
    service.links[0].put(OSError())


async def receiving(service):
    pass


async def pausing(service):
    service.fates = [OSError()]
    service.links[0].put(OSError())


async def full(service):
    service.links[0].put(*range(100))


async def probing(service):
    service.links[0].on_probe = forever


@pytest.mark.parametrize("busy", [connecting, receiving, pausing, full, probing])
@pytest.mark.parametrize("raised", [None, ZeroDivisionError()])
async def test_the_end_is_prompt(monkeypatch, busy, raised):
    """Whatever it is doing. The error of the context is raised unchanged. A fixture checks that no task is left."""
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
    assert asyncio.get_running_loop().time() == ending
    assert service.live == 0


async def test_a_receive_that_swallows_its_first_cancellation_is_cancelled_again():
    service = Service()

    async def stubborn(limit):
        with suppress(asyncio.CancelledError):
            await forever()
        await forever()

    service.prepare = lambda link: setattr(link, "receive", stubborn)
    async with asyncio.timeout(PROMPTLY), service.supervised():
        await asyncio.sleep(0.01)

    assert service.live == 0


async def test_a_connection_that_closes_slowly_is_closed_completely():
    """Ending the subscription cancels the closing only once it takes so long that it would never end."""
    service, closed = Service(), []

    class Slow(Subscription):
        @asynccontextmanager
        async def connect(self):
            async with self.service.connection() as link:
                try:
                    yield link
                finally:
                    await asyncio.sleep(1.5 if not closed else 10)
                    closed.append(asyncio.get_running_loop().time())

    for _ in range(2):
        began = asyncio.get_running_loop().time()
        async with service.supervised(Slow):
            await asyncio.sleep(0.01)
        took = asyncio.get_running_loop().time() - began

    assert (len(closed), service.live) == (1, 0)
    assert 2 < took < 2.3


async def test_a_connection_that_is_given_up_while_it_opens_cleans_up_undisturbed():
    cleaned_up = []

    async def opening():
        try:
            await forever()
        finally:
            await asyncio.sleep(1)
            cleaned_up.append(True)

    service = Service(None, opening)
    async with service.supervised():
        service.links[0].put(OSError())
        await asyncio.sleep(0.1)

    assert cleaned_up == [True]


async def test_a_watcher_that_swallows_its_first_cancellation_is_cancelled_again():
    service = Service()

    async def stubborn():
        with suppress(asyncio.CancelledError):
            await forever()
        await forever()

    service.prepare = lambda link: setattr(link, "on_probe", stubborn)
    async with service.supervised(reconnect=replace(WATCHFUL, probe_timeout=60)):
        await asyncio.sleep(1)
        ending = asyncio.get_running_loop().time()

    assert asyncio.get_running_loop().time() - ending < PROMPTLY


async def test_a_watcher_that_ends_slowly_is_waited_for():
    """Otherwise it would go on without its connection."""
    service, ended = Service(), []

    async def slow():
        try:
            await forever()
        finally:
            for _ in range(5):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.3)
            ended.append("the watcher")

    service.prepare = lambda link: setattr(link, "on_probe", slow)
    async with service.supervised(reconnect=replace(WATCHFUL, probe_timeout=10)):
        await asyncio.sleep(1.5)
    ended.append("the subscription")

    assert ended == ["the watcher", "the subscription"]


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
async def test_an_error_that_reconnecting_cannot_fix_ends_the_iterator(error):
    """It is raised after the received deliveries, for a current wait and for every later one."""
    service = Service(None, OSError(), error)
    async with service.supervised() as deliveries:
        service.links[0].put(1, 2, ConnectionError())
        assert await take(deliveries, 2) == [1, 2]
        for _ in range(3):
            with pytest.raises(type(error)) as raised:
                await take(deliveries, 1)
            assert raised.value is error

    assert len(service.attempts) == 3


async def test_a_permission_that_is_refused_later_does_not_end_the_iterator():
    """A password or a permission may be changed while programs run, first here or first there."""
    service = Service(None, AccessRefused("a wrong password"), None)
    async with service.supervised() as deliveries:
        service.links[0].put(1, ConnectionError())
        assert await take(deliveries, 1) == [1]
        while len(service.links) < 2:  # noqa: ASYNC110  # nothing reports it
            await asyncio.sleep(0.1)
        service.links[1].put(2)
        assert await take(deliveries, 1) == [2]


async def test_connected_shows_whether_there_is_a_connection():
    """A health check reads it."""
    service = Service(None, forever)
    deliveries = service.supervised()
    assert deliveries.connected is False
    async with deliveries:
        assert deliveries.connected
        service.links[0].put(ConnectionError())
        while deliveries.connected:  # noqa: ASYNC110  # polls like a health check
            await asyncio.sleep(0)
        assert deliveries.connected is False
        assert len(service.attempts) <= 2


async def test_a_broker_that_is_closed_while_receiving_ends_the_iterator():
    service = Service()
    async with service.supervised() as deliveries:
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0.01)
        service.links[0].put(BrokerClosed("this broker is closed"))

        with pytest.raises(BrokerClosed):
            await waiting
    assert len(service.attempts) == 1


# -- leave -----------------------------------------------------------------------------------------------------------


class Leaving:
    """Records each call of `leave`: how many connections there are by then, and what was only prefetched."""

    def __init__(self, service):
        self.service = service
        self.calls = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, prefetched):
        self.calls.append((self.service.live, [int(each.body) for each in prefetched]))
        await self.may_end.wait()


async def test_leave_is_called_once_after_the_last_connection():
    """With the deliveries that were received and never handed out."""
    service = Service()
    leave = Leaving(service)
    async with service.supervised(leave=leave) as deliveries:
        service.links[0].put(1, 2, 3)
        await take(deliveries, 1)
        assert service.registry == {deliveries}

    assert leave.calls == [(0, [2, 3])]
    assert service.registry == set()


async def test_what_was_logged_too_often_is_counted_at_the_end_under_the_name_of_the_transport(caplog):
    async with Service().supervised() as deliveries:
        for _ in range(30):
            deliveries.lines.log(logging.WARNING, "a stale answer", "a stale answer")
        told = len(caplog.messages)

    assert {record.name for record in caplog.records} == {__name__}
    assert len(caplog.messages) == told + 1


async def test_a_subscription_can_be_closed_before_it_was_entered():
    service = Service()
    leave = Leaving(service)
    await service.supervised(leave=leave).aclose()

    assert leave.calls == [(0, [])]


@pytest.mark.parametrize("steps", [1, 5])
async def test_a_subscription_that_is_being_entered_ends_when_its_broker_is_closed(steps):
    """Before its task has begun to connect, and while it waits for the service."""
    service = Service(forever)
    entering = asyncio.create_task(service.supervised().__aenter__())
    for _ in range(steps):
        await asyncio.sleep(0)
    assert service.registry
    async with asyncio.timeout(PROMPTLY):
        await close_all(service.registry)
        with pytest.raises(BrokerClosed, match="this broker is closed"):
            await entering

    assert (service.live, service.registry) == (0, set())


async def test_leave_is_called_even_if_there_never_was_a_connection():
    service = Service(OSError())
    leave = Leaving(service)
    with pytest.raises(BrokerUnavailable):
        await service.supervised(leave=leave).__aenter__()

    assert leave.calls == [(0, [])]
    assert service.registry == set()


async def test_close_all_ends_the_subscriptions_of_a_broker():
    """Current and later waits raise `BrokerClosed`. Prefetched deliveries are never handed out. `leave` runs once."""
    service, other = Service(), Service()
    leave = Leaving(service)
    other.registry = service.registry
    async with service.supervised(leave=leave) as deliveries, other.supervised() as others:
        waiting = asyncio.create_task(take(others, 1))
        service.links[0].put(1, 2)
        await take(deliveries, 1)

        await close_all(service.registry)

        assert service.live == other.live == 0
        assert leave.calls == [(0, [2])]
        with pytest.raises(BrokerClosed):
            await waiting
        for _ in range(2):
            with pytest.raises(BrokerClosed) as closed:
                await take(deliveries, 1)
            assert str(closed.value) == "this broker is closed"
    assert len(leave.calls) == 1


async def test_a_subscription_that_cannot_leave_does_not_keep_the_others_from_it():
    service, other = Service(), Service()
    leave = Leaving(service)
    other.registry = service.registry

    async def fail(_):
        raise RuntimeError("cannot leave")

    deliveries = await service.supervised(leave=fail).__aenter__()
    async with other.supervised(leave=leave):
        await close_all(service.registry)
        assert len(leave.calls) == 1
    with pytest.raises(RuntimeError, match="cannot leave"):
        await deliveries.__aexit__(None, None, None)


async def test_leave_continues_if_the_end_of_the_context_is_cancelled():
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


async def test_after_the_end_the_iterator_is_exhausted():
    service = Service()
    async with service.supervised() as deliveries:
        service.links[0].put(1)
        await take(deliveries, 1)
        waiting = asyncio.create_task(anext(deliveries))
        await asyncio.sleep(0.01)
        assert not deliveries.is_ending

    assert deliveries.is_ending
    for asking in (waiting, anext(deliveries)):
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(1):
                await asking


# -- backpressure ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def full_subscription():
    """A subscription with a prefetch of 2 that has handed out two deliveries, and a task that waits for the third."""
    service = Service()
    async with service.supervised(prefetch=2, buffer_size=4) as deliveries:
        service.links[0].put(1, 2, 3, 4)
        await asyncio.sleep(0.01)
        deliveries.unsettled = 4
        assert await take(deliveries, 2) == [1, 2]
        waiting = asyncio.create_task(take(deliveries, 1))
        await asyncio.sleep(0.01)
        yield deliveries, waiting


async def test_at_most_prefetch_deliveries_are_handed_out_and_unsettled():
    async with full_subscription() as (deliveries, waiting):
        assert not waiting.done()

        deliveries.unsettled -= 1
        deliveries.notify_settled()
        assert await waiting == [3]


async def test_room_for_deliveries_that_the_program_does_not_wait_for():
    async with full_subscription() as (deliveries, waiting):
        deliveries.make_room(1)
        assert await waiting == [3]

        deliveries.make_room(0)
        deliveries.unsettled -= 1
        assert deliveries.receive_nowait() is None


async def test_a_postponed_delivery_takes_no_place():
    service = Service()
    async with service.supervised(prefetch=1, buffer_size=4) as deliveries:
        service.links[0].put(1, 2, 3, 4)
        await asyncio.sleep(0.01)
        deliveries.unsettled = 4
        first = await anext(deliveries)
        assert deliveries.receive_nowait() is None
        deliveries.postpone(first)
        assert await take(deliveries, 1) == [2]
        deliveries.make_room(1)
        assert await take(deliveries, 1) == [3]

        assert deliveries.resume(first)
        assert not deliveries.resume(first)
        deliveries.unsettled -= 1
        assert deliveries.receive_nowait() is None
        deliveries.unsettled -= 1
        assert await take(deliveries, 1) == [4]


async def test_postponed_deliveries_are_removed_with_the_prefetched_ones():
    service = Service()
    async with service.supervised(prefetch=4, buffer_size=4) as deliveries:
        service.links[0].put(1, 2, 3)
        await asyncio.sleep(0.01)
        first, second = [await anext(deliveries) for _ in range(2)]
        deliveries.postpone(first)
        deliveries.postpone(second)
        assert [each.body for each in deliveries.remove_prefetched(lambda each: each.body != b"1")] == [b"2", b"3"]
        assert (deliveries.resume(first), deliveries.resume(second)) == (True, False)


async def test_what_is_removed_leaves_room_for_as_many_as_before():
    """What was received only as well as what is postponed; the others stay, in their order."""
    service = Service()
    async with service.supervised(prefetch=3, buffer_size=8) as deliveries:
        service.links[0].put(*range(1, 9))
        await asyncio.sleep(0.01)
        deliveries.unsettled = 8
        first, second = [await anext(deliveries) for _ in range(2)]
        deliveries.postpone(first)
        deliveries.postpone(second)

        removed = deliveries.remove_prefetched(lambda each: each.body in {b"1", b"4", b"6"})
        deliveries.unsettled -= 3

        assert ([each.body for each in removed], deliveries.postponed) == ([b"1", b"4", b"6"], 1)
        assert [each.body for each in handed_out(deliveries)] == [b"3", b"5", b"7"]
        assert deliveries.resume(second)
        deliveries.unsettled -= 1
        assert handed_out(deliveries) == []
        deliveries.unsettled -= 1
        assert [each.body for each in handed_out(deliveries)] == [b"8"]


def handed_out(deliveries):
    """Take whatever may be handed out now."""
    return [*iter(deliveries.receive_nowait, None)]


async def test_postponed_deliveries_were_not_delivered_at_the_end():
    service, left = Service(), []

    async def leave(prefetched):
        left.extend(prefetched)

    async with service.supervised(prefetch=4, buffer_size=4, leave=leave) as deliveries:
        service.links[0].put(1, 2, 3)
        await asyncio.sleep(0.01)
        await anext(deliveries)
        deliveries.postpone(await anext(deliveries))

    assert [each.body for each in left] == [b"2", b"3"]


def test_a_prefetch_below_one_is_refused():
    with pytest.raises(ConfigurationError, match=r"^prefetch must be a whole number of at least 1"):
        Service().supervised(prefetch=0)


async def test_without_waiting_only_what_may_be_handed_out_is_received():
    service = Service()
    async with service.supervised(prefetch=2, buffer_size=4) as deliveries:
        assert deliveries.receive_nowait() is None
        service.links[0].put(1, 2, 3)
        await asyncio.sleep(0.01)
        deliveries.unsettled = 3

        assert [int(deliveries.receive_nowait().body) for _ in range(2)] == [1, 2]
        assert deliveries.receive_nowait() is None
        deliveries.unsettled -= 2
    assert deliveries.receive_nowait() is None
