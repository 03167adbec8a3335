"""Reading from Redis Pub/Sub, against a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.codec import encode
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from diator.exceptions import BrokerClosed, BrokerUnavailable, UnsupportedCapability
from diator.retrying import RetryPolicy
from diator.testing.fault_proxy import FaultProxy
from tests.records import fields

COUNTED = Topic("notification_event", "Counted")
ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)
RECONNECT = ReconnectPolicy(connect_timeout=1, idle_timeout=0.3, probe_timeout=0.3, max_delay=0.3)
SLACK = 20.0
"""Seconds that a busy machine may need in addition; a longer wait means that something hangs."""


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4()}"


@pytest.fixture
async def admin(redis_url) -> AsyncIterator[Redis]:
    """Plain redis-py."""
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
async def proxy(redis_url) -> AsyncIterator[FaultProxy]:
    address = urlsplit(redis_url)
    async with FaultProxy(address.hostname or "", address.port or 6379) as proxy:
        yield proxy


@pytest.fixture
def proxied_url(redis_url, proxy, prefix) -> str:
    user, at, _ = urlsplit(redis_url).netloc.rpartition("@")
    url = urlsplit(redis_url)._replace(netloc=f"{user}{at}{proxy.host}:{proxy.port}").geturl()
    return f"{url}?client_name={prefix}"


@pytest.fixture
async def make(prefix) -> AsyncIterator:
    """Make brokers that reconnect quickly, and close them."""
    async with AsyncExitStack() as stack:

        async def make(address, **options) -> RedisMessageBroker:
            make = RedisMessageBroker.from_url if isinstance(address, str) else RedisMessageBroker
            broker = make(address, prefix, **{"timeout": 1.0, "reconnect": RECONNECT, **options})
            return await stack.enter_async_context(broker)

        yield make


@pytest.fixture
async def broker(make, redis_url, prefix) -> RedisMessageBroker:
    return await make(f"{redis_url}?client_name={prefix}")


def message(number, topic=COUNTED, **fields) -> Message:
    return Message.create(message_name=topic.message_name, payload={"number": number}, **fields)


async def send(broker, *numbers) -> None:
    await broker.send_messages([message(number) for number in numbers])


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


async def take(deliveries, count, *, within=30.0) -> list[int]:
    """Take and acknowledge *count* deliveries, and return their numbers."""
    numbers = []
    async with asyncio.timeout(within):
        for _ in range(count):
            delivery = await anext(deliveries)
            await delivery.ack()
            numbers.append(number_of(delivery))
    return numbers


async def eventually(holds, *, within=30.0) -> None:
    async with asyncio.timeout(within):
        while not await holds():  # noqa: ASYNC110  # Redis sends no event for it
            await asyncio.sleep(0.01)


async def flows_again(broker, deliveries, *, within=30.0) -> None:
    """Send messages until one of them arrives."""
    async with asyncio.timeout(within):
        number = 1_000_000
        while True:
            number += 1
            await send(broker, number)
            try:
                while (await take(deliveries, 1, within=0.05))[0] < 1_000_000:
                    pass
            except TimeoutError:
                continue
            return


# -- deliveries --------------------------------------------------------------------------------------------------


async def test_older_senders_of_another_prefix_are_not_received(make, redis_url, prefix) -> None:
    """The pattern matches their channels, too, since it matches colons."""
    broker = await make(redis_url, older_senders=True)
    async with broker.subscribe([COUNTED]) as deliveries, Redis.from_url(redis_url) as client:
        for number, channel in enumerate(["an-id", "notification_event:an-id", "an-id"], 1):
            await client.publish(f"{prefix}:notification_event:{channel}", encode(message(number)))
        assert await take(deliveries, 2) == [1, 3]


async def test_the_channel_of_an_older_sender_has_the_type_of_its_message(make, redis_url, prefix) -> None:
    """Otherwise whoever may write to the channels of one type could run the handlers of the others."""
    state = Topic("ecst_event", "Counted")
    broker = await make(redis_url, older_senders=True)
    async with broker.subscribe([COUNTED, state]) as deliveries, Redis.from_url(redis_url) as client:
        for number, topic in enumerate([state, COUNTED], 1):
            body = encode(message(number, topic, message_type=topic.message_type))
            await client.publish(f"{prefix}:notification_event:an-id", body)
        assert await take(deliveries, 1) == [2]


async def test_a_flood_on_the_channels_of_older_senders_is_a_few_lines(make, redis_url, prefix, caplog) -> None:
    broker = await make(redis_url, older_senders=True)
    async with broker.subscribe([COUNTED]) as deliveries, Redis.from_url(redis_url) as client:
        for _ in range(50):
            await client.publish(f"{prefix}:notification_event:an-id", b"garbage")
        await client.publish(f"{prefix}:notification_event:an-id", encode(message(1)))
        assert await take(deliveries, 1) == [1]

    texts = [each.getMessage() for each in caplog.records if each.name == "diator.brokers.redis._pubsub"]
    assert len(texts) == 6
    assert texts[-1].startswith("a message on the channel of an older sender cannot be decoded: and 45 more in")
    first = next(each for each in caplog.records if each.name == "diator.brokers.redis._pubsub")
    of_all = {"broker": "RedisMessageBroker", "group": None, "message_names": ["Counted"]}
    assert fields(first) == {**of_all, "error_type": "DecodingError"}


async def test_on_entry_it_is_ready(broker) -> None:
    for number in range(50):
        async with broker.subscribe([COUNTED]) as deliveries:
            await send(broker, number)
            assert await take(deliveries, 1) == [number]


async def test_several_topics_and_subscriptions(broker) -> None:
    """Each subscription receives all messages of its topics, and no others, in order."""
    topics = one, two, other = [Topic("notification_event", name) for name in ("one", "two:three", "one:two")]
    async with broker.subscribe([one, two]) as first, broker.subscribe(topics) as second:
        for number in range(30):
            await broker.send_message(message(number, topics[number % 3], headers={"a": "b"}, key="c"))
        got = {"first": [], "second": []}
        async with asyncio.timeout(30):
            for name, deliveries, count in [("first", first, 20), ("second", second, 30)]:
                for _ in range(count):
                    delivery = await anext(deliveries)
                    assert (delivery.attempt, delivery.topic) == (1, topics[number_of(delivery) % 3])
                    got[name].append(number_of(delivery))

    assert got == {"first": [number for number in range(30) if number % 3 < 2], "second": [*range(30)]}
    assert other not in (one, two)


async def test_groups_are_refused_with_the_remedy(broker) -> None:
    with pytest.raises(UnsupportedCapability, match="Streams"):
        async with broker.subscribe([COUNTED], group="billing"):
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": 2},
        {"protocol": 3},
        {},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True},
        {"legacy_responses": False},
        {"health_check_interval": 0.1},
        {"socket_timeout": 0.1},
        {"socket_timeout": 0.1, "protocol": 3, "health_check_interval": 0.1},
    ],
    ids=str,
)
async def test_clients_of_the_program(make, redis_url, options) -> None:
    """They work too when no message arrives for a while and the connection is probed."""
    gaps = []
    async with Redis.from_url(redis_url, **options) as client:
        broker = await make(client)
        async with broker.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
            await send(broker, 1, 2)
            assert await take(deliveries, 2) == [1, 2]
            await asyncio.sleep(1.2)
            await send(broker, 3)
            assert await take(deliveries, 1) == [3]
        await broker.aclose()

    assert gaps == []


# -- gaps --------------------------------------------------------------------------------------------------------


async def test_a_slow_reader_is_dropped(make, private_redis, prefix) -> None:
    """Redis closes its connection. The gap begins before the first missed message, and the subscription goes on."""
    gaps, body = [], json.dumps({"payload": {"number": 0}, "filling": "x" * 100_000})
    async with Redis.from_url(private_redis.url) as admin:
        await admin.config_set("client-output-buffer-limit", "pubsub 200000 0 0")
        broker = await make(private_redis.url, extra_prefetch=10)
        async with broker.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
            for _ in range(300):
                await admin.publish(f"{prefix}:notification_event:Counted", body)
            missed = datetime.now(UTC)
            assert gaps == []
            await flows_again(broker, deliveries)

    [gap] = gaps
    assert gap.since <= missed < gap.until


async def test_a_half_open_connection(make, proxy, proxied_url, broker) -> None:
    """The idle timeout detects it. The gap begins before the first missed message."""
    gaps = []
    reader = await make(proxied_url)
    async with reader.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
        await send(broker, 1)
        assert await take(deliveries, 1) == [1]
        proxy.black_hole()
        missed = datetime.now(UTC)
        await send(broker, 2)
        await asyncio.sleep(0.05)
        await proxy.heal()
        limit = RECONNECT.idle_timeout + RECONNECT.probe_timeout + SLACK

        await flows_again(broker, deliveries, within=limit)
    [gap] = gaps
    assert gap.since <= missed < gap.until


async def test_an_outage_longer_than_the_retries_of_the_client(make, proxy, proxied_url, broker) -> None:
    gaps = []
    async with Redis.from_url(proxied_url, retry=Retry(ConstantBackoff(0.01), 3)) as client:
        reader = await make(client)
        before = datetime.now(UTC)
        async with reader.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
            proxy.refuse()
            proxy.cut()
            await asyncio.sleep(2)
            assert gaps == []
            await proxy.heal()
            await flows_again(broker, deliveries, within=1 + SLACK)
        await reader.aclose()

    [gap] = gaps
    assert before <= gap.since <= gap.until <= datetime.now(UTC)
    assert 2 <= (gap.until - gap.since).total_seconds() < 2 + 1 + SLACK  # since the last data from Redis


async def test_a_restart_of_the_service(make, private_redis) -> None:
    gaps = []
    broker = await make(private_redis.url)
    async with broker.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
        await asyncio.to_thread(private_redis.kill)
        await asyncio.to_thread(private_redis.start)
        await flows_again(broker, deliveries)

    assert len(gaps) == 1


@pytest.mark.parametrize("how", ["CLIENT KILL", "RST", "FIN"])
async def test_a_connection_that_is_ended(*, make, proxy, proxied_url, broker, admin, prefix, how) -> None:
    """Each loss reports one gap, and there is one connection at any time."""
    gaps = []
    reader = await make(proxied_url)

    async def subscribers() -> list[str]:
        return [each["id"] for each in await admin.client_list(_type="pubsub") if each["name"] == prefix]

    async with reader.subscribe([COUNTED], on_gap=gaps.append) as deliveries:
        for _ in range(5):
            [subscriber] = await subscribers()
            if how == "CLIENT KILL":
                await admin.client_kill_filter(_id=subscriber)
            else:
                (proxy.reset if "RST" in how else proxy.cut)()
            await flows_again(broker, deliveries)

    assert len(gaps) == 5
    assert {gap.reason.partition(":")[0] for gap in gaps} <= {"ConnectionError", "ConnectionResetError"}


async def test_entering_has_a_time_limit(make, proxy, proxied_url) -> None:
    broker = await make(proxied_url)
    proxy.black_hole()
    async with asyncio.timeout(1 + SLACK):
        with pytest.raises(BrokerUnavailable):
            async with broker.subscribe([COUNTED]):
                pass


# -- the consumer ------------------------------------------------------------------------------------------------


async def test_handlers_that_fail_or_sleep_affect_no_others(broker) -> None:
    started, handled, outcomes = [], [], []

    async def handle(event: Counted) -> None:
        started.append(event.number)
        if event.number % 10 == 3:
            raise ValueError
        if event.number % 10 == 4:
            await asyncio.sleep(60)
        handled.append(event.number)

    event_map = EventMap()
    event_map.bind(Counted, handle)
    consumer = Consumer(
        broker, event_map=event_map, retry=ONCE, concurrency=8, drain_timeout=0.1, on_handled=outcomes.append
    )
    running = asyncio.create_task(consumer.run(signals=False))
    await until_subscribed(broker)
    await send(broker, *range(50))

    async def done() -> bool:
        return len(handled) == 40

    await eventually(done)
    consumer.stop()
    await running
    assert sorted(handled) == [number for number in range(50) if number % 10 not in (3, 4)]
    assert sorted(done.outcome for done in outcomes) == sorted(["acked"] * 40 + ["given_up"] * 5 + ["unsettled"] * 5)


async def test_foreign_garbage(broker, admin, prefix, caplog) -> None:
    """Each is dropped with a reason, the log does not contain its data, and the next message is handled."""
    handled, reasons = [], []

    async def handle(event: Counted) -> None:
        handled.append(event.number)

    event_map = EventMap()
    event_map.bind(Counted, handle)
    consumer = Consumer(broker, event_map=event_map, on_handled=lambda done: reasons.append(done.reason))
    running = asyncio.create_task(consumer.run(signals=False))
    await until_subscribed(broker)
    garbage = [b"", b"s3cr3t", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"payload": "s3cr3t"}', b"x" * 2_000_000]
    for body in garbage:
        await admin.publish(f"{prefix}:notification_event:Counted", body)
    await send(broker, 1)

    async def done() -> bool:
        return handled == [1]

    await eventually(done)
    consumer.stop()
    await running
    assert [(reason or "handled").partition(":")[0] for reason in reasons] == ["undecodable"] * 7 + ["handled"]
    assert "s3cr3t" not in caplog.text


async def until_subscribed(broker) -> None:
    """Publish messages that no handler accepts, until a subscriber receives one."""

    async def heard() -> bool:
        client = broker._client
        return bool((await client.pubsub_numsub(f"{broker._prefix}:notification_event:Counted"))[0][1])

    await eventually(heard)


# -- the end -----------------------------------------------------------------------------------------------------


async def connected(admin, prefix) -> int:
    return sum(each["name"] == prefix for each in await admin.client_list())


async def test_ending_under_traffic(broker, admin, prefix) -> None:
    """The subscription ends at once although messages arrive, and leaves no connection open."""
    before, stop = await connected(admin, prefix), asyncio.Event()

    async def publish() -> None:
        while not stop.is_set():
            await send(broker, *range(50))

    publishing = asyncio.create_task(publish())
    try:
        for _ in range(20):
            async with asyncio.timeout(30):
                async with broker.subscribe([COUNTED]) as deliveries:
                    await take(deliveries, 20)
    finally:
        stop.set()
        await publishing

    async def back() -> bool:
        return await connected(admin, prefix) == before

    await eventually(back)


@pytest.mark.parametrize("outage", ["refuse", "black_hole", "withhold"])
async def test_ending_in_an_outage(*, make, proxy, proxied_url, broker, admin, prefix, outage) -> None:
    before = await connected(admin, prefix)
    reader = await make(proxied_url)
    async with reader.subscribe([COUNTED]):
        await asyncio.sleep(0.05)
        getattr(proxy, outage)()
        if outage == "refuse":
            proxy.cut()
        await asyncio.sleep(0.7)
        ending = monotonic()
    await reader.aclose()
    assert monotonic() - ending < 1 + SLACK
    await proxy.heal()
    proxy.reset()

    async def back() -> bool:
        return await connected(admin, prefix) == before

    await eventually(back)


@pytest.mark.parametrize("own_client", [False, True])
async def test_closing_the_broker_ends_the_subscription(make, redis_url, own_client) -> None:
    """It ends with the program's own client too."""
    async with Redis.from_url(redis_url) as client:
        broker = await make(client if own_client else redis_url)
        async with broker.subscribe([COUNTED]) as deliveries:
            await broker.aclose()
            with pytest.raises(BrokerClosed):
                await take(deliveries, 1)
