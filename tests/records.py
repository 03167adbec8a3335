"""What a log record has beside its text, and a consumer that makes some."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.context import correlated, correlation
from diator.events import EventEmitter, EventMap, NotificationEvent
from diator.middlewares import LoggingMiddleware
from diator.retrying import RetryPolicy

_OF_ANY = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the attributes of *record* that diator has added with `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OF_ANY}


async def handle_once(event: NotificationEvent, handler: Callable[[Any], Awaitable[None]]) -> None:
    """Let a consumer with `LoggingMiddleware` handle *event*, which is correlated with order-7, without a retry."""
    broker, events, ended = MemoryMessageBroker(), EventMap(), asyncio.Event()
    events.bind(type(event), handler)
    consumer = Consumer(
        broker,
        event_map=events,
        group="greeters",
        middlewares=[LoggingMiddleware()],
        retry=RetryPolicy(immediate_retries=0, delayed_retries=0),
        on_handled=lambda _: ended.set(),
    )
    async with consumer:
        with correlated("order-7"):
            await EventEmitter(message_broker=broker, headers=[correlation]).emit(event)
        await asyncio.wait_for(ended.wait(), 60)
