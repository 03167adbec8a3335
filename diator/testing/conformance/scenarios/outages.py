"""FLT: the service is restarted, killed, frozen or full, or an operator changes something."""

from __future__ import annotations

import asyncio

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import BrokerUnavailable, OutcomeUnknown
from diator.testing._suite.errors import Nonconformance
from diator.testing.conformance._context import Context
from diator.testing.conformance._recovery import (
    reading_through_a_proxy,
    receives_again,
    reconnected,
    service_is_down,
    survives_faults,
)
from diator.testing.conformance._scenario import scenario

_GROUPS = Capabilities(distribution=frozenset({"competing"}), subscription="durable", settlement="cumulative")


@scenario(
    "FLT-05",
    "The transport survives restarts of the service under load",
    level="F",
    facilities=["outages"],
    timeout=180,
)
async def restarts(ctx: Context) -> None:
    """Catch a subscription or a sender that does not reconnect to a restarted service."""
    service = await ctx.outages()

    async def restart() -> None:
        await service.stop()
        await service_is_down(ctx)
        await service.start()

    reader = await survives_faults(ctx, restart, data_survives=ctx.capabilities.durability != "none")
    _demand_gap(ctx, reader.gaps)


@scenario(
    "FLT-06", "The transport survives crashes of the service under load", level="F", facilities=["outages"], timeout=180
)
async def killed(ctx: Context) -> None:
    """Catch a client that notices an outage only when the service closes its connections in an orderly way."""
    service = await ctx.outages()

    async def kill() -> None:
        await service.kill()
        await service_is_down(ctx)
        await service.start()

    reader = await survives_faults(ctx, kill, data_survives=ctx.capabilities.durability == "crash")
    _demand_gap(ctx, reader.gaps)


def _demand_gap(ctx: Context, gaps: object) -> None:
    if ctx.capabilities.guarantee == "at_most_once":
        ctx.check(gaps, "the service was down, and the subscription reported no gap")


@scenario(
    "FLT-09",
    "A client that an operator disconnects connects again",
    level="F",
    facilities=["operator", "proxy"],
    timeout=60,
)
async def disconnected(ctx: Context) -> None:
    """Catch a client that treats an orderly close of its connection as the end of its work."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        for _ in range(3):
            before = proxy.accepted
            await ctx.harness.disconnect(reader.broker)
            await reconnected(ctx, proxy, before, ctx.limits.max_delay + ctx.limits.recovery)
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)


@scenario(
    "FLT-10",
    "A group that is deleted while it is read is created again",
    level="F",
    needs=_GROUPS,
    facilities=["topology"],
    timeout=90,
)
async def group_deleted(ctx: Context) -> None:
    """Catch a subscription that keeps waiting for messages which cannot arrive any more."""
    broker, topic, group, idle = await ctx.broker(), ctx.topic(), ctx.name("-read"), ctx.name("-idle")
    waiting = await _leave_waiting(ctx, topic, idle)
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        for each in (group, idle):
            await ctx.harness.delete(broker, topic, each)
        await receives_again(ctx, reader)
    await _was_deleted(ctx, topic, idle, waiting)


@scenario(
    "FLT-11",
    "A topic that is deleted while it is read is created again",
    level="F",
    needs=_GROUPS,
    facilities=["topology"],
    timeout=120,
)
async def topic_deleted(ctx: Context) -> None:
    """Catch a subscription that ends silently, and a sender that never finds its topic again."""
    broker, topic, group, idle = await ctx.broker(), ctx.topic(), ctx.name("-read"), ctx.name("-idle")
    waiting = await _leave_waiting(ctx, topic, idle)
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        await ctx.harness.delete(broker, topic, None)
        await receives_again(ctx, reader)
    await _was_deleted(ctx, topic, idle, waiting)


async def _leave_waiting(ctx: Context, topic: Topic, group: str) -> list[Message]:
    """Let *group* read two of five messages and leave. Return the other three."""
    broker = await ctx.broker()
    async with ctx.reading(broker, topic, group=group, prefetch=2) as reader:
        messages = await ctx.send(broker, topic, 5)
        await reader.take(2)
    return messages[2:]


async def _was_deleted(ctx: Context, topic: Topic, group: str, waiting: list[Message]) -> None:
    """Check that the messages waiting for *group* are lost, or that the messages it had read are redelivered."""
    broker = await ctx.broker()
    before = {each.id for each in ctx.ledger.received if each.subscription == group}
    async with ctx.reading(broker, topic, group=group) as reader:
        came = {each.id for each in await reader.until_fence()}
    undisturbed = {each.message_id for each in waiting} <= came and not came & before
    ctx.check(
        not undisturbed,
        "the waiting messages are still there and none was redelivered: nothing was deleted, so nothing was proved",
    )


@scenario(
    "FLT-14",
    "The transport survives a service that freezes and continues",
    level="F",
    facilities=["outages"],
    timeout=180,
)
async def frozen(ctx: Context) -> None:
    """Catch a client that notices an outage only by a broken connection."""
    service = await ctx.outages()

    async def freeze() -> None:
        await service.pause()
        await service_is_down(ctx)
        await asyncio.sleep(ctx.limits.liveness / 2)
        await service.resume()

    await survives_faults(ctx, freeze, count=60)


@scenario(
    "FLT-18",
    "A full service makes senders fail and keeps serving readers",
    level="F",
    facilities=["outages", "alarm"],
    timeout=120,
)
async def full(ctx: Context) -> None:
    """Catch a message that is confirmed but not stored, a permanent error, and readers blocked by senders."""
    await ctx.outages()
    broker, reading, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    async with ctx.reading(reading, topic) as reader:
        messages = await ctx.send(broker, topic, 10)
        held = await reader.take(5, settle="nothing")
        late = ctx.message(topic, 10)
        async with ctx.harness.alarm():
            sending = _not_taken(ctx, ctx.send_all(broker, [late]))
            await ctx.within(ctx.limits.timeout + ctx.limits.lag, sending, "sending to a full service")
            for received in held:
                await received.delivery.ack()
            await ctx.within(ctx.limits.recovery, reader.take(5), "reading from a full service")
        await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, late), "sending after the alarm")
        await reader.until_fence()
        await receives_again(ctx, reader)
    ctx.ledger.compare(reader.name, [each.message for each in ctx.ledger.sent]).verify()
    ctx.check(messages, "nothing was sent")


async def _not_taken(ctx: Context, sending: asyncio.Future[None] | object) -> None:
    """Check that *sending* fails with an error after which the message may be sent again."""
    try:
        await sending  # type: ignore[misc]
    except (BrokerUnavailable, OutcomeUnknown):
        return
    except Exception as other:
        raise Nonconformance(f"sending to a full service raises {other!r}, as if it were full for ever") from other
    ctx.check(
        holds=False, otherwise="the message was confirmed: the service was not full, or the transport ignored that"
    )
