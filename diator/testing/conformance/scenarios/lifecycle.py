"""LIF: beginning and end."""

from __future__ import annotations

import asyncio
from time import monotonic

from diator.brokers.capabilities import Capabilities
from diator.exceptions import BrokerClosed, BrokerError
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._reader import cancelled
from diator.testing.conformance._scenario import scenario

_DURABLE = Capabilities(subscription="durable", settlement="cumulative", redelivery=frozenset({"close"}))


@scenario("LIF-01", "after a broker is closed, a new one works on the same loop")
async def a_new_one_works(ctx: Context) -> None:
    """Catches state that outlives the broker, such as a closed client that is shared."""
    for _ in range(3):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            messages = await ctx.send(broker, topic)
            await reader.until_fence()
        ctx.ledger.compare(reader.name, messages).verify()
        await broker.aclose()
        await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")


@scenario("LIF-02", "closing twice, and by ten tasks at once, is no error")
async def closed_often(ctx: Context) -> None:
    """Catches a close that fails, or hangs, when another is under way."""
    broker = await ctx.broker()
    await ctx.use(broker)
    await asyncio.gather(*(broker.aclose() for _ in range(10)))
    await broker.aclose()
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(ctx.topic())), "sending when closed")


@scenario("LIF-03", "closing what was never used is clean, and final")
async def closed_unused(ctx: Context) -> None:
    """Catches a close that connects, or fails on what was never opened."""
    broker = await ctx.broker()
    await ctx.within(ctx.limits.lag, broker.aclose(), "closing an unused broker")
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(ctx.topic())), "sending when closed")


@scenario("LIF-04", "`async with` closes, and the program's error comes out as it is")
async def closes_on_error(ctx: Context) -> None:
    """Catches a block that swallows or replaces an error, or stays open because of one."""
    raised, opened = LookupError("the program's own"), ctx.harness.transport()

    async def fail() -> None:
        async with opened as broker:
            ctx.check(broker is opened, "`async with` gives another object")
            await ctx.use(broker)
            raise raised

    caught = await ctx.raises(LookupError, fail(), "a broker's block")
    ctx.check(caught is raised, "the error that comes out is another one")
    await ctx.raises(BrokerClosed, opened.send_message(ctx.message(ctx.topic())), "sending after the block")


@scenario("LIF-05", "a consumer that is stopped finishes what it handles, and begins nothing")
async def finishes(ctx: Context) -> None:
    """Catches an end that cuts off work, leaves it unsettled, or takes up more."""
    broker = await ctx.broker()
    begun: list[int] = []
    ended: list[int] = []

    async def handle(event: Happened) -> None:
        begun.append(event.number)
        if len(begun) == 2:  # noqa: PLR2004
            run.consumer.stop()
        await asyncio.sleep(0.05)
        ended.append(event.number)

    async with ctx.consuming(broker, handle, concurrency=2) as run:
        await ctx.send_all(broker, [run.message(number) for number in range(10)])
        await ctx.within(0.05 + ctx.limits.lag, run.until_handled(2), "finishing")
    ctx.same(len(begun), 2, "how many were begun")
    ctx.same(sorted(ended), sorted(begun), "what was ended of what was begun")
    ctx.same(run.outcomes(), ["acked", "acked"], "the outcomes")


@scenario("LIF-06", "work that does not end is cut off after drain_timeout, and not acknowledged")
async def cut_off(ctx: Context) -> None:
    """Catches an end that waits for ever, and one that acknowledges what it cut off."""
    broker = await ctx.broker()
    at_work, cut = asyncio.Event(), asyncio.Event()

    async def handle(event: Happened) -> None:  # noqa: ARG001
        at_work.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.set()
            raise

    async with ctx.consuming(broker, handle, drain_timeout=0.05) as run:
        await ctx.send_all(broker, [run.message()])
        await at_work.wait()
        run.consumer.stop()
        await ctx.within(0.05 + ctx.limits.lag, cut.wait(), "cutting off")
    ctx.same(run.outcomes(), ["unsettled"], "the outcomes")


@scenario("LIF-07", "a close that is cancelled can be finished")
async def cancelled_close(ctx: Context) -> None:
    """Catches a close that, once cancelled, releases nothing, or hangs the next time."""
    for steps in range(4):
        broker, topic = await ctx.broker(), ctx.topic()
        await ctx.use(broker, topic)
        closing = asyncio.create_task(broker.aclose())
        for _ in range(steps):
            await asyncio.sleep(0)
        await cancelled(closing)
        await ctx.within(ctx.limits.lag, broker.aclose(), "closing again")
        await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")


@scenario("LIF-08", "a subscription that waits for a message ends at once")
async def ends_idle(ctx: Context) -> None:
    """Catches a blocking read that nobody wakes."""
    broker, topic = await ctx.broker(), ctx.topic()
    waits = asyncio.Event()

    async def wait() -> None:
        async with ctx.reading(broker, topic) as reader:
            waits.set()
            await reader.next()

    waiting = asyncio.create_task(wait())
    await waits.wait()
    await asyncio.sleep(ctx.limits.quiet)
    await ctx.within(ctx.limits.lag, cancelled(waiting), "ending an idle subscription")
    ctx.check(waiting.cancelled(), "its end is another one than the cancellation")
    await ctx.within(ctx.limits.lag, broker.aclose(), "closing after it")


@scenario("LIF-10", "of sends that a close overtakes, each ends, and what was confirmed is there", needs=_DURABLE)
async def close_amid_sends(ctx: Context) -> None:
    """Catches a close that leaves callers waiting, or confirms what it throws away."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    ctx.applies(ctx.capabilities.multi_process, "what is in the broker is gone with it")
    other = await ctx.broker()
    async with ctx.reading(other, topic, group=group) as reader:
        sends = [asyncio.create_task(ctx.send(broker, topic, start=number)) for number in range(200)]
        await asyncio.sleep(0)
        await broker.aclose()
        _, unended = await asyncio.wait(sends, timeout=2 * ctx.limits.lag)
        ctx.same(len(unended), 0, "how many of 200 sends did not end")
        errors = [error for each in sends if (error := each.exception())]
        strange = [error for error in errors if not isinstance(error, BrokerError)]
        ctx.same(strange, [], "errors that are no verdict")
        await reader.until_fence()
    ctx.ledger.compare(group, [sent.message for sent in ctx.ledger.sent]).verify()


@scenario("LIF-11", "a subscription that ends and begins again goes on, and its sibling never stops", needs=_DURABLE)
async def ends_and_begins(ctx: Context) -> None:
    """Catches a message lost between two members, and a sibling that is stopped along."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = await ctx.send(broker, ctx.topic(), 0)
    async with ctx.reading(broker, topic, group=ctx.name()) as sibling:
        for number in range(5):
            async with ctx.reading(broker, topic, group=group) as reader:
                messages += await ctx.send(broker, topic, 4, start=4 * number)
                await reader.take(3)
                await reader.take(1, settle="nothing")
        async with ctx.reading(broker, topic, group=group) as reader:
            await ctx.until_acknowledged(reader, len(messages))
        await sibling.until_fence()
    ctx.ledger.compare(group, messages).verify()
    ctx.ledger.compare(sibling.name, messages).verify()


@scenario("LIF-12", "what is sent while a subscription ends is left for the next", needs=_DURABLE)
async def sent_while_ending(ctx: Context) -> None:
    """Catches a message that is taken from the service by a reader that gives it to nobody."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(60)]
    async with ctx.reading(broker, topic, group=group) as reader:
        sending = ctx.start(ctx.send_all(broker, messages))
        await reader.take(5)
    await sending
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.until_acknowledged(reader, len(messages))
    ctx.ledger.compare(group, messages).verify()


@scenario("LIF-13", "a handler may send and subscribe with the broker that it is called by")
async def from_within(ctx: Context) -> None:
    """Catches a lock, or a single connection, that a handler waits for while it holds it."""
    broker, elsewhere = await ctx.broker(), ctx.topic()
    done: list[int] = []

    async def handle(event: Happened) -> None:
        if event.number == 0:
            async with ctx.reading(broker, elsewhere) as reader:
                await ctx.send(broker, elsewhere)
                await reader.take(1)
            await ctx.send_all(broker, [run.message(1)])
        done.append(event.number)

    async with ctx.consuming(broker, handle) as run:
        await ctx.send_all(broker, [run.message(0)])
        await run.until_handled(2)
    ctx.same((sorted(done), run.outcomes()), ([0, 1], ["acked", "acked"]), "what was handled")


@scenario("LIF-18", "two brokers in one process are two")
async def share_nothing(ctx: Context) -> None:
    """Catches state that is kept on the class: closing one closes the other."""
    one, two, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    async with ctx.reading(two, topic) as reader:
        await ctx.use(one)
        await one.aclose()
        messages = await ctx.send(two, topic, 3)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("LIF-19", "a subscription ends cleanly after its broker was closed")
async def closed_beneath(ctx: Context) -> None:
    """Catches an end that fails, or waits, because the connection is gone already."""
    broker, topic = await ctx.broker(), ctx.topic()

    async def end() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic, 2)
            await reader.take(1)
            await broker.aclose()

    await ctx.within(3 * ctx.limits.lag, end(), "ending a subscription of a closed broker")


@scenario("LIF-20", "a second stop ends a consumer at once")
async def hurry(ctx: Context) -> None:
    """Catches a consumer that cannot be hurried."""
    broker = await ctx.broker()
    at_work = asyncio.Event()

    async def handle(event: Happened) -> None:  # noqa: ARG001
        at_work.set()
        await asyncio.Event().wait()

    began = monotonic()
    async with ctx.consuming(broker, handle, drain_timeout=60) as run:
        await ctx.send_all(broker, [run.message()])
        await at_work.wait()
        began = monotonic()
    ctx.check(monotonic() - began < ctx.limits.lag, f"it took {monotonic() - began:.2f} s to stop at once")
    ctx.same(run.outcomes(), ["unsettled"], "the outcomes")


@scenario("LIF-21", "a consumer that waits for a message stops at once")
async def stops_idle(ctx: Context) -> None:
    """Catches a consumer that notices its stop with the next message."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None: ...

    async with ctx.consuming(broker, handle) as run:
        await ctx.send_all(broker, [run.message()])
        await run.until_handled(1)
        await asyncio.sleep(ctx.limits.quiet)
        ctx.check(run.consumer.health().receiving, "it says that it does not receive")
        began = monotonic()
        run.consumer.stop()
    ctx.check(monotonic() - began < ctx.limits.lag, f"it took {monotonic() - began:.2f} s to stop")
    ctx.check(not run.consumer.health().receiving, "it says that it still receives")
