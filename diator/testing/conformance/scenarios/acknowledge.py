"""ACK: settling, and what comes again."""

from __future__ import annotations

import asyncio
from time import monotonic

from diator.brokers.capabilities import Capabilities
from diator.exceptions import AlreadySettled
from diator.retrying import RetryPolicy
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._reader import cancelled
from diator.testing.conformance._scenario import scenario

_ACK = Capabilities(settlement="cumulative", subscription="durable")
_SETTLED = Capabilities(settlement="cumulative", subscription="durable")
_RETRY = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}))
_LATER = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True)
_CLOSE = Capabilities(settlement="cumulative", redelivery=frozenset({"close"}))
_CRASH = Capabilities(settlement="cumulative", redelivery=frozenset({"crash"}))
_LETTERS = Capabilities(settlement="cumulative", dead_letter=True)


@scenario("ACK-01", "what is acknowledged does not come to the next member", needs=_ACK)
async def acked_is_done(ctx: Context) -> None:
    """Catches an acknowledgement that never reaches the service, or that its end does not wait for."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.take(20)
    async with ctx.reading(broker, topic, group=group) as reader:
        messages += await ctx.send(broker, topic, start=20)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-02", "what a crashed member held comes to another", needs=_CRASH, facilities=["crash"], timeout=60)
async def crash_gives_back(ctx: Context) -> None:
    """Catches deliveries that die with their holder."""
    ctx.applies(ctx.capabilities.multi_process, "the service dies with the process")
    broker, dying, topic, group = await ctx.broker(), await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(dying, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 5)
        held = await reader.take(5, settle="nothing")
        await ctx.harness.crash(dying)
        async with ctx.reading(broker, topic, group=group) as other:
            bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery
            await ctx.within(bound, other.take(5), "taking over from a crashed member")
            await other.until_fence()
    for received in held:
        received.abandoned = True
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-03", "what is given back comes again as it was", needs=_RETRY)
async def retry_comes_again(ctx: Context) -> None:
    """Catches a retry that acknowledges, that changes the message, or that touches its neighbours."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = [ctx.message(topic, number, key=f"k{number}", headers={"n": str(number)}) for number in range(3)]
        await ctx.send_all(broker, messages)
        first = await reader.take(3, settle="nothing")
        await first[0].delivery.ack()
        await first[1].delivery.retry()
        await first[2].delivery.ack()
        again = (await ctx.within(ctx.limits.redelivery, reader.take(1), "coming again"))[0]
        await reader.until_fence()
    ctx.same(again.message, messages[1], "the message that came again")
    ctx.check(again.delivery is not first[1].delivery, "it is the same delivery, which is settled already")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-04", "a handler that fails has its message handled again", needs=_LATER)
async def failure_is_retried(ctx: Context) -> None:
    """Catches a failure that acknowledges."""
    broker = await ctx.broker()
    seen: list[int] = []

    async def handle(event: Happened) -> None:
        seen.append(event.number)
        if seen == [1]:
            raise LookupError("the first time")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.02)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        await ctx.send_all(broker, [run.message(1)])
        await run.until_handled(2)
        ctx.same(run.outcomes(), ["retried", "acked"], "the outcomes")
    ctx.same(seen, [1, 1], "what was handled")


@scenario("ACK-05", "it is not acknowledged before its handler is done", needs=_CLOSE)
async def acked_after_the_work(ctx: Context) -> None:
    """Catches an acknowledgement on arrival: whoever dies at work takes the message along."""
    broker, group = await ctx.broker(), ctx.name()
    at_work = asyncio.Event()

    async def handle(event: Happened) -> None:  # noqa: ARG001
        at_work.set()
        await asyncio.Event().wait()

    async with ctx.consuming(broker, handle, group=group) as run:
        messages = [run.message()]
        await ctx.send_all(broker, messages)
        await at_work.wait()
    async with ctx.reading(broker, run.topic, group=group) as reader:
        await ctx.within(ctx.limits.redelivery, reader.take(1), "coming again")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-06", "a delivery is settled once, and in one way", needs=_SETTLED)
async def settled_once(ctx: Context) -> None:
    """Catches a second settlement that revives the message, or does something to the next one."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        first, second = [each.delivery for each in await reader.take(2, settle="nothing")]
        await first.ack()
        await first.ack()
        await ctx.raises(AlreadySettled, first.retry(), "retry after ack")
        await ctx.raises(AlreadySettled, first.dead_letter("late"), "dead_letter after ack")
        ctx.same(first.outcome, "ack", "its outcome")
        await second.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages += await ctx.send(broker, topic, start=2)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-08", "of 1 to 5, with 3 and 5 held, exactly those come again", needs=_CLOSE)
async def out_of_order(ctx: Context) -> None:
    """Catches an acknowledgement of one that acknowledges all before it."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic, 5)
        held = await reader.take(5, settle="nothing")
        for number in (0, 1, 3):
            await held[number].delivery.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        again = [each.id for each in await ctx.within(ctx.limits.redelivery, reader.take(2), "coming again")]
        again += [each.id for each in await reader.until_fence()]
    ids = [each.id for each in held]  # in the order in which they came: not every transport keeps another
    allowed = [{ids[2], ids[4]}]
    if ctx.capabilities.settlement == "cumulative":
        allowed.append({ids[2], ids[3], ids[4]})
    ctx.check({*again} in allowed and len(again) == len({*again}), f"what came again is {again}, of {ids}")


@scenario("ACK-09", "what is put aside does not come again, and is there", needs=_LETTERS, facilities=["dead_letters"])
async def put_aside(ctx: Context) -> None:
    """Catches a message that comes again although it was put aside, or that is gone."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        first, second = await reader.take(2, settle="nothing")
        await first.delivery.dead_letter("it is no good")
        await second.delivery.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    letters = await ctx.harness.dead_letters(broker, topic, group)
    ctx.same(
        [(letter.body, letter.reason) for letter in letters], [(first.delivery.body, "it is no good")], "what is aside"
    )
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-10", "the attempt is counted as promised", needs=_RETRY)
async def attempts(ctx: Context) -> None:
    """Catches a count that starts again, skips, or belongs to the member rather than the message."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    counted: list[int] = []
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic)
        for _ in range(4):
            delivery = (await reader.next()).delivery
            counted.append(delivery.attempt)
            await delivery.retry()
    async with ctx.reading(broker, topic, group=group) as reader:
        counted.append((await reader.take(1))[0].delivery.attempt)
    wanted = [1] * 5 if ctx.capabilities.delivery_count == "none" else [1, 2, 3, 4, 5]
    if ctx.capabilities.delivery_count == "exact" and counted[-1] == 6:  # noqa: PLR2004
        wanted[-1] = 6  # the first subscription may have fetched it, and nobody has settled that
    ctx.same(counted, wanted, "the attempts")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-11", "a retry with a delay does not come before it", needs=_LATER)
async def delayed(ctx: Context) -> None:
    """Catches a delay that is ignored, and one that holds up what it must not: all, or what is not of its key."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number, key=key) for number, key in enumerate(("a", "a", "b"))]
    held_up = messages[1:2] if ctx.capabilities.ordered_retry else []
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send_all(broker, messages[:1])
        first = await reader.next()
        given_back = monotonic()
        await first.delivery.retry(after=0.3)
        await ctx.send_all(broker, messages[1:])
        between = {each.id for each in await reader.take(2 - len(held_up))}
        again = (await reader.take(1))[0]
        after = [each.id for each in await reader.until_fence()]
    ctx.same(between, {each.message_id for each in messages[1:] if each not in held_up}, "what came during the delay")
    ctx.same(again.id, messages[0].message_id, "what came after it")
    ctx.same(after, [each.message_id for each in held_up], "what was held up by it")
    ctx.check(again.at - given_back >= 0.29, f"it came again after {again.at - given_back:.3f} s instead of 0.3 s")  # noqa: PLR2004
    ctx.check(again.at - given_back < 0.3 + ctx.limits.redelivery, "it came again far too late")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-12", "work that takes longer than the deadline is not given to another", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"deadline"})), timeout=60)  # fmt: skip
async def slow_work(ctx: Context) -> None:
    """Catches a member that is robbed of what it works on."""
    bound = ctx.capabilities.redelivery_bound
    ctx.applies(bound is not None and bound <= 15, "the deadline is too far away for a test")  # noqa: PLR2004
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as slow:
        messages = await ctx.send(broker, topic)
        held = (await slow.next()).delivery
        async with ctx.reading(broker, topic, group=group) as other:
            waiting = asyncio.create_task(other.next())
            await asyncio.wait({waiting}, timeout=1.5 * (bound or 0))
            robbed = waiting.done()
            await cancelled(waiting)
        await held.ack()
    ctx.check(not robbed, "what was being worked on was given to another member")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-14", "what a member held at its end comes to the next at once", needs=_CLOSE)
async def hands_over(ctx: Context) -> None:
    """Catches an end that leaves its deliveries to the bound for crashes."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 3)
        await reader.take(3, settle="nothing")
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.within(min(2 * ctx.limits.lag, ctx.limits.redelivery), reader.take(3), "handing over")
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-15", "given back 30 times, it is still there", needs=_RETRY, timeout=60)
async def never_gone(ctx: Context) -> None:
    """Catches a limit on deliveries that makes messages vanish."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic)
        for _ in range(30):
            await (await reader.next()).delivery.retry()
        await reader.take(1)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "ACK-16",
    "every tenth of 500 given back, with a change of members in the middle",
    level="S",
    needs=_SETTLED,
    timeout=60,
)
async def random_retries(ctx: Context) -> None:
    """Catches what only a mixture of settlements brings about."""
    ctx.applies({"retry", "close"} <= ctx.capabilities.redelivery, "it takes retry and close")
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 500)
        for _ in range(250):
            delivery = (await reader.next()).delivery
            await (delivery.retry() if ctx.random.random() < 0.1 else delivery.ack())  # noqa: PLR2004
        await reader.take(10, settle="nothing")
    async with ctx.reading(broker, topic, group=group) as reader:
        for _ in range(200):
            delivery = (await reader.next()).delivery
            await (delivery.retry() if ctx.random.random() < 0.1 else delivery.ack())  # noqa: PLR2004
        done = {each.id for each in ctx.ledger.received if each.delivery.outcome == "ack"}
        while len(done) < len(messages):
            done |= {each.id for each in await reader.take(1)}
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify(may_duplicate=ctx.capabilities.settlement == "cumulative")


@scenario("ACK-18", "a handler that is cancelled has acknowledged nothing", needs=_CLOSE)
async def cancelled_is_unsettled(ctx: Context) -> None:
    """Catches a cleanup that acknowledges whatever was at work."""
    broker, group = await ctx.broker(), ctx.name()
    at_work = asyncio.Event()

    async def handle(event: Happened) -> None:
        if event.number:
            at_work.set()
            await asyncio.sleep(60)

    async with ctx.consuming(broker, handle, group=group, concurrency=4) as run:
        done, cut = run.message(0), run.message(1)
        await ctx.send_all(broker, [done])
        await run.until_handled(1)
        await ctx.send_all(broker, [cut])
        await at_work.wait()
    ctx.same(run.outcomes(), ["acked", "unsettled"], "the outcomes")
    async with ctx.reading(broker, run.topic, group=group) as reader:
        again = await ctx.within(ctx.limits.redelivery, reader.take(1), "coming again")
        again += await reader.until_fence()
    ctx.same([each.id for each in again], [cut.message_id], "what came again")


@scenario("ACK-19", "given back twice, it comes again once", needs=_RETRY)
async def retried_once(ctx: Context) -> None:
    """Catches a repeat for each call."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic)
        delivery = (await reader.next()).delivery
        await delivery.retry()
        await delivery.retry()
        await ctx.raises(AlreadySettled, delivery.ack(), "ack after retry")
        again = await reader.take(1)
        await reader.expect_nothing()
        again += await reader.until_fence()
    ctx.same([each.id for each in again], [messages[0].message_id], "what came again")


@scenario("ACK-20", "what was put aside cannot be settled otherwise", needs=_LETTERS)
async def aside_is_settled(ctx: Context) -> None:
    """Catches a delivery that is put aside and given back."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic)
        delivery = (await reader.next()).delivery
        await delivery.dead_letter("it is no good")
        await ctx.raises(AlreadySettled, delivery.retry(), "retry after dead_letter")
        await ctx.raises(AlreadySettled, delivery.ack(), "ack after dead_letter")
        ctx.same(await reader.until_fence(), [], "what came again")


@scenario("ACK-21", "acknowledging several at once acknowledges each", needs=_SETTLED)
async def acked_together(ctx: Context) -> None:
    """Catches an acknowledgement that is lost in a batch."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 50)
        held = await reader.take(50, settle="nothing")
        ctx.random.shuffle(held)
        await asyncio.gather(*(each.delivery.ack() for each in held))
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-22", "to acknowledge does no harm, whatever is promised")
async def ack_is_harmless(ctx: Context) -> None:
    """Catches a transport without acknowledgements that raises where a consumer acknowledges."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 3)
        for received in await reader.take(3, settle="nothing"):
            await received.delivery.ack()
            await received.delivery.ack()
            ctx.same(received.delivery.outcome, "ack", "its outcome")
            await ctx.raises(AlreadySettled, received.delivery.dead_letter("late"), "dead_letter after ack")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("ACK-23", "one group's acknowledgement is not another's", needs=_ACK)
async def groups_settle_alone(ctx: Context) -> None:
    """Catches a message that is deleted for all when one group is done with it."""
    broker, topic, groups = await ctx.broker(), ctx.topic(), [ctx.name(), ctx.name()]
    async with ctx.reading(broker, topic, group=groups[0]) as first, ctx.reading(broker, topic, group=groups[1]):
        messages = await ctx.send(broker, topic, 5)
        await first.until_fence()
    async with ctx.reading(broker, topic, group=groups[1]) as second:
        await second.until_fence()
    ctx.ledger.compare(groups[1], messages).verify()


@scenario("ACK-24", "what comes again after a close counts as an attempt", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"close"}), delivery_count="exact"))  # fmt: skip
async def unsettled_counts(ctx: Context) -> None:
    """Catches a count that hides a message which kills its consumers."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    counted: list[int] = []
    for _ in range(3):
        async with ctx.reading(broker, topic, group=group) as reader:
            if not counted:
                await ctx.send(broker, topic)
            counted.append((await reader.take(1, settle="nothing"))[0].delivery.attempt)
    ctx.same(counted, [1, 2, 3], "the attempts")


@scenario("ACK-26", "a broker that is closed tells what was acknowledged, and hands the rest over", needs=_CLOSE)
async def closed_beneath(ctx: Context) -> None:
    """Catches a broker that closes under its subscriptions as a crash would end them."""
    ctx.applies(ctx.capabilities.multi_process, "what is in the process ends with it")
    broker, other, topic, group = await ctx.broker(), await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 4)
        await reader.take(2)
        await reader.take(2, settle="nothing")
        await broker.aclose()
        async with ctx.reading(other, topic, group=group) as successor:
            soon = min(2 * ctx.limits.lag, ctx.limits.redelivery)
            await ctx.within(soon, successor.take(2), "handing over")
            await successor.until_fence()
    ctx.ledger.compare(group, messages).verify()
