"""LIF: starting, stopping and closing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic

from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.exceptions import BrokerClosed, BrokerError, DiatorError
from diator.testing._suite.checks import cancelled
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_DURABLE = Capabilities(subscription="durable", settlement="cumulative", redelivery=frozenset({"close"}))


@scenario("LIF-01", "After a broker is closed, a new broker works on the same event loop")
async def a_new_one_works(ctx: Context) -> None:
    """Catch state that outlives the broker, such as a shared client that is closed."""
    for _ in range(3):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            messages = await ctx.send(broker, topic)
            await reader.until_fence()
        ctx.ledger.compare(reader.name, messages).verify()
        await broker.aclose()
        await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")


@scenario("LIF-02", "Closing a broker twice, and by ten tasks at once, raises no error")
async def closed_often(ctx: Context) -> None:
    """Catch a close that fails or hangs while another close is in progress."""
    broker = await ctx.broker()
    await ctx.use(broker)
    await asyncio.gather(*(broker.aclose() for _ in range(10)))
    await broker.aclose()
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(ctx.topic())), "sending when closed")


@scenario("LIF-03", "Closing an unused broker succeeds and is final")
async def closed_unused(ctx: Context) -> None:
    """Catch a close that connects first, or fails on a connection that was never opened."""
    broker = await ctx.broker()
    await ctx.within(ctx.limits.lag, broker.aclose(), "closing an unused broker")
    await ctx.raises(BrokerClosed, broker.send_message(ctx.message(ctx.topic())), "sending when closed")


@scenario("LIF-04", "`async with` closes the broker and raises the program's error unchanged")
async def closes_on_error(ctx: Context) -> None:
    """Catch a block that swallows or replaces an error, and a broker that stays open because of one."""
    raised, opened = LookupError("the program's own"), ctx.harness.transport()

    async def fail() -> None:
        async with opened as broker:
            ctx.check(broker is opened, "`async with` returns another object")
            await ctx.use(broker)
            raise raised

    caught = await ctx.raises(LookupError, fail(), "a broker's block")
    ctx.check(caught is raised, "the block raises another error than the program did")
    await ctx.raises(BrokerClosed, opened.send_message(ctx.message(ctx.topic())), "sending after the block")


@scenario("LIF-05", "A stopped consumer finishes its running handlers and starts no others")
async def finishes(ctx: Context) -> None:
    """Catch a shutdown that cancels handlers, leaves messages unsettled, or starts more handlers."""
    broker = await ctx.broker()
    started: list[int] = []
    finished: list[int] = []

    async def handle(event: Happened) -> None:
        started.append(event.number)
        if len(started) == 2:  # noqa: PLR2004
            run.consumer.stop()
        await asyncio.sleep(0.05)
        finished.append(event.number)

    async with ctx.consuming(broker, handle, concurrency=2) as run:
        await ctx.send_all(broker, [run.message(number) for number in range(10)])
        await ctx.within(0.05 + ctx.limits.lag, run.until_handled(2), "finishing")
    ctx.same(len(started), 2, "the number of started handlers")
    ctx.same(sorted(finished), sorted(started), "the finished handlers, compared with the started ones")
    ctx.same(run.outcomes(), ["acked", "acked"], "the outcomes")


@scenario("LIF-06", "A handler that exceeds drain_timeout is cancelled and not acknowledged")
async def exceeds_drain_timeout(ctx: Context) -> None:
    """Catch a shutdown that waits for ever, and a shutdown that acknowledges cancelled work."""
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
        await ctx.within(0.05 + ctx.limits.lag, cut.wait(), "cancelling the handler")
    ctx.same(run.outcomes(), ["unsettled"], "the outcomes")


@scenario("LIF-07", "A close that was cancelled can be completed")
async def cancelled_close(ctx: Context) -> None:
    """Catch a close that, once cancelled, releases nothing or hangs the next time."""
    for steps in range(4):
        broker, topic = await ctx.broker(), ctx.topic()
        await ctx.use(broker, topic)
        closing = asyncio.create_task(broker.aclose())
        for _ in range(steps):
            await asyncio.sleep(0)
        await cancelled(closing)
        await ctx.within(ctx.limits.lag, broker.aclose(), "the second close")
        await ctx.raises(BrokerClosed, broker.send_message(ctx.message(topic)), "sending when closed")


@scenario("LIF-08", "A subscription that waits for a message ends at once")
async def ends_idle(ctx: Context) -> None:
    """Catch a blocking read that nothing wakes."""
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
    ctx.check(waiting.cancelled(), "the subscription did not end with the cancellation")
    await ctx.within(ctx.limits.lag, broker.aclose(), "closing the broker")


@scenario("LIF-10", "Every send that a close overtakes ends, and confirmed messages arrive", needs=_DURABLE)
async def close_amid_sends(ctx: Context) -> None:
    """Catch a close that leaves callers waiting, or confirms messages that it drops."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    ctx.applies(ctx.capabilities.multi_process, "the messages end with the broker")
    other = await ctx.broker()
    async with ctx.reading(other, topic, group=group) as reader:
        sends = [asyncio.create_task(ctx.send(broker, topic, start=number)) for number in range(200)]
        await asyncio.sleep(0)
        await broker.aclose()
        _, unended = await asyncio.wait(sends, timeout=2 * ctx.limits.lag)
        ctx.same(len(unended), 0, "the number of sends, of 200, that did not end")
        errors = [error for each in sends if (error := each.exception())]
        strange = [error for error in errors if not isinstance(error, BrokerError)]
        ctx.same(strange, [], "the errors that are not broker errors")
        await reader.until_fence()
    ctx.ledger.compare(group, [sent.message for sent in ctx.ledger.sent]).verify()


@scenario("LIF-11", "A restarted subscription continues, and its sibling is not interrupted", needs=_DURABLE)
async def ends_and_begins(ctx: Context) -> None:
    """Catch a message that is lost between two subscriptions, and a sibling that stops with the first."""
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


@scenario("LIF-12", "Messages sent while a subscription ends are delivered to the next one", needs=_DURABLE)
async def sent_while_ending(ctx: Context) -> None:
    """Catch a message that a reader takes from the service and delivers to nobody."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(60)]
    async with ctx.reading(broker, topic, group=group) as reader:
        sending = ctx.start(ctx.send_all(broker, messages))
        await reader.take(5)
    await sending
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.until_acknowledged(reader, len(messages))
    ctx.ledger.compare(group, messages).verify()


@scenario("LIF-13", "A handler may send and subscribe through the broker that called it")
async def from_within(ctx: Context) -> None:
    """Catch a lock or a single connection that a handler holds while it waits for it."""
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
    ctx.same((sorted(done), run.outcomes()), ([0, 1], ["acked", "acked"]), "the handled events and their outcomes")


@scenario("LIF-18", "Two brokers in one process are independent")
async def share_nothing(ctx: Context) -> None:
    """Catch state on the class: closing one broker closes the other."""
    one, two, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    async with ctx.reading(two, topic) as reader:
        await ctx.use(one)
        await one.aclose()
        messages = await ctx.send(two, topic, 3)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("LIF-19", "A subscription ends cleanly after its broker was closed")
async def closed_before_its_subscription(ctx: Context) -> None:
    """Catch an end that fails or waits because the connection is closed already."""
    broker, topic = await ctx.broker(), ctx.topic()

    async def end() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic, 2)
            await reader.take(1)
            await broker.aclose()

    await ctx.within(3 * ctx.limits.lag, end(), "ending a subscription of a closed broker")


@scenario("LIF-22", "The iterator ends with its subscription, for whoever waits and for whoever asks later")
async def iterator_ends(ctx: Context) -> None:
    """Catch a task that waits for ever for a delivery of a subscription that has ended, with a group or without one."""
    broker = await ctx.broker()
    for group in _with_and_without(ctx):
        topic = ctx.topic()
        async with ctx.reading(broker, topic, group=group) as reader:
            waiting = ctx.start(_outcome(reader.deliveries))
            await asyncio.sleep(ctx.limits.quiet)
            ctx.check(not waiting.done(), "the iterator ended before its subscription")
        await ctx.use(broker, topic)  # a message that waits for the next consumer of the group
        late = _outcome(reader.deliveries)
        for each, who in ((waiting, "that waited"), (ctx.start(late), "that asked later")):
            await asyncio.wait({each}, timeout=ctx.limits.lag)
            ctx.check(each.done(), f"the iterator of the group {group} did not end for a task {who}")
            ctx.same(each.result(), "StopAsyncIteration", f"the end of the iterator for a task {who}")


@scenario("LIF-23", "Whoever waits for a delivery while the broker is closed gets BrokerClosed")
async def closed_while_waiting(ctx: Context) -> None:
    """Catch a reader that waits for ever on a closed broker, or that takes the close for the end of the messages."""
    for group in _with_and_without(ctx):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic, group=group) as reader:
            waiting = ctx.start(_outcome(reader.deliveries))
            await asyncio.sleep(ctx.limits.quiet)
            await broker.aclose()
            for each, who in ((waiting, "that waited"), (ctx.start(_outcome(reader.deliveries)), "that asked later")):
                await asyncio.wait({each}, timeout=ctx.limits.lag)
                ctx.check(each.done(), f"the close of the broker did not end the wait of a task {who}")
                ctx.same(each.result(), "BrokerClosed", f"what a task {who} for a delivery got")


def _with_and_without(ctx: Context) -> list[str | None]:
    """Return a group and None, as far as the transport has groups and subscriptions without one."""
    groups = {"broadcast": None, "competing": ctx.name()}
    return [groups[each] for each in sorted(ctx.capabilities.distribution)]


async def _outcome(deliveries: AsyncIterator[Delivery]) -> str:
    """Return the name of the error that the next wait raises. A task could not keep a `StopAsyncIteration`."""
    try:
        return repr(await anext(deliveries))
    except (StopAsyncIteration, DiatorError) as error:
        return type(error).__name__


@scenario("LIF-20", "A second stop ends a consumer at once")
async def stopped_twice(ctx: Context) -> None:
    """Catch a consumer whose shutdown cannot be cut short."""
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


@scenario("LIF-21", "A consumer that waits for a message stops at once")
async def stops_idle(ctx: Context) -> None:
    """Catch a consumer that notices its stop only with the next message."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None: ...

    async with ctx.consuming(broker, handle) as run:
        await ctx.send_all(broker, [run.message()])
        await run.until_handled(1)
        await asyncio.sleep(ctx.limits.quiet)
        silent = "the health reports that the consumer does not receive"
        ctx.check(run.consumer.health().receiving, silent, rule="Health: receiving:")
        began = monotonic()
        run.consumer.stop()
    ctx.check(monotonic() - began < ctx.limits.lag, f"it took {monotonic() - began:.2f} s to stop")
    still = "the health reports that the consumer still receives"
    ctx.check(not run.consumer.health().receiving, still, rule="Health: receiving:")
