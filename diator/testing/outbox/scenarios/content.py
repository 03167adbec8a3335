"""STO-DAT: a message comes back byte for byte."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

from diator.brokers.message import Message
from diator.exceptions import EncodingError
from diator.testing.outbox._context import Context
from diator.testing.outbox._scenario import scenario

_TEXTS = [
    "",
    " ",
    "a",
    "A",
    "a ",
    " a",
    "null",
    "ü",
    "u\u0308",
    "ß",
    "日本語",
    "😀",
    "\n\t\r",
    "\x7f\u2028\ufeff",
    "'; DROP TABLE messages; --",
    '"quoted"',
    "\\",
    "\\u0000",
    "\\n",
    "%s %(x)s {} {0} :name $1 ? ?? @x",
    "{1,2}",
    "x" * 1_000,
]
"""Texts that are valid, and that a database, a driver or a quoting function may change."""

_PAYLOADS = [
    b"{}",
    b' {\n\t"a" :  1 }\r\n',
    b'{"b":1,"a":2}',
    b'{"a":1,"a":2}',
    b'{"n":1.0}',
    b'{"n":-0}',
    b'{"n":1e400}',
    b'{"n":1E+2}',
    b'{"n":123456789012345678901234567890}',
    b'{"n":0.1000000000000000055511151231257827}',
    b'{"t":"\\u0000"}',
    b'{"t":"\\ud800"}',
    b'{"t":"\\u00fc\\/"}',
    b'{"":""}',
    '{"t":"ü u\u0308 😀 \u2028 \x7f"}'.encode(),
    b'{"t":"\'\\"\\\\ %s :name $1 ? {} --"}',
    b'{"deep":' + b"[" * 200 + b"]" * 200 + b"}",
]


async def _stored(ctx: Context, messages: list[Message], what: str) -> None:
    """Store *messages*, and compare them with what is claimed."""
    await ctx.add(*messages)
    claim = await ctx.claim()
    ctx.same([row.message.message_id for row in claim.rows], [each.message_id for each in messages], "the claimed ids")
    for row, message in zip(claim.rows, messages, strict=True):
        ctx.same_message(row.message, message, f"a message with {what}")


@scenario("STO-DAT-01", "The payload comes back byte for byte")
async def payloads(ctx: Context) -> None:
    """Catch a store that parses the payload: spaces, the order of fields, 1.0 or a field that stands twice change."""
    for payload in _PAYLOADS:
        message = replace(ctx.message(), payload_json=payload)
        await _stored(ctx, [message], f"the payload {payload[:60]!r}")


@scenario("STO-DAT-02", "The key comes back as it was, or as None")
async def keys(ctx: Context) -> None:
    """Catch a store that changes keys, or takes an empty one for none."""
    await _stored(ctx, [ctx.message(key=key) for key in [*_TEXTS, None]], "a key")


@scenario("STO-DAT-03", "Headers come back as they were, in their order")
async def headers(ctx: Context) -> None:
    """Catch a store that changes values or the order of headers."""
    many = {f"header-{number}": "x" for number in reversed(range(50))}
    values = [{"z": each, "a": each} for each in _TEXTS]
    await _stored(ctx, [ctx.message(headers=each) for each in [*values, many, {}, {"ü": "😀"}]], "headers")


@scenario("STO-DAT-04", "Id, type, name and time come back as they were")
async def fields(ctx: Context) -> None:
    """Catch a store that keeps no time, cuts it to seconds, or shifts it by its offset."""
    east = timezone(timedelta(hours=5, minutes=30))
    times = [None, datetime(2026, 7, 1, 12, 30, 15, 123456, UTC), datetime(2026, 1, 2, 3, 4, 5, 678901, east)]
    messages = [replace(ctx.message(), time=time) for time in times]
    messages += [replace(ctx.message(), message_id=UUID(int=each)) for each in (0, 2**128 - 1)]
    messages += [replace(ctx.message(), message_type=each or "t", message_name=each or "n") for each in _TEXTS]
    await _stored(ctx, messages, "a field")


@scenario("STO-DAT-05", "What the database cannot hold is an EncodingError when it is stored")
async def refused(ctx: Context) -> None:
    """Catch a store that cuts a text, or lets an error of the database escape for what the message contains."""
    long = "".join(f"{ctx.random.getrandbits(256):x}" for _ in range(200))
    for text in ("\0", "a\0b", "\ud800", long):
        message = ctx.message()
        for odd in (
            replace(message, key=text),
            replace(message, headers={"a": text}),
            replace(message, message_name=text),
            replace(message, message_type=text),
        ):
            try:
                await ctx.add(odd)
            except EncodingError as error:
                ctx.check(long not in str(error), "the text of the error contains the content of the message")
                ctx.same((await ctx.claim()).rows, [], "what was claimed of a message that was refused")
            else:
                claim = await ctx.claim()
                ctx.same(len(claim.rows), 1, "the messages that were stored")
                ctx.same_message(claim.rows[0].message, odd, f"a message with {text[:10]!r}")
                await ctx.all_sent(claim)


@scenario("STO-DAT-06", "Large messages come back as they were")
async def large(ctx: Context) -> None:
    """Catch a store that cuts what is large."""
    payload = b'{"a":"' + b"x" * 2_000_000 + b'"}'
    big = replace(ctx.message(), payload_json=payload, headers={"a": "ü" * 25_000})
    await _stored(ctx, [big, ctx.message(1)], "a large payload")


@scenario("STO-DAT-07", "A claimed message has no codec")
async def codec(ctx: Context) -> None:
    """Catch a store in memory that keeps the object: the relay sets the codec of the outbox."""

    class Codec:
        """A codec that is not called."""

    message = replace(ctx.message(), codec=Codec())  # type: ignore[arg-type]
    await _stored(ctx, [message], "a codec")


@scenario("STO-DAT-08", "A dead message is shown as it was stored")
async def dead(ctx: Context) -> None:
    """Catch a store that shows dead rows by another way than it claims them."""
    messages = [replace(ctx.message(), payload_json=each) for each in _PAYLOADS[:8]]
    await ctx.kill(*messages)
    found = await ctx.store.dead()
    ctx.same(len(found), len(messages), "the number of dead rows")
    for row, message in zip(found, messages, strict=True):
        ctx.same_message(row.message, message, "a dead message")


@scenario("STO-DAT-09", "Two messages with one id are two rows")
async def same_id(ctx: Context) -> None:
    """Catch a table with a unique id: a unit of work would fail because of a message that was stored before."""
    message = ctx.message(1)
    await ctx.add(message)
    await ctx.add(message, message)
    await _counts(ctx, 3)


async def _counts(ctx: Context, wanted: int) -> None:
    claim = await ctx.claim()
    ctx.same(len(claim.rows), wanted, "the number of claimed rows")
    ctx.same(len({row.position for row in claim.rows}), wanted, "the number of their positions")
