"""What a batch for Kafka does inside aiokafka's producer, which has no connection here."""

import asyncio

import pytest

pytest.importorskip("aiokafka")

from aiokafka import AIOKafkaProducer, TopicPartition

from diator.brokers.kafka._batch import Batch, Call

PLACE = TopicPartition("topic", 0)


@pytest.fixture
async def producer():
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", request_timeout_ms=1, max_batch_size=1000)
    yield producer
    producer._closed = True


def call(value=b"{}", *, is_alone=False):
    confirmed = asyncio.get_running_loop().create_future()
    return Call(PLACE, None, value, [], None, 0.0, confirmed, is_alone)


def queued(producer):
    return [batch.record_count for batch in producer._message_accumulator._batches.get(PLACE, ())]


async def test_it_takes_what_it_has_room_for(producer):
    batch = Batch(producer, call(), settle=print)
    assert batch.takes(call())
    assert not batch.takes(call(b"x" * 1000))
    assert queued(producer) == [2]
    assert len(batch.calls) == 2


async def test_it_takes_nothing_once_it_is_on_its_way(producer):
    batch = Batch(producer, call(), settle=print)
    assert not batch.is_sent
    producer._message_accumulator._pop_batch(PLACE)
    assert batch.is_sent
    assert not batch.takes(call())


@pytest.mark.parametrize("first", [True, False])
async def test_what_goes_alone_has_nothing_beside_it(producer, first):
    batch = Batch(producer, call(is_alone=first), settle=print)
    assert not batch.takes(call(is_alone=not first))


async def test_what_was_taken_back_is_empty_at_once_and_then_out_of_the_way(producer):
    """In front of what comes later it would be all that aiokafka looks at."""
    first, second = Batch(producer, call(), settle=print), Batch(producer, call(), settle=print)
    first.take_back()
    assert queued(producer) == [0, 1]
    await asyncio.sleep(0)
    assert queued(producer) == [1]
    second.take_back()
    await asyncio.sleep(0)
    assert PLACE not in producer._message_accumulator._batches


async def test_what_was_taken_back_may_have_left_meanwhile(producer):
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    batch = Batch(producer, call(), settle=print)
    batch.take_back()
    producer._message_accumulator._pop_batch(PLACE)
    await asyncio.sleep(0)
    assert queued(producer) == problems == []


async def test_aiokafka_does_not_end_it_before_its_time(producer):
    Batch(producer, call(), settle=print)
    await asyncio.sleep(0.01)
    (batch,) = producer._message_accumulator._batches[PLACE]
    assert not batch.expired()
