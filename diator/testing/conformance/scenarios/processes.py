"""GRP, LIF, DUR and ACK: consumers that are separate processes."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from diator.brokers.base import Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.testing.conformance._consumer_process import ConsumerProcess, consumer_process
from diator.testing.conformance._context import Context
from diator.testing.conformance._reader import Reader, Settle
from diator.testing.conformance._scenario import scenario

_GROUP = Capabilities(
    distribution=frozenset({"competing"}), subscription="durable", settlement="cumulative", multi_process=True
)


def _events(ctx: Context, topic: Topic, numbers: range) -> list[Message]:
    return [ctx.message(topic, number, tags=[]) for number in numbers]


@scenario(
    "GRP-13",
    "Two processes of one group share the messages of a third process",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def two_processes(ctx: Context) -> None:
    """Catch a group that is limited to one process, and consumers that mistake each other for themselves."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with (
        consumer_process(ctx.harness, topic.message_name, group, seconds=0.02) as one,
        consumer_process(ctx.harness, topic.message_name, group, seconds=0.02) as two,
    ):
        await one.ready()
        await two.ready()
        handled = 0
        while handled < 400 and not (one.finished and two.finished):  # noqa: PLR2004  # one process may prefetch everything
            await ctx.send_all(broker, _events(ctx, topic, range(handled, handled + 40)))
            handled += 40
            await _all_handled(handled, one, two)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.check(one.finished and two.finished, f"of {handled} events, one process handled {len(one.finished)}")
        ctx.same(
            Counter(one.started + two.started), Counter(range(handled)), "the number of times each event was handled"
        )


@scenario(
    "LIF-14",
    "A process that receives SIGTERM finishes its work and leaves the rest",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def asked_to_end(ctx: Context) -> None:
    """Catch a shutdown that cancels running handlers, or loses messages that no handler has started on."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.1) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(40)))
        await first.until(lambda it: len(it.started) >= 6)  # noqa: PLR2004
        code = await ctx.within(0.1 + 5 * ctx.limits.lag, first.end(signal.SIGTERM), "the end after SIGTERM")
        ctx.same(code, 0, "the exit code after SIGTERM")
        ctx.same(sorted(first.finished), sorted(first.started), "the finished handlers, compared with the started ones")
        ctx.check(len(first.finished) < 40, "everything was handled already, so nothing was proved")  # noqa: PLR2004
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.01) as second:
        await _all_handled(40, first, second)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(
            Counter(first.started + second.started), Counter(range(40)), "the number of times each event was handled"
        )


@scenario(
    "DUR-08",
    "A new process continues where a killed process stopped",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def replaced(ctx: Context) -> None:
    """Catch a position that is kept in the process, or sent to the service only when the process ends."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(10)))
        await first.until(lambda it: len(it.finished) == 10)  # noqa: PLR2004
        await asyncio.sleep(ctx.limits.lag)  # acknowledgements may be sent in batches
        ctx.same(await first.end(signal.SIGKILL), -signal.SIGKILL, "the exit code of the killed process")
    await ctx.send_all(broker, _events(ctx, topic, range(10, 20)))
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as second:
        await _all_handled(20, first, second)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(sorted(second.started), [*range(10, 20)], "the events that the new process handled")


@scenario(
    "ACK-25",
    "The deliveries of a killed process are redelivered to another",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def killed_at_work(ctx: Context) -> None:
    """Catch work that is lost with its process, and a group that waits for a dead consumer."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=3600.0) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(20)))
        await first.until(lambda it: len(it.started) == 4)  # noqa: PLR2004  # as many as it handles at once
        ctx.same(await first.end(signal.SIGKILL), -signal.SIGKILL, "the exit code of the killed process")
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as second:
        await second.ready()
        await ctx.within(ctx.redelivery_bound, _all_handled(20, second), "redelivery after the process was killed")
        ctx.same(
            Counter(second.started), Counter(range(20)), "the number of times the other process handled each event"
        )


@scenario(
    "ACK-28",
    "A process that was stopped beyond its lease removes nothing that another consumer holds",
    level="F",
    needs=replace(_GROUP, redelivery=frozenset({"crash"})),
    facilities=["processes"],
    timeout=150,
)
async def late_ack(ctx: Context) -> None:
    """Catch an acknowledgement that counts although its message was redelivered to another consumer meanwhile."""
    async with _stopped_at_work(ctx, settle="nothing") as it:
        await _works_on(ctx, it.process)
        again = {number for number, times in Counter(it.process.started).items() if times > 1}
    # What was redelivered to the process itself, after it had joined its group again, it may acknowledge.
    still = [message for number, message in enumerate(it.messages) if number not in again]
    async with it.reading() as last:
        what = "the redelivery of what the other consumer had not settled"
        await ctx.within(ctx.redelivery_bound, _until(last, still), what)


@scenario(
    "ACK-29",
    "A process that was stopped beyond its lease brings nothing back that others have acknowledged",
    level="F",
    needs=replace(_GROUP, redelivery=frozenset({"crash"})),
    facilities=["processes"],
    timeout=150,
)
async def late_position(ctx: Context) -> None:
    """Catch an acknowledgement, or a position, that overwrites a later one: what is done begins anew."""
    async with _stopped_at_work(ctx, settle="ack") as it:
        await ctx.send_all(it.broker, more := _events(ctx, it.topic, range(4, 24)))
        await ctx.until_acknowledged(it.other, len([*it.messages, *more]))
        await it.close_other()
        await _works_on(ctx, it.process)
    async with it.reading() as last:
        came = [each.message and each.message.payload["number"] for each in await last.until_fence()]
    ctx.same(came, [], "the numbers of the messages that came again")


@dataclass(frozen=True)
class _Stopped:
    """
    A process that was stopped while it handled *messages*, and another reader of its group, which has them now.

    *reading* opens a further reader.
    """

    process: ConsumerProcess
    messages: Sequence[Message]
    other: Reader
    close_other: Callable[[], Awaitable[None]]
    reading: Callable[[], AbstractAsyncContextManager[Reader]]
    broker: Transport
    topic: Topic


@asynccontextmanager
async def _stopped_at_work(ctx: Context, *, settle: Settle) -> AsyncGenerator[_Stopped, None]:
    """Stop a process while it handles four messages, and let another reader take them and *settle* them."""
    bound = ctx.capabilities.redelivery_bound
    ctx.applies(bound is not None and bound <= 30, "the bound of a redelivery is too long for a test")  # noqa: PLR2004
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    reading = partial(ctx.reading, broker, topic, group=group)
    async with (
        consumer_process(ctx.harness, topic.message_name, group, seconds=2 * ctx.limits.lag) as process,
        AsyncExitStack() as readers,
    ):
        await process.ready()
        messages = _events(ctx, topic, range(4))
        await ctx.send_all(broker, messages)
        await process.until(lambda it: len(it.started) == 4)  # noqa: PLR2004
        process.stop()
        other = await readers.enter_async_context(reading())
        taking = ctx.start(other.take(4, settle=settle))
        await asyncio.wait({taking}, timeout=ctx.redelivery_bound)
        came = taking.done() and not taking.exception()
        # Only a lease or a heartbeat tells that a process stands still.
        ctx.applies(came or "deadline" in ctx.capabilities.redelivery, "a process that is stopped keeps its deliveries")
        ctx.check(came, "the deliveries of a stopped process were not redelivered in time")
        yield _Stopped(process, messages, other, readers.aclose, reading, broker, topic)


async def _works_on(ctx: Context, process: ConsumerProcess) -> None:
    """Let the stopped process go on, finish its handlers, acknowledge and end."""
    process.resume()
    await process.until(lambda it: {0, 1, 2, 3} <= {*it.finished})
    await asyncio.sleep(ctx.limits.lag)  # acknowledgements may be sent in batches
    await process.end(signal.SIGTERM)


async def _until(reader: Reader, messages: Sequence[Message]) -> None:
    """Read until every one of *messages* has come once more."""
    missing = {message.message_id for message in messages}
    while missing:
        missing -= {each.id for each in await reader.take(1) if each.id is not None}


async def _all_handled(count: int, *processes: ConsumerProcess) -> None:
    """Wait until the handlers of *count* events have finished, in any of *processes*."""
    while len({number for each in processes for number in each.finished}) < count:  # noqa: ASYNC110  # any of the processes may report it
        await asyncio.sleep(0.02)
