"""Sending to Kafka around the table of unconfirmed calls: connecting, waiting, deadlines, closing. Without a Kafka."""

import asyncio
from uuid import uuid4

import pytest

pytest.importorskip("aiokafka")

from aiokafka import errors

from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._idempotent import IdempotentProducer
from diator.brokers.kafka._producer import Producer
from diator.brokers.kafka._topics import TopicPolicy
from diator.exceptions import BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown

TIMEOUT = 10.0


class FakeProducer:
    """Stands in for an `IdempotentProducer`; a test decides when a batch is sent, and how it ends."""

    def __init__(self, kafka, on_failure):
        self.kafka = kafka
        self.on_failure = on_failure
        self.answered = asyncio.Event()
        self.queued = []
        self.sent = []
        self.has_ended = self.is_closed = False

    def place(self, topic, key, partition, may_stay):
        return (topic, partition or 0) if topic in self.kafka.topics and not self.has_ended else None

    def knows(self, topic):
        return topic in self.kafka.topics

    def has_leader(self, place):
        return place[1] == 1

    async def create_missing(self, cluster, policy, topic):
        pass

    async def look_up(self, topic):
        if self.kafka.answer is None:
            raise errors.KafkaConnectionError("nobody answers")
        await self.kafka.answer.wait()
        self.kafka.topics.add(topic)

    def send(self, batch, settle):
        self.queued.append((batch, settle))

    def drop(self, withdrawn):
        self.queued = [each for each in self.queued if each[0] not in withdrawn]

    def retire(self):
        pass

    async def close(self):
        self.is_closed = True

    def take_off(self):
        """Begin to send what is queued."""
        for batch, _ in self.queued:
            batch.seal()
        self.sent, self.queued = self.sent + self.queued, []

    def answer(self, error=None):
        """Answer the oldest batch that is sent."""
        batch, settle = self.sent.pop(0)
        values = [call.value for call in batch.calls]
        if error is None:
            self.kafka.stored += values
        settle(batch, error)


class FakeKafka:
    def __init__(self):
        self.topics = {"topic"}
        self.producers = []
        self.stored = []
        self.error = None
        self.delay = 0.0
        self.answer: asyncio.Event | None = None

    async def connect(self, cluster, *, on_failure):
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        self.producers.append(FakeProducer(self, on_failure))
        return self.producers[-1]

    async def producer(self, number):
        """The producer of that number, once it is connected and has been given something."""
        while len(self.producers) <= number or not self.producers[number].queued:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return self.producers[number]


@pytest.fixture
def kafka(monkeypatch):
    kafka = FakeKafka()
    monkeypatch.setattr(IdempotentProducer, "connect", kafka.connect)
    return kafka


@pytest.fixture
def make(kafka):
    def make(**options):
        cluster = Cluster(bootstrap_servers=("a:1",), timeout=TIMEOUT)
        policy = TopicPolicy(create=True, partitions=1, replication_factor=1, max_message_bytes=1_000)
        return Producer(cluster, policy, **{"max_in_flight": 100, **options})

    return make


@pytest.fixture
def sender(make):
    return make()


def start(sender, *values, **options):
    return [asyncio.ensure_future(sender.send("topic", value, **options)) for value in values]


async def results(tasks):
    return await asyncio.gather(*tasks, return_exceptions=True)


async def kinds(tasks):
    return [type(result) for result in await results(tasks)]


async def test_a_call_returns_when_its_batch_is_confirmed(sender, kafka):
    tasks = start(sender, b"1", b"2")
    producer = await kafka.producer(0)
    producer.take_off()
    assert not any(task.done() for task in tasks)
    producer.answer()
    assert await results(tasks) == [None, None]
    assert kafka.stored == [b"1", b"2"]


async def test_what_was_sent_and_not_confirmed_is_unknown_and_the_next_producer_sends_the_rest(sender, kafka):
    first = start(sender, b"1")
    (await kafka.producer(0)).take_off()
    await asyncio.sleep(1.0)
    later = start(sender, b"2", b"3")
    started = asyncio.get_running_loop().time()
    assert await kinds(first) == [OutcomeUnknown]
    assert asyncio.get_running_loop().time() - started == pytest.approx(TIMEOUT - 1.0, abs=0.1)
    producer = await kafka.producer(1)
    producer.take_off()
    producer.answer()
    assert await results(later) == [None, None]
    assert kafka.producers[0].is_closed


async def test_what_was_not_sent_in_time_was_not_sent(sender, kafka):
    """A partition has no leader, so that its batch stays where it is."""
    first = start(sender, b"1")
    await kafka.producer(0)
    await asyncio.sleep(1.0)
    later = start(sender, b"2")
    assert await kinds(first) == [BrokerUnavailable]
    assert not later[0].done()
    assert len(kafka.producers) == 1  # it is none of the producer's fault
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer()
    assert await results(later) == [None]
    assert kafka.stored == [b"2"]


async def test_each_call_ends_at_its_own_deadline(sender, kafka):
    loop = asyncio.get_running_loop()
    started = loop.time()
    first = start(sender, b"1")
    await kafka.producer(0)
    await asyncio.sleep(3.0)
    second = start(sender, b"2", partition=1)
    assert await kinds(first) == [BrokerUnavailable]
    assert loop.time() - started == pytest.approx(TIMEOUT, abs=0.1)
    assert await kinds(second) == [BrokerUnavailable]
    assert loop.time() - started == pytest.approx(TIMEOUT + 3.0, abs=0.1)
    assert f"partition 0 (TimeoutError: it had no leader within {TIMEOUT:g} s)" in str(first[0].exception())
    assert f"partition 1 (TimeoutError: its leader took nothing within {TIMEOUT:g} s)" in str(second[0].exception())


async def test_only_the_refused_message_fails_and_the_others_keep_their_order(sender, kafka):
    tasks = start(sender, b"1", b"bad", b"3")
    first = await kafka.producer(0)
    first.take_off()
    later = start(sender, b"4")
    await asyncio.sleep(0)
    first.answer(errors.InvalidTopicError())
    second = await kafka.producer(1)
    assert [len(batch.calls) for batch, _ in second.queued] == [1, 1, 1, 1]
    second.take_off()
    second.answer()
    second.answer(errors.InvalidTopicError())
    second.answer()
    second.answer()
    assert await kinds([*tasks, *later]) == [type(None), MessageRejected, type(None), type(None)]
    assert kafka.stored == [b"1", b"3", b"4"]


async def test_a_batch_that_may_be_stored_is_not_sent_again(sender, kafka):
    tasks = start(sender, b"1", b"2")
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer(errors.OutOfOrderSequenceNumber())
    assert await kinds(tasks) == [OutcomeUnknown, OutcomeUnknown]
    await asyncio.sleep(1.0)
    assert producer.is_closed  # its numbers are of no use any more
    assert len(kafka.producers) == 1


async def test_a_missing_permission_does_not_replace_the_producer(sender, kafka):
    tasks = start(sender, b"1", b"2")
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer(errors.TopicAuthorizationFailedError("topic"))
    assert await kinds(tasks) == [MessageRejected, MessageRejected]
    tasks = start(sender, b"3")
    await kafka.producer(0)
    assert len(kafka.producers) == 1
    for task in tasks:
        task.cancel()


async def test_a_retired_producer_is_closed_when_its_last_batch_is_answered(sender, kafka):
    tasks = start(sender, b"1") + start(sender, b"2", partition=1)
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer(errors.InvalidTopicError())
    await asyncio.sleep(1.0)
    assert not producer.is_closed
    waiting = start(sender, b"3")
    await asyncio.sleep(1.0)
    assert len(kafka.producers) == 1  # the next one must not pass the old one
    producer.answer()
    second = await kafka.producer(1)
    assert producer.is_closed
    second.take_off()
    second.answer()
    assert await kinds([*tasks, *waiting]) == [MessageRejected, type(None), type(None)]


async def test_calls_beyond_the_limit_wait_in_their_order(make, kafka):
    sender = make(max_in_flight=2)
    tasks = start(sender, b"1", b"2", b"3", b"4", b"5")
    producer = await kafka.producer(0)
    while len(kafka.stored) < 5:
        await asyncio.sleep(0.1)
        assert sum(len(batch.calls) for batch, _ in producer.queued) <= 2
        producer.take_off()
        producer.answer()
    assert await results(tasks) == [None] * 5
    assert kafka.stored == [b"1", b"2", b"3", b"4", b"5"]


async def test_no_call_passes_those_that_wait_for_room(make, kafka):
    sender = make(max_in_flight=3)
    tasks = start(sender, b"1", b"2", b"3", b"4", b"5")
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer()
    tasks += start(sender, b"6")  # there is room now, and two of the others have not been woken
    await kafka.producer(0)
    await asyncio.sleep(0.001)
    producer.take_off()
    producer.answer()
    assert await results(tasks) == [None] * 6
    assert kafka.stored == [b"1", b"2", b"3", b"4", b"5", b"6"]


async def test_no_call_passes_those_that_wait_for_the_next_producer(sender, kafka):
    kafka.topics.add("slow")
    tasks = start(sender, b"1", b"2")
    slow = asyncio.ensure_future(sender.send("slow", b"3"))
    first = await kafka.producer(0)
    await asyncio.sleep(0)
    first.sent, first.queued = first.queued[:1], first.queued[1:]
    first.sent[0][0].seal()
    kafka.topics.discard("slow")
    kafka.answer = asyncio.Event()
    first.answer(errors.InvalidTopicError())
    await asyncio.sleep(1.0)  # another producer is there, and waits for an answer about the slow topic
    tasks += start(sender, b"4")
    await asyncio.sleep(1.0)
    kafka.answer.set()
    second = await kafka.producer(1)
    await asyncio.sleep(0.001)
    second.take_off()
    while second.sent:
        second.answer()
    assert await results([*tasks, slow]) == [None] * 4
    assert [value for value in kafka.stored if value != b"3"] == [b"1", b"2", b"4"]


async def test_a_call_takes_the_room_of_a_call_that_ended_at_its_deadline(make, kafka):
    sender = make(max_in_flight=1)
    first = start(sender, b"1")
    await kafka.producer(0)
    await asyncio.sleep(1.0)
    kafka.producers[0].take_off()
    second = start(sender, b"2")
    assert await kinds(first) == [OutcomeUnknown]
    producer = await kafka.producer(1)  # which has room for the second
    producer.take_off()
    producer.answer()
    assert await results(second) == [None]


async def test_waiting_calls_fail_when_no_producer_connects(sender, kafka):
    tasks = start(sender, b"1", b"2")
    producer = await kafka.producer(0)
    producer.take_off()
    kafka.error = errors.KafkaConnectionError("nobody listens")
    producer.answer(errors.InvalidTopicError())
    started = asyncio.get_running_loop().time()
    assert await kinds(tasks) == [BrokerUnavailable, BrokerUnavailable]
    assert asyncio.get_running_loop().time() - started < 1.0  # not only at their deadline


async def test_a_connection_that_takes_too_long_ends_the_calls_at_their_deadline(sender, kafka):
    kafka.delay = 3_600.0
    message_id = uuid4()
    started = asyncio.get_running_loop().time()
    (error,) = await results(start(sender, b"1", message_id=message_id))
    assert isinstance(error, BrokerUnavailable)
    assert error.message_id == message_id
    assert asyncio.get_running_loop().time() - started == pytest.approx(TIMEOUT)


async def test_a_topic_that_is_gone_fails_the_calls_that_wait_for_it_and_no_others(sender, kafka):
    kafka.topics.add("gone")
    here = start(sender, b"1", b"2")
    there = asyncio.ensure_future(sender.send("gone", b"3"))
    producer = await kafka.producer(0)
    await asyncio.sleep(0)
    batch, _ = producer.queued[0]
    batch.seal()
    producer.sent.append(producer.queued.pop(0))
    kafka.topics.discard("gone")
    producer.answer(errors.InvalidTopicError())
    assert await kinds([there]) == [BrokerUnavailable]
    second = await kafka.producer(1)
    second.take_off()
    second.answer()
    second.answer()
    assert await results(here) == [None, None]


async def test_a_cancelled_caller_leaves_the_others_alone(sender, kafka):
    cancelled, other = start(sender, b"1", b"2")
    producer = await kafka.producer(0)
    cancelled.cancel()
    producer.take_off()
    producer.answer()
    assert await kinds([cancelled, other]) == [asyncio.CancelledError, type(None)]


async def test_a_producer_whose_task_was_cancelled_is_replaced_at_the_next_call(sender, kafka):
    sent = start(sender, b"1")
    producer = await kafka.producer(0)
    producer.take_off()
    unsent = start(sender, b"2")
    await asyncio.sleep(0)
    producer.has_ended = True
    later = start(sender, b"3")
    assert await kinds(sent) == [OutcomeUnknown]
    second = await kafka.producer(1)
    second.take_off()
    second.answer()
    assert await results([*unsent, *later]) == [None, None]
    assert kafka.stored == [b"2", b"3"]


async def test_a_producer_that_fails_by_itself_is_replaced_at_once(sender, kafka):
    sent = start(sender, b"1")
    producer = await kafka.producer(0)
    producer.take_off()
    unsent = start(sender, b"2")
    await asyncio.sleep(0)
    producer.has_ended = True
    producer.on_failure(producer, errors.OutOfOrderSequenceNumber())
    assert await kinds(sent) == [OutcomeUnknown]
    second = await kafka.producer(1)
    second.take_off()
    second.answer()
    assert await results(unsent) == [None]


async def test_an_answer_that_comes_after_the_deadline_changes_nothing(sender, kafka):
    tasks = start(sender, b"1")
    producer = await kafka.producer(0)
    producer.take_off()
    assert await kinds(tasks) == [OutcomeUnknown]
    producer.answer(errors.InvalidTopicError())
    assert len(kafka.producers) == 1


async def test_closing_waits_for_the_unconfirmed_calls_and_refuses_later_ones(sender, kafka):
    tasks = start(sender, b"1")
    producer = await kafka.producer(0)
    closing = asyncio.create_task(sender.aclose())
    await asyncio.sleep(1.0)
    assert not closing.done()
    with pytest.raises(BrokerClosed):
        await sender.send("topic", b"2")
    producer.take_off()
    producer.answer()
    await closing
    assert await results(tasks) == [None]
    assert producer.is_closed


async def test_closing_waits_for_a_call_that_is_still_connecting(sender, kafka):
    kafka.delay = 1.0
    tasks = start(sender, b"1")
    await asyncio.sleep(0)
    closing = asyncio.create_task(sender.aclose())
    producer = await kafka.producer(0)
    producer.take_off()
    producer.answer()
    await closing
    assert await results(tasks) == [None]
    assert producer.is_closed


async def test_closing_takes_no_longer_than_the_deadlines(make, kafka):
    sender = make(max_in_flight=1)
    tasks = start(sender, b"1")
    (await kafka.producer(0)).take_off()
    await asyncio.sleep(1.0)
    tasks += start(sender, b"2")
    await asyncio.sleep(0)
    started = asyncio.get_running_loop().time()
    await sender.aclose()
    assert asyncio.get_running_loop().time() - started <= TIMEOUT - 1.0
    assert await kinds(tasks) == [OutcomeUnknown, BrokerClosed]


def test_a_program_can_send_in_one_event_loop_after_another(sender, kafka):
    async def send(number):
        tasks = start(sender, b"%d" % number)
        producer = await kafka.producer(number)
        producer.take_off()
        producer.answer()
        await asyncio.gather(*tasks)

    asyncio.run(send(0))
    asyncio.run(send(1))
    assert kafka.stored == [b"0", b"1"]


async def test_an_error_says_what_a_message_that_was_not_sent_waited_for(make, kafka):
    kafka.topics.clear()
    kafka.answer = asyncio.Event()  # Kafka does not answer the question for the partitions
    (unknown,) = await results(start(make(), b"1"))
    assert f"it waited for the partitions of topic for {TIMEOUT:g} s" in str(unknown)

    kafka.topics.add("topic")
    sender = make(max_in_flight=1)
    sent, *waiting = start(sender, b"1", b"2")
    (await kafka.producer(1)).take_off()
    (unconfirmed,) = await results([sent])
    assert type(unconfirmed) is OutcomeUnknown
    assert "partition 0" in str(unconfirmed)
    assert "all in-sync replicas" in str(unconfirmed)
    assert [type(error) for error in await results(waiting)] == [BrokerUnavailable]
