"""FRN: messages of other programs. Whatever they contain, each is settled by itself and stops no other message."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from uuid import UUID

from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import encode
from diator.events._event import message_name_of
from diator.instruments import Handled
from diator.retrying import RetryPolicy
from diator.testing._suite.environment import EnvironmentMissing
from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Foreign
from diator.testing.conformance._scenario import scenario

_RETRIES = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True)
_LETTERS = Capabilities(settlement="cumulative", dead_letter=True)
_LATER = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True, dead_letter=True)

_FOREIGN, _GOOD = -1, 10  # the number in each foreign message; how many good messages follow
_MARK = "lamprey"
_MAX_REASON_LENGTH = 1024
_MAX_LOG_LINES, _FLOOD = 30, 300


async def _handle(event: Happened) -> None:
    """Accept the event."""


@dataclass
class _Meeting:
    """A consumer that meets foreign messages among good ones."""

    ctx: Context
    run: ConsumerRun
    kind: Foreign
    foreign: int = 0
    good: set[UUID] = field(default_factory=set)

    async def store(self) -> None:
        """Store foreign messages, then good ones."""
        ctx, run = self.ctx, self.run
        body = encode(run.message(_FOREIGN), max_bytes=ctx.capabilities.max_message_bytes)
        self.foreign += await _send_foreign(ctx, run, self.kind, body)
        messages = [run.message(number) for number in range(_GOOD)]
        await ctx.send_all(run.broker, messages)
        self.good |= {message.message_id for message in messages}

    async def end(self) -> list[Handled]:
        """Wait until every message is settled, and return the foreign ones."""
        expected = self.foreign + len(self.good)
        await self.run.until_settled(expected)
        await asyncio.sleep(self.ctx.limits.quiet)  # nothing may come again
        settled = self.run.settled()
        self.ctx.check(self.run.consumer.health().connected, "the consumer has lost its connection")
        self.ctx.same(len(settled), expected, "the number of settled messages")
        longest = max(len(each.reason or "") for each in settled)
        self.ctx.check(longest <= _MAX_REASON_LENGTH, f"a reason has {longest:,} characters")
        return [each for each in settled if each.message_id not in self.good]


async def _send_foreign(ctx: Context, run: ConsumerRun, kind: Foreign, body: bytes) -> int:
    try:
        return await ctx.harness.send_foreign(run.broker, run.topic, run.group, kind, body)
    except EnvironmentMissing as missing:
        ctx.applies(holds=False, otherwise=str(missing))
        raise


async def _meet(ctx: Context, kind: Foreign, *, fails: bool = False) -> list[Handled]:
    """
    Let a consumer meet foreign messages of *kind*, some before it starts, the others while it runs.

    Check that it handles every good message exactly once, and settles every foreign one. Return the last outcomes of
    the foreign messages. With *fails*, their handler fails: each is requeued, and then dead-lettered.
    """
    seen: Counter[int] = Counter()

    async def handle(event: Happened) -> None:
        seen[event.number] += 1
        if fails and event.number == _FOREIGN:
            raise LookupError("a foreign message")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=int(fails), first_delay=0.01)
    run = ctx.consumer_run(await ctx.broker(), handle, retry=retry)
    meeting = _Meeting(ctx, run, kind)
    if run.group is not None and ctx.capabilities.subscription == "durable":
        async with ctx.reading(run.broker, run.topic, group=run.group):
            pass  # from now on the group collects messages
        await meeting.store()
    async with ctx.running(run):
        await meeting.store()
        foreign = await meeting.end()
    times = len(meeting.good) // _GOOD
    good = {number: count for number, count in seen.items() if number != _FOREIGN}
    ctx.same(good, dict.fromkeys(range(_GOOD), times), "how often the good messages were handled")
    return foreign


@scenario("FRN-01", "Metadata that cannot be decoded stops no other message", facilities=["foreign"])
async def metadata(ctx: Context) -> None:
    """Catch a client library that ends the connection because of a header that it cannot decode."""
    await _meet(ctx, "metadata")


@scenario(
    "FRN-02",
    "A message with headers that only another program writes can be requeued and dead-lettered",
    needs=_LATER,
    facilities=["foreign", "dead_letters"],
)
async def headers(ctx: Context) -> None:
    """Catch headers that can be received, but not sent again when their message is requeued or dead-lettered."""
    foreign = await _meet(ctx, "headers", fails=True)
    ctx.same({each.outcome for each in foreign}, {"dead_lettered"}, "the outcomes of the foreign messages")


@scenario(
    "FRN-03",
    "A message that is as large as the service takes is dead-lettered, whole or without its body",
    needs=_LETTERS,
    facilities=["foreign", "dead_letters"],
)
async def large(ctx: Context) -> None:
    """Catch a dead letter that the service refuses, because the reason makes it too large: it would come for ever."""
    foreign = await _meet(ctx, "large")
    ctx.same({each.outcome for each in foreign}, {"dead_lettered"}, "the outcomes of the foreign messages")


@scenario("FRN-04", "A count of attempts that another program wrote has no effect", facilities=["foreign"])
async def counters(ctx: Context) -> None:
    """Catch a sender that can have its message dead-lettered unhandled, or make the transport count wrongly."""
    foreign = await _meet(ctx, "counters")
    found = {(each.outcome, each.attempt) for each in foreign}
    ctx.same(found, {("acked", 1)}, "the outcomes and attempts of the foreign messages")


@scenario("FRN-05", "Compressed bodies stop no other message", facilities=["foreign"])
async def compressed(ctx: Context) -> None:
    """Catch a reader that cannot decompress, and reconnects for ever, or that decompresses without a limit."""
    await _meet(ctx, "compressed")


@scenario(
    "FRN-06",
    "A due time that another program wrote delays no retry",
    needs=_RETRIES,
    facilities=["foreign"],
)
async def due_times(ctx: Context) -> None:
    """Catch retries that wait behind one which is due in a thousand years, or whose due time cannot be decoded."""
    failed: set[int] = set()

    async def handle(event: Happened) -> None:
        if event.number != _FOREIGN and event.number not in failed:
            failed.add(event.number)
            raise LookupError("the first time")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.01)
    async with ctx.consuming(await ctx.broker(), handle, retry=retry) as run:
        for number in range(3):  # retries before, between and after the foreign ones
            message = run.message(number)
            await ctx.send_all(run.broker, [message])
            while run.outcomes_of([message]) != ["acked"]:
                await run.until_handled(len(run.handled) + 1)
            body = encode(run.message(_FOREIGN), max_bytes=ctx.capabilities.max_message_bytes)
            await _send_foreign(ctx, run, "due times", body)
        ctx.check(run.consumer.health().connected, "the consumer has lost its connection")


@scenario(
    "FRN-07",
    "A body that names another event than its topic calls no handler, and is dead-lettered",
    facilities=["raw"],
)
async def mismatch(ctx: Context) -> None:
    """Catch a body that chooses its handler: who may write to one topic could call the handlers of all topics."""
    seen: list[str] = []

    async def handle(event: Happened) -> None:
        seen.append(message_name_of(type(event)))

    broker = await ctx.broker()
    async with ctx.consuming(broker, handle, also=ctx.name("-other")) as run:
        other = run.message(topic=run.topics[1])
        wrong = [other, replace(other, message_name=_MARK), replace(run.message(), message_type="ecst_event")]
        for message in wrong:
            body = encode(message, max_bytes=ctx.capabilities.max_message_bytes)
            await ctx.harness.send_raw(broker, run.topic, body)
        await ctx.send_all(broker, [run.message(), run.message(topic=run.topics[1])])
        handled = await run.until_handled(5)
    ctx.same(sorted(seen), sorted(topic.message_name for topic in run.topics), "the handlers that ran")
    reasons = [each.reason or "" for each in handled if each.outcome != "acked"]
    ctx.same([reason.partition(":")[0] for reason in reasons], ["mismatch"] * len(wrong), "the reasons")
    ctx.check(not any(_MARK in reason for reason in reasons), f"a reason quotes the body: {reasons}")


@scenario(
    "FRN-08", "No reason and no log line contains content of a message, or a control character", facilities=["raw"]
)
async def reasons(ctx: Context) -> None:
    """Catch a sender that writes lines of its own into logs and dead letters, or fills them."""
    broker, records = await ctx.broker(), _Records()
    name = f"{_MARK}\n\x1b[31m2030-01-01 CRITICAL forged\r\x00\u2028" + "x" * 5_000
    async with ctx.consuming(broker, _handle) as run:
        envelope = json.loads(encode(run.message(), max_bytes=ctx.capabilities.max_message_bytes))
        bodies = [
            {**envelope, "payload": {**envelope["payload"], "number": name}},
            {**envelope, "payload": {name: 1}},
            {**envelope, "payload": {**envelope["payload"], "tags": {name: [name]}}},
            {**envelope, "message_id": name},
            {**envelope, "headers": {name: [name]}, "payload": name},
            {name: name},
            [name],
        ]
        with records:
            for body in bodies:
                await ctx.harness.send_raw(broker, run.topic, json.dumps(body).encode())
            await ctx.send_all(broker, [run.message()])
            handled = await run.until_handled(len(bodies) + 1)
    texts = [each.reason or "" for each in handled] + records.texts
    ctx.check(records.texts, "nothing was logged")
    for text in texts:
        ctx.check(_MARK not in text and "forged" not in text, f"content of a message in {text[:200]!r}")
        ctx.check(text.isprintable(), f"a control character in {text[:200]!r}")
    ctx.check(max(map(len, texts)) <= 2 * _MAX_REASON_LENGTH, "a text is too long")


@scenario(
    "FRN-09", "A flood of undecodable messages is settled one by one, and fills no log", facilities=["raw"], timeout=60
)
async def flood(ctx: Context) -> None:
    """Catch one log line for each message, when another program sends thousands that nobody can decode."""
    broker, records = await ctx.broker(), _Records()
    bodies = [b"{%d" % number for number in range(_FLOOD)]
    async with ctx.consuming(broker, _handle) as run:
        with records:
            for start in range(0, _FLOOD, 50):
                some = bodies[start : start + 50]
                await asyncio.gather(*(ctx.harness.send_raw(broker, run.topic, body) for body in some))
                await run.until_handled(start + 50)
            await ctx.send_all(broker, [run.message()])
            handled = await run.until_handled(_FLOOD + 1)
    bad = "dead_lettered" if ctx.capabilities.dead_letter else "given_up"
    found = Counter(each.outcome for each in handled)
    ctx.same(found, Counter({bad: _FLOOD, "acked": 1}), "the outcomes")
    ctx.check(len(records.texts) <= _MAX_LOG_LINES, f"{len(records.texts):,} log lines for {_FLOOD:,} messages")
    if ctx.capabilities.dead_letter and run.group is not None and "dead_letters" in ctx.harness.facilities:
        letters = await ctx.harness.dead_letters(broker, run.topic, run.group)
        ctx.same(sorted(letter.body for letter in letters), sorted(bodies), "the dead letters")


class _Records(logging.Handler):
    """What diator logs inside the block, at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("diator").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("diator").removeHandler(self)
