"""OBS: logs and health."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from time import monotonic

from diator.brokers.base import Transport
from diator.consumer import Consumer
from diator.exceptions import BrokerError
from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._recovery import reading_through_a_proxy, receives_again, reconnected
from diator.testing.conformance._scenario import scenario


@contextmanager
def _log_records() -> Generator[list[logging.LogRecord], None, None]:
    """Collect every log record, of every logger and level."""
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    root, ours, collector = logging.getLogger(), logging.getLogger("diator"), Collector(0)
    levels = root.level, ours.level
    root.addHandler(collector)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    try:
        yield records
    finally:
        root.removeHandler(collector)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@scenario("OBS-04", "No warning is logged when nothing is wrong")
async def quiet(ctx: Context) -> None:
    """Catch false alarms in the log."""
    with _log_records() as records:
        logging.getLogger("diator").debug("listening")
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic, 5)
            await reader.until_fence()
        await broker.aclose()
    ctx.check(records, "no log record was collected, so nothing was proved")
    loud = [record.getMessage() for record in records if record.levelno > logging.INFO]
    ctx.same(loud, [], "the log records above INFO")


@scenario("OBS-05", "Payloads appear in no log line and in no repr")
async def secrets(ctx: Context) -> None:
    """Catch a log line or an error that reveals the content of a message."""
    broker, canary = await ctx.broker(), "canary-7d1f"

    async def handle(event: Happened) -> None:
        if event.number:
            raise LookupError("the handler fails")

    shown: list[str] = []
    with _log_records() as records:
        async with ctx.consuming(broker, handle) as run, ctx.reading(broker, run.topic) as reader:
            messages = [run.message(number, tags=[canary]) for number in range(2)]
            messages += [run.message("bad", tags=canary), run.message(0, tags=[canary, 7])]  # type: ignore[arg-type]
            await ctx.send_all(broker, messages)
            handled = await run.until_handled(4)
            shown += [repr(each) for each in handled]
            for received in await reader.take(4):
                shown += [repr(received.delivery), str(received.delivery), repr(received.message)]
    shown += [f"{record.getMessage()} {record.exc_text or ''} {record.exc_info or ''}" for record in records]
    ctx.check(len(shown) > len(messages), "nothing was shown, so nothing was proved")
    ctx.same([text for text in shown if canary in text], [], "the texts that show a payload")


@scenario("OBS-06", "Health reports a lost connection and its recovery", level="F", facilities=["proxy"], timeout=120)
async def health_of_the_link(ctx: Context) -> None:
    """Catch a consumer that counts as healthy because its process is alive."""
    proxy = await ctx.proxy()
    broker = await ctx.broker()

    async def handle(event: Happened) -> None: ...

    async with ctx.consuming(broker, handle) as run:
        consumer = run.consumer
        await ctx.send_until_confirmed(broker, run.message())
        await run.until_handled(1)
        await _reports(ctx, consumer, connected=True, by=monotonic())

        before, began = proxy.accepted, monotonic()
        proxy.black_hole()
        await reconnected(ctx, proxy, before, ctx.limits.liveness)
        ctx.applies(run.reports_connection, "the transport does not report whether it is connected")
        await _reports(ctx, consumer, connected=False, by=began + ctx.limits.liveness)
        await proxy.heal()
        proxy.reset()
        await _reports(ctx, consumer, connected=True, by=monotonic() + ctx.limits.recovery)
        await ctx.send_until_confirmed(broker, run.message())
        await ctx.within(ctx.limits.recovery, run.until_handled(2), "handling a message sent after the recovery")

        proxy.refuse()
        proxy.reset()
        await _reports(ctx, consumer, connected=False, by=monotonic() + ctx.limits.liveness)
        await asyncio.sleep(ctx.limits.max_delay)
        await _reports(ctx, consumer, connected=False, by=monotonic())
        await proxy.heal()
        await _reports(ctx, consumer, connected=True, by=monotonic() + ctx.limits.max_delay + ctx.limits.recovery)
        await ctx.send_until_confirmed(broker, run.message())
        await ctx.within(ctx.limits.recovery, run.until_handled(3), "handling a message sent after the recovery")


async def _reports(ctx: Context, consumer: Consumer, *, connected: bool, by: float) -> None:
    """Wait until the health of *consumer* reports *connected*. It reports `receiving` all the time."""
    while (health := consumer.health()).connected != connected:
        ctx.check(monotonic() < by, f"the health does not report connected={connected}: {health}")
        await asyncio.sleep(0.02)
    ctx.check(health.receiving, f"the health reports that the consumer has stopped: {health}")


@scenario(
    "OBS-07", "A lost connection is logged as warnings without a traceback", level="F", facilities=["proxy"], timeout=90
)
async def lost_quietly(ctx: Context) -> None:
    """Catch a client library that logs an error, a traceback or an unhandled exception for each lost connection."""
    async with reading_through_a_proxy(ctx) as (reader, proxy):
        with _log_records() as records:
            before, lost = proxy.accepted, 2 * proxy.connections
            proxy.reset()
            await reconnected(ctx, proxy, before, ctx.limits.recovery)
            await receives_again(ctx, reader)
            proxy.refuse()
            proxy.reset()
            refused = ctx.start(_attempts(ctx, reader.broker))
            await asyncio.sleep(ctx.limits.max_delay)
            refused.cancel()
            await proxy.heal()
            await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.timeout + ctx.limits.recovery)
            gc.collect()  # asyncio logs an exception that nobody has looked at when its task is collected
    loud = [record for record in records if record.levelno > logging.INFO]
    bad = [record for record in loud if record.levelno >= logging.ERROR or record.exc_info]
    ctx.same([f"{each.name}: {each.getMessage()}" for each in bad], [], "the errors and tracebacks in the log")
    ctx.check(len(loud) <= lost + 20, f"{len(loud)} warnings about {lost} lost connections")


async def _attempts(ctx: Context, broker: Transport) -> None:
    """Send again and again, so that the sender tries to connect."""
    while True:
        with suppress(BrokerError):
            await ctx.use(broker)
        await asyncio.sleep(0.05)
