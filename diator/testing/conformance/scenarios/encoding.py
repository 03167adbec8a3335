"""ENC: the content of a message arrives unchanged."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from uuid import uuid4

from diator.brokers.base import Topic
from diator.brokers.message import Message
from diator.exceptions import BrokerError, ConfigurationError, EncodingError
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


async def _arrives(ctx: Context, topic: Topic, payloads: list[bytes]) -> None:
    """Send each of *payloads* and check that it arrives byte for byte."""
    broker = await ctx.broker()
    messages = [
        Message(
            message_type=topic.message_type, message_name=topic.message_name, message_id=uuid4(), payload_json=payload
        )
        for payload in payloads
    ]
    async with ctx.reading(broker, topic) as reader:
        received = await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify()
    arrived = {each.id: each.message.payload_json for each in received if each.message}
    for message in messages:
        ctx.same(arrived[message.message_id], message.payload_json, "a payload")


@scenario("ENC-01", "Every character that JSON can hold arrives, also text that looks like a protocol")
async def characters(ctx: Context) -> None:
    """Catch a transport that treats content as commands, lines or C strings."""
    texts = [
        "".join(map(chr, range(256))),
        "\x00",
        "a\x00b",
        "\r\n*1\r\n$4\r\nPING\r\n",
        "\xce",
        "PUBLISH x y",
        "%s %d {}",
    ]
    await _arrives(ctx, ctx.topic(), [json.dumps({"text": text}).encode() for text in texts])


@scenario("ENC-02", "An empty payload is delivered as an empty payload")
async def empty(ctx: Context) -> None:
    """Catch a transport that mistakes an empty payload for no message."""
    await _arrives(ctx, ctx.topic(), [b"{}", b'{"a":""}', b'{"a":null}', b'{"a":[]}', b'{"":{}}'])


@scenario("ENC-03", "Text keeps its code points")
async def code_points(ctx: Context) -> None:
    """Catch Unicode normalisation, and encodings that cover only a part of Unicode."""
    texts = ["\u00e9", "e\u0301", "\U0001f600\U0001d11e", "\u05e9\u05dc\u05d5\u05dd", "a\u200bb\ufeff", "\uffff"]
    await _arrives(ctx, ctx.topic(), [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts])


@scenario("ENC-04", "Numbers keep their digits")
async def numbers(ctx: Context) -> None:
    """Catch a payload that is parsed and encoded again on its way."""
    digits = ["9007199254740993", "123456789012345678901234567890", "-0.0", "1e400", "0.1000", "1E2", "1.0"]
    payloads = [f'{{"n":{each}}}'.encode() for each in digits]
    await _arrives(ctx, ctx.topic(), [*payloads, b'{"b":1,"a":2,"b":3}', b'{ "spaced" : [ 1 , 2 ] }'])


@scenario("ENC-06", "Unusual topic names are kept apart or refused")
async def names(ctx: Context) -> None:
    """Catch different names that become the same destination."""
    broker, base = await ctx.broker(), ctx.name()
    tails = (
        "",
        "'",
        "a.b",
        "a_b",
        "a-b",
        "a b",
        "a/b",
        "a:b",
        "A.B",
        "ä",
        "a\u0308",
        "*",
        "a*",
        "#",
        ">",
        "%",
        "x" * 100,
    )
    messages = [ctx.message(Topic("notification_event", base + tail)) for tail in tails]
    accepted = 0
    async with AsyncExitStack() as stack:
        readers = []
        for message in messages:
            try:
                topic = Topic(message.message_type, message.message_name)
                readers.append((await stack.enter_async_context(ctx.reading(broker, topic)), message))
            except (BrokerError, EncodingError, ConfigurationError):
                continue  # a transport may refuse the name
        await ctx.send_all(broker, [message for _, message in readers])
        for reader, message in readers:
            await reader.until_fence()
            ctx.ledger.compare(reader.name, [message]).verify()
            accepted += 1
    ctx.check(accepted > 0, "every name was refused, also the plain one")


_GOLDEN = b'{"message_type":"notification_event","message_name":"%s","message_id":"%s","payload":{"number":1}}'


@scenario("ENC-07", "The body is the JSON object that every version of diator writes")
async def wire_format(ctx: Context) -> None:
    """Catch a transport with its own envelope, which no other program can read."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        (message,) = await ctx.send(broker, topic, start=1)
        delivery = (await reader.take(1))[0].delivery
    values = topic.message_name.encode(), str(message.message_id).encode()
    ctx.same(delivery.body, _GOLDEN % values, "the body")


@scenario("ENC-08", "A received message equals the sent message")
async def round_trip(ctx: Context) -> None:
    """Catch a field that is lost, set to a default or renamed on its way."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [
        ctx.message(topic, 1),
        ctx.message(topic, 2, key="a key"),
        ctx.message(topic, 3, headers={"a": "b"}),
        ctx.message(topic, 4, key="", headers={"": ""}),
        ctx.message(
            topic, 5, key="\u00e4\u0000\U0001f600", headers={"\u00e4": "\U0001f600"}, nested={"a": [1, None, True]}
        ),
    ]
    async with ctx.reading(broker, topic) as reader:
        await ctx.send_all(broker, messages)
        received = await reader.until_fence()
    by_id = {each.id: each.message for each in received}
    for message in messages:
        ctx.same(by_id.get(message.message_id), message, "the message")
