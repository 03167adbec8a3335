"""SUB: subscribing."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from time import monotonic

from diator.brokers.base import Delivery, Topic
from diator.brokers.capabilities import Capabilities
from diator.exceptions import BrokerClosed
from diator.testing._suite.checks import cancelled
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._ledger import Received
from diator.testing.conformance._leftovers import Open, nothing_is_left
from diator.testing.conformance._reader import Reader
from diator.testing.conformance._scenario import scenario


@scenario("SUB-01", "A subscription is ready when it is entered, 30 times")
async def ready_on_entry(ctx: Context) -> None:
    """Catch a subscription that is entered before the service knows of it."""
    broker = await ctx.broker()
    for _ in range(30):
        topic = ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            messages = await ctx.send(broker, topic)
            await reader.until_fence()
        ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-03", "A subscription that has ended receives nothing")
async def ended_is_ended(ctx: Context) -> None:
    """Catch a subscription that keeps receiving, and takes the messages of another."""
    broker, topic = await ctx.broker(), ctx.topic()
    group = None if "broadcast" in ctx.capabilities.distribution else ctx.name()
    async with ctx.reading(broker, topic, group=group) as first:
        before = await ctx.send(broker, topic)
        await first.until_fence()
    async with ctx.reading(broker, topic, group=group) as second:
        waiting = asyncio.ensure_future(anext(first.deliveries, None))
        await asyncio.sleep(0)
        messages = await ctx.send(broker, topic)
        await asyncio.wait({waiting}, timeout=ctx.limits.quiet)
        await second.until_fence()
        late = waiting.done() and not waiting.exception() and waiting.result()
        await cancelled(waiting)
    ctx.check(not late, "a subscription received a message after its end")
    ctx.ledger.compare(second.name, [*before, *messages] if group else messages).verify()


@scenario("SUB-04", "Two subscriptions of one broker to one topic do not replace each other")
async def beside_each_other(ctx: Context) -> None:
    """Catch a transport that keeps one subscription for each topic."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as first, ctx.reading(broker, topic) as second:
        messages = await ctx.send(broker, topic, 5)
        await first.until_fence()
        await second.until_fence()
    for reader in (first, second):
        ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-05", "Other subscriptions that come and go do not affect this one")
async def undisturbed(ctx: Context) -> None:
    """Catch a transport that resubscribes on each change, and loses or duplicates messages meanwhile."""
    broker, topic = await ctx.broker(), ctx.topic()

    async def send() -> None:
        for number in range(20):
            async with ctx.reading(broker, topic if number % 2 else ctx.topic()):
                messages.extend(await ctx.send(broker, topic, 3, start=3 * number))

    messages = await ctx.send(broker, ctx.topic(), 0)
    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.same(len(messages), 60, "the number of sent messages")
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-06", "A subscription that is not read does not hold up another")
async def not_held_up(ctx: Context) -> None:
    """Catch one queue or one connection that a slow reader blocks for all."""
    broker, slow, quick = await ctx.broker(), ctx.topic(), ctx.topic()
    async with ctx.reading(broker, slow, prefetch=1), ctx.reading(broker, quick) as reader:
        await ctx.send(broker, slow, 20)
        messages = await ctx.send(broker, quick, 20)
        await ctx.within(3 * ctx.limits.lag, reader.until_fence(), "reading beside a subscription that is not read")
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-07", "A delivery has its topic, body, headers, attempt and outcome")
async def delivery_in_full(ctx: Context) -> None:
    """Catch a delivery without its topic, with a field of another type, or with a wrong first attempt."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        delivery = (await reader.next()).delivery
        ctx.same(delivery.topic, topic, "Delivery.topic")
        ctx.same(type(delivery.topic), Topic, "the type of Delivery.topic")
        ctx.same(delivery.attempt, 1, "Delivery.attempt of the first delivery")
        ctx.same(delivery.outcome, None, "Delivery.outcome before it is settled")
        await delivery.ack()
        ctx.same(delivery.outcome, "ack", "Delivery.outcome after it is settled")


@scenario("SUB-08", "Each of 50 subscriptions of one broker receives its own messages", level="S", timeout=90)
async def many_subscriptions(ctx: Context) -> None:
    """Catch a limit on subscriptions that nobody has declared."""
    broker, topics = await ctx.broker(), [ctx.topic() for _ in range(50)]
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(ctx.reading(broker, topic)) for topic in topics]
        sent = [await ctx.send(broker, topic, 20) for topic in topics]
        await asyncio.gather(*(reader.until_fence() for reader in readers))
    # With so much to do, a busy machine may miss the renewal of a short lease.
    leased = "deadline" in ctx.capabilities.redelivery
    for reader, messages in zip(readers, sent, strict=True):
        ctx.ledger.compare(reader.name, messages).verify(may_duplicate=leased)


@scenario(
    "SUB-10",
    "A consumer cancelled while it joins a group leaves nothing behind, at 21 moments",
    needs=Capabilities(distribution=frozenset({"competing"}), subscription="durable"),
    timeout=60,
)
async def cancelled_joining(ctx: Context) -> None:
    """Catch a consumer that joined while it was cancelled, and keeps its share until its session or lease expires."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()

    async def join() -> None:
        async with ctx.reading(broker, topic, group=group):
            await asyncio.Event().wait()

    async def read_all() -> list[Received]:
        async with ctx.reading(broker, topic, group=group) as reader:
            return await reader.until_fence()

    await read_all()  # the first subscription may have to create the group
    began = monotonic()
    async with ctx.reading(broker, topic, group=group):
        took = monotonic() - began
    # Well before the service takes back what a consumer holds that is left behind, and late for a busy machine.
    soon = max(ctx.limits.lag, (ctx.capabilities.redelivery_bound or 0.0) / 3)
    before = Open.now()
    messages = []
    for number in range(21):
        messages += await ctx.send(broker, topic, 2, start=3 * number)
        joining = ctx.start(join())
        await asyncio.wait({joining}, timeout=took * number / 16)
        await ctx.within(ctx.limits.timeout + ctx.limits.lag, cancelled(joining), "cancelling the subscribe")
        ctx.check(joining.cancelled(), "the cancelled subscribe did not end with the cancellation")
        messages += await ctx.send(broker, topic, start=3 * number + 2)
        received = await ctx.within(soon, read_all(), "reading after a consumer was cancelled")
        ctx.same(len(received), 3, "the number of messages for the only consumer")
    await nothing_is_left(ctx, before, "21 cancelled consumers")
    ctx.ledger.compare(group, messages).verify()


@scenario("SUB-11", "A handler may return a value")
async def return_value(ctx: Context) -> None:
    """Catch a consumer that treats the return value of a handler as an outcome."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> bool:
        return event.number == 1

    async with ctx.consuming(broker, handle) as run:
        await ctx.send_all(broker, [run.message(0), run.message(1)])
        await run.until_handled(2)
        ctx.same(run.outcomes(), ["acked", "acked"], "the outcomes")


@scenario("SUB-12", "One subscription receives several topics and tells them apart")
async def several_topics(ctx: Context) -> None:
    """Catch a transport that subscribes only to the first topic, or labels every delivery with it."""
    broker, topics = await ctx.broker(), [ctx.topic() for _ in range(4)]
    messages = []
    async with ctx.reading(broker, *topics) as reader:
        for topic in topics * 3:
            messages += await ctx.send(broker, topic)
        received = await reader.take(len(messages))
        messages += await ctx.send(broker, topics[0])
        received += await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    for each in received:
        sent_to = each.message and Topic(each.message.message_type, each.message.message_name)
        ctx.same(each.delivery.topic, sent_to, "Delivery.topic, compared with the message")


@scenario("SUB-21", "Several topics share a prefetch of 1", needs=Capabilities(
    settlement="cumulative", backpressure="prefetch"))  # fmt: skip
async def several_topics_one_by_one(ctx: Context) -> None:
    """Catch a count of unsettled deliveries that contains what waits, in a buffer for each topic, to be handed out."""
    broker, topics = await ctx.broker(), [ctx.topic() for _ in range(4)]
    async with ctx.reading(broker, *topics, group=ctx.name(), prefetch=1) as reader:
        messages = [message for number in range(6) for topic in topics for message in await ctx.send(
            broker, topic, start=number)]  # fmt: skip
        held = (await reader.take(1, settle="nothing"))[0]
        await reader.expect_nothing()
        await held.delivery.ack()
        for _ in messages[1:]:
            await ctx.within(ctx.limits.recovery, reader.take(1), "the next delivery with a prefetch of 1")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-22", "`async for` receives the deliveries and ends with the subscription")
async def in_a_loop(ctx: Context) -> None:
    """Catch an iterator that only `anext` can read, and a loop that never ends."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 5)
        async for delivery in reader.deliveries:
            ctx.ledger.received.append(Received.of(delivery, reader.name))
            await delivery.ack()
            if len(ctx.ledger.received) == len(messages):
                break
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()

    async def after_the_end() -> list[Delivery]:
        return [delivery async for delivery in reader.deliveries]

    ctx.same(await ctx.within(ctx.limits.lag, after_the_end(), "`async for` after the end"), [], "the late deliveries")


@scenario("SUB-13", "Cancelling a wait for the next delivery loses nothing")
async def cancelled_wait(ctx: Context) -> None:
    """Catch an iterator that ends with a cancelled wait, or loses a delivery with it."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = await ctx.send(broker, ctx.topic(), 0)
    async with ctx.reading(broker, topic, prefetch=1) as reader:  # so that a lost place in it stops everything
        for number in range(20):
            waiting = asyncio.create_task(reader.next())
            await asyncio.sleep(0)
            sending = asyncio.create_task(ctx.send(broker, topic, start=number))
            for _ in range(number):  # so that the cancellation happens at each step of the delivery
                await asyncio.sleep(0)
            await cancelled(waiting)
            messages += await sending
            received = await reader.next() if waiting.cancelled() else waiting.result()
            await received.delivery.ack()
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-14", "The type of a message is part of its topic")
async def kinds_are_apart(ctx: Context) -> None:
    """Catch a transport that routes by the name alone."""
    broker, topic = await ctx.broker(), ctx.topic()
    other = Topic("ecst_event", topic.message_name)
    async with ctx.reading(broker, topic) as reader, ctx.reading(broker, other) as others:
        messages = await ctx.send(broker, topic, 3)
        states = await ctx.send(broker, other, 3)
        await reader.until_fence()
        await others.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    ctx.ledger.compare(others.name, states).verify()


@scenario("SUB-15", "The iterator keeps waiting while no message arrives")
async def patient(ctx: Context) -> None:
    """Catch an iterator that ends or raises when a read from the service times out."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await reader.expect_nothing()
        await reader.expect_nothing()
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-16", "A closed broker refuses to subscribe")
async def refused_when_closed(ctx: Context) -> None:
    """Catch a subscribe that waits for ever, or that connects a closed broker again."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic):
        pass
    await broker.aclose()
    reading = ctx.reading(broker, topic)
    await ctx.within(
        ctx.limits.lag, ctx.raises(BrokerClosed, reading.__aenter__(), "subscribing when closed"), "refusing"
    )


@scenario("SUB-17", "The end of one subscription does not affect its neighbour")
async def ends_alone(ctx: Context) -> None:
    """Catch a transport that unsubscribes from a topic which another subscription still needs."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as staying:
        async with ctx.reading(broker, topic) as leaving:
            messages = await ctx.send(broker, topic)
            await leaving.until_fence()
        messages += await ctx.send(broker, topic, start=1)
        await staying.until_fence()
    ctx.ledger.compare(staying.name, messages).verify()


@scenario("SUB-18", "An error in a subscription's block is raised unchanged")
async def error_passes(ctx: Context) -> None:
    """Catch a subscription that swallows or replaces the program's error."""
    broker, topic = await ctx.broker(), ctx.topic()
    raised = LookupError("the program's own")

    async def fail() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic)
            await reader.next()
            raise raised

    caught = await ctx.raises(LookupError, fail(), "a subscription's block")
    ctx.check(caught is raised, "the block raises another error than the program did")


@scenario("SUB-19", "A subscription without a group starts with new messages")
async def begins_now(ctx: Context) -> None:
    """Catch a transport that delivers messages which were sent, and read by others, before the subscription."""
    ctx.applies("broadcast" in ctx.capabilities.distribution, "every subscription has a group")
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as before:
        await ctx.send(broker, topic, 5)
        await before.until_fence()
        async with ctx.reading(broker, topic) as reader:
            messages = await ctx.send(broker, topic, 5, start=5)
            await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("SUB-20", "A subscription cancelled while it starts leaves no listener", level="C")
async def cancelled_entry(ctx: Context) -> None:
    """Catch a connection or a task that is forgotten when entering is cancelled."""
    broker, topic = await ctx.broker(), ctx.topic()

    async def subscribe() -> Reader:
        async with ctx.reading(broker, topic) as reader:
            await asyncio.Event().wait()
            return reader

    for steps in range(8):
        entering = asyncio.create_task(subscribe())
        for _ in range(steps):
            await asyncio.sleep(0)
        await ctx.within(ctx.limits.lag, cancelled(entering), "cancelling the subscribe")
        ctx.check(entering.cancelled(), "the cancelled subscribe did not end with the cancellation")
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
