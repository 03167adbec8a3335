"""A subscription to Kafka and its connection, without Kafka: the client and the producer do what the test says."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

pytest.importorskip("aiokafka")

from aiokafka import TopicPartition

from diator.brokers.base import Topic
from diator.brokers.kafka._connection import Connection
from diator.brokers.kafka._consumer import ReadOptions
from diator.brokers.kafka._names import Names
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import Subscription, Wakeup
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerUnavailable

ORDERS = Topic("notification_event", "OrderPaid")
PLACE = TopicPartition("shop.notification_event.OrderPaid", 0)
OPTIONS = {
    "session_timeout": 0.02,
    "heartbeat_interval": 0.01,
    "drain_timeout": 5.0,
    "max_unacked_per_partition": 100,
    "in_place": False,
    "metadata_max_age": 60.0,
    "max_message_bytes": 1000,
    "assignment_timeout": 1.0,
}


@dataclass
class Record:
    offset: int
    key: bytes | None = None
    value: bytes | None = b"{}"
    headers: list[tuple[str, bytes]] = field(default_factory=list)
    timestamp: int = 0


class Producer:
    """Keeps what is sent. While it has an *error*, it raises that."""

    def __init__(self):
        self.subscriptions = set()
        self.sent = []
        self.error = None

    async def send(self, topic_name, value, *, key, headers, partition):
        if self.error is not None:
            raise self.error
        self.sent.append((topic_name, partition))


class Client:
    """Has fetched *records*, of one partition."""

    is_connected = True
    answers = True

    def __init__(self):
        self.records = []
        self.asked = 0
        self.ids = {}
        self.metadata_changed = asyncio.Event()
        self.paused = []
        self.resumed = []
        self.waiting = asyncio.Event()
        self.has_fetched = None

    def fetch(self, *records):
        self.records += records
        if self.has_fetched is not None and not self.has_fetched.done():
            self.has_fetched.set_result(None)

    async def take(self, most):
        self.asked += 1
        taken, self.records = self.records[:most], self.records[most:]
        return {PLACE: taken} if taken else {}

    def fetched(self):
        self.waiting.set()
        self.has_fetched = asyncio.get_running_loop().create_future()
        return self.has_fetched

    async def topic_ids(self, topics):
        return self.ids

    async def refresh_metadata(self):
        if not self.answers:
            await asyncio.Event().wait()
        return True

    async def end_offsets(self, places):
        await asyncio.Event().wait()  # a partition has no leader

    def has_topic(self, topic):
        return True

    def pause(self, place):
        self.paused.append(place)

    def resume(self, place):
        self.resumed.append(place)


class OneConnection(Connection):
    async def begin(self):
        self.partitions[PLACE] = self.subscription.partition(PLACE, Offsets(0))
        self.subscription.is_assigned = True

    async def start_over(self, topic_names):
        pass

    async def say_goodbye(self):
        pass


class Reading:
    """A subscription that is open, and its parts."""

    def __init__(self, *, reconnect=None, **options):
        self.connections = 0
        self.client, self.producer = Client(), Producer()
        self.subscription = Subscription(
            [ORDERS],
            "billing",
            prefetch=50,
            extra_prefetch=0,
            on_gap=None,
            options=ReadOptions(**OPTIONS | options),
            names=Names("shop"),
            producer=self.producer,
            reconnect=reconnect or ReconnectPolicy(),
            connect=self.connect,
        )

    @asynccontextmanager
    async def connect(self, subscription):
        self.connections += 1
        self.connection = OneConnection(subscription, self.client)
        await self.connection.begin()
        yield self.connection

    @property
    def partition(self):
        return self.connection.partitions[PLACE]

    async def take(self, *offsets):
        """Take the deliveries of *offsets*, which come in that order."""
        async with asyncio.timeout(2):
            deliveries = [await anext(self.subscription) for _ in offsets]
        assert [each.token.record.offset for each in deliveries] == [*offsets]
        return deliveries

    async def nothing_comes(self):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(self.subscription)


@asynccontextmanager
async def reading(**options):
    it = Reading(**options)
    async with it.subscription:
        yield it


# -- waiting -----------------------------------------------------------------------------------------------------


async def test_a_wakeup_ends_the_wait_and_one_that_comes_before_prevents_it():
    wakeup, futures = Wakeup(), []

    def future():
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    async with asyncio.timeout(1):
        waiting = asyncio.create_task(wakeup.wait(future, within=10))
        await asyncio.sleep(0)
        wakeup.set()
        await waiting
        await wakeup.wait(future, within=10)
    assert len(futures) == 1


async def test_a_cleared_wakeup_waits_for_the_future_or_for_its_bound():
    wakeup, loop = Wakeup(), asyncio.get_running_loop()
    wakeup.set()
    wakeup.clear()
    done = loop.create_future()
    loop.call_later(0.02, done.set_result, None)

    async with asyncio.timeout(1):
        await wakeup.wait(lambda: done, within=10)
        assert done.done()
        await wakeup.wait(loop.create_future, within=0.02)


async def test_records_that_arrive_during_the_wait_are_delivered_at_once():
    async with reading() as it:
        await it.client.waiting.wait()
        it.client.fetch(Record(0))
        began = asyncio.get_running_loop().time()

        await it.take(0)

        assert asyncio.get_running_loop().time() - began < 0.5


async def test_a_waiting_consumer_has_its_message_before_the_client_is_asked_again():
    async with reading() as it:

        async def receive_one():
            await anext(it.subscription)
            return it.client.asked

        receiving = asyncio.create_task(receive_one())
        await it.client.waiting.wait()
        asked = it.client.asked
        it.client.fetch(Record(0))

        assert await receiving == asked + 1


# -- the connection ------------------------------------------------------------------------------------------------

QUICK = ReconnectPolicy(idle_timeout=0.02, probe_timeout=0.02, first_delay=0.01, max_delay=0.01)


@pytest.mark.parametrize("answers", [True, False])
async def test_any_answer_of_kafka_is_a_sign_of_life(answers):
    """A partition without a leader answers nothing, and must not cost the connection of the others."""
    async with reading(reconnect=QUICK) as it:
        it.client.answers = answers
        await asyncio.sleep(0.5)

    assert (it.connections == 1) == answers


async def test_a_link_is_given_up_no_earlier_than_the_session():
    async with reading(reconnect=QUICK, session_timeout=0.5) as it:
        it.client.answers = False
        await asyncio.sleep(0.4)
        assert it.connections == 1
        await asyncio.sleep(0.4)
        assert it.connections == 2


async def test_a_subscription_without_its_partitions_is_not_connected():
    async with reading() as it:
        assert it.subscription.connected
        it.subscription.is_assigned = False
        assert not it.subscription.connected


# -- settling ----------------------------------------------------------------------------------------------------


async def test_what_is_settled_is_no_longer_counted():
    async with reading() as it:
        it.client.fetch(*map(Record, range(3)))
        first, second, _ = await it.take(0, 1, 2)

        await first.ack()
        await second.retry(after=2.0)

        assert (it.subscription.unsettled, it.partition.unsettled) == (1, 1)
        assert it.partition.offsets.progress() == (2, "")
        assert it.producer.sent == [(f"{PLACE.topic}.billing-retry", 1)]


async def test_a_message_that_could_not_be_moved_is_delivered_again():
    async with reading() as it:
        it.client.fetch(Record(0))
        (delivery,) = await it.take(0)
        it.producer.error = BrokerUnavailable("Kafka is gone")

        with pytest.raises(BrokerUnavailable):
            await delivery.dead_letter("failed")
        (again,) = await it.take(0)

        await delivery.ack()
        assert it.partition.offsets.progress() == (0, "")  # the earlier delivery settles nothing
        await again.ack()
        assert it.partition.offsets.progress() == (1, "")
        assert it.subscription.unsettled == 0


async def test_a_lost_partition_settles_nothing_and_its_prefetched_messages_are_gone():
    async with reading() as it:
        it.client.fetch(*map(Record, range(3)))
        (delivery,) = await it.take(0)
        partition = it.partition

        it.subscription.lose([partition])
        await delivery.ack()

        assert partition.offsets.progress() == (0, "")
        assert it.subscription.unsettled == 0
        await it.nothing_comes()


async def test_draining_waits_for_deliveries_and_begins_nothing_more():
    async with reading() as it:
        it.client.fetch(*map(Record, range(3)))
        (delivery,) = await it.take(0)

        draining = asyncio.create_task(it.subscription.drain({it.partition}))
        await asyncio.sleep(0)
        await it.nothing_comes()
        assert not draining.done()
        await delivery.ack()
        async with asyncio.timeout(1):
            await draining

        assert it.subscription.unsettled == 0


async def test_draining_has_a_bound(caplog):
    async with reading(drain_timeout=0.02) as it:
        it.client.fetch(Record(0))
        await it.take(0)

        async with asyncio.timeout(1):
            await it.subscription.drain({it.partition})

    assert "1 deliveries were not settled within drain_timeout (0.02 s)" in caplog.text


# -- retries in place ----------------------------------------------------------------------------------------------


async def test_in_place_later_messages_of_a_key_wait_and_others_do_not():
    async with reading(in_place=True) as it:
        it.client.fetch(Record(0, b"a"), Record(1, b"a"), Record(2, b"b"), Record(3))
        first, *_ = await it.take(0, 2, 3)

        await first.retry(after=0.05)
        (again,) = await it.take(0)
        assert again.attempt == 2
        await again.ack()

        await it.take(1)
        assert it.producer.sent == []


# -- pausing -------------------------------------------------------------------------------------------------------


async def test_a_partition_is_paused_when_it_is_too_far_and_resumed_when_it_has_room():
    async with reading(max_unacked_per_partition=3) as it:
        it.client.fetch(*map(Record, range(4)))
        oldest, *others = await it.take(0, 1, 2, 3)
        await asyncio.sleep(0.01)
        assert (it.client.paused, it.client.resumed) == ([PLACE], [])

        for delivery in others:
            await delivery.ack()
        await asyncio.sleep(0.01)
        assert it.client.resumed == []  # the oldest is what counts

        await oldest.ack()
        await asyncio.sleep(0.01)
        assert it.client.resumed == [PLACE]
        it.client.fetch(Record(4))
        await it.take(4)


# -- headers -------------------------------------------------------------------------------------------------------


async def test_the_key_of_another_program_is_a_header():
    async with reading() as it:
        it.client.fetch(Record(0, b"k"), Record(1, b"k", headers=[("key", b"own"), ("trace", b"t")]), Record(2))
        deliveries = await it.take(0, 1, 2)

    assert [each.headers for each in deliveries] == [{"key": "k"}, {"key": "own", "trace": "t"}, {}]


async def test_no_payload_is_in_what_a_log_may_show_of_a_delivery():
    async with reading() as it:
        it.client.fetch(Record(0, value=b"swordfish"))
        (delivery,) = await it.take(0)

    assert "swordfish" not in f"{delivery!r} {delivery.token!r}"


@pytest.mark.parametrize("error", [asyncio.CancelledError, ConnectionError, TimeoutError, RuntimeError])
async def test_the_client_ends_whatever_its_goodbye_raises(error):
    """A connection that breaks makes aiokafka cancel its callers, which is not a cancellation by the program."""
    ended = []

    class Ending(Client):
        async def end(self):
            ended.append(True)

    class Leaving(OneConnection):
        async def say_goodbye(self):
            raise error

    with suppress(RuntimeError):
        await Leaving(Reading().subscription, Ending()).end(within=1.0)

    assert ended == [True]
