"""Messages that are requeued, and the ones that are dead-lettered."""

import asyncio
import re
from time import monotonic
from uuid import uuid4

from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic

from tests.integration.kafka.helpers import acked, message, number_of, send, stored, subscribed, take


async def test_a_retry_is_never_early_and_waits_behind_none_that_is_due_later(broker) -> None:
    """They are in one partition of the retry topic; the ones that are due last are in front."""
    delays = [0.9, 0.7, 0.5, 0.3, 0.1]
    await send(broker, *range(len(delays)))
    came: dict[int, float] = {}
    async with subscribed(broker) as deliveries:
        due = {}
        by_number = {number_of(each): each for each in await take(deliveries, len(delays))}
        for number, delay in enumerate(delays):
            due[number] = monotonic() + delay
            await by_number[number].retry(after=delay)
        for _ in delays:
            (again,) = await take(deliveries, 1)
            came[number_of(again)] = monotonic()
            assert again.attempt == 2
            await again.ack()

    late = {number: came[number] - due[number] for number in due}
    assert min(late.values()) >= -0.005
    assert max(late.values()) < 0.5
    assert [*came] == [4, 3, 2, 1, 0]


async def test_a_requeued_message_outlives_its_consumer(broker) -> None:
    group = f"group-{uuid4().hex}"
    await broker.send_message(message(7, key="k", headers={"colour": "red"}))
    async with subscribed(broker, group=group) as deliveries:
        (delivery,) = await take(deliveries, 1)
        await delivery.retry(after=1.0)
    async with subscribed(broker, group=group) as deliveries:
        (again,) = await take(deliveries, 1)

    assert (again.attempt, again.body, again.topic) == (2, delivery.body, delivery.topic)
    assert again.headers == delivery.headers == {"colour": "red", "key": "k"}


async def test_a_header_of_a_program_is_not_a_control_header(broker) -> None:
    forged = {"diator-retry-attempt": "99", "diator-retry-due": "9999999999999", "diator-retry-origin": "9:9"}
    await broker.send_message(message(1, headers=forged))
    async with subscribed(broker) as deliveries:
        (delivery,) = await take(deliveries, 1)
        assert (delivery.attempt, delivery.headers) == (1, forged)
        await delivery.retry()
        (again,) = await take(deliveries, 1)

    assert (again.attempt, again.headers) == (2, forged)


async def test_a_foreign_record_in_a_retry_topic_is_delivered(broker, kafka_servers, name) -> None:
    async with subscribed(broker) as deliveries, AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
        for headers in ([], [("diator-retry-attempt", b"x")] * 3, [("a", b"1"), ("b", None), ("c", b"-")]):
            await producer.send_and_wait(f"{name}.billing-retry", b"foreign", headers=headers)
        bodies = [each.body for each in await take(deliveries, 3)]

    assert bodies == [b"foreign"] * 3


async def test_a_dead_letter_names_its_origin(broker, kafka_servers, name) -> None:
    await broker.send_message(message(7, key="k", headers={"colour": "red"}))
    async with subscribed(broker) as deliveries:
        (delivery,) = await take(deliveries, 1)
        await delivery.retry()
        (again,) = await take(deliveries, 1)
        await again.dead_letter("no good")

    (letter,) = await stored(kafka_servers, f"{name}.billing-dlq")
    headers = {header: value.decode() for header, value in letter.headers}
    assert (letter.value, letter.key) == (delivery.body, b"k")
    assert headers.pop("diator-dlq-last-failed-at")
    assert re.fullmatch(r"[0-3]", headers.pop("diator-dlq-partition"))
    assert headers == {
        "colour": "red",
        "key": "k",
        "diator-dlq-version": "1",
        "diator-dlq-reason": "no good",
        "diator-dlq-source": name,
        "diator-dlq-offset": "0",
        "diator-dlq-consumer-group": "billing",
        "diator-dlq-attempts": "2",
    }


async def test_a_record_without_a_value_is_an_empty_body(broker, kafka_servers, name) -> None:
    """A tombstone of a compacted topic."""
    async with subscribed(broker) as deliveries, AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
        await producer.send_and_wait(name, None, key=b"k")
        (delivery,) = await take(deliveries, 1)
        assert (delivery.body, delivery.headers) == (b"", {"key": "k"})
        await delivery.dead_letter("no body")

    (letter,) = await stored(kafka_servers, f"{name}.billing-dlq")
    assert letter.key == b"k"


async def test_in_place_attempts_outlive_the_consumer(make, kafka_servers) -> None:
    broker = await make(kafka_servers, retry_in_place=True)
    await send(broker, *range(3), key="k")
    counted = []
    for _ in range(3):
        async with subscribed(broker) as deliveries:
            (delivery,) = await take(deliveries, 1)
            counted.append((number_of(delivery), delivery.attempt))
            await delivery.retry(after=0.05)

    assert counted == [(0, 1), (0, 2), (0, 3)]


async def test_in_place_attempts_of_a_message_behind_another_are_kept(make, kafka_servers) -> None:
    broker = await make(kafka_servers, retry_in_place=True)
    await send(broker, 0, 1, key="k")
    async with subscribed(broker) as deliveries:
        (first,) = await take(deliveries, 1)
        await first.ack()
        (second,) = await take(deliveries, 1)
        await second.retry(after=0.05)
    await send(broker, 2, key="k")
    async with subscribed(broker) as deliveries:
        (again,) = await take(deliveries, 1)
        assert (number_of(again), again.attempt) == (1, 2)
        await again.ack()
        (last,) = await take(deliveries, 1)

    assert (number_of(last), last.attempt) == (2, 1)


async def test_in_place_another_key_is_not_held_up_by_many_messages_of_one(make, kafka_servers, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1)])
    broker = await make(kafka_servers, retry_in_place=True, extra_prefetch=0)
    await send(broker, *range(300), key="held")
    await send(broker, 300, key="other")
    async with subscribed(broker, prefetch=64) as deliveries:
        (held,) = await take(deliveries, 1)
        assert number_of(held) == 0
        assert await acked(deliveries, 1) == [300]


async def test_held_back_messages_are_read_as_soon_as_there_is_room(make, kafka_servers, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1)])
    broker = await make(kafka_servers, max_unacked_per_partition=10, extra_prefetch=0)
    await send(broker, *range(100), key="k")
    async with subscribed(broker, prefetch=20) as deliveries:
        taken = await take(deliveries, 20)
        await asyncio.sleep(0.3)
        for delivery in taken:
            await delivery.ack()
        assert await acked(deliveries, 1, within=5.0) == [20]


async def test_in_place_messages_of_another_key_are_delivered(make, kafka_servers) -> None:
    broker = await make(kafka_servers, retry_in_place=True, partitions=1)
    async with subscribed(broker) as deliveries:
        await send(broker, 0, 1, key="a")
        await send(broker, 2, 3, key="b")
        await send(broker, 4)
        (first,) = await take(deliveries, 1)
        await first.retry(after=0.5)

        assert sorted(await acked(deliveries, 3)) == [2, 3, 4]
        assert await acked(deliveries, 2) == [0, 1]
