"""PSN: undecodable messages, failing handlers and dead letters."""

from __future__ import annotations

import asyncio
import json
import pickle
from dataclasses import dataclass
from uuid import uuid4

from diator.brokers.base import Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import encode
from diator.brokers.message import Message
from diator.events import NotificationEvent
from diator.instruments import Handled
from diator.retrying import PermanentError, RetryPolicy
from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_LETTERS = Capabilities(settlement="cumulative", dead_letter=True)
_COUNTED = Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True, delivery_count="retries"
)
_LATER = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True, dead_letter=True)


async def _handle(event: Happened) -> None:
    """Accept the event."""


def _bad(ctx: Context) -> str:
    return "dead_lettered" if ctx.capabilities.dead_letter else "given_up"


async def _raw(ctx: Context, broker: Transport, run: ConsumerRun, *bodies: bytes) -> list[Handled]:
    """Let the consumer handle *bodies*, each followed by a good message. Return the outcomes of the *bodies*."""
    for body in bodies:
        await ctx.harness.send_raw(broker, run.topic, body)
        await ctx.send_all(broker, [run.message()])
    handled = await run.until_handled(2 * len(bodies))
    good = {sent.message.message_id for sent in ctx.ledger.sent}
    outcomes = [each.outcome for each in handled if each.message_id in good]
    ctx.same(outcomes, ["acked"] * len(bodies), "the outcomes of the good messages among the bad ones")
    return [each for each in handled if each.message_id not in good]


@scenario(
    "PSN-01", "An undecodable message is dead-lettered with a reason, and the next one is handled", facilities=["raw"]
)
async def garbage(ctx: Context) -> None:
    """Catch a loop that ends with a message that it cannot decode, or acknowledges it silently."""
    broker = await ctx.broker()
    bodies = (
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xef\xbb\xbf{}",
        b"\x80\x04]q\x00.",
        b"x" * 70_000,
    )
    async with ctx.consuming(broker, _handle) as run:
        bad = await _raw(ctx, broker, run, *bodies)
    ctx.same([each.outcome for each in bad], [_bad(ctx)] * len(bodies), "the outcomes")
    other = [each.reason for each in bad if not (each.reason or "").startswith("undecodable")]
    ctx.same(other, [], "the reasons that do not begin with `undecodable`")


_ran: list[str] = []


def _run(how: str) -> None:
    """Record that code was run."""
    _ran.append(how)


class _Runs:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _run, ("pickle",)


@scenario("SEC-06", "A body that runs code in a careless reader is dead-lettered and runs nothing", facilities=["raw"])
async def runs_nothing(ctx: Context) -> None:
    """Catch a reader that unpickles or evaluates untrusted input."""
    pickles = [pickle.dumps(_Runs(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    texts = (
        f"!!python/object/apply:{__name__}._run [yaml]",
        f'{{"py/reduce": [{{"py/function": "{__name__}._run"}}, {{"py/tuple": ["jsonpickle"]}}]}}',
        f"__import__('{__name__}', fromlist=['_run'])._run('eval')",
    )
    _ran.clear()
    for body in pickles:
        pickle.loads(body)  # noqa: S301  # made above
    ctx.same(len(_ran), len(pickles), "the number of pickles that run code")
    _ran.clear()
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        bodies = [*pickles, *(text.encode() for text in texts)]
        bad = await _raw(ctx, broker, run, *bodies)
    ctx.same(_ran, [], "the code that was run")
    ctx.same([each.outcome for each in bad], [_bad(ctx)] * len(bodies), "the outcomes")
    other = [each.reason for each in bad if not (each.reason or "").startswith("undecodable")]
    ctx.same(other, [], "the reasons that do not begin with `undecodable`")


@scenario(
    "SEC-07", "One byte more than max_message_bytes is dead-lettered, whoever sent it", facilities=["raw"], timeout=30
)
async def larger_than_promised(ctx: Context) -> None:
    """Catch a limit that binds only senders that use diator."""
    broker, limit = await ctx.broker(), ctx.capabilities.max_message_bytes
    async with ctx.consuming(broker, _handle) as run:
        body = encode(run.message(), max_bytes=limit)
        largest = body + b" " * (limit - len(body))
        bad = await _raw(ctx, broker, run, largest + b" ")
        await ctx.harness.send_raw(broker, run.topic, largest)
        handled = await run.until_handled(3)
    ctx.same([each.outcome for each in bad], [_bad(ctx)], "the outcome of one byte more")
    ctx.same(handled[-1].outcome, "acked", "the outcome of the largest")


@scenario(
    "PSN-02", "A foreign envelope is dead-lettered, and an envelope of a newer version is read", facilities=["raw"]
)
async def envelopes(ctx: Context) -> None:
    """Catch a missing field that becomes a default, and a reader that refuses unknown fields."""
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        good = {"message_type": "notification_event", "message_name": run.topic.message_name,
                "message_id": str(uuid4()), "payload": {"number": 1, "tags": []}}  # fmt: skip
        wrong = {"message_type": 7, "message_name": None, "message_id": "no-uuid", "payload": "text", "headers": [1]}
        bodies = [json.dumps({**good, name: value}).encode() for name, value in wrong.items()]
        bodies += [json.dumps({key: good[key] for key in good if key != name}).encode() for name in good]
        bodies += [json.dumps({**good, "payload": {"number": "1", "tags": []}}).encode()]
        bodies += [json.dumps({**good, "payload": {"number": 1}}).encode()]
        bad = await _raw(ctx, broker, run, *bodies)
        newer = {**good, "version": 9, "payload": {"number": 1, "tags": [], "mood": "new"}}
        await ctx.harness.send_raw(broker, run.topic, json.dumps(newer).encode())
        handled = await run.until_handled(2 * len(bodies) + 1)
    ctx.same([each.outcome for each in bad], [_bad(ctx)] * len(bodies), "the outcomes of the wrong envelopes")
    ctx.same(handled[-1].outcome, "acked", "the outcome of the newer envelope")


@scenario(
    "PSN-04",
    "A message that always fails is retried as configured, then dead-lettered once",
    needs=_LATER,
    facilities=["dead_letters"],
)
async def exhausted(ctx: Context) -> None:
    """Catch a retry too many or too few, an endless loop, and a dead letter without its message."""
    broker, runs = await ctx.broker(), 0

    async def handle(event: Happened) -> None:
        nonlocal runs
        if event.number == 0:
            runs += 1
            raise LookupError("always")

    retry = RetryPolicy(immediate_retries=1, immediate_pause=0.0, delayed_retries=2, first_delay=0.01)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        failing = run.message(0)
        await ctx.send_all(broker, [failing, run.message(1)])
        handled = await run.until_handled(4)
    ctx.same(runs, 6, "the number of times it was handled")
    outcomes = [each.outcome for each in handled if each.message_id == failing.message_id]
    ctx.same(outcomes, ["retried", "retried", "dead_lettered"], "its outcomes")
    ctx.same(run.outcomes().count("acked"), 1, "the number of acknowledged messages")
    letters = await ctx.harness.dead_letters(broker, run.topic, run.group)
    reasons = [letter.reason.partition(" in ")[0] for letter in letters]
    ctx.same(reasons, ["retries-exhausted: LookupError"], "the reasons of the dead letters")
    ctx.check(str(failing.message_id).encode() in letters[0].body, "the dead letter is not the message")


@scenario("PSN-06", "A dead letter holds the message byte for byte", needs=_LETTERS, facilities=["dead_letters", "raw"])
async def letters_whole(ctx: Context) -> None:
    """Catch a dead letter from which the message cannot be sent again."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    bodies = [b"\x00\xff garbage", b"", b'{"a": 1}']
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send_all(broker, [ctx.message(topic, headers={"a": "ä"}, key="k")])
        for body in bodies:
            await ctx.harness.send_raw(broker, topic, body)
        received = await reader.take(4, settle="nothing")
        for each in received:
            await each.delivery.dead_letter("not wanted")
    letters = await ctx.harness.dead_letters(broker, topic, group)
    raw = [each.delivery.body for each in received if each.message is None]
    ctx.same(sorted(raw), sorted(bodies), "the delivered bodies")
    ctx.same([letter.body for letter in letters], [each.delivery.body for each in received], "the dead letters")


@scenario("PSN-07", "A handler that hangs, or cancels itself, counts as failed")
async def hangs(ctx: Context) -> None:
    """Catch a consumer that one handler can stop for good."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None:
        if event.number == 0:
            await asyncio.Event().wait()
        if event.number == 1:
            raise asyncio.CancelledError

    async with ctx.consuming(broker, handle, handler_timeout=0.05) as run:
        messages = [run.message(number) for number in range(3)]
        await ctx.send_all(broker, messages)
        await run.until_handled(3)
    ctx.same(run.outcomes_of(messages), [_bad(ctx), _bad(ctx), "acked"], "the outcomes")


@scenario("PSN-09", "A failing message does not block the other messages of its consumer", needs=_LATER)
async def blocks_nobody(ctx: Context) -> None:
    """Catch a queue that stands still behind a message that waits for its retry."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None:
        if event.number == 0:
            raise LookupError("always")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=60)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        await ctx.send_all(broker, [run.message(number) for number in range(5)])
        await run.until_handled(5)
    ctx.same(sorted(run.outcomes()), [*["acked"] * 4, "retried"], "the outcomes")


@scenario("PSN-10", "A handler that changed the event before it failed does not affect the retry", needs=_LATER)
async def fresh_each_time(ctx: Context) -> None:
    """Catch a retry that sees the changes of the failed attempt."""
    broker = await ctx.broker()
    seen: list[list[str]] = []

    async def handle(event: Happened) -> None:
        seen.append([*event.tags])
        event.tags.append("changed")
        if len(seen) < 4:  # noqa: PLR2004
            raise LookupError("again")

    retry = RetryPolicy(immediate_retries=1, immediate_pause=0.0, delayed_retries=1, first_delay=0.01)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        await ctx.send_all(broker, [run.message(tags=["a"])])
        await run.until_handled(2)
    ctx.same(seen, [["a"]] * 4, "the tags that the handler saw")


@scenario("PSN-11", "A payload nested 100,000 deep is dead-lettered, and the consumer continues")
async def nested(ctx: Context) -> None:
    """Catch a decoder that ends the process or the loop."""
    ctx.applies(ctx.capabilities.max_message_bytes >= 250_000, "such a message is too large")  # noqa: PLR2004
    broker, depth = await ctx.broker(), 100_000
    async with ctx.consuming(broker, _handle) as run:
        deep = Message(
            message_type="notification_event",
            message_name=run.topic.message_name,
            message_id=uuid4(),
            payload_json=b'{"number": 1, "tags": ' + b"[" * depth + b"]" * depth + b"}",
        )
        await ctx.send_all(broker, [deep, run.message()])
        await run.until_handled(2)
    ctx.same(sorted(run.outcomes()), sorted([_bad(ctx), "acked"]), "the outcomes")


@scenario("PSN-13", "A payload that does not fit its event class is dead-lettered if no retry is left")
async def misfit(ctx: Context) -> None:
    """Catch a message that is acknowledged although it cannot be decoded."""
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        messages = [run.message(number="one"), run.message(1)]  # type: ignore[arg-type]
        await ctx.send_all(broker, messages)
        handled = await run.until_handled(2)
    ctx.same(run.outcomes_of(messages), [_bad(ctx), "acked"], "the outcomes")
    [bad] = [each for each in handled if each.outcome != "acked"]
    ctx.check("$.number" in (bad.reason or ""), f"the reason does not name the field: {bad.reason}")


@scenario("PSN-14", "A permanent error is not retried")
async def permanent(ctx: Context) -> None:
    """Catch retries that cannot help."""
    broker, runs = await ctx.broker(), 0

    async def handle(event: Happened) -> None:
        nonlocal runs
        if event.number == 0:
            runs += 1
            raise PermanentError("it will never work")

    async with ctx.consuming(broker, handle, retry=None) as run:
        messages = [run.message(number) for number in range(2)]
        await ctx.send_all(broker, messages)
        await run.until_handled(2)
    ctx.same((runs, run.outcomes_of(messages)), (1, [_bad(ctx), "acked"]), "the runs and outcomes")


@dataclass(frozen=True, kw_only=True)
class _Renewed(NotificationEvent):
    """The event of a newer program: a field has another type."""

    number: str
    tags: list[str]


@scenario(
    "PSN-16",
    "What an older consumer of a group cannot decode is handled by a newer one",
    needs=_COUNTED,
)
async def rolling_deploy(ctx: Context) -> None:
    """Catch a message that is dead-lettered, changed or lost during a rolling deploy."""
    broker, name = await ctx.broker(), ctx.name("-event")
    got: list[str] = []

    async def handle(event: _Renewed) -> None:
        got.append(event.number)

    retry = RetryPolicy(first_delay=0.5)
    older = ctx.consumer_run(broker, _handle, name=name, retry=retry)
    newer = ctx.consumer_run(broker, handle, name=name, of=_Renewed, retry=retry)
    messages = [older.message(number="one"), older.message(1)]  # type: ignore[arg-type]
    async with ctx.running(older):
        await ctx.send_all(broker, messages)
        await older.until_handled(2)
    ctx.same(older.outcomes_of(messages), ["retried", "acked"], "the outcomes of the older consumer")
    async with ctx.running(newer):
        handled = await newer.until_handled(1)
    ctx.same(got, ["one"], "what the handler of the newer consumer received")
    ctx.same(
        [(each.message_id, each.attempt, each.outcome) for each in handled],
        [(messages[0].message_id, 2, "acked")],
        "the deliveries of the newer consumer",
    )


@scenario("PSN-15", "A consumer configured for a retry that is not promised is refused")
async def refused_retry(ctx: Context) -> None:
    """Catch a retry policy that is accepted and never carried out."""
    from diator.exceptions import UnsupportedCapability  # noqa: PLC0415

    broker = await ctx.broker()
    promised = ctx.capabilities.delayed_retry
    try:
        ctx.consumer_run(broker, _handle, retry=RetryPolicy(delayed_retries=1))
    except UnsupportedCapability as refused:
        ctx.check(not promised and "delayed" in str(refused), f"the policy is refused: {refused}")
    else:
        ctx.check(promised, "the policy is accepted, although delayed retries are not promised")
    ctx.check(
        ctx.consumer_run(broker, _handle, retry=RetryPolicy(delayed_retries=0)),
        "a policy without delayed retries is refused",
    )
