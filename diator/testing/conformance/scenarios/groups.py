"""GRP: broadcast and consumer groups."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._context import Context
from diator.testing.conformance._ledger import Received
from diator.testing.conformance._refusals import verify_refusal
from diator.testing.conformance._scenario import scenario

_BROADCAST = Capabilities(distribution=frozenset({"broadcast"}))
_COMPETING = Capabilities(distribution=frozenset({"competing"}), settlement="cumulative")
_BOTH = Capabilities(distribution=frozenset({"broadcast", "competing"}), settlement="cumulative")
_DURABLE = Capabilities(distribution=frozenset({"competing"}), subscription="durable", settlement="cumulative")


@scenario("GRP-01", "Three subscriptions without a group each receive every message once", needs=_BROADCAST)
async def broadcast(ctx: Context) -> None:
    """Catch subscriptions that share messages which each should receive."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(100)]
    async with (
        ctx.reading(broker, topic) as one,
        ctx.reading(broker, topic) as two,
        ctx.reading(broker, topic) as three,
    ):
        await ctx.share(one, two, three, sending=ctx.send_all(broker, messages))
    for reader in (one, two, three):
        ctx.ledger.compare(reader.name, messages).verify()


@scenario("GRP-02", "Three consumers of a group receive each message once between them", needs=_COMPETING)
async def competing(ctx: Context) -> None:
    """Catch a group whose consumers each receive every message, or that loses messages."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(150)]
    async with (
        ctx.reading(broker, topic, group=group) as one,
        ctx.reading(broker, topic, group=group) as two,
        ctx.reading(broker, topic, group=group) as three,
    ):
        await ctx.share(one, two, three, sending=ctx.send_all(broker, messages))
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-03", "Two groups of two consumers each receive every message once", needs=_COMPETING)
async def two_groups(ctx: Context) -> None:
    """Catch groups that take messages from each other."""
    broker, topic, groups = await ctx.broker(), ctx.topic(), [ctx.name(), ctx.name()]
    messages = [ctx.message(topic, number) for number in range(100)]
    async with (
        ctx.reading(broker, topic, group=groups[0]) as a,
        ctx.reading(broker, topic, group=groups[0]) as b,
        ctx.reading(broker, topic, group=groups[1]) as c,
        ctx.reading(broker, topic, group=groups[1]) as d,
    ):
        await ctx.share(a, b, c, d, sending=ctx.send_all(broker, messages))
    for group in groups:
        ctx.ledger.compare(group, messages).verify()


@scenario("GRP-04", "With slow handlers and a prefetch of 1, every consumer of a group works", needs=_COMPETING)
async def nobody_starves(ctx: Context) -> None:
    """Catch a consumer that never receives anything."""
    ctx.applies(ctx.capabilities.backpressure != "none", "the transport has no backpressure")
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(60)]

    async def work(_: Received) -> None:
        await asyncio.sleep(0.005)

    async with (
        ctx.reading(broker, topic, group=group, prefetch=1) as one,
        ctx.reading(broker, topic, group=group, prefetch=1) as two,
        ctx.reading(broker, topic, group=group, prefetch=1) as three,
    ):
        taken = await ctx.share(one, two, three, sending=ctx.send_all(broker, messages), work=work)
    ctx.check(all(taken.values()), f"the consumers received {[len(own) for own in taken.values()]} messages")
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-05", "A consumer that joins a group under load disturbs nothing", needs=_COMPETING)
async def joins(ctx: Context) -> None:
    """Catch messages that are lost while a group rebalances."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(120)]
    halfway = asyncio.Event()

    async def send() -> None:
        await ctx.send_all(broker, messages[:60])
        halfway.set()
        await ctx.send_all(broker, messages[60:])

    async with ctx.reading(broker, topic, group=group) as one:
        sending = ctx.start(send())
        await one.take(10)
        await halfway.wait()
        async with ctx.reading(broker, topic, group=group) as two:
            await ctx.share(one, two, sending=asyncio.wait_for(sending, None))
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-06", "A consumer that leaves a group causes no loss and no duplicates", needs=_COMPETING)
async def leaves(ctx: Context) -> None:
    """Catch a close that drops undelivered messages, or that requeues acknowledged ones."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as staying:
        async with ctx.reading(broker, topic, group=group, prefetch=5) as leaving:
            messages = await ctx.send(broker, topic, 60)
            await leaving.take(5)
        messages += await ctx.send(broker, topic, 20, start=60)
        bound = 5 * ctx.limits.lag + ctx.limits.redelivery
        await ctx.within(
            bound, ctx.until_acknowledged(staying, len(messages)), "finishing the messages of the consumer that left"
        )
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "GRP-07",
    "A consumer that crashes does not stop the rest of its group",
    level="F",
    needs=_COMPETING,
    facilities=["crash"],
    timeout=60,
)
async def crashes(ctx: Context) -> None:
    """Catch a group that waits for a dead consumer."""
    ctx.applies(ctx.capabilities.multi_process, "the service ends with the process")
    broker, dying, topic, group = await ctx.broker(), await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(dying, topic, group=group, prefetch=5) as reader:
        messages = await ctx.send(broker, topic, 20)
        held = await reader.take(5, settle="nothing")
        async with ctx.reading(broker, topic, group=group) as staying:
            await ctx.harness.crash(dying)
            messages += await ctx.send(broker, topic, 20, start=20)
            bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery
            await ctx.within(bound, ctx.until_acknowledged(staying, len(messages)), "redelivery after a crash")
    for received in held:
        received.abandoned = True
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-08", "A group without consumers collects messages for the next consumer", needs=_DURABLE)
async def collects(ctx: Context) -> None:
    """Catch a group that is deleted when its last consumer leaves."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 5)
        await reader.until_fence()
    messages += await ctx.send(broker, topic, 30, start=5)
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-09", "Groups with similar names are separate", needs=_COMPETING)
async def names_of_groups(ctx: Context) -> None:
    """Catch names that are shortened, split, case-folded or joined with the name of the topic."""
    broker, topic, base = await ctx.broker(), ctx.topic(), ctx.name()
    names = [base + tail for tail in ("", "a", "A", "ab", ".a", "a.b", "_a", "-a", " a", "/a", ":a", "ä", "*")]
    messages = [ctx.message(topic, number) for number in range(5)]
    for name in names:
        async with ctx.reading(broker, topic, group=name):
            pass
    ctx.applies(ctx.capabilities.subscription == "durable", "a group exists only while it has consumers")
    await ctx.send_all(broker, messages)
    for name in names:
        async with ctx.reading(broker, topic, group=name) as reader:
            await ctx.within(2 * ctx.limits.lag, reader.take(5), f"reading in the group {name!r}")
        ctx.ledger.compare(name, messages).verify()


@scenario("GRP-10", "Idle consumers take over when another consumer leaves", needs=_COMPETING)
async def idle_consumers(ctx: Context) -> None:
    """Catch an idle consumer that never receives anything again."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with AsyncExitStack() as first:
        leaving = await first.enter_async_context(ctx.reading(broker, topic, group=group))
        one = await ctx.enter(ctx.reading(broker, topic, group=group))
        two = await ctx.enter(ctx.reading(broker, topic, group=group))
        messages = [ctx.message(topic, number) for number in range(9)]
        await ctx.share(leaving, one, two, sending=ctx.send_all(broker, messages))
        await first.aclose()
        more = [ctx.message(topic, number) for number in range(9, 18)]
        await ctx.share(one, two, sending=ctx.send_all(broker, more))
    ctx.ledger.compare(group, [*messages, *more]).verify()


@scenario("GRP-11", "A subscription that is not read does not delay the others", needs=_BROADCAST)
async def not_delayed(ctx: Context) -> None:
    """Catch a broadcast that waits for its slowest subscription."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(100)]
    async with ctx.reading(broker, topic, prefetch=1), ctx.reading(broker, topic) as reader:
        reading = reader.during(ctx.send_all(broker, messages))
        await ctx.within(5 * ctx.limits.lag, reading, "reading beside a subscription that is not read")
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("GRP-14", "A distribution that is not promised is refused when subscribing")
async def refused(ctx: Context) -> None:
    """Catch a group that is accepted and silently receives everything, or nothing."""
    absent = _BOTH.distribution - ctx.capabilities.distribution
    if not absent:  # both are promised: they must not be mixed up
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as alone, ctx.reading(broker, topic, group=ctx.name()) as grouped:
            messages = await ctx.send(broker, topic, 3)
            await alone.until_fence()
            await ctx.share(grouped, sending=asyncio.sleep(0))
        ctx.ledger.compare(alone.name, messages).verify()
        received = {each.id for each in ctx.ledger.received if each.subscription == grouped.name}
        ctx.check(
            received >= {message.message_id for message in messages},
            "a group missed a message that another subscription received",
        )
    else:
        await verify_refusal(ctx, Capabilities(distribution=absent))


@scenario("GRP-15", "Consumers of one group that use several brokers share the messages", needs=Capabilities(
    distribution=frozenset({"competing"}), settlement="cumulative", multi_process=True))  # fmt: skip
async def across_brokers(ctx: Context) -> None:
    """Catch a group that is limited to one broker object."""
    brokers = [await ctx.broker(), await ctx.broker()]
    topic, group = ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number) for number in range(60)]
    async with (
        ctx.reading(brokers[0], topic, group=group) as one,
        ctx.reading(brokers[1], topic, group=group) as two,
    ):
        await ctx.share(one, two, sending=ctx.send_all(brokers[0], messages))
    ctx.ledger.compare(group, messages).verify()


@scenario("GRP-19", "A busy consumer leaves most of what waits to the others of its group", needs=Capabilities(
    distribution=frozenset({"competing"}), subscription="durable", settlement="individual",
    backpressure="prefetch"), timeout=60)  # fmt: skip
async def takes_no_backlog(ctx: Context) -> None:
    """Catch a consumer that takes everything that waits for its group when it joins, whatever its prefetch."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group):
        pass  # from now on the group collects messages
    await ctx.send(broker, topic, 500)
    async with ctx.reading(broker, topic, group=group, prefetch=1) as busy:
        await busy.take(1, settle="nothing")
        async with ctx.reading(broker, topic, group=group, prefetch=1) as free:
            await ctx.within(20 * ctx.limits.scale, free.take(250), "what a busy consumer has to leave")


@scenario("GRP-18", "A group with an empty name is a group", needs=_DURABLE)
async def empty_name(ctx: Context) -> None:
    """Catch a check for the presence of a group that takes an empty name for none."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=""):
        pass
    messages = await ctx.send(broker, topic, 5)
    async with ctx.reading(broker, topic, group="") as reader:
        await ctx.within(2 * ctx.limits.lag, reader.take(5), "reading in the group with an empty name")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("GRP-17", "A group keeps what is sent to a topic that its present consumer does not read", needs=_DURABLE)
async def reads_less_for_a_while(ctx: Context) -> None:
    """Catch a new list of topics that ends a group, loses its messages, or delivers those of other topics."""
    broker, one, two, group = await ctx.broker(), ctx.topic(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, one, group=ctx.name()):
        pass  # now no message is retained because nobody is subscribed
    async with ctx.reading(broker, one, two, group=group) as reader:
        messages = await ctx.send(broker, one, 2) + await ctx.send(broker, two, 2)
        await reader.take(4)
    waiting = [await ctx.send(broker, one, 2, start=number) for number in (2, 4)]
    async with ctx.reading(broker, two, group=group) as reader:
        live = await ctx.send(broker, two, 2, start=2)
        came = {each.id for each in await reader.until_fence()}
        ctx.same(came, {message.message_id for message in live}, "the messages of the only topic that is read")
        waiting.append(await ctx.send(broker, one, 2, start=6))
    async with ctx.reading(broker, one, two, group=group) as reader:
        await ctx.until_acknowledged(reader, 12)
    ctx.ledger.compare(group, [*messages, *live, *(each for part in waiting for each in part)]).verify()


@scenario("GRP-16", "One group name on two topics is one group", needs=_DURABLE)
async def one_group_two_topics(ctx: Context) -> None:
    """Catch a transport where the second topic replaces the first."""
    broker, one, two, group = await ctx.broker(), ctx.topic(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, one, two, group=group):
        pass
    messages = await ctx.send(broker, one, 5) + await ctx.send(broker, two, 5)
    async with ctx.reading(broker, one, two, group=group) as reader:
        await reader.take(10)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()
