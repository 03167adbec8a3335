"""Sizes, SIZ-01 and on: the size of messages and headers."""

from __future__ import annotations

from uuid import uuid4

from diator.brokers.base import Topic
from diator.brokers.codec import encode
from diator.brokers.message import Message
from diator.exceptions import MessageRejected, MessageTooLarge
from diator.testing._suite.errors import Nonconformance
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


def _sized(ctx: Context, topic: Topic, size: int) -> Message:
    """Return a message of *size* encoded bytes."""
    empty = encode(_padded(topic, 0), max_bytes=ctx.capabilities.max_message_bytes)
    return _padded(topic, size - len(empty))


def _padded(topic: Topic, length: int) -> Message:
    return Message(
        message_type=topic.message_type,
        message_name=topic.message_name,
        message_id=uuid4(),
        payload_json=b'{"pad":"' + b"x" * length + b'"}',
    )


@scenario("SIZ-01", "Messages of sizes around every usual buffer arrive unchanged")
async def sizes(ctx: Context) -> None:
    """Catch a buffer that is truncated, or a length that overflows."""
    broker, topic = await ctx.broker(), ctx.topic()
    wanted = [0, 1, 4_095, 4_096, 16_384, 65_535, 65_536, 131_072, 500_000, 900_000]
    messages = [_padded(topic, size) for size in wanted if size + 1_000 < ctx.capabilities.max_message_bytes]
    ctx.check(len(messages) > 1, "max_message_bytes allows not even 1,001 bytes")
    async with ctx.reading(broker, topic) as reader:
        received = await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify()
    arrived = {each.id: each.message for each in received}
    changed = [len(message.payload_json) for message in messages if arrived[message.message_id] != message]
    ctx.same(changed, [], "the sizes of the messages that did not arrive unchanged")


@scenario("SIZ-02", "A message of exactly max_message_bytes is delivered")
async def largest(ctx: Context) -> None:
    """Catch a limit that is promised and not kept."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = _sized(ctx, topic, ctx.capabilities.max_message_bytes)
    async with ctx.reading(broker, topic) as reader:
        try:
            await ctx.send_all(broker, [message])
        except MessageRejected as error:
            limit = ctx.capabilities.max_message_bytes
            raise Nonconformance(f"a message of the promised {limit:,} bytes was refused") from error
        received = await reader.until_fence()
    ctx.ledger.compare(reader.name, [message]).verify()
    ctx.check(received[0].message == message, "the message did not arrive unchanged")


@scenario("SIZ-03", "One byte more is refused before it is sent, and the broker keeps working")
async def too_large(ctx: Context) -> None:
    """Catch a message that costs the connection, or that the service drops."""
    broker, topic, limit = await ctx.broker(), ctx.topic(), ctx.capabilities.max_message_bytes
    message = _sized(ctx, topic, limit + 1)
    async with ctx.reading(broker, topic) as reader:
        refused = await ctx.raises(MessageTooLarge, ctx.send_all(broker, [message]), "sending one byte too many")
        ctx.same((refused.size, refused.limit, refused.message_id), (limit + 1, limit, message.message_id), "the error")
        good = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, [message, *good]).verify()


@scenario("SIZ-04", "100 headers and one header of 4 KiB arrive")
async def headers(ctx: Context) -> None:
    """Catch a limit of the service on headers that nobody has declared."""
    broker, topic = await ctx.broker(), ctx.topic()
    sent = {f"header-{number}": "v" * 40 for number in range(100)} | {"long": "x" * 4096}
    async with ctx.reading(broker, topic) as reader:
        await ctx.send_all(broker, [ctx.message(topic, headers=sent)])
        received = await reader.until_fence()
    ctx.same(received[0].message and received[0].message.headers, sent, "the headers")


@scenario("SIZ-05", "Large messages do not hold up small ones")
async def small_beside_large(ctx: Context) -> None:
    """Catch a connection that one large message blocks for long."""
    broker, big, small = await ctx.broker(), ctx.topic(), ctx.topic()
    size = min(900_000, ctx.capabilities.max_message_bytes - 1_000)
    large = [_padded(big, size) for _ in range(5)]
    async with ctx.reading(broker, big) as much, ctx.reading(broker, small) as reader:
        sending, reading = ctx.start(ctx.send_all(broker, large)), ctx.start(much.take(5))
        for number in range(5):
            await ctx.send(broker, small, start=number)
            await ctx.within(2 * ctx.limits.lag, reader.take(1), "a small message beside large ones")
        await sending
        await reading
    ctx.ledger.compare(much.name, large).verify()
