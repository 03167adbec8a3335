"""GRP, LIF and DUR: members that are processes of their own, and end as processes do."""

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
    "two processes of one group share what is sent by a third",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def two_processes(ctx: Context) -> None:
    """Catches a group that is one only within a process, and members that take each other for themselves."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with (
        consumer_process(ctx.harness, topic.message_name, group, seconds=0.02) as one,
        consumer_process(ctx.harness, topic.message_name, group, seconds=0.02) as two,
    ):
        await one.ready()
        await two.ready()
        handled = 0
        while handled < 400 and not (one.finished and two.finished):  # noqa: PLR2004  # reading ahead, one may have all
            await ctx.send_all(broker, _events(ctx, topic, range(handled, handled + 40)))
            handled += 40
            await _all_handled(handled, one, two)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.check(one.finished and two.finished, f"of {handled} events, one process had {len(one.finished)}")
        ctx.same(Counter(one.started + two.started), Counter(range(handled)), "how often each was handled")


@scenario(
    "LIF-14",
    "a process that is asked to end finishes its work, and leaves the rest",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def asked_to_end(ctx: Context) -> None:
    """Catches an end that cuts off what is being handled, or takes along what is not."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.1) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(40)))
        await first.until(lambda it: len(it.started) >= 6)  # noqa: PLR2004
        code = await ctx.within(0.1 + 5 * ctx.limits.lag, first.end(signal.SIGTERM), "ending after SIGTERM")
        ctx.same(code, 0, "the exit code after SIGTERM")
        ctx.same(sorted(first.finished), sorted(first.started), "what was finished of what was begun")
        ctx.check(len(first.finished) < 40, "everything was done already, so nothing was proved")  # noqa: PLR2004
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.01) as second:
        await _all_handled(40, first, second)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(Counter(first.started + second.started), Counter(range(40)), "how often each was handled")


@scenario(
    "DUR-08",
    "a new process goes on where one that was killed had come to",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def replaced(ctx: Context) -> None:
    """Catches a position that is kept by the process, or told to the service only at its end."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(10)))
        await first.until(lambda it: len(it.finished) == 10)  # noqa: PLR2004
        await asyncio.sleep(ctx.limits.lag)  # an acknowledgement may be told together with others
        ctx.same(await first.end(signal.SIGKILL), -signal.SIGKILL, "the exit code of a process that was killed")
    await ctx.send_all(broker, _events(ctx, topic, range(10, 20)))
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as second:
        await _all_handled(20, first, second)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(sorted(second.started), [*range(10, 20)], "what the new process handled")


@scenario(
    "ACK-25",
    "what a process held that was killed comes to another",
    level="F",
    needs=_GROUP,
    facilities=["processes"],
    timeout=60,
)
async def killed_at_work(ctx: Context) -> None:
    """Catches work that dies with its process, and a group that waits for the dead."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=3600.0) as first:
        await first.ready()
        await ctx.send_all(broker, _events(ctx, topic, range(20)))
        await first.until(lambda it: len(it.started) == 4)  # noqa: PLR2004  # as many as it handles at once
        ctx.same(await first.end(signal.SIGKILL), -signal.SIGKILL, "the exit code of a process that was killed")
    async with consumer_process(ctx.harness, topic.message_name, group, seconds=0.0) as second:
        await second.ready()
        bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery + ctx.limits.recovery
        await ctx.within(bound, _all_handled(20, second), "taking over from a process that was killed")
        ctx.same(Counter(second.started), Counter(range(20)), "how often each was handled by the other")


async def _all_handled(count: int, *processes: ConsumerProcess) -> None:
    """Wait until the handlers of *count* events have ended, in whichever of *members*."""
    while len({number for each in processes for number in each.finished}) < count:  # noqa: ASYNC110  # several may say so
        await asyncio.sleep(0.02)
