"""Topics that are created, deleted or cut by retention, and the audit of their settings."""

import asyncio
import json
import re
from collections import Counter
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete

from diator.brokers import Message
from diator.brokers.audit import audit
from diator.brokers.base import Topic
from diator.exceptions import (
    BrokerClosed,
    ConfigurationError,
    MessageRejected,
)
from tests.integration.kafka.helpers import (
    SLACK,
    acked,
    all_that_comes,
    message,
    number_of,
    place_of_everything,
    send,
    stored,
    subscribed,
    take,
    within,
)


async def test_a_missing_topic_is_refused_with_the_command_that_creates_it(make, kafka_servers, name, admin) -> None:
    broker = await make(kafka_servers, create_topics=False, partitions=7)

    async with within(SLACK):
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
        await delivery.retry(after=2.0)  # the retry topic has only one of seven partitions
        (again,) = await take(deliveries, 1)
        await again.dead_letter("no good")

    assert len(await stored(kafka_servers, f"{name}.billing-dlq")) == 1


async def test_a_topic_that_kafka_refuses_to_create_is_an_error(make, kafka_servers, name) -> None:
    """The client's `create_topics` does not raise: the refusal is in the response."""
    broker = await make(kafka_servers, replication_factor=9)

    with pytest.raises(MessageRejected, match=r"cannot be created \(InvalidReplicationFactorError"):
        await broker.send_message(message(0))
    with pytest.raises(ConfigurationError, match="cannot be created"):
        await subscribed(broker).__aenter__()


async def test_two_names_that_kafka_takes_for_one_are_refused(broker) -> None:
    """Kafka's metrics do not distinguish `.` from `_`."""
    await broker.send_message(message(0, Topic("notification_event", "a.b")))

    with pytest.raises(MessageRejected, match="collides"):
        await broker.send_message(message(0, Topic("notification_event", "a_b")))


async def test_topics_are_created_with_the_given_options(make, kafka_servers, name, admin) -> None:
    broker = await make(kafka_servers, partitions=3, max_message_bytes=3_000_000)
    async with subscribed(broker) as deliveries:
        await broker.send_message(Message.create(message_name="Counted", payload={"number": 0, "pad": "x" * 2_900_000}))
        (delivery,) = await take(deliveries, 1)
        await delivery.dead_letter("too much")

    partitions = {
        topic["topic"]: len(topic["partitions"])
        for topic in await admin.describe_topics([name, f"{name}.billing-retry", f"{name}.billing-dlq"])
    }
    assert partitions == {name: 3, f"{name}.billing-retry": 7, f"{name}.billing-dlq": 1}


@pytest.mark.parametrize("group", ["billing", None])
async def test_partitions_that_are_added_are_read(make, kafka_servers, name, admin, group) -> None:
    broker = await make(kafka_servers, partitions=1, metadata_max_age=0.5)
    async with subscribed(broker, group=group) as deliveries:
        await send(broker, 0)
        assert await acked(deliveries, 1) == [0]
        await admin.create_partitions({name: NewPartitions(3)})
        async with AIOKafkaProducer(bootstrap_servers=kafka_servers) as producer:
            async with asyncio.timeout(60):
                while len(await producer.partitions_for(name)) < 3:
                    await producer.client.force_metadata_update()
            for number in (1, 2):
                body = json.dumps({"payload": {"number": number}}).encode()
                await producer.send_and_wait(name, body, partition=number)

        assert sorted(await acked(deliveries, 2)) == [1, 2]


async def test_messages_that_retention_removed_are_a_gap(broker, name, admin) -> None:
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
    assert "the next offset was 1, and the oldest is 7" in gap.reason
    assert gap.since < gap.until


async def test_messages_deleted_before_a_reader_without_a_group_are_a_gap(make, kafka_servers, name, admin) -> None:
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
    assert taken == list(range(1, 61)) or len(gaps) == 1  # records fetched before the deletion are not a gap


async def test_a_topic_that_was_deleted_and_made_again_is_a_gap(broker, name, admin) -> None:
    group, gaps = f"group-{uuid4().hex}", []
    await send(broker, *range(5), key="k")
    async with subscribed(broker, group=group, on_gap=gaps.append) as deliveries:
        assert await acked(deliveries, 5) == [*range(5)]
        await asyncio.sleep(0.5)
        await admin.delete_topics([name])
        await asyncio.sleep(1.0)
        taken, number = [], 5
        async with asyncio.timeout(60):
            while not (taken and gaps):
                number += 1
                await asyncio.gather(broker.send_message(message(number, key="k")), return_exceptions=True)
                taken += await all_that_comes(deliveries, within=0.3)

    assert len(gaps) == 1
    assert "deleted" in gaps[0].reason


async def test_the_audit_reports_settings_that_weaken_a_capability(broker, name, admin) -> None:
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


@pytest.mark.parametrize("group", ["billing", None])
async def test_a_topic_that_has_outgrown_the_deleted_one_is_read_from_its_beginning(
    make, proxy, private_kafka, name, group
) -> None:
    """The reader's next offset is 5, and the new topic has a message there: only its id shows what it is."""
    reader, sender, gaps = await make(f"{proxy.host}:{proxy.port}"), await make(private_kafka.url, partitions=1), []
    await send(sender, 0)
    async with subscribed(reader, group=group, on_gap=gaps.append) as deliveries:
        await send(sender, *range(1, 5))
        assert set(await acked(deliveries, 4 if group is None else 5)) >= {*range(1, 5)}
        await asyncio.sleep(0.5)
        proxy.withhold()
        await recreated(private_kafka.url, name)
        await send(await make(private_kafka.url), *range(100, 120))
        await proxy.heal()

        assert {*await acked(deliveries, 20)} >= {*range(100, 105)}
        assert {*range(105, 120)} >= {*await all_that_comes(deliveries)}

    (gap,) = gaps
    assert f"{name} was deleted and created again" in gap.reason


async def test_an_offset_of_a_deleted_topic_is_not_an_offset_of_the_new_one(broker, kafka_servers, name) -> None:
    """A consumer that does not know that its topic was deleted commits once more, to the new topic."""
    group, gaps = f"group-{uuid4().hex}", []
    await send(broker, *range(5), key="k")
    async with subscribed(broker, group=group) as deliveries:
        assert await acked(deliveries, 5) == [*range(5)]
    committed = await committed_offsets(kafka_servers, broker._names.group(group), name)
    assert {each.offset for each in committed.values()} == {5}
    await recreated(kafka_servers, name, partitions=4)
    async with asyncio.timeout(20):  # Kafka deletes them a moment after the topic
        while await committed_offsets(kafka_servers, broker._names.group(group), name):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await commit(kafka_servers, broker._names.group(group), committed)
    await send(broker, *range(100, 110), key="k")

    async with subscribed(broker, group=group, on_gap=gaps.append) as deliveries:
        assert await acked(deliveries, 10) == [*range(100, 110)]

    (gap,) = gaps
    assert "is of a topic that was deleted" in gap.reason


async def recreated(servers, name, partitions=1) -> None:
    """Delete the topic and create it again."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.delete_topics([name])
        async with asyncio.timeout(20):
            while (await admin.create_topics([NewTopic(name, partitions, 1)])).topic_errors[0][1]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def committed_offsets(servers, group, name) -> dict:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(group)
    finally:
        await admin.close()
    return {place: offset for place, offset in offsets.items() if place.topic == name and offset.offset >= 0}


async def commit(servers, group, offsets) -> None:
    async with AIOKafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False) as consumer:
        consumer.assign([*offsets])
        await consumer.commit(offsets)
