"""Checks that scenarios with faults share: that a fault had an effect, and that it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

from diator.brokers.message import Message
from diator.exceptions import BrokerError, BrokerUnavailable, OutcomeUnknown
from diator.testing._suite.checks import cancelled
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._ledger import difference
from diator.testing.conformance._reader import Reader


@asynccontextmanager
async def reading_through_a_proxy(ctx: Context) -> AsyncGenerator[tuple[Reader, Proxy], None]:
    """Subscribe through a proxy, and receive a first message."""
    proxy = await ctx.proxy()
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        await reader.until_fence()
        yield reader, proxy


# -- the fault has an effect -------------------------------------------------------------------------------------


async def reconnected(ctx: Context, proxy: Proxy, before: int, seconds: float) -> None:
    """Wait for a new connection, the proof that an old one broke. *before* is the number of accepted connections."""
    began = monotonic()
    while proxy.accepted <= before:
        ctx.check(monotonic() - began < seconds, f"no new connection within {seconds:g} s")
        await asyncio.sleep(0.02)


async def service_is_down(ctx: Context) -> None:
    """Check that the service is down: a new client cannot send, and its send fails in time."""
    newcomer = ctx.harness.transport()
    try:
        sending = newcomer.send_message(ctx.message(ctx.topic()))
        await ctx.within(
            ctx.limits.timeout + ctx.limits.lag, _refused(ctx, sending), "sending to a service that is down"
        )
    finally:
        await newcomer.aclose()


async def _refused(ctx: Context, sending: Awaitable[None]) -> None:
    try:
        await sending
    except (BrokerUnavailable, OutcomeUnknown):
        return
    ctx.check(holds=False, otherwise="the service was not down, so nothing was proved")


# -- the fault is over -------------------------------------------------------------------------------------------


async def receives_again(ctx: Context, reader: Reader, *, by: float | None = None) -> None:
    """
    Send until a message arrives, within *by* seconds. After that, check that every message arrives.

    *by* is `limits.recovery` unless it is passed.
    """
    topic, began, by = reader.topics[0], monotonic(), by or ctx.limits.recovery
    probes: set[object] = set()

    async def receive_a_probe() -> None:
        last: object = None
        while last not in probes:  # earlier messages may arrive first
            received = await reader.next()
            last = received.id
            with suppress(BrokerError):  # the delivery may belong to a lost connection
                await received.delivery.ack()

    waiting = asyncio.create_task(receive_a_probe())
    try:
        while not waiting.done():
            ctx.check(monotonic() - began < by, f"the subscription does not receive again within {by:g} s")
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
    ctx.check(came == ids, f"of 20 messages sent after the fault was over: {difference(came, ids)}")


# -- during the fault --------------------------------------------------------------------------------------------


async def read_while(
    reader: Reader, doing: Coroutine[Any, Any, Any], *, until: Callable[[Collection[object]], bool] = lambda _: True
) -> None:
    """Acknowledge deliveries while *doing* runs, and then until *until* holds for the acknowledged ids."""
    task = asyncio.create_task(doing)
    try:
        while not task.done() or not until(reader.acknowledged):
            reading = asyncio.create_task(reader.take(1))
            await asyncio.wait({reading} if task.done() else {reading, task}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await cancelled(reading)
            # A failed acknowledgement raises, and its message is redelivered.
            if not reading.cancelled() and not isinstance(reading.exception(), BrokerError):
                reading.result()
            if task.done():
                task.result()
    finally:
        await cancelled(task)


async def survives_faults(
    ctx: Context, fault: Callable[[], Awaitable[None]], *, data_survives: bool = True, count: int = 300
) -> Reader:
    """
    Send and read while *fault* happens twice, and check the guarantee. Return the reader, whose subscription has ended.

    With at least once, no message is lost if the data of the service survives the fault (*data_survives*). With at most
    once, every lost message was sent within a reported gap. After the last fault, no message is lost in either case.
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
        await read_while(reader, send(), until=lambda came: len(came) >= len(messages) or not (kept and data_survives))
        await receives_again(ctx, reader)
    everything = _messages_of(ctx, topic)
    comparison = ctx.ledger.compare(reader.name, everything, gaps=reader.gaps)
    comparison.verify(may_lose=kept and not data_survives, may_duplicate=kept)
    return reader


def _messages_of(ctx: Context, topic: object) -> list[Message]:
    of_topic = (each.message for each in ctx.ledger.sent)
    return [each for each in of_topic if (each.message_type, each.message_name) == topic]
