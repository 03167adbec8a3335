"""PSN: messages that cannot be handled."""

from __future__ import annotations

import asyncio
import json
import pickle
from uuid import uuid4

from diator._handling import Handled
from diator.brokers.base import Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import encode
from diator.brokers.message import Message
from diator.retrying import PermanentError, RetryPolicy
from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_LETTERS = Capabilities(settlement="cumulative", dead_letter=True)
_LATER = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True, dead_letter=True)


async def _handle(event: Happened) -> None:
    """Nothing is wrong with it."""


def _bad(ctx: Context) -> str:
    return "dead_lettered" if ctx.capabilities.dead_letter else "given_up"


async def _raw(ctx: Context, broker: Transport, run: ConsumerRun, *bodies: bytes) -> list[Handled]:
    """Have *bodies* consumed, each followed by a good message; give what became of the former."""
    for body in bodies:
        await ctx.harness.send_raw(broker, run.topic, body)
        await ctx.send_all(broker, [run.message()])
    handled = await run.until_handled(2 * len(bodies))
    good = [each.outcome for each in handled if each.outcome == "acked"]
    ctx.same(len(good), len(bodies), "how many good messages were handled beside the bad ones")
    return [each for each in handled if each.outcome != "acked"]


@scenario("PSN-01", "garbage is put aside with a reason, and the next message is handled", facilities=["raw"])
async def garbage(ctx: Context) -> None:
    """Catches a loop that dies of what it cannot read, or that acknowledges it without a word."""
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
    ctx.check(
        all((each.reason or "").startswith("undecodable") for each in bad), f"the reasons: {[e.reason for e in bad]}"
    )


_ran: list[str] = []


def _run(how: str) -> None:
    """Leave a trace."""
    _ran.append(how)


class _Runs:
    """Something that runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _run, ("pickle",)


@scenario(
    "SEC-06", "a body that runs something in a careless reader is put aside, and runs nothing", facilities=["raw"]
)
async def runs_nothing(ctx: Context) -> None:
    """Catches a reader that unpickles, or evaluates, what anybody may have sent."""
    pickles = [pickle.dumps(_Runs(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    texts = (
        f"!!python/object/apply:{__name__}._run [yaml]",
        f'{{"py/reduce": [{{"py/function": "{__name__}._run"}}, {{"py/tuple": ["jsonpickle"]}}]}}',
        f"__import__('{__name__}', fromlist=['_run'])._run('eval')",
    )
    _ran.clear()
    for body in pickles:
        pickle.loads(body)  # noqa: S301  # its own
    ctx.same(len(_ran), len(pickles), "how many of the pickles run something")
    _ran.clear()
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        bodies = [*pickles, *(text.encode() for text in texts)]
        bad = await _raw(ctx, broker, run, *bodies)
    ctx.same(_ran, [], "what was run")
    ctx.same([each.outcome for each in bad], [_bad(ctx)] * len(bodies), "the outcomes")
    ctx.check(
        all((each.reason or "").startswith("undecodable") for each in bad), f"the reasons: {[e.reason for e in bad]}"
    )


@scenario(
    "SEC-07", "one byte more than max_message_bytes is put aside, whoever sent it", facilities=["raw"], timeout=30
)
async def larger_than_promised(ctx: Context) -> None:
    """Catches a limit that binds only those who send by this library."""
    broker, limit = await ctx.broker(), ctx.capabilities.max_message_bytes
    async with ctx.consuming(broker, _handle) as run:
        body = encode(run.message(), max_bytes=limit)
        largest = body + b" " * (limit - len(body))
        bad = await _raw(ctx, broker, run, largest + b" ")
        await ctx.harness.send_raw(broker, run.topic, largest)
        handled = await run.until_handled(3)
    ctx.same([each.outcome for each in bad], [_bad(ctx)], "the outcome of one byte more")
    ctx.same(handled[-1].outcome, "acked", "the outcome of the largest")


@scenario("PSN-02", "an envelope that is not ours is put aside, one of a newer version is read", facilities=["raw"])
async def envelopes(ctx: Context) -> None:
    """Catches a missing field that becomes a default, and a reader that refuses what it does not know yet."""
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
    ctx.same([each.outcome for each in bad], [_bad(ctx)] * len(bodies), "the outcomes of what is wrong")
    ctx.same(handled[-1].outcome, "acked", "the outcome of what is newer")


@scenario("PSN-03", "a message of an unknown name is put aside with its name", facilities=["raw"])
async def unknown_type(ctx: Context) -> None:
    """Catches a crash, or a silent acknowledgement, when another service is newer."""
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        other = {
            "message_type": "notification_event",
            "message_name": "Elsewhere",
            "message_id": str(uuid4()),
            "payload": {},
        }
        bad = await _raw(ctx, broker, run, json.dumps(other).encode())
    ctx.same([each.outcome for each in bad], [_bad(ctx)], "the outcome")
    ctx.check("Elsewhere" in (bad[0].reason or ""), f"the reason: {bad[0].reason}")


@scenario(
    "PSN-04",
    "what always fails is handled as often as it was said, and then put aside once",
    needs=_LATER,
    facilities=["dead_letters"],
)
async def exhausted(ctx: Context) -> None:
    """Catches a retry too many or too few, a loop without end, and a dead letter without its message."""
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
    ctx.same(runs, 6, "how often it was handled")
    outcomes = [each.outcome for each in handled if each.message_id == failing.message_id]
    ctx.same(outcomes, ["retried", "retried", "dead_lettered"], "its outcomes")
    ctx.same(run.outcomes().count("acked"), 1, "how many were acknowledged")
    letters = await ctx.harness.dead_letters(broker, run.topic, run.group)
    ctx.same([letter.reason for letter in letters], ["retries-exhausted: LookupError"], "what is aside")
    ctx.check(str(failing.message_id).encode() in letters[0].body, "the dead letter is not the message")


@scenario(
    "PSN-06", "what was put aside is the message, byte for byte", needs=_LETTERS, facilities=["dead_letters", "raw"]
)
async def letters_whole(ctx: Context) -> None:
    """Catches a dead letter from which the message cannot be sent again."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    bodies = [b"\x00\xff garbage", b"", b'{"a": 1}']
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send_all(broker, [ctx.message(topic, headers={"a": "ä"}, key="k")])
        for body in bodies:
            await ctx.harness.send_raw(broker, topic, body)
        received = await reader.take(4, settle="nothing")
        for each in received:
            await each.delivery.dead_letter("put aside")
    letters = await ctx.harness.dead_letters(broker, topic, group)
    raw = [each.delivery.body for each in received if each.message is None]
    ctx.same(sorted(raw), sorted(bodies), "what was delivered")
    ctx.same([letter.body for letter in letters], [each.delivery.body for each in received], "what is aside")


@scenario("PSN-07", "a handler that hangs, or cancels itself, is a handler that fails")
async def hangs(ctx: Context) -> None:
    """Catches a consumer that one handler can stop for good."""
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


@scenario("PSN-09", "a message that fails does not block the other topics of its consumer", needs=_LATER)
async def blocks_nobody(ctx: Context) -> None:
    """Catches a queue that stands still behind what is to be handled later."""
    broker = await ctx.broker()

    async def handle(event: Happened) -> None:
        if event.number == 0:
            raise LookupError("always")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=60)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        await ctx.send_all(broker, [run.message(number) for number in range(5)])
        await run.until_handled(5)
    ctx.same(sorted(run.outcomes()), [*["acked"] * 4, "retried"], "the outcomes")


@scenario("PSN-10", "a handler that changed the event before it failed changed nothing", needs=_LATER)
async def fresh_each_time(ctx: Context) -> None:
    """Catches a retry that sees what the failed attempt left behind."""
    broker = await ctx.broker()
    seen: list[list[str]] = []

    async def handle(event: Happened) -> None:
        seen.append([*event.tags])
        event.tags.append("spoilt")
        if len(seen) < 4:  # noqa: PLR2004
            raise LookupError("again")

    retry = RetryPolicy(immediate_retries=1, immediate_pause=0.0, delayed_retries=1, first_delay=0.01)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        await ctx.send_all(broker, [run.message(tags=["a"])])
        await run.until_handled(2)
    ctx.same(seen, [["a"]] * 4, "what the handler saw")


@scenario("PSN-11", "a payload nested 100,000 deep is put aside, and the loop goes on")
async def nested(ctx: Context) -> None:
    """Catches a decoder that ends the process, or the loop."""
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


@scenario("PSN-13", "a payload that does not fit its event is put aside at once")
async def misfit(ctx: Context) -> None:
    """Catches a message that is handled again and again although nobody can ever read it."""
    broker = await ctx.broker()
    async with ctx.consuming(broker, _handle) as run:
        messages = [run.message(number="one"), run.message(1)]  # type: ignore[arg-type]
        await ctx.send_all(broker, messages)
        handled = await run.until_handled(2)
    ctx.same(run.outcomes_of(messages), [_bad(ctx), "acked"], "the outcomes")
    reasons = [each.reason for each in handled if each.reason]
    ctx.check("$.number" in reasons[0], f"the reason does not name the field: {reasons}")


@scenario("PSN-14", "a permanent error is not tried again")
async def permanent(ctx: Context) -> None:
    """Catches retries that cannot help."""
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


@scenario("PSN-15", "a consumer wired for a retry that is not promised is refused")
async def refused_retry(ctx: Context) -> None:
    """Catches a policy that is accepted and never carried out."""
    from diator.exceptions import UnsupportedCapability  # noqa: PLC0415

    broker = await ctx.broker()
    promised = ctx.capabilities.delayed_retry
    try:
        ctx.consumer_run(broker, _handle, retry=RetryPolicy(delayed_retries=1))
    except UnsupportedCapability as refused:
        ctx.check(not promised and "delayed" in str(refused), f"it is refused: {refused}")
    else:
        ctx.check(promised, "it is accepted, and not promised")
    ctx.check(ctx.consumer_run(broker, _handle, retry=RetryPolicy(delayed_retries=0)), "without it, it is refused")
