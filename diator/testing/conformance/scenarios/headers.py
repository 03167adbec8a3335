"""HDR: the headers, the key and the id of a message."""

from __future__ import annotations

from collections.abc import Mapping

from diator.brokers.base import Transport
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import decode
from diator.context import MessageContext, current_message
from diator.events import EventEmitter, WithHeaders
from diator.exceptions import BrokerError, EncodingError
from diator.retrying import RetryPolicy
from diator.testing.conformance._consuming import ConsumerRun, Happened
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario

_RETRY = Capabilities(settlement="cumulative", redelivery=frozenset({"retry"}))


async def _arrive(ctx: Context, *all_headers: Mapping[str, str]) -> None:
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, headers=headers) for headers in all_headers]
    async with ctx.reading(broker, topic) as reader:
        await ctx.send_all(broker, messages)
        received = await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    arrived = {each.id: each.message.headers for each in received if each.message}
    for message in messages:
        ctx.same(arrived[message.message_id], message.headers, "the headers")


@scenario("HDR-01", "Exactly the headers that were sent arrive")
async def exactly(ctx: Context) -> None:
    """Catch headers that are lost, added, or left over from the previous message."""
    await _arrive(ctx, {"a": "1", "b": "2"}, {}, {"c": "3"}, {"a": "4"})


@scenario("HDR-02", "Headers may be Unicode, empty, long, or differ only in case")
async def any_text(ctx: Context) -> None:
    """Catch headers that are case-folded, stripped or reduced to ASCII."""
    await _arrive(
        ctx, {"ünï": "cödé \U0001f600", "empty": "", "long": "x" * 2_000}, {"Case": "1", "case": "2", "CASE": "3"},
        {" padded ": "  yes  "},
    )  # fmt: skip


@scenario("HDR-03", "No header is mistaken for a field of the message")
async def no_forgery(ctx: Context) -> None:
    """Catch a header whose name turns it into the key, the id or the type."""
    broker = await ctx.broker()
    for name in ("key", "message_id", "message_name", "message_type", "payload", "body", "attempt", "id"):
        topic = ctx.topic()
        message = ctx.message(topic, headers={name: "forged"})
        async with ctx.reading(broker, topic) as reader:
            try:
                await ctx.send_all(broker, [message])
            except (BrokerError, EncodingError):
                continue  # a transport may refuse the name
            received = await reader.until_fence()
        ctx.same([each.message for each in received], [message], f"a message with a header {name!r}")


@scenario("HDR-04", "A redelivered message keeps its id", needs=_RETRY)
async def stable_id(ctx: Context) -> None:
    """Catch a redelivery that a consumer cannot recognise."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = ctx.message(topic, key="k", headers={"a": "1"})
    async with ctx.reading(broker, topic, group=ctx.name()) as reader:
        await ctx.send_all(broker, [message])
        bodies = []
        for _ in range(3):
            received = await reader.next()
            bodies.append(received.message)
            await received.delivery.retry()
        await reader.take(1)
    ctx.same(bodies, [message] * 3, "the redelivered messages")


@scenario("HDR-06", "Trace context arrives, and none is made up")
async def trace_context(ctx: Context) -> None:
    """Catch a transport that adds a trace of its own."""
    traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1,b=2"}
    await _arrive(ctx, traced, {})


@scenario("HDR-07", "Line ends and NUL characters in headers are kept as data, or refused")
async def injection(ctx: Context) -> None:
    """Catch a value that ends its header, or the command that carries it."""
    broker = await ctx.broker()
    for value in ("a\r\nb: c", "\n", "\x00", "\r\n*1\r\n$8\r\nFLUSHALL\r\n", "\xce", "a=b;c"):
        topic = ctx.topic()
        message = ctx.message(topic, headers={"h": value, f"n{value}": "h"})
        async with ctx.reading(broker, topic) as reader:
            try:
                await ctx.send_all(broker, [message])
            except (BrokerError, EncodingError):
                continue
            received = await reader.until_fence()
        ctx.same([each.message for each in received], [message], "the message")


@scenario("HDR-09", "A subscriber that changes a message does not affect another subscriber")
async def apart(ctx: Context) -> None:
    """Catch one object that is delivered to all subscribers."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as one, ctx.reading(broker, topic) as two:
        message = ctx.message(topic, headers={"a": "1"})
        await ctx.send_all(broker, [message])
        (first,) = await one.until_fence()
        if isinstance(first.delivery.headers, dict):
            first.delivery.headers["a"] = "changed"
        first.delivery.body = b"changed"
        (second,) = await two.until_fence()
    ctx.check(second.delivery is not first.delivery, "both subscribers have the same delivery object")
    read = decode(second.delivery.body, max_bytes=2**31, headers=second.delivery.headers)
    ctx.same((read, second.message), (message, message), "the message of the second subscriber")


@scenario("HDR-11", "The key of a message arrives, and not as a header")
async def key(ctx: Context) -> None:
    """Catch a key that orders at the sender and does not reach the consumer."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [ctx.message(topic, number, key=each) for number, each in enumerate(("a", "b", None, "Ü\n", "a"))]
    async with ctx.reading(broker, topic) as reader:
        await ctx.send_all(broker, messages)
        received = await reader.until_fence()
    arrived = {each.id: each.message for each in received}
    for message in messages:
        ctx.same(arrived.get(message.message_id), message, "the message")


# -- with a consumer -------------------------------------------------------------------------------------------------

_HEADERS = {"tenant": "42", "region": "Zürich", "empty": ""}
_COUNTS = Capabilities(
    settlement="cumulative", redelivery=frozenset({"retry"}), delayed_retry=True, delivery_count="retries"
)


async def _emit(broker: Transport, run: ConsumerRun, count: int = 1) -> dict[str, int]:
    """Emit events with headers from a source and of their own. Return the number of each event, by its id."""
    event_type = type("Emitted", (Happened,), {"message_name": run.topic.message_name, "message_key": "number"})
    emitter = EventEmitter(message_broker=broker, headers=[lambda _: _HEADERS])
    numbers: dict[str, int] = {}
    for number in range(count):
        event = event_type(number=number, tags=[])
        numbers[str(event.event_id)] = number
        await emitter.emit(WithHeaders(event, {"number": str(number)}))
    return numbers


def _shown(context: MessageContext | None) -> object:
    """Return what a context shows that is the same in each delivery of a message."""
    if context is None:
        return "no context"
    sent = {name: context.headers.get(name) for name in (*_HEADERS, "number")}
    return {
        "headers": sent,
        "key": context.key,
        "topic": context.topic,
        "group": context.group,
        "correlation_id": context.correlation_id,
    }


def _expected(run: ConsumerRun, message_id: str, number: int) -> object:
    return {
        "headers": {**_HEADERS, "number": str(number)},
        "key": str(number),
        "topic": run.topic,
        "group": run.group,
        "correlation_id": message_id,
    }


@scenario("HDR-12", "The context of each handler shows the headers, key and group of its own message")
async def contexts(ctx: Context) -> None:
    """Catch headers that are lost between an emitter and a handler, or that are those of another message."""
    broker = await ctx.broker()
    seen: dict[int, object] = {}

    async def handle(event: Happened) -> None:
        seen[event.number] = _shown(current_message())

    async with ctx.consuming(broker, handle, concurrency=4) as run:
        numbers = await _emit(broker, run, 12)
        await run.until_settled(12)
    expected = {number: _expected(run, message_id, number) for message_id, number in numbers.items()}
    ctx.same(seen, expected, "what the handlers know about their messages")


@scenario("HDR-13", "A retry and a redelivery show the headers and the key of the message", needs=_COUNTS)
async def contexts_of_retries(ctx: Context) -> None:
    """Catch headers that do not survive the way of a retry."""
    broker = await ctx.broker()
    seen: list[object] = []
    attempts: list[tuple[int, bool]] = []

    async def handle(_: Happened) -> None:
        context = current_message()
        seen.append(_shown(context))
        if context is not None:
            attempts.append((context.attempt, context.redelivered))
        if len(seen) < 3:  # noqa: PLR2004  # once at once, once later
            raise LookupError("the handler fails")

    retry = RetryPolicy(immediate_retries=0, delayed_retries=2, first_delay=0.05)
    async with ctx.consuming(broker, handle, retry=retry) as run:
        [(message_id, number)] = (await _emit(broker, run)).items()
        await run.until_settled(1)
    ctx.same(seen, [_expected(run, message_id, number)] * 3, "what the handlers know about their message")
    ctx.same(attempts, [(1, False), (2, True), (3, True)], "the attempts, and whether it was delivered before")


@scenario(
    "HDR-14",
    "A dead letter of a consumer has the headers of its message",
    needs=Capabilities(settlement="cumulative", dead_letter=True),
    facilities=["dead_letters"],
)
async def dead_letters(ctx: Context) -> None:
    """Catch headers that are lost, or replaced by those of another message, in the dead-letter queue."""
    broker = await ctx.broker()

    async def handle(_: Happened) -> None:
        raise LookupError("the handler fails")

    async with ctx.consuming(broker, handle) as run:
        numbers = await _emit(broker, run, 3)
        await run.until_settled(3)
    letters = await ctx.harness.dead_letters(broker, run.topic, run.group)
    messages = [decode(letter.body, headers=letter.headers) for letter in letters]
    found = [{name: message.headers.get(name) for name in (*_HEADERS, "number")} for message in messages]
    expected = [{**_HEADERS, "number": str(number)} for number in numbers.values()]
    ctx.same(sorted(found, key=str), sorted(expected, key=str), "the headers of the dead letters")
