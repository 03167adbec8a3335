"""What a batch for Kafka does inside aiokafka's producer, which has no connection here."""

import inspect
import re

import pytest

pytest.importorskip("aiokafka")

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import UnknownError
from aiokafka.producer.message_accumulator import MessageBatch
from aiokafka.record.default_records import DefaultRecordBatch

from diator.brokers.kafka._batch import Records, record_size
from diator.brokers.kafka._client import drop_empty, enqueue, without_own_end
from diator.brokers.kafka._unconfirmed import Batch, Call

PLACE = TopicPartition("topic", 0)


@pytest.fixture
async def producer():
    """Idempotent, as if Kafka had named it."""
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", request_timeout_ms=1, enable_idempotence=True)
    producer._txn_manager.set_pid_and_epoch(7, 0)
    return without_own_end(producer)


@pytest.fixture
def queued(producer):
    """Queues a batch of so many messages; *settled* are the batches that aiokafka has settled, and how."""

    def queued(*values) -> Batch:
        batch = Batch(producer, call(values[0]), 1_000)
        for value in values[1:]:
            assert batch.take(call(value))
        enqueue(producer, Records(batch, lambda *ended: queued.settled.append(ended)), PLACE)
        return batch

    queued.settled = []
    return queued


def call(value=b"{}", key=None, headers=None) -> Call:
    return Call(PLACE, key, value, headers, record_size(key, value, headers), None, 0.0, confirmed=None)


def in_queue(producer):
    return [batch.record_count for batch in producer._message_accumulator._batches.get(PLACE, ())]


def taken(producer):
    """What aiokafka's sender takes next."""
    return producer._message_accumulator._pop_batch(PLACE)


async def test_a_batch_takes_messages_while_it_is_queued(producer, queued):
    batch = queued(b"1")
    assert batch.take(call(b"2"))
    assert in_queue(producer) == [2]


async def test_a_batch_is_sealed_when_aiokafka_takes_it(producer, queued):
    """It has counted the records then, and would give the same numbers to the next."""
    batch = queued(b"1", b"2")
    taken(producer)
    assert (batch.is_sent, batch.is_open) == (True, False)
    assert producer._txn_manager.sequence_number(PLACE) == 2


async def test_the_records_are_written_with_the_producer_s_numbers(producer, queued):
    queued(b"1", b"2")
    taken(producer)
    batch = queued(b"3")
    batch.take(call(b"4", key=b"k", headers=[("colour", b"red")]))
    written = taken(producer).get_data_buffer()
    read = DefaultRecordBatch(bytes(written))
    assert read.validate_crc()
    assert (read.producer_id, read.producer_epoch, read.base_sequence, read.last_offset_delta) == (7, 0, 2, 1)
    records = [*read]
    assert [(each.value, each.key, each.headers) for each in records] == [
        (b"3", None, []),
        (b"4", b"k", [("colour", b"red")]),
    ]


async def test_a_batch_that_is_sent_again_is_the_same(producer, queued):
    queued(b"1")
    sent = taken(producer)
    first = bytes(sent.get_data_buffer())
    producer._message_accumulator.reenqueue(sent)
    again = taken(producer)
    assert bytes(again.get_data_buffer()) == first


async def test_a_confirmation_settles_the_batch_once_and_for_all(producer, queued):
    batch = queued(b"1", b"2", b"3")
    taken(producer).done(base_offset=5, timestamp=-1)
    assert queued.settled == [(batch, None)]


async def test_a_refusal_settles_the_batch_with_the_error(producer, queued):
    batch = queued(b"1", b"2")
    taken(producer).failure(UnknownError())
    ((settled, error),) = queued.settled
    assert settled is batch
    assert isinstance(error, UnknownError)


async def test_nothing_is_sent_of_a_batch_that_was_withdrawn(producer, queued):
    batch = queued(b"1")
    batch.withdraw()
    sent = taken(producer)
    assert sent.is_empty()  # of which aiokafka sends nothing
    assert producer._txn_manager.sequence_number(PLACE) == 0


async def test_empty_batches_leave_the_queue(producer, queued):
    """In front of a later one it would be all that aiokafka looks at in its turn."""
    first, second = queued(b"1"), queued(b"2")
    first.withdraw()
    assert in_queue(producer) == [0, 1]
    drop_empty(producer, [PLACE])
    assert in_queue(producer) == [1]
    second.withdraw()
    drop_empty(producer, [PLACE, TopicPartition("other", 0)])
    assert not producer._message_accumulator._batches


async def test_aiokafka_does_not_give_up_a_batch(producer, queued):
    """It would after the time of a request, if the partition has no leader. The deadlines are diator's."""
    queued(b"1")
    (batch,) = producer._message_accumulator._batches[PLACE]
    batch._ctime -= 3_600
    assert not batch.expired()


@pytest.mark.parametrize("key", [None, b"", b"k" * 300])
@pytest.mark.parametrize("value", [b"", b"v" * 100, b"v" * 100_000])
@pytest.mark.parametrize("headers", [None, [], [("ä" * 100, b"x" * 1_000), ("b", b"")]])
async def test_a_record_takes_no_more_bytes_than_it_is_counted_for(producer, queued, key, value, headers):
    several = [call(value, key, headers) for _ in range(200)]
    batch = Batch(producer, several[0], 100_000_000)
    enqueue(producer, Records(batch, print), PLACE)
    for each in several[1:]:
        assert batch.take(each)
    overhead = 61  # of a batch without records
    written = len(taken(producer).get_data_buffer()) - overhead
    assert written <= batch.size <= written + 36 * len(several)


def test_records_have_all_that_aiokafka_asks_of_a_builder():
    asked = {*re.findall(r"self\._builder\.(\w+)", inspect.getsource(MessageBatch))}
    assert asked <= {*vars(Records)}
    assert asked  # else this test has lost its sense
