"""UNR: messages that nobody is there for, and destinations that are not there yet."""

from __future__ import annotations

import asyncio

from diator.brokers.capabilities import Capabilities
from diator.exceptions import MessageUnroutable
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario("UNR-01", "what becomes of a message without a subscription is what was promised")
async def nobody_there(ctx: Context) -> None:
    """Catches a message that is kept where it should be dropped, dropped where it should be kept, or shown twice."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = ctx.message(topic, -1)
    kept = ctx.capabilities.unroutable == "retained"
    if ctx.capabilities.unroutable == "reported":
        error = await ctx.raises(MessageUnroutable, ctx.send_all(broker, [message]), "sending to nobody")
        ctx.same(error.message_id, message.message_id, "the id that the error has")
    else:
        await ctx.send_all(broker, [message])
    group = ctx.name() if "competing" in ctx.capabilities.distribution else None
    async with ctx.reading(broker, topic, group=group) as first:
        messages = await ctx.send(broker, topic, 3)
        await first.until_fence()
    ctx.ledger.compare(first.name, [message, *messages] if kept else messages).verify()


@scenario("UNR-02", "a message that nobody received is reported", needs=Capabilities(unroutable="reported"))
async def reported(ctx: Context) -> None:
    """Catches a confirmation for what was thrown away, and a report that names another message."""
    broker, topic = await ctx.broker(), ctx.topic()
    error = await ctx.raises(MessageUnroutable, ctx.send(broker, topic), "sending to nobody")
    ctx.same(error.message_id, ctx.ledger.sent[-1].message.message_id, "the id that the error has")
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("UNR-03", "sending to a topic that was never used returns, or says that nobody is there")
async def new_destination(ctx: Context) -> None:
    """Catches a send that waits for somebody to create the destination."""
    broker = await ctx.broker()
    for _ in range(5):
        topic = ctx.topic()
        try:
            await ctx.within(3 * ctx.limits.lag, broker.send_message(ctx.message(topic)), "sending to a new topic")
        except MessageUnroutable:
            ctx.same(ctx.capabilities.unroutable, "reported", "what is promised of unroutable messages")


@scenario("UNR-04", "a subscription may come before the first message of its topic")
async def early_subscription(ctx: Context) -> None:
    """Catches a subscription that fails, or stays deaf, because there is nothing to listen to yet."""
    broker, topics = await ctx.broker(), [ctx.topic(), ctx.topic()]
    async with ctx.reading(broker, *topics) as reader:
        await reader.expect_nothing()
        messages = [*await ctx.send(broker, topics[0]), *await ctx.send(broker, topics[1])]
        await reader.take(2)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("UNR-06", "ten subscriptions to a new topic begin at once")
async def at_once(ctx: Context) -> None:
    """Catches a group, queue or topic that two create at once, and one of them fails."""
    broker, topic = await ctx.broker(), ctx.topic()
    group = ctx.name() if "competing" in ctx.capabilities.distribution else None
    entered = 0
    everybody, done = asyncio.Event(), asyncio.Event()

    async def subscribe() -> None:
        nonlocal entered
        async with ctx.reading(broker, topic, group=group):
            entered += 1
            if entered == 10:  # noqa: PLR2004
                everybody.set()
            await done.wait()

    tasks = [ctx.start(subscribe()) for _ in range(10)]
    await asyncio.wait({ctx.start(everybody.wait()), *tasks}, return_when=asyncio.FIRST_COMPLETED)
    failed = [task.exception() for task in tasks if task.done()]
    ctx.same(failed, [], "the errors of those that could not begin")
    done.set()
    await asyncio.gather(*tasks)
