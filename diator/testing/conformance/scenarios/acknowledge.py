"""ACK: settling and redelivery."""

from __future__ import annotations

import asyncio
import operator
from time import monotonic

from diator.brokers.capabilities import Capabilities
from diator.exceptions import AlreadySettled
from diator.retrying import RetryPolicy
from diator.testing._suite.checks import cancelled
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_ACK = Capabilities(settlement="cumulative", subscription="durable")
_SETTLED = Capabilities(settlement="cumulative", subscription="durable")
_RETRY = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}))
_LATER = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True)
_CLOSE = Capabilities(settlement="cumulative", redelivery=frozenset({"close"}))
_CRASH = Capabilities(settlement="cumulative", redelivery=frozenset({"crash"}))
_LETTERS = Capabilities(settlement="cumulative", dead_letter=True)


@scenario("ACK-01", "An acknowledged message is not delivered to the next consumer", needs=_ACK)
async def acked_is_done(ctx: Context) -> None:
    """Catch an acknowledgement that never reaches the service, or that the subscription's end does not wait for."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.take(20)
    async with ctx.reading(broker, topic, group=group) as reader:
        messages += await ctx.send(broker, topic, start=20)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "ACK-02",
    "The deliveries of a crashed consumer are redelivered to another",
    needs=_CRASH,
    facilities=["crash"],
    timeout=60,
)
async def crash_redelivers(ctx: Context) -> None:
    """Catch deliveries that are lost with the consumer that held them."""
    ctx.applies(ctx.capabilities.multi_process, "the service ends with the process")
    broker, dying, topic, group = await ctx.broker(), await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(dying, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 5)
        held = await reader.take(5, settle="nothing")
        await ctx.harness.crash(dying)
        async with ctx.reading(broker, topic, group=group) as other:
            bound = (ctx.capabilities.redelivery_bound or 0) + ctx.limits.redelivery
            await ctx.within(bound, other.take(5), "redelivery after a crash")
            await other.until_fence()
    for received in held:
        received.abandoned = True
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-03", "A requeued message is redelivered unchanged", needs=_RETRY)
async def retry_comes_again(ctx: Context) -> None:
    """Catch a retry that acknowledges, that changes the message, or that affects its neighbours."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = [ctx.message(topic, number, key=f"k{number}", headers={"n": str(number)}) for number in range(3)]
        await ctx.send_all(broker, messages)
        first = await reader.take(3, settle="nothing")
        await first[0].delivery.ack()
        await first[1].delivery.retry()
        await first[2].delivery.ack()
        again = (await ctx.within(ctx.limits.redelivery, reader.take(1), "the redelivery"))[0]
        await reader.until_fence()
    ctx.same(again.message, messages[1], "the redelivered message")
    ctx.check(again.delivery is not first[1].delivery, "the redelivery is the same object as the settled delivery")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-04", "A message whose handler fails is redelivered", needs=_LATER)
async def failure_is_retried(ctx: Context) -> None:
    """Catch a failure that acknowledges the message."""
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
    ctx.same(seen, [1, 1], "the handled events")


@scenario("ACK-05", "A message is not acknowledged before its handler has finished", needs=_CLOSE)
async def acked_after_the_work(ctx: Context) -> None:
    """Catch an acknowledgement on arrival: a process that dies while it handles a message loses it."""
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
        await ctx.within(ctx.limits.redelivery, reader.take(1), "the redelivery")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-06", "A delivery is settled once, and in one way", needs=_SETTLED)
async def settled_once(ctx: Context) -> None:
    """Catch a second settlement that revives the message or affects the next one."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        first, second = [each.delivery for each in await reader.take(2, settle="nothing")]
        await first.ack()
        await first.ack()
        await ctx.raises(AlreadySettled, first.retry(), "retry after ack")
        await ctx.raises(AlreadySettled, first.dead_letter("late"), "dead_letter after ack")
        ctx.same(first.outcome, "ack", "the outcome of the delivery")
        await second.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages += await ctx.send(broker, topic, start=2)
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-08", "Of messages 1 to 5, with 3 and 5 unacknowledged, exactly those two are redelivered", needs=_CLOSE)
async def out_of_order(ctx: Context) -> None:
    """Catch an acknowledgement of one message that acknowledges all earlier ones."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic, 5)
        held = await reader.take(5, settle="nothing")
        for number in (0, 1, 3):
            await held[number].delivery.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        again = [each.id for each in await ctx.within(ctx.limits.redelivery, reader.take(2), "the redelivery")]
        again += [each.id for each in await reader.until_fence()]
    ids = [each.id for each in held]  # in the order of delivery: not every transport keeps the order of sending
    allowed = [{ids[2], ids[4]}]
    if ctx.capabilities.settlement == "cumulative":
        allowed.append({ids[2], ids[3], ids[4]})
    ctx.check({*again} in allowed and len(again) == len({*again}), f"redelivered were {again}, of {ids}")


@scenario(
    "ACK-09",
    "A dead-lettered message is not redelivered, and is among the dead letters",
    needs=_LETTERS,
    facilities=["dead_letters"],
)
async def dead_lettered(ctx: Context) -> None:
    """Catch a message that is redelivered although it was dead-lettered, or that is gone."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        first, second = await reader.take(2, settle="nothing")
        await first.delivery.dead_letter("not wanted")
        await second.delivery.ack()
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    letters = await ctx.harness.dead_letters(broker, topic, group)
    ctx.same(
        [(letter.body, letter.reason) for letter in letters], [(first.delivery.body, "not wanted")], "the dead letters"
    )
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-10", "A requeued message has the next attempt, as far as attempts are counted", needs=_RETRY)
async def attempts(ctx: Context) -> None:
    """Catch a count that restarts, skips, or belongs to the consumer instead of the message."""
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
    if ctx.capabilities.delivery_count in {"deliveries", "exact"} and counted[-1] == 6:  # noqa: PLR2004
        wanted[-1] = 6  # the first subscription may have prefetched it, and nobody settled that
    ctx.same(counted, wanted, "the attempts")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-11", "A message that is requeued with a delay is not redelivered early", needs=_LATER)
async def delayed(ctx: Context) -> None:
    """Catch a delay that is ignored, or that holds up messages which it must not hold up."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    messages = [ctx.message(topic, number, key=key, headers={"a": key}) for number, key in enumerate(("a", "a", "b"))]
    held_up = messages[1:2] if ctx.capabilities.ordered_retry else []
    delay = ctx.limits.lag  # time enough for the others, however busy the machine is
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send_all(broker, messages[:1])
        first = await reader.next()
        requeued_at = monotonic()
        await first.delivery.retry(after=delay)
        await ctx.send_all(broker, messages[1:])
        between = await reader.take(2 - len(held_up))
        again = (await reader.take(1))[0]
        later = [each.id for each in await reader.until_fence()]
    ctx.same(
        {each.id for each in between},
        {each.message_id for each in messages[1:] if each not in held_up},
        "the messages delivered during the delay",
    )
    ctx.check(all(each.at < requeued_at + delay for each in between), "the delay held up messages that it must not")
    unchanged = "Delivery: The transport passes a message on"
    ctx.same(again.message, messages[0], "the message delivered after the delay", rule=unchanged)
    ctx.same(later, [each.message_id for each in held_up], "the messages held up by the delay")
    after = again.at - requeued_at
    ctx.check(after >= delay - 0.01, f"it was redelivered after {after:.3f} s instead of {delay:g} s")
    ctx.check(after < delay + ctx.limits.redelivery, "it was redelivered far too late")
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "ACK-12",
    "Work that takes longer than the deadline is not redelivered to another consumer",
    needs=Capabilities(settlement="cumulative", redelivery=frozenset({"deadline"})),
    timeout=60,
)
async def slow_work(ctx: Context) -> None:
    """Catch a consumer that loses a delivery while it still works on it."""
    bound = ctx.capabilities.redelivery_bound
    ctx.applies(bound is not None and bound <= 15, "the deadline is too long for a test")  # noqa: PLR2004
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as slow:
        messages = await ctx.send(broker, topic)
        held = (await slow.next()).delivery
        async with ctx.reading(broker, topic, group=group) as other:
            waiting = asyncio.create_task(other.next())
            await asyncio.wait({waiting}, timeout=1.5 * (bound or 0))
            redelivered = waiting.done()
            await cancelled(waiting)
        await held.ack()
    ctx.check(not redelivered, "a delivery that was still worked on was redelivered to another consumer")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-14", "The unsettled deliveries of a closed subscription are redelivered at once", needs=_CLOSE)
async def hands_over(ctx: Context) -> None:
    """Catch a close that leaves its deliveries until the redelivery bound for crashes."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 3)
        await reader.take(3, settle="nothing")
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.within(min(2 * ctx.limits.lag, ctx.limits.redelivery), reader.take(3), "handing over the deliveries")
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-15", "A message that was requeued 30 times is redelivered", needs=_RETRY, timeout=60)
async def never_gone(ctx: Context) -> None:
    """Catch a limit on deliveries that makes messages vanish."""
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
    "With a tenth of 500 messages requeued and a new consumer halfway, none is lost",
    level="S",
    needs=_SETTLED,
    timeout=60,
)
async def random_retries(ctx: Context) -> None:
    """Catch a defect that needs a mixture of settlements."""
    ctx.applies({"retry", "close"} <= ctx.capabilities.redelivery, "it needs the redelivery levels retry and close")
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


@scenario("ACK-18", "A cancelled handler acknowledges nothing", needs=_CLOSE)
async def cancelled_is_unsettled(ctx: Context) -> None:
    """Catch a cleanup that acknowledges every delivery in progress."""
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
        again = await ctx.within(ctx.limits.redelivery, reader.take(1), "the redelivery")
        again += await reader.until_fence()
    ctx.same([each.id for each in again], [cut.message_id], "the redelivered messages")


@scenario("ACK-19", "A message that is requeued twice is redelivered once", needs=_RETRY)
async def retried_once(ctx: Context) -> None:
    """Catch one redelivery for each call of `retry`."""
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
    ctx.same([each.id for each in again], [messages[0].message_id], "the redelivered messages")


@scenario("ACK-20", "A dead-lettered message cannot be settled in another way", needs=_LETTERS)
async def dead_letter_is_final(ctx: Context) -> None:
    """Catch a delivery that is dead-lettered and then requeued."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic)
        delivery = (await reader.next()).delivery
        await delivery.dead_letter("not wanted")
        await ctx.raises(AlreadySettled, delivery.retry(), "retry after dead_letter")
        await ctx.raises(AlreadySettled, delivery.ack(), "ack after dead_letter")
        ctx.same(await reader.until_fence(), [], "the redelivered messages")


@scenario("ACK-21", "Concurrent acknowledgements all take effect", needs=_SETTLED)
async def acked_together(ctx: Context) -> None:
    """Catch an acknowledgement that is lost in a batch."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 50)
        held = await reader.take(50, settle="nothing")
        ctx.random.shuffle(held)
        await asyncio.gather(*(each.delivery.ack() for each in held))
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-22", "Acknowledging never raises, whatever is promised")
async def ack_is_harmless(ctx: Context) -> None:
    """Catch a transport without acknowledgements that raises when a consumer acknowledges."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 3)
        for received in await reader.take(3, settle="nothing"):
            await received.delivery.ack()
            await received.delivery.ack()
            ctx.same(received.delivery.outcome, "ack", "the outcome of the delivery")
            await ctx.raises(AlreadySettled, received.delivery.dead_letter("late"), "dead_letter after ack")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("ACK-23", "The acknowledgement of one group does not affect another group", needs=_ACK)
async def groups_settle_alone(ctx: Context) -> None:
    """Catch a message that is deleted for every group when one group has acknowledged it."""
    broker, topic, groups = await ctx.broker(), ctx.topic(), [ctx.name(), ctx.name()]
    async with ctx.reading(broker, topic, group=groups[0]) as first, ctx.reading(broker, topic, group=groups[1]):
        messages = await ctx.send(broker, topic, 5)
        await first.until_fence()
    async with ctx.reading(broker, topic, group=groups[1]) as second:
        await second.until_fence()
    ctx.ledger.compare(groups[1], messages).verify()


@scenario("ACK-24", "A redelivery after a closed subscription counts as an attempt", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"close"}), delivery_count="deliveries"))  # fmt: skip
async def unsettled_counts(ctx: Context) -> None:
    """Catch a count that hides a poison message which ends its consumers."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    counted: list[int] = []
    for _ in range(3):
        async with ctx.reading(broker, topic, group=group) as reader:
            if not counted:
                await ctx.send(broker, topic)
            what = f"delivery {len(counted) + 1} of a message that nobody settles"
            taking = ctx.within(
                ctx.limits.redelivery, reader.take(1, settle="nothing"), what, rule="Capabilities: redelivery:"
            )
            counted.append((await taking)[0].delivery.attempt)
    least = ctx.capabilities.delivery_count == "deliveries"  # the service may count more than was handed out
    right = all(map(operator.ge, counted, [1, 2, 3])) if least else counted == [1, 2, 3]
    ctx.check(right, f"the attempts are {counted}, expected {'at least ' * least}[1, 2, 3]")


@scenario("ACK-30", "A message that one group requeues is still the first attempt of another", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry"}), subscription="durable",
    distribution=frozenset({"competing"})))  # fmt: skip
async def counts_alone(ctx: Context) -> None:
    """Catch a count, or a position, that groups share."""
    broker, topic, groups = await ctx.broker(), ctx.topic(), [ctx.name(), ctx.name()]
    async with (
        ctx.reading(broker, topic, group=groups[0]) as requeuing,
        ctx.reading(broker, topic, group=groups[1]) as other,
    ):
        messages = await ctx.send(broker, topic)
        for after in (0.0, 0.0, 0.05 * ctx.capabilities.delayed_retry):
            await (await requeuing.next()).delivery.retry(after=after)
        counted = (await requeuing.take(1))[0].delivery.attempt
        ctx.same((await other.take(1))[0].delivery.attempt, 1, "the attempt in a group that requeued nothing")
        wanted = 1 if ctx.capabilities.delivery_count == "none" else 4
        ctx.same(counted, wanted, "the attempt in the group that requeued it three times")
        await other.until_fence()
    ctx.ledger.compare(groups[1], messages).verify()


@scenario("ACK-31", "A message that one group dead-letters reaches the other groups", needs=Capabilities(
    settlement="cumulative", dead_letter=True, subscription="durable",
    distribution=frozenset({"competing"})))  # fmt: skip
async def dead_lettered_alone(ctx: Context) -> None:
    """Catch a dead letter that takes the message away from everybody."""
    broker, topic, groups = await ctx.broker(), ctx.topic(), [ctx.name(), ctx.name()]
    async with ctx.reading(broker, topic, group=groups[0]) as first, ctx.reading(broker, topic, group=groups[1]):
        messages = await ctx.send(broker, topic, 3)
        for received in await first.take(3, settle="nothing"):
            await received.delivery.dead_letter("not wanted")
    async with ctx.reading(broker, topic, group=groups[1]) as second:
        await second.until_fence()
    ctx.ledger.compare(groups[1], messages).verify()


@scenario("ACK-32", "Settling a delivery after the end of its subscription has no effect", needs=_CLOSE)
async def settled_too_late(ctx: Context) -> None:
    """Catch a late settlement that removes, requeues or dead-letters a message that another consumer holds."""
    broker, topic, group, promised = await ctx.broker(), ctx.topic(), ctx.name(), ctx.capabilities
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 4)
        held = [each.delivery for each in await reader.take(4, settle="nothing")]
    async with ctx.reading(broker, topic, group=group) as other:
        await ctx.within(ctx.limits.redelivery, other.take(4, settle="nothing"), "the redelivery")
        late = [held[0].ack(), held[1].ack()]
        late.append(held[2].retry() if "retry" in promised.redelivery else held[2].ack())
        late.append(held[3].dead_letter("too late") if promised.dead_letter else held[3].ack())
        for settling in late:
            await ctx.allow_broker_error(settling, "settling after the end of the subscription")
        await other.expect_nothing()
    async with ctx.reading(broker, topic, group=group) as last:
        await ctx.within(ctx.limits.redelivery, last.take(4), "the redelivery of what was settled too late")
        await last.until_fence()
    if "dead_letters" in ctx.harness.facilities:
        ctx.same(await ctx.harness.dead_letters(broker, topic, group), [], "the dead letters")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-34", "A message that is requeued keeps its topic among several", needs=_RETRY)
async def keeps_its_topic(ctx: Context) -> None:
    """Catch a retry that sends every message to the first topic of its subscription."""
    broker, topics, group = await ctx.broker(), [ctx.topic() for _ in range(3)], ctx.name()
    later = 0.05 * ctx.capabilities.delayed_retry
    async with ctx.reading(broker, *topics, group=group) as reader:
        messages = [message for topic in topics for message in await ctx.send(broker, topic, 2)]
        for number, received in enumerate(await reader.take(6, settle="nothing")):
            await received.delivery.retry(after=later * (number % 2))
        again = await ctx.within(ctx.limits.redelivery + ctx.limits.lag, reader.take(6), "the redelivery")
        await reader.until_fence()
    wrong = [each for each in again if each.message and each.delivery.topic.message_name != each.message.message_name]
    ctx.check(not wrong, f"{len(wrong)} of 6 requeued messages came from another topic than before")
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-35", "A retry or a dead letter that is cancelled loses no message, at 8 moments", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry", "close"})), timeout=60)  # fmt: skip
async def cancelled_settling(ctx: Context) -> None:
    """Catch a message that is removed before its copy, or its dead letter, is stored."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    has_letters = ctx.capabilities.dead_letter and "dead_letters" in ctx.harness.facilities
    at_risk: dict[object, int] = {}  # by id: how many deliveries there were when settling it was cancelled last
    async with ctx.reading(broker, topic, group=group) as reader:
        for number in range(16):
            await ctx.send(broker, topic, start=number)
            received = await reader.next()  # perhaps once more what was requeued before
            is_letter = has_letters and number % 2
            settling = received.delivery.dead_letter("no") if is_letter else received.delivery.retry()
            task = asyncio.create_task(settling)
            for _ in range(number // 2):
                await asyncio.sleep(0)
            await cancelled(task)
            at_risk[received.id] = len(ctx.ledger.received)
    letters = [each.body for each in await ctx.harness.dead_letters(broker, topic, group)] if has_letters else []

    def lost() -> list[object]:
        came = [each.id for each in ctx.ledger.received]
        stored = {each for each in at_risk if any(str(each).encode() in body for body in letters)}
        return [each for each, place in at_risk.items() if each not in stored and each not in came[place:]]

    async with ctx.reading(broker, topic, group=group) as reader:
        reading = ctx.start(reader.take(1_000))
        limit = ctx.limits.redelivery + ctx.limits.lag
        until = monotonic() + limit
        while lost() and monotonic() < until and not reading.done():  # noqa: ASYNC110  # it also depends on time
            await asyncio.sleep(ctx.limits.quiet)
        await cancelled(reading)
    missing = (
        f"{len(lost())} of {len(at_risk)} messages are lost, or were not redelivered within {limit:g} s of the close"
    )
    ctx.check(not lost(), missing)


@scenario("ACK-33", "A delayed retry survives the end of its subscription", needs=Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry", "close"}), delayed_retry=True,
    subscription="durable"))  # fmt: skip
async def delayed_beyond_the_end(ctx: Context) -> None:
    """Catch a delay that waits in the consumer and is forgotten with it."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 2)
        for received in await reader.take(2, settle="nothing"):
            await received.delivery.retry(after=ctx.limits.lag / 2)
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.within(ctx.limits.lag + ctx.limits.redelivery, reader.take(2), "the delayed redelivery")
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario("ACK-26", "A closing broker sends its acknowledgements and hands over the rest", needs=_CLOSE)
async def closed_beneath(ctx: Context) -> None:
    """Catch a broker whose close ends its subscriptions like a crash."""
    ctx.applies(ctx.capabilities.multi_process, "the service ends with the process")
    broker, other, topic, group = await ctx.broker(), await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        messages = await ctx.send(broker, topic, 4)
        await reader.take(2)
        await reader.take(2, settle="nothing")
        await broker.aclose()
        async with ctx.reading(other, topic, group=group) as successor:
            soon = min(2 * ctx.limits.lag, ctx.limits.redelivery)
            await ctx.within(soon, successor.take(2), "handing over the deliveries")
            await successor.until_fence()
    ctx.ledger.compare(group, messages).verify()
