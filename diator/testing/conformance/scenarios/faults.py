"""PUB, LIF and LEK: sending and closing when the connection fails."""

from __future__ import annotations

import asyncio

from diator.exceptions import BrokerError, BrokerUnavailable, OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario(
    "PUB-03",
    "Sending to an unreachable service fails in time and reports that nothing was sent",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def unreachable(ctx: Context) -> None:
    """Catch a send that waits for ever, or an error that leaves open whether to send again."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    refused = ctx.raises(BrokerUnavailable, ctx.send(broker, topic), "sending to an unreachable service")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, refused, "failing")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, ctx.message(topic)), "sending again")


@scenario(
    "PUB-04",
    "A connection that breaks before the confirmation leaves the outcome unknown",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def cut_before_the_confirmation(ctx: Context) -> None:
    """Catch a send error that claims to know whether the message was sent."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker, topic)
    proxy.withhold()
    sending = ctx.start(ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending without a confirmation"))
    await asyncio.sleep(ctx.limits.quiet)
    ctx.check(not sending.done(), "the send did not wait for its confirmation")
    proxy.reset()
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, asyncio.wait_for(sending, None), "ending")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(broker, ctx.message(topic)), "sending again")


@scenario("PUB-11", "Sending into a black hole ends in time", level="F", facilities=["proxy"], timeout=60)
async def black_hole(ctx: Context) -> None:
    """Catch a send without a timeout."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker, topic)
    proxy.black_hole()
    lost = ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending into a black hole")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, lost, "ending")


@scenario("LIF-09", "Closing does not wait for an unreachable service", level="F", facilities=["proxy"], timeout=60)
async def close_without_service(ctx: Context) -> None:
    """Catch a close of a broker or a subscription that has to connect first."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()

    async def end() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic)
            await reader.until_fence()
            proxy.refuse()
            proxy.reset()
            await asyncio.sleep(ctx.limits.quiet)
            ctx.same(proxy.connections, 0, "the number of open connections")
        await broker.aclose()

    await ctx.within(ctx.limits.quiet + 3 * ctx.limits.lag, end(), "ending and closing")


@scenario("LIF-17", "Subscribing to an unreachable service fails in time", level="F", facilities=["proxy"], timeout=60)
async def subscribe_unreachable(ctx: Context) -> None:
    """Catch a subscribe that waits for ever, or that succeeds without a subscription."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    entering = ctx.raises(
        BrokerUnavailable, ctx.reading(broker, topic).__aenter__(), "subscribing to an unreachable service"
    )
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, entering, "failing")
    await proxy.heal()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("LEK-07", "Twenty failed connections leak nothing", level="F", facilities=["proxy"], timeout=120)
async def failed_connects(ctx: Context) -> None:
    """Catch a socket or a task that is left over from each failed attempt to connect."""
    proxy = await ctx.proxy()
    proxy.refuse()
    for _ in range(20):
        broker = ctx.harness.transport()
        await ctx.raises(
            BrokerError, broker.send_message(ctx.message(ctx.topic())), "sending to an unreachable service"
        )
        await broker.aclose()
    await asyncio.sleep(ctx.limits.quiet)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    ctx.check(len(left) < 5, f"tasks are left: {left}")  # noqa: PLR2004
