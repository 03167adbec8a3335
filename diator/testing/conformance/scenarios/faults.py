"""FLT: the link fails. And what of PUB, LIF and LEK takes a link that can."""

from __future__ import annotations

import asyncio
from time import monotonic
from uuid import uuid4

from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._reader import Reader, cancelled
from diator.testing.conformance._scenario import scenario


async def _receives_again(ctx: Context, reader: Reader) -> None:
    """Send until something arrives, which has to be soon; from then on, everything has to."""
    topic, began = reader.topics[0], monotonic()
    probes: set[object] = set()

    async def hear() -> None:
        while (await reader.take(1))[0].id not in probes:
            pass  # what was on its way before

    waiting = asyncio.create_task(hear())
    try:
        while not waiting.done():
            took = monotonic() - began
            ctx.check(took < ctx.limits.recovery, f"it does not receive again within {ctx.limits.recovery:g} s")
            probe = ctx.message(topic, -1)
            probes.add(probe.message_id)
            await ctx.persist(reader.broker, probe)
            await asyncio.wait({waiting}, timeout=0.1)
        waiting.result()
    finally:
        await cancelled(waiting)
    await reader.until_fence()
    messages = await ctx.send(reader.broker, topic, 20)
    await reader.until_fence()
    ids = {message.message_id for message in messages}
    came = [each.id for each in ctx.ledger.received if each.id in ids]
    ctx.same(came, [message.message_id for message in messages], "what was received after the link was back")


async def _connected_again(ctx: Context, proxy: Proxy, before: int, seconds: float) -> None:
    """Wait for the proof that the fault was felt: a connection that was not there before."""
    began = monotonic()
    while proxy.accepted <= before:
        ctx.check(monotonic() - began < seconds, f"no new connection within {seconds:g} s")
        await asyncio.sleep(0.02)


@scenario("FLT-01", "after a reset while idle, it receives again", level="F", facilities=["proxy"], timeout=60)
async def reset_while_idle(ctx: Context) -> None:
    """Catches a subscription that dies with its connection, silently."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        before = proxy.accepted
        proxy.reset()
        await _connected_again(ctx, proxy, before, ctx.limits.recovery)
        await _receives_again(ctx, reader)


@scenario("FLT-02", "resets under load lose nothing that may not be lost", level="F", facilities=["proxy"], timeout=90)
async def reset_under_load(ctx: Context) -> None:
    """Catches messages lost on the way out, on the way in, or with an acknowledgement that did not arrive."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(300)]
    before = proxy.accepted

    async def send() -> None:
        for number, message in enumerate(messages):
            if number in (100, 200):
                proxy.reset()
            await ctx.persist(broker, message)

    kept = ctx.capabilities.guarantee == "at_least_once"
    async with ctx.reading(broker, topic) as reader:
        sending = ctx.start(send())
        done: set[object] = set()
        while not sending.done() or (kept and len(done) < len(messages)):
            reading = asyncio.create_task(reader.take(1))
            await asyncio.wait({reading, sending} if not sending.done() else {reading}, return_when="FIRST_COMPLETED")
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
            if not reading.cancelled():
                done |= {each.id for each in reading.result()}
        await sending
        await _receives_again(ctx, reader)
    ctx.check(proxy.accepted >= before + 2, "the resets were not felt")
    more = [each.message for each in ctx.ledger.sent]
    ctx.ledger.judge(reader.name, more).demand(may_lose=not kept, may_repeat=kept)


@scenario("FLT-03", "a peer that falls silent is noticed", level="F", facilities=["proxy"], timeout=120)
async def silent_peer(ctx: Context) -> None:
    """Catches a client that waits for ever on a connection that nobody is at the other end of."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        before = proxy.accepted
        proxy.black_hole()
        await _connected_again(ctx, proxy, before, ctx.limits.liveness)
        await proxy.heal()
        proxy.reset()
        await _receives_again(ctx, reader)


@scenario("FLT-04", "a short silence is borne: no new connection, no loss", level="F", facilities=["proxy"], timeout=60)
async def short_silence(ctx: Context) -> None:
    """Catches a client that takes every hiccup for a death."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
        before = proxy.accepted
        proxy.withhold()
        sending = ctx.start(ctx.send(broker, topic, 5, start=1))
        await asyncio.sleep(min(ctx.limits.liveness, ctx.limits.timeout) / 5)
        ctx.check(not sending.done(), "nothing was withheld, so nothing was proved")
        await proxy.heal()
        messages += await sending
        await reader.until_fence()
        ctx.same(proxy.accepted, before, "how many connections there were")
    ctx.ledger.judge(reader.name, messages).demand()


@scenario("FLT-08", "after ten resets there is one subscription, not ten", level="F", facilities=["proxy"], timeout=90)
async def flapping(ctx: Context) -> None:
    """Catches a reader left over from each reconnection, and one that gives up."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        connections, before = proxy.connections, proxy.accepted
        for _ in range(10):
            proxy.reset()
            await asyncio.sleep(0.1)
        await _connected_again(ctx, proxy, before, ctx.limits.recovery)
        await _receives_again(ctx, reader)
        ctx.check(proxy.connections <= connections, f"{proxy.connections} connections, and {connections} before")


@scenario(
    "FLT-16",
    "a link cut in the middle of a large message corrupts nothing",
    level="F",
    facilities=["proxy"],
    timeout=120,
)
async def cut_within(ctx: Context) -> None:
    """Catches half a message taken for a whole one, and a stream that is out of step afterwards."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    sizes = [ctx.random.randrange(200_000, 262_144) for _ in range(10)]
    messages = [
        Message(
            message_type=topic.message_type,
            message_name=topic.message_name,
            message_id=uuid4(),
            payload_json=b'{"pad":"' + uuid4().hex.encode() * (size // 32) + b'"}',
        )
        for size in sizes
    ]
    before = proxy.accepted
    async with ctx.reading(broker, topic) as reader:
        for message in messages:
            sending = ctx.start(ctx.persist(broker, message))
            await asyncio.sleep(ctx.random.random() / 200)
            proxy.reset()
            await sending
        await _receives_again(ctx, reader)
    ctx.check(proxy.accepted > before, "no cut was felt")
    sent = {each.message.message_id: each.message for each in ctx.ledger.sent}
    spoilt = [each for each in ctx.ledger.received if each.id is None or each.message != sent.get(each.id)]
    ctx.same(spoilt, [], "what is not as it was sent")


@scenario(
    "PUB-03",
    "with nobody there, sending fails in time, and says that nothing was sent",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def nobody_listens(ctx: Context) -> None:
    """Catches a send that waits for ever, or leaves open whether it may be repeated."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    refused = ctx.raises(BrokerUnavailable, ctx.send(broker, topic), "sending to nobody")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, refused, "failing")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.persist(broker, ctx.message(topic)), "sending again")


@scenario("PUB-04", "cut off before the answer, the outcome is unknown", level="F", facilities=["proxy"], timeout=60)
async def cut_before_the_answer(ctx: Context) -> None:
    """Catches a verdict that nobody can know: neither sent, nor not sent."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker)
    proxy.withhold()
    sending = ctx.start(ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending without an answer"))
    await asyncio.sleep(ctx.limits.settle)
    ctx.check(not sending.done(), "it was not waiting for its answer")
    proxy.reset()
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, asyncio.wait_for(sending, None), "ending")
    await proxy.heal()
    await ctx.within(ctx.limits.recovery, ctx.persist(broker, ctx.message(topic)), "sending again")


@scenario("PUB-11", "into a black hole, sending ends in time", level="F", facilities=["proxy"], timeout=60)
async def black_hole(ctx: Context) -> None:
    """Catches a send without a time limit."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    await ctx.use(broker)
    proxy.black_hole()
    lost = ctx.raises(OutcomeUnknown, ctx.send(broker, topic), "sending into a black hole")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, lost, "ending")


@scenario("LIF-09", "closing does not wait for a service that is gone", level="F", facilities=["proxy"], timeout=60)
async def close_without_service(ctx: Context) -> None:
    """Catches a close, or an end of a subscription, that has to connect first."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()

    async def end() -> None:
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic)
            await reader.until_fence()
            proxy.refuse()
            proxy.reset()
            await asyncio.sleep(ctx.limits.settle)
            ctx.same(proxy.connections, 0, "how many connections are left")
        await broker.aclose()

    await ctx.within(ctx.limits.settle + 3 * ctx.limits.lag, end(), "ending and closing")


@scenario("LIF-17", "subscribing with nobody there fails in time", level="F", facilities=["proxy"], timeout=60)
async def subscribe_to_nobody(ctx: Context) -> None:
    """Catches an entry that waits for ever, or that succeeds without a subscription."""
    proxy = await ctx.proxy()
    proxy.refuse()
    broker, topic = await ctx.broker(), ctx.topic()
    entering = ctx.raises(BrokerUnavailable, ctx.reading(broker, topic).__aenter__(), "subscribing to nobody")
    await ctx.within(ctx.limits.timeout + ctx.limits.lag, entering, "failing")
    await proxy.heal()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.judge(reader.name, messages).demand()


@scenario("LEK-07", "20 connections that failed leave nothing", level="F", facilities=["proxy"], timeout=120)
async def failed_connects(ctx: Context) -> None:
    """Catches a socket, or a task, for each attempt. What every scenario is checked for is here provoked."""
    proxy = await ctx.proxy()
    proxy.refuse()
    for _ in range(20):
        broker = ctx.harness.transport()
        await ctx.raises(BrokerError, broker.send_message(ctx.message(ctx.topic())), "sending to nobody")
        await broker.aclose()
    await asyncio.sleep(ctx.limits.settle)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    ctx.check(len(left) < 5, f"tasks are left: {left}")  # noqa: PLR2004
