"""A subscription to Kafka and its connection, without Kafka: the client and the producer do what the test says."""

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiokafka")

from aiokafka import TopicPartition

from diator.brokers.base import Topic
from diator.brokers.kafka._connection import Connection
from diator.brokers.kafka._consumer import ReadOptions
from diator.brokers.kafka._fetched import Unreadable
from diator.brokers.kafka._group import GroupConnection
from diator.brokers.kafka._names import Names
from diator.brokers.kafka._offsets import Offsets
from diator.brokers.kafka._subscription import Partition, Subscription, Wakeup, _control_of
from diator.brokers.supervisor import ReconnectPolicy, SubscriptionSettings
from diator.exceptions import BrokerUnavailable, ConfigurationError, MessageRejected
from tests.records import fields

ORDERS = Topic("notification_event", "OrderPaid")
PLACE = TopicPartition("shop.notification_event.OrderPaid", 0)
MIB = 1024 * 1024
OPTIONS = {
    "session_timeout": 0.02,
    "heartbeat_interval": 0.01,
    "drain_timeout": 5.0,
    "max_unacked_per_partition": 100,
    "extra_prefetch": 0,
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
        self.refusals = 0

    async def send(self, topic_name, value, *, key, headers, partition):
        if self.error is not None:
            raise self.error
        if self.refusals:
            self.refusals -= 1
            raise MessageRejected("it is too large")
        self.sent.append((topic_name, partition))
        self.value, self.key, self.headers = value, key, headers


class Client:
    """Has fetched *records*, of one partition."""

    is_connected = True
    answers = True

    def __init__(self, place):
        self.place = place
        self.problems = {}
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
        return {self.place: taken} if taken else {}

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

    def count_partitions(self, topic):
        return 6

    def pause(self, place):
        self.paused.append(place)

    def resume(self, place):
        self.resumed.append(place)


class OneConnection(Connection):
    async def begin(self):
        place = self.consumer.place
        self.partitions[place] = self.begun(place, Offsets(0))
        self.subscription.is_assigned = True

    async def start_over(self, topic_names):
        pass

    async def say_goodbye(self):
        pass


class Reading:
    """A subscription that is open, and its parts."""

    def __init__(self, *, place=PLACE, on_gap=None, reconnect=None, prefetch=50, **options):
        self.connections = 0
        self.place = place
        self.client, self.producer = Client(place), Producer()
        settings = SubscriptionSettings(
            topics=[ORDERS],
            group="billing",
            broker="KafkaMessageBroker",
            prefetch=prefetch,
            on_gap=on_gap,
            reconnect=reconnect or ReconnectPolicy(),
            registry=self.producer.subscriptions,
        )
        options = ReadOptions(**OPTIONS | options)
        self.subscription = Subscription(settings, options, Names("shop"), self.producer, self.connect)

    @asynccontextmanager
    async def connect(self, subscription):
        self.connections += 1
        self.connection = OneConnection(subscription, self.client)
        await self.connection.begin()
        yield self.connection

    @property
    def partition(self):
        return self.connection.partitions[self.place]

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


def reading_retries():
    """Read the retry topic, of the shortest delays."""
    return reading(place=TopicPartition(f"{PLACE.topic}.billing-retry", 0))


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


@pytest.mark.parametrize("error", [TypeError("unexpected"), asyncio.CancelledError()], ids=["error", "cancellation"])
async def test_a_task_of_a_connection_that_ends_costs_the_connection(error):
    """Otherwise nothing would be committed any more, or a topic that is created again would not be noticed."""

    async def end():
        raise error

    async with reading(reconnect=QUICK) as it:
        it.connection.tasks.append(asyncio.create_task(end()))
        await asyncio.sleep(5)

        assert it.connections == 2


async def test_a_subscription_without_its_partitions_is_not_connected():
    async with reading() as it:
        assert it.subscription.connected
        it.subscription.is_assigned = False
        assert not it.subscription.connected


async def test_a_bad_link_makes_one_line_of_all_commits_that_fail(caplog):
    class Committing(Client):
        error = TimeoutError()

        def assignment(self):
            return [PLACE]

        async def commit(self, offsets):
            if self.error is not None:
                raise self.error

    client, subscription = Committing(PLACE), Reading().subscription
    connection = GroupConnection(subscription, client)
    for fault in range(2):
        connection.partitions[PLACE] = subscription.partition(PLACE, Offsets(0))
        connection.partitions[PLACE].offsets.take(fault)
        connection.partitions[PLACE].offsets.finish(fault)
        assert [await connection._commit() for _ in range(3)] == [False] * 3
        client.error = None
        assert await connection._commit()
        client.error = TimeoutError()

    lines = [each for each in caplog.records if each.getMessage().startswith("a commit failed and is tried again")]
    assert [each.getMessage().partition(": ")[2] for each in lines] == ["no answer within 5 s"] * 2
    assert [*map(fields, lines)] == [{**subscription.log_fields, "error_type": "TimeoutError"}] * 2


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


async def test_draining_does_not_wait_for_what_is_postponed():
    """It waits for an earlier message of its key, and its turn would come too late."""
    async with reading() as it:
        it.client.fetch(*map(Record, range(2)))
        first, second = await it.take(0, 1)
        it.subscription.postpone(second)
        draining = asyncio.create_task(it.subscription.drain({it.partition}))
        await first.ack()
        async with asyncio.timeout(1):
            await draining

        assert not it.subscription.resume(second)
        assert (it.partition.unsettled, it.partition.offsets.lowest) == (0, 1)


async def test_draining_has_a_bound(caplog):
    async with reading(drain_timeout=0.02) as it:
        it.client.fetch(Record(0))
        await it.take(0)

        async with asyncio.timeout(1):
            await it.subscription.drain({it.partition})

    [record] = caplog.records
    assert record.getMessage().startswith("1 delivery was not settled within drain_timeout (0.02 s)")
    assert fields(record) == {**it.subscription.log_fields, "messages": 1, "seconds": 0.02}
    assert it.subscription.log_fields == {
        "broker": "KafkaMessageBroker",
        "group": "billing",
        "message_names": [ORDERS.message_name],
    }


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


@pytest.mark.parametrize(
    "large",
    [
        {"headers": [("h", bytes(2 * MIB))]},
        {"headers": [("h" * 2 * MIB, None)]},
        {"headers": [("", None)] * 20_000},
        {"key": bytes(2 * MIB)},
    ],
    ids=["value of a header", "name of a header", "number of headers", "key"],
)
async def test_a_partition_is_read_no_further_while_it_holds_many_bytes(large):
    async with reading() as it:
        it.client.fetch(Record(0, value=bytes(7 * MIB)), Record(1, value=None, **large))
        first, second = await it.take(0, 1)
        await asyncio.sleep(0.01)
        assert it.client.paused == [PLACE]

        await second.ack()
        await asyncio.sleep(0.01)
        assert it.client.resumed == [PLACE]
        await first.ack()
        assert it.partition.held == 0


# -- records of other programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestamp", [-1, -(2**63), 2**62, 1_772_000_000_000_000])
async def test_a_time_that_cannot_be_is_not_the_beginning_of_a_gap(timestamp):
    gaps = []
    async with reading(on_gap=gaps.append) as it:
        it.client.fetch(Record(0, timestamp=5_000))
        await it.take(0)
        it.client.fetch(Record(1, timestamp=timestamp))
        await it.take(1)
        it.subscription.report_lost_messages(it.partition.read_until, "they are gone")

    assert [gap.since.timestamp() for gap in gaps] == [5.0]


NOW = b"1772000000000"


@pytest.mark.parametrize(
    "values",
    [
        (b"2", b"9" * 400, b"0:0"),
        (b"9" * 400, NOW, b"0:0"),
        (b"2", b"-" + NOW, b"0:0"),
        (b"1", NOW, b"0:0"),
        (b"2", NOW, b"x"),
        (b"2", NOW, b"0:" + b"9" * 400),
        (b"2", NOW, None),
        (None, None, None),
        (b"2\n", NOW, b"0:0"),
        (b"+2", NOW, b"0:0"),
        ("٢".encode(), NOW, b"0:0"),
    ],
)
async def test_control_headers_that_diator_has_not_written_control_nothing(values):
    names = ("diator-retry-attempt", "diator-retry-due", "diator-retry-origin")
    forged = [("h", b"v"), *zip(names, values, strict=True)]
    async with reading_retries() as it:
        it.client.fetch(Record(7, headers=forged))
        (delivery,) = await it.take(7)
        await delivery.dead_letter("no good")

    assert delivery.attempt == 2
    assert [name for name, _ in it.producer.headers][:4] == ["h", *names]
    assert ("diator-dlq-offset", b"7") in it.producer.headers


@given(st.lists(st.tuples(st.sampled_from(["diator-retry-attempt", "diator-retry-due", "x"]), st.binary()), max_size=4))
def test_no_control_headers_break_the_reader(headers):
    partition = Partition(PLACE, ORDERS, Offsets(0), is_retries=True, longest_delay=1.0, max_unacked=1)
    control = _control_of(partition, Record(0, headers=headers))

    assert 2 <= control.attempt < 1_000_000
    assert 0 <= control.due < 10**15


async def test_a_forged_time_delays_a_retry_no_longer_than_its_bucket(monkeypatch):
    forged = [
        ("diator-retry-attempt", b"2"),
        ("diator-retry-due", b"99999999999999"),
        ("diator-retry-origin", b"0:0"),
    ]
    async with reading_retries() as it:
        it.client.fetch(Record(0, headers=forged))
        began = asyncio.get_running_loop().time()
        await it.take(0)

        assert 0.9 < asyncio.get_running_loop().time() - began < 1.1


async def test_the_records_that_cannot_be_read_are_one_message():
    async with reading() as it:
        it.client.fetch(
            Record(0), Unreadable(offset=7, why="T, partition 0, offset 1 to 7: it is too large"), Record(8)
        )
        first, unreadable, last = await it.take(0, 7, 8)
        with pytest.raises(MessageRejected, match="cannot be read"):
            await unreadable.retry()
        await unreadable.dead_letter("no good")
        await first.ack()
        await last.ack()

        assert (unreadable.body, unreadable.unreadable) == (b"", "T, partition 0, offset 1 to 7: it is too large")
        assert [each.unreadable for each in (first, last)] == [None, None]
        assert it.producer.headers[-1] == ("diator-dlq-omitted", b"body,headers,key")
        assert it.partition.offsets.progress() == (9, "")


# -- dead letters that Kafka refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusals", "omitted", "value", "key", "has_own"),
    [
        (0, None, b"{}", b"k", True),
        (1, b"body", None, b"k", True),
        (2, b"body,headers,key", None, None, False),
    ],
)
async def test_a_dead_letter_that_is_refused_is_stored_in_a_smaller_form(refusals, omitted, value, key, has_own):
    async with reading() as it:
        it.client.fetch(Record(4, b"k", headers=[("own", b"v")]))
        (delivery,) = await it.take(4)
        it.producer.refusals = refusals
        await delivery.dead_letter("no good")

        headers = dict(it.producer.headers)
        assert (it.producer.value, it.producer.key, "own" in headers) == (value, key, has_own)
        assert headers.get("diator-dlq-omitted") == omitted
        assert (headers["diator-dlq-source"], headers["diator-dlq-offset"]) == (PLACE.topic.encode(), b"4")
        assert it.partition.offsets.progress() == (5, "")


async def test_a_dead_letter_that_is_refused_in_any_form_stays_unsettled():
    async with reading(session_timeout=0.05) as it:
        it.client.fetch(Record(4), Record(5))
        (delivery, other) = await it.take(4, 5)
        it.producer.refusals = 3
        with pytest.raises(MessageRejected):
            await delivery.dead_letter("no good")
        await other.ack()

        (again,) = await it.take(4)
        await again.dead_letter("no good")
        assert it.partition.offsets.progress() == (6, "")


@pytest.mark.parametrize(
    "settle",
    [lambda each: each.retry(after=2.0), lambda each: each.dead_letter("no good")],
    ids=["retry", "dead_letter"],
)
async def test_a_message_that_cannot_be_settled_leaves_its_place_to_others(settle):
    async with reading(prefetch=1, session_timeout=30.0) as it:
        it.client.fetch(Record(0), Record(1), Record(2))
        (stuck,) = await it.take(0)
        it.producer.error = MessageRejected("nobody may write there")
        with pytest.raises(MessageRejected):
            await settle(stuck)
        for offset in (1, 2):
            (other,) = await it.take(offset)
            await other.ack()

        it.producer.error = None
        await settle(stuck)  # another try
        assert (it.subscription.unsettled, it.partition.unsettled) == (0, 0)
        assert it.partition.offsets.progress() == (3, "")


async def test_a_null_value_stays_null():
    async with reading() as it:
        it.client.fetch(Record(0, b"k", None), Record(1, b"k", b""))
        for delivery in await it.take(0, 1):
            await delivery.retry(after=2.0)
            assert it.producer.value == delivery.token.record.value


# -- packages that are missing -------------------------------------------------------------------------------------


async def test_what_cannot_be_read_ends_the_subscription_when_the_rest_is_settled():
    async with reading() as it:
        it.client.fetch(Record(0))
        (delivery,) = await it.take(0)
        it.client.problems[PLACE] = ConfigurationError("the package cramjam is missing")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await anext(it.subscription)
        await delivery.ack()

        with pytest.raises(ConfigurationError, match="cramjam"):
            async with asyncio.timeout(3):
                await anext(it.subscription)
        assert it.partition.offsets.progress() == (1, "")


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
        await Leaving(Reading().subscription, Ending(PLACE)).end(within=1.0)

    assert ended == [True]


# -- what its health reports ----------------------------------------------------------------------------------------


async def test_the_age_of_the_oldest_message_is_that_of_the_oldest_unfinished_one():
    now = round(time.time() * 1000)
    old, newer, newest = (Record(offset, timestamp=now - age * 1000) for offset, age in ((0, 300), (1, 200), (2, 100)))
    async with reading() as it:
        assert it.subscription.oldest_message == 0

        deliveries = []
        for record in (old, newer, newest):
            it.client.fetch(record)
            deliveries += await it.take(record.offset)
        assert it.subscription.oldest_message == pytest.approx(300, abs=30)

        await deliveries[1].ack()  # above the position, which stays
        assert it.subscription.oldest_message == pytest.approx(300, abs=30)

        await deliveries[0].ack()
        assert it.subscription.oldest_message == pytest.approx(100, abs=30)

        it.producer.error = BrokerUnavailable("away")
        with suppress(BrokerUnavailable):
            await deliveries[2].dead_letter("stuck")
        assert it.subscription.oldest_message == pytest.approx(100, abs=30)

        it.producer.error = None
        await deliveries[2].dead_letter("at last")
        assert it.subscription.oldest_message == 0


@pytest.mark.parametrize("timestamp", [-1, 0, 2**53])
async def test_a_record_without_a_time_or_of_the_future_has_no_age(timestamp):
    async with reading() as it:
        it.client.fetch(Record(0, timestamp=timestamp))
        await it.take(0)

        assert it.subscription.oldest_message == 0


async def test_a_partition_that_went_to_another_consumer_has_no_age():
    async with reading() as it:
        it.client.fetch(Record(0, timestamp=1_000))
        await it.take(0)
        assert it.subscription.oldest_message > 1_000_000

        it.subscription.lose([it.partition])
        assert it.subscription.oldest_message == 0
