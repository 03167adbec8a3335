"""Helpers of the consumer's tests."""

import asyncio
import re

import pytest

from diator.brokers.base import Topic
from diator.consumer import DEFAULT_GROUP, Consumer
from diator.retrying import RetryPolicy
from tests.unit.doubles import (
    UserJoined,
    events_of,
    running,
    until,
)

JOINED = Topic("notification_event", "UserJoined")

CANARY = "canary-4711"

ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)


def quick(immediate_retries=0, delayed_retries=0, **options):
    """Return a retry policy without delays."""
    return RetryPolicy(
        immediate_retries=immediate_retries,
        immediate_pause=0,
        delayed_retries=delayed_retries,
        first_delay=0,
        **options,
    )


async def on_joined(event: UserJoined) -> None: ...


def consumer_of(broker, *handlers, **options):
    """Return a consumer, and the list of the outcomes that it reports."""
    reports = []
    consumer = Consumer(broker, event_map=events_of(*handlers), **{"on_handled": reports.append, **options})
    return consumer, reports


async def consume(broker, *handlers, count=1, **options):
    """Run a consumer until *count* deliveries were handled. Return their outcomes."""
    consumer, reports = consumer_of(broker, *handlers, **options)
    async with running(consumer) as run:
        await until(lambda: len(reports) >= count or run.done())
    return reports


def outcomes(reports):
    return [handled.outcome for handled in reports]


def reason_of(handled):
    """Return the reason of an outcome, or of a dead letter, without the names of the handlers."""
    return re.sub(r" in [\w.<>]+", "", handled.reason)


async def left_in(broker, count, group=DEFAULT_GROUP, topic=JOINED):
    """Return the attempt numbers of the messages that *group* has not settled."""
    async with broker.subscribe({topic}, group=group) as deliveries, asyncio.timeout(1):
        return [(await anext(deliveries)).attempt for _ in range(count)]


async def is_drained(broker, group=DEFAULT_GROUP):
    with pytest.raises(TimeoutError):
        async with broker.subscribe({JOINED}, group=group) as deliveries, asyncio.timeout(0.01):
            await anext(deliveries)
    return True


async def cancelling(*_):
    """Wait for a handler or a middleware that is cancelled."""
    something = asyncio.get_running_loop().create_future()
    something.cancel()
    await something


JOIN = UserJoined()


class Slow:
    """A handler that waits until the test lets it continue."""

    def __init__(self):
        self.gate, self.begun, self.done, self.cancelled = asyncio.Event(), [], [], []

    async def __call__(self, event: UserJoined) -> None:
        self.begun.append(event.user_id)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.005)  # it cleans up
            self.cancelled.append(event.user_id)
            raise
        self.done.append(event.user_id)
