"""FLT: the link fails, and the service does not."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from itertools import pairwise
from time import monotonic
from typing import Self
from uuid import uuid4

from diator.brokers.base import Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._ledger import NotApplicable
from diator.testing.conformance._recovery import read_while, receives_again, reconnected, survives_faults
from diator.testing.conformance._scenario import scenario
from diator.testing.fault_proxy import Flow


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
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        await receives_again(ctx, reader)


@scenario("FLT-02", "resets under load lose nothing that may not be lost", level="F", facilities=["proxy"], timeout=90)
async def reset_under_load(ctx: Context) -> None:
    """Catches messages lost on the way out, on the way in, or with an acknowledgement that did not arrive."""
    proxy = await ctx.proxy()
    before: list[int] = []

    async def reset() -> None:
        before.append(proxy.accepted)
        proxy.reset()

    await survives_faults(ctx, reset)
    ctx.check(before[0] < before[1] < proxy.accepted, "the resets were not felt")


@scenario("FLT-03", "a peer that falls silent is noticed", level="F", facilities=["proxy"], timeout=120)
async def silent_peer(ctx: Context) -> None:
    """Catches a client that waits for ever on a connection that nobody is at the other end of."""
    await _half_open(ctx, Flow.TO_SERVER, Flow.TO_CLIENT)


@scenario("FLT-20", "a service that is not heard any more is noticed", level="F", facilities=["proxy"], timeout=120)
async def deaf(ctx: Context) -> None:
    """Catches a client that takes what it could send for a sign of life."""
    await _half_open(ctx, Flow.TO_CLIENT)


@scenario("FLT-21", "a service that does not hear any more is noticed", level="F", facilities=["proxy"], timeout=120)
async def unheard(ctx: Context) -> None:
    """Catches a client that never asks for a sign of life."""
    await _half_open(ctx, Flow.TO_SERVER)


async def _half_open(ctx: Context, *flows: Flow) -> None:
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        before = proxy.accepted
        proxy.black_hole(*flows)
        await reconnected(ctx, proxy, before, ctx.limits.liveness)
        ctx.check(any(proxy.lost[flow] for flow in flows), "nothing was lost, so nothing was proved")
        await proxy.heal()
        proxy.reset()
        await receives_again(ctx, reader)


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
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLT-07", "an outage is neither stormed nor logged to death", level="F", facilities=["proxy"], timeout=300)
async def long_outage(ctx: Context) -> None:
    """Catches a client that comes back as fast as it can, in step with all others, and tells of it each time."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        with _Logged() as logged, _Memory() as memory:
            proxy.reject()
            proxy.reset()
            before, began = proxy.accepted, monotonic()
            tries: list[float] = []
            while monotonic() - began < 6 * ctx.limits.max_delay:
                if proxy.accepted > before + len(tries):
                    tries += [monotonic()] * (proxy.accepted - before - len(tries))
                if monotonic() - began > 3 * ctx.limits.max_delay:
                    memory.begin()
                await asyncio.sleep(0.005)
            grown = memory.grown()
        ctx.check(len(tries) > 1, f"it tried {len(tries)} times to connect again")
        ctx.check(len(tries) <= 50, f"it tried {len(tries)} times in six of its longest pauses")  # noqa: PLR2004
        pauses = [later - earlier for earlier, later in pairwise(tries)]
        late = pauses[len(pauses) // 2 :]
        ctx.check(max(late) - min(late) > ctx.limits.max_delay / 20, f"its pauses are all alike: {late}")
        ctx.check(max(pauses) <= ctx.limits.max_delay + ctx.limits.lag, f"it paused for {max(pauses):.1f} s")
        ctx.check(len(logged) <= 2 * len(tries) + 3, f"{len(logged)} warnings about {len(tries)} tries")
        ctx.check(grown < 256 * 1024, f"{grown:,} bytes more in the second half of the outage")
        await proxy.heal()
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)


class _Logged(logging.Handler):
    """Counts what is said about something being wrong."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


class _Memory:
    """Measures how many bytes more are in use than when it began."""

    def __init__(self) -> None:
        self._before = 0

    def begin(self) -> None:
        if not self._before:
            tracemalloc.start()
            self._before = tracemalloc.get_traced_memory()[0] or 1

    def grown(self) -> int:
        return tracemalloc.get_traced_memory()[0] - self._before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        tracemalloc.stop()


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
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        await receives_again(ctx, reader)
        ctx.check(proxy.connections <= connections, f"{proxy.connections} connections, and {connections} before")


@scenario(
    "FLT-12",
    "an idle connection that was forgotten on its way is noticed",
    level="F",
    facilities=["proxy"],
    timeout=120,
)
async def forgotten(ctx: Context) -> None:
    """Catches a client that believes in a connection as long as nobody ends it."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        before = proxy.accepted
        proxy.black_hole_existing()
        await reconnected(ctx, proxy, before, ctx.limits.liveness)
        await receives_again(ctx, reader, by=ctx.limits.liveness + ctx.limits.recovery)


@scenario("FLT-13", "a slow link is not taken for a dead one", level="F", facilities=["proxy"], timeout=90)
async def latency(ctx: Context) -> None:
    """Catches a limit of time that somebody set on the same machine."""
    proxy = await ctx.proxy()
    late = min(0.1, ctx.limits.timeout / 40)  # each way
    proxy.delay(late, late / 2)
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        before, began = proxy.accepted, monotonic()
        messages += await ctx.send(broker, topic, 3, start=1)
        ctx.check(monotonic() - began > 3 * late, "nothing was late, so nothing was proved")
        more = [ctx.message(topic, number) for number in range(4, 34)]
        await asyncio.gather(*(ctx.send_all(broker, [each]) for each in more))
        await reader.take(len(messages + more))
        await asyncio.sleep(ctx.limits.liveness / 2)
        messages += await ctx.send(broker, topic, start=34)
        await reader.until_fence()
        ctx.same(proxy.accepted, before, "how many connections there were")
    ctx.ledger.compare(reader.name, messages + more).verify()


@scenario(
    "FLT-15",
    "one side's link is cut, and the other side does not notice",
    level="F",
    facilities=["proxy"],
    timeout=90,
)
async def one_link(ctx: Context) -> None:
    """Catches a failure that spreads: from who sends to who reads, or back."""
    outgoing = await ctx.proxy()
    sender = await ctx.broker()
    incoming = await ctx.proxy()
    receiver, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(receiver, topic) as reader:
        messages = await ctx.send(sender, topic)
        await reader.until_fence()
        calm, before = incoming.accepted, outgoing.accepted
        outgoing.reset()
        again = [ctx.message(topic, number) for number in range(1, 21)]
        for message in again:
            await ctx.send_until_confirmed(sender, message)
        await reader.until_fence()
        ctx.check(outgoing.accepted > before, "the sender's link was not cut, so nothing was proved")
        ctx.same(incoming.accepted, calm, "how many connections the reader had")

        calm, before = outgoing.accepted, incoming.accepted
        incoming.reset()
        messages += await ctx.send(sender, topic, 20, start=21)
        await reconnected(ctx, incoming, before, ctx.limits.recovery)
        ctx.same(outgoing.accepted, calm, "how many connections the sender had")
        await receives_again(ctx, reader)
    kept = ctx.capabilities.guarantee == "at_least_once"
    sent = [each.message for each in ctx.ledger.sent]
    ctx.ledger.compare(reader.name, sent, gaps=reader.gaps).verify(may_duplicate=kept)


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
    size = 256 * 1024
    async with ctx.reading(broker, topic) as reader:
        for flow in Flow:
            for count in (1, 5, 17, 100, 1_000, 65_536, 200_000, size - 1, size, size + 50):
                before = proxy.accepted
                proxy.cut_after(count, flow)
                sending = _send_until_cut(ctx, reader.broker, _large(topic, size), proxy, before)
                await ctx.within(ctx.limits.recovery, read_while(reader, sending), "feeling the cut")
        await receives_again(ctx, reader)
    sent = {each.message.message_id: each.message for each in ctx.ledger.sent}
    spoilt = [each for each in ctx.ledger.received if each.id is None or each.message != sent.get(each.id)]
    ctx.same(spoilt, [], "what is not as it was sent")


async def _send_until_cut(ctx: Context, broker: Transport, message: Message, proxy: Proxy, before: int) -> None:
    while proxy.accepted <= before:
        await ctx.send_until_confirmed(broker, message)
        await asyncio.sleep(0.02)


def _large(topic: Topic, size: int) -> Message:
    return Message(
        message_type=topic.message_type,
        message_name=topic.message_name,
        message_id=uuid4(),
        payload_json=b'{"pad":"' + uuid4().hex.encode() * (size // 32) + b'"}',
    )


@scenario("FLT-22", "a confirmation that is lost loses no message", level="F", facilities=["proxy"], timeout=90)
async def confirmation_lost(ctx: Context) -> None:
    """Catches a verdict on what nobody can know, and a repeat under another id."""
    receiver, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(receiver, topic) as reader:
        proxy = await ctx.proxy()
        sender = await ctx.broker()
        messages = await ctx.send(sender, topic)
        if not await reader.until_fence():
            raise NotApplicable("the proxy of this harness stands before a service of its own")
        proxy.black_hole(Flow.TO_CLIENT)
        message = ctx.message(topic, 1)
        sending = ctx.raises(OutcomeUnknown, ctx.send_all(sender, [message]), "sending without an answer")
        await ctx.within(ctx.limits.timeout + ctx.limits.lag, sending, "ending")
        ctx.check(proxy.lost[Flow.TO_CLIENT], "no answer was lost, so nothing was proved")
        await proxy.heal()
        proxy.reset()
        await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(sender, message), "sending again")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, [*messages, message]).verify()


@scenario(
    "ACK-07",
    "what came by a connection that is lost can still be settled, or comes again",
    level="F",
    needs=Capabilities(settlement="cumulative", redelivery=frozenset({"crash"})),
    facilities=["proxy"],
    timeout=90,
)
async def settled_after_a_reset(ctx: Context) -> None:
    """Catches an acknowledgement that kills its subscription, or that acknowledges somebody else's message."""
    proxy = await ctx.proxy()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic, 5)
        held = await reader.take(5, settle="nothing")
        before = proxy.accepted
        proxy.reset()
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        for received in held:
            await ctx.allow_broker_error(received.delivery.ack(), "ack() after its connection was lost")
        await receives_again(ctx, reader)
    async with ctx.reading(broker, topic, group=group) as reader:
        await asyncio.sleep(ctx.capabilities.redelivery_bound or 0)
        await reader.until_fence()
    sent = [each.message for each in ctx.ledger.sent]
    ctx.ledger.compare(group, sent).verify(may_duplicate=True)


@scenario(
    "ACK-17",
    "what could not be settled comes again",
    level="F",
    needs=Capabilities(
        settlement="cumulative", redelivery=frozenset({"retry", "crash"}), delayed_retry=True, dead_letter=True
    ),
    facilities=["proxy"],
    timeout=90,
)
async def not_settled(ctx: Context) -> None:
    """Catches a settlement that is forgotten because the service was away, and its message with it."""
    proxy = await ctx.proxy()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        retried, aside = await reader.take(2, settle="nothing")
        proxy.refuse()
        proxy.reset()
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(proxy.connections, 0, "how many connections are left")
        within = ctx.limits.timeout + ctx.limits.lag
        await ctx.within(within, ctx.allow_broker_error(retried.delivery.retry(after=0.05), "retry()"), "retry()")
        await ctx.within(
            within, ctx.allow_broker_error(aside.delivery.dead_letter("late"), "dead_letter()"), "dead_letter()"
        )
        ctx.check(aside.delivery.outcome is None, "dead_letter() returned, and nothing can have been put aside")
        await proxy.heal()
        bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery + ctx.limits.recovery
        again = await ctx.within(bound, reader.take(2), "coming again")
        ctx.same({each.id for each in again}, {each.message_id for each in messages}, "what came again")
        await receives_again(ctx, reader)


@scenario(
    "ORD-05",
    "what is sent across resets keeps its order",
    level="F",
    needs=Capabilities(ordering="destination"),
    facilities=["proxy"],
    timeout=90,
)
async def order_across_resets(ctx: Context) -> None:
    """Catches a new connection that overtakes what waits for the old one."""
    proxy = await ctx.proxy()
    before: list[int] = []

    async def reset() -> None:
        before.append(proxy.accepted)
        proxy.reset()

    reader = await survives_faults(ctx, reset, count=90)
    ctx.check(before[0] < before[1] < proxy.accepted, "the resets were not felt")
    topic = reader.topics[0]
    sent = [each.message for each in ctx.ledger.sent if each.message.message_name == topic.message_name]
    kept = ctx.capabilities.guarantee == "at_least_once"
    ctx.ledger.compare(reader.name, sent, gaps=reader.gaps).verify(in_order=True, may_duplicate=kept)


@scenario("LEK-04", "a dozen new connections leave one", level="F", facilities=["proxy"], timeout=120)
async def many_reconnects(ctx: Context) -> None:
    """Catches a socket, or a task, for each connection that there was."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        connections, tasks = proxy.connections, len(asyncio.all_tasks())
        for _ in range(12):
            before = proxy.accepted
            proxy.reset()
            await reconnected(ctx, proxy, before, ctx.limits.max_delay + ctx.limits.recovery)
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)
        ctx.check(proxy.connections <= connections, f"{proxy.connections} connections, and {connections} before")
        now = len(asyncio.all_tasks())
        ctx.check(now <= tasks + 4, f"{now} tasks, and {tasks} before")
