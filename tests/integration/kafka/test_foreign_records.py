"""Records that other programs write. None of them stops the next one."""

import asyncio
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from textwrap import dedent
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import OffsetAndMetadata

from diator.brokers.codec import encode
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._consumer import KafkaConsumer, ReadOptions
from diator.exceptions import MessageRejected
from tests.integration.kafka.helpers import COUNTED, acked, message, number_of, send, stored, subscribed, take

KIB, MIB = 1024, 1024 * 1024


@asynccontextmanager
async def foreign(servers, **options):
    """Plain aiokafka, which sends as *options* say."""
    options = {"max_request_size": 2**30, "enable_idempotence": False, "linger_ms": 50, **options}
    async with AIOKafkaProducer(bootstrap_servers=servers, **options) as producer:
        yield producer


@pytest.fixture
def odd_header_names(monkeypatch):
    """In what is written now, two bytes stand in the place of the header names `ZZ`: they are not UTF-8."""
    build = BatchBuilder._build

    def build_odd(self):
        written = bytearray(build(self))
        while (at := written.find(b"ZZ")) > 0:
            written[at : at + 2] = b"\xff\xfe"
            struct.pack_into(">I", written, 17, calc_crc32c(bytes(written[21:])))
        return written

    return lambda: monkeypatch.setattr(BatchBuilder, "_build", build_odd)


def body(number, pad=0):
    return encode(message(number), max_bytes=2**30)[:-1] + b',"pad":"' + b"x" * pad + b'"}'


async def dead_letters(servers, name):
    """Return the dead letters, each with its headers as a dictionary."""
    letters = await stored(servers, f"{name}.billing-dlq")
    return [(letter, dict(letter.headers)) for letter in letters]


# -- compression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_messages_of_other_programs_may_be_compressed(make, kafka_servers, name, admin, codec) -> None:
    """The topic too: Kafka compresses what diator sends, then."""
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"compression.type": codec})])
    broker = await make(kafka_servers)
    async with foreign(kafka_servers, compression_type=codec) as producer, subscribed(broker) as deliveries:
        await asyncio.gather(*(producer.send_and_wait(name, body(number, 500)) for number in range(3)))
        await send(broker, 3)
        first, *others = await take(deliveries, 4)
        await first.retry(after=0.1)
        (again,) = await take(deliveries, 1)
        await again.dead_letter("no good")

    assert sorted(map(number_of, [again, *others])) == [0, 1, 2, 3]
    ((letter, _),) = await dead_letters(kafka_servers, name)
    assert letter.value == first.body


async def test_a_batch_that_becomes_too_large_is_dead_lettered_alone(make, kafka_servers, name) -> None:
    broker = await make(kafka_servers, partitions=1)
    async with (
        foreign(kafka_servers, compression_type="gzip", max_batch_size=2**29) as producer,
        subscribed(broker) as deliveries,
    ):
        await send(broker, 0)
        await producer.send_and_wait(name, bytes(60 * MIB))
        await send(broker, 1)
        before, large, after = await take(deliveries, 3)
        assert large.unreadable is not None
        await large.dead_letter(large.unreadable)
        for delivery in (before, after):
            await delivery.ack()
    async with subscribed(broker) as deliveries:
        await send(broker, 2)
        assert await acked(deliveries, 1) == [2]  # the position is beyond it

    assert [number_of(before), large.body, number_of(after)] == [0, b"", 1]
    ((letter, headers),) = await dead_letters(kafka_servers, name)
    assert letter.value is None
    why = f"{name}, partition 0, offset 1: the batch cannot be decompressed from gzip"
    assert headers["diator-dlq-reason"].decode().startswith(why)
    assert (headers["diator-dlq-partition"], headers["diator-dlq-offset"]) == (b"0", b"1")


async def test_many_large_messages_are_not_held_at_once(make, kafka_servers, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"max.message.bytes": str(10 * MIB)})])
    broker = await make(kafka_servers)
    async with foreign(kafka_servers, max_batch_size=10 * MIB) as producer:
        for _ in range(20):
            await producer.send_and_wait(name, bytes(6 * MIB))
    async with subscribed(broker) as deliveries:
        taken = await take(deliveries, 2)
        await asyncio.sleep(0.5)
        assert len(deliveries._received) == 0
        for _ in range(18):
            await taken.pop(0).ack()
            taken += await take(deliveries, 1)


WITHOUT_CODECS = """
    import asyncio, sys
    sys.modules["cramjam"] = None  # as if it were not installed
    from diator.brokers.base import Topic
    from diator.brokers.kafka import KafkaMessageBroker
    from diator.exceptions import ConfigurationError

    async def main(servers, prefix):
        async with KafkaMessageBroker(servers, prefix, session_timeout=6, heartbeat_interval=0.1) as broker:
            try:
                async with broker.subscribe([Topic("notification_event", "Counted")], group="billing") as deliveries:
                    while True:
                        async with asyncio.timeout(20):
                            delivery = await anext(deliveries)
                        print(delivery.body.count(b"number"))
                        await delivery.ack()
            except ConfigurationError as error:
                print(error)

    asyncio.run(main(*sys.argv[1:]))
"""


async def without_codecs(servers, prefix):
    """Return what a program prints that reads without cramjam: 1 for each message, and the error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", dedent(WITHOUT_CODECS), servers, prefix),
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )
    printed, _ = await process.communicate()
    return printed.decode().splitlines()


async def test_without_the_package_what_comes_before_is_read(make, kafka_servers, prefix, name) -> None:
    broker = await make(kafka_servers, partitions=1)
    async with foreign(kafka_servers, compression_type="zstd") as producer:
        await send(broker, 0, 1)
        await producer.send_and_wait(name, body(2, 500))

    *read, error = await without_codecs(kafka_servers, prefix)
    again = await without_codecs(kafka_servers, prefix)

    assert read == ["1", "1"]
    assert error == (
        f"{name}, partition 0 has messages that are compressed with zstd, and the package cramjam is missing, which "
        "decompresses them: pip install 'diator[kafka]'"
    )
    assert again == [error]


async def test_without_the_package_a_compressed_topic_is_refused_at_once(kafka_servers, prefix, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"compression.type": "lz4"})])

    (error,) = await without_codecs(kafka_servers, prefix)

    assert error.startswith(f"the topic {name} has messages that are compressed with lz4, and the package cramjam")


# -- headers, keys and values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True], ids=["retry topic", "in place"])
async def test_what_is_passed_on_is_as_it_was(make, kafka_servers, name, odd_header_names, in_place) -> None:
    """After a retry, too: values that are null, names and keys that are not UTF-8, headers of one name."""
    broker = await make(kafka_servers, partitions=1, retry_in_place=in_place)
    records = [(b"\xff\x00", body(0)), (None, b"x"), (b"", b""), (b"k", None)]
    odd = [("ZZ", b"v"), ("a", b"1"), ("a", None), ("", b"\xff\x00"), ("diator-dlq-reason", b"own"), ("key", b"own")]
    async with foreign(kafka_servers) as producer, subscribed(broker) as deliveries:
        odd_header_names()
        for key, value in records:
            await producer.send_and_wait(name, value, key=key, headers=odd)
        for delivery in await take(deliveries, 4):
            await delivery.retry(after=0.1)
        for delivery in await take(deliveries, 4):
            assert (delivery.attempt, delivery.headers["\ufffd\ufffd"], delivery.headers["a"]) == (2, "v", "")
            await delivery.dead_letter("no good")

    letters = await odd_stored(kafka_servers, f"{name}.billing-dlq")
    assert sorted([(key, value) for key, value, _ in letters], key=repr) == sorted(records, key=repr)
    wanted = [(b"\xff\xfe" if header == "ZZ" else header.encode(), value) for header, value in odd]
    assert [headers[: len(odd)] for _, _, headers in letters] == [wanted] * 4


async def odd_stored(servers, name):
    """Return key, value and headers of the records of a topic of one partition, whose header names are not UTF-8."""
    place, records = TopicPartition(name, 0), []
    async with reading(servers, place) as consumer:
        end = (await consumer.end_offsets([place]))[place]
        while len(records) < end:
            await consumer.fetched()
            records += (await consumer.take(100)).get(place, [])
    return [(each.key, each.value, [(header.encode(), value) for header, value in each.headers]) for each in records]


@asynccontextmanager
async def reading(servers, place):
    """Read *place* from its beginning."""
    options = ReadOptions(
        session_timeout=6.0,
        heartbeat_interval=1.0,
        drain_timeout=1.0,
        max_unacked_per_partition=100,
        extra_prefetch=0,
        in_place=False,
        metadata_max_age=60.0,
        max_message_bytes=MIB,
        assignment_timeout=1.0,
    )
    consumer = KafkaConsumer(Cluster(bootstrap_servers=(servers,), timeout=5.0), options, None)
    await consumer.start()
    try:
        await consumer.partitions_of(place.topic)
        consumer.assign([place])
        consumer.seek(place, 0)
        yield consumer
    finally:
        await consumer.end()


@pytest.mark.parametrize(
    ("offset", "error_code", "late"), [(0, 6, b""), (1, 0, b"messages of the former leader")], ids=["error", "messages"]
)
async def test_a_late_answer_of_a_former_leader_changes_nothing(kafka_servers, name, offset, error_code, late) -> None:
    async def answer_late(*_: object) -> SimpleNamespace:
        return SimpleNamespace(topics=[(name, [(0, error_code, -1, late)])])

    async with foreign(kafka_servers, compression_type="zstd") as producer:
        await producer.send_and_wait(name, b"the message")
    place = TopicPartition(name, 0)
    async with reading(kafka_servers, place) as consumer:
        await consumer.fetched()
        consumer._ask = answer_late
        await consumer._send(0, FetchRequest(0, 0, 0, 0, [(name, [(0, offset, 1)])]))
        taken = await consumer.take(10)

    assert [record.value for record in taken[place]] == [b"the message"]


async def test_many_headers_and_large_ones_are_passed(make, kafka_servers, name) -> None:
    broker = await make(kafka_servers, partitions=1)
    async with foreign(kafka_servers, max_batch_size=MIB) as producer, subscribed(broker) as deliveries:
        await producer.send_and_wait(name, body(0), headers=[(str(number), b"v") for number in range(90_000)])
        await producer.send_and_wait(name, body(1), headers=[("h", bytes(900 * KIB))])
        await producer.send_and_wait(name, body(2), key=bytes(900 * KIB))
        await send(broker, 3)
        *odd, good = await take(deliveries, 4)
        for delivery in odd:
            await delivery.retry(after=0.1)
        for delivery in await take(deliveries, 3):
            await delivery.dead_letter("no good")

    assert number_of(good) == 3
    letters = await dead_letters(kafka_servers, name)
    assert sorted(json.loads(letter.value)["payload"]["number"] for letter, _ in letters) == [0, 1, 2]
    assert [headers.get("diator-dlq-omitted") for _, headers in letters] == [None] * 3


async def test_transactions_and_their_control_batches_are_read_as_they_should_be(make, kafka_servers, name) -> None:
    broker = await make(kafka_servers, partitions=1)
    async with subscribed(broker) as deliveries:
        for number, codec in enumerate([None, "gzip", "zstd"]):
            options = {"transactional_id": f"{name}-{number}", "compression_type": codec, "enable_idempotence": True}
            async with foreign(kafka_servers, **options) as producer:
                for abort in (True, False):
                    await producer.begin_transaction()
                    await producer.send_and_wait(name, body(-1 if abort else number, 500))
                    await (producer.abort_transaction() if abort else producer.commit_transaction())
        await send(broker, 3)
        assert await acked(deliveries, 4) == [0, 1, 2, 3]


async def test_a_record_with_the_offset_of_another_one_hides_no_message(make, kafka_servers, name, monkeypatch) -> None:
    """The offsets in a batch are the sender's, and Kafka does not check them."""
    broker = await make(kafka_servers, partitions=1)

    def build(_):
        builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, -1, MIB)
        for delta in (0, 1000):
            builder.append(delta, 1_772_000_000_000, None, body(delta), [])
        builder._last_offset = 1
        return bytearray(builder.build())

    async with foreign(kafka_servers) as producer, subscribed(broker) as deliveries:
        await send(broker, 1)
        monkeypatch.setattr(BatchBuilder, "_build", build)
        await producer.send_and_wait(name, b"replaced")
        await send(broker, 2, 3)
        before, first, wrong, *after = await take(deliveries, 5)
        await wrong.dead_letter("undecodable")
        for delivery in (before, first, *after):
            await delivery.ack()

    assert [number_of(each) for each in (before, first, *after)] == [1, 0, 2, 3]
    ((letter, headers),) = await dead_letters(kafka_servers, name)
    assert (letter.value, headers["diator-dlq-offset"]) == (None, b"2")


# -- what a retry topic and a commit may say -----------------------------------------------------------------------


async def test_forged_retries_hold_no_real_one_up(make, kafka_servers, name) -> None:
    broker = await make(kafka_servers)
    async with foreign(kafka_servers) as producer, subscribed(broker) as deliveries:
        for due in (b"99999999999999", b"9" * 400, b"-1"):
            control = [("diator-retry-attempt", b"2"), ("diator-retry-due", due), ("diator-retry-origin", b"0:0")]
            sends = [
                producer.send(f"{name}.billing-retry", b"forged", partition=0, headers=control) for _ in range(100)
            ]
            await asyncio.gather(*[await each for each in sends])
        await send(broker, 1)
        again = Counter[bytes]()
        async with asyncio.timeout(20):
            while again.total() < 301:
                delivery = await anext(deliveries)
                if delivery.attempt == 1:
                    await delivery.retry(after=0.5)
                else:
                    again[delivery.body[:6]] += 1
                    await delivery.ack()

    assert again == {b"forged": 300, b'{"mess': 1}


@pytest.mark.parametrize("metadata", ["1 0+99999999999999", "1 5:" + "9" * 400, "garbage", "1 " + "9" * 3000 + "+1"])
async def test_metadata_that_another_program_committed_hides_no_message(
    make, kafka_servers, prefix, name, metadata
) -> None:
    broker = await make(kafka_servers, partitions=1)
    for number in range(3):
        await send(broker, number)
    other = AIOKafkaConsumer(bootstrap_servers=kafka_servers, group_id=f"{prefix}.billing", enable_auto_commit=False)
    await other.start()
    try:
        other.assign([TopicPartition(name, 0)])
        await other.commit({TopicPartition(name, 0): OffsetAndMetadata(1, metadata)})
    finally:
        await other.stop()

    async with subscribed(broker) as deliveries:
        taken = await take(deliveries, 2)

    assert [(number_of(each), each.attempt) for each in taken] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("timestamp", [0, 1_772_000_000_000_000, 2**62])
async def test_the_time_of_a_record_may_be_any(make, kafka_servers, name, admin, timestamp) -> None:
    """Its reader stands still, and Kafka removes what it has not read. That is a gap, since some time in the past."""
    configs = {"message.timestamp.after.max.ms": str(2**63 - 1)}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])
    gaps = []
    broker = await make(kafka_servers, max_unacked_per_partition=5, extra_prefetch=0, max_message_bytes=20_000)
    async with foreign(kafka_servers) as producer, subscribed(broker, prefetch=2, on_gap=gaps.append) as deliveries:

        async def write(numbers):
            for number in numbers:
                await producer.send(name, body(number, 15_000), timestamp_ms=timestamp)
            await producer.flush()

        await write(range(5))
        held = await take(deliveries, 2)
        await write(range(5, 300))
        await asyncio.sleep(0.5)
        await admin.delete_records({TopicPartition(name, 0): RecordsToDelete(290)})
        for delivery in held:
            await delivery.ack()
        last: list[int] = []
        while 299 not in last:
            last += await acked(deliveries, 1)

    assert {*range(290, 300)} <= {*last}
    (gap,) = gaps
    assert gap.since <= gap.until


# -- dead letters --------------------------------------------------------------------------------------------------


async def described(admin, name):
    (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    ((_, _, _, _, settings),) = answer.resources
    return {setting[0]: setting[1] for setting in settings}


async def test_a_group_s_own_topics_accept_what_their_source_accepts(make, kafka_servers, name, admin) -> None:
    configs = {"max.message.bytes": str(5 * MIB), "compression.type": "gzip"}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])
    broker = await make(kafka_servers)
    async with foreign(kafka_servers, max_batch_size=5 * MIB) as producer, subscribed(broker) as deliveries:
        await producer.send_and_wait(name, large := body(0, 4 * MIB))
        (delivery,) = await take(deliveries, 1)
        await delivery.retry(after=0.1)
        (again,) = await take(deliveries, 1)
        await again.dead_letter("r" * 2000)

    ((letter, headers),) = await dead_letters(kafka_servers, name)
    assert letter.value == large
    assert "diator-dlq-omitted" not in headers
    for of_group in ("billing-retry", "billing-dlq"):
        settings = await described(admin, f"{name}.{of_group}")
        assert int(settings["max.message.bytes"]) >= 5 * MIB + 64 * KIB
        assert settings["compression.type"] == "gzip"


async def test_a_source_with_the_largest_limit_of_all_has_a_retry_topic(make, kafka_servers, name, admin) -> None:
    """Kafka refuses a topic with more. Some clusters allow less."""
    configs = {"max.message.bytes": str(2**31 - 1)}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])
    broker = await make(kafka_servers)
    async with subscribed(broker) as deliveries:
        await send(broker, 0)
        (delivery,) = await take(deliveries, 1)
        await delivery.retry(after=0.1)
        (again,) = await take(deliveries, 1)
        await again.dead_letter("no good")

    assert len(await dead_letters(kafka_servers, name)) == 1


async def test_a_message_of_the_largest_size_is_dead_lettered_whole(make, kafka_servers, name) -> None:
    broker = await make(kafka_servers, partitions=1)
    async with foreign(kafka_servers, max_batch_size=2 * MIB) as producer, subscribed(broker) as deliveries:
        await producer.send_and_wait(name, largest := bytes(1_048_588 - 80))
        await send(broker, 1)
        large, good = await take(deliveries, 2)
        await large.dead_letter("r" * 2000)
        await good.ack()

    ((letter, _),) = await dead_letters(kafka_servers, name)
    assert letter.value == largest


async def test_a_dead_letter_that_does_not_fit_is_stored_without_its_body(make, kafka_servers, name, admin) -> None:
    """Somebody made the dead-letter topic for small messages, or allowed larger ones in the source later."""
    configs = {"max.message.bytes": "20000"}
    beside = [NewTopic(f"{name}.billing-{what}", 1, 1, topic_configs=configs) for what in ("dlq", "retry")]
    await admin.create_topics([NewTopic(name, 1, 1), *beside])
    broker = await make(kafka_servers)
    async with foreign(kafka_servers) as producer, subscribed(broker) as deliveries:
        await producer.send_and_wait(name, body(0, 100_000), key=b"k", headers=[("colour", b"red")])
        await producer.send_and_wait(name, body(1, 100), key=b"k", headers=[("colour", bytes(100_000))])
        await producer.send_and_wait(name, small := body(2, 100))
        large, wide, good = await take(deliveries, 3)
        with pytest.raises(MessageRejected, match="too large"):
            await large.retry(after=0.1)
        await large.dead_letter("no good")
        await wide.dead_letter("no good")
        await good.dead_letter("no good")
        (finding,) = [each for each in await broker.audit() if "for the topic beside it" in each.problem]

    assert f"{name}.billing-dlq, {name}.billing-retry: max.message.bytes is 20,000" in finding.problem

    (one, one_headers), (two, two_headers), (three, three_headers) = await dead_letters(kafka_servers, name)
    assert (one.value, one.key, one_headers["colour"]) == (None, b"k", b"red")
    assert (two.value, two.key, "colour" in two_headers) == (None, None, False)
    assert (three.value, "diator-dlq-omitted" in three_headers) == (small, False)
    assert (one_headers["diator-dlq-omitted"], two_headers["diator-dlq-omitted"]) == (b"body", b"body,headers,key")
    where = [(each["diator-dlq-source"], each["diator-dlq-offset"]) for each in (one_headers, two_headers)]
    assert where == [(name.encode(), b"0"), (name.encode(), b"1")]


async def test_a_deleted_dead_letter_topic_is_created_again(broker, kafka_servers, name, admin) -> None:
    await send(broker, 0, 1)
    async with subscribed(broker) as deliveries:
        first, second = await take(deliveries, 2)
        await first.dead_letter("no good")
        await admin.delete_topics([f"{name}.billing-dlq"])
        await asyncio.sleep(0.5)
        await second.dead_letter("no good")

    assert len(await dead_letters(kafka_servers, name)) == 1


async def test_the_attempts_that_a_sender_claims_do_not_count(broker, kafka_servers, name) -> None:
    claims = [("diator-attempt", b"99"), ("x-delivery-count", b"99"), ("diator-retry-attempt", b"99")]
    claims += [("diator-retry-due", b"99999999999999"), ("diator-retry-origin", b"0:0")]
    async with foreign(kafka_servers) as producer, subscribed(broker) as deliveries:
        await producer.send_and_wait(name, body(0), headers=claims)
        (delivery,) = await take(deliveries, 1)

    assert (delivery.topic, delivery.attempt, len(delivery.headers)) == (COUNTED, 1, 5)
