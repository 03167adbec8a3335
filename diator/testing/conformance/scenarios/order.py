"""ORD: the order of first deliveries."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._consuming import FirstWaits, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._recovery import reconnected
from diator.testing.conformance._scenario import scenario

_DESTINATION = Capabilities(ordering="destination")
_KEY = Capabilities(ordering="key")


@scenario("ORD-01", "500 messages arrive in the order in which they were sent", needs=_DESTINATION)
async def in_order(ctx: Context) -> None:
    """Catch a transport that lets messages overtake each other."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = [ctx.message(topic, number) for number in range(500)]
        await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)


@scenario("ORD-02", "The messages of each of 16 keys keep their order", needs=_KEY)
async def in_order_of_keys(ctx: Context) -> None:
    """Catch a transport that orders by something other than the key."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number, key=f"key-{number % 16}") for number in range(320)]
    async with ctx.reading(broker, topic) as reader:
        await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify(in_order=ctx.capabilities.ordering == "destination")
    for key in range(16):
        comparison = ctx.ledger.compare(reader.name, messages[key::16])
        ctx.same(comparison.reordered, [], f"the messages of key-{key} out of order")


@scenario("ORD-03", "With 8 handlers at once, the messages of one key are handled in order, one by one", needs=_KEY)
async def lanes(ctx: Context) -> None:
    """Catch a consumer, or a transport below it, that handles the messages of one key concurrently."""
    broker = await ctx.broker()
    at_work: set[int] = set()
    started: dict[int, list[int]] = defaultdict(list)
    overlaps: list[int] = []
    most = 0

    async def handle(event: Happened) -> None:
        nonlocal most
        lane = event.number % 4
        if lane in at_work:
            overlaps.append(event.number)
        at_work.add(lane)
        most = max(most, len(at_work))
        started[lane].append(event.number)
        await asyncio.sleep(ctx.random.random() / 500)
        at_work.discard(lane)

    async with ctx.consuming(broker, handle, concurrency=8) as run:
        messages = [run.message(number, key=f"lane-{number % 4}") for number in range(120)]
        await ctx.send_all(broker, messages)
        await run.until_handled(120)
    ctx.same(overlaps, [], "the events handled while another event of their key was")
    ctx.same(
        {lane: numbers == sorted(numbers) for lane, numbers in started.items()}, dict.fromkeys(range(4), True), "order"
    )
    ctx.check(most > 1, "no two keys were ever handled at once, so nothing was proved")


@scenario("ORD-07", "The messages of each of three senders keep their order", needs=_DESTINATION)
async def senders_keep_theirs(ctx: Context) -> None:
    """Catch a transport that reorders messages which wait for a connection."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [[ctx.message(topic, 100 * sender + number) for number in range(100)] for sender in range(3)]

    async def send() -> None:
        await asyncio.gather(*(ctx.send_all(broker, own) for own in messages))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, [message for own in messages for message in own]).verify()
    for sender in range(3):
        comparison = ctx.ledger.compare(reader.name, messages[sender])
        ctx.same(comparison.reordered, [], f"the messages of sender {sender} out of order")


@scenario("ORD-09", "Messages that one task sends without waiting arrive in order", needs=_DESTINATION)
async def tasks_keep_order(ctx: Context) -> None:
    """Catch batches that are filled in another order than the calls were made."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(100)]

    async def send() -> None:
        await ctx.send_all(broker, messages[:1])  # opens the connection
        await asyncio.gather(*(ctx.send_all(broker, [message]) for message in messages[1:]))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)


@scenario("ORD-10", "A requeued message does not reorder the others", needs=Capabilities(
    ordering="key", settlement="cumulative", redelivery=frozenset({"retry"})))  # fmt: skip
async def order_survives_retry(ctx: Context) -> None:
    """Catch a retry that moves other messages, and a retry that is overtaken despite `ordered_retry`."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number, key="one key") for number in range(40)]
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
        await ctx.send_all(broker, messages)
        settled = 0
        requeued: object = None
        while settled < len(messages):
            received = await reader.next()
            if ctx.capabilities.ordered_retry and requeued is not None:
                ctx.same(received.id, requeued, "the message delivered after one of its key was requeued")
            requeued = None
            if ctx.random.random() < 0.3 and received.delivery.attempt == 1:  # noqa: PLR2004
                await received.delivery.retry()
                requeued = received.id
            else:
                await received.delivery.ack()
                settled += 1
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)


@scenario("ORD-11", "What waits behind its key when a consumer stops is delivered again, in order", needs=
    Capabilities(ordering="key", settlement="cumulative", redelivery=frozenset({"close"})))  # fmt: skip
async def lanes_return(ctx: Context) -> None:
    """Catch messages that a stopped consumer keeps, or returns in another order."""
    broker, group, at_work = await ctx.broker(), ctx.name(), asyncio.Event()

    async def handle(event: Happened) -> None:
        if event.number % 2 == 0:
            at_work.set()
            await asyncio.Event().wait()

    async with ctx.consuming(broker, handle, group=group, concurrency=4) as run:
        messages = [run.message(number, key="slow" if number % 2 == 0 else f"key-{number}") for number in range(40)]
        await ctx.send_all(broker, messages)
        await at_work.wait()
        await run.until_handled(20)
    async with ctx.reading(broker, run.topic, group=group) as reader:
        again = await ctx.within(ctx.limits.redelivery, reader.take(20), "what waited")
        await reader.until_fence()
    waited = [each.id for each in again if each.id != messages[0].message_id]
    ctx.same(waited, [each.message_id for each in messages[2::2]], "the messages that waited")


@scenario("ORD-12", "What waits behind its key stays in order when the connection is lost, and is handled once",
    needs=Capabilities(ordering="key"), level="F", facilities=["proxy"], timeout=90)  # fmt: skip
async def lanes_survive_resets(ctx: Context) -> None:
    """Catch a consumer that handles what waited, and then its redelivery."""
    proxy = await ctx.proxy()
    broker = await ctx.broker()
    first = FirstWaits()
    async with ctx.consuming(broker, first.handle, concurrency=4) as run:
        messages = [run.message(number, key="slow" if number % 2 == 0 else f"key-{number}") for number in range(80)]
        await ctx.send_all(broker, messages)
        await run.until_handled(40)
        before = proxy.accepted
        proxy.reset()
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        last = run.message(81, key="the last")
        await ctx.send_until_confirmed(broker, last)
        while 81 not in first.handled:  # noqa: PLR2004
            await run.until_handled(len(run.handled) + 1)
        first.gate.set()
        while 78 not in first.handled:  # noqa: PLR2004
            await run.until_handled(len(run.handled) + 1)
    slow = [number for number in first.handled if number % 2 == 0]
    ctx.same([number for number in slow if number], [*range(2, 80, 2)], "the messages that waited")
    ctx.same(slow[0], 0, "the first message of the slow key")
