"""Each way in which a consumer makes no progress shows in its health, and an idle consumer shows nothing."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from diator.brokers.base import Delivery
from diator.brokers.supervisor import ReconnectPolicy, ResilientSubscription, SubscriptionSettings
from diator.exceptions import BrokerUnavailable, MessageRejected
from tests.unit.consumer.helpers import JOINED, ONCE, Slow, consumer_of, on_joined, quick
from tests.unit.consumer.test_isolation import BAD, failing_first
from tests.unit.doubles import FULL, Scripted, UserJoined, body_of, running, until

pytestmark = pytest.mark.usefixtures("loop_clock")


class Service:
    """A service whose connections deliver what the test puts into *arriving*: bodies, or an error that breaks them."""

    capabilities = FULL
    settles = True
    oldest_message = None

    def __init__(self):
        self.registry = set()
        self.arriving = asyncio.Queue()
        self.stored = asyncio.Event()
        self.stored.set()

    def subscribe(self, topics, /, *, group=None, prefetch=64, on_gap=None):
        self.subscription = Subscription(self, topics, prefetch)
        return self.subscription

    async def send_message(self, message, /): ...

    async def receive(self, limit, /):
        item = await self.arriving.get()
        if isinstance(item, BaseException):
            raise item
        self.subscription.unsettled += 1
        return [Delivery(topic=JOINED, body=item, headers={}, attempt=1, settler=self)]

    async def probe(self): ...

    async def ack(self, delivery, /):
        if not self.settles:
            raise BrokerUnavailable("away")
        self.subscription.unsettled -= 1
        self.subscription.notify_settled()

    async def retry(self, delivery, after, /):
        await self.ack(delivery)

    async def dead_letter(self, delivery, reason, /):
        await self.stored.wait()
        await self.ack(delivery)


class Subscription(ResilientSubscription):
    def __init__(self, service, topics, prefetch):
        policy = ReconnectPolicy(idle_timeout=100_000, first_delay=0.1, max_delay=0.1)
        settings = SubscriptionSettings(
            topics=topics,
            group="g",
            broker="B",
            prefetch=prefetch,
            on_gap=None,
            reconnect=policy,
            registry=service.registry,
        )
        super().__init__(settings, lossy=False, buffer_size=10)
        self.service = service

    @property
    def oldest_message(self):
        return self.service.oldest_message

    @asynccontextmanager
    async def connect(self):
        yield self.service


GOOD = body_of(UserJoined())


@asynccontextmanager
async def consuming(handler, service=None, **options):
    service = service or Service()
    consumer, reports = consumer_of(service, handler, **{"retry": ONCE} | options)
    async with running(consumer):
        yield service, consumer, reports


async def test_an_idle_consumer_shows_nothing():
    async with consuming(on_joined) as (service, consumer, reports):
        service.arriving.put_nowait(GOOD)
        await until(lambda: reports)
        await asyncio.sleep(10_000)

        health = consumer.health()
        assert (health.since_last_progress, health.oldest_in_flight, health.unsettled, health.reconnects) == (
            0,
            0,
            0,
            0,
        )

        service.arriving.put_nowait(GOOD)
        await until(lambda: len(reports) == 2)
        assert consumer.health().since_last_progress == 0


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_handler_that_hangs_shows(concurrency):
    slow = Slow()
    async with consuming(slow, concurrency=concurrency, handler_timeout=1_000) as (service, consumer, _):
        await asyncio.sleep(500)
        for _ in range(concurrency):
            service.arriving.put_nowait(GOOD)
        await asyncio.sleep(100)

        health = consumer.health()
        assert 99 < health.oldest_in_flight <= 100
        assert 99 < health.since_last_progress <= 100  # not the time before, in which it was idle
        assert (health.connected, health.unsettled, health.reconnects) == (True, 0, 0)
        slow.gate.set()


@pytest.mark.parametrize("reporting", [True, False])
async def test_one_hanging_handler_among_others_is_not_a_consumer_without_progress(reporting):
    """Also if the program does not ask for the outcomes."""
    slow, handled = Slow(), []

    async def first_hangs(event: UserJoined) -> None:
        if not event.user_id:
            await slow(event)
        handled.append(event)

    options = {} if reporting else {"on_handled": None}
    async with consuming(first_hangs, concurrency=2, **options) as (service, consumer, _):
        service.arriving.put_nowait(body_of(BAD))
        await asyncio.sleep(100)
        service.arriving.put_nowait(GOOD)
        await until(lambda: handled)
        await asyncio.sleep(1)

        health = consumer.health()
        assert health.oldest_in_flight > 100
        assert health.since_last_progress < 2
        slow.gate.set()


async def test_a_delivery_that_cannot_be_settled_is_counted():
    """Another consumer may have received it meanwhile. Then this one is idle."""
    async with consuming(on_joined) as (service, consumer, reports):
        service.settles = False
        service.arriving.put_nowait(GOOD)
        await until(lambda: reports)
        await asyncio.sleep(100)

        health = consumer.health()
        assert health.since_last_progress == 0
        assert (health.unsettled, health.in_flight, health.reconnects) == (1, 0, 0)


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), MessageRejected("no")])
async def test_deliveries_that_are_redelivered_and_never_settled_are_no_progress(error):
    class Redelivering(Scripted):
        async def __anext__(self):
            await asyncio.sleep(10)
            self.script.append(body_of(BAD))
            return await super().__anext__()

    broker = Redelivering(failing={"retry": error, "dead_letter": error})
    consumer, _ = consumer_of(broker, failing_first, retry=quick(delayed_retries=1))
    async with running(consumer):
        await asyncio.sleep(105)

        health = consumer.health()
        assert health.since_last_progress > 80
        assert health.unsettled > 5


async def test_after_the_next_settled_delivery_an_unsettled_one_is_only_counted():
    async with consuming(on_joined) as (service, consumer, reports):
        service.subscription.make_room(1)  # the transport has freed its place
        service.settles = False
        service.arriving.put_nowait(GOOD)
        await until(lambda: reports)
        service.settles = True
        service.arriving.put_nowait(GOOD)
        await until(lambda: len(reports) == 2)
        await asyncio.sleep(100)

        health = consumer.health()
        assert (health.since_last_progress, health.unsettled) == (0, 1)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_dead_letters_that_are_being_stored_take_no_place_from_other_messages(concurrency):
    async with consuming(on_joined, concurrency=concurrency) as (service, consumer, reports):
        service.stored.clear()
        for body in [b"{"] * 10 + [GOOD]:
            service.arriving.put_nowait(body)
        await until(lambda: reports)
        assert (reports[0].outcome, consumer.health().in_flight) == ("acked", 10)

        service.stored.set()
        await until(lambda: len(reports) == 11)
        assert service.subscription.unsettled == 0


async def test_a_subscription_that_reconnects_again_and_again_shows():
    async with consuming(on_joined) as (service, consumer, _):
        for _ in range(50):
            service.arriving.put_nowait(ConnectionError("a message broke the client"))
        await asyncio.sleep(100)

        assert consumer.health().reconnects == 50


async def test_deliveries_that_wait_and_are_never_handed_out_show():
    """A transport that leaks the places of *prefetch* looks idle otherwise."""
    async with consuming(on_joined) as (service, consumer, reports):
        await asyncio.sleep(500)
        service.subscription.unsettled = 10  # leaked
        for _ in range(2):
            service.arriving.put_nowait(GOOD)
            await asyncio.sleep(50)

        health = consumer.health()
        assert 99 < health.since_last_progress <= 100
        assert (health.in_flight, health.connected, reports) == (0, True, [])


async def test_a_stuck_partition_shows_in_the_age_of_its_oldest_message():
    async with consuming(on_joined) as (service, consumer, reports):
        service.arriving.put_nowait(GOOD)
        await until(lambda: reports)
        assert consumer.health().oldest_message is None

        service.oldest_message = 100.0
        assert consumer.health().oldest_message == 100
