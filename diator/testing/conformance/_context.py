"""What a scenario is given."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar
from uuid import uuid4

from diator.brokers.base import Gap, Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, MessageUnroutable, OutcomeUnknown
from diator.testing.conformance._consuming import ConsumerRun, Handle
from diator.testing.conformance._harness import Harness, Limits, Outages, Proxy
from diator.testing.conformance._ledger import Ledger, Nonconformance, NotApplicable, Received, fate_of
from diator.testing.conformance._reader import Reader, Work, cancelled, share

__all__ = ["ConsumerRun", "Context"]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class Context:
    """
    A scenario's way to the transport. Whatever it opens through this is closed at the end.

    All names are of this run alone: the service may be shared, and hold what earlier runs have left.
    """

    def __init__(self, harness: Harness, capabilities: Capabilities, *, seed: int, resources: AsyncExitStack) -> None:
        self.harness = harness
        self.capabilities = capabilities
        self.limits: Limits = harness.limits
        self.ledger: Ledger = Ledger()
        self.random: random.Random = random.Random(seed)  # noqa: S311  # what is random has to be repeatable
        self._resources = resources
        self._run = uuid4().hex[:12]
        self._names = 0

    # -- names and messages --------------------------------------------------------------------------------------

    def name(self, hint: str = "") -> str:
        """Give a name that nobody else uses."""
        self._names += 1
        return f"conformance-{self._run}-{self._names}{hint}"

    def topic(self, hint: str = "") -> Topic:
        """Give a topic that nobody else uses."""
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
        """Make a message of *topic*."""
        return Message.create(
            message_type=topic.message_type,
            message_name=topic.message_name,
            payload={"number": number, **payload},
            key=key,
            headers=headers,
        )

    # -- the transport -------------------------------------------------------------------------------------------

    async def broker(self) -> Transport:
        """Make a broker, which is closed at the end of the scenario."""
        return self.closing(self.harness.transport())

    def closing(self, broker: Transport) -> Transport:
        """Have *broker* closed at the end of the scenario."""
        self._resources.push_async_callback(broker.aclose)
        return broker

    async def enter(self, reading: AbstractAsyncContextManager[Reader]) -> Reader:
        """Enter *reading* until the end of the scenario."""
        return await self._resources.enter_async_context(reading)

    async def send(self, broker: Transport, topic: Topic, count: int = 1, *, start: int = 0) -> list[Message]:
        """Send *count* messages of *topic*, one after the other. They are numbered."""
        messages = [self.message(topic, start + number) for number in range(count)]
        await self.send_all(broker, messages)
        return messages

    async def send_all(self, broker: Transport, messages: list[Message]) -> None:
        """Send *messages*, one after the other."""
        for message in messages:
            sent = self.ledger.attempt(message)
            try:
                await broker.send_message(message)
            except BaseException as error:
                sent.end(fate_of(error))
                raise
            sent.end("confirmed")

    async def use(self, broker: Transport, topic: Topic | None = None) -> None:
        """Send a message that nobody has to receive. To hear that nobody did is as good."""
        with suppress(MessageUnroutable):
            await self.send(broker, topic or self.topic())

    @asynccontextmanager
    async def reading(
        self, broker: Transport, *topics: Topic, group: str | None = None, prefetch: int = 64
    ) -> AsyncGenerator[Reader, None]:
        """
        Subscribe. Without a *group*, the subscription gets every message, however the transport does that.

        What was not settled at its end is noted as abandoned: it may come again.
        """
        named = group
        if group is None and "broadcast" not in self.capabilities.distribution:
            named = self.name("-alone")
        name = named or self.name("-subscription")
        begun = len(self.ledger.received)
        gaps: list[Gap] = []
        async with broker.subscribe(topics, group=named, prefetch=prefetch, on_gap=gaps.append) as deliveries:
            reader = Reader(broker, topics, name, deliveries, gaps=gaps, ledger=self.ledger, limits=self.limits)
            try:
                yield reader
            finally:
                for received in self.ledger.received[begun:]:
                    if received.subscription == name and received.delivery.outcome is None:
                        received.abandoned = True

    async def share(
        self, *readers: Reader, sending: Coroutine[Any, Any, Any], work: Work | None = None
    ) -> dict[Reader, list[Received]]:
        """Have *readers* read while *sending* runs, and until nothing is left. See `share`."""
        return await share(readers, sending, limits=self.limits, work=work)

    async def until_acknowledged(self, reader: Reader, count: int) -> None:
        """Read until *count* messages are acknowledged: what comes again may come later than what is new."""
        await reader.until_fence()
        received = [each for each in self.ledger.received if each.subscription == reader.name]
        done = {each.id for each in received if each.delivery.outcome == "ack"}
        while len(done) < count:
            done |= {each.id for each in await reader.take(1)}

    async def proxy(self) -> Proxy:
        """Put a proxy before the service, until the end of the scenario. To be done before a broker is made."""
        return await self._resources.enter_async_context(self.harness.proxied())

    async def outages(self) -> Outages:
        """Have a service that may be broken, until the end of the scenario. To be done before a broker is made."""
        return await self._resources.enter_async_context(self.harness.private())

    async def send_until_confirmed(self, broker: Transport, message: Message) -> None:
        """Send *message* until it is confirmed, or nobody is there to receive it. Each try is in the ledger."""
        while True:
            try:
                with suppress(MessageUnroutable):
                    await self.send_all(broker, [message])
                return
            except (BrokerUnavailable, OutcomeUnknown):
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def consuming(self, broker: Transport, handle: Handle, **options: Any) -> AsyncGenerator[ConsumerRun, None]:
        """Run a `Consumer` of *broker* that has *handle* called for each event; it is stopped at the end."""
        run = self.consumer_run(broker, handle, **options)
        running = asyncio.create_task(run.run())
        try:
            await run.ready(running)
            yield run
        finally:
            run.consumer.stop()
            run.consumer.stop()
            await asyncio.wait({running})
            if not running.cancelled():
                running.result()

    def consumer_run(self, broker: Transport, handle: Handle, **options: Any) -> ConsumerRun:
        """Make a `Consumer` of *broker* that has *handle* called for each event. It does not run."""
        return ConsumerRun(broker, self.name("-event"), handle, consumer=self.harness.consumer, **options)

    # -- judging -------------------------------------------------------------------------------------------------

    def check(self, holds: object, otherwise: str) -> None:
        """Raise `Nonconformance` unless it *holds*. Not an assertion, which may be switched off."""
        if not holds:
            raise Nonconformance(otherwise)

    def applies(self, holds: object, otherwise: str) -> None:
        """End the scenario as not run unless it *holds*: there would be nothing to prove."""
        if not holds:
            raise NotApplicable(otherwise)

    def same(self, found: object, wanted: object, what: str) -> None:
        """Raise `Nonconformance` unless both are equal."""
        if found != wanted:
            raise Nonconformance(f"{what}: {found!r}, and should be {wanted!r}")

    async def raises(self, error: type[E], doing: Awaitable[object], what: str) -> E:
        """Give the *error* that *doing* raises; `Nonconformance` if it raises none, or another one."""
        try:
            await doing
        except error as caught:
            return caught
        except Exception as other:
            raise Nonconformance(f"{what} raises {other!r}, and should raise {error.__name__}") from other
        raise Nonconformance(f"{what} raises nothing, and should raise {error.__name__}")

    async def allow_broker_error(self, doing: Awaitable[object], what: str) -> None:
        """Let *doing* succeed, or raise an error of the contract; `Nonconformance` if it raises another one."""
        try:
            await doing
        except BrokerError:
            pass
        except Exception as other:
            raise Nonconformance(f"{what} raises {other!r}, and should raise no foreign error") from other

    async def within(self, seconds: float, doing: Coroutine[Any, Any, T], what: str) -> T:
        """Give what *doing* gives; `Nonconformance` if that takes longer than *seconds*."""
        task = asyncio.create_task(doing)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                raise Nonconformance(f"{what} takes longer than {seconds:g} s")
            return task.result()
        finally:
            await cancelled(task)

    def start(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run *doing* beside the scenario; it is cancelled at the end."""
        task = asyncio.create_task(doing)
        self._resources.push_async_callback(cancelled, task)
        return task
