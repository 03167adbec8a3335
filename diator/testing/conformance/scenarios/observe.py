"""OBS: what it says."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from diator.testing.conformance._consuming import Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@contextmanager
def _listening() -> Generator[list[logging.LogRecord], None, None]:
    """Collect what is logged, of every level, by everybody."""
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


@scenario("OBS-04", "when nothing is wrong, no warning is logged")
async def quiet(ctx: Context) -> None:
    """Catches logs that cry wolf."""
    with _listening() as records:
        logging.getLogger("diator").debug("listening")
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic, 5)
            await reader.until_fence()
        await broker.aclose()
    ctx.check(records, "not even the first line was heard")
    loud = [record.getMessage() for record in records if record.levelno > logging.INFO]
    ctx.same(loud, [], "what was logged above INFO")


@scenario("OBS-05", "payloads are in no log, and in no representation")
async def secrets(ctx: Context) -> None:
    """Catches a log line, or an error, that gives away what a message holds."""
    broker, canary = await ctx.broker(), "canary-7d1f"

    async def handle(event: Happened) -> None:
        if event.number:
            raise LookupError("no good")

    shown: list[str] = []
    with _listening() as records:
        async with ctx.consuming(broker, handle) as handlings, ctx.reading(broker, handlings.topic) as reader:
            messages = [handlings.message(number, tags=[canary]) for number in range(2)]
            messages += [handlings.message("bad", tags=canary), handlings.message(0, tags=[canary, 7])]  # type: ignore[arg-type]
            await ctx.send_all(broker, messages)
            handled = await handlings.become(4)
            shown += [repr(each) for each in handled]
            for received in await reader.take(4):
                shown += [repr(received.delivery), str(received.delivery), repr(received.message)]
    shown += [f"{record.getMessage()} {record.exc_text or ''} {record.exc_info or ''}" for record in records]
    ctx.check(len(shown) > len(messages), "nothing was shown at all")
    ctx.same([text for text in shown if canary in text], [], "where the payload can be read")
