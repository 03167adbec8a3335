"""ISO: isolation of topics, subscriptions and brokers."""

from __future__ import annotations

import asyncio

from diator.brokers.base import Topic
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario("ISO-01", "Two topics never mix")
async def two_topics(ctx: Context) -> None:
    """Catch a message that reaches the subscription to another topic."""
    broker, one, two = await ctx.broker(), ctx.topic(), ctx.topic()
    async with ctx.reading(broker, one) as first, ctx.reading(broker, two) as second:
        ones, twos = await ctx.send(broker, one, 10), await ctx.send(broker, two, 10)
        await first.until_fence()
        await second.until_fence()
    ctx.ledger.compare(first.name, ones).verify()
    ctx.ledger.compare(second.name, twos).verify()


@scenario("ISO-02", "Names with a common prefix or a different case are different names")
async def similar_names(ctx: Context) -> None:
    """Catch prefixes, patterns and case folding where an exact name is meant."""
    broker, base = await ctx.broker(), ctx.name("-a")
    names = (base, f"{base}b", base[:-1], base.upper(), f"{base}.", f"{base}:", f"{base}*")
    subscription = ctx.reading(broker, Topic("notification_event", base))
    async with subscription as reader:
        for name in names:
            await ctx.use(broker, Topic("notification_event", name))
        await reader.until_fence()
    ctx.ledger.compare(reader.name, [ctx.ledger.sent[0].message]).verify()


@scenario("ISO-04", "A subscription that fails does not disturb another")
async def fails_alone(ctx: Context) -> None:
    """Catch one task for all subscriptions, which the first error ends."""
    broker, one, two = await ctx.broker(), ctx.topic(), ctx.topic()

    async def fail() -> None:
        async with ctx.reading(broker, one) as reader:
            await reader.take(1)
            raise LookupError("the program's own")

    async with ctx.reading(broker, two) as reader:
        failing = asyncio.create_task(fail())
        messages = await ctx.send(broker, two, 5)
        while not failing.done():
            await ctx.use(broker, one)
            await asyncio.sleep(0.001)
        ended = f"the program raised LookupError inside a subscription, which ended with {failing.exception()!r}"
        ctx.check(isinstance(failing.exception(), LookupError), ended, rule="subscribe: End:")
        messages += await ctx.send(broker, two, 5, start=5)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("ISO-08", "Two consumers of one broker each handle their own events")
async def two_consumers(ctx: Context) -> None:
    """Catch a consumer that takes and dead-letters the messages of another consumer."""
    broker = await ctx.broker()
    handled: dict[str, list[int]] = {"one": [], "two": []}

    async def one(event: Happened) -> None:
        handled["one"].append(event.number)

    async def two(event: Happened) -> None:
        handled["two"].append(event.number)

    async with ctx.consuming(broker, one) as first, ctx.consuming(broker, two) as second:
        for number in range(5):
            await ctx.send_all(broker, [first.message(number), second.message(10 + number)])
        await first.until_handled(5)
        await second.until_handled(5)
    numbers = {name: sorted(each) for name, each in handled.items()}
    ctx.same(numbers, {"one": [0, 1, 2, 3, 4], "two": [10, 11, 12, 13, 14]}, "the handled events")
    ctx.same(first.outcomes() + second.outcomes(), ["acked"] * 10, "the outcomes")


@scenario("ISO-09", "Two brokers on one service share nothing but the messages")
async def two_brokers(ctx: Context) -> None:
    """Catch a broker that closes or confuses another broker's connection."""
    one, two, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    sender = one if ctx.capabilities.multi_process else two
    async with ctx.reading(two, topic) as reader, ctx.reading(one, ctx.topic()):
        messages = await ctx.send(sender, topic, 5)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
