"""RabbitMQ against a real one. The traps are those that this service and its client library set."""

import asyncio
import gc
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from time import monotonic
from urllib.parse import urlsplit
from uuid import uuid4

import aio_pika
import pytest
from aiormq.connection import Connection

from diator.brokers import Message
from diator.brokers.audit import audit
from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _subscription
from diator.brokers.rabbitmq._channel import Address
from diator.brokers.supervisor import ReconnectPolicy
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from diator.exceptions import (
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    MessageRejected,
    MessagesNotSent,
    MessageUnroutable,
    OutcomeUnknown,
)
from diator.retrying import RetryPolicy
from diator.testing.fault_proxy import FaultProxy

COUNTED = Topic("notification_event", "Counted")
OTHER = Topic("notification_event", "Other")
RECONNECT = ReconnectPolicy(connect_timeout=5.0, idle_timeout=1.0, probe_timeout=2.0, max_delay=0.5)
SLACK = 2.0
"""How much later than promised a busy machine may be."""


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


# -- what the tests are given ------------------------------------------------------------------------------------


@pytest.fixture
async def plain(rabbitmq_url) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """Plain aio-pika."""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        yield await connection.channel()


@pytest.fixture
async def prefix(rabbitmq_url) -> AsyncIterator[str]:
    prefix = f"test-{uuid4().hex[:12]}"
    yield prefix
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        for topic in (COUNTED, OTHER):
            for queue in ("readers", "readers:dead"):
                await channel.queue_delete(f"{prefix}:{':'.join(topic)}:{queue}")
            await channel.queue_delete(f"{prefix}:{':'.join(topic)}:/:dead")
        await channel.exchange_delete(prefix)


@pytest.fixture
def queue(prefix) -> str:
    return f"{prefix}:notification_event:Counted:readers"


@pytest.fixture
async def brokers(prefix) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def broker(rabbitmq_url, prefix, brokers) -> RabbitMQMessageBroker:
    return await brokers.enter_async_context(RabbitMQMessageBroker(rabbitmq_url, prefix, reconnect=RECONNECT))


@pytest.fixture
async def proxy(rabbitmq_url) -> AsyncIterator[FaultProxy]:
    parts = urlsplit(rabbitmq_url)
    async with FaultProxy(parts.hostname, parts.port) as proxy:
        yield proxy


@pytest.fixture
async def behind_proxy(rabbitmq_url, proxy, prefix, brokers) -> RabbitMQMessageBroker:
    url = rabbitmq_url.replace(urlsplit(rabbitmq_url).netloc.rpartition("@")[2], f"{proxy.host}:{proxy.port}")
    return await brokers.enter_async_context(RabbitMQMessageBroker(url, prefix, timeout=3.0, reconnect=RECONNECT))


def counted(number=0, *, topic=COUNTED, message_id=None, **options) -> Message:
    event_id = message_id or uuid4()
    payload = {"event_id": str(event_id), "event_timestamp": datetime.now(UTC).isoformat(), "number": number}
    return Message.create(message_name=topic.message_name, payload=payload, message_id=event_id, **options)


async def collect(broker, topics=(COUNTED,)):
    """Have the group be there."""
    async with broker.subscribe(topics, group="readers"):
        pass


async def become(count, at_least):
    async with asyncio.timeout(10):
        while count() < at_least:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


async def numbers(deliveries, count) -> list[int]:
    taken = []
    for _ in range(count):
        delivery = await anext(deliveries)
        taken.append(json.loads(delivery.body)["payload"]["number"])
        await delivery.ack()
    return taken


# -- sending -----------------------------------------------------------------------------------------------------


async def test_a_plain_client_reads_properties_headers_and_body(broker, plain, prefix):
    mine = await plain.declare_queue(exclusive=True)
    await mine.bind(prefix, "notification_event.*")
    message = counted(7, key="k", headers={"trace": "ä"})

    await broker.send_message(message)

    got = await mine.get()
    assert (got.message_id, got.type, got.content_type) == (str(message.message_id), "Counted", "application/json")
    assert got.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
    assert abs((datetime.now(UTC) - got.timestamp).total_seconds()) < 60
    assert got.headers == {"trace": "ä", "key": "k"}
    assert json.loads(got.body)["payload"]["number"] == 7


async def test_trap_3_what_nobody_wants_is_told(broker):
    message = counted()

    with pytest.raises(MessageUnroutable, match=r"notification_event\.Counted") as caught:
        await broker.send_message(message)

    assert caught.value.message_id == message.message_id


async def test_what_nobody_wants_is_dropped_where_the_program_says_so(rabbitmq_url, prefix):
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, mandatory=False) as broker:
        await broker.send_message(counted())

        assert broker.capabilities.unroutable == "dropped"


async def test_trap_4_each_message_of_one_id_hears_its_own_verdict(broker):
    """A returned message does not say which of those that have its id it was."""
    await collect(broker)
    one_id = uuid4()
    routed, unroutable = counted(message_id=one_id), counted(topic=OTHER, message_id=one_id)

    verdicts = await asyncio.gather(
        *(broker.send_message(each) for each in [unroutable, routed] * 20), return_exceptions=True
    )

    assert [type(verdict) for verdict in verdicts] == [MessageUnroutable, type(None)] * 20


async def test_one_bad_message_among_many_is_named(broker):
    await collect(broker)
    messages = [counted(), counted(topic=OTHER), counted()]

    with pytest.raises(MessagesNotSent) as caught:
        await broker.send_messages(messages)

    assert caught.value.message_ids == (messages[1].message_id,)
    assert isinstance(caught.value.__cause__, MessageUnroutable)


async def test_a_full_queue_refuses(broker, plain, prefix):
    """`reject-publish`: RabbitMQ answers with a nack."""
    full = await plain.declare_queue(exclusive=True, arguments={"x-max-length": 2, "x-overflow": "reject-publish"})
    await full.bind(prefix, "notification_event.Counted")

    verdicts = await asyncio.gather(*(broker.send_message(counted(n)) for n in range(5)), return_exceptions=True)

    assert [type(verdict) for verdict in verdicts] == [type(None)] * 2 + [MessageRejected] * 3


async def test_trap_5_when_the_exchange_is_deleted_each_message_has_a_verdict_and_the_next_is_sent(
    broker, plain, prefix
):
    await collect(broker)
    await broker.send_message(counted())
    await plain.exchange_delete(prefix)

    verdicts = await asyncio.gather(*(broker.send_message(counted(n)) for n in range(50)), return_exceptions=True)
    await collect(broker)  # it binds the queue again
    await broker.send_message(counted())

    assert all(isinstance(verdict, BrokerError) for verdict in verdicts)
    await plain.exchange_delete(prefix)
    with pytest.raises(BrokerUnavailable):
        await broker.send_message(counted())  # alone, RabbitMQ's answer is about this one: it was not sent


async def test_trap_7_a_service_that_is_away_raises_our_errors(behind_proxy, proxy):
    await collect(behind_proxy)
    proxy.refuse()
    proxy.reset()
    await asyncio.sleep(0.1)

    with pytest.raises(BrokerUnavailable):
        await behind_proxy.send_message(counted())

    await proxy.heal()
    await behind_proxy.send_message(counted())


@pytest.mark.timeout(180)
async def test_trap_6_an_alarm_is_told_in_time_and_what_was_sent_arrives_after_it(private_rabbitmq, caplog):
    async with (
        RabbitMQMessageBroker(private_rabbitmq.url, timeout=3.0, reconnect=RECONNECT) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
    ):
        await broker.send_message(counted(1))
        await asyncio.to_thread(private_rabbitmq.run, "rabbitmqctl set_vm_memory_high_watermark 0.000001")
        began = monotonic()

        with pytest.raises(OutcomeUnknown, match="alarm"):
            await broker.send_message(counted(2))

        assert monotonic() - began < 3.0 + SLACK
        assert await numbers(deliveries, 1) == [1]  # readers are served
        assert [finding.capability for finding in await audit(broker)] == ["receipt"]
        await asyncio.to_thread(private_rabbitmq.run, "rabbitmqctl set_vm_memory_high_watermark 0.6")
        assert await numbers(deliveries, 1) == [2]
        await broker.send_message(counted(3))
        assert await numbers(deliveries, 1) == [3]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("diator")]
    assert [message for message in messages if "stopped reading from publishers" in message]
    private_rabbitmq.let_go()


async def test_headers_that_mean_something_to_rabbitmq_are_refused(broker):
    for name in ("CC", "BCC", "x-death", "x-delivery-count", "diator-attempt"):
        with pytest.raises(EncodingError, match=name):
            await broker.send_message(counted(headers={name: "1"}))


async def test_headers_that_do_not_fit_are_refused_and_cost_nobody_else(broker):
    await collect(broker)
    sends = [broker.send_message(counted(headers={"h": "x" * 140_000})), broker.send_message(counted())]

    assert [type(each) for each in await asyncio.gather(*sends, return_exceptions=True)] == [
        MessageRejected,
        type(None),
    ]


async def test_a_thousand_callers_share_one_connection(behind_proxy, proxy):
    await collect(behind_proxy)
    before = proxy.accepted

    await asyncio.gather(*(behind_proxy.send_message(counted(n)) for n in range(1_000)))

    assert proxy.accepted <= before + 1


# -- the topology ------------------------------------------------------------------------------------------------


async def test_trap_8_a_queue_with_other_settings_is_a_clear_error(broker, plain, queue):
    await plain.declare_queue(queue, durable=True, arguments={"x-queue-type": "classic"})

    with pytest.raises(ConfigurationError, match=r"inequivalent arg 'x-.*delete what is there"):
        await collect(broker)


async def test_a_queue_that_gets_other_settings_while_it_is_read_ends_the_subscription(broker, plain, queue):
    async with broker.subscribe([COUNTED], group="readers") as deliveries:

        async def replace():
            await plain.queue_delete(queue)
            await plain.declare_queue(queue, durable=True, arguments={"x-queue-type": "classic"})

        waiting = asyncio.create_task(anext(deliveries))
        await replace()
        with pytest.raises(ConfigurationError, match="delete what is there"):
            await asyncio.wait_for(waiting, RECONNECT.max_delay + SLACK)


async def test_trap_2_a_queue_that_is_deleted_is_there_again_and_the_gap_is_told(broker, plain, queue):
    gaps = []
    async with broker.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        await broker.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]

        await plain.queue_delete(queue)

        await become(gaps.__len__, 1)
        await broker.send_message(counted(2))
        assert await numbers(deliveries, 1) == [2]
    assert "queue is gone" in gaps[0].reason


async def test_an_exchange_that_is_deleted_is_there_again_and_the_gap_is_told(broker, plain, prefix):
    """Nobody tells those whose queues were bound to it."""
    gaps = []
    async with broker.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        await plain.exchange_delete(prefix)

        await become(gaps.__len__, 1)
        await broker.send_message(counted(2))
        assert await numbers(deliveries, 1) == [2]


async def test_a_queue_that_was_lost_while_nobody_was_connected_is_a_gap(behind_proxy, proxy, plain, queue):
    gaps = []
    async with behind_proxy.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries:
        proxy.refuse()
        proxy.reset()
        await plain.queue_delete(queue)
        await proxy.heal()

        await become(gaps.__len__, 1)
        await behind_proxy.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]


async def test_a_lost_connection_alone_is_no_gap(behind_proxy, proxy):
    gaps = []
    async with behind_proxy.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
        before = proxy.accepted
        proxy.reset()
        await become(lambda: proxy.accepted, before + 1)
        await behind_proxy.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]
    assert gaps == []


async def test_a_subscription_without_a_group_takes_its_queue_along(broker, rabbitmq_url, prefix):
    async with broker.subscribe([COUNTED]):
        await broker.send_message(counted())
    with pytest.raises(MessageUnroutable):
        await broker.send_message(counted())


# -- settling ----------------------------------------------------------------------------------------------------


async def test_trap_1_a_handler_outlives_its_connection_and_the_message_comes_again(behind_proxy, proxy):
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

    await asyncio.wait_for(consumer.run(signals=False), 15)

    assert (handled, cancelled) == ([1, 1], [])
    assert [(each.outcome, each.attempt) for each in outcomes] == [("acked", 1), ("acked", 2)]


async def test_what_was_fetched_by_a_lost_connection_is_not_begun(behind_proxy, proxy):
    """As much as is read ahead waits for a slow handler, and nothing is received meanwhile. It comes again anyway."""
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


async def test_trap_9_what_always_fails_is_handled_so_often_and_then_put_aside(broker, plain, queue):
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

    await asyncio.wait_for(consumer.run(signals=False), 15)

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


async def test_trap_10_what_was_fetched_and_not_begun_comes_to_the_next_and_nothing_is_lost(broker):
    await collect(broker)
    await broker.send_messages([counted(n) for n in range(100)])
    async with broker.subscribe([COUNTED], group="readers", prefetch=100) as deliveries:
        done = await numbers(deliveries, 10)
        held = [await anext(deliveries) for _ in range(20)]
        for delivery in held[::2]:
            done.append(json.loads(delivery.body)["payload"]["number"])
            await delivery.ack()

    async with broker.subscribe([COUNTED], group="readers", prefetch=100) as deliveries:
        async with asyncio.timeout(10):
            done += await numbers(deliveries, 80)

    assert Counter(done) == Counter(range(100))


async def test_acknowledgements_out_of_order_keep_the_channel(behind_proxy, proxy):
    """A lower tag after a higher one that meant all before it closes the channel."""
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
    """Each has a prefetch of its own, so that more arrives than the subscription has asked for."""
    await collect(broker, (COUNTED, OTHER))
    await broker.send_messages([counted(n, topic=topic) for n in range(300) for topic in (COUNTED, OTHER)])
    async with broker.subscribe([COUNTED, OTHER], group="readers", prefetch=1) as deliveries:
        async with asyncio.timeout(20):
            assert Counter(await numbers(deliveries, 600)) == Counter([*range(300)] * 2)


async def test_a_foreign_message_without_an_id_is_given_back_and_put_aside_whole(broker, plain, queue, prefix):
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


async def test_what_cannot_be_put_aside_is_given_back(broker, plain, queue, monkeypatch):
    monkeypatch.setattr(_subscription, "_GIVEN_BACK_AFTER", 0.2)
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        await broker.send_message(counted(1))
        delivery = await anext(deliveries)
        await plain.queue_delete(f"{queue}:dead")

        with pytest.raises(MessageUnroutable):
            await delivery.dead_letter("no good")

        again = await asyncio.wait_for(anext(deliveries), 0.2 + SLACK)
        await again.ack()
    assert again.attempt == 2


@pytest.mark.parametrize(("outcome", "group"), [("retry", "readers"), ("dead_letter", None)])
async def test_settling_is_bounded_where_nobody_answers(behind_proxy, proxy, outcome, group):
    """Also where a queue has to be declared first, on the connection that it came by."""
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
async def test_what_failed_to_be_settled_on_a_lost_connection_keeps_no_place(behind_proxy, proxy, monkeypatch, outcome):
    """It comes again by the next connection, for which it must not count as given out for ever."""
    monkeypatch.setattr(_subscription, "_GIVEN_BACK_AFTER", 0.2)
    await collect(behind_proxy)
    async with behind_proxy.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        await behind_proxy.send_message(counted(1))
        delivery, connections = await anext(deliveries), proxy.accepted
        proxy.reset()
        await become(lambda: proxy.accepted, connections + 1)
        with pytest.raises(BrokerUnavailable):
            await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))

        assert await asyncio.wait_for(numbers(deliveries, 1), 5) == [1]


async def test_a_subscription_without_a_group_puts_aside(broker, plain, prefix):
    async with broker.subscribe([COUNTED]) as deliveries:
        await broker.send_message(counted(1))
        await (await anext(deliveries)).dead_letter("no good")
    letter = await (await plain.get_queue(f"{prefix}:notification_event:Counted:/:dead")).get()
    assert letter.headers["diator-dlq-reason"] == "no good"


async def test_beyond_the_delivery_limit_rabbitmq_itself_puts_aside(broker, plain, queue, monkeypatch):
    monkeypatch.setattr(_subscription, "_DELIVERY_LIMIT", 2)
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


# -- looking into it ---------------------------------------------------------------------------------------------


async def test_an_audit_of_what_diator_declared_finds_nothing(broker):
    async with broker.subscribe([COUNTED], group="readers"):
        await broker.send_message(counted())
        assert await audit(broker) == []


async def test_an_audit_finds_what_is_gone_or_otherwise(broker, plain, queue, prefix):
    async with broker.subscribe([COUNTED], group="readers"):
        await plain.queue_delete(f"{queue}:dead")
        await plain.declare_queue(f"{queue}:dead", durable=True, arguments={"x-queue-type": "classic"})
        otherwise = await audit(broker)
        await plain.queue_delete(f"{queue}:dead")
        gone = await audit(broker)
    assert [(each.capability, "x-queue-type" in each.problem) for each in otherwise] == [("dead_letter", True)]
    assert [(each.capability, "is gone" in each.problem) for each in gone] == [("dead_letter", True)]


async def test_a_secret_is_in_no_error_log_or_repr(caplog, prefix):
    caplog.set_level(logging.DEBUG)
    broker = RabbitMQMessageBroker(f"amqp://guest:swordfish-{prefix}@127.0.0.1:1/", prefix, timeout=1.0)
    texts = [repr(broker), repr(vars(broker))]
    for doing in (broker.send_message(counted()), broker.subscribe([COUNTED]).__aenter__()):
        with pytest.raises(BrokerUnavailable) as caught:
            await doing
        texts += [repr(caught.value), repr(caught.value.__cause__)]
    await broker.aclose()

    assert not [text for text in [*texts, caplog.text] if f"swordfish-{prefix}" in text]


async def test_nothing_is_left_when_it_is_closed(rabbitmq_url, prefix):
    tasks = len(asyncio.all_tasks())
    async with (
        RabbitMQMessageBroker(rabbitmq_url, prefix) as broker,
        broker.subscribe([COUNTED], group="readers") as deliveries,
    ):
        await broker.send_message(counted(1))
        await numbers(deliveries, 1)
    await asyncio.sleep(0.05)
    gc.collect()

    assert len(asyncio.all_tasks()) == tasks


async def test_cancelled_when_it_has_just_connected_it_leaves_no_connection(rabbitmq_url, monkeypatch):
    """The client connects in a task of its own, which may be done when whoever waits for it is cancelled."""
    connect, tasks = Connection.connect, asyncio.all_tasks()

    async def connect_in_vain(connection):
        await connect(connection)
        raise asyncio.CancelledError

    monkeypatch.setattr(Connection, "connect", connect_in_vain)
    with pytest.raises(asyncio.CancelledError):
        await Address(rabbitmq_url, None).dial("testing")

    async with asyncio.timeout(5):
        await asyncio.wait(asyncio.all_tasks() - tasks)


async def test_cancelled_as_it_begins_to_consume_it_ends_at_once(broker, monkeypatch):
    """RabbitMQ does not answer who closes a channel on which it has not yet confirmed a consumer."""
    ask, consuming = _subscription.Connection.ask, asyncio.Event()

    async def noticed(reading, frame):
        if isinstance(frame, _subscription.commands.Basic.Consume):
            consuming.set()
        return await ask(reading, frame)

    monkeypatch.setattr(_subscription.Connection, "ask", noticed)
    async with broker.subscribe([COUNTED], group="readers"):
        pass
    await broker.send_messages([counted(number) for number in range(10)])
    for _ in range(10):
        consuming.clear()
        entering = asyncio.create_task(broker.subscribe([COUNTED], group="readers").__aenter__())
        await consuming.wait()
        began = monotonic()
        entering.cancel()
        await asyncio.wait({entering})
        assert monotonic() - began < 1
