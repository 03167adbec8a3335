"""
The records that Kafka answered to a fetch: read in bounds, and so that no record stops another one.

aiokafka reads them, in C. By itself it would decompress a batch to whatever size, and would never get past a record or
a batch that it cannot read. Such batches are read here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any, Self, TypeAlias

from aiokafka import TopicPartition
from aiokafka.codec import has_zstd
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.util import calc_crc32c, decode_varint

from diator._extras import require_internals
from diator.exceptions import ConfigurationError

INTERNALS = {
    "aiokafka.codec": ("has_zstd",),
    "aiokafka.consumer.fetcher": (
        "PartitionRecords._consumer_record",
        "PartitionRecords._records",
        "PartitionRecords._unpack_records",
        "PartitionRecords.next_fetch_offset",
    ),
    "aiokafka.record.default_records": (
        "DefaultRecordBatch.base_offset",
        "DefaultRecordBatch.compression_type",
        "DefaultRecordBatch.crc",
        "DefaultRecordBatch.next_offset",
    ),
    "aiokafka.record.util": ("calc_crc32c", "decode_varint"),
}
require_internals("aiokafka", INTERNALS)

_Buffer: TypeAlias = Any  # a memoryview; the annotations of aiokafka name only bytearrays, its code takes any buffer
Headers: TypeAlias = Sequence[tuple[str, bytes | None]]  # a value is None where its sender wrote none

_CODECS = ("none", "gzip", "snappy", "lz4", "zstd")  # by their number in the attributes of a batch

# Offset, length (of what follows it), leader epoch, magic, CRC (of what follows it), attributes, last offset delta,
# first timestamp, largest timestamp, producer id, producer epoch, first sequence number, number of records.
_HEADER = struct.Struct(">qiibIhiqqqhii")
_AFTER_LENGTH, _AFTER_CRC = 12, 21
_HAS_KAFKAS_TIME = 0x08  # in the attributes: the largest timestamp is that of every record
# A record with more headers is not read: each takes 70 bytes in memory, and may be two in the batch.
_MAX_HEADERS = 100_000
# Only in a batch with so many bytes are headers counted. It takes a hundredth of the time of a message.
_COUNTED_FROM = 2 * _MAX_HEADERS
_XERIAL = b"\x82SNAPPY\0"  # Java's snappy begins like this; then come blocks, each with its length
_XERIAL_HEADER_BYTES = 16


def has_codecs() -> bool:
    """Return whether the package is there that decompresses what Python itself cannot."""
    return bool(has_zstd())  # it has all of them


def require_codec(codec: str, where: str) -> None:
    """
    Check that messages that are compressed with *codec* can be read.

    Raises:
        ConfigurationError: The package that decompresses them is missing. The text names it, and *where* they are.
    """
    if codec in _CODECS[2:] and not has_codecs():
        raise ConfigurationError(
            f"{where} has messages that are compressed with {codec}, and the package cramjam is missing, which "
            "decompresses them: pip install 'diator[kafka]'"
        )


class HeaderName(str):
    """The name of a header that is not UTF-8: a text with replacement characters, written as the bytes that it was."""

    __slots__ = ("written",)
    written: bytes

    def __new__(cls, written: bytes) -> Self:
        name = super().__new__(cls, written.decode(errors="replace"))
        name.written = written
        return name

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Return the bytes that it was. What writes the records of a batch calls this."""
        return self.written


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignRecord:
    """A record that aiokafka cannot read, as diator read it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """
    Stands for a batch that cannot be read, or for the rest of one.

    Its offset is the last one of the batch: when it is finished, all of the batch is.

    Attributes:
        why: Where the records are, and why they cannot be read.
    """

    offset: int
    why: str
    timestamp: int = 0
    key: None = None
    value: None = None
    headers: Headers = ()


class Fetched:
    """
    The records of one partition out of one answer. It takes the place of aiokafka's `PartitionRecords`.

    Args:
        place: The partition.
        parsing: aiokafka's `PartitionRecords`.
        answer: The bytes that *parsing* parses.
        most: How many bytes the records of a batch may have when they are decompressed.
        corrupt: Where answers were found corrupt before. Kafka is asked once more: the network may have changed it.
        problems: Gets the reason why no further record of *place* can be read: a package is missing.
    """

    def __init__(
        self,
        place: TopicPartition,
        parsing: Any,
        answer: bytes,
        *,
        most: int,
        corrupt: set[tuple[TopicPartition, int]],
        problems: dict[TopicPartition, ConfigurationError],
    ) -> None:
        parsing._records = self._batches = _Batches(parsing._records, answer, most, _named(place))  # noqa: SLF001
        parsing._consumer_record = self._batches.checked  # noqa: SLF001
        self._place = place
        self._parsing = parsing
        self._corrupt = corrupt
        self._problems = problems
        self._iterator = self._read()

    def __iter__(self) -> Iterator[Any]:
        return self._iterator

    @property
    def next_fetch_offset(self) -> int:
        """The offset to fetch at when these records are read."""
        offset: int = self._parsing.next_fetch_offset
        return offset

    def _read(self) -> Iterator[Any]:
        parsing, batches = self._parsing, self._batches
        while True:
            try:
                yield from parsing._unpack_records()  # noqa: SLF001
            except ConfigurationError as error:
                self._problems[self._place] = error
            except Exception as error:  # whatever the bytes of another program make it raise
                if batches.current is None:
                    raise
                is_corrupt = batches.is_corrupt(batches.current)
                place_and_offset = (self._place, parsing.next_fetch_offset)
                if not is_corrupt or place_and_offset in self._corrupt:
                    for record in self._read_again(batches.current, None if is_corrupt else error):
                        parsing.next_fetch_offset = record.offset + 1
                        yield record
                    parsing.next_fetch_offset = batches.current.next_offset
                    continue  # with the next batch
                self._corrupt.add(place_and_offset)
            return

    def _read_again(self, batch: Any, error: Exception | None) -> Iterator[ForeignRecord | Unreadable]:
        """Read the rest of *batch*, of which aiokafka could not read everything. None as *error*: it is corrupt."""
        first, last = self._parsing.next_fetch_offset, batch.next_offset - 1
        where = f"{_named(self._place)}, offset "
        if error is None:
            why = "the batch is corrupt"
        elif type(error) is _CannotBeDecompressed:
            why = str(error)
        else:
            why = f"the record is not valid ({type(error).__name__})"
            if type(batch) is DefaultRecordBatch:
                with suppress(ValueError, LookupError):
                    for record in records_of(self._batches.uncompressed(batch)):
                        if record.offset > last:
                            raise ValueError("another batch has this offset")
                        if record.offset >= first:
                            first = record.offset + 1
                            if type(record) is Unreadable:
                                record = replace(record, why=f"{where}{record.offset}: {record.why}")  # noqa: PLW2901
                            yield record
                    return
        if first <= last:
            yield Unreadable(offset=last, why=f"{where}{first}" + (f" to {last}" if first < last else "") + f": {why}")


def _named(place: TopicPartition) -> str:
    return f"{place.topic}, partition {place.partition}"


class _CannotBeDecompressed(Exception):
    """The text says why."""


class _Batches:
    """The batches of an answer, as aiokafka asks for them. A compressed one is decompressed when its turn has come."""

    def __init__(self, batches: Any, answer: bytes, most: int, where: str) -> None:
        self.current: Any = None
        self._end = 0
        self._has_next = batches.has_next
        self._next_batch = batches.next_batch
        self._room = most
        self._answer = answer
        self._at = 0
        self._most = most
        self._where = where

    def has_next(self) -> bool:
        return self._room > 0 and bool(self._has_next())  # what there is no room for is fetched again

    def next_batch(self) -> Any:
        self.current = None
        batch = self.current = self._next_batch()
        self._end = batch.next_offset
        if type(batch) is DefaultRecordBatch and (batch.compression_type or self._is_large(batch)):
            return _Checked(batch, self)
        return batch

    def checked(self, _: object, record: Any) -> Any:
        """
        Return *record* as aiokafka parsed it: a copy, of 11 fields, would take twice as long as parsing it.

        Kafka does not check the offsets in a batch. One beyond its end would make the reader pass other messages.
        """
        if record.offset >= self._end:
            raise ValueError("another batch has this offset")
        return record

    def uncompressed(self, batch: Any) -> _Buffer:
        """Return the bytes of *batch*, as they would be if it were not compressed."""
        codec = batch.compression_type
        name = _CODECS[codec] if codec < len(_CODECS) else f"codec {codec}"
        require_codec(name, self._where)
        if not codec:
            return memoryview(self._bytes_of(batch))
        uncompressed = _decompressed(self._bytes_of(batch), name, self._most)
        self._room -= len(uncompressed)
        return uncompressed

    def is_corrupt(self, batch: Any) -> bool:
        """Return whether the bytes of *batch* are not those that its sender wrote."""
        return type(batch) is DefaultRecordBatch and calc_crc32c(self._bytes_of(batch)[_AFTER_CRC:]) != batch.crc

    def _is_large(self, batch: Any) -> bool:
        return len(self._answer) > _COUNTED_FROM and self._end_of(batch) - self._at > _COUNTED_FROM

    def _bytes_of(self, batch: Any) -> bytes:
        end = self._end_of(batch)
        return self._answer[self._at : end]

    def _end_of(self, batch: Any) -> int:
        """Return where *batch* ends in the answer. From then on `_at` is where it begins."""
        while True:
            offset, length = struct.unpack_from(">qi", self._answer, self._at)
            end: int = self._at + _AFTER_LENGTH + length
            if offset == batch.base_offset:
                return end
            self._at = end


class _Checked:
    """
    A batch that is compressed or large: decompressed, and its headers counted, when aiokafka reads its records.

    Those of an aborted transaction it skips.
    """

    def __init__(self, batch: Any, batches: _Batches) -> None:
        self._batch = batch
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        batch = self._batches.uncompressed(self._batch)
        if len(batch) > _COUNTED_FROM and _has_too_many_headers(batch):
            del batch  # the error keeps this frame, and what follows decompresses it once more
            raise ValueError("a record has too many headers")
        return iter(DefaultRecordBatch(batch) if self._batch.compression_type else self._batch)


# -- the bytes of a batch ----------------------------------------------------------------------------------------


def _has_too_many_headers(batch: _Buffer) -> bool:
    """Look for a record with too many headers in an uncompressed *batch*. aiokafka finds out if it is not valid."""
    at = _HEADER.size
    with suppress(ValueError, LookupError):
        for _ in range(_HEADER.unpack_from(batch)[-1]):
            length, at = decode_varint(batch, at)
            if length <= 0:
                break
            if length > _COUNTED_FROM and _Fields(batch, at).header_count > _MAX_HEADERS:
                return True
            at += length
    return False


def records_of(batch: _Buffer) -> Iterator[ForeignRecord | Unreadable]:
    """
    Read the records of an uncompressed *batch*, whatever the names of their headers are, unless they are too many.

    Raises:
        ValueError: The next record is not valid.
        LookupError: The same.
    """
    base, _, _, _, _, attributes, _, first_timestamp, max_timestamp, *_, count = _HEADER.unpack_from(batch)
    at = _HEADER.size
    for _ in range(count):
        length, at = decode_varint(batch, at)
        end = at + length
        record = _Fields(batch, at)
        at = end
        if record.header_count > _MAX_HEADERS:
            why = f"the record has {record.header_count:,} headers, more than {_MAX_HEADERS:,}"
            yield Unreadable(offset=base + record.offset, why=why)
            continue
        headers: list[tuple[str, bytes | None]] = []
        for _ in range(record.header_count):
            name = record.text()
            if name is None:
                raise ValueError("a header has no name")
            headers.append((_name(name), record.text()))
        if record.at != end:
            raise ValueError("the length of the record is wrong")
        yield ForeignRecord(
            offset=base + record.offset,
            timestamp=max_timestamp if attributes & _HAS_KAFKAS_TIME else first_timestamp + record.timestamp,
            key=record.key,
            value=record.value,
            headers=headers,
        )


class _Fields:
    """The fields of the record at *at*. Its headers are read with `text`, a name and a value each."""

    def __init__(self, batch: _Buffer, at: int) -> None:
        self._batch = batch
        self.at = at + 1  # one byte of attributes, which nothing uses
        self.timestamp, self.offset = self._number(), self._number()
        self.key, self.value = self.text(), self.text()
        self.header_count = self._number()

    def _number(self) -> int:
        number: int
        number, self.at = decode_varint(self._batch, self.at)
        return number

    def text(self) -> bytes | None:
        length = self._number()
        if length == -1:
            return None
        if not 0 <= length <= len(self._batch) - self.at:
            raise ValueError("a length is wrong")
        self.at += length
        return bytes(self._batch[self.at - length : self.at])


def _name(written: bytes) -> str:
    try:
        return written.decode()
    except UnicodeDecodeError:
        return HeaderName(written)


def _decompressed(batch: bytes, codec: str, most: int) -> memoryview:
    """
    Return *batch* without compression, if its records have at most *most* bytes then. Take little more memory.

    Its checksum is that of the compressed batch, which aiokafka has checked.
    """
    offset, _, epoch, magic, _, attributes, *others = _HEADER.unpack_from(batch)
    start = _HEADER.size
    plain = memoryview(mmap(-1, start + most))  # unlike a bytearray's, memory that is never written to costs nothing
    try:
        size = _inflate(batch[start:], codec, plain[start:])
    except Exception as error:
        problem = f"the batch cannot be decompressed from {codec}, or has more than {most:,} bytes then"
        raise _CannotBeDecompressed(f"{problem} ({type(error).__name__})") from error
    plain = plain[: start + size]
    attributes &= ~DefaultRecordBatch.CODEC_MASK
    _HEADER.pack_into(plain, 0, offset, len(plain) - _AFTER_LENGTH, epoch, magic, 0, attributes, *others)
    return plain


def _inflate(compressed: bytes, codec: str, room: memoryview) -> int:
    """Decompress into *room*. Return how many bytes that are."""
    if codec == "gzip" and not has_codecs():
        inflated = _gunzipped(compressed, len(room))  # it takes ten times as long
        room[: len(inflated)] = inflated
        return len(inflated)
    import cramjam  # noqa: PLC0415  # it may be missing

    if codec != "snappy":
        return int(getattr(cramjam, codec).decompress_into(compressed, room))
    end = 0
    for block in _xerial_blocks(compressed) if compressed.startswith(_XERIAL) else [compressed]:
        end += cramjam.snappy.decompress_raw_into(block, room[end:])
    return end


def _gunzipped(compressed: bytes, most: int) -> bytes:
    inflated = b""
    while compressed:
        decompressor = zlib.decompressobj(wbits=31)
        inflated += decompressor.decompress(compressed, most - len(inflated) + 1)
        if len(inflated) > most:
            raise ValueError("too many bytes")
        if not decompressor.eof:
            raise ValueError("the end is missing")
        compressed = decompressor.unused_data
    return inflated


def _xerial_blocks(compressed: bytes) -> Iterable[bytes]:
    at = _XERIAL_HEADER_BYTES
    while at < len(compressed):
        (length,) = struct.unpack_from(">i", compressed, at)
        yield compressed[at + 4 : at + 4 + length]
        at += 4 + max(length, 0)
