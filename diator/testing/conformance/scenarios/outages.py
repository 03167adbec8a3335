"""FLT: the service fails: it is restarted, killed, frozen, full, or an operator does something to it."""

from __future__ import annotations

import asyncio

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import BrokerUnavailable, OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._ledger import Nonconformance
from diator.testing.conformance._recovery import receives_again, reconnected, service_is_down, survives_faults
from diator.testing.conformance._scenario import scenario

_GROUPS = Capabilities(distribution=frozenset({"competing"}), subscription="durable", settlement="cumulative")


@scenario("FLT-05", "restarts under load are borne", level="F", facilities=["outages"], timeout=180)
async def restarts(ctx: Context) -> None:
    """Catches a subscription, or a sender, that does not find back to a service that was updated."""
    service = await ctx.outages()

    async def restart() -> None:
        await service.stop()
        await service_is_down(ctx)
        await service.start()

    reader = await survives_faults(ctx, restart, survives=ctx.capabilities.durability != "none")
    _demand_gap(ctx, reader.gaps)


@scenario("FLT-06", "the death of the service under load is borne", level="F", facilities=["outages"], timeout=180)
async def killed(ctx: Context) -> None:
    """Catches what takes a goodbye of the service to be noticed."""
    service = await ctx.outages()

    async def kill() -> None:
        await service.kill()
        await service_is_down(ctx)
        await service.start()

    reader = await survives_faults(ctx, kill, survives=ctx.capabilities.durability == "crash")
    _demand_gap(ctx, reader.gaps)


def _demand_gap(ctx: Context, gaps: object) -> None:
    if ctx.capabilities.guarantee == "at_most_once":
        ctx.check(gaps, "the service was away, and the subscription was not told that it may have missed messages")


@scenario(
    "FLT-09", "who is disconnected by an operator comes back", level="F", facilities=["operator", "proxy"], timeout=60
)
async def disconnected(ctx: Context) -> None:
    """Catches a client that takes an orderly end of its connection for the end of its work."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        for _ in range(3):
            before = proxy.accepted
            await ctx.harness.disconnect(broker)
            await reconnected(ctx, proxy, before, ctx.limits.max_delay + ctx.limits.recovery)
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)


@scenario(
    "FLT-10",
    "a group that is deleted while it is read is there again",
    level="F",
    needs=_GROUPS,
    facilities=["topology"],
    timeout=90,
)
async def group_deleted(ctx: Context) -> None:
    """Catches a subscription that goes on waiting for what cannot come any more."""
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
    "a topic that is deleted while it is read is there again",
    level="F",
    needs=_GROUPS,
    facilities=["topology"],
    timeout=120,
)
async def topic_deleted(ctx: Context) -> None:
    """Catches a subscription that ends in silence, and a sender that never finds its topic again."""
    broker, topic, group, idle = await ctx.broker(), ctx.topic(), ctx.name("-read"), ctx.name("-idle")
    waiting = await _leave_waiting(ctx, topic, idle)
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        await ctx.harness.delete(broker, topic, None)
        await receives_again(ctx, reader)
    await _was_deleted(ctx, topic, idle, waiting)


async def _leave_waiting(ctx: Context, topic: Topic, group: str) -> list[Message]:
    """Have *group* read two of five messages, and leave."""
    broker = await ctx.broker()
    async with ctx.reading(broker, topic, group=group, prefetch=2) as reader:
        messages = await ctx.send(broker, topic, 5)
        await reader.take(2)
    return messages[2:]


async def _was_deleted(ctx: Context, topic: Topic, group: str, waiting: list[Message]) -> None:
    """Have the proof of it: what waited for *group* is lost, or what it had read is there again."""
    broker = await ctx.broker()
    before = {each.id for each in ctx.ledger.received if each.subscription == group}
    async with ctx.reading(broker, topic, group=group) as reader:
        came = {each.id for each in await reader.until_fence()}
    undisturbed = {each.message_id for each in waiting} <= came and not came & before
    ctx.check(not undisturbed, "what waited is still there and nothing came again: nothing was deleted, nor proved")


@scenario("FLT-14", "a service that freezes and goes on is borne", level="F", facilities=["outages"], timeout=180)
async def frozen(ctx: Context) -> None:
    """Catches what takes a broken connection to be noticed."""
    service = await ctx.outages()

    async def freeze() -> None:
        await service.pause()
        await service_is_down(ctx)
        await asyncio.sleep(ctx.limits.liveness / 2)
        await service.resume()

    await survives_faults(ctx, freeze, count=60)


@scenario(
    "FLT-18",
    "a service that is full says so to senders, and goes on serving readers",
    level="F",
    facilities=["outages", "alarm"],
    timeout=120,
)
async def full(ctx: Context) -> None:
    """Catches a message that is confirmed and was not taken, a refusal for good, and readers who wait for senders."""
    await ctx.outages()
    broker, reading, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    async with ctx.reading(reading, topic) as reader:
        messages = await ctx.send(broker, topic, 10)
        held = await reader.take(5, settle="nothing")
        late = ctx.message(topic, 10)
        async with ctx.harness.alarm():
            sending = _not_taken(ctx, ctx.send_all(broker, [late]))
            await ctx.within(ctx.limits.timeout + ctx.limits.lag, sending, "sending to a service that is full")
            for received in held:
                await received.delivery.ack()
            await ctx.within(ctx.limits.recovery, reader.take(5), "reading from a service that is full")
        await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, late), "sending after the alarm")
        await reader.until_fence()
        await receives_again(ctx, reader)
    ctx.ledger.compare(reader.name, [each.message for each in ctx.ledger.sent]).verify()
    ctx.check(messages, "nothing was sent")


async def _not_taken(ctx: Context, sending: asyncio.Future[None] | object) -> None:
    """Have a verdict that allows a repeat: the service will have room again."""
    try:
        await sending  # type: ignore[misc]
    except (BrokerUnavailable, OutcomeUnknown):
        return
    except Exception as other:
        raise Nonconformance(f"a full service makes sending raise {other!r}: as if it were full for ever") from other
    ctx.check(holds=False, otherwise="the message was confirmed, so the alarm was none, or was not respected")
