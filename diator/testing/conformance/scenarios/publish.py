"""PUB: sending."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.exceptions import BrokerClosed, BrokerError, DiatorError, EncodingError, MessageRejected, MessagesNotSent
from diator.testing._suite.checks import cancelled
from diator.testing.conformance._context import Context
from diator.testing.conformance._scenario import scenario


@scenario("PUB-01", "Each of 200 confirmed messages arrives once")
async def arrives_once(ctx: Context) -> None:
    """Catch a transport that loses, duplicates or invents messages when nothing fails."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = [ctx.message(topic, number) for number in range(200)]
        await reader.during(ctx.send_all(broker, messages))
    ctx.ledger.compare(reader.name, messages).verify()


@scenario(
    "PUB-02",
    "A message sent while a group has no consumer waits for the next consumer",
    needs=Capabilities(subscription="durable"),
)
async def waits_for_a_consumer(ctx: Context) -> None:
    """Catch a group that exists only while a consumer is connected."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group):
        pass
    messages = await ctx.send(broker, topic, 20)
    async with ctx.reading(broker, topic, group=group) as reader:
        await reader.until_fence()
    ctx.ledger.compare(group, messages).verify()


@scenario(
    "PUB-05",
    "A message that a full service refuses was not sent",
    facilities=["full"],
    needs=Capabilities(receipt="accepted"),
)
async def refused_when_full(ctx: Context) -> None:
    """Catch a confirmation of a message that had no room, and a message that is dropped to make room."""
    broker, topic, group = ctx.closing(ctx.harness.full(5)), ctx.topic(), ctx.name()
    async with ctx.reading(broker, topic, group=group) as reader:
        await ctx.send(broker, topic, 5)
        refused = await ctx.raises(MessageRejected, ctx.send(broker, topic, start=5), "sending to a full service")
        ctx.same(refused.message_id, ctx.ledger.sent[-1].message.message_id, "the message_id of the error")
        await reader.take(5)
        await ctx.send_when_there_is_room(broker, ctx.message(topic, 6))
        await reader.until_fence()
    ctx.ledger.compare(group, [sent.message for sent in ctx.ledger.sent]).verify()


@scenario(
    "PUB-20",
    "A message that one group has no room for reaches no other group either",
    facilities=["full"],
    needs=Capabilities(receipt="accepted", distribution=frozenset({"competing"})),
)
async def refused_for_all(ctx: Context) -> None:
    """Catch a refused message that some groups receive: sent again, they receive it twice."""
    broker, topic, full, free = ctx.closing(ctx.harness.full(5)), ctx.topic(), ctx.name("-full"), ctx.name("-free")
    async with ctx.reading(broker, topic, group=full), ctx.reading(broker, topic, group=free) as reader:
        for number in range(5):
            await ctx.send(broker, topic, start=number)
            await reader.take(1)
        await ctx.raises(MessageRejected, ctx.send(broker, topic, start=5), "sending to a full group")
        await reader.expect_nothing()
    ctx.ledger.compare(free, [sent.message for sent in ctx.ledger.sent]).verify()


@scenario("PUB-06", "A batch arrives complete and in order, or its error names the unsent messages")
async def batch(ctx: Context) -> None:
    """Catch a batch that silently skips messages which cannot be sent, or names the wrong ones."""
    broker, topic = await ctx.broker(), ctx.topic()
    send_messages: Any = getattr(broker, "send_messages", None)
    ctx.applies(send_messages, "this transport has no send_messages")
    messages = [ctx.message(topic, number, key="one key") for number in range(10)]
    ids = [message.message_id for message in messages]
    with_bad = [*messages[:4], ctx.message(Topic(topic.message_type, "\ud800")), *messages[4:]]
    async with ctx.reading(broker, topic) as reader:
        error = await ctx.raises(DiatorError, send_messages(with_bad), "a batch with a bad message")
        arrived = {received.id for received in await reader.until_fence()}
        unsent = {*error.message_ids} if isinstance(error, MessagesNotSent) else {*ids, with_bad[4].message_id}
        ctx.same(arrived, {*ids} - unsent, "the messages that arrived, compared with the messages reported as sent")
        for message in messages:
            ctx.ledger.attempt(message).fate = "confirmed"
        await send_messages(messages)
        again = await reader.until_fence()
    ctx.same([received.id for received in again], ids, "the messages of the batch")


@scenario("PUB-07", "Fifty tasks send at once")
async def many_tasks(ctx: Context) -> None:
    """Catch a connection whose answers reach the wrong callers when several wait."""
    broker, topic = await ctx.broker(), ctx.topic()
    messages = [[ctx.message(topic, task * 10 + number) for number in range(10)] for task in range(50)]

    async def send() -> None:
        await asyncio.gather(*(ctx.send_all(broker, own) for own in messages))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, [message for own in messages for message in own]).verify()


@scenario("PUB-08", "A cancelled send ends at once and affects no other")
async def cancelled_send(ctx: Context) -> None:
    """Catch a send that swallows its cancellation, or that leaves the connection out of step."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        tasks = [asyncio.create_task(ctx.send(broker, topic, start=number)) for number in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await ctx.within(1 * ctx.limits.lag, _all(tasks), "ending 10 cancelled sends")
        bad = [task for task in tasks if not task.cancelled() and task.exception()]
        ctx.check(not bad, f"cancelled sends ended with {bad}")
        await ctx.send(broker, topic, 20, start=10)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, [sent.message for sent in ctx.ledger.sent]).verify()


async def _all(tasks: list[asyncio.Task[list[Message]]]) -> None:
    await asyncio.wait(tasks)


@scenario("PUB-09", "Changes after sending do not change the delivered message")
async def not_shared(ctx: Context) -> None:
    """Catch a transport that delivers the sender's own objects."""
    broker, topic = await ctx.broker(), ctx.topic()
    headers = {"colour": "red"}
    async with ctx.reading(broker, topic) as reader:
        message = ctx.message(topic, headers=headers)
        await asyncio.gather(ctx.send_all(broker, [message]), ctx.send_all(broker, [message]))
        headers["colour"] = "blue"
        received = await reader.take(2)
    for each in received:
        ctx.same(each.message and each.message.headers, {"colour": "red"}, "the headers")
    ctx.ledger.compare(reader.name, [message]).verify()


@scenario("PUB-10", "A closed broker refuses to send and does not connect again")
async def refused_when_closed(ctx: Context) -> None:
    """Catch a broker that reopens itself, or accepts messages that it never sends."""
    broker, other, topic = await ctx.broker(), await ctx.broker(), ctx.topic()
    reading, shared = (other, True) if ctx.capabilities.multi_process else (broker, False)
    async with ctx.reading(reading, topic) as reader:
        await ctx.send(broker, topic)
        await reader.take(1)
        await broker.aclose()
        refused = await ctx.within(
            ctx.limits.lag, ctx.raises(BrokerClosed, ctx.send(broker, topic), "sending when closed"), "a refusal"
        )
        ctx.same(refused.message_id, ctx.ledger.sent[-1].message.message_id, "the message_id of the error")
        if shared:
            ctx.same(await reader.until_fence(), [], "the messages sent by a closed broker")
        else:
            waiting = asyncio.ensure_future(anext(reader.deliveries))
            await asyncio.wait({waiting}, timeout=ctx.limits.quiet)
            came = waiting.done() and not isinstance(waiting.exception(), BrokerClosed)
            await cancelled(waiting)
            ctx.check(not came, f"a closed broker delivers: {waiting!r}")


@scenario("PUB-13", "A message that cannot be encoded is refused before anything is sent")
async def refused_before_sending(ctx: Context) -> None:
    """Catch half a message on the wire, and a foreign exception for bad input."""
    broker, topic = await ctx.broker(), ctx.topic()
    bad = {
        "a name": ctx.message(Topic(topic.message_type, "\ud800")),
        "a type": ctx.message(Topic("\ud800", topic.message_name)),
        "a key": ctx.message(topic, key="\ud800"),
        "a header": ctx.message(topic, headers={"x": "\ud800"}),
    }
    async with ctx.reading(broker, topic) as reader:
        for what, message in bad.items():
            await ctx.raises(EncodingError, broker.send_message(message), f"sending {what} that is not valid Unicode")
        good = await ctx.send(broker, topic)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, good).verify()


@scenario("PUB-14", "A message that is sent twice is delivered twice, with one id")
async def duplicates_are_visible(ctx: Context) -> None:
    """Catch a transport that drops suspected duplicates, or that makes up ids of its own."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = ctx.message(topic)
    async with ctx.reading(broker, topic) as reader:
        await ctx.send_all(broker, [message, message])
        received = await reader.until_fence()
    ctx.same([each.id for each in received], [message.message_id] * 2, "the ids")


@scenario("PUB-15", "Sending does not change the message")
async def unchanged(ctx: Context) -> None:
    """Catch a transport that writes into the program's message."""
    broker, topic = await ctx.broker(), ctx.topic()
    message = ctx.message(topic, key="k", headers={"a": "1"})
    before = asdict(message)
    async with ctx.reading(broker, topic):
        await ctx.send_all(broker, [message])
    ctx.same(asdict(message), before, "the message after it was sent")


@scenario("PUB-16", "Sending does not wait for a reader")
async def does_not_wait(ctx: Context) -> None:
    """Catch a transport that delivers to readers inside `send_message`."""
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.within(2 * ctx.limits.lag, ctx.send(broker, topic, 20), "sending while nobody reads")
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()


@scenario("PUB-17", "A broker connects on first use, and in `async with`")
async def connects_when_used(ctx: Context) -> None:
    """Catch a transport that works only after a call that the contract does not have."""
    for _ in range(2):
        await ctx.use(await ctx.broker())
    async with ctx.harness.transport() as entered:
        topic = ctx.topic()
        async with ctx.reading(entered, topic) as reader:
            messages = await ctx.send(entered, topic)
            await reader.until_fence()
        ctx.ledger.compare(reader.name, messages).verify()


@scenario("PUB-18", "One bad message does not fail the messages beside it")
async def errors_stay_apart(ctx: Context) -> None:
    """Catch a connection that fails every waiting caller when one message is refused."""
    broker, topic = await ctx.broker(), ctx.topic()
    large = "x" * (ctx.capabilities.max_message_bytes + 1)
    messages = [ctx.message(topic, number) for number in range(40)]

    async def spoil(number: int) -> None:
        await ctx.raises(BrokerError, broker.send_message(ctx.message(topic, number, text=large)), "a huge message")

    async def send() -> None:
        sends = [ctx.send_all(broker, [message]) for message in messages]
        await asyncio.gather(*sends[:20], spoil(1), *sends[20:], spoil(2))

    async with ctx.reading(broker, topic) as reader:
        await reader.during(send())
    ctx.ledger.compare(reader.name, messages).verify()
