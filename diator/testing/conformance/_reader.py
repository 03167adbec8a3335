"""Readers of scenarios. They know without sleeping whether more messages are to come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from time import monotonic
from typing import Any, Literal, TypeAlias

from diator.brokers.base import Delivery, Gap, Topic, Transport
from diator.brokers.message import Message
from diator.testing._suite.checks import cancelled
from diator.testing._suite.errors import Nonconformance
from diator.testing.conformance._harness import Limits
from diator.testing.conformance._ledger import Ledger, Received, few

Work: TypeAlias = Callable[[Received], Awaitable[None]]
Settle: TypeAlias = Literal["ack", "nothing"]

_FENCE = "conformance-fence"


class Reader:
    """
    One subscription of a scenario. The ledger records what it receives under `name`, except for fences.

    A fence is a message that marks a point in the stream. A transport that keeps the order of a topic delivers the
    fence after everything that was sent before it.

    Attributes:
        broker: The broker of the subscription.
        topics: The topics of the subscription.
        name: The name of the group, or a unique name for a subscription without a group.
        deliveries: The iterator of the subscription.
        gaps: The reported gaps, in which messages may have been missed.
    """

    def __init__(
        self,
        broker: Transport,
        topics: Sequence[Topic],
        name: str,
        deliveries: AsyncIterator[Delivery],
        *,
        gaps: Sequence[Gap],
        ledger: Ledger,
        limits: Limits,
        prefetch: int,
    ) -> None:
        self.broker = broker
        self.topics = topics
        self.name = name
        self.deliveries = deliveries
        self.gaps = gaps
        self._ledger = ledger
        self._limits = limits
        self._prefetch = prefetch

    @property
    def acknowledged(self) -> set[object]:
        """The ids of the messages that readers of this name have acknowledged."""
        received = (each for each in self._ledger.received if each.subscription == self.name)
        return {each.id for each in received if each.delivery.outcome == "ack"}

    async def next(self) -> Received:
        """Wait for the next delivery, and return it unsettled."""
        while is_fence(received := await self.next_or_fence()):
            await received.delivery.ack()  # an earlier fence that nobody waited for
        return received

    async def next_or_fence(self) -> Received:
        """Wait for the next delivery or fence, and return it unsettled."""
        received = await self._received()
        if not is_fence(received):
            self._ledger.received.append(received)
        return received

    async def take(self, count: int, *, settle: Settle = "ack") -> list[Received]:
        """Wait for *count* deliveries and return them, acknowledged unless *settle* is `nothing`."""
        taken: list[Received] = []
        while len(taken) < count:
            taken.append(await self.next())
            if settle == "ack":
                await _uncut(taken[-1].delivery.ack())
        return taken

    async def until_fence(self, *, settle: Settle = "ack") -> list[Received]:
        """
        Send a fence and return the deliveries before it: everything, if the transport keeps the order of a topic.

        If it does not, the deliveries that arrive shortly after the fence are included.
        """
        fence = await send_fence(self.broker, self.topics[0])
        taken: list[Received] = []
        while (received := await self.next_or_fence()).id != fence:
            if not is_fence(received):
                taken.append(received)
            if settle == "ack" or is_fence(received):
                await received.delivery.ack()
        await received.delivery.ack()
        if self.broker.capabilities.ordering == "destination":
            self._ledger.fenced.add(self.name)
        else:
            taken += await self._stragglers(settle)
        return taken

    async def during(self, sending: Coroutine[Any, Any, Any], *, settle: Settle = "ack") -> list[Received]:
        """Read while *sending* runs and up to a fence after it, so that no buffer has to hold everything."""
        start = len(self._ledger.received)

        async def read() -> None:
            while True:
                await self.take(1, settle=settle)

        reading = asyncio.create_task(read())
        try:
            await _unless_failed(sending, reading)
        finally:
            await cancelled(reading)
        await self.until_fence(settle=settle)
        return [received for received in self._ledger.received[start:] if received.subscription == self.name]

    async def expect_nothing(self) -> None:
        """Raise `Nonconformance` if a delivery arrives within `limits.quiet` seconds."""
        waiting = asyncio.ensure_future(self._received())
        done, _ = await asyncio.wait({waiting}, timeout=self._limits.quiet)
        await cancelled(waiting)
        if done:
            came = waiting.result()
            own = [each for each in self._ledger.received if each.subscription == self.name]
            held = sum(each.delivery.outcome is None and not each.abandoned for each in own)
            before = [
                f"attempt {each.delivery.attempt} ({each.delivery.outcome or 'unsettled'})"
                for each in own
                if each.id == came.id
            ]
            raise Nonconformance(
                f"{self.name!r}, whose prefetch is {self._prefetch} and which had {held} unsettled, received message "
                f"{self._ledger.name_of(came.id)}, attempt {came.delivery.attempt}"
                f"{f', after {few(before)}' * bool(before)}; expected nothing"
            )

    async def _received(self) -> Received:
        try:
            return Received.of(await anext(self.deliveries), self.name)
        except StopAsyncIteration as error:
            raise Nonconformance(
                f"the iterator of {self.name!r} has ended, and its subscription is still open; an asynchronous "
                "generator does so after one cancelled wait",
                rule="subscribe: Reconnecting:",
            ) from error

    async def _stragglers(self, settle: Settle) -> list[Received]:
        taken: list[Received] = []
        while True:
            waiting = asyncio.create_task(self.take(1, settle=settle))
            await asyncio.wait({waiting}, timeout=self._limits.quiet)
            if not waiting.done():
                await cancelled(waiting)
                return taken
            taken += waiting.result()


async def share(
    readers: Sequence[Reader],
    sending: Coroutine[Any, Any, Any],
    *,
    limits: Limits,
    work: Work | None = None,
) -> dict[Reader, list[Received]]:
    """
    Let *readers*, which may be consumers of one group, read while *sending* runs, and until nothing is left.

    Each delivery is passed to *work* and then acknowledged. Reading ends when a reader of each name has received a
    fence, no delivery is in progress, and nothing has arrived for `limits.quiet` seconds.
    """
    taken: dict[Reader, list[Received]] = {reader: [] for reader in readers}
    fences: set[tuple[str, object]] = set()
    at_work = 0
    last = monotonic()

    async def read(reader: Reader) -> None:
        nonlocal at_work, last
        while True:
            received = await reader.next_or_fence()
            at_work, last = at_work + 1, monotonic()
            if is_fence(received):
                fences.add((reader.name, received.id))
            else:
                taken[reader].append(received)
                if work:
                    await work(received)
            await received.delivery.ack()
            at_work, last = at_work - 1, monotonic()

    async def finish() -> None:
        await sending
        sent = {
            (name, await send_fence(of_name.broker, of_name.topics[0]))
            for name, of_name in {reader.name: reader for reader in readers}.items()
        }
        while at_work or not sent <= fences or monotonic() - last < limits.quiet:  # noqa: ASYNC110  # the condition also depends on time
            await asyncio.sleep(limits.quiet / 10)

    reading = [asyncio.create_task(read(reader)) for reader in readers]
    try:
        await _unless_failed(finish(), *reading)
    finally:
        for task in reading:
            await cancelled(task)
    return taken


async def send_fence(broker: Transport, topic: Topic) -> object:
    """Send a fence, and return its id."""
    fence = Message.create(message_type=topic.message_type, message_name=topic.message_name, payload={"fence": _FENCE})
    await broker.send_message(fence)
    return fence.message_id


def is_fence(received: Received) -> bool:
    """Whether *received* is a fence."""
    return received.message is not None and _FENCE.encode() in received.message.payload_json


async def _uncut(settling: Coroutine[Any, Any, None]) -> None:
    """Complete *settling* even if it is cancelled. A half-sent acknowledgement may or may not cause a redelivery."""
    task = asyncio.create_task(settling)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait({task})


async def _unless_failed(main: Coroutine[Any, Any, Any], *helpers: asyncio.Task[None]) -> None:
    """Wait for *main*. Raise the error of a helper at once; helpers do not end by themselves."""
    task = asyncio.create_task(main)
    try:
        done, _ = await asyncio.wait({task, *helpers}, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        await cancelled(task)
