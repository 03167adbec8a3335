"""Consumers and deliveries: right programs, and wrong lines with the error of each type checker."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any, assert_type

from diator.brokers import Message
from diator.brokers.base import Delivery, Gap, OnGap, ReadableBroker, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.cloudevents import CloudEvents
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.consumer import Consumer, Handled, Health
from diator.container import Container
from diator.events import EventEmitter, EventMap
from diator.middlewares import Handle, LoggingMiddleware
from diator.retrying import PermanentError, RetryPolicy


async def function(message: Any, handle: Handle) -> Any:
    return await handle(message)


class OwnBroker:
    async def send_message(self, message: Message, /) -> None: ...


class OwnReadableBroker(OwnBroker):
    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(distribution={"competing"}, redelivery={"crash", "close"}, delayed_retry=True)

    def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        raise NotImplementedError


class Refused(PermanentError): ...


def on_gap(gap: Gap) -> None:
    assert_type(gap.until - gap.since, timedelta)


async def on_gap_later(gap: Gap) -> None: ...


async def on_handled_later(handled: Handled) -> None: ...


class Correlated(Wrapped):
    def outgoing(self, message: Message) -> Message:
        return replace(message, headers={**message.headers, "correlation-id": "7"})


def on_handled(handled: Handled) -> None:
    assert_type(handled.error, BaseException | None)
    assert_type(handled.topic, Topic)
    assert_type(handled.retries, int)
    assert_type(handled.errors, tuple[BaseException, ...])


async def consume(events: EventMap) -> None:
    """What is sent only cannot be consumed from; levels that do not exist are no levels."""
    broker: ReadableBroker = MemoryMessageBroker()
    policy = RetryPolicy(
        immediate_retries=1, delayed_retries=2, permanent=(Refused, LookupError), retry_undecodable=False
    )
    consumer = Consumer(broker, event_map=events, group="billing", retry=policy, on_gap=on_gap)
    assert_type(consumer.health(), Health)
    assert_type(consumer.health().oldest_in_flight, float)
    assert_type(consumer.health().oldest_message, float | None)
    consumer.stop()
    # As above, because mypy refuses to look at a None that is awaited.
    assert_type(await asyncio.gather(consumer.run(signals=False)), tuple[None])

    async with Consumer(broker, event_map=events, log_errors=True) as entered:
        assert_type(entered, Consumer)
        assert_type(await asyncio.gather(entered.ready()), tuple[None])

    Consumer(
        OwnReadableBroker(),
        event_map=events,
        container=Container(),
        concurrency=8,
        middlewares=[LoggingMiddleware(), function],
        event_emitter=EventEmitter(),
        requires=Capabilities(guarantee="at_least_once", distribution=frozenset({"competing"})),
        on_handled=on_handled,
    )
    async with Consumer(Correlated(broker), event_map=events, prefetch=100) as running:
        assert_type(running, Consumer)
    await consumer.ready()

    Consumer(OwnBroker(), event_map=events)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, codec=CloudEvents("https://shop.example", mode="binary"))
    Consumer(broker, event_map=events, codec=CloudEvents)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, events)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Consumer(broker, event_map=events, on_handled=on_handled_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, on_gap=on_gap_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, retry=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, prefetch="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker, event_map=events, group=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Consumer(broker)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RetryPolicy(immediate=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Capabilities(guarantee="exactly_once")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Capabilities(redelivery={"never"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RetryPolicy(permanent=(SystemExit,))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def settle(deliveries: AsyncIterator[Delivery]) -> None:
    async for delivery in deliveries:
        assert_type(delivery.body, bytes)
        assert_type(delivery.topic.message_name, str)
        await delivery.ack()
        await delivery.retry(after=1.5)
        await delivery.dead_letter("it is of no use")
        await delivery.retry(1.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
