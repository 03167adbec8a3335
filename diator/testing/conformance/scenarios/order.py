"""ORD: the order of first deliveries."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_DESTINATION = Capabilities(ordering="destination")
_KEY = Capabilities(ordering="key")


@scenario("ORD-01", "500 messages come in the order in which they were sent", needs=_DESTINATION)
async def in_order(ctx: Context) -> None:
    """Catches a transport that lets messages overtake each other."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = [ctx.message(topic, number) for number in range(500)]
        await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)


@scenario("ORD-02", "each of 16 keys keeps its order", needs=_KEY)
async def in_order_of_keys(ctx: Context) -> None:
    """Catches a transport that orders by something else than the key."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number, key=f"key-{number % 16}") for number in range(320)]
    async with ctx.reading(broker, topic) as reader:
        await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify(in_order=ctx.capabilities.ordering == "destination")
    for key in range(16):
        comparison = ctx.ledger.compare(reader.name, messages[key::16])
        ctx.same(comparison.reordered, [], f"what of key-{key} came out of order")


@scenario("ORD-03", "8 handlers at once: those of one key one after the other, in order", needs=_KEY)
async def lanes(ctx: Context) -> None:
    """Catches a consumer, or a transport below it, that handles a key's messages at the same time."""
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
    ctx.same(overlaps, [], "what was handled while another of its key was")
    ctx.same(
        {lane: numbers == sorted(numbers) for lane, numbers in started.items()}, dict.fromkeys(range(4), True), "order"
    )
    ctx.check(most > 1, "no two keys were ever handled at once, so nothing was proved")


@scenario("ORD-07", "each of three senders keeps its own order", needs=_DESTINATION)
async def senders_keep_theirs(ctx: Context) -> None:
    """Catches a transport that reorders what waits for a connection."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [[ctx.message(topic, 100 * sender + number) for number in range(100)] for sender in range(3)]

    async def send() -> None:
        await asyncio.gather(*(ctx.send_all(broker, own) for own in messages))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, [message for own in messages for message in own]).verify()
    for sender in range(3):
        comparison = ctx.ledger.compare(reader.name, messages[sender])
        ctx.same(comparison.reordered, [], f"what of sender {sender} came out of order")


@scenario("ORD-09", "what one task sends without waiting between comes in order", needs=_DESTINATION)
async def tasks_keep_order(ctx: Context) -> None:
    """Catches batches that are put together in another order than the calls were made in."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(100)]

    async def send() -> None:
        await ctx.send_all(broker, messages[:1])  # the connection is there
        await asyncio.gather(*(ctx.send_all(broker, [message]) for message in messages[1:]))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)


@scenario("ORD-10", "a message that is given back does not disorder the others", needs=Capabilities(
    ordering="key", settlement="cumulative", redelivery=frozenset({"retry"})))  # fmt: skip
async def order_survives_retry(ctx: Context) -> None:
    """Catches a retry that moves more than its own message; and one that is overtaken where it must not be."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number, key="one key") for number in range(40)]
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
        await ctx.send_all(broker, messages)
        settled = 0
        given_back: object = None
        while settled < len(messages):
            received = await reader.next()
            if ctx.capabilities.ordered_retry and given_back is not None:
                ctx.same(received.id, given_back, "what came after a message of its key was given back")
            given_back = None
            if ctx.random.random() < 0.3 and received.delivery.attempt == 1:  # noqa: PLR2004
                await received.delivery.retry()
                given_back = received.id
            else:
                await received.delivery.ack()
                settled += 1
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify(in_order=True)
