"""Parts of scenarios that test a transport and a consumer together."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from diator._text import counted
from diator.brokers.base import Delivery, OnGap, ReadableBroker, Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from diator.instruments import Handled
from diator.retrying import RetryPolicy
from diator.testing.conformance._ledger import check_attempt, few


@dataclass(frozen=True, kw_only=True)
class Happened(NotificationEvent):
    """The event of all scenarios. Each run has its own subclass with a unique message name."""

    number: int
    tags: list[str]


_NOT_FINAL = frozenset({"retried", "unsettled"})

Handle: TypeAlias = Callable[[Any], Awaitable[Any]]

ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)
"""A retry policy without retries: a failing message is dead-lettered at once."""


class FirstWaits:
    """
    A handler of `Happened` that waits with the event 0 until *gate* is set.

    Attributes:
        gate: Set it to let the event 0 go on.
        handled: The numbers of the handled events, in the order of their ends.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.handled: list[int] = []

    async def handle(self, event: Happened) -> None:
        """Handle *event*."""
        if event.number == 0:
            await self.gate.wait()
        self.handled.append(event.number)


class ConsumerRun:
    """
    A consumer, with the outcomes of its deliveries.

    Attributes:
        topic: The topic that it consumes.
        group: Its consumer group; None if the transport has no groups.
        consumer: The consumer.
        handled: What the consumer reported for each delivery, in order.
        broker: The broker.
        topics: The topic, and a second one if the run was made with *also*, the name of another event.
    """

    def __init__(
        self,
        broker: Transport,
        name: str,
        handle: Handle,
        *,
        also: str | None = None,
        of: type[NotificationEvent] = Happened,
        consumer: type[Consumer] = Consumer,
        **options: Any,
    ) -> None:
        names = [name] if also is None else [name, also]

        async def handler(event: Any) -> None:
            await handle(event)

        events = EventMap()
        for each in names:
            events.bind(type(of.__name__, (of,), {"message_name": each}), handler)
        self.broker: Transport = broker
        self.topics: list[Topic] = [Topic("notification_event", each) for each in names]
        self.topic: Topic = self.topics[0]
        self.handled: list[Handled] = []
        self._progress = asyncio.Event()
        self._missing = 0
        self._failure: Exception | None = None
        self._reading = _Reading(broker)
        if "competing" in broker.capabilities.distribution:
            options.setdefault("group", f"{name}-group")
        options.setdefault("retry", ONCE)
        self.group: str | None = options.get("group")
        self.consumer: Consumer = consumer(self._reading, event_map=events, on_handled=self._note, **options)

    async def run(self) -> None:
        """Consume until the consumer is stopped."""
        try:
            await self.consumer.run(signals=False)
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._progress.set()

    @property
    def reports_connection(self) -> bool:
        """Whether the transport reports if the subscription is connected."""
        return hasattr(self._reading.deliveries, "connected")

    def message(
        self, number: int = 0, *, key: str | None = None, topic: Topic | None = None, **payload: Any
    ) -> Message:
        """Return a message of *topic*, by default the first one. The handler accepts it unless *payload* is invalid."""
        name = (topic or self.topic).message_name
        return Message.create(message_name=name, payload={"number": number, "tags": [], **payload}, key=key)

    async def until_handled(self, count: int) -> list[Handled]:
        """
        Wait until *count* deliveries are handled, and return the reports of all.

        Raise the error of the consumer if it has ended with one: it will handle no more.
        """
        while self._waits_for(count - len(self.handled)):
            await self._go_on()
        return self.handled

    async def until_settled(self, count: int) -> None:
        """Wait until *count* messages are settled for good: a requeued message is not."""
        seen = settled = 0
        while self._waits_for(count - settled):
            while len(self.handled) == seen:
                await self._go_on()
            settled += sum(each.outcome not in _NOT_FINAL for each in self.handled[seen:])
            seen = len(self.handled)

    def _waits_for(self, missing: int) -> bool:
        self._missing = max(missing, 0)
        return missing > 0

    async def _go_on(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._progress.clear()
        await self._progress.wait()

    def settled(self) -> list[Handled]:
        """Return the reports of the messages that are settled for good."""
        return [handled for handled in self.handled if handled.outcome not in _NOT_FINAL]

    def outcomes(self) -> list[str]:
        """Return the outcomes of the deliveries, in the order in which they finished."""
        return [handled.outcome for handled in self.handled]

    def outcomes_of(self, messages: Sequence[Message]) -> list[str]:
        """Return the last outcomes of *messages*, in the order of *messages*."""
        last = {handled.message_id: handled.outcome for handled in self.handled}
        return [last.get(message.message_id, "not handled") for message in messages]

    def summary(self) -> str:
        """Say what the consumer has handled so far."""
        reasons: dict[str, list[str]] = defaultdict(list)
        for handled in self.handled:
            reasons[handled.outcome] += [handled.reason] if handled.reason else []
        numbers = Counter(self.outcomes())
        outcomes = ", ".join(
            f"{number:,} {outcome}{f' ({few(reasons[outcome])})' * bool(reasons[outcome])}"
            for outcome, number in numbers.items()
        )
        health = self.consumer.health()
        lost = f", and reconnected {counted(health.reconnects, 'time')}" if health.reconnects else ""
        more = f", with {self._missing:,} more expected" * bool(self._missing)
        return f"the consumer of {self.topic.message_name!r} has handled {outcomes or 'nothing'}{more}{lost}"

    def check(self) -> None:
        """Raise `Nonconformance` if a delivery had an attempt that cannot be. The consumer itself only reports it."""
        for handled in self.handled:
            check_attempt(handled.attempt)

    def _note(self, handled: Handled) -> None:
        self.handled.append(handled)
        self._progress.set()


class _Reading:
    """A broker that shows the deliveries of its subscription."""

    def __init__(self, broker: ReadableBroker) -> None:
        self._broker = broker
        self.deliveries: AsyncIterator[Delivery] | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._broker.capabilities

    async def send_message(self, message: Message, /) -> None:
        await self._broker.send_message(message)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with self._broker.subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            self.deliveries = deliveries
            yield deliveries
