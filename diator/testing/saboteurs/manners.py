"""Defects: leaks, wasted CPU time, careless logging and unsafe decoding."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

from diator.brokers.base import Delivery, Settler, Topic
from diator.brokers.message import Message
from diator.exceptions import BrokerUnavailable
from diator.testing.saboteurs._base import FOREVER, Saboteur, Subscription, caught_by

logger: logging.Logger = logging.getLogger("diator.testing.saboteurs")


@caught_by("LEK-01", "LEK-03", "LEK-05")
class LeaksATask(Saboteur):
    """Leaks a task for each subscription."""

    async def on_subscribed(self, subscription: Subscription, topics: Collection[Topic]) -> None:
        self._task = asyncio.create_task(asyncio.sleep(FOREVER))


@caught_by("LEK-01", "LEK-03")
class LeaksASocket(Saboteur):
    """Leaks a socket."""

    kept: ClassVar[list[socket.socket]] = []

    async def send_message(self, message: Message, /) -> None:
        if not hasattr(self, "_socket"):
            self._socket = socket.socket()
            self.kept.append(self._socket)
        await super().send_message(message)


@caught_by("LEK-02")
class FailsUnseen(Saboteur):
    """Lets a task fail without retrieving its error."""

    async def aclose(self) -> None:
        async def fail() -> None:
            raise BrokerUnavailable("the connection is gone")

        if not self._closed:
            self._task: Any = asyncio.create_task(fail())
            await asyncio.sleep(0)
            self._task = None
        await super().aclose()


@caught_by("LEK-06", "LEK-08")
class KeepsDeliveries(Saboteur):
    """Keeps every delivery."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._history: list[Delivery] = []

    async def deliver(self, delivery: Delivery) -> Delivery:
        self._history.append(delivery)
        return delivery


@caught_by("LEK-05")
class KeepsSubscriptions(Saboteur):
    """Keeps every subscription."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._history: list[AsyncIterator[Delivery]] = []

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            self._history.append(deliveries)
            yield deliveries


@caught_by("LEK-10")
class LeaksRenewals(Saboteur):
    """Keeps renewing deliveries that were never settled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._renewals: dict[Delivery, asyncio.Task[None]] = {}

    async def deliver(self, delivery: Delivery) -> Delivery:
        self._renewals[delivery] = asyncio.create_task(asyncio.sleep(FOREVER))
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._renewals.pop(delivery).cancel()
        await super().ack(settle, delivery)


@caught_by("FLW-12")
class PollsAllTheTime(Saboteur):
    """Waits by polling in a tight loop."""

    async def read(self, subscription: Subscription) -> Delivery:
        reading = asyncio.ensure_future(super().read(subscription))
        try:
            while not reading.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            return reading.result()
        finally:
            reading.cancel()


@caught_by("FLW-07")
class BlocksTheLoop(Saboteur):
    """Blocks the event loop while it writes."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count == 300:  # noqa: PLR2004
            time.sleep(0.6)  # noqa: ASYNC251
        await super().send_message(message)


@caught_by("PUB-01", "FLW-07")
class BlocksForEver(Saboteur):
    """Waits for the answer of its service with a call that blocks the event loop."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count == 100:  # noqa: PLR2004
            one, other = socket.socketpair()
            with one, other:
                one.recv(1)
        await super().send_message(message)


@caught_by("OBS-04")
class CriesWolf(Saboteur):
    """Logs a warning when nothing is wrong."""

    async def aclose(self) -> None:
        logger.warning("the connection was closed")
        await super().aclose()


@caught_by("OBS-05")
class LogsPayloads(Saboteur):
    """Logs the content of a message."""

    async def send_message(self, message: Message, /) -> None:
        logger.debug("sending %s", message.payload_json)
        await super().send_message(message)


@caught_by("SEC-06")
class Unpickles(Saboteur):
    """Unpickles bodies."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        with suppress(Exception):
            pickle.loads(delivery.body)  # noqa: S301
        return delivery
