"""FLW: concurrency, prefetch and backpressure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.exceptions import MessageRejected
from diator.testing._suite.errors import NotApplicable
from diator.testing.conformance._consuming import FirstWaits, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._ledger import Received
from diator.testing.conformance._scenario import scenario

_BOUNDED = Capabilities(settlement="cumulative", backpressure="prefetch")
_RETRY = Capabilities(settlement="cumulative", backpressure="prefetch", redelivery=frozenset({"retry"}))


@scenario("FLW-01", "Exactly as many handlers run at once as allowed")
async def concurrency(ctx: Context) -> None:
    """Catch a limit that is exceeded for a moment, and a limit that is never reached."""
    broker = await ctx.broker()
    at_work = most = 0

    async def handle(event: Happened) -> None:  # noqa: ARG001
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.02)
        at_work -= 1

    async with ctx.consuming(broker, handle, concurrency=5) as run:
        await asyncio.gather(*(ctx.send_all(broker, [run.message(number)]) for number in range(25)))
        await run.until_handled(25)
    ctx.same(most, 5, "the largest number of handlers at once")


@scenario("FLW-02", "At most prefetch deliveries are unsettled at once", needs=_BOUNDED)
async def prefetch(ctx: Context) -> None:
    """Catch a prefetch that is ignored, or that counts settled deliveries."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=3) as reader:
        messages = await ctx.send(broker, topic, 10)
        held = await reader.take(3, settle="nothing")
        await reader.expect_nothing()
        for received in held:
            await received.delivery.ack()
        held = await reader.take(3, settle="nothing")
        await reader.expect_nothing()
        for received in held:
            await received.delivery.ack()
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLW-04", "Every message arrives when half of the deliveries are held and settled later", needs=_BOUNDED)
async def half_held(ctx: Context) -> None:
    """Catch a reader that stays stuck after it was full once."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=10) as reader:
        messages = await ctx.send(broker, topic, 40)
        held = []
        for number, received in enumerate(await reader.take(10, settle="nothing")):
            if number % 2:
                held.append(received)
            else:
                await received.delivery.ack()
        await reader.take(10)
        for received in held:
            await received.delivery.ack()
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLW-05", "A full service refuses messages and drops none that it confirmed", level="X", facilities=["full"])
async def never_drops(ctx: Context) -> None:
    """Catch a bounded buffer that makes room by dropping messages."""
    broker, topic, group = ctx.closing(ctx.harness.full(10)), ctx.topic(), ctx.name()
    refused = 0
    async with ctx.reading(broker, topic, group=group) as reader:
        for number in range(30):
            try:
                await ctx.send(broker, topic, start=number)
            except MessageRejected:
                refused += 1
        ctx.same(refused, 20, "the number of refused messages")
        await reader.take(10)
        await ctx.send_when_there_is_room(broker, ctx.message(topic, 30))
        await reader.until_fence()
    ctx.ledger.compare(group, [sent.message for sent in ctx.ledger.sent]).verify()


def _starved() -> float:
    """Return how long this thread has waited for a processor, in seconds; 0.0 on systems that do not report it."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


@scenario("FLW-07", "The event loop keeps running during 2,000 messages", level="S", timeout=90)
async def loop_goes_on(ctx: Context) -> None:
    """Catch a transport that reads or writes without letting other tasks run."""
    broker, topic = await ctx.broker(), ctx.topic()
    lags: list[float] = []

    async def tick() -> None:
        while True:
            before, starved = monotonic(), _starved()
            await asyncio.sleep(0.005)
            lags.append(monotonic() - before - 0.005 - (_starved() - starved))

    async with ctx.reading(broker, topic) as reader:
        _ = ctx.start(tick())
        await asyncio.sleep(0)
        await reader.during(ctx.send_all(broker, [ctx.message(topic, number) for number in range(2000)]))
        await asyncio.sleep(0.01)
    ctx.check(max(lags) < ctx.limits.lag / 2, f"the event loop was blocked for {max(lags):.3f} s")


@scenario(
    "FLW-08",
    "A handler that blocks the event loop costs no connection and causes no redelivery",
    level="F",
    facilities=["proxy"],
    timeout=60,
)
async def blocked_loop(ctx: Context) -> None:
    """Catch a client that mistakes its own silence for the service's."""
    proxy = await ctx.proxy()
    broker = await ctx.broker()
    sent, at_work, blocked = asyncio.Event(), asyncio.Event(), asyncio.Event()
    connections: list[int] = []
    pause = min(ctx.limits.liveness * 0.4, ctx.limits.standstill / 2)
    if "deadline" in ctx.capabilities.redelivery and ctx.capabilities.redelivery_bound is not None:
        pause = min(pause, ctx.capabilities.redelivery_bound / 4)  # a longer block would let the lease expire

    async def handle(event: Happened) -> None:
        if event.number == 0:
            at_work.set()
            await blocked.wait()
        if event.number == 1:
            await at_work.wait()  # so that one delivery is unsettled during the block
            await sent.wait()  # a send in progress has a deadline and might miss it
            connections.append(proxy.accepted)
            time.sleep(pause)  # noqa: ASYNC251  # blocks the event loop on purpose
            blocked.set()

    async with ctx.consuming(broker, handle, concurrency=2) as run:
        messages = [run.message(number) for number in range(20)]
        await ctx.send_all(broker, messages)
        sent.set()
        await ctx.within(ctx.limits.liveness + ctx.limits.recovery, run.until_handled(20), "handling the messages")
        messages.append(run.message(20))
        await ctx.send_all(broker, messages[20:])
        await ctx.within(ctx.limits.recovery, run.until_handled(21), "handling the message sent after the block")
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(run.outcomes(), ["acked"] * 21, "the outcomes")
        ctx.same(run.outcomes_of(messages), ["acked"] * 21, "the outcomes, by message")
        ctx.same(run.consumer.health().gaps, 0, "the number of reported gaps")
        ctx.same([proxy.accepted], connections, "the number of connections")
    ctx.check(any(proxy.passed.values()), "nothing passed the proxy, so nothing was proved")
    if run.group is not None:
        async with ctx.reading(broker, run.topic, group=run.group) as reader:
            ctx.same(await reader.until_fence(), [], "the redelivered messages")


@scenario("FLW-09", "A busy subscription does not delay a quiet one")
async def quiet_beside_busy(ctx: Context) -> None:
    """Catch one queue for all subscriptions."""
    broker, busy, quiet = await ctx.broker(), ctx.topic(), ctx.topic()
    async with ctx.reading(broker, busy) as much, ctx.reading(broker, quiet) as little:
        sending = ctx.start(ctx.send_all(broker, [ctx.message(busy, number) for number in range(500)]))
        reading = ctx.start(much.take(500))
        for number in range(5):
            messages = await ctx.send(broker, quiet, start=number)
            received = await ctx.within(ctx.limits.lag, little.take(1), "a message beside 500 others")
            ctx.same(received[0].id, messages[0].message_id, "the received message")
        await sending
        await reading


@scenario("FLW-12", "Waiting for a message takes next to no CPU time", level="S", timeout=60)
async def idle(ctx: Context) -> None:
    """Catch a reader that polls in a tight loop."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        waiting = ctx.start(reader.take(1))
        await asyncio.sleep(0.1)
        before, began, starved = process_time(), monotonic(), _starved()
        await asyncio.sleep(0.5)
        share = (process_time() - before) / (monotonic() - began - (_starved() - starved))
        await ctx.send(broker, topic)
        await waiting
    ctx.check(share < 0.1, f"waiting took {share:.0%} of a core")  # noqa: PLR2004


@scenario("FLW-13", "With a concurrency of 1, handlers run one after another")
async def one_by_one(ctx: Context) -> None:
    """Catch a consumer that starts the next handler while one waits."""
    broker = await ctx.broker()
    events: list[str] = []

    async def handle(event: Happened) -> None:
        events.append(f"begin {event.number}")
        await asyncio.sleep(0.005)
        events.append(f"end {event.number}")

    async with ctx.consuming(broker, handle) as run:
        await ctx.send_all(broker, [run.message(number) for number in range(6)])
        await run.until_handled(6)
    pairs = list(zip(events[::2], events[1::2], strict=True))
    ctx.check(all(begin.split()[1] == end.split()[1] for begin, end in pairs), f"handlers overlap: {events}")


@scenario("FLW-14", "A requeued delivery frees its prefetch slot", needs=_RETRY)
async def retry_makes_room(ctx: Context) -> None:
    """Catch a reader that counts a requeued delivery as unsettled for ever."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
        messages = await ctx.send(broker, topic, 2)
        for _ in range(6):
            await (await reader.next()).delivery.retry()
        await reader.take(2)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLW-15", "A dead-lettered delivery frees its prefetch slot", needs=Capabilities(
    settlement="cumulative", backpressure="prefetch", dead_letter=True))  # fmt: skip
async def dead_letter_makes_room(ctx: Context) -> None:
    """Catch a reader that gets stuck behind a message that it dead-lettered."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
        messages = await ctx.send(broker, topic, 5)
        for _ in range(5):
            await (await reader.next()).delivery.dead_letter("not wanted")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLW-21", "`make_room` hands out further deliveries, as many as it says", needs=_BOUNDED)
async def more_room(ctx: Context) -> None:
    """Catch a flood of poison messages that stops all others, and room that grows with every call."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
        make_room: Callable[[int], None] | None = getattr(reader.deliveries, "make_room", None)
        if make_room is None:
            raise NotApplicable("the iterator of this transport has no make_room")
        messages = await ctx.send(broker, topic, 8)
        held = await reader.take(1, settle="nothing")
        waiting = ctx.start(reader.take(2, settle="nothing"))
        await asyncio.sleep(ctx.limits.quiet)
        ctx.check(not waiting.done(), "a delivery was handed out beyond the prefetch")
        for _ in range(3):
            make_room(2)
        await asyncio.wait({waiting}, timeout=ctx.limits.recovery)
        ctx.check(waiting.done(), "make_room(2) did not hand out two more deliveries")
        held += waiting.result()
        await reader.expect_nothing()
        make_room(0)
        for received in held[1:]:
            await received.delivery.ack()
        await reader.expect_nothing()
        await held[0].delivery.ack()
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("FLW-23", "A postponed delivery takes no place in the prefetch, and a resumed one does", needs=_BOUNDED)
async def postponed(ctx: Context) -> None:
    """Catch a place that a postponed delivery keeps, and a prefetch that is exceeded after it is resumed."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=2) as reader:
        deliveries: Any = reader.deliveries
        if not hasattr(deliveries, "postpone"):
            raise NotApplicable("the iterator of this transport postpones nothing")
        messages = await ctx.send(broker, topic, 6)
        first, second = await reader.take(2, settle="nothing")
        deliveries.postpone(second.delivery)
        third = (await ctx.within(ctx.limits.recovery, reader.take(1, settle="nothing"), "the place of the postponed"))[
            0
        ]
        await reader.expect_nothing()
        deliveries.make_room(1)
        await ctx.within(ctx.limits.recovery, reader.take(1), "the room made beside the postponed")
        deliveries.make_room(0)
        ctx.check(deliveries.resume(second.delivery), "a delivery is withdrawn although its connection is not lost")
        await first.delivery.ack()
        await reader.expect_nothing()
        await second.delivery.ack()
        await ctx.within(ctx.limits.recovery, reader.take(1), "the place of the resumed")
        await third.delivery.ack()
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    if ctx.capabilities.delivery_count != "exact" or "close" not in ctx.capabilities.redelivery:
        return
    async with ctx.reading(broker, topic, group=reader.name) as leaving:
        await ctx.send(broker, topic, start=6)
        postponed_at_the_end: Any = leaving.deliveries
        postponed_at_the_end.postpone((await leaving.take(1, settle="nothing"))[0].delivery)
    async with ctx.reading(broker, topic, group=reader.name) as last:
        ctx.same((await last.take(1))[0].delivery.attempt, 1, "the attempt of a message that was only postponed")


@scenario("FLW-24", "`receive_nowait` hands out what the iterator would, and no more", needs=_BOUNDED)
async def without_waiting(ctx: Context) -> None:
    """Catch a fast path that ignores the prefetch, the order, or the end of the subscription."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic, group=ctx.name(), prefetch=2) as reader:
        receive_nowait: Callable[[], Delivery | None] | None = getattr(reader.deliveries, "receive_nowait", None)
        if receive_nowait is None:
            raise NotApplicable("the iterator of this transport has no receive_nowait")
        messages = await ctx.send(broker, topic, 6)
        held = [each.delivery for each in await reader.take(1, settle="nothing")]
        until = monotonic() + ctx.limits.recovery
        while len(ctx.ledger.received) < len(messages) and monotonic() < until:
            if delivery := receive_nowait():
                ctx.ledger.received.append(Received.of(delivery, reader.name))
                held.append(delivery)
            else:
                await asyncio.sleep(ctx.limits.quiet / 10)
            ctx.check(len(held) <= 2, "a delivery was handed out beyond the prefetch of 2")  # noqa: PLR2004
            if len(held) == 2 and not delivery:  # noqa: PLR2004
                for each in held:
                    await each.ack()
                held.clear()
        for each in held:
            await each.ack()
        await reader.until_fence()
        await ctx.send(broker, topic, start=6)
    ctx.check(receive_nowait() is None, "a subscription handed out a message after its end")
    ctx.ledger.compare(reader.name, messages).verify(in_order=ctx.capabilities.ordering == "destination")


@scenario("FLW-22", "Settling a delivery wakes whoever waits for the next one", needs=_BOUNDED)
async def room_is_noticed(ctx: Context) -> None:
    """Catch a reader that notices its free place only with the next message or the next call."""
    broker, topic, promised = await ctx.broker(), ctx.topic(), ctx.capabilities
    ways = ["ack", *["retry"] * ("retry" in promised.redelivery), *["dead_letter"] * promised.dead_letter]
    for way in ways:
        async with ctx.reading(broker, topic, group=ctx.name(), prefetch=1) as reader:
            await ctx.send(broker, topic, 2)
            held = (await reader.take(1, settle="nothing"))[0].delivery
            waiting = ctx.start(reader.take(1))
            await asyncio.sleep(ctx.limits.quiet)
            ctx.check(not waiting.done(), "a second delivery was handed out with a prefetch of 1")
            await (held.dead_letter("not wanted") if way == "dead_letter" else getattr(held, way)())
            await asyncio.wait({waiting}, timeout=ctx.limits.recovery)
            ctx.check(waiting.done(), f"after {way}() nothing more was handed out to the task that waited")
            waiting.result()


@scenario("FLW-16", "Each subscription has its own prefetch", needs=_BOUNDED)
async def prefetch_each(ctx: Context) -> None:
    """Catch a limit that all subscriptions of a connection share."""
    broker, one, two = await ctx.broker(), ctx.topic(), ctx.topic()
    async with (
        ctx.reading(broker, one, group=ctx.name(), prefetch=2) as full,
        ctx.reading(broker, two, group=ctx.name(), prefetch=2) as free,
    ):
        await ctx.send(broker, one, 4)
        await full.take(2, settle="nothing")
        messages = await ctx.send(broker, two, 6)
        await free.until_fence()
    ctx.ledger.compare(free.name, messages).verify()


@scenario("FLW-17", "A slow key delays no other key", timeout=60)
async def slow_key(ctx: Context) -> None:
    """Catch a message that waits behind another one of its key, and takes the place of a message that could begin."""
    broker = await ctx.broker()
    first = FirstWaits()
    async with ctx.consuming(broker, first.handle, concurrency=4) as run:
        slow = [run.message(number, key="slow") for number in range(200)]
        others = [run.message(200 + number, key=f"key-{number % 50}") for number in range(200)]
        await ctx.send_all(broker, [each for pair in zip(slow, others, strict=True) for each in pair])
        await run.until_handled(200)
        ctx.check(min(first.handled) >= 200, "a message was handled before an earlier one of its key")  # noqa: PLR2004
        first.gate.set()
        await run.until_handled(400)
    ctx.same(first.handled[200:], [*range(200)], "the messages of the slow key")
    ctx.same(run.outcomes_of([*slow, *others]), ["acked"] * 400, "the outcomes, by message")


@scenario("FLW-18", "While prefetch messages wait behind their keys, a consumer begins no other")
async def full_buffer(ctx: Context) -> None:
    """Catch a buffer without a limit: a slow key would fill the memory."""
    ctx.applies(not ctx.capabilities.ordered_retry, "the transport delivers the messages of a key one by one")
    broker = await ctx.broker()
    first = FirstWaits()
    async with ctx.consuming(broker, first.handle, concurrency=4, prefetch=5) as run:
        await ctx.send_all(broker, [run.message(number, key="slow") for number in range(6)])
        await asyncio.sleep(ctx.limits.quiet)  # it has received all of them
        await ctx.send_all(broker, [run.message(6, key="another")])
        await asyncio.sleep(ctx.limits.quiet)
        ctx.same(first.handled, [], "the handled messages while the buffer is full")
        first.gate.set()
        await run.until_handled(7)
    ctx.same(sorted(first.handled), [*range(7)], "the handled messages")
