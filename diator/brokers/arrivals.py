"""From a client that pushes messages, by a callback, to `Source.receive`, which asks for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import cast

from diator.brokers.base import Delivery


class Arrivals:
    """
    Keeps what one connection has pushed until `receive` takes it.

    It belongs to the thread of the event loop: a client that calls back in another thread uses
    `loop.call_soon_threadsafe`. It has no limit of its own. The service has to send no more than it was asked for
    without a settlement.

    Args:
        earlier: What an earlier connection has pushed, if it can still be settled: `receive` returns it first.
    """

    def __init__(self, earlier: Iterable[Delivery] = ()) -> None:
        self._waiting: deque[Delivery | None] = deque(earlier)  # None is the answer to a probe
        self._something = asyncio.Event()
        self._error: Exception | None = None
        if self._waiting:
            self._something.set()

    def put(self, delivery: Delivery) -> None:
        """Add a delivery that the client has pushed."""
        self._waiting.append(delivery)
        self._something.set()

    def note_answer(self) -> None:
        """Note the answer to a probe: `receive` returns an empty list after everything that came before it."""
        self._waiting.append(None)
        self._something.set()

    def fail(self, error: Exception) -> None:
        """Note that the connection is lost: `receive` raises *error*, and returns nothing any more."""
        self._error = error
        self._something.set()

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        """Wait for deliveries; see `Source.receive`. A cancelled call has taken nothing."""
        waiting = self._waiting
        while not self._something.is_set():
            await self._something.wait()
        if self._error is not None:
            raise self._error
        taken = cast("list[Delivery]", [*takewhile(bool, islice(waiting, limit))])
        for _ in taken:
            waiting.popleft()
        if not taken and waiting and waiting[0] is None:
            waiting.popleft()
        if not waiting:
            self._something.clear()
        return taken

    def take_all(self) -> Sequence[Delivery]:
        """Remove and return what `receive` has not taken. The program never gets it."""
        taken = [delivery for delivery in self._waiting if delivery is not None]
        self._waiting.clear()
        return taken
