"""FLT: faults of the connection and of the service. This module has the faults of the connection."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from collections import Counter
from itertools import pairwise
from time import monotonic
from typing import Self
from uuid import uuid4

from diator.brokers.base import Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import OutcomeUnknown
from diator.testing._suite.errors import NotApplicable
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._reader import Reader
from diator.testing.conformance._recovery import (
    read_while,
    reading_through_a_proxy,
    receives_again,
    reconnected,
    survives_faults,
)
from diator.testing.conformance._scenario import scenario
from diator.testing.fault_proxy import Flow


@scenario(
    "FLT-01",
    "An idle subscription receives again after a connection reset",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def reset_while_idle(ctx: Context) -> None:
    """Catch a subscription that ends silently with its connection."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        before = proxy.accepted
        proxy.reset()
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        await receives_again(ctx, reader)


@scenario(
    "FLT-02",
    "Resets under load lose no more messages than the guarantee allows",
    level="F",
    facilities=["proxy"],
    timeout=90,
)
async def reset_under_load(ctx: Context) -> None:
    """Catch messages that are lost when sent, when received, or with a lost acknowledgement."""
    await _survives_resets(ctx)


async def _survives_resets(ctx: Context, count: int = 300) -> Reader:
    proxy = await ctx.proxy()
    before: list[int] = []

    async def reset() -> None:
        before.append(proxy.accepted)
        proxy.reset()

    reader = await survives_faults(ctx, reset, count=count)
    ctx.check(before[0] < before[1] < proxy.accepted, "the resets had no effect, so nothing was proved")
    return reader


@scenario("FLT-03", "A silent peer is noticed", level="F", facilities=["proxy"], timeout=120)
async def silent_peer(ctx: Context) -> None:
    """Catch a client that waits for ever on a connection whose other end is gone."""
    await _half_open(ctx, Flow.TO_SERVER, Flow.TO_CLIENT)


@scenario(
    "FLT-20", "A connection that loses all incoming data is noticed", level="F", facilities=["proxy"], timeout=120
)
async def incoming_lost(ctx: Context) -> None:
    """Catch a client that treats a successful write as a sign of life."""
    await _half_open(ctx, Flow.TO_CLIENT)


@scenario(
    "FLT-21", "A connection that loses all outgoing data is noticed", level="F", facilities=["proxy"], timeout=120
)
async def outgoing_lost(ctx: Context) -> None:
    """Catch a client that never probes its connection."""
    await _half_open(ctx, Flow.TO_SERVER)


async def _half_open(ctx: Context, *flows: Flow) -> None:
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        before = proxy.accepted
        proxy.black_hole(*flows)
        await reconnected(ctx, proxy, before, ctx.limits.liveness)
        ctx.check(any(proxy.lost[flow] for flow in flows), "nothing was lost, so nothing was proved")
        await proxy.heal()
        proxy.reset()
        await receives_again(ctx, reader)


@scenario("FLT-04", "A short silence causes no new connection and no loss", level="F", facilities=["proxy"], timeout=60)
async def short_silence(ctx: Context) -> None:
    """Catch a client that treats every short delay as a dead connection."""
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
        ctx.same(proxy.accepted, before, "the number of connections")
    ctx.ledger.compare(reader.name, messages).verify()


@scenario(
    "FLT-07",
    "An outage causes neither a storm of connections nor a flood of log lines",
    level="F",
    facilities=["proxy"],
    timeout=300,
)
async def long_outage(ctx: Context) -> None:
    """Catch a client that reconnects without backoff, in step with all others, and logs each attempt."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        with _Logged() as logged, _Memory() as memory:
            proxy.reject()
            proxy.reset()
            before, began = proxy.accepted, monotonic()
            attempts: list[float] = []
            while monotonic() - began < 6 * ctx.limits.max_delay:
                if proxy.accepted > before + len(attempts):
                    attempts += [monotonic()] * (proxy.accepted - before - len(attempts))
                if monotonic() - began > 3 * ctx.limits.max_delay:
                    memory.begin()
                await asyncio.sleep(0.005)
            grown = memory.grown()
        ctx.check(len(attempts) > 1, f"there were {len(attempts)} attempts to reconnect")
        ctx.check(len(attempts) <= 50, f"there were {len(attempts)} attempts in six times the maximal delay")  # noqa: PLR2004
        delays = [later - earlier for earlier, later in pairwise(attempts)]
        late = delays[len(delays) // 2 :]
        ctx.check(max(late) - min(late) > ctx.limits.max_delay / 20, f"the delays have no jitter: {late}")
        ctx.check(max(delays) <= ctx.limits.max_delay + ctx.limits.lag, f"a delay took {max(delays):.1f} s")
        ctx.check(len(logged) <= 2 * len(attempts) + 3, f"{len(logged)} warnings about {len(attempts)} attempts")
        ctx.check(grown < 256 * 1024, f"memory grew by {grown:,} bytes in the second half of the outage")
        await proxy.heal()
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)


class _Logged(logging.Handler):
    """Counts warnings and errors in the log."""

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
    """Measures how much memory is used since `begin`."""

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


@scenario("FLT-08", "Ten resets leave one subscription, not ten", level="F", facilities=["proxy"], timeout=90)
async def flapping(ctx: Context) -> None:
    """Catch a reader that is left over from each reconnect, and a client that gives up."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        connections, before = proxy.connections, proxy.accepted
        for _ in range(10):
            proxy.reset()
            await asyncio.sleep(0.1)
        await reconnected(ctx, proxy, before, ctx.limits.recovery)
        await receives_again(ctx, reader)
        ctx.check(proxy.connections <= connections, f"{proxy.connections} connections, there were {connections} before")


@scenario(
    "FLT-12",
    "An idle connection that the network has silently dropped is noticed",
    level="F",
    facilities=["proxy"],
    timeout=120,
)
async def silently_dropped(ctx: Context) -> None:
    """Catch a client that trusts a connection until the peer closes it."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        before = proxy.accepted
        proxy.black_hole_existing()
        await reconnected(ctx, proxy, before, ctx.limits.liveness)
        await receives_again(ctx, reader, by=ctx.limits.liveness + ctx.limits.recovery)


@scenario("FLT-13", "A slow link is not treated as a dead one", level="F", facilities=["proxy"], timeout=90)
async def latency(ctx: Context) -> None:
    """Catch a timeout that fits only a client on the same machine."""
    proxy = await ctx.proxy()
    late = min(0.1, ctx.limits.timeout / 40)  # in each direction
    proxy.delay(late, late / 2)
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic)
        before, began = proxy.accepted, monotonic()
        messages += await ctx.send(broker, topic, 3, start=1)
        ctx.check(monotonic() - began > 3 * late, "nothing was delayed, so nothing was proved")
        more = [ctx.message(topic, number) for number in range(4, 34)]
        await asyncio.gather(*(ctx.send_all(broker, [each]) for each in more))
        await reader.take(len(messages + more))
        await asyncio.sleep(ctx.limits.liveness / 2)
        messages += await ctx.send(broker, topic, start=34)
        await reader.until_fence()
        ctx.same(proxy.accepted, before, "the number of connections")
    ctx.ledger.compare(reader.name, messages + more).verify()


@scenario(
    "FLT-15",
    "A lost connection of one side does not affect the other side",
    level="F",
    facilities=["proxy"],
    timeout=90,
)
async def one_link(ctx: Context) -> None:
    """Catch a failure that spreads from the sender to the reader, or the other way."""
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
        ctx.check(outgoing.accepted > before, "the sender's connection was not reset, so nothing was proved")
        ctx.same(incoming.accepted, calm, "the number of connections of the reader")

        calm, before = outgoing.accepted, incoming.accepted
        incoming.reset()
        messages += await ctx.send(sender, topic, 20, start=21)
        await reconnected(ctx, incoming, before, ctx.limits.recovery)
        ctx.same(outgoing.accepted, calm, "the number of connections of the sender")
        await receives_again(ctx, reader)
    kept = ctx.capabilities.guarantee == "at_least_once"
    sent = [each.message for each in ctx.ledger.sent]
    ctx.ledger.compare(reader.name, sent, gaps=reader.gaps).verify(may_duplicate=kept)


@scenario(
    "FLT-16",
    "A connection that breaks within a large message corrupts nothing",
    level="F",
    facilities=["proxy"],
    timeout=120,
)
async def cut_within(ctx: Context) -> None:
    """Catch a partial message that is treated as complete, and a stream that is out of step afterwards."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    size = 256 * 1024
    async with ctx.reading(broker, topic) as reader:
        for flow in Flow:
            for count in (1, 5, 17, 100, 1_000, 65_536, 200_000, size - 1, size, size + 50):
                before = proxy.accepted
                proxy.cut_after(count, flow)
                sending = _send_until_cut(ctx, reader.broker, _large(topic, size), proxy, before)
                await ctx.within(ctx.limits.recovery, read_while(reader, sending), "noticing the broken connection")
        await receives_again(ctx, reader)
    sent = {each.message.message_id: each.message for each in ctx.ledger.sent}
    changed = [each for each in ctx.ledger.received if each.id is None or each.message != sent.get(each.id)]
    ctx.same(changed, [], "the messages that differ from the sent ones")


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


@scenario("FLT-22", "A lost confirmation loses no message", level="F", facilities=["proxy"], timeout=90)
async def confirmation_lost(ctx: Context) -> None:
    """Catch a send error that claims to know the outcome, and a resend under another id."""
    receiver, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(receiver, topic) as reader:
        proxy = await ctx.proxy()
        sender = await ctx.broker()
        messages = await ctx.send(sender, topic)
        if not await reader.until_fence():
            raise NotApplicable("the proxy of this harness belongs to another service")
        proxy.black_hole(Flow.TO_CLIENT)
        message = ctx.message(topic, 1)
        sending = ctx.raises(OutcomeUnknown, ctx.send_all(sender, [message]), "sending without a confirmation")
        await ctx.within(ctx.limits.timeout + ctx.limits.lag, sending, "ending")
        ctx.check(proxy.lost[Flow.TO_CLIENT], "no confirmation was lost, so nothing was proved")
        await proxy.heal()
        proxy.reset()
        await ctx.within(ctx.limits.recovery, ctx.send_until_confirmed(sender, message), "sending again")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, [*messages, message]).verify()


@scenario(
    "ACK-07",
    "After a lost connection, a delivery can still be settled or is redelivered",
    level="F",
    needs=Capabilities(settlement="cumulative", redelivery=frozenset({"crash"})),
    facilities=["proxy"],
    timeout=90,
)
async def settled_after_a_reset(ctx: Context) -> None:
    """Catch an acknowledgement that ends its subscription, or that acknowledges another message."""
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
    times = Counter(each.id for each in ctx.ledger.received)
    failed = {each.id for each in held if each.delivery.outcome is None and times[each.id] == 1}

    async def receive_again() -> None:
        while failed:
            failed.discard((await reader.take(1))[0].id)

    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.within(ctx.redelivery_bound, receive_again(), "the redelivery of what could not be acknowledged")
        await reader.until_fence()
    sent = [each.message for each in ctx.ledger.sent]
    ctx.ledger.compare(group, sent).verify(may_duplicate=True)


@scenario(
    "ACK-27",
    "A lost connection charges an attempt only to messages that were handed out",
    level="F",
    needs=Capabilities(
        settlement="cumulative", redelivery=frozenset({"close", "crash"}), delivery_count="deliveries", network=True
    ),
    facilities=["proxy"],
    timeout=90,
)
async def charged_once(ctx: Context) -> None:
    """Catch a bad link that makes poison messages of messages that no handler has seen."""
    proxy = await ctx.proxy()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 5)
        await reader.take(1, settle="nothing")
        for _ in range(3):
            before = proxy.accepted
            proxy.reset()
            await reconnected(ctx, proxy, before, ctx.limits.max_delay + ctx.limits.recovery)
            await asyncio.sleep(ctx.limits.quiet)  # a transport may prefetch them again
    async with ctx.reading(broker, topic, group=group) as reader:
        again = await ctx.within(ctx.redelivery_bound, reader.take(5), "the redelivery")
    counted = {each.id: each.delivery.attempt for each in again}
    attempts = [counted.get(message.message_id) for message in messages]
    if ctx.capabilities.delivery_count == "exact":
        ctx.same(attempts, [2, 1, 1, 1, 1], "the attempts after three lost connections; only the first was handed out")
    else:
        ctx.check((attempts[0] or 0) > 1, f"the delivery that nobody settled is not counted: {attempts}")


@scenario(
    "ACK-17",
    "A message that could not be settled is redelivered",
    level="F",
    needs=Capabilities(
        settlement="cumulative", redelivery=frozenset({"retry", "crash"}), delayed_retry=True, dead_letter=True
    ),
    facilities=["proxy"],
    timeout=90,
)
async def not_settled(ctx: Context) -> None:
    """Catch a settlement that is dropped, with its message, because the service was unreachable."""
    proxy = await ctx.proxy()
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        requeued, rejected = await reader.take(2, settle="nothing")
        proxy.refuse()
        proxy.reset()
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(proxy.connections, 0, "the number of open connections")
        within = ctx.limits.timeout + ctx.limits.lag
        await ctx.within(within, ctx.allow_broker_error(requeued.delivery.retry(after=0.05), "retry()"), "retry()")
        await ctx.within(
            within, ctx.allow_broker_error(rejected.delivery.dead_letter("late"), "dead_letter()"), "dead_letter()"
        )
        ctx.check(rejected.delivery.outcome is None, "dead_letter() returned without a connection")
        await proxy.heal()
        again = await ctx.within(ctx.redelivery_bound, reader.take(2), "the redelivery")
        ctx.same({each.id for each in again}, {each.message_id for each in messages}, "the redelivered messages")
        await receives_again(ctx, reader)


@scenario(
    "ORD-05",
    "Messages sent across connection resets keep their order",
    level="F",
    needs=Capabilities(ordering="destination"),
    facilities=["proxy"],
    timeout=90,
)
async def order_across_resets(ctx: Context) -> None:
    """Catch a new connection that overtakes messages which wait for the old one."""
    reader = await _survives_resets(ctx, count=90)
    topic = reader.topics[0]
    sent = [each.message for each in ctx.ledger.sent if each.message.message_name == topic.message_name]
    kept = ctx.capabilities.guarantee == "at_least_once"
    ctx.ledger.compare(reader.name, sent, gaps=reader.gaps).verify(in_order=True, may_duplicate=kept)


@scenario("LEK-04", "Twelve reconnects leave one connection", level="F", facilities=["proxy"], timeout=120)
async def many_reconnects(ctx: Context) -> None:
    """Catch a socket or a task that is left over from each earlier connection."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        connections, tasks = proxy.connections, len(asyncio.all_tasks())
        for _ in range(12):
            before = proxy.accepted
            proxy.reset()
            await reconnected(ctx, proxy, before, ctx.limits.max_delay + ctx.limits.recovery)
        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.recovery)
        ctx.check(proxy.connections <= connections, f"{proxy.connections} connections, there were {connections} before")
        now = len(asyncio.all_tasks())
        ctx.check(now <= tasks + 4, f"{now} tasks, there were {tasks} before")
