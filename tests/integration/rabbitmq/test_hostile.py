"""Messages that other programs write: each is settled by itself, and the others are handled once."""

import asyncio
import gzip
import json
import re
import struct
from collections import Counter
from contextlib import contextmanager

import aio_pika
import pytest

from diator.brokers.codec import encode
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _subscription
from diator.brokers.rabbitmq._content import RESERVED, Properties
from diator.brokers.rabbitmq._publisher import Publisher
from diator.consumer import Consumer
from diator.events import EventMap
from diator.exceptions import BrokerUnavailable, MessageRejected
from diator.retrying import PermanentError, RetryPolicy
from tests.amqp import DELIVERY_MODE, EXPIRATION, HEADERS, MESSAGE_ID, TIMESTAMP, USER_ID, short, sized, table, text
from tests.integration.rabbitmq.helpers import (
    COUNTED,
    RECONNECT,
    SLACK,
    Counted,
    become,
    collect,
    counted,
    numbers,
)
from tests.records import fields

ROUTING_KEY = ".".join(COUNTED)
GOOD = range(10)
POISON = 99
#: Retries at once, so that the attempts are over after a moment.
POLICY = RetryPolicy(immediate_retries=0, delayed_retries=1, first_delay=0.1)


def nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + table((b"a", value))
    return value


#: Flags and properties that no client library can be trusted with, and what of it cannot be decoded.
UNDECODABLE = {
    "message-id in Latin-1": (MESSAGE_ID, short(b"caf\xe9"), "message-id"),
    "time before 1970": (TIMESTAMP, struct.pack(">q", -14_256_000), "timestamp"),
    "time in microseconds": (TIMESTAMP, struct.pack(">Q", 1_772_000_000_123_456), "timestamp"),
    "time in a header": (HEADERS, table((b"t", b"T" + struct.pack(">Q", 2**60))), "headers"),
    "name of a header": (HEADERS, table((b"\xff\xfe", text(b"a"))), "headers"),
    "nested tables": (HEADERS, table((b"a", nested(5_000))), "headers"),
    "several": (HEADERS | TIMESTAMP, table((b"\xff", b"V"), (b"ok", text(b"1"))) + b"\xff" * 8, "headers,timestamp"),
}


def consume(broker: RabbitMQMessageBroker) -> tuple[Consumer, list[int], list]:
    """A consumer, the numbers of the events that it has handled, and the outcomes."""
    events, handled, outcomes = EventMap(), [], []

    @events.handler
    async def handle(event: Counted) -> None:
        handled.append(event.number)
        if event.number == POISON:
            raise PermanentError("as ever")

    return (
        Consumer(broker, event_map=events, group="readers", retry=POLICY, on_handled=outcomes.append),
        handled,
        outcomes,
    )


@pytest.fixture(params=["quorum", "classic"])
async def broker(request, rabbitmq_url, prefix, brokers) -> RabbitMQMessageBroker:
    broker = RabbitMQMessageBroker(rabbitmq_url, prefix, queue_type=request.param, reconnect=RECONNECT)
    return await brokers.enter_async_context(broker)


async def among_good_ones(broker, raw, prefix, messages, *, at_start):
    """Handle *messages*, in the middle of good ones. Return the outcomes of what was not acknowledged."""
    await collect(broker)
    consumer, handled, outcomes = consume(broker)
    running = None if at_start else asyncio.create_task(consumer.run(signals=False))
    for number in GOOD:
        await broker.send_message(counted(number))
        if number == len(GOOD) // 2:
            for message in messages:
                await raw.publish(prefix, ROUTING_KEY, *message)
    running = running or asyncio.create_task(consumer.run(signals=False))
    await become(lambda: len(outcomes), len(GOOD) + len(messages))
    consumer.stop()
    await running
    assert Counter(number for number in handled if number != POISON) == Counter(GOOD)
    return [outcome for outcome in outcomes if outcome.outcome != "acked"]


@pytest.mark.parametrize("at_start", [True, False], ids=["at start", "running"])
async def test_properties_that_cannot_be_decoded_dead_letter_their_message_alone(broker, raw, prefix, queue, at_start):
    body = encode(counted(POISON))
    messages = [(flags, properties, body) for flags, properties, _ in UNDECODABLE.values()]

    failed = await among_good_ones(broker, raw, prefix, messages, at_start=at_start)

    expected = [omitted for *_, omitted in UNDECODABLE.values()]
    assert [(each.outcome, each.attempt) for each in failed] == [("dead_lettered", 1)] * len(expected)
    assert [each.reason.rpartition(": ")[2].replace(", ", ",") for each in failed] == expected
    for omitted in expected:
        properties, kept = await raw.get(f"{queue}:dead")
        letter = Properties(bytes(12) + properties)
        assert (kept, letter.unreadable, letter.header("diator-dlq-omitted")) == (body, [], omitted)
        assert letter.header("diator-dlq-reason").startswith("undecodable: ")
    assert letter.header("ok") == "1"


async def test_a_routing_key_that_is_not_utf_8(broker, raw, prefix):
    """RabbitMQ delivers to the queues of a `CC`, with the routing key of the message."""
    await collect(broker)
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        cc = table((b"CC", b"A" + sized(text(ROUTING_KEY.encode()))))
        header = bytes.fromhex("003c0000") + (2).to_bytes(8) + HEADERS.to_bytes(2) + cc
        method = bytes.fromhex("003c00280000") + short(prefix.encode()) + short(b"\xff\xfe") + b"\x00"
        for kind, payload in (1, method), (2, header), (3, b"{}"):
            raw.write(struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce")

        delivery = await asyncio.wait_for(anext(deliveries), SLACK)
        await delivery.ack()
    assert delivery.body == b"{}"


#: Properties that can be decoded, and that client libraries write in another form than they have read.
ODD = table(
    (b"bytes", b"x" + sized(b"\xff\x00")),
    (b"decimal", b"D\xff" + struct.pack(">i", -5)),
    (b"double", b"d" + struct.pack(">d", 1e300)),
    (b"float", b"f" + struct.pack(">f", 0.1)),
    (b"int", b"l" + struct.pack(">q", 1)),
    (b"list", b"A" + sized(b"V" + text(b"\xff"))),
    (b"milliseconds", b"T" + struct.pack(">Q", 1_772_000_000_123)),
    (b"n" * 255, b"V"),
    (b"table", nested(32)),
    (b"text", text(b"\xff\xfe")),
)


@pytest.mark.parametrize("outcome", ["retry", "delayed", "dead_letter"])
async def test_what_is_published_again_is_byte_for_byte_as_it_came(broker, raw, prefix, queue, outcome):
    flags, body = HEADERS | DELIVERY_MODE | MESSAGE_ID | TIMESTAMP, b'{"not": "a message" }\x00'
    rest = b"\x02" + short(b"no uuid") + (1_772_000_000_123).to_bytes(8)
    await collect(broker)
    await raw.publish(prefix, ROUTING_KEY, flags, ODD + rest, body)
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        delivery = await anext(deliveries)
        await (
            delivery.dead_letter("no") if outcome == "dead_letter" else delivery.retry(after=0.1 * (outcome != "retry"))
        )

    properties, kept = await raw.get(f"{queue}:dead" if outcome == "dead_letter" else queue)

    assert kept == body
    assert properties.startswith(flags.to_bytes(2))
    assert properties.endswith(rest)
    own = tuple(name.encode() for name in ("diator-", *RESERVED))
    assert [entry for entry in entries(properties) if not entry[0].startswith(own)] == entries(bytes(2) + ODD)


def entries(properties: bytes) -> list[tuple[bytes, bytes]]:
    """The headers at the beginning of *properties*, in the order of their names."""
    read = Properties(bytes(12) + HEADERS.to_bytes(2) + properties[2 : 6 + int.from_bytes(properties[2:6])])
    return sorted((name, value) for name, value, _ in read._headers)


async def test_rabbitmq_does_not_act_again_upon_what_a_sender_asked(broker, raw, plain, prefix, queue):
    """A second copy, an expiration, and a user who is not the one that publishes again."""
    await collect(broker)
    elsewhere = await plain.declare_queue(exclusive=True)
    cc = b"A" + sized(text(elsewhere.name.encode()))
    properties = (
        table((b"CC", cc), (b"x-death", text(b"forged"))) + b"\x01" + short(b"60000") + short(b"id") + short(b"guest")
    )
    flags = HEADERS | DELIVERY_MODE | EXPIRATION | MESSAGE_ID | USER_ID
    await raw.publish(prefix, ROUTING_KEY, flags, properties, b"{}")
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await (await anext(deliveries)).retry()
        await (await anext(deliveries)).retry(after=0.1)
        await (await anext(deliveries)).dead_letter("no")

    kept, _ = await raw.get(f"{queue}:dead")
    letter = Properties(bytes(12) + kept)
    assert {name for name in letter.headers() if name.startswith("diator-original-")} == {
        "diator-original-CC",
        "diator-original-expiration",
        "diator-original-user-id",
        "diator-original-x-death",
    }
    assert letter.header("diator-original-x-death") == "forged"
    assert int.from_bytes(kept[:2]) == HEADERS | DELIVERY_MODE | MESSAGE_ID
    assert await elsewhere.get(fail=False) is None


async def test_counts_that_a_sender_writes_do_not_count(broker, raw, prefix):
    forged = table(
        (b"diator-attempt", b"I" + struct.pack(">i", 50)), (b"x-delivery-count", b"I" + struct.pack(">i", 50))
    )
    await collect(broker)
    await raw.publish(prefix, ROUTING_KEY, HEADERS, forged, b"{}")
    attempts = []
    for _ in range(2):
        async with broker.subscribe([COUNTED], group="readers") as deliveries:
            attempts.append((await anext(deliveries)).attempt)
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        delivery = await anext(deliveries)
        attempts.append(delivery.attempt)
        await delivery.retry()
        delivery = await anext(deliveries)
        attempts.append(delivery.attempt)
        await delivery.ack()

    counts = broker.capabilities.delivery_count == "deliveries"
    assert attempts == ([1, 2, 3, 4] if counts else [1, 1, 1, 2])


async def test_a_dead_letter_that_is_moved_back_begins_at_attempt_1(broker, raw, plain, queue):
    """With all the headers that it has got meanwhile, as the shovel and the management page move it."""
    await collect(broker)
    await broker.send_message(counted(1))
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await (await anext(deliveries)).retry()
        await (await anext(deliveries)).dead_letter("no")
    dead = await plain.get_queue(f"{queue}:dead")
    for _ in range(5):  # looks at it, as the management page does
        await (await asyncio.wait_for(dead.get(), SLACK)).nack(requeue=True)
    letter = await dead.get()
    moved = aio_pika.Message(letter.body, headers=letter.headers, message_id=letter.message_id)
    await plain.default_exchange.publish(moved, queue)
    await letter.ack()

    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        delivery = await anext(deliveries)
        await delivery.ack()
    assert delivery.attempt == 1


@pytest.mark.parametrize("size", [130_900, 131_000])
async def test_headers_that_leave_no_room_for_the_reason_are_left_out(broker, raw, prefix, queue, size):
    body = encode(counted(POISON))
    properties = table((b"large", text(b"x" * size))) + short(b"id")

    failed = await among_good_ones(broker, raw, prefix, [(HEADERS | MESSAGE_ID, properties, body)], at_start=True)

    [handled] = failed
    assert handled.outcome == "dead_lettered"
    assert handled.reason.startswith("permanent: PermanentError in ")
    kept, kept_body = await raw.get(f"{queue}:dead")
    letter = Properties(bytes(12) + kept)
    assert (letter.key, letter.header("diator-dlq-omitted"), letter.header("large")) == ("id", "headers", "")
    assert kept_body == body


async def test_what_rabbitmq_refuses_to_store_again_it_dead_letters_itself(broker, raw, prefix, queue, caplog):
    async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        await raw.publish(prefix, ROUTING_KEY, HEADERS, ODD, b"poison")
        await (await anext(deliveries)).retry()
        delivery = await anext(deliveries)
        with refusing():
            await delivery.dead_letter("no good")
        await broker.send_message(counted(1))
        assert await asyncio.wait_for(numbers(deliveries, 1), SLACK) == [1]

        kept, body = await raw.get(f"{queue}:dead")
        assert body == b"poison"
        assert Properties(bytes(12) + kept).header("x-last-death-reason") == "rejected"
        [record] = [each for each in caplog.records if "itself dead-letters" in each.getMessage()]
        of_all = {"broker": "RabbitMQMessageBroker", "group": "readers", "message_names": ["Counted"]}
        of_message = {"message_type": "notification_event", "message_name": "Counted", "attempt": 2}
        assert fields(record) == {**of_all, **of_message, "reason": "no good"}

        await raw.publish("", queue, int.from_bytes(kept[:2]), kept[2:], body)  # somebody moves it back
        moved = await asyncio.wait_for(anext(deliveries), SLACK)
        await moved.ack()
        assert (delivery.attempt, moved.attempt) == (2, 1)


async def test_a_retained_message_that_rabbitmq_refuses_to_store_again_is_dead_lettered_too(broker, raw, queue):
    """The queue that retains it dead-letters to the queue of the group that has claimed it."""
    await broker.send_message(counted(POISON))
    async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        with refusing():
            for _ in range(2):
                delivery = await asyncio.wait_for(anext(deliveries), SLACK)
                await delivery.dead_letter("no good")
        await broker.send_message(counted(1))
        assert await asyncio.wait_for(numbers(deliveries, 1), SLACK) == [1]
    _, body = await raw.get(f"{queue}:dead")
    assert body == delivery.body


async def test_what_rabbitmq_refuses_to_store_again_comes_again_without_a_group(broker, monkeypatch):
    monkeypatch.setattr(_subscription, "_REQUEUE_DELAY", 0.1)
    async with broker.subscribe([COUNTED], prefetch=1) as deliveries:
        await broker.send_message(counted(1))
        delivery = await anext(deliveries)
        with refusing(), pytest.raises(MessageRejected):
            await delivery.dead_letter("no good")
        assert await asyncio.wait_for(numbers(deliveries, 1), SLACK) == [1]


@pytest.mark.parametrize("outcome", ["retry", "dead_letter"])
async def test_a_delivery_that_cannot_be_settled_gives_its_place_to_the_next_one(broker, outcome):
    async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        await broker.send_messages([counted(1), counted(2)])
        delivery = await anext(deliveries)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_subscription, "again", None)  # which is a TypeError
            for _ in range(2):
                with pytest.raises(BrokerUnavailable):
                    await (delivery.retry() if outcome == "retry" else delivery.dead_letter("no good"))
        assert deliveries.unsettled == len(deliveries._received)

        assert await asyncio.wait_for(numbers(deliveries, 1), _subscription._REQUEUE_DELAY / 2) == [2]
        await delivery.ack()
        await asyncio.sleep(0)
        assert deliveries.unsettled == 0


@contextmanager
def refusing():
    """RabbitMQ refuses every message, as those that are larger than its `max_message_size`."""

    async def refuse(publisher, publication):
        raise MessageRejected("too large") from ValueError()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Publisher, "publish", refuse)
        yield


async def test_a_body_that_is_compressed_is_named_as_such(broker, raw, prefix):
    messages = [
        (1 << 14, short(b"gzip"), gzip.compress(encode(counted(POISON)))),
        (1 << 14, short(b"GZIP"), encode(counted(POISON))),
    ]

    failed = await among_good_ones(broker, raw, prefix, messages, at_start=True)

    assert [re.split(r" \(| in ", each.reason)[0] for each in failed] == [
        "undecodable: the body is compressed",
        "permanent: PermanentError",
    ]


async def test_an_error_of_any_kind_while_it_is_settled_frees_the_place(broker, monkeypatch):
    monkeypatch.setattr(_subscription, "_REQUEUE_DELAY", 0.1)
    await collect(broker)
    await broker.send_message(counted(1))
    async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        delivery = await anext(deliveries)
        with monkeypatch.context() as patch:
            patch.setattr(_subscription, "again", lambda *_, **__: struct.pack(">f", 1e300))
            with pytest.raises(Exception, match="redelivered"):
                await delivery.retry()

        again = await asyncio.wait_for(anext(deliveries), SLACK)
        assert json.loads(again.body)["payload"]["number"] == 1
        await again.ack()


async def test_a_dead_letter_waits_while_its_queue_is_full(broker, plain, queue, monkeypatch):
    monkeypatch.setattr(_subscription, "_REQUEUE_DELAY", 0.1)
    full = {"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}
    dead = await plain.declare_queue(f"{queue}:dead", durable=True, arguments=full)
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_messages([counted(1), counted(2)])
        await (await anext(deliveries)).dead_letter("no good")
        delivery = await anext(deliveries)
        with pytest.raises(BrokerUnavailable, match="redelivered"):
            await delivery.dead_letter("no good")
        assert await dead.get(no_ack=True)

        await (await asyncio.wait_for(anext(deliveries), SLACK)).dead_letter("no good")
    letter = await dead.get(no_ack=True)
    assert json.loads(letter.body)["payload"]["number"] == 2
    assert letter.headers["diator-dlq-reason"] == "no good"
