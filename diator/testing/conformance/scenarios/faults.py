"""What of PUB, LIF and LEK takes a link that can fail."""

from __future__ import annotations

import asyncio

from diator.exceptions import BrokerError, BrokerUnavailable, OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario(
    "PUB-03",
    "with nobody there, sending fails in time, and says that nothing was sent",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def nobody_listens(ctx: Context) -> None:
    """Catches a send that waits for ever, or leaves open whether it may be repeated."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    refused = ctx.raises(BrokerUnavailable, ctx.send(broker, topic), "sending to nobody")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, refused, "failing")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, ctx.message(topic)), "sending again")


@scenario("PUB-04", "cut off before the answer, the outcome is unknown", level="F", facilities=["proxy"], timeout=60)
async def cut_before_the_answer(ctx: Context) -> None:
    """Catches a verdict that nobody can know: neither sent, nor not sent."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker, topic)
    proxy.withhold()
    sending = ctx.start(ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending without an answer"))
    await asyncio.sleep(ctx.limits.quiet)
    ctx.check(not sending.done(), "it was not waiting for its answer")
    proxy.reset()
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, asyncio.wait_for(sending, None), "ending")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, ctx.message(topic)), "sending again")


@scenario("PUB-11", "into a black hole, sending ends in time", level="F", facilities=["proxy"], timeout=60)
async def black_hole(ctx: Context) -> None:
    """Catches a send without a time limit."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker, topic)
    proxy.black_hole()
    lost = ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending into a black hole")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, lost, "ending")


@scenario("LIF-09", "closing does not wait for a service that is gone", level="F", facilities=["proxy"], timeout=60)
async def close_without_service(ctx: Context) -> None:
    """Catches a close, or an end of a subscription, that has to connect first."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()

    async def end() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic)
            await reader.until_fence()
            proxy.refuse()
            proxy.reset()
            await asyncio.sleep(ctx.limits.quiet)
            ctx.same(proxy.connections, 0, "how many connections are left")
        await broker.aclose()

    await ctx.within(ctx.limits.quiet + 3 * ctx.limits.lag, end(), "ending and closing")


@scenario("LIF-17", "subscribing with nobody there fails in time", level="F", facilities=["proxy"], timeout=60)
async def subscribe_to_nobody(ctx: Context) -> None:
    """Catches an entry that waits for ever, or that succeeds without a subscription."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    entering = ctx.raises(BrokerUnavailable, ctx.reading(broker, topic).__aenter__(), "subscribing to nobody")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, entering, "failing")
    await proxy.heal()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("LEK-07", "20 connections that failed leave nothing", level="F", facilities=["proxy"], timeout=120)
async def failed_connects(ctx: Context) -> None:
    """Catches a socket, or a task, for each attempt. What every scenario is checked for is here provoked."""
    proxy = await ctx.proxy()
    proxy.refuse()
    for _ in range(20):
        broker = ctx.harness.transport()
        await ctx.raises(BrokerError, broker.send_message(ctx.message(ctx.topic())), "sending to nobody")
        await broker.aclose()
    await asyncio.sleep(ctx.limits.quiet)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    ctx.check(len(left) < 5, f"tasks are left: {left}")  # noqa: PLR2004
