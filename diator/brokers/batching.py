"""Sends concurrent messages in batches, for a service that answers one request at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from diator.brokers.sending import check_has_ended
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
)

T = TypeVar("T")

_SEND_ERRORS = {AccessRefused, BrokerClosed, BrokerUnavailable, MessageRejected, MessageUnroutable, OutcomeUnknown}


class BatchSender(Generic[T]):
    """
    Combines concurrent sends into batches, because a round trip for each message would dominate a sender's time.

    *send_batch* is called with the waiting items, in the order of the calls, and with a deadline in the time of the
    event loop's clock: *timeout* seconds after the first of these calls. It must end by then. One batch is sent at a
    time; items that are sent meanwhile go with the next one. A batch has at most *max_items* items, and no further item
    once it has reached *max_bytes* bytes.

    If *send_batch* raises a send error, it applies to all items of the batch. Each caller receives an error of its own,
    with its own `message_id` and the same cause. *send_batch* also has to refuse items after its broker was closed.
    """

    def __init__(
        self,
        send_batch: Callable[[Sequence[T], float], Awaitable[object]],
        *,
        timeout: float,
        max_items: int = 500,
        max_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        self._send_batch, self._timeout = send_batch, timeout
        self._max_items, self._max_bytes = max_items, max_bytes
        self._waiting: deque[_Call[T]] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def send(self, item: T, *, size: int, message_id: UUID) -> None:
        """
        Send *item*, of *size* bytes, with a batch. Return when the service has confirmed that batch.

        If this call is cancelled before its batch is sent, the batch leaves *item* out. A batch that is already being
        sent continues.

        Raises:
            BrokerError: The send error of the batch.
            UsageError: Another event loop, which is still running, has used this sender.
        """
        loop = asyncio.get_running_loop()
        call = _Call(item, size, message_id, loop.time() + self._timeout, loop.create_future())
        if self._sending is not None and self._sending.get_loop() is not loop:
            check_has_ended(self._sending.get_loop())
            self._waiting, self._sending = deque(), None  # its callers have ended with that event loop
        self._waiting.append(call)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="diator: sending")
        await call.confirmed

    async def wait(self) -> None:
        """Wait until all sends that have begun have ended. If this wait is cancelled, the sends continue."""
        if self._sending is not None and self._sending.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._sending])

    async def _send_all(self) -> None:
        running = asyncio.current_task()
        assert running is not None, "it runs in a task"  # noqa: S101  # asyncio has no other way
        while batch := self._next_batch():
            failure: Exception | None = None
            try:
                await self._send_batch([call.item for call in batch], batch[0].deadline)
            except asyncio.CancelledError:
                if running.cancelling():  # the event loop is ending
                    for call in [*batch, *self._waiting]:
                        call.confirmed.cancel()
                    raise
                failure = OutcomeUnknown("the client library cancelled the request by itself")
            except Exception as error:  # noqa: BLE001  # every error goes to the callers
                failure = error
            for call in batch:
                if call.confirmed.done():
                    continue  # its caller was cancelled
                if failure is None:
                    call.confirmed.set_result(None)
                else:
                    own = own_error(failure, call.message_id) if isinstance(failure, BrokerError) else failure
                    call.confirmed.set_exception(own)

    def _next_batch(self) -> list[_Call[T]]:
        batch: list[_Call[T]] = []
        room = self._max_bytes
        while self._waiting and len(batch) < self._max_items and room > 0:
            call = self._waiting.popleft()
            if not call.confirmed.done():  # otherwise its caller was cancelled
                batch.append(call)
                room -= call.size
        return batch


@dataclass(eq=False, slots=True)
class _Call(Generic[T]):
    """A caller that waits for its message to be confirmed."""

    item: T
    size: int
    message_id: UUID
    deadline: float
    confirmed: asyncio.Future[None]


def own_error(error: BrokerError, message_id: UUID | None) -> BrokerError:
    """
    Return a copy of *error*, which several messages share, for the one message with *message_id*.

    Return *error* itself if it already has a `message_id`, or if it is not an error that applies to a whole batch.
    """
    if error.message_id is not None or type(error) not in _SEND_ERRORS:
        return error
    own = type(error)(str(error), message_id=message_id)
    own.__cause__ = error.__cause__
    return own
