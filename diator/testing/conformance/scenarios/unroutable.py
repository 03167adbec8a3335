"""UNR: unroutable messages and new destinations."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from diator.brokers.base import Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.exceptions import MessageRejected, MessageUnroutable
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_GROUPS = Capabilities(unroutable="retained", subscription="durable", distribution=frozenset({"competing"}))
_NOT_RETAINED = "it reports a message that nobody has subscribed to, instead of retaining it"


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


@scenario("UNR-07", "The first group receives everything that was retained, before later messages", needs=_GROUPS)
async def first_group(ctx: Context) -> None:
    """Catch a loss, a duplicate or a wrong order where the retained messages end and the subscription begins."""
    ctx.applies(ctx.capabilities.unroutable == "retained", _NOT_RETAINED)
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    # More than a transport prefetches, and read slowly: the later ones come while most retained ones wait.
    messages = [ctx.message(topic, number, key="one key") for number in range(600)]
    await ctx.send_all(broker, messages[:400])
    sending = ctx.start(ctx.send_all(broker, messages[400:]))
    async with ctx.reading(broker, topic, group=group, prefetch=8) as reader:
        await reader.during(ctx.allow_broker_error(sending, "sending while the first group subscribes"))
    ctx.ledger.compare(group, messages).verify(in_order=ctx.capabilities.ordering != "none")


@scenario("UNR-08", "A second group takes nothing of what was retained for the first", needs=_GROUPS)
async def second_group(ctx: Context) -> None:
    """Catch retained messages that two groups share, while the first still has most of them before it."""
    ctx.applies(ctx.capabilities.unroutable == "retained", _NOT_RETAINED)
    broker, topic, first, second = await ctx.broker(), ctx.topic(), ctx.name("-first"), ctx.name("-second")
    retained = await ctx.send(broker, topic, 30)
    async with ctx.reading(broker, topic, group=first, prefetch=5) as one:
        held = await one.take(5, settle="nothing")
        async with ctx.reading(broker, topic, group=second) as two:
            messages = await ctx.send(broker, topic, 5, start=30)
            await two.until_fence()
        for received in held:
            await received.delivery.ack()
        await one.until_fence()
    ctx.ledger.compare(first, [*retained, *messages]).verify()
    seen_by_second = messages if ctx.capabilities.replay == "none" else [*retained, *messages]
    ctx.ledger.compare(second, seen_by_second).verify()


@scenario(
    "UNR-09",
    "Beyond its bound, a transport refuses to retain a message, and loses none that it confirmed",
    needs=_GROUPS,
    facilities=["retention"],
)
async def bound(ctx: Context) -> None:
    """Catch a confirmation of a message that had no room, and a retained message that is dropped to make room."""
    broker, topic, group = ctx.closing(ctx.harness.retaining(10)), ctx.topic(), ctx.name()
    refused = 0
    for number in range(30):
        try:
            await ctx.send(broker, topic, start=number)
        except MessageRejected as error:
            refused += 1
            ctx.same(error.message_id, ctx.ledger.sent[-1].message.message_id, "the message_id of the error")
    ctx.check(10 <= refused <= 20, f"of 30 messages {refused} were refused; there is room for 10")  # noqa: PLR2004
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.take(30 - refused)
        await ctx.send(broker, topic, start=30)
        await reader.until_fence()
    ctx.ledger.compare(group, [sent.message for sent in ctx.ledger.sent]).verify()


@scenario("UNR-12", "A subscription without a group that has ended takes no message", needs=Capabilities(
    distribution=frozenset({"broadcast"})))  # fmt: skip
async def ended_takes_nothing(ctx: Context) -> None:
    """Catch a queue that goes on collecting for a subscription that has ended."""
    _shows_who_takes(ctx)
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
    with suppress(LookupError):
        async with ctx.reading(broker, topic):
            raise LookupError("the program's own")
    await _taken_by_nobody(ctx, broker, topic)


@scenario(
    "UNR-13",
    "A subscription without a group takes no message after its process has crashed",
    needs=Capabilities(distribution=frozenset({"broadcast"})),
    facilities=["crash"],
    timeout=90,
)
async def crashed_takes_nothing(ctx: Context) -> None:
    """Catch a queue that collects for ever for a reader that is dead."""
    _shows_who_takes(ctx)
    ctx.applies(ctx.capabilities.multi_process, "the service ends with the process")
    broker, dying, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    async with ctx.reading(dying, topic):
        await ctx.use(broker, topic)
        await ctx.harness.crash(dying)
        await asyncio.sleep(ctx.limits.absence + ctx.limits.quiet)
        await _taken_by_nobody(ctx, broker, topic)


def _shows_who_takes(ctx: Context) -> None:
    retained = ctx.capabilities.unroutable == "retained" and "competing" in ctx.capabilities.distribution
    ctx.applies(retained or ctx.capabilities.unroutable == "reported", "it drops what nobody has subscribed to")


async def _taken_by_nobody(ctx: Context, broker: Transport, topic: Topic) -> None:
    """Check that no subscription to *topic* exists: a message is reported, or waits for the first group."""
    if ctx.capabilities.unroutable == "reported":
        await ctx.raises(MessageUnroutable, ctx.send(broker, topic), "sending without a subscription")
        return
    messages = await ctx.send(broker, topic, 3, start=10)
    async with ctx.reading(broker, topic, group=ctx.name()) as first:
        await first.until_fence()
    came = {each.id for each in ctx.ledger.received if each.subscription == first.name}
    lost = sum(message.message_id not in came for message in messages)
    ctx.check(
        not lost, f"{lost} of 3 messages did not reach the first group: they were collected for a dead subscription"
    )


@scenario("UNR-15", "The first group of one topic leaves what is retained for another topic", needs=_GROUPS)
async def retained_for_another(ctx: Context) -> None:
    """Catch retained messages that are dropped, or delivered, when a group subscribes to another topic."""
    ctx.applies(ctx.capabilities.unroutable == "retained", _NOT_RETAINED)
    broker, one, two = await ctx.broker(), ctx.topic(), ctx.topic()
    three = Topic("ecst_event", one.message_name)  # the same name, and yet another topic
    messages = {topic: await ctx.send(broker, topic, 3) for topic in (one, two)}
    for topic in (one, three, two):
        async with ctx.reading(broker, topic, group=ctx.name()) as reader:
            await reader.until_fence()
        ctx.ledger.compare(reader.name, messages[topic]).verify()
        if topic == one:  # it has a group now
            messages[three] = await ctx.send(broker, three, 3)


@scenario(
    "UNR-14",
    "Messages retained for one topic take no room from another topic that has a reader",
    needs=_GROUPS,
    facilities=["retention"],
)
async def bound_of_one_topic(ctx: Context) -> None:
    """Catch one bound for everything: a topic that nobody reads stops all others."""
    broker, nobody, read, group = ctx.closing(ctx.harness.retaining(5)), ctx.topic(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, read, group=group) as reader:
        for number in range(15):
            await ctx.allow_broker_error(ctx.send(broker, nobody, start=number), "sending beyond the bound")
        messages = [ctx.message(read, number) for number in range(3)]
        for message in messages:
            await ctx.send_all(broker, [message])
            await reader.take(1)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "UNR-10",
    "What was retained for a group stays its own when its consumer crashes in the middle",
    needs=Capabilities(
        unroutable="retained",
        subscription="durable",
        distribution=frozenset({"competing"}),
        redelivery=frozenset({"crash"}),
    ),
    facilities=["crash"],
    timeout=60,
)
async def crash_in_the_middle(ctx: Context) -> None:
    """Catch retained messages that are lost with the first consumer, or that go to the next group that comes."""
    ctx.applies(ctx.capabilities.unroutable == "retained", _NOT_RETAINED)
    ctx.applies(ctx.capabilities.multi_process, "the service ends with the process")
    broker, dying, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    first, second = ctx.name("-first"), ctx.name("-second")
    retained = await ctx.send(broker, topic, 30)
    async with ctx.reading(dying, topic, group=first, prefetch=5) as reader:
        await reader.take(10)
        held = await reader.take(5, settle="nothing")
        await ctx.harness.crash(dying)
        async with ctx.reading(broker, topic, group=second) as other:
            messages = await ctx.send(broker, topic, 5, start=30)
            await other.until_fence()
        async with ctx.reading(broker, topic, group=first) as again:
            await ctx.until_acknowledged(again, 35)
    for received in held:
        received.abandoned = True
    # The crash may have come before the acknowledgements reached the service.
    ctx.ledger.compare(first, [*retained, *messages]).verify(may_duplicate=True)
    seen_by_second = messages if ctx.capabilities.replay == "none" else [*retained, *messages]
    ctx.ledger.compare(second, seen_by_second).verify()


@scenario(
    "UNR-11",
    "What is retained waits for a group, not for a subscription without one",
    needs=Capabilities(unroutable="retained", distribution=frozenset({"broadcast", "competing"})),
)
async def without_a_group(ctx: Context) -> None:
    """Catch retained messages that a passing subscription without a group takes along."""
    ctx.applies(ctx.capabilities.unroutable == "retained", _NOT_RETAINED)
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    retained = await ctx.send(broker, topic, 3)
    async with ctx.reading(broker, topic) as passing:
        live = await ctx.send(broker, topic, 3, start=3)
        await passing.until_fence()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 3, start=6)
        await reader.until_fence()
    ctx.ledger.compare(passing.name, live).verify()
    seen_by_group = [*retained, *messages] if ctx.capabilities.replay == "none" else [*retained, *live, *messages]
    ctx.ledger.compare(group, seen_by_group).verify()
