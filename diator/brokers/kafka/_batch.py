"""A batch as aiokafka's producer sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from diator.brokers.kafka._client import BatchBuilderInPython
from diator.brokers.kafka._unconfirmed import Batch

_OVERHEAD = 36
"""
The most bytes of a record beside its value, where it has neither key nor headers.

One byte of attributes and numbers of variable length: the record's length (5), its timestamp (10) and offset (5), the
lengths of key and value (5 each) and the count of headers (5).
"""
_WITHOUT_LENGTHS = 21
"""The bytes of these that aiokafka does not count in the size of a record."""
_NO_LIMIT = 2**31 - 1


def record_size(key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]] | None) -> int:
    """Return how many bytes such a record takes in a batch, at most."""
    if key is None and not headers:
        return len(value or b"") + _OVERHEAD
    headers = [*headers] if headers else []
    try:
        size: int = DefaultRecordBatchBuilder.size_of(key, value, headers)
    except TypeError:  # the builder in C writes no `HeaderName`
        size = BatchBuilderInPython.size_of(key, value, headers)
    return size + _WITHOUT_LENGTHS


class Records:
    """
    A batch in the queue of aiokafka's producer: the builder of its bytes, and the future of its only message.

    aiokafka's own `send` does for each message what is done here once for each batch, and makes its caller wait while a
    batch is full. aiokafka takes the batch for one message, whose future is this object. The methods are those that
    aiokafka calls. The records are written all at once, whenever the batch is sent. Their timestamp is the time at
    which the batch was opened.
    """

    # aiokafka takes what `append` returns for the place of the message in the batch.
    offset = 0
    timestamp = 0

    def __init__(self, batch: Batch[Any], settle: Callable[[Batch[Any], BaseException | None], None]) -> None:
        self._batch = batch
        self._settle = settle
        self._opened_at = int(time.time() * 1000)
        self._numbering = (-1, -1, 0)

    # -- as a builder ------------------------------------------------------------------------------------------------

    def append(self, **_: object) -> Records:
        return self

    def record_count(self) -> int:
        return len(self._batch.calls)

    def closed(self) -> bool:
        return not self._batch.is_open

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        # aiokafka has counted the records: one more would get the same number as the first record of the next batch.
        self._batch.seal()
        self._numbering = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytearray:
        try:
            return self._built(DefaultRecordBatchBuilder)
        except TypeError:  # as above
            return self._built(BatchBuilderInPython)

    def _built(self, builder_type: Any) -> bytearray:
        builder = builder_type(2, 0, 0, *self._numbering, _NO_LIMIT)
        append, timestamp = builder.append, self._opened_at
        for offset, call in enumerate(self._batch.calls):
            append(offset, timestamp, call.key, call.value, call.headers or [])
        written: bytearray = builder.build()
        return written

    # -- as a future -------------------------------------------------------------------------------------------------

    def done(self) -> bool:
        return False

    def set_result(self, _: object) -> None:
        self._settle(self._batch, None)

    def set_exception(self, error: BaseException) -> None:
        self._settle(self._batch, error)
