"""HDR: the headers, the key and the id of a message."""

from __future__ import annotations

from collections.abc import Mapping

from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import decode
from diator.exceptions import BrokerError, EncodingError
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
