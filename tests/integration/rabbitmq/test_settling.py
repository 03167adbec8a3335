"""Acknowledging, requeueing and dead-lettering."""

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from time import monotonic

import aio_pika
import pytest

from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _subscription
from diator.consumer import Consumer
from diator.events import EventMap
from diator.exceptions import (
    BrokerUnavailable,
)
from diator.retrying import RetryPolicy
from tests.integration.rabbitmq.helpers import (
    COUNTED,
    OTHER,
    SLACK,
    Counted,
    become,
    collect,
    counted,
    number_of,
    numbers,
)


async def test_a_handler_outlives_its_connection_and_the_message_comes_again(behind_proxy, proxy):
    events, handled, cancelled = EventMap(), [], []

    @events.handler
    async def handle(event: Counted) -> None:
        before = proxy.accepted
        if not handled:
            proxy.reset()
            await become(lambda: proxy.accepted, before + 1)
        handled.append(event.number)
        if len(handled) == 2:
            consumer.stop()

    outcomes = []
    consumer = Consumer(behind_proxy, event_map=events, group="readers", on_handled=outcomes.append)
    await collect(behind_proxy)
    await behind_proxy.send_message(counted(1))

    await asyncio.wait_for(consumer.run(signals=False), 60)

    assert (handled, cancelled) == ([1, 1], [])
    assert [(each.outcome, each.attempt) for each in outcomes] == [("acked", 1), ("acked", 2)]


async def test_messages_prefetched_by_a_lost_connection_are_not_handed_out(behind_proxy, proxy):
    """Prefetched messages wait for a slow handler, and nothing is received meanwhile. They are redelivered anyway."""
    topics = (COUNTED, OTHER)
    await collect(behind_proxy, topics)
    await behind_proxy.send_messages([counted(number, topic=topics[number % 2]) for number in range(200)])
    async with behind_proxy.subscribe(topics, group="readers", prefetch=1) as deliveries:
        slow = await anext(deliveries)
        await become(lambda: len(deliveries._received), 100)
        await asyncio.sleep(0.1)
        connections = proxy.accepted
        proxy.reset()
        await become(lambda: proxy.accepted, connections + 1)
        await slow.ack()

        assert sorted(await numbers(deliveries, 200)) == [*range(200)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(deliveries), 0.3)


async def test_lost_connections_use_up_no_attempts_of_messages_that_no_handler_has_seen(behind_proxy, proxy):
    await collect(behind_proxy)
    await behind_proxy.send_messages([counted(number) for number in range(200)])
    async with behind_proxy.subscribe([COUNTED], group="readers", prefetch=2) as deliveries:
        for _ in range(10):
            slow = await anext(deliveries)
            for _ in range(5):  # until RabbitMQ has sent what it wants to send
                await deliveries._connection.probe()
            connections = proxy.accepted
            proxy.reset()
            await become(lambda: proxy.accepted, connections + 1)
            await slow.ack()  # too late

        attempts = {}
        while len(attempts) < 200:
            delivery = await anext(deliveries)
            attempts[number_of(delivery)] = delivery.attempt
            await delivery.ack()
        # RabbitMQ counts what it had sent to the first connection, and what a new one requeues.
        assert max(attempts[number] for number in range(10, 200)) <= 3


async def test_a_message_that_always_fails_is_tried_so_often_and_then_dead_lettered(broker, plain, queue):
    events, begun = EventMap(), []

    @events.handler
    async def handle(event: Counted) -> None:
        begun.append(monotonic())
        raise LookupError("as ever")

    outcomes = []

    def note(handled) -> None:
        outcomes.append(handled)
        if handled.outcome == "dead_lettered":
            consumer.stop()

    policy = RetryPolicy(immediate_retries=0, delayed_retries=3, first_delay=0.2, backoff_factor=1.0)
    consumer = Consumer(broker, event_map=events, group="readers", retry=policy, on_handled=note)
    await collect(broker)
    message = counted(1, headers={"trace": "t"})
    await broker.send_message(message)

    await asyncio.wait_for(consumer.run(signals=False), 60)

    assert [each.attempt for each in outcomes] == [1, 2, 3, 4]
    assert min(later - earlier for earlier, later in pairwise(begun)) >= 0.1
    letter = await (await plain.get_queue(f"{queue}:dead")).get()
    assert letter.headers.pop("diator-dlq-reason").startswith("retries-exhausted")
    assert letter.headers.pop("diator-dlq-last-failed-at")
    assert letter.headers == {
        "trace": "t",
        "diator-dlq-version": "1",
        "diator-dlq-source": queue,
        "diator-dlq-consumer-group": "readers",
        "diator-dlq-attempts": "4",
    }
    assert letter.message_id == str(message.message_id)
    assert letter.delivery_mode is aio_pika.DeliveryMode.PERSISTENT


async def test_without_extra_prefetch_a_crash_concerns_only_the_message_that_is_handled(
    *, rabbitmq_url, prefix, brokers, broker, plain, queue
):
    """RabbitMQ counts the crash as a delivery of every message that the process holds."""
    events, begun = EventMap(), asyncio.Event()

    @events.handler
    async def handle(event: Counted) -> None:
        begun.set()
        await asyncio.sleep(SLACK)

    await collect(broker)
    await broker.send_messages([counted(number) for number in range(20)])
    careful = await brokers.enter_async_context(RabbitMQMessageBroker(rabbitmq_url, prefix, extra_prefetch=0))
    running = asyncio.create_task(Consumer(careful, event_map=events, group="readers").run(signals=False))
    await begun.wait()
    await asyncio.sleep(0.5)  # it would prefetch the others

    assert (await plain.declare_queue(queue, passive=True)).declaration_result.message_count == 19
    running.cancel()
    await asyncio.wait([running])


async def test_what_waits_for_a_slow_key_does_not_count_as_prefetched(broker, plain, queue):
    """RabbitMQ sends more meanwhile, in order. Then the consumer leaves the others of its group their share again."""
    events, handled, gate = EventMap(), [], asyncio.Event()

    @events.handler
    async def handle(event: Counted) -> None:
        if event.number % 1_000 == 0:
            await gate.wait()
        handled.append(event.number)

    await collect(broker)
    await broker.send_messages([counted(n, key=f"key-{n % 7}" if n % 2 else "slow") for n in range(1_000)])
    consumer = Consumer(broker, event_map=events, group="readers", concurrency=4)
    running = asyncio.create_task(consumer.run(signals=False))
    await become(lambda: len(handled), 500)
    gate.set()
    await become(lambda: len(handled), 1_000)
    for key in range(7):
        assert [n for n in handled[:500] if n % 7 == key] == [n for n in range(1, 1_000, 2) if n % 7 == key]
    assert handled[500:] == [*range(0, 1_000, 2)]

    for count, not_sent in ((2_000, 1_000), (500, 500 - 4 - 100)):
        gate.clear()
        await broker.send_messages([counted(1_000) for _ in range(count)])
        await asyncio.sleep(0.5)
        assert (await plain.declare_queue(queue, passive=True)).declaration_result.message_count >= not_sent
        before = len(handled)
        gate.set()
        await become(lambda count=before + count: len(handled) - count, 0)
    consumer.stop()
    await running


async def test_prefetched_messages_go_to_the_next_consumer(broker):
    await collect(broker)
    await broker.send_messages([counted(n) for n in range(100)])
    async with broker.subscribe([COUNTED], group="readers", prefetch=100) as deliveries:
        done = await numbers(deliveries, 10)
        held = [await anext(deliveries) for _ in range(20)]
        for delivery in held[::2]:
            done.append(json.loads(delivery.body)["payload"]["number"])
            await delivery.ack()

    async with broker.subscribe([COUNTED], group="readers", prefetch=100) as deliveries:
        async with asyncio.timeout(60):
            done += await numbers(deliveries, 80)

    assert Counter(done) == Counter(range(100))


async def test_acknowledgements_out_of_order_keep_the_channel(behind_proxy, proxy):
    """RabbitMQ closes the channel if a lower delivery tag follows a higher one acknowledged with `multiple`."""
    await collect(behind_proxy)
    await behind_proxy.send_messages([counted(n) for n in range(300)])
    async with behind_proxy.subscribe([COUNTED], group="readers", prefetch=64) as deliveries:
        before, held = proxy.accepted, []
        for number in range(300):
            held.append(await anext(deliveries))
            if len(held) == 64 or number == 299:
                for delivery in held[1::2] + held[::2]:
                    await delivery.ack()
                    await asyncio.sleep(0)
                held.clear()
        await asyncio.sleep(0.1)
        assert proxy.accepted == before
    with pytest.raises(TimeoutError):
        async with behind_proxy.subscribe([COUNTED], group="readers") as deliveries, asyncio.timeout(0.3):
            await anext(deliveries)


async def test_several_topics_with_a_backlog_are_all_read(broker):
    """Each queue has its own prefetch limit, so more messages arrive than the subscription has asked for."""
    await collect(broker, (COUNTED, OTHER))
    await broker.send_messages([counted(n, topic=topic) for n in range(300) for topic in (COUNTED, OTHER)])
    async with broker.subscribe([COUNTED, OTHER], group="readers", prefetch=1) as deliveries:
        async with asyncio.timeout(60):
            assert Counter(await numbers(deliveries, 600)) == Counter([*range(300)] * 2)


async def test_a_foreign_message_without_an_id_is_requeued_and_dead_lettered_whole(broker, plain, queue, prefix):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        exchange = await plain.get_exchange(prefix)
        headers = {
            "text": "t",
            "number": 7,
            "bytes": bytearray(b"\xff"),
            "list": [1],
            "when": datetime(2026, 1, 1, tzinfo=UTC),
        }
        foreign = aio_pika.Message(b"\x00garbage", headers=headers, correlation_id="c", expiration=60)
        await exchange.publish(foreign, "notification_event.Counted")
        first = await anext(deliveries)
        assert set(first.headers) == set(headers)
        assert first.headers["number"] == "7"

        await first.retry()
        second = await anext(deliveries)
        await second.dead_letter("garbage")

    assert (second.body, second.attempt) == (b"\x00garbage", 2)
    letter = await (await plain.get_queue(f"{queue}:dead")).get()
    assert (letter.body, letter.correlation_id, letter.headers["number"]) == (b"\x00garbage", "c", 7)
    assert letter.expiration is None


async def test_a_deleted_dead_letter_queue_is_declared_again(broker, plain, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_message(counted(1))
        delivery = await anext(deliveries)
        await plain.queue_delete(f"{queue}:dead")

        await delivery.dead_letter("no good")

    letter = await (await plain.get_queue(f"{queue}:dead")).get()
    assert (letter.body, letter.headers["diator-dlq-reason"]) == (delivery.body, "no good")


async def test_a_deleted_queue_of_delayed_retries_is_declared_again(broker, plain, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_messages([counted(1), counted(2)])
        await (await anext(deliveries)).retry(after=0.1)
        await plain.queue_delete(f"{queue}:retry:100")

        await (await anext(deliveries)).retry(after=0.1)

        assert await asyncio.wait_for(numbers(deliveries, 1), SLACK) in ([1], [2])


@pytest.mark.parametrize(("outcome", "group"), [("retry", "readers"), ("dead_letter", None)])
async def test_settling_has_a_time_limit(behind_proxy, proxy, outcome, group):
    """It works even if the queue has to be declared first, on the connection that delivered the message."""
    async with behind_proxy.subscribe([COUNTED], group=group) as deliveries:
        await behind_proxy.send_message(counted(1))
        delivery = await anext(deliveries)
        proxy.black_hole()
        started = monotonic()
        with pytest.raises(BrokerUnavailable):
            await (delivery.retry(after=30) if outcome == "retry" else delivery.dead_letter("bad"))
        assert monotonic() - started < 3.0 + SLACK
        await proxy.heal()


@pytest.mark.parametrize("outcome", ["retry", "dead_letter"])
async def test_a_delivery_of_a_lost_connection_occupies_no_prefetch_slot(behind_proxy, proxy, monkeypatch, outcome):
    """The next connection redelivers it, so it must not occupy a prefetch slot forever."""
    monkeypatch.setattr(_subscription, "_REQUEUE_DELAY", 0.2)
    await collect(behind_proxy)
    async with behind_proxy.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        await behind_proxy.send_message(counted(1))
        delivery, connections = await anext(deliveries), proxy.accepted
        proxy.reset()
        await become(lambda: proxy.accepted, connections + 1)
        with pytest.raises(BrokerUnavailable):
            await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))

        assert await asyncio.wait_for(numbers(deliveries, 1), 30) == [1]


async def test_a_subscription_without_a_group_can_dead_letter(broker, plain, prefix):
    async with broker.subscribe([COUNTED]) as deliveries:
        await broker.send_message(counted(1))
        await (await anext(deliveries)).dead_letter("no good")
    letter = await (await plain.get_queue(f"{prefix}:notification_event:Counted:/:dead")).get()
    assert letter.headers["diator-dlq-reason"] == "no good"


async def test_beyond_the_delivery_limit_rabbitmq_itself_dead_letters(broker, plain, queue, monkeypatch):
    monkeypatch.setattr(_subscription, "DELIVERY_LIMIT", 2)
    await collect(broker)
    await broker.send_message(counted(1))
    attempts = []
    for _ in range(3):
        async with broker.subscribe([COUNTED], group="readers") as deliveries:
            attempts.append((await anext(deliveries)).attempt)

    letters = []
    await (await plain.get_queue(f"{queue}:dead")).consume(letters.append, no_ack=True)
    await become(lambda: len(letters), 1)
    assert attempts == [1, 2, 3]
    assert letters[0].headers["x-first-death-reason"] == "delivery_limit"


async def test_retries_with_alike_delays_share_a_queue_which_goes_when_it_is_unused(broker, plain, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_messages([counted(n) for n in range(4)])
        for after in (0.21, 0.22, 0.24, 0.25):
            await (await anext(deliveries)).retry(after=after)
        waiting = await plain.get_queue(f"{queue}:retry:250")
        assert waiting.declaration_result.message_count <= 4
        assert sorted(await numbers(deliveries, 4)) == [0, 1, 2, 3]
    with pytest.raises(aio_pika.exceptions.ChannelPreconditionFailed, match="x-expires"):
        await plain.declare_queue(waiting.name, durable=True, arguments={"x-queue-type": "quorum", **_without(waiting)})


def _without(queue):
    return {
        "x-message-ttl": 250,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue.name.rpartition(":retry")[0],
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


async def test_a_classic_queue_counts_retries_only(rabbitmq_url, prefix):
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, queue_type="classic") as broker:
        assert broker.capabilities.delivery_count == "retries"
        await collect(broker)
        await broker.send_message(counted(1))
        attempts = []
        for _ in range(2):
            async with broker.subscribe([COUNTED], group="readers") as deliveries:
                attempts.append((await anext(deliveries)).attempt)
        async with broker.subscribe([COUNTED], group="readers") as deliveries:
            await (await anext(deliveries)).retry(after=0.05)
            attempts.append((await anext(deliveries)).attempt)
    assert attempts == [1, 1, 2]


async def test_the_end_takes_no_round_trip_for_each_topic(behind_proxy, proxy, plain, prefix, caplog):
    """Otherwise it would run out of time, and settle nothing more."""
    caplog.set_level("DEBUG", "diator")
    topics = [Topic("notification_event", f"Ended{number}") for number in range(30)]
    async with behind_proxy.subscribe(topics, group="readers"):
        proxy.delay(0.05)
        ending = monotonic()
    assert monotonic() - ending < 2
    assert not [line for line in caplog.messages if line.startswith("ending a subscription")]
    for topic in topics:
        for end in ("readers", "readers:dead"):
            await plain.queue_delete(f"{prefix}:{':'.join(topic)}:{end}")
