"""UNR: unroutable messages and new destinations."""

from __future__ import annotations

import asyncio

from diator.brokers.capabilities import Capabilities
from diator.exceptions import MessageUnroutable
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario("UNR-01", "A message without a subscription is kept, dropped or reported, as promised")
async def nobody_there(ctx: Context) -> None:
    """Catch a message that is kept instead of dropped, dropped instead of kept, or delivered twice."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = ctx.message(topic, -1)
    kept = ctx.capabilities.unroutable == "retained"
    if ctx.capabilities.unroutable == "reported":
        error = await ctx.raises(MessageUnroutable, ctx.send_all(broker, [message]), "sending without a subscription")
        ctx.same(error.message_id, message.message_id, "the message_id of the error")
    else:
        await ctx.send_all(broker, [message])
    group = ctx.name() if "competing" in ctx.capabilities.distribution else None
    async with ctx.reading(broker, topic, group=group) as first:
        messages = await ctx.send(broker, topic, 3)
        await first.until_fence()
    ctx.ledger.compare(first.name, [message, *messages] if kept else messages).verify()


@scenario("UNR-02", "A message that nobody receives is reported", needs=Capabilities(unroutable="reported"))
async def reported(ctx: Context) -> None:
    """Catch a confirmation of a message that was dropped, and an error that names another message."""
    broker, topic = await ctx.broker(), ctx.topic()
    error = await ctx.raises(MessageUnroutable, ctx.send(broker, topic), "sending without a subscription")
    ctx.same(error.message_id, ctx.ledger.sent[-1].message.message_id, "the message_id of the error")
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("UNR-03", "Sending to a new topic returns, or raises MessageUnroutable")
async def new_destination(ctx: Context) -> None:
    """Catch a send that waits until somebody creates the destination."""
    broker = await ctx.broker()
    for _ in range(5):
        topic = ctx.topic()
        try:
            await ctx.within(3 * ctx.limits.lag, broker.send_message(ctx.message(topic)), "sending to a new topic")
        except MessageUnroutable:
            ctx.same(ctx.capabilities.unroutable, "reported", "the capability unroutable")


@scenario("UNR-04", "A subscription may start before the first message of its topic")
async def early_subscription(ctx: Context) -> None:
    """Catch a subscription that fails, or receives nothing, because its topic does not exist yet."""
    broker, topics = await ctx.broker(), [ctx.topic(), ctx.topic()]
    async with ctx.reading(broker, *topics) as reader:
        await reader.expect_nothing()
        messages = [*await ctx.send(broker, topics[0]), *await ctx.send(broker, topics[1])]
        await reader.take(2)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("UNR-06", "Ten subscriptions to a new topic can start at once")
async def at_once(ctx: Context) -> None:
    """Catch a group, queue or topic that two subscriptions create at once, and one of them fails."""
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
    ctx.same(failed, [], "the errors of the subscriptions that failed")
    done.set()
    await asyncio.gather(*tasks)
