"""What Kafka answers to a fetch, with batches in it that no client of Kafka would write."""

import gzip
import mmap
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiokafka")
pytest.importorskip("cramjam")

import cramjam
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

from diator.brokers.kafka import _fetched
from diator.brokers.kafka._fetched import _MAX_HEADERS, Fetched, ForeignRecord, HeaderName, Unreadable, records_of
from diator.exceptions import ConfigurationError

PLACE = TopicPartition("shop.notification_event.OrderPaid", 0)
HEADER_BYTES = 61
KIB = 1024
STATM = Path("/proc/self/statm")


def compressed_by_java(records):
    """Blocks, as Java's snappy writes them."""
    blocks = [bytes(cramjam.snappy.compress_raw(records[at : at + 100])) for at in range(0, len(records), 100)]
    return b"\x82SNAPPY\0" + bytes([0, 0, 0, 1, 0, 0, 0, 1]) + b"".join(struct.pack(">i", len(x)) + x for x in blocks)


CODECS = {
    "gzip": (1, gzip.compress),
    "gzip twice": (1, lambda records: gzip.compress(records[:5]) + gzip.compress(records[5:])),
    "snappy": (2, lambda records: bytes(cramjam.snappy.compress_raw(records))),
    "Java's snappy": (2, compressed_by_java),
    "lz4": (3, lambda records: bytes(cramjam.lz4.compress(records))),
    "zstd": (4, lambda records: bytes(cramjam.zstd.compress(records))),
}


def batch(*records, at=0, codec=0, compress=bytes, attributes=0, producer=-1, deltas=None):
    """Return the batch of *records* (values, or tuples of value and headers), whose first offset is *at*."""
    builder = _DefaultRecordBatchBuilderPy(2, 0, 0, producer, 0, 0, 2**31 - 1)
    for number, record in enumerate(records):
        value, headers = record if isinstance(record, tuple) else (record, [])
        builder.append(number if deltas is None else deltas[number], 1_000 + number, b"k", value, headers)
    builder._last_offset = len(records) - 1
    written = bytes(builder.build())
    return changed(written[:HEADER_BYTES] + compress(written[HEADER_BYTES:]), at, attributes | codec)


def changed(written, at=0, attributes=0):
    """Return the batch *written* as Kafka would give it, with its length and its CRC."""
    written = bytearray(written)
    struct.pack_into(">qi", written, 0, at, len(written) - 12)
    struct.pack_into(">h", written, 21, attributes)
    struct.pack_into(">I", written, 17, calc_crc32c(bytes(written[21:])))
    return bytes(written)


def resident_bytes():
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


class Reader:
    """Reads answers as the client does."""

    def __init__(self, most=64 * KIB):
        self.most = most
        self.corrupt, self.problems = set(), {}

    def read(self, *batches, begin=0, aborted=None):
        answer = b"".join(batches)
        records = MemoryRecords(answer)
        parsing = PartitionRecords(
            *(PLACE, records, aborted, begin, None, None), check_crcs=True, isolation_level=READ_COMMITTED
        )
        fetched = Fetched(PLACE, parsing, answer, most=self.most, corrupt=self.corrupt, problems=self.problems)
        records = [*fetched]
        self.next = fetched.next_fetch_offset
        return records


def values(records):
    return [record.why if type(record) is Unreadable else record.value for record in records]


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_batches_are_read(codec):
    number, compress = CODECS[codec]
    reader = Reader()
    read = reader.read(batch(b"0"), batch(b"1", b"2" * 500, at=1, codec=number, compress=compress), batch(b"3", at=3))

    assert values(read) == [b"0", b"1", b"2" * 500, b"3"]
    assert [each.timestamp for each in read] == [1_000, 1_000, 1_001, 1_000]
    assert reader.next == 4


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_that_would_be_too_large_is_left_out_alone(codec):
    number, compress = CODECS[codec]
    large = batch(bytes(100 * KIB), b"1", at=1, codec=number, compress=compress)
    before, unreadable, after = Reader().read(batch(b"0"), large, batch(b"3", at=3))

    assert (before.value, after.value) == (b"0", b"3")
    assert (unreadable.offset, unreadable.value, unreadable.key) == (2, None, None)
    assert f"{PLACE.topic}, partition 0, offset 1 to 2: the batch cannot be decompressed" in unreadable.why
    assert [*unreadable.headers] == []


@pytest.mark.parametrize("codec", ["none", "gzip", "zstd"])
def test_a_record_with_too_many_headers_is_left_out_alone(codec):
    number, compress = CODECS.get(codec, (0, bytes))
    most, too_many = [[("", b"")] * (_MAX_HEADERS + more) for more in (0, 300_000)]
    large = batch(b"1", (b"2", most), (b"3", too_many), b"4", at=1, codec=number, compress=compress)
    reader = Reader(most=4 * KIB * KIB)
    tracemalloc.start()
    read = reader.read(batch(b"0"), large, batch(b"5", at=5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    why = f"{PLACE.topic}, partition 0, offset 3: the record has 400,000 headers, more than 100,000"
    assert values(read) == [b"0", b"1", b"2", why, b"4", b"5"]
    assert [each.offset for each in read] == [0, 1, 2, 3, 4, 5]
    assert len(read[2].headers) == _MAX_HEADERS
    assert peak < 16 * KIB * KIB + len(large)


@pytest.mark.parametrize("length", [0, 1])  # of the first record; 1 stands for -1
def test_headers_are_not_counted_for_ever(length):
    large = bytearray(batch(b"1" * 300 * KIB))
    large[HEADER_BYTES] = length
    struct.pack_into(">i", large, HEADER_BYTES - 4, 2**31 - 1)  # as many records

    [unreadable] = Reader().read(changed(large))
    assert type(unreadable) is Unreadable


@pytest.mark.parametrize("codec", ["gzip", "gzip twice"])
@pytest.mark.parametrize(
    "read",
    [test_compressed_batches_are_read, test_a_batch_that_would_be_too_large_is_left_out_alone],
    ids=["small", "large"],
)
def test_gzip_needs_no_package(monkeypatch, codec, read):
    monkeypatch.setattr(_fetched, "has_zstd", lambda: False)

    read(codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("has_package", [True, False])
def test_what_becomes_too_large_takes_no_memory(monkeypatch, codec, has_package):
    number, compress = CODECS[codec]
    if not has_package:
        if number > 1:
            pytest.skip("needs the package")
        monkeypatch.setattr(_fetched, "has_zstd", lambda: False)
    bomb = batch(bytes(16 * KIB * KIB), codec=number, compress=compress)
    tracemalloc.start()
    try:
        (unreadable,) = Reader(most=KIB * KIB).read(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert type(unreadable) is Unreadable
    assert peak < 3 * KIB * KIB + 3 * len(bomb)


@pytest.mark.skipif(not STATM.exists(), reason="Linux tells how much memory is resident")
@pytest.mark.parametrize("codec", CODECS)
def test_a_small_batch_takes_little_of_the_memory_that_it_might(codec):
    number, compress = CODECS[codec]
    small = batch(b"1" * KIB, codec=number, compress=compress)
    before = resident_bytes()
    plain = _fetched._decompressed(small, _fetched._CODECS[number], 256 * KIB * KIB)

    assert len(plain) > KIB
    assert resident_bytes() - before < 8 * KIB * KIB


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "gzip twice"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["cut", "empty", "noise"],
)
def test_what_cannot_be_decompressed_is_left_out_alone(codec, damage):
    number, compress = CODECS[codec]
    bad = batch(b"1", at=1, codec=number, compress=lambda records: damage(compress(records)))
    before, unreadable, after = Reader().read(batch(b"0"), bad, batch(b"2", at=2))

    assert (before.value, unreadable.offset, after.value) == (b"0", 1, b"2")
    assert type(unreadable) is Unreadable


@pytest.mark.parametrize("number", [5, 6, 7])
def test_an_unknown_codec_is_left_out_alone(number):
    _, unreadable, after = Reader().read(batch(b"0"), batch(b"1", at=1, codec=number), batch(b"2", at=2))

    assert f"codec {number}" in unreadable.why
    assert after.value == b"2"


def test_an_answer_is_not_decompressed_all_at_once():
    reader = Reader(most=64 * KIB)
    batches = [batch(bytes(40 * KIB), at=at, codec=1, compress=gzip.compress) for at in range(10)]

    assert len(reader.read(*batches)) == 2
    assert reader.next == 2  # from where it is fetched again
    assert len(reader.read(*batches[2:], begin=2)) == 2


def test_a_missing_package_stops_only_what_needs_it(monkeypatch):
    monkeypatch.setattr(_fetched, "has_zstd", lambda: False)
    reader = Reader()
    zipped = batch(b"1", at=1, codec=1, compress=gzip.compress)

    read = reader.read(batch(b"0"), zipped, batch(b"2", at=2, codec=4), batch(b"3", at=3))

    assert values(read) == [b"0", b"1"]
    assert reader.next == 2
    assert type(reader.problems[PLACE]) is ConfigurationError
    assert "compressed with zstd, and the package cramjam is missing" in str(reader.problems[PLACE])


@pytest.mark.parametrize("codec", [None, *CODECS])
def test_a_header_name_that_is_not_utf8_stops_no_record(codec):
    number, compress = CODECS[codec] if codec else (0, bytes)
    odd = (b"1", [("a", b"1"), (HeaderName(b"\xff\xfe"), None), ("a", b"\xff")])
    reader = Reader()

    read = reader.read(batch(b"0", odd, b"2", codec=number, compress=compress), batch(b"3", at=3))

    assert values(read) == [b"0", b"1", b"2", b"3"]
    assert read[1].headers == [("a", b"1"), ("\ufffd\ufffd", None), ("a", b"\xff")]
    assert [name.encode() for name, _ in read[1].headers] == [b"a", b"\xff\xfe", b"a"]
    assert (read[1].offset, read[1].timestamp, read[1].key) == (1, 1_001, b"k")
    assert reader.next == 4


def test_records_that_were_read_before_are_not_read_again():
    odd = (b"2", [(HeaderName(b"\xff"), b"")])

    assert values(Reader().read(batch(b"0", b"1", odd, b"3"), begin=2)) == [b"2", b"3"]


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize(
    ("deltas", "read"), [((0, 1, 1000), [b"0", b"1"]), ((0, 1000, 2), [b"0"]), ((2**30, 1, 2), [])], ids=repr
)
def test_an_offset_beyond_the_batch_hides_no_message(codec, deltas, read):
    """Kafka accepts such a batch."""
    number, compress = CODECS[codec] if codec else (0, bytes)
    wrong = batch(b"0", b"1", b"2", deltas=deltas, codec=number, compress=compress)

    *good, unreadable, next_one = Reader().read(wrong, batch(b"3", at=3))

    assert (values(good), next_one.value) == (read, b"3")
    assert (type(unreadable), unreadable.offset) == (Unreadable, 2)


@pytest.mark.parametrize("cut", [3, 5])
def test_the_rest_of_a_batch_that_ends_too_early_is_one_message(cut):
    read = Reader().read(changed(batch(b"0", b"1", b"22222222")[:-cut]), batch(b"3", at=3))

    assert values(read) == [
        b"0",
        b"1",
        f"{PLACE.topic}, partition 0, offset 2: the record is not valid (CorruptRecordException)",
        b"3",
    ]


def test_a_corrupt_batch_is_fetched_again_and_then_left_out():
    corrupt = bytearray(batch(b"1", b"2", at=1))
    corrupt[-2] ^= 1
    reader = Reader()

    assert values(reader.read(batch(b"0"), bytes(corrupt), batch(b"3", at=3))) == [b"0"]
    assert reader.next == 1
    again = reader.read(bytes(corrupt), batch(b"3", at=3), begin=1)
    assert values(again) == [f"{PLACE.topic}, partition 0, offset 1 to 2: the batch is corrupt", b"3"]


def test_a_batch_that_the_network_changed_is_read_the_second_time():
    good = batch(b"1", at=1)
    changed_on_its_way = bytearray(good)
    changed_on_its_way[-2] ^= 1
    reader = Reader()

    assert reader.read(bytes(changed_on_its_way), begin=1) == []
    assert values(reader.read(good, begin=1)) == [b"1"]


def test_a_batch_of_an_aborted_transaction_is_not_decompressed():
    transactional = 0x10
    bomb = batch(bytes(100 * KIB), at=0, codec=1, compress=gzip.compress, attributes=transactional, producer=7)
    reader = Reader()

    assert values(reader.read(bomb, batch(b"1", at=1), aborted=[(7, 0)])) == [b"1"]


def test_empty_batches_are_passed():
    """Compaction can leave a batch without records."""
    empty = bytearray(batch(b"0", b"1")[:HEADER_BYTES])
    struct.pack_into(">i", empty, 57, 0)
    reader = Reader()

    assert values(reader.read(changed(bytes(empty)), batch(b"2", at=2))) == [b"2"]
    assert reader.next == 3


def test_the_time_of_kafka_is_that_of_every_record():
    written = bytearray(batch(b"0", (b"1", [(HeaderName(b"\xff"), b"")])))
    struct.pack_into(">q", written, 35, 5_000)

    assert [each.timestamp for each in records_of(bytearray(changed(bytes(written), attributes=0x08)))] == [
        5_000,
        5_000,
    ]


@given(st.data())
def test_no_bytes_in_a_batch_stop_the_next_one(data):
    written = batch(b"0", (b"1", [("h", b"v")]), b"2" * 20)
    at = data.draw(st.integers(HEADER_BYTES, len(written) - 1))
    damaged = changed(written[:at] + data.draw(st.binary(max_size=40)) + written[at + 1 :])

    read = Reader().read(damaged, batch(b"3", at=3))

    assert read[-1].value == b"3"
    assert [each.offset for each in read] == sorted({each.offset for each in read})


def test_a_header_name_is_a_text():
    name = HeaderName(b"a\xff")

    assert (name, name.encode("utf-8")) == ("a\ufffd", b"a\xff")
    assert {name: 1} == {"a\ufffd": 1}


def test_foreign_records_have_the_attributes_of_a_record():
    (record,) = records_of(bytearray(batch(None)))

    assert record == ForeignRecord(offset=0, timestamp=1_000, key=b"k", value=None, headers=[])
