"""Concurrent sends in one exchange with the service, where it answers one exchange after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from diator.exceptions import BrokerClosed, BrokerError, BrokerUnavailable, MessageRejected, OutcomeUnknown

T = TypeVar("T")

_VERDICTS = {BrokerClosed, BrokerUnavailable, MessageRejected, OutcomeUnknown}


class BatchSender(Generic[T]):
    """
    Puts what callers send at the same time into one exchange: a round trip for each would be all that a sender does.

    *exchange* is called with what waits, in the order of the calls, and with the time of the event loop's clock at
    which it has to end: that is *timeout* seconds after the first of these calls. One runs at a time; what is sent
    meanwhile goes with the next one. In one are at most *max_items* items, and not another one after *max_bytes*.

    It raises the verdict on all of its items, and each caller gets one of his own: with his `message_id`, and with the
    same cause. It is the one to refuse what comes after the end of its broker.
    """

    def __init__(
        self,
        exchange: Callable[[Sequence[T], float], Awaitable[object]],
        *,
        timeout: float,
        max_items: int = 500,
        max_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        self._exchange, self._timeout = exchange, timeout
        self._max_items, self._max_bytes = max_items, max_bytes
        self._waiting: deque[_Call[T]] = deque()
        self._exchanging: asyncio.Task[None] | None = None

    async def send(self, item: T, *, size: int, message_id: UUID) -> None:
        """
        Have *item*, of *size* bytes, in an exchange; return when that has ended well.

        If this is cancelled, *item* is left out of an exchange that has not begun; one that has begun goes on.

        Raises:
            BrokerError: The verdict of the exchange.
        """
        loop = asyncio.get_running_loop()
        call = _Call(item, size, message_id, loop.time() + self._timeout, loop.create_future())
        if self._exchanging is not None and self._exchanging.get_loop() is not loop:
            self._waiting, self._exchanging = deque(), None  # that loop is over, and who waited there
        self._waiting.append(call)
        if self._exchanging is None or self._exchanging.done():
            self._exchanging = asyncio.create_task(self._exchange_all(), name="diator: sending")
        await call.ended

    async def wait(self) -> None:
        """Wait until everybody who waits by now has a verdict. That goes on if whoever waits for it is cancelled."""
        if self._exchanging is not None and self._exchanging.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._exchanging])

    async def _exchange_all(self) -> None:
        running = asyncio.current_task()
        assert running is not None, "it runs in a task"  # noqa: S101  # asyncio has no other way
        while batch := self._taken():
            verdict: Exception | None = None
            try:
                await self._exchange([call.item for call in batch], batch[0].deadline)
            except asyncio.CancelledError:
                if running.cancelling():  # with its event loop
                    for call in [*batch, *self._waiting]:
                        call.ended.cancel()
                    raise
                verdict = OutcomeUnknown("the client cancelled the exchange, and nobody had asked for that")
            except Exception as error:  # noqa: BLE001  # whatever it is, it is the callers' to hear
                verdict = error
            for call in batch:
                if call.ended.done():
                    continue  # its caller was cancelled meanwhile
                if verdict is None:
                    call.ended.set_result(None)
                else:
                    own = own_error(verdict, call.message_id) if isinstance(verdict, BrokerError) else verdict
                    call.ended.set_exception(own)

    def _taken(self) -> list[_Call[T]]:
        batch: list[_Call[T]] = []
        room = self._max_bytes
        while self._waiting and len(batch) < self._max_items and room > 0:
            call = self._waiting.popleft()
            if not call.ended.done():  # else its caller was cancelled
                batch.append(call)
                room -= call.size
        return batch


@dataclass(eq=False, slots=True)
class _Call(Generic[T]):
    """One that waits for its verdict."""

    item: T
    size: int
    message_id: UUID
    deadline: float
    ended: asyncio.Future[None]


def own_error(verdict: BrokerError, message_id: UUID | None) -> BrokerError:
    """Give one message an error of its own, with its id: *verdict* is on several. What concerns one stays as it is."""
    if message_id is None or verdict.message_id is not None or type(verdict) not in _VERDICTS:
        return verdict
    own = type(verdict)(str(verdict), message_id=message_id)
    own.__cause__ = verdict.__cause__
    return own
