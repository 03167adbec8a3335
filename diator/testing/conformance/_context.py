"""The context of a scenario: brokers, names, readers, consumers and checks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import Any
from uuid import uuid4

from diator.brokers.base import Gap, Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, MessageRejected, MessageUnroutable, OutcomeUnknown
from diator.testing._suite.checks import Checks
from diator.testing._suite.errors import Nonconformance
from diator.testing.conformance._consuming import ConsumerRun, Handle
from diator.testing.conformance._harness import Harness, Limits, Outages, Proxy
from diator.testing.conformance._ledger import Ledger, Received, contrast, fate_of
from diator.testing.conformance._reader import Reader, Work, share
from diator.testing.conformance._shape import check_awaitable

__all__ = ["ConsumerRun", "Context"]


class Context(Checks):
    """
    A scenario's access to the transport. Everything that the scenario opens through it is closed at the end.

    Every name is unique to this run, because the service may be shared and contain messages of earlier runs.

    Attributes:
        harness: The harness of the run.
        capabilities: The capabilities of the transport.
        limits: The limits of the harness.
        ledger: The record of all messages that the scenario has sent and received.
        random: A generator with the seed of the run.
    """

    def __init__(self, harness: Harness, capabilities: Capabilities, *, seed: int, resources: AsyncExitStack) -> None:
        super().__init__(resources)
        self.harness = harness
        self.capabilities = capabilities
        self.limits: Limits = harness.limits
        self.ledger: Ledger = Ledger()
        self.random: random.Random = random.Random(seed)  # noqa: S311  # a run has to be repeatable
        self._run = uuid4().hex[:12]
        self._names = 0
        self._runs: list[ConsumerRun] = []
        self._gaps: list[Gap] = []

    @property
    def redelivery_bound(self) -> float:
        """How long the redelivery of what a lost consumer held may take, in seconds."""
        return (self.capabilities.redelivery_bound or 0.0) + self.limits.redelivery + self.limits.recovery

    # -- names and messages --------------------------------------------------------------------------------------

    def name(self, hint: str = "") -> str:
        """Return a new, unique name that ends with *hint*."""
        self._names += 1
        return f"conformance-{self._run}-{self._names}{hint}"

    def topic(self, hint: str = "") -> Topic:
        """Return a topic with a new, unique name that ends with *hint*."""
        return Topic("notification_event", self.name(hint))

    @staticmethod
    def message(
        topic: Topic,
        number: int = 0,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        **payload: Any,
    ) -> Message:
        """Return a new message of *topic*, whose payload has *number* and *payload*."""
        return Message.create(
            message_type=topic.message_type,
            message_name=topic.message_name,
            payload={"number": number, **payload},
            key=key,
            headers=headers,
        )

    # -- the transport -------------------------------------------------------------------------------------------

    async def broker(self) -> Transport:
        """Return a new broker, which is closed at the end of the scenario."""
        return self.closing(self.harness.transport())

    def closing(self, broker: Transport) -> Transport:
        """Close *broker* at the end of the scenario, and return it."""
        self._resources.push_async_callback(broker.aclose)
        return broker

    async def enter(self, reading: AbstractAsyncContextManager[Reader]) -> Reader:
        """Enter *reading* until the end of the scenario, and return its reader."""
        return await self._resources.enter_async_context(reading)

    async def send(self, broker: Transport, topic: Topic, count: int = 1, *, start: int = 0) -> list[Message]:
        """Send *count* messages of *topic*, one after another, numbered from *start* on. Return them."""
        messages = [self.message(topic, start + number) for number in range(count)]
        await self.send_all(broker, messages)
        return messages

    async def send_all(self, broker: Transport, messages: list[Message]) -> None:
        """Send *messages*, one after another. Record each attempt and its result in the ledger."""
        for message in messages:
            sent = self.ledger.attempt(message)
            try:
                check_awaitable(sending := broker.send_message(message), "send_message")
                await sending
            except BaseException as error:
                sent.end(fate_of(error))
                raise
            sent.end("confirmed")

    async def use(self, broker: Transport, topic: Topic | None = None) -> None:
        """Send a message that nobody has to receive. `MessageUnroutable` counts as success."""
        with suppress(MessageUnroutable):
            await self.send(broker, topic or self.topic())

    @asynccontextmanager
    async def reading(
        self, broker: Transport, *topics: Topic, group: str | None = None, prefetch: int = 64
    ) -> AsyncGenerator[Reader, None]:
        """
        Subscribe. Without a *group*, the subscription receives every message, however the transport does that.

        Deliveries that are unsettled at the end are recorded as abandoned: they may be redelivered.
        """
        named = group
        if group is None and "broadcast" not in self.capabilities.distribution:
            named = self.name("-alone")
        name = self.name("-subscription") if named is None else named
        start = len(self.ledger.received)
        gaps: list[Gap] = []

        def on_gap(gap: Gap) -> None:
            gaps.append(gap)
            self._gaps.append(gap)

        async with broker.subscribe(topics, group=named, prefetch=prefetch, on_gap=on_gap) as deliveries:
            reader = Reader(
                broker, topics, name, deliveries, gaps=gaps, ledger=self.ledger, limits=self.limits, prefetch=prefetch
            )
            try:
                yield reader
            finally:
                for received in self.ledger.received[start:]:
                    if received.subscription == name and received.delivery.outcome is None:
                        received.abandoned = True

    async def share(
        self, *readers: Reader, sending: Coroutine[Any, Any, Any], work: Work | None = None
    ) -> dict[Reader, list[Received]]:
        """Let *readers* read while *sending* runs, and until nothing is left. See `_reader.share`."""
        return await share(readers, sending, limits=self.limits, work=work)

    async def until_acknowledged(self, reader: Reader, count: int) -> None:
        """Read until *count* messages are acknowledged. A redelivery may arrive later than a new message."""
        await reader.until_fence()
        received = [each for each in self.ledger.received if each.subscription == reader.name]
        done = {each.id for each in received if each.delivery.outcome == "ack"}
        while len(done) < count:
            done |= {each.id for each in await reader.take(1)}

    async def proxy(self) -> Proxy:
        """Start a proxy in front of the service, until the end of the scenario. Call this before making a broker."""
        return await self._resources.enter_async_context(self.harness.proxied())

    async def outages(self) -> Outages:
        """Start a service that may be broken, until the end of the scenario. Call this before making a broker."""
        return await self._resources.enter_async_context(self.harness.private())

    async def send_when_there_is_room(self, broker: Transport, message: Message) -> None:
        """Send *message* until the full service accepts it: an acknowledgement makes room within `limits.lag`."""
        until = monotonic() + self.limits.lag
        while True:
            try:
                return await self.send_all(broker, [message])
            except MessageRejected:
                if monotonic() > until:
                    raise
            await asyncio.sleep(self.limits.lag / 100)

    async def send_until_confirmed(self, broker: Transport, message: Message) -> None:
        """Send *message* until it is confirmed or unroutable. Each attempt is in the ledger."""
        while True:
            try:
                with suppress(MessageUnroutable):
                    await self.send_all(broker, [message])
                return
            except (BrokerUnavailable, OutcomeUnknown):
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def consuming(self, broker: Transport, handle: Handle, **options: Any) -> AsyncGenerator[ConsumerRun, None]:
        """Run a `Consumer` of *broker* that calls *handle* for each event. It is stopped at the end of the block."""
        async with self.running(self.consumer_run(broker, handle, **options)) as run:
            yield run

    @asynccontextmanager
    async def running(self, run: ConsumerRun) -> AsyncGenerator[ConsumerRun, None]:
        """Run the consumer of *run*. It is stopped at the end of the block."""
        running = asyncio.create_task(run.run())
        try:
            await run.consumer.ready()
            yield run
        finally:
            run.consumer.stop()
            run.consumer.stop()
            await asyncio.wait({running})
            if not running.cancelled():
                running.result()
        run.check()

    def consumer_run(self, broker: Transport, handle: Handle, *, name: str = "", **options: Any) -> ConsumerRun:
        """Return a `Consumer` of *broker* that calls *handle* for each event *name*, by default a new one, unrun."""
        name = name or self.name("-event")
        self._runs.append(ConsumerRun(broker, name, handle, consumer=self.harness.consumer, **options))
        return self._runs[-1]

    def summary(self) -> str:
        """Say what has happened in the scenario so far: what was sent, received and handled."""
        gaps = [f"a gap was reported ({gap.reason})" for gap in self._gaps]
        return "; ".join([*self.ledger.summary(), *(run.summary() for run in self._runs), *gaps])

    # -- checks --------------------------------------------------------------------------------------------------

    def same(self, found: object, wanted: object, what: str, *, rule: str = "") -> None:
        """Raise `Nonconformance` unless *found* equals *wanted*. The error begins with *what*. *rule* is as above."""
        if found != wanted:
            raise Nonconformance(f"{what}: {contrast(found, wanted, self.ledger.name_of)}", rule=rule)

    async def allow_broker_error(self, doing: Awaitable[object], what: str) -> None:
        """Await *doing*, which may succeed or raise a `BrokerError`. Raise `Nonconformance` for any other error."""
        try:
            await doing
        except BrokerError:
            pass
        except Exception as other:
            raise Nonconformance(f"{what} raised {other!r}, expected no error or a BrokerError") from other
