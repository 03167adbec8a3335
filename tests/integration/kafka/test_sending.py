"""Many callers send at once: batches, refusals, time limits, closing."""

import asyncio
from time import monotonic

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition, errors
from aiokafka.admin import NewTopic
from aiokafka.partitioner import DefaultPartitioner

from diator.brokers.base import Topic
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    MessageRejected,
    MessagesNotSent,
    OutcomeUnknown,
)
from tests.integration.kafka.helpers import (
    COUNTED,
    SLACK,
    acked,
    client_of,
    message,
    number_in,
    number_of_each,
    on_its_way,
    send,
    stored,
    subscribed,
    within,
)


async def test_messages_without_a_key_that_are_sent_at_once_share_a_batch(make, kafka_servers, name) -> None:
    """They go in few large batches and keep their order; aiokafka would choose a partition for each message."""
    broker = await make(kafka_servers, partitions=4)
    for _ in range(3):
        await send(broker, *range(50))

    places = [TopicPartition(name, number) for number in range(4)]
    async with AIOKafkaConsumer(bootstrap_servers=kafka_servers) as consumer:
        ends = await consumer.end_offsets(places)
    assert sum(ends.values()) == 150
    assert {end % 50 for end in ends.values()} == {0}


async def test_a_refusal_does_not_affect_later_messages(broker, name, admin) -> None:
    small = {"max.message.bytes": "1000"}
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=small)])
    await send(broker, 1)
    with pytest.raises(MessageRejected, match=r"raise max\.message\.bytes"):
        await broker.send_message(message("x" * 2000))
    async with subscribed(broker) as deliveries:
        for number in range(2, 5):
            await broker.send_message(message(number))
        assert await acked(deliveries, 4) == [1, 2, 3, 4]


async def test_a_batch_that_is_too_large_is_split(broker, name, admin, kafka_servers) -> None:
    """Only the message that is too large by itself is refused; the others of its batch are not affected."""
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
    async with within(SLACK):
        await broker.aclose()
    await asyncio.gather(*sending)
    assert [number_in(record) for record in await stored(kafka_servers, name)] == list(range(50))


async def test_a_topic_that_is_looked_for_while_a_message_of_another_is_refused(broker, name, admin) -> None:
    """A closed producer would never answer the metadata request."""
    other = Topic("notification_event", "Other")
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"max.message.bytes": "3000"})])
    await send(broker, 0)
    async with within(SLACK):
        results = await asyncio.gather(
            broker.send_message(message("x" * 4000)),
            *(broker.send_message(message(number, topic)) for number in range(3) for topic in (other, COUNTED)),
            return_exceptions=True,
        )
    assert [type(each) for each in results] == [MessageRejected, *[type(None)] * 6]


async def test_a_compacted_topic_refuses_only_messages_without_a_key(broker, name, admin, kafka_servers) -> None:
    """Kafka refuses the whole batch without naming the message."""
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})])
    await send(broker, 0, key="k")
    messages = [message(number, key=None if number == 3 else f"key {number}") for number in range(1, 7)]
    with pytest.raises(MessagesNotSent) as failed:
        await broker.send_messages(messages)
    assert failed.value.message_ids == (messages[2].message_id,)
    assert isinstance(failed.value.__cause__, MessageRejected)
    assert [number_in(record) for record in await stored(kafka_servers, name)] == [0, 1, 2, 4, 5, 6]


async def test_an_error_of_one_topic_does_not_concern_another(broker, name, admin, monkeypatch) -> None:
    """It does so even if the client does not know the error code."""
    monkeypatch.delitem(errors.kafka_errors, 87)
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})])
    others = [Topic("notification_event", f"Other{number}") for number in range(6)]
    await send(broker, 0, key="k")
    await asyncio.gather(*(broker.send_message(message(0, other)) for other in others))
    results = await asyncio.gather(
        broker.send_message(message(1)),
        *(broker.send_message(message(1, other)) for other in others),
        return_exceptions=True,
    )
    assert [type(each) for each in results] == [OutcomeUnknown, *[type(None)] * 6]


async def test_messages_behind_a_refused_one_are_sent(broker, name, admin, kafka_servers) -> None:
    """Otherwise the client would skip a sequence number, and Kafka would refuse the next batch."""
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


async def test_messages_behind_a_resent_one_are_not_sent_before_it(
    broker, name, admin, kafka_servers, monkeypatch
) -> None:
    """One partition refuses a message while another has lost its leader: the producer is replaced while it resends."""
    await admin.create_topics([NewTopic(name, 2, 1, topic_configs={"max.message.bytes": "5000"})])
    await send(broker, 0)
    producer = client_of(broker)
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
    while not left_out:  # noqa: ASYNC110  # until they are in flight
        await asyncio.sleep(0)
    following += [asyncio.create_task(broker.send_message(message(number, key=keys[1]))) for number in range(2, 6)]

    with pytest.raises(MessageRejected):
        await refused
    left = [each for batches in producer._message_accumulator._batches.values() for each in batches]
    assert all(each.is_empty() for each in left)  # otherwise it would send them, in a cluster of several brokers
    await asyncio.gather(*following)
    records = await stored(kafka_servers, name)
    assert [number_in(record) for record in records if record.key == keys[1].encode()] == [1, 2, 3, 4, 5]


async def test_an_expired_message_that_was_not_in_flight_is_not_sent(make, private_kafka, name) -> None:
    broker = await make(private_kafka.url, partitions=1)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    first = asyncio.create_task(broker.send_message(message(1)))
    await on_its_way(broker)
    second = asyncio.create_task(broker.send_message(message(2)))
    results = await asyncio.gather(first, second, return_exceptions=True)
    await asyncio.to_thread(private_kafka.unpause)
    assert [type(each) for each in results] == [OutcomeUnknown, BrokerUnavailable]
    await send(broker, 3)
    assert 2 not in number_of_each(await stored(private_kafka.url, name))


async def test_a_producer_whose_task_was_cancelled_is_replaced(broker, name, kafka_servers) -> None:
    """A program that cancels all tasks cancels the client's task too."""
    await send(broker, 1)
    sender = client_of(broker)._sender.sender_task
    sender.cancel()
    await asyncio.wait([sender])
    async with within(SLACK):
        await send(broker, 2)
    assert number_of_each(await stored(kafka_servers, name)) == {1, 2}


@pytest.mark.parametrize("has_something", [True, False])
async def test_a_producer_that_ends_by_itself_is_replaced(broker, name, kafka_servers, has_something, caplog) -> None:
    await send(broker, 1)
    producer = client_of(broker)

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
    """The metadata of a broker that has just started may lack the topic."""
    await send(broker, 1)
    del client_of(broker).client.cluster._partitions[name]
    await send(broker, 2)
    async with subscribed(broker) as deliveries:
        assert sorted(await acked(deliveries, 2)) == [1, 2]


async def test_closing_waits_for_no_call_that_found_no_room(make, private_kafka) -> None:
    """A batch is full, and Kafka does not respond."""
    broker = await make(private_kafka.url, timeout=1.0)
    await send(broker, 0)
    await asyncio.to_thread(private_kafka.pause)
    big = [message(number, headers={"big": "x" * 20_000}, key="k") for number in range(30)]
    sending = [asyncio.create_task(broker.send_message(each)) for each in big[:6]]
    await asyncio.sleep(0.3)  # so that later messages expire later
    sending += [asyncio.create_task(broker.send_message(each)) for each in big[6:]]
    await asyncio.sleep(0)
    async with asyncio.timeout(1.0 + 2 + SLACK):
        await broker.aclose()
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert {type(each) for each in results} <= {OutcomeUnknown, BrokerUnavailable, BrokerClosed}
    await asyncio.to_thread(private_kafka.unpause)


async def test_messages_that_wait_for_a_full_batch_keep_their_order(broker, name, kafka_servers) -> None:
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
        with pytest.raises(MessageRejected, match=rf"key and headers have {size} bytes; at most 61,440"):
            await broker.send_message(message(0, **fields))

    async with subscribed(broker) as deliveries:
        await asyncio.gather(
            send(broker, 1, 2),
            refused("70,003", headers={"big": "x" * 70_000}),
            refused("80,003", key="x" * 40_000),  # the key is sent twice: as the record's key and as a header
        )
        assert sorted(await acked(deliveries, 2)) == [1, 2]


async def test_5000_callers_at_once_are_not_much_slower_than_one_batch(make, kafka_servers) -> None:
    broker = await make(kafka_servers, timeout=30.0)  # a busy machine may need more than the usual timeout
    await send(broker, 0)
    messages = [message(number) for number in range(5_000)]

    began = monotonic()
    await broker.send_messages(messages)
    together = monotonic() - began
    began = monotonic()
    await asyncio.gather(*(broker.send_message(each) for each in messages))
    at_once = monotonic() - began

    assert at_once < 2 * together + SLACK
