"""Kafka itself. The traps are those that this service and its client library set; the suite has the others."""

import asyncio
import json
import re
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from aiokafka.partitioner import DefaultPartitioner

from diator.brokers import Message
from diator.brokers.audit import audit
from diator.brokers.base import Topic
from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    MessageRejected,
    MessagesNotSent,
    OutcomeUnknown,
)
from diator.testing.fault_proxy import FaultProxy, Flow

COUNTED = Topic("notification_event", "Counted")
TIMEOUT = 2.0
SLACK = 1.5
"""How much later than promised a busy machine may be."""


# -- what the tests are given ------------------------------------------------------------------------------------


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4().hex[:12]}"


@pytest.fixture
def name(prefix) -> str:
    """What the topic is called in Kafka."""
    return f"{prefix}.notification_event.Counted"


@pytest.fixture
async def make(prefix):
    """Makes brokers with little patience, and closes them."""
    async with AsyncExitStack() as stack:

        async def make(servers, **options) -> KafkaMessageBroker:
            reconnect = ReconnectPolicy(connect_timeout=6.0, idle_timeout=1.0, probe_timeout=1.0, max_delay=0.2)
            options = {
                "timeout": TIMEOUT,
                "session_timeout": 6.0,
                "heartbeat_interval": 0.1,
                "reconnect": reconnect,
                **options,
            }
            return await stack.enter_async_context(KafkaMessageBroker(servers, prefix, **options))

        yield make


@pytest.fixture
async def broker(make, kafka_servers) -> KafkaMessageBroker:
    return await make(kafka_servers)


@pytest.fixture
async def admin(kafka_servers):
    """Plain aiokafka."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_servers)
    await admin.start()
    yield admin
    await admin.close()


@pytest.fixture
async def proxy(private_kafka):
    proxy = FaultProxy("127.0.0.1", private_kafka.behind)
    proxy.port = private_kafka.proxied
    async with proxy:
        yield proxy


@pytest.fixture
def proxied(proxy) -> str:
    return f"{proxy.host}:{proxy.port}"


# -- how they are told -------------------------------------------------------------------------------------------


def message(number, topic=COUNTED, **fields) -> Message:
    return Message.create(message_name=topic.message_name, payload={"number": number}, **fields)


async def send(broker, *numbers, **fields) -> None:
    await broker.send_messages([message(number, **fields) for number in numbers])


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


def subscribed(broker, *topics, group="billing", **options):
    return broker.subscribe(topics or [COUNTED], group=group, **options)


async def take(deliveries, count, *, within=8.0) -> list:
    async with asyncio.timeout(within):
        return [await anext(deliveries) for _ in range(count)]


async def acked(deliveries, count, *, within=8.0) -> list[int]:
    taken = []
    for _ in range(count):
        (delivery,) = await take(deliveries, 1, within=within)
        taken.append(number_of(delivery))
        await delivery.ack()
    return taken


async def all_that_comes(deliveries, *, within=1.0) -> list[int]:
    """Take and acknowledge until nothing comes any more."""
    taken: list[int] = []
    with suppress(TimeoutError):
        while True:
            taken += await acked(deliveries, 1, within=within)
    return taken


async def nothing_comes(deliveries, *, within=0.4) -> None:
    with pytest.raises(TimeoutError):
        await take(deliveries, 1, within=within)


async def on_its_way(broker) -> None:
    """Wait until all that was sent is: what is sent from then on is in another batch."""
    await asyncio.sleep(0)
    while not all(batch.is_sent for batch in broker._service._batches):  # noqa: ASYNC110  # there is nothing to wait on
        await asyncio.sleep(0.01)


async def stored(servers, name) -> list:
    """Every record of the topic *name*, as plain aiokafka reads it."""
    async with AIOKafkaConsumer(name, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        return [await consumer.getone() for _ in range(sum(ends.values()))]


async def committed(servers, group) -> dict:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        return await admin.list_consumer_group_offsets(group)
    finally:
        await admin.close()


@asynccontextmanager
async def within(seconds):
    began = monotonic()
    yield
    assert monotonic() - began < seconds


# -- trap 1: an idempotent producer waits for ever when its broker is gone -----------------------------------------


async def test_every_call_ends_when_kafka_freezes(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)

    async with within(TIMEOUT + SLACK):
        verdicts = await asyncio.gather(*(broker.send_message(message(n)) for n in range(20)), return_exceptions=True)
    async with within(TIMEOUT + SLACK):
        (refused,) = await asyncio.gather(broker.send_message(message(99)), return_exceptions=True)
    async with within(TIMEOUT + SLACK):
        await broker.aclose()

    assert {type(verdict) for verdict in verdicts} == {OutcomeUnknown}
    assert isinstance(refused, BrokerUnavailable)
    await asyncio.to_thread(private_kafka.unpause)


async def test_closing_takes_no_longer_than_the_calls_that_it_waits_for(make, private_kafka) -> None:
    broker = await make(private_kafka.url, partitions=1)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    sending = [asyncio.create_task(broker.send_message(message(1)))]
    await on_its_way(broker)
    sending.append(asyncio.create_task(broker.send_message(message(2))))  # it is not on its way
    await asyncio.sleep(0)
    async with within(TIMEOUT + SLACK):
        await broker.aclose()
    verdicts = await asyncio.gather(*sending, return_exceptions=True)
    await asyncio.to_thread(private_kafka.unpause)
    assert [type(each) for each in verdicts] == [OutcomeUnknown, BrokerUnavailable]


async def test_a_producer_that_broke_is_made_anew(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    with pytest.raises(OutcomeUnknown):
        await broker.send_message(message(1))
    await asyncio.to_thread(private_kafka.unpause)

    await send(broker, 2)

    assert number_of_each(await stored(private_kafka.url, broker._names.topic(COUNTED))) >= {0, 2}


def number_in(record) -> int:
    return json.loads(record.value)["payload"]["number"]


def number_of_each(records) -> set[int]:
    return {number_in(record) for record in records}


async def test_a_message_whose_confirmation_is_lost_is_stored_once(make, proxy, proxied, name, private_kafka) -> None:
    """The client sends it again by itself. Kafka knows the repeat by its number."""
    broker = await make(proxied, timeout=5.0)
    await send(broker, 0, key="k")
    proxy.withhold(Flow.TO_CLIENT)
    sending = asyncio.create_task(broker.send_message(message(1, key="k")))
    while len(await stored(private_kafka.url, name)) == 1:  # noqa: ASYNC110  # its confirmation is withheld then
        await asyncio.sleep(0.05)
    proxy.reset()
    await proxy.heal()

    await sending

    assert [json.loads(each.value)["payload"]["number"] for each in await stored(private_kafka.url, name)] == [0, 1]


# -- traps 2 and 3: what is committed ----------------------------------------------------------------------------


async def test_what_is_committed_is_the_lowest_that_is_not_finished(broker, kafka_servers, name) -> None:
    group = f"group-{uuid4().hex}"
    await send(broker, *range(10), key="k")
    async with subscribed(broker, group=group) as deliveries:
        taken = await take(deliveries, 10)
        for delivery in [*taken[:4], *taken[5:]]:
            await delivery.ack()
        await asyncio.sleep(0.5)

        told = await committed(kafka_servers, broker._names.group(group))
        (offset,) = [each.offset for each in told.values() if each.offset > 0]

    assert offset == 4
    async with subscribed(broker, group=group) as deliveries:
        assert [number_of(each) for each in await take(deliveries, 1)] == [4]
        await nothing_comes(deliveries)


async def test_where_there_is_no_room_beside_a_commit_it_is_committed_all_the_same(
    make, kafka_servers, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("diator.brokers.kafka._offsets.BESIDE_A_COMMIT", 100_000)  # more than Kafka takes
    broker, group = await make(kafka_servers, max_unacked_per_partition=2000), f"group-{uuid4().hex}"
    await send(broker, *range(2000), key="k")
    async with subscribed(broker, group=group, prefetch=2000) as deliveries:
        taken = await take(deliveries, 2000)
        for delivery in [*taken[:5], *taken[6::2]]:
            await delivery.ack()
    assert caplog.text.count("no room beside a commit") == 1
    assert max(each.offset for each in (await committed(kafka_servers, broker._names.group(group))).values()) == 5
    async with subscribed(broker, group=group) as deliveries:
        assert (await acked(deliveries, 1995)) == [*range(5, 2000)]


# -- trap 4: a commit hangs, or fails for all partitions because of one -------------------------------------------


async def test_a_subscription_ends_when_kafka_is_frozen(make, private_kafka) -> None:
    broker = await make(private_kafka.url)
    await send(broker, 0)
    async with AsyncExitStack() as stack:
        deliveries = await stack.enter_async_context(subscribed(broker))
        (delivery,) = await take(deliveries, 1)
        await asyncio.to_thread(private_kafka.pause)
        await delivery.ack()
        async with within(TIMEOUT + SLACK):
            await stack.aclose()
    await asyncio.to_thread(private_kafka.unpause)

    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        while await acked(deliveries, 1, within=20) != [1]:
            pass  # the commit may have waited in the frozen service's buffers, or not


# -- traps 5 and 6: members come and go --------------------------------------------------------------------------


async def test_work_that_was_begun_ends_before_its_partition_goes_to_another(broker) -> None:
    group = f"group-{uuid4().hex}"
    await send(broker, *range(40))
    async with subscribed(broker, group=group, prefetch=40) as one:
        held = await take(one, 40)
        joining = asyncio.create_task(take_from_new_member(broker, group))
        await asyncio.sleep(0.6)
        assert not joining.done()  # it waits for the work of the other

        for delivery in held:
            await delivery.ack()
        # By their keys they are in all partitions; without, the client may put them all into one.
        await broker.send_messages([message(number, key=str(number)) for number in range(40, 80)])
        mine = asyncio.create_task(acked_until_cancelled(one))
        others = await joining
        mine.cancel()
        await asyncio.wait({mine})

    assert not {*others} & {*range(40)}


async def take_from_new_member(broker, group) -> list[int]:
    async with subscribed(broker, group=group) as deliveries:
        return await acked(deliveries, 1)


async def acked_until_cancelled(deliveries) -> None:
    while True:
        await acked(deliveries, 1, within=60)


async def test_members_that_come_and_go_lose_nothing(make, kafka_servers) -> None:
    """Eight changes of members while messages come: whatever was fetched, and given to nobody, comes again."""
    group, broker = f"group-{uuid4().hex}", await make(kafka_servers, drain_timeout=1.0)
    handled: Counter[int] = Counter()

    async def handle(deliveries) -> None:
        async for delivery in deliveries:
            await asyncio.sleep(0.001)
            handled[number_of(delivery)] += 1
            await delivery.ack()

    async def send_all() -> None:
        for number in range(0, 1_000, 20):
            await send(broker, *range(number, number + 20))
            await asyncio.sleep(0.1)

    async with subscribed(broker, group=group) as staying, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(handle(staying))
        sending = tasks.create_task(send_all())
        for _ in range(4):
            async with subscribed(broker, group=group) as coming:
                other = asyncio.create_task(handle(coming))
                await asyncio.sleep(1.0)
                other.cancel()
                await asyncio.wait({other})
        await sending
        async with asyncio.timeout(30):
            while len(handled) < 1_000:  # noqa: ASYNC110  # several members handle them
                await asyncio.sleep(0.1)
        reading.cancel()

    assert {*handled} == {*range(1_000)}
    assert sum(handled.values()) - 1_000 <= 4  # at each cancellation, one may have been handled and not acknowledged


async def test_what_is_settled_after_its_partition_went_says_nothing(make, kafka_servers) -> None:
    """It is another's by then, who may be at a later or an earlier place."""
    group, broker = f"group-{uuid4().hex}", await make(kafka_servers, drain_timeout=0.3)
    await asyncio.gather(*(send(broker, number, key=str(number)) for number in range(40)))
    async with subscribed(broker, group=group, prefetch=40) as one:
        held = await take(one, 40)
        async with subscribed(broker, group=group, prefetch=40) as two:
            other = await take(two, 1)
            lost = {number_of(each) for each in [*other, *await take(two, 9)]}
            late = [each for each in held if number_of(each) in lost]
            for delivery in late:
                await delivery.ack()
                assert delivery.outcome == "ack"
            await asyncio.sleep(0.5)
        async with subscribed(broker, group=group, prefetch=40) as three:
            again = {number_of(each) for each in await take(three, 10)}

    assert late
    assert again <= {*range(40)}


async def test_no_more_than_a_window_is_read_ahead_of_the_oldest_unfinished(make, kafka_servers) -> None:
    """And a change of members, which makes aiokafka forget what was paused, does not change that."""
    group = f"group-{uuid4().hex}"
    broker = await make(kafka_servers, max_unacked_per_partition=20, extra_prefetch=10, partitions=1, drain_timeout=0.2)
    await send(broker, *range(200))
    async with subscribed(broker, group=group, prefetch=10) as deliveries:
        (oldest,) = await take(deliveries, 1)
        assert 0 < len(await all_that_comes(deliveries)) <= 20 + 10 + 10

        await oldest.ack()
        assert await acked(deliveries, 1)
        async with subscribed(broker, group=group):
            pass
        await asyncio.sleep(1.0)  # they have shared out the partitions twice
        (oldest,) = await take(deliveries, 1)
        assert 0 < len(await all_that_comes(deliveries)) <= 20 + 10 + 10


# -- trap 7: an end that raises what it was not told to -----------------------------------------------------------


async def test_a_connection_that_is_begun_is_not_forgotten(make, proxy, proxied) -> None:
    """What aiokafka opens it forgets, if whoever wants it is cancelled while it asks about the cluster."""
    proxy.delay(0.02)
    for steps in range(10):
        broker = await make(proxied)
        entering = asyncio.create_task(send(broker, 1))
        await asyncio.sleep(0.02 * steps)
        entering.cancel()
        await asyncio.wait({entering})
        await broker.aclose()


async def test_ending_while_kafka_is_gone_cancels_nobody(make, private_kafka) -> None:
    broker, ended = await make(private_kafka.url), []
    await send(broker, 0)

    async def read() -> None:
        async with subscribed(broker) as deliveries:
            await take(deliveries, 1)
            await asyncio.to_thread(private_kafka.kill)
            await asyncio.sleep(1.0)
        ended.append(True)

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        await asyncio.sleep(0)

    assert ended


# -- trap 8: many callers at once --------------------------------------------------------------------------------


async def test_what_is_sent_at_once_without_a_key_stays_together(make, kafka_servers, name) -> None:
    """In few large batches, and in its order; aiokafka would choose a partition for each."""
    broker = await make(kafka_servers, partitions=4)
    for _ in range(3):
        await send(broker, *range(50))

    places = [TopicPartition(name, number) for number in range(4)]
    async with AIOKafkaConsumer(bootstrap_servers=kafka_servers) as consumer:
        ends = await consumer.end_offsets(places)
    assert sum(ends.values()) == 150
    assert {end % 50 for end in ends.values()} == {0}


async def test_what_kafka_refuses_spoils_nothing_that_follows(broker, name, admin) -> None:
    small = {"max.message.bytes": "1000"}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=small)])
    await send(broker, 1)
    with pytest.raises(MessageRejected, match=r"raise max\.message\.bytes"):
        await broker.send_message(message("x" * 2000))
    async with subscribed(broker) as deliveries:
        for number in range(2, 5):
            await broker.send_message(message(number))
        assert await acked(deliveries, 4) == [1, 2, 3, 4]


async def test_what_is_too_large_only_together_is_sent_in_smaller_batches(broker, name, admin, kafka_servers) -> None:
    """And what is too large by itself is all that is refused: none hears of a batch that others were in."""
    small = {"max.message.bytes": "3000"}
    await admin.create_topics([NewTopic(name, 2, 1, topic_configs=small)])
    messages = [message("x" * 4000 if number == 30 else number, key=f"key {number % 4}") for number in range(200)]
    with pytest.raises(MessagesNotSent) as failed:
        await broker.send_messages(messages)
    assert failed.value.message_ids == (messages[30].message_id,)
    assert isinstance(failed.value.__cause__, MessageRejected)
    records = await stored(kafka_servers, name)
    assert {record.partition for record in records} == {0, 1}
    for key in range(4):
        numbers = [number_in(record) for record in records if record.key == f"key {key}".encode()]
        assert numbers == [number for number in range(key, 200, 4) if number != 30]


async def test_who_waits_for_room_waits_no_longer_for_a_batch_that_is_split(make, kafka_servers, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"max.message.bytes": "3000"})])
    broker = await make(kafka_servers, max_in_flight=100)
    await send(broker, 0, key="k")
    await send(broker, *range(1, 150), key="k")
    assert [number_in(record) for record in await stored(kafka_servers, name)] == list(range(150))


async def test_closing_waits_for_a_batch_that_is_split(broker, name, admin, kafka_servers) -> None:
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"max.message.bytes": "3000"})])
    await send(broker, 0, key="k")
    sending = [asyncio.create_task(broker.send_message(message(number, key="k"))) for number in range(1, 50)]
    await asyncio.sleep(0)
    async with within(TIMEOUT):
        await broker.aclose()
    await asyncio.gather(*sending)
    assert [number_in(record) for record in await stored(kafka_servers, name)] == list(range(50))


async def test_a_topic_that_is_looked_for_while_a_message_of_another_is_refused(broker, name, admin) -> None:
    """Nobody would answer a question of a producer that has ended."""
    other = Topic("notification_event", "Other")
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"max.message.bytes": "3000"})])
    await send(broker, 0)
    async with within(TIMEOUT):
        verdicts = await asyncio.gather(
            broker.send_message(message("x" * 4000)),
            *(broker.send_message(message(number, topic)) for number in range(3) for topic in (other, COUNTED)),
            return_exceptions=True,
        )
    assert [type(each) for each in verdicts] == [MessageRejected, *[type(None)] * 6]


async def test_a_compacted_topic_refuses_what_has_no_key_and_nothing_else(broker, name, admin, kafka_servers) -> None:
    """Kafka refuses the whole batch, and says nothing of which one it was."""
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})])
    await send(broker, 0, key="k")
    messages = [message(number, key=None if number == 3 else f"key {number}") for number in range(1, 7)]
    with pytest.raises(MessagesNotSent) as failed:
        await broker.send_messages(messages)
    assert failed.value.message_ids == (messages[2].message_id,)
    assert isinstance(failed.value.__cause__, MessageRejected)
    assert [number_in(record) for record in await stored(kafka_servers, name)] == [0, 1, 2, 4, 5, 6]


async def test_what_kafka_says_of_one_topic_is_no_verdict_on_another(broker, name, admin, monkeypatch) -> None:
    """Even if the client does not know what it says."""
    monkeypatch.delitem(errors.kafka_errors, 87)
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})])
    others = [Topic("notification_event", f"Other{number}") for number in range(6)]
    await send(broker, 0, key="k")
    await asyncio.gather(*(broker.send_message(message(0, other)) for other in others))
    verdicts = await asyncio.gather(
        broker.send_message(message(1)),
        *(broker.send_message(message(1, other)) for other in others),
        return_exceptions=True,
    )
    assert [type(each) for each in verdicts] == [OutcomeUnknown, *[type(None)] * 6]


async def test_what_a_refused_message_was_ahead_of_is_sent_all_the_same(broker, name, admin, kafka_servers) -> None:
    """The client would count on, Kafka refuse what follows, and everybody hear that nobody knows."""
    small = {"max.message.bytes": "5000"}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=small)])
    await broker.send_message(message(0, key="k"))
    refused = asyncio.create_task(broker.send_message(message("x" * 140_000, key="k")))
    await asyncio.sleep(0)
    following = [asyncio.create_task(broker.send_message(message(number, key="k"))) for number in range(1, 6)]
    with pytest.raises(MessageRejected):
        await refused
    await asyncio.gather(*following)
    assert [number_in(record) for record in await stored(kafka_servers, name)] == list(range(6))


async def test_what_waits_behind_a_repeat_is_not_sent_before_it(
    broker, name, admin, kafka_servers, monkeypatch
) -> None:
    """One partition refuses a message while another has lost its leader: the producer is parted with, and repeats."""
    await admin.create_topics([NewTopic(name, 2, 1, topic_configs={"max.message.bytes": "5000"})])
    await send(broker, 0)
    producer = broker._service._producer
    left_out = []

    async def without_a_leader(node, request, **options):
        ((_, batches),) = request._topics
        left_out.extend(batch for batch in batches if batch[0] == 1)
        batches[:] = [batch for batch in batches if batch[0] == 0]
        monkeypatch.setattr(producer.client, "send", send_to_kafka)
        response = await send_to_kafka(node, request, **options)
        ((_, answers),) = response.topics
        answers.append((1, 6, *answers[0][2:]))
        return response

    send_to_kafka = producer.client.send
    monkeypatch.setattr(producer.client, "send", without_a_leader)
    keys = {DefaultPartitioner()(b"key %d" % number, [0, 1], []): f"key {number}" for number in range(8)}
    refused = asyncio.create_task(broker.send_message(message("x" * 9_000, key=keys[0])))
    following = [asyncio.create_task(broker.send_message(message(1, key=keys[1])))]
    while not left_out:  # noqa: ASYNC110  # until they are on their way
        await asyncio.sleep(0)
    following += [asyncio.create_task(broker.send_message(message(number, key=keys[1]))) for number in range(2, 6)]

    with pytest.raises(MessageRejected):
        await refused
    left = [each for batches in producer._message_accumulator._batches.values() for each in batches]
    assert all(each.is_empty() for each in left)  # else it would send them, where it has several brokers
    await asyncio.gather(*following)
    records = await stored(kafka_servers, name)
    assert [number_in(record) for record in records if record.key == keys[1].encode()] == [1, 2, 3, 4, 5]


async def test_what_was_not_on_its_way_when_time_ran_out_was_not_sent(make, private_kafka, name) -> None:
    broker = await make(private_kafka.url, partitions=1)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    first = asyncio.create_task(broker.send_message(message(1)))
    await on_its_way(broker)
    second = asyncio.create_task(broker.send_message(message(2)))
    verdicts = await asyncio.gather(first, second, return_exceptions=True)
    await asyncio.to_thread(private_kafka.unpause)
    assert [type(each) for each in verdicts] == [OutcomeUnknown, BrokerUnavailable]
    await send(broker, 3)
    assert 2 not in number_of_each(await stored(private_kafka.url, name))


async def test_a_producer_whose_work_was_cancelled_is_made_anew(broker, name, kafka_servers) -> None:
    """The client's work is a task like any other, for a program that cancels all."""
    await send(broker, 1)
    sender = broker._service._producer._sender.sender_task
    sender.cancel()
    await asyncio.wait([sender])
    async with within(TIMEOUT):
        await send(broker, 2)
    assert number_of_each(await stored(kafka_servers, name)) == {1, 2}


@pytest.mark.parametrize("has_something", [True, False])
async def test_a_producer_that_ends_by_itself_is_made_anew(broker, name, kafka_servers, has_something, caplog) -> None:
    await send(broker, 1)
    producer = broker._service._producer

    async def fail() -> None:
        raise RuntimeError

    producer._sender._maybe_wait_for_pid = fail
    if has_something:
        await send(broker, 2)
    else:
        producer._message_accumulator.waiter().set_result(None)
        await asyncio.wait([producer._sender.sender_task])
    await send(broker, 3)
    numbers = number_of_each(await stored(kafka_servers, name))
    assert numbers == ({1, 2, 3} if has_something else {1, 3})
    assert "during iteration" not in caplog.text


async def test_a_topic_that_the_client_has_forgotten_is_looked_for_again(broker, name) -> None:
    """An answer of a broker that has just started may not have it yet."""
    await send(broker, 1)
    del broker._service._producer.client.cluster._partitions[name]
    await send(broker, 2)
    async with subscribed(broker) as deliveries:
        assert sorted(await acked(deliveries, 2)) == [1, 2]


async def test_closing_waits_for_no_call_that_found_no_room(make, private_kafka) -> None:
    """A batch is full, and Kafka does not answer."""
    broker = await make(private_kafka.url, timeout=1.0)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    big = [message(number, headers={"big": "x" * 20_000}, key="k") for number in range(30)]
    sending = [asyncio.create_task(broker.send_message(each)) for each in big[:6]]
    await asyncio.sleep(0.3)  # whoever waits behind them is overdue later than they are
    sending += [asyncio.create_task(broker.send_message(each)) for each in big[6:]]
    await asyncio.sleep(0)
    async with asyncio.timeout(1.0 + 2 + SLACK):
        await broker.aclose()
    verdicts = await asyncio.gather(*sending, return_exceptions=True)
    assert {type(each) for each in verdicts} <= {OutcomeUnknown, BrokerUnavailable, BrokerClosed}
    await asyncio.to_thread(private_kafka.unpause)


async def test_what_has_to_wait_for_a_full_batch_is_not_passed(broker, name, kafka_servers) -> None:
    await broker.send_message(message(0, key="k"))
    sending = []
    for number in range(1, 60):
        sending.append(asyncio.create_task(broker.send_message(message(number, key="k", headers={"big": "x" * 9_000}))))
        if number % 7 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*sending)
    async with subscribed(broker) as deliveries:
        assert await acked(deliveries, 60) == [*range(60)]


async def test_headers_that_are_too_large_are_refused_before_they_are_sent(broker) -> None:
    async def refused(size, **fields) -> None:
        with pytest.raises(MessageRejected, match=rf"key and headers have {size} bytes, and at most 61,440"):
            await broker.send_message(message(0, **fields))

    async with subscribed(broker) as deliveries:
        await asyncio.gather(
            send(broker, 1, 2),
            refused("70,003", headers={"big": "x" * 70_000}),
            refused("80,003", key="x" * 40_000),  # it is the record's key, and a header
        )
        assert sorted(await acked(deliveries, 2)) == [1, 2]


async def test_5000_callers_at_once_are_not_much_slower_than_one_batch(broker) -> None:
    await send(broker, 0)
    messages = [message(number) for number in range(5_000)]

    began = monotonic()
    await broker.send_messages(messages)
    together = monotonic() - began
    began = monotonic()
    await asyncio.gather(*(broker.send_message(each) for each in messages))
    at_once = monotonic() - began

    assert at_once < 2 * together + SLACK


# -- trap 9: nobody is there ---------------------------------------------------------------------------------------


async def test_an_address_at_which_nobody_listens_is_told_at_once(prefix) -> None:
    broker = KafkaMessageBroker("127.0.0.1:1", prefix)

    async with within(SLACK):
        with pytest.raises(BrokerUnavailable):
            await broker.send_message(message(0))
    async with within(SLACK):
        with pytest.raises(BrokerUnavailable):
            await subscribed(broker).__aenter__()
    await broker.aclose()


async def test_the_second_address_does_for_the_first(make, kafka_servers) -> None:
    broker = await make(f"127.0.0.1:1,{kafka_servers}")

    await send(broker, 0)


# -- trap 10: topics -----------------------------------------------------------------------------------------------


async def test_a_missing_topic_is_refused_with_the_command_that_creates_it(make, kafka_servers, name, admin) -> None:
    broker = await make(kafka_servers, create_topics=False, partitions=7)

    async with within(TIMEOUT):
        with pytest.raises(MessageRejected, match=rf"--create --topic {re.escape(name)} --partitions 7") as refused:
            await broker.send_message(sent := message(0))
        with pytest.raises(ConfigurationError, match=rf"--topic {re.escape(name)}.billing-retry"):
            await subscribed(broker).__aenter__()

    assert refused.value.message_id == sent.message_id
    assert name not in await admin.list_topics()


async def test_topics_that_are_there_need_no_right_to_create(make, kafka_servers, name, admin) -> None:
    beside = [f"{name}.billing-retry", f"{name}.billing-dlq"]
    await admin.create_topics([NewTopic(each, 1, 1) for each in (name, *beside)])
    broker = await make(kafka_servers, create_topics=False)

    async with subscribed(broker) as deliveries:
        await send(broker, 0)
        (delivery,) = await take(deliveries, 1)
        await delivery.retry(after=2.0)  # of six partitions, only one is there
        (again,) = await take(deliveries, 1)
        await again.dead_letter("no good")

    assert len(await stored(kafka_servers, f"{name}.billing-dlq")) == 1


async def test_what_kafka_refuses_to_create_is_told(make, kafka_servers, name) -> None:
    """The client's `create_topics` raises nothing: the refusal is in the answer."""
    broker = await make(kafka_servers, replication_factor=9)

    with pytest.raises(MessageRejected, match=r"cannot be created \(InvalidReplicationFactorError"):
        await broker.send_message(message(0))
    with pytest.raises(ConfigurationError, match="cannot be created"):
        await subscribed(broker).__aenter__()


async def test_two_names_that_kafka_takes_for_one_are_refused(broker) -> None:
    """Its metrics write `.` and `_` alike."""
    await broker.send_message(message(0, Topic("notification_event", "a.b")))

    with pytest.raises(MessageRejected, match="collides"):
        await broker.send_message(message(0, Topic("notification_event", "a_b")))


async def test_topics_are_created_as_was_said(make, kafka_servers, name, admin) -> None:
    broker = await make(kafka_servers, partitions=3, max_message_bytes=3_000_000)
    async with subscribed(broker) as deliveries:
        await broker.send_message(Message.create(message_name="Counted", payload={"number": 0, "pad": "x" * 2_900_000}))
        (delivery,) = await take(deliveries, 1)
        await delivery.dead_letter("too much")

    partitions = {
        topic["topic"]: len(topic["partitions"])
        for topic in await admin.describe_topics([name, f"{name}.billing-retry", f"{name}.billing-dlq"])
    }
    assert partitions == {name: 3, f"{name}.billing-retry": 6, f"{name}.billing-dlq": 1}


@pytest.mark.parametrize("group", ["billing", None])
async def test_partitions_that_are_added_are_read(make, kafka_servers, name, admin, group) -> None:
    broker = await make(kafka_servers, partitions=1, metadata_max_age=0.5)
    async with subscribed(broker, group=group) as deliveries:
        await send(broker, 0)
        assert await acked(deliveries, 1) == [0]
        await admin.create_partitions({name: NewPartitions(3)})
        async with AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
            async with asyncio.timeout(5):
                while len(await producer.partitions_for(name)) < 3:
                    await producer.client.force_metadata_update()
            for number in (1, 2):
                body = json.dumps({"payload": {"number": number}}).encode()
                await producer.send_and_wait(name, body, partition=number)

        assert sorted(await acked(deliveries, 2)) == [1, 2]


# -- what is gone ------------------------------------------------------------------------------------------------


async def test_what_retention_took_from_a_group_is_told(broker, name, admin) -> None:
    group, gaps = f"group-{uuid4().hex}", []
    await send(broker, 0, key="k")
    async with subscribed(broker, group=group) as deliveries:
        assert await acked(deliveries, 1) == [0]
    await send(broker, *range(1, 10), key="k")
    place = await place_of_everything(admin, name)
    await admin.delete_records({place: RecordsToDelete(7)})

    async with subscribed(broker, group=group, on_gap=gaps.append) as deliveries:
        assert await acked(deliveries, 3) == [7, 8, 9]

    (gap,) = gaps
    assert "1 was to be read next, and the oldest is 7" in gap.reason
    assert gap.since < gap.until


async def test_what_was_deleted_from_under_a_reader_without_a_group_is_told(make, kafka_servers, name, admin) -> None:
    gaps, broker = [], await make(kafka_servers, extra_prefetch=0)
    await send(broker, 0, key="k")
    async with subscribed(broker, group=None, prefetch=1, on_gap=gaps.append) as deliveries:
        await send(broker, *range(1, 60), key="k")
        (first,) = await take(deliveries, 1)
        place = await place_of_everything(admin, name)
        await asyncio.sleep(0.5)
        await admin.delete_records({place: RecordsToDelete(60)})
        await send(broker, 60, key="k")
        await first.ack()
        taken = [number_of(first)]
        while taken[-1] != 60:
            taken += await acked(deliveries, 1)

    assert taken == sorted(taken)
    assert taken == list(range(1, 61)) or len(gaps) == 1  # what was fetched before it was deleted is no gap


async def test_a_topic_that_was_deleted_and_made_again_is_a_gap(broker, name, admin) -> None:
    group, gaps = f"group-{uuid4().hex}", []
    await send(broker, *range(5), key="k")
    async with subscribed(broker, group=group, on_gap=gaps.append) as deliveries:
        assert await acked(deliveries, 5) == [*range(5)]
        await asyncio.sleep(0.5)
        await admin.delete_topics([name])
        await asyncio.sleep(1.0)
        taken, number = [], 5
        async with asyncio.timeout(20):
            while not taken:
                number += 1
                await asyncio.gather(broker.send_message(message(number, key="k")), return_exceptions=True)
                taken = await all_that_comes(deliveries, within=0.3)

    assert len(gaps) == 1
    assert "deleted" in gaps[0].reason


async def place_of_everything(admin, name) -> TopicPartition:
    """The one partition that messages of one key are in."""
    consumer = AIOKafkaConsumer(bootstrap_servers=admin._client._bootstrap_servers)
    await consumer.start()
    try:
        places = [TopicPartition(name, number) for number in range(4)]
        await consumer._client._wait_on_metadata(name)
        ends = await consumer.end_offsets(places)
    finally:
        await consumer.stop()
    (place,) = [place for place, end in ends.items() if end]
    return place


# -- what is handled again ---------------------------------------------------------------------------------------


async def test_a_retry_is_never_early_and_waits_behind_none_that_is_due_later(broker) -> None:
    """They are in one partition of the retry topic, those that are due last in front."""
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


async def test_a_retry_outlives_its_member(broker) -> None:
    group = f"group-{uuid4().hex}"
    await broker.send_message(message(7, key="k", headers={"colour": "red"}))
    async with subscribed(broker, group=group) as deliveries:
        (delivery,) = await take(deliveries, 1)
        await delivery.retry(after=1.0)
    async with subscribed(broker, group=group) as deliveries:
        (again,) = await take(deliveries, 1)

    assert (again.attempt, again.body, again.topic) == (2, delivery.body, delivery.topic)
    assert again.headers == delivery.headers == {"colour": "red", "key": "k"}


async def test_a_header_of_a_program_is_no_control_header(broker) -> None:
    forged = {"diator-retry-attempt": "99", "diator-retry-due": "9999999999999", "diator-retry-origin": "9:9"}
    await broker.send_message(message(1, headers=forged))
    async with subscribed(broker) as deliveries:
        (delivery,) = await take(deliveries, 1)
        assert (delivery.attempt, delivery.headers) == (1, forged)
        await delivery.retry()
        (again,) = await take(deliveries, 1)

    assert (again.attempt, again.headers) == (2, forged)


async def test_what_somebody_else_put_into_a_retry_topic_is_delivered(broker, kafka_servers, name) -> None:
    async with subscribed(broker) as deliveries, AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
        for headers in ([], [("diator-retry-attempt", b"x")] * 3, [("a", b"1"), ("b", None), ("c", b"-")]):
            await producer.send_and_wait(f"{name}.billing-retry", b"foreign", headers=headers)
        bodies = [each.body for each in await take(deliveries, 3)]

    assert bodies == [b"foreign"] * 3


async def test_a_dead_letter_says_where_it_came_from(broker, kafka_servers, name) -> None:
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


async def test_in_place_attempts_outlive_their_member(make, kafka_servers) -> None:
    broker = await make(kafka_servers, retry_in_place=True)
    await send(broker, *range(3), key="k")
    counted = []
    for _ in range(3):
        async with subscribed(broker) as deliveries:
            (delivery,) = await take(deliveries, 1)
            counted.append((number_of(delivery), delivery.attempt))
            await delivery.retry(after=0.05)

    assert counted == [(0, 1), (0, 2), (0, 3)]


async def test_in_place_attempts_of_what_waits_behind_another_are_kept(make, kafka_servers) -> None:
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
        assert await acked(deliveries, 1, within=0.9) == [300]


async def test_what_was_held_back_is_read_as_soon_as_there_is_room(make, kafka_servers, name, admin) -> None:
    await admin.create_topics([NewTopic(name, 1, 1)])
    broker = await make(kafka_servers, max_unacked_per_partition=10, extra_prefetch=0)
    await send(broker, *range(100), key="k")
    async with subscribed(broker, prefetch=20) as deliveries:
        taken = await take(deliveries, 20)
        await asyncio.sleep(0.3)
        for delivery in taken:
            await delivery.ack()
        assert await acked(deliveries, 1, within=0.5) == [20]


async def test_in_place_what_has_another_key_goes_on(make, kafka_servers) -> None:
    broker = await make(kafka_servers, retry_in_place=True, partitions=1)
    async with subscribed(broker) as deliveries:
        await send(broker, 0, 1, key="a")
        await send(broker, 2, 3, key="b")
        await send(broker, 4)
        (first,) = await take(deliveries, 1)
        await first.retry(after=0.5)

        assert sorted(await acked(deliveries, 3)) == [2, 3, 4]
        assert await acked(deliveries, 2) == [0, 1]


# -- without a group ---------------------------------------------------------------------------------------------


async def test_a_reader_without_a_group_misses_nothing_while_it_has_no_connection(make, proxy, proxied, private_kafka):
    reader, sender, gaps = await make(proxied), await make(private_kafka.url), []
    async with subscribed(reader, group=None, on_gap=gaps.append) as deliveries:
        await send(sender, 0)
        assert await acked(deliveries, 1) == [0]
        proxy.refuse()
        proxy.reset()
        await send(sender, *range(1, 50))
        await asyncio.sleep(0.5)
        await proxy.heal()
        came = await acked(deliveries, 49, within=15)

    assert sorted(came) == [*range(1, 50)]
    assert gaps == []


# -- audit -------------------------------------------------------------------------------------------------------


async def test_the_audit_finds_what_weakens_a_promise(broker, name, admin) -> None:
    configs = {
        "min.insync.replicas": "1",
        "unclean.leader.election.enable": "true",
        "cleanup.policy": "compact,delete",
        "retention.ms": "1000",
        "retention.bytes": "1000000",
        "max.message.bytes": "1000",
    }
    await admin.create_topics(
        [NewTopic(name, 1, 1, topic_configs=configs), NewTopic(f"{name}.g-dlq", 1, 1), NewTopic("elsewhere-1", 1, 1)]
    )

    found = [each for each in await audit(broker) if name in each.problem]

    both, one, letters = f"{name}, {name}.g-dlq: ", f"{name}: ", f"{name}.g-dlq: "
    weakened = Counter(
        (where, each.capability) for each in found for where in (both, one, letters) if each.problem.startswith(where)
    )
    assert weakened == {
        (both, "durability"): 1,
        (both, "receipt"): 1,
        (one, "durability"): 1,
        (one, "guarantee"): 1,
        (one, "subscription"): 2,
        (one, "max_message_bytes"): 1,
        (letters, "dead_letter"): 1,
    }
    remedies = {each.capability: each.remedy for each in found}
    set_to = "kafka-configs.sh --alter --topic"
    assert remedies["dead_letter"] == f"{set_to} {name}.g-dlq --add-config retention.ms=-1,retention.bytes=-1"
    assert remedies["receipt"] == f"for each: {set_to} … --add-config min.insync.replicas=2"
    assert not [each for each in await audit(broker) if "elsewhere" in each.problem]


async def test_the_audit_of_a_closed_broker_is_refused(make, kafka_servers) -> None:
    broker = await make(kafka_servers)
    await broker.aclose()

    with pytest.raises(BrokerClosed):
        await broker.audit()
