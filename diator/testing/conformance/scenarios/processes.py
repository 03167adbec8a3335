"""GRP, LIF, DUR and ACK: consumers that are separate processes."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.testing.conformance._consumer_process import ConsumerProcess, consumer_process
from diator.testing.conformance._context import Context
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
        bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery + ctx.limits.recovery
        await ctx.within(bound, _all_handled(20, second), "redelivery after the process was killed")
        ctx.same(
            Counter(second.started), Counter(range(20)), "the number of times the other process handled each event"
        )


async def _all_handled(count: int, *processes: ConsumerProcess) -> None:
    """Wait until the handlers of *count* events have finished, in any of *processes*."""
    while len({number for each in processes for number in each.finished}) < count:  # noqa: ASYNC110  # any of the processes may report it
        await asyncio.sleep(0.02)
