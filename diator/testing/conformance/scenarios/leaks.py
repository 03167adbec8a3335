"""LEK: leaks. Every scenario is checked for leaks; the scenarios here provoke them."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
import weakref
from itertools import pairwise

from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._leftovers import Open, nothing_is_left
from diator.testing.conformance._scenario import scenario


@scenario("LEK-01", "A closed broker holds no task and no connection")
async def closed_is_gone(ctx: Context) -> None:
    """Catch a task or a socket that lives until the program ends."""
    await ctx.use(await ctx.broker())  # a library may open and keep something on first use
    before = Open.now()
    broker, topic = ctx.harness.transport(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 3)
        await reader.until_fence()
    await broker.aclose()
    ctx.ledger.compare(reader.name, messages).verify()
    await nothing_is_left(ctx, before, "a closed broker")


@scenario("LEK-02", "Failures in the middle of work leave no unretrieved error")
async def nothing_unseen(ctx: Context) -> None:
    """Catch a task whose error nobody retrieves, and a coroutine that nobody awaits."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic, 5)
        await reader.take(2, settle="nothing")
        sends = [asyncio.create_task(ctx.send(broker, topic)) for _ in range(5)]
        await asyncio.sleep(0)
        for send in sends:
            send.cancel()
        await asyncio.gather(*sends, return_exceptions=True)
    await broker.aclose()
    del reader, sends
    gc.collect()
    await asyncio.sleep(0)


@scenario("LEK-03", "Thirty brokers, one after another, leak nothing", timeout=60)
async def again_and_again(ctx: Context) -> None:
    """Catch a small leak in each broker."""
    await ctx.use(await ctx.broker())
    before = Open.now()
    for _ in range(30):
        async with ctx.harness.transport() as broker:
            topic = ctx.topic()
            async with ctx.reading(broker, topic) as reader:
                messages = await ctx.send(broker, topic)
                await reader.take(1)
            ctx.ledger.compare(reader.name, messages).verify()
    await nothing_is_left(ctx, before, "30 closed brokers")


@scenario("LEK-05", "A hundred ended subscriptions leave nothing in their broker", timeout=60)
async def came_and_went(ctx: Context) -> None:
    """Catch a broker that keeps the objects, tasks or connections of subscriptions that have ended."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic):
        pass
    before = Open.now()
    left: list[weakref.ref[object]] = []
    for _ in range(100):
        async with ctx.reading(broker, topic) as reader:
            left.append(weakref.ref(reader.deliveries))
            del reader
    await nothing_is_left(ctx, before, "100 ended subscriptions")
    gc.collect()
    alive = sum(each() is not None for each in left)
    ctx.check(alive < 5, f"the broker still holds {alive} of 100 subscriptions")  # noqa: PLR2004
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("LEK-06", "Memory does not grow with the number of messages", level="S", timeout=60)
async def flat(ctx: Context) -> None:
    """Catch an entry that is kept for each message."""
    broker, topic = await ctx.broker(), ctx.topic()
    ctx.applies(not tracemalloc.is_tracing(), "tracemalloc is in use already")

    async def pass_on() -> int:
        for _ in range(10):
            for number in range(50):
                await broker.send_message(ctx.message(topic, number))
            for _ in range(50):
                await (await anext(reader.deliveries)).ack()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async with ctx.reading(broker, topic) as reader:
        await pass_on()
        tracemalloc.start()
        try:
            sizes = [await pass_on() for _ in range(4)]
            most = tracemalloc.take_snapshot().statistics("lineno")[0].traceback
        finally:
            tracemalloc.stop()
    # A table that grows once, such as that of Python's interned strings, is not kept for each message.
    kept = min(later - earlier for earlier, later in pairwise(sizes)) / 500
    ctx.check(kept < 100, f"{kept:.0f} bytes are kept for each message, most of them of {most}")  # noqa: PLR2004


@scenario("LEK-08", "A settled delivery is freed")
async def settled_is_gone(ctx: Context) -> None:
    """Catch a cache or a traceback that keeps bodies alive."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic, 30)
        for _ in range(30):
            delivery = await anext(reader.deliveries)
            await delivery.ack()
            del delivery
        await asyncio.sleep(ctx.limits.quiet)
        gc.collect()
        left = sum(type(each) is Delivery and each.topic == topic for each in gc.get_objects())
    ctx.check(left < 5, f"of 30 settled deliveries, {left} are still held")  # noqa: PLR2004


@scenario("LEK-09", "An idle consumer reports nothing in flight")
async def books_are_empty(ctx: Context) -> None:
    """Catch deliveries that count as in flight for ever, after success or after failure."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None:
        if event.number % 2:
            raise LookupError("every second one")

    async with ctx.consuming(broker, handle, concurrency=3) as run:
        await ctx.send_all(broker, [run.message(number, key=f"k{number % 3}") for number in range(12)])
        await run.until_handled(12)
        health = run.consumer.health()
        ctx.same(
            (health.in_flight, health.oldest_in_flight, health.gaps),
            (0, 0.0, 0),
            "the deliveries in flight, and the gaps",
        )
        ctx.check(health.since_last_progress < ctx.limits.lag, "the health reports no recent progress")


@scenario("LEK-10", "Deliveries that nobody settled leak nothing after their subscription", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"close"})))  # fmt: skip
async def unsettled_leave_nothing(ctx: Context) -> None:
    """Catch a broker that keeps unsettled deliveries, or renews their leases, after the subscription has ended."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    before = Open.now()
    for _ in range(5):
        async with ctx.reading(broker, topic, group=group) as reader:
            messages = await ctx.send(broker, topic, 0) or [ctx.message(topic)]
            await ctx.send_all(broker, messages)
            await reader.take(1, settle="nothing")
    await broker.aclose()
    await nothing_is_left(ctx, before, "a closed broker")
