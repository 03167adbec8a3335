"""What the scenarios of faults have in common: the proof that a fault was felt, and that it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any

from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, OutcomeUnknown
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._reader import Reader, cancelled

# -- the fault was felt ------------------------------------------------------------------------------------------


async def reconnected(ctx: Context, proxy: Proxy, before: int, seconds: float) -> None:
    """Wait for the proof that a link broke: a connection that was not there before."""
    began = monotonic()
    while proxy.accepted <= before:
        ctx.check(monotonic() - began < seconds, f"no new connection within {seconds:g} s")
        await asyncio.sleep(0.02)


async def service_is_down(ctx: Context) -> None:
    """Have the proof that a service is out: somebody who comes now is not served, and is told so in time."""
    newcomer = ctx.harness.transport()
    try:
        sending = newcomer.send_message(ctx.message(ctx.topic()))
        await ctx.within(
            ctx.limits.timeout + ctx.limits.lag, _refused(ctx, sending), "sending to a service that is out"
        )
    finally:
        await newcomer.aclose()


async def _refused(ctx: Context, sending: Awaitable[None]) -> None:
    try:
        await sending
    except (BrokerUnavailable, OutcomeUnknown):
        return
    ctx.check(holds=False, otherwise="the service was there all the time, so nothing was proved")


# -- it is over --------------------------------------------------------------------------------------------------


async def receives_again(ctx: Context, reader: Reader, *, by: float | None = None) -> None:
    """
    Send until something arrives, which has to be soon; from then on, everything has to.

    Soon is within *by* seconds, or else within the time that a recovery takes.
    """
    topic, began, by = reader.topics[0], monotonic(), by or ctx.limits.recovery
    probes: set[object] = set()

    async def hear() -> None:
        heard: object = None
        while heard not in probes:  # what was on its way before
            received = await reader.next()
            heard = received.id
            with suppress(BrokerError):  # of what came by a connection that is gone
                await received.delivery.ack()

    waiting = asyncio.create_task(hear())
    try:
        while not waiting.done():
            ctx.check(monotonic() - began < by, f"it does not receive again within {by:g} s")
            probe = ctx.message(topic, -1)
            probes.add(probe.message_id)
            await ctx.send_until_confirmed(reader.broker, probe)
            await asyncio.wait({waiting}, timeout=0.1)
        waiting.result()
    finally:
        await cancelled(waiting)
    await reader.until_fence()
    messages = await ctx.send(reader.broker, topic, 20)
    await reader.until_fence()
    ids: list[object] = [message.message_id for message in messages]
    came = [each.id for each in ctx.ledger.received if each.id in ids and each.subscription == reader.name]
    if ctx.capabilities.ordering != "destination":
        came.sort(key=ids.index)
    ctx.same(came, ids, "what was received after the fault was over")


# -- meanwhile ---------------------------------------------------------------------------------------------------


async def read_while(
    reader: Reader, doing: Coroutine[Any, Any, Any], *, until: Callable[[Collection[object]], bool] = lambda _: True
) -> None:
    """Acknowledge what comes while *doing* runs, and then until the ids that were acknowledged are enough."""
    task = asyncio.create_task(doing)
    try:
        while not task.done() or not until(reader.acknowledged):
            reading = asyncio.create_task(reader.take(1))
            await asyncio.wait({reading} if task.done() else {reading, task}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await cancelled(reading)
            # An acknowledgement that did not arrive is told, and its message comes again.
            if not reading.cancelled() and not isinstance(reading.exception(), BrokerError):
                reading.result()
            if task.done():
                task.result()
    finally:
        await cancelled(task)


async def survives_faults(
    ctx: Context, fault: Callable[[], Awaitable[None]], *, survives: bool = True, count: int = 300
) -> Reader:
    """
    Send and read while *fault* happens twice, and judge by the guarantee; give the reader, whose subscription is over.

    At least once: nothing is lost, if the service's own data *survives* the fault. At most once: what is lost was sent
    within a gap that the subscription was told of. After the last fault nothing is lost in either case.
    """
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number) for number in range(count)]
    kept = ctx.capabilities.guarantee == "at_least_once"

    async def send() -> None:
        for number, message in enumerate(messages):
            if number in (count // 3, 2 * count // 3):
                await fault()
            await ctx.send_until_confirmed(broker, message)

    async with ctx.reading(broker, topic) as reader:
        await read_while(reader, send(), until=lambda came: len(came) >= len(messages) or not (kept and survives))
        await receives_again(ctx, reader)
    everything = _without_repeats(ctx, topic)
    comparison = ctx.ledger.compare(reader.name, everything, gaps=reader.gaps)
    comparison.verify(may_lose=kept and not survives, may_duplicate=kept)
    return reader


def _without_repeats(ctx: Context, topic: object) -> list[Message]:
    of_topic = (each.message for each in ctx.ledger.sent)
    return [each for each in of_topic if (each.message_type, each.message_name) == topic]
