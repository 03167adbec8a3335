"""Defects of starting, stopping and closing."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from diator.brokers.base import Delivery, Settler
from diator.brokers.message import Message
from diator.exceptions import BrokerClosed, BrokerError, BrokerUnavailable
from diator.testing.saboteurs._base import FOREVER, Saboteur, Subscription, caught_by


@caught_by("PUB-10", "LIF-01", "LIF-02", "LIF-03", "LIF-04", "LIF-07", "API-01", "SUB-16")
class NeverCloses(Saboteur):
    """Keeps working after it was closed."""

    async def aclose(self) -> None:
        """Stay open."""


@caught_by("LIF-02")
class FailsToCloseTwice(Saboteur):
    """Raises when it is closed again."""

    async def aclose(self) -> None:
        if self._closed:
            raise BrokerError("it is closed")
        await super().aclose()


@caught_by("LIF-02", "LIF-07")
class HangsWhenClosedTwice(Saboteur):
    """Hangs when it is closed again."""

    async def aclose(self) -> None:
        if self._closed:
            await asyncio.sleep(FOREVER)
        await super().aclose()


@caught_by("LIF-23")
class EndsWhenItCloses(Saboteur):
    """Ends its iterators when it is closed, as if there were no more messages."""

    async def read(self, subscription: Subscription) -> Delivery:
        try:
            return await super().read(subscription)
        except BrokerClosed:
            raise StopAsyncIteration from None


@caught_by("LIF-23")
class ClosesUnseen(Saboteur):
    """Wakes nobody who waits for a delivery when it is closed."""

    async def aclose(self) -> None:
        self._closed = True


@caught_by("LIF-03")
class ConnectsToClose(Saboteur):
    """Hangs in the close of an unused broker."""

    _used = False

    async def send_message(self, message: Message, /) -> None:
        self._used = True
        await super().send_message(message)

    async def aclose(self) -> None:
        if not self._used and not self._queues:
            await asyncio.sleep(FOREVER)
        await super().aclose()


@caught_by("LIF-07")
class ClosesHalf(Saboteur):
    """Releases nothing after its close was cancelled once."""

    _closing = False

    async def aclose(self) -> None:
        if self._closing:
            return
        self._closing = True
        await asyncio.sleep(0)
        await super().aclose()


@caught_by("LIF-04")
class SwallowsErrorsOfItsBlock(Saboteur):
    """Swallows an error in its `async with` block."""

    async def __aexit__(self, *exc_info: object) -> bool:  # type: ignore[override]
        await super().aclose()
        return exc_info[0] is LookupError


@caught_by("LIF-18", "LIF-01")
class SharesItsState(Saboteur):
    """Keeps its closed state on the class."""

    closed_by: ClassVar[set[object]] = set()

    async def send_message(self, message: Message, /) -> None:
        if self.closed_by:
            self._closed = True
        await super().send_message(message)

    async def aclose(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed_by.add(loop)
        loop.call_later(0.03, self.closed_by.clear)
        await super().aclose()


@caught_by("LIF-08", "LIF-21")
class CannotBeWoken(Saboteur):
    """Finishes a blocking read before it ends."""

    async def read(self, subscription: Subscription) -> Delivery:
        reading = asyncio.ensure_future(super().read(subscription))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait({reading}, timeout=1.5)
            reading.cancel()
            raise


@caught_by("LIF-19")
class FailsToEndWhenClosed(Saboteur):
    """Cannot end a subscription whose connection is closed."""

    def before_unsubscribe(self, subscription: Subscription) -> None:
        if self._closed:
            raise BrokerUnavailable("cannot unsubscribe")


@caught_by("ACK-26")
class ClosesLikeACrash(Saboteur):
    """Closes without handing over the deliveries of its subscriptions."""

    def on_close(self, subscription: Subscription) -> None:
        """Requeue nothing."""


@caught_by("LIF-13")
class HoldsALock(Saboteur):
    """Cannot send or subscribe while a delivery is unsettled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._out: list[Delivery] = []

    async def send_message(self, message: Message, /) -> None:
        while self._out:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await super().send_message(message)

    async def deliver(self, delivery: Delivery) -> Delivery:
        self._out.append(delivery)
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        await super().ack(settle, delivery)
        self._out.remove(delivery)
