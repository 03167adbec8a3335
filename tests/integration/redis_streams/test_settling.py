"""Acknowledging, requeueing and dead-lettering."""

import asyncio
import re
from collections import Counter
from time import monotonic

import pytest
from redis.asyncio import Redis

from diator.brokers.base import Topic
from diator.brokers.codec import decode
from diator.brokers.redis import _subscription
from diator.retrying import RetryPolicy
from tests.integration.redis_streams.helpers import (
    COUNTED,
    LONG,
    SLACK,
    acked,
    consuming,
    dead_letters,
    eventually,
    message,
    nothing_comes,
    nothing_left,
    pending,
    send,
    subscribed,
    take,
)

ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)


async def test_acknowledgements_travel_together(make, private_redis, stream) -> None:
    """A thousand in a few commands, counted by a server of its own; the last ones when the subscription ends."""
    broker = await make(private_redis.url, lease=LONG)
    async with Redis.from_url(private_redis.url, protocol=2) as admin:

        async def settled() -> bool:
            return await pending(admin, stream) == 0

        async with subscribed(broker) as deliveries:
            await send(broker, *range(1000))
            await acked(deliveries, 1000)
            await eventually(settled)
            assert (await admin.info("commandstats"))["cmdstat_xack"]["calls"] <= 50
            await send(broker, 1)
            await acked(deliveries, 1)
        assert await settled()


@pytest.mark.usefixtures("quick")
async def test_a_retry_comes_when_it_is_due(broker, admin, stream) -> None:
    """It is not redelivered before, has the next attempt number and all its data, and goes to any consumer."""
    await broker.send_message(sent := message(1, key="meeting-7", headers={"a": "b", "c": "d"}))
    failed = 0.0
    for attempt in range(1, 6):
        async with subscribed(broker) as deliveries:
            [delivery] = await take(deliveries, 1)
            if attempt > 1:
                assert 0.3 <= monotonic() - failed < 0.3 + 0.3 + SLACK
            assert (delivery.attempt, delivery.topic) == (attempt, COUNTED)
            assert decode(delivery.body, headers=delivery.headers) == sent
            failed = monotonic()
            await (delivery.ack() if attempt == 5 else delivery.retry(after=0.3))
            if attempt % 2:
                await nothing_comes(deliveries, within=0.2)
    await nothing_left(admin, stream)


@pytest.mark.usefixtures("quick")
async def test_messages_of_a_dead_consumer_are_claimed_as_slots_free_up(broker, admin, stream) -> None:
    """One of them may have crashed that consumer. Messages that it had not started are not charged an attempt."""
    await send(broker, *range(10))
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "dead", {stream: ">"}, count=10)

    async with subscribed(broker, prefetch=2) as deliveries:
        [first, second] = await take(deliveries, 2)
        await asyncio.sleep(0.3)
        left = await admin.xpending_range(stream, "billing", "-", "+", 10, "dead")
        assert [each["times_delivered"] for each in left] == [1] * 8
        assert (first.attempt, second.attempt) == (2, 2)
        await first.ack()
        await second.ack()
        assert await acked(deliveries, 8) == [*range(2, 10)]
    await nothing_left(admin, stream)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "late", [lambda each: each.retry(), lambda each: each.dead_letter("too late")], ids=["retry", "dead letter"]
)
async def test_settling_too_late_has_no_effect(broker, admin, stream, late) -> None:
    """Another consumer took the message over and handled it: it must be neither requeued nor dead-lettered."""
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        await admin.xclaim(stream, "billing", "another", 0, [delivery.token.id])
        await admin.xack(stream, "billing", delivery.token.id)
        await late(delivery)
        await nothing_comes(deliveries, within=0.5)
    await nothing_left(admin, stream)
    assert not await admin.exists(f"{stream}:billing:dead")


async def test_a_retry_without_a_delay_waits_for_nothing(broker, admin, stream, monkeypatch) -> None:
    """It does not wait for the next scan for due messages."""
    monkeypatch.setattr(_subscription, "SCAN_EVERY", 3.0)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        for attempt in range(1, 6):
            [delivery] = await take(deliveries, 1, within=SLACK)
            assert delivery.attempt == attempt
            await (delivery.ack() if attempt == 5 else delivery.retry())
    await nothing_left(admin, stream)


@pytest.mark.usefixtures("quick")
async def test_a_crash_after_a_retry_counts_too(broker, admin, stream) -> None:
    """A message that was delivered twice, requeued, and then lost with its consumer has attempt 4."""
    again = f"{stream}:billing:again"
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        for _ in range(2):
            [delivery] = await take(deliveries, 1)
            await delivery.retry()
    await admin.xautoclaim(again, "billing", "dead", 0)
    async with subscribed(broker) as deliveries:
        [delivery] = await take(deliveries, 1)
        assert delivery.attempt == 4
        await delivery.ack()


async def test_many_retries_that_are_due_at_once_come_at_once(broker) -> None:
    """Many messages that failed together are not redelivered at only a hundred a second."""
    async with subscribed(broker, prefetch=500) as deliveries:
        await send(broker, *range(500))
        for delivery in await take(deliveries, 500):
            await delivery.retry(after=0.1)

        assert sorted(await acked(deliveries, 500, within=1 + 2 * SLACK)) == [*range(500)]


@pytest.mark.usefixtures("quick")
async def test_messages_of_one_content_are_retried_one_by_one(broker) -> None:
    """Two identical messages stay two while they wait."""
    twice = message(1)
    async with subscribed(broker) as deliveries:
        await broker.send_messages([twice, twice])
        for delivery in await take(deliveries, 2):
            await delivery.retry(after=0.1)

        assert [each.attempt for each in await take(deliveries, 2)] == [2, 2]


@pytest.mark.usefixtures("quick")
async def test_topics_of_which_one_is_a_prefix_of_the_other(broker, admin, prefix) -> None:
    """Retries and dead letters stay in the keys of their topic."""
    topics = Topic("notification_event", "user"), (long := Topic("notification_event", "user:joined"))
    async with subscribed(broker, *topics) as deliveries:
        await broker.send_message(message(1, long))
        for attempt in (1, 2, 3):
            [delivery] = await take(deliveries, 1)
            assert (delivery.topic, delivery.attempt) == (long, attempt)
            await (delivery.retry() if attempt < 3 else delivery.dead_letter("bad"))

        assert len(await dead_letters(admin, f"{prefix}:notification_event:user%3Ajoined")) == 1
        assert await dead_letters(admin, f"{prefix}:notification_event:user") == []


@pytest.mark.usefixtures("quick")
async def test_a_failing_message_is_dead_lettered_once(make, redis_url, broker, admin, stream) -> None:
    """After the exact number of attempts, by two consumers, with reason and origin; the original is acknowledged."""
    handled, attempts = Counter(), []

    def handle(event):
        handled[event.number] += 1
        if event.number == 13:
            raise ValueError("s3cr3t")

    options = {
        "retry": RetryPolicy(
            immediate_retries=1, immediate_pause=0, delayed_retries=2, first_delay=0.1, backoff_factor=1
        ),
        "on_handled": lambda done: attempts.append(done.attempt) if done.outcome != "acked" else None,
    }
    async with consuming(broker, handle, **options), consuming(await make(redis_url), handle, **options):
        await broker.send_message(sent := message(13, key="k", headers={"a": "b"}))
        [(entry, _)] = await admin.xrange(stream)
        await send(broker, *range(5))

        async def dead_lettered() -> bool:
            return bool(await dead_letters(admin, stream))

        await eventually(dead_lettered)
        await nothing_left(admin, stream)
        await asyncio.sleep(0.3)

    assert attempts == [1, 2, 3]
    assert handled == {13: 6, **dict.fromkeys(range(5), 1)}
    [letter] = await dead_letters(admin, stream)
    letter = {name.decode(): value for name, value in letter.items()}
    assert decode(letter.pop("body"), headers={"key": "k", "a": "b"}) == sent
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT.*\+00:00", letter.pop("diator-dlq-last-failed-at"))
    assert letter.pop("diator-dlq-reason").startswith(b"retries-exhausted: ValueError in ")
    assert letter == {
        "key": b"k",
        "a": b"b",
        "diator-dlq-version": b"1",
        "diator-dlq-source": stream.encode(),
        "diator-dlq-entry-id": entry,
        "diator-dlq-consumer-group": b"billing",
        "diator-dlq-attempts": b"3",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"hello": "world"},
        {"body": ""},
        {"body": b"\xff\xfe\x00"},
        {"body": "{}", b"\xff": b"\xff"},
        {"again": "and again"},
        {"again": b"\x93\x90\x01\xa1x"},
        {f"field-{n}": "x" for n in range(5_000)},
        {"body": "[" * 100_000},
    ],
    ids=["no body", "empty", "no text", "no text in a header", "again", "again in MessagePack", "many", "deep"],
)
@pytest.mark.usefixtures("quick")
async def test_a_foreign_entry_is_dead_lettered(broker, admin, stream, fields, caplog) -> None:
    """It keeps its body and gets a reason; messages beside and behind it are handled."""
    handled, reasons = [], []
    foreign = await admin.xadd(stream, fields)
    await send(broker, 1)
    async with consuming(
        broker,
        lambda event: handled.append(event.number),
        retry=ONCE,
        on_handled=lambda done: reasons.append(done.reason) if done.outcome == "dead_lettered" else None,
    ):

        async def done() -> bool:
            return bool(await dead_letters(admin, stream)) and handled == [1]

        await eventually(done)
        await nothing_left(admin, stream)

    assert [reason.partition(":")[0] for reason in reasons] == ["undecodable"]
    [letter] = await dead_letters(admin, stream)
    assert letter[b"diator-dlq-entry-id"] == foreign
    assert len([field for field in letter if not field.startswith(b"diator-")]) == len(fields)
    assert "world" not in caplog.text
