"""Messages that nobody has subscribed to yet: how they are retained, and which group receives them."""

import asyncio
import contextlib
from time import monotonic

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity
from yarl import URL

from diator.brokers.audit import audit
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _subscription
from diator.exceptions import BrokerUnavailable, ConfigurationError, MessageRejected, MessageUnroutable, OutcomeUnknown
from tests.integration.rabbitmq.helpers import COUNTED, OTHER, RECONNECT, become, collect, counted, numbers


async def count(plain, queue):
    return (await plain.declare_queue(queue, passive=True)).declaration_result.message_count


@pytest.fixture
def retained(prefix):
    return f"{prefix}:notification_event:Counted:/retained"


@pytest.fixture
def released(rabbitmq_url, retained):
    """Return a function that waits until the retained messages are claimed by no group."""

    async def released():
        async with await aio_pika.connect(rabbitmq_url) as connection, asyncio.timeout(10):
            with contextlib.suppress(ChannelNotFoundEntity):
                while await (await connection.channel()).get_exchange(retained):  # noqa: ASYNC110  # nothing notifies
                    await asyncio.sleep(0.05)

    return released


async def test_concurrent_first_messages_keep_their_order(broker, monkeypatch):
    """The first is published alone. The others wait for it in their order, also if callers are cancelled meanwhile."""
    monkeypatch.setattr(broker._service, "_safe_after", 0.05)
    sends = []
    for number in range(200):  # some come while the queue is declared, some when it is bound
        sends.append(asyncio.create_task(broker.send_message(counted(number))))
        if number in {1, 2, 150}:
            sends[number].cancel()
        await asyncio.sleep(0.0005)
    await asyncio.gather(*sends, return_exceptions=True)
    await broker.send_message(counted(200))

    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        taken = []
        while 200 not in taken:
            taken += await numbers(deliveries, 1)
    assert taken == sorted(taken)
    assert {*range(201)} - {1, 2, 150} <= {*taken}


async def test_two_first_consumers_of_a_group_share_what_was_retained(broker, plain, retained):
    await broker.send_messages([counted(number) for number in range(100)])
    taken = []

    async def consume():
        async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
            while True:
                taken.extend(await numbers(deliveries, 1))

    consumers = [asyncio.create_task(consume()) for _ in range(2)]
    await become(taken.__len__, 100)
    await broker.send_messages([counted(number) for number in range(100, 120)])
    await become(taken.__len__, 120)
    for each in consumers:
        each.cancel()
    await asyncio.gather(*consumers, return_exceptions=True)

    assert sorted(taken) == [*range(120)]
    assert await count(plain, retained) == 0


async def test_a_claim_ends_when_the_retained_messages_are_settled(broker, plain, queue, retained, released):
    """Then what is retained later belongs to whoever comes first."""
    await broker.send_message(counted(1))
    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        assert await numbers(deliveries, 1) == [1]
        await released()
    await plain.queue_delete(queue)
    await broker.send_message(counted(2))

    async with broker.subscribe([COUNTED], group="others") as deliveries:
        assert await numbers(deliveries, 1) == [2]


async def test_a_claim_ends_with_the_queue_of_its_group(broker, plain, queue):
    """A group that is given up in the middle leaves the rest to the next one."""
    await broker.send_messages([counted(number) for number in range(10)])
    async with broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries:
        await (await anext(deliveries)).ack()
    async with broker.subscribe([COUNTED], group="others") as deliveries:
        waiting = asyncio.create_task(anext(deliveries))
        assert not (await asyncio.wait({waiting}, timeout=0.3))[0]
        waiting.cancel()

    await plain.queue_delete(queue)

    async with broker.subscribe([COUNTED], group="others") as deliveries:
        assert await numbers(deliveries, 9) == [*range(1, 10)]


async def test_a_topic_whose_queues_were_deleted_is_retained_again(broker, plain, queue):
    await collect(broker)
    await broker.send_message(counted(1))
    await plain.queue_delete(queue)

    await broker.send_messages([counted(2), counted(3)])

    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        assert await numbers(deliveries, 2) == [2, 3]


async def test_messages_sent_while_the_exchange_had_no_bindings_are_retained_for_a_group(
    rabbitmq_url, plain, prefix, monkeypatch
):
    gaps, may_notice = [], asyncio.Event()
    check = _subscription.Connection._check_exchange

    async def check_later(self):
        await may_notice.wait()
        return await check(self)

    monkeypatch.setattr(_subscription.Connection, "_check_exchange", check_later)
    async with (
        RabbitMQMessageBroker(rabbitmq_url, prefix) as broker,
        broker.subscribe([COUNTED], group="readers", on_gap=gaps.append) as deliveries,
    ):
        await broker.send_message(counted(1))
        assert await numbers(deliveries, 1) == [1]
        await plain.exchange_delete(prefix)
        with pytest.raises(BrokerUnavailable):
            await broker.send_message(counted(2))
        await broker.send_message(counted(3))
        assert [str(each) for each in await audit(broker) if "was deleted" in each.problem]

        may_notice.set()
        await become(gaps.__len__, 1)
        assert await numbers(deliveries, 1) == [3]
        assert await audit(broker) == []


async def test_another_bound_of_another_program_is_accepted(broker, rabbitmq_url, prefix):
    await broker.send_message(counted(1))
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, max_retained=7) as other:
        await other.send_message(counted(2))

    async with broker.subscribe([COUNTED], group="readers") as deliveries:
        assert await numbers(deliveries, 2) == [1, 2]


async def test_beyond_the_bound_a_send_is_refused_and_names_the_option(rabbitmq_url, prefix):
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, max_retained=5) as broker:
        confirmed = []
        with contextlib.suppress(MessageRejected):
            for number in range(50):  # not at once: RabbitMQ accepts what is under way when the bound is reached
                await broker.send_message(counted(number))
                confirmed.append(number)
        with pytest.raises(MessageRejected, match="max_retained"):
            await broker.send_message(counted())
        assert 5 <= len(confirmed) <= 10
        async with broker.subscribe([COUNTED], group="readers") as deliveries:
            assert await numbers(deliveries, len(confirmed)) == confirmed


async def test_an_exchange_of_another_program_retains_nothing_and_an_error_says_so(rabbitmq_url, plain, prefix):
    """Such as one that FastStream has declared first."""
    await plain.declare_exchange(prefix, "topic", durable=True)
    async with RabbitMQMessageBroker(rabbitmq_url, prefix, reconnect=RECONNECT) as broker:
        with pytest.raises(MessageUnroutable, match="without the alternate exchange"):
            await broker.send_message(counted())
        assert [finding.capability for finding in await audit(broker)] == ["unroutable"]
        async with broker.subscribe([COUNTED], group="readers") as deliveries:
            await broker.send_message(counted(2))
            assert await numbers(deliveries, 1) == [2]


async def test_an_exchange_of_another_type_is_refused(rabbitmq_url, plain, prefix):
    await plain.declare_exchange(prefix, "fanout", durable=True)
    async with contextlib.AsyncExitStack() as stack:
        broker = RabbitMQMessageBroker(rabbitmq_url, prefix, timeout=3.0)
        stack.push_async_callback(broker.aclose)
        with pytest.raises(MessageRejected, match="topic exchange"):
            await broker.send_message(counted())
        with pytest.raises(ConfigurationError, match="inequivalent arg 'type'"):
            await collect(broker)


async def test_each_topic_has_its_own_retained_messages(broker):
    await broker.send_messages([counted(1), counted(2, topic=OTHER)])

    async with broker.subscribe([OTHER], group="readers") as deliveries:
        assert await numbers(deliveries, 1) == [2]
    async with broker.subscribe([COUNTED, OTHER], group="readers") as deliveries:
        assert await numbers(deliveries, 1) == [1]


async def test_a_group_named_like_a_queue_of_diator_is_another_queue(broker):
    await broker.send_message(counted(1))
    async with broker.subscribe([COUNTED], group="/retained") as deliveries:
        assert await numbers(deliveries, 1) == [1]


async def test_a_send_whose_queue_was_deleted_meanwhile_has_one_time_limit(behind_proxy, proxy, plain, queue):
    await collect(behind_proxy)
    await behind_proxy.send_message(counted())
    await plain.queue_delete(queue)
    proxy.delay(1.0)  # so RabbitMQ returns the message after two seconds of three
    began = monotonic()
    with pytest.raises((BrokerUnavailable, OutcomeUnknown)):
        await behind_proxy.send_message(counted())
    assert monotonic() - began < 4


@pytest.mark.timeout(180)
async def test_a_hand_over_that_rabbitmq_refuses_is_begun_again(private_rabbitmq):
    """Otherwise the subscription would be connected, and never consume the group's own queues."""
    service = private_rabbitmq

    async def permit(write):
        await asyncio.to_thread(service.run, f"rabbitmqctl set_permissions reader .* {write} .*")
        service.let_go()

    await asyncio.to_thread(service.run, "rabbitmqctl add_user reader secret")
    await permit(".*")
    url = URL(service.url).with_user("reader").with_password("secret")
    async with (
        RabbitMQMessageBroker(service.url, "handed") as sender,
        RabbitMQMessageBroker(url, "handed", reconnect=RECONNECT, extra_prefetch=0) as broker,
    ):
        await sender.send_message(counted(0))
        await sender.send_messages([counted(number, topic=OTHER) for number in range(1, 4)])
        async with broker.subscribe([COUNTED, OTHER], group="readers", prefetch=1) as deliveries, asyncio.timeout(60):
            first = await anext(deliveries)
            await permit("^$")
            await first.ack()
            await become(lambda: deliveries.reconnects, 1)
            await permit(".*")
            await sender.send_message(counted(4, topic=OTHER))
            taken = set()
            while 4 not in taken:
                taken |= {*await numbers(deliveries, 1)}
