"""Redis Streams against a real Redis. The traps are those that this service and its client library set."""

import asyncio
import gc
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from diator.brokers import Message
from diator.brokers.base import Delivery, Topic
from diator.brokers.codec import decode, encode
from diator.brokers.redis import _group, _streams
from diator.brokers.redis._connection import CommandConnection
from diator.brokers.redis._group import Subscription
from diator.brokers.redis._scripts import FORGET
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.consumer import Consumer
from diator.events import EventMap, NotificationEvent
from diator.exceptions import BrokerClosed, BrokerUnavailable, OutcomeUnknown, UnsupportedCapability
from diator.retrying import RetryPolicy
from diator.testing.fault_proxy import FaultProxy, Flow

COUNTED = Topic("notification_event", "Counted")
LEASE = 0.6
LONG = 60.0
"""A lease that no test waits for."""
TIMEOUT = 1.0
SLACK = 1.0
"""How much later than promised a busy machine may be."""
ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)


@dataclass(frozen=True, kw_only=True)
class Counted(NotificationEvent):
    number: int


# -- what the tests are given ------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> None:
    """Look often for what others left behind, and for what is due."""
    monkeypatch.setattr(_streams, "_SCAN", 0.1)


@pytest.fixture
async def admin(redis_url) -> AsyncIterator[Redis]:
    """Plain redis-py."""
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
async def prefix(admin) -> AsyncIterator[str]:
    prefix = f"test-{uuid4()}"
    yield prefix
    if keys := await admin.keys(f"{prefix}*"):
        await admin.delete(*keys)


@pytest.fixture
def stream(prefix) -> str:
    return f"{prefix}:notification_event:Counted"


@pytest.fixture
async def proxy(redis_url) -> AsyncIterator[FaultProxy]:
    address = urlsplit(redis_url)
    async with FaultProxy(address.hostname or "", address.port or 6379) as proxy:
        yield proxy


@pytest.fixture
def proxied_url(redis_url, proxy) -> str:
    user, at, _ = urlsplit(redis_url).netloc.rpartition("@")
    return urlsplit(redis_url)._replace(netloc=f"{user}{at}{proxy.host}:{proxy.port}").geturl()


@pytest.fixture
async def make(prefix) -> AsyncIterator:
    """Makes brokers with little patience, and closes them."""
    async with AsyncExitStack() as stack:

        async def make(address, **options) -> RedisStreamMessageBroker:
            reconnect = ReconnectPolicy(connect_timeout=TIMEOUT, idle_timeout=1.5, probe_timeout=0.5, max_delay=0.2)
            options = {"lease": LEASE, "timeout": TIMEOUT, "reconnect": reconnect, **options}
            make = RedisStreamMessageBroker.from_url if isinstance(address, str) else RedisStreamMessageBroker
            return await stack.enter_async_context(make(address, prefix, **options))

        yield make


@pytest.fixture
async def broker(make, redis_url) -> RedisStreamMessageBroker:
    return await make(redis_url)


@pytest.fixture
async def patient(make, redis_url) -> RedisStreamMessageBroker:
    """A broker whose leases do not end while a test runs."""
    return await make(redis_url, lease=LONG)


# -- how they are told -------------------------------------------------------------------------------------------


def message(number, topic=COUNTED, **fields) -> Message:
    return Message.create(message_name=topic.message_name, payload={"number": number}, **fields)


async def send(broker, *numbers) -> None:
    await broker.send_messages([message(number) for number in numbers])


def number_of(delivery) -> int:
    return json.loads(delivery.body)["payload"]["number"]


def subscribed(broker, *topics, group="billing", **options):
    return broker.subscribe(topics or [COUNTED], group=group, **options)


async def take(deliveries, count, *, within=5.0) -> list[Delivery]:
    async with asyncio.timeout(within):
        return [await anext(deliveries) for _ in range(count)]


async def acked(deliveries, count, *, within=5.0) -> list[int]:
    """Take and acknowledge *count* of them; what they say."""
    numbers = []
    async with asyncio.timeout(within):
        for _ in range(count):
            delivery = await anext(deliveries)
            await delivery.ack()
            numbers.append(number_of(delivery))
    return numbers


async def nothing_comes(deliveries, *, within=0.5) -> None:
    with pytest.raises(TimeoutError):
        await take(deliveries, 1, within=within)


@asynccontextmanager
async def consuming(broker, handle, **options):
    """A consumer in its own task, whose handlers call *handle* with each event."""

    async def handler(event: Counted) -> None:
        if (waiting := handle(event)) is not None:
            await waiting

    event_map = EventMap()
    event_map.bind(Counted, handler)
    consumer = Consumer(broker, event_map=event_map, group="billing", **options)
    running = asyncio.create_task(consumer.run(signals=False))
    try:
        yield consumer
    finally:
        consumer.stop()
        await running


async def eventually(holds, *, within=5.0) -> None:
    async with asyncio.timeout(within):
        while not await holds():  # noqa: ASYNC110  # no event tells what Redis knows
            await asyncio.sleep(0.01)


async def pending(admin, stream, group="billing") -> int:
    return (await admin.xpending(stream, group))["pending"]


async def nothing_left(admin, stream, group="billing") -> None:
    """Of this group, wait until nothing is pending, unread or delayed."""

    async def holds() -> bool:
        for each in (stream, f"{stream}:{group}:again"):
            (about,) = [about for about in await admin.xinfo_groups(each) if about["name"] == group.encode()]
            if about["pending"] or about["lag"]:
                return False
        return not await admin.zcard(f"{stream}:{group}:delayed")

    await eventually(holds)


async def dead_letters(admin, stream, group="billing") -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await admin.xrange(f"{stream}:{group}:dead")]


# -- what travels ------------------------------------------------------------------------------------------------


async def test_headers_and_key_are_fields(broker, admin, stream) -> None:
    headers = {"traceparent": "00-ab-cd-01", "name": "Zoë"}
    await broker.send_message(sent := message(1, key="meeting-7", headers=headers))

    [(_, fields)] = await admin.xrange(stream)
    assert json.loads(fields.pop(b"body")).keys() == {"message_type", "message_name", "message_id", "payload"}
    assert fields == {b"traceparent": b"00-ab-cd-01", b"name": "Zoë".encode(), b"key": b"meeting-7"}
    async with subscribed(broker) as deliveries:
        [delivery] = await take(deliveries, 1)
        assert decode(delivery.body, headers=delivery.headers) == sent


@pytest.mark.parametrize("name", ["body", "again", "message_id", "", "diator-dlq-reason"])
async def test_a_header_of_any_name(broker, name) -> None:
    """What a program calls its headers is its own affair, and never takes the place of the message."""
    await broker.send_message(sent := message(1, headers={name: "said"}))

    async with subscribed(broker) as deliveries:
        [delivery] = await take(deliveries, 1)
        assert decode(delivery.body, headers=delivery.headers) == sent


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": 2},
        {"protocol": 3},
        {"protocol": 2, "legacy_responses": False},
        {"protocol": 3, "legacy_responses": False},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True},
        {"health_check_interval": 0.05, "socket_timeout": 0.3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick")
async def test_trap_7_replies_have_another_shape_for_each_client(*, make, redis_url, admin, stream, options) -> None:
    """Reading, settling, taking over and trimming, with a client of the program's."""
    async with Redis.from_url(redis_url, **options) as client, AsyncExitStack() as stack:
        broker = await make(client, retention=0.0)
        await send(broker, 1, 2, 3)
        await admin.xgroup_create(stream, "billing", "0")
        await admin.xreadgroup("billing", "gone", {stream: ">"}, count=1)
        deliveries = await stack.enter_async_context(subscribed(broker))

        two, three, one = await take(deliveries, 3)
        assert [(number_of(each), each.attempt) for each in (one, two, three)] == [(1, 2), (2, 1), (3, 1)]
        await one.dead_letter("bad")
        await two.retry(after=0.01)
        await three.ack()
        [two] = await take(deliveries, 1)
        assert (number_of(two), two.attempt, two.topic) == (2, 2, COUNTED)
        await two.ack()

        async def trimmed() -> bool:
            return await admin.xlen(stream) <= 1

        await nothing_left(admin, stream)
        await eventually(trimmed)
        assert len(await dead_letters(admin, stream)) == 1
        await stack.aclose()
        await broker.aclose()


# -- sending -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_client", [False, True])
async def test_trap_8_an_entry_is_not_appended_twice(*, make, proxy, proxied_url, admin, stream, own_client) -> None:
    """The answer is lost: that is what the caller hears, even if the client would have tried again."""
    retry = Retry(ConstantBackoff(0.01), 5)
    async with Redis.from_url(proxied_url, socket_timeout=0.2, retry=retry) as client:
        broker = await make(client if own_client else proxied_url)
        proxy.withhold(Flow.TO_CLIENT)
        async with asyncio.timeout(TIMEOUT + SLACK):
            with pytest.raises(OutcomeUnknown) as raised:
                await broker.send_message(sent := message(1))
        await proxy.heal()

        assert raised.value.message_id == sent.message_id
        assert await admin.xlen(stream) == 1
        await broker.aclose()


# -- groups ------------------------------------------------------------------------------------------------------


async def test_without_a_group_nobody_knows_what_was_handled(broker) -> None:
    with pytest.raises(UnsupportedCapability, match="group"):
        async with subscribed(broker, group=None):
            pass


async def test_trap_9_who_comes_after_the_first_message_gets_it(broker) -> None:
    await send(broker, 1, 2)
    async with subscribed(broker) as deliveries, subscribed(broker, group="mailing") as others:
        await send(broker, 3)

        assert await acked(deliveries, 3) == [1, 2, 3]
        assert await acked(others, 3) == [1, 2, 3]
    async with subscribed(broker) as deliveries:
        await send(broker, 4)
        assert await acked(deliveries, 1) == [4]


async def test_members_share_and_groups_do_not(make, redis_url, broker) -> None:
    got = {name: Counter() for name in ("billing 1", "billing 2", "mailing")}

    async def read(broker, name) -> None:
        async with subscribed(broker, group=name.split()[0], prefetch=4) as deliveries:
            ready.release()
            async for delivery in deliveries:
                got[name][number_of(delivery)] += 1
                await asyncio.sleep(0.001)
                await delivery.ack()

    ready = asyncio.Semaphore(0)
    reading = [asyncio.create_task(read(await make(redis_url, extra_prefetch=0, lease=LONG), name)) for name in got]
    for _ in reading:
        await ready.acquire()
    for number in range(200):
        await broker.send_message(message(number))

    async def all_there() -> bool:
        return got["mailing"].total() >= 200 and (got["billing 1"] + got["billing 2"]).total() >= 200

    await eventually(all_there)
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    every = Counter(range(200))
    assert got["billing 1"] + got["billing 2"] == every == got["mailing"]
    assert min(got["billing 1"].total(), got["billing 2"].total()) > 20


async def test_order_for_one_member(*, make, proxy, proxied_url, broker) -> None:
    """Of the first deliveries, also over connections that break."""
    reader = await make(proxied_url, lease=LONG)
    order = []
    async with subscribed(reader) as deliveries:
        for first in range(0, 500, 100):
            await send(broker, *range(first, first + 100))
            order += await acked(deliveries, 50)
            if first in (100, 300):
                await asyncio.sleep(0.1)
                proxy.cut()
                await asyncio.sleep(0.1)  # what Redis gives to a connection that is gone comes later
        order += await acked(deliveries, 250)

    assert order == [*range(500)]


# -- connections -------------------------------------------------------------------------------------------------


async def test_trap_1_a_quiet_stream_is_no_broken_connection(make, redis_url, admin, prefix, broker) -> None:
    """Whatever the client's timeout: reads block for longer, or no longer, and none is given up."""

    async def connections() -> set[str]:
        return {each["id"] for each in await admin.client_list() if each["name"] == prefix}

    name = {"client_name": prefix}
    async with (
        Redis.from_url(redis_url, socket_timeout=0.5, **name) as hasty,
        Redis.from_url(redis_url, socket_timeout=0.5, retry=Retry(ConstantBackoff(0.01), 5), **name) as stubborn,
        Redis.from_url(redis_url, socket_timeout=None, protocol=3, **name) as patient,
        AsyncExitStack() as stack,
    ):
        everyone = []
        for number, address in enumerate([hasty, stubborn, patient, f"{redis_url}?client_name={prefix}"]):
            subscription = subscribed(await make(address, timeout=0.8), group=f"group-{number}")
            everyone.append(await stack.enter_async_context(subscription))
        await asyncio.sleep(0.1)
        before = await connections()
        await asyncio.sleep(8)

        assert await connections() == before
        assert len(before) == 8  # one that reads and one for the rest, each
        await send(broker, 1)
        for deliveries in everyone:
            assert await acked(deliveries, 1, within=1) == [1]


@pytest.mark.parametrize("what", ["the stream", "all of it", "everything"])
async def test_trap_2_the_stream_is_deleted_while_it_is_read(*, make, private_redis, prefix, caplog, what) -> None:
    """The group is made again, and the program is told. What was held is settled in vain, and that harms nothing."""
    gaps = []
    async with Redis.from_url(private_redis.url) as admin:
        broker = await make(private_redis.url)
        async with subscribed(broker, on_gap=gaps.append) as deliveries:
            await send(broker, 1)
            [held] = await take(deliveries, 1)
            await asyncio.sleep(0.1)
            if what == "everything":
                await admin.flushdb()
            else:
                await admin.delete(*await admin.keys(f"{prefix}*{'' if what == 'all of it' else ':Counted'}"))
            await send(broker, 2)

            assert await acked(deliveries, 1) == [2]
            await held.ack()
            await asyncio.sleep(0.1)
            await send(broker, 3)
            assert await acked(deliveries, 1) == [3]

    assert len([record for record in caplog.records if "connecting again" in record.message]) < 10
    assert len(gaps) == 1


@pytest.mark.parametrize("fault", ["cut", "reset", "silence"])
@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_loses_nothing(
    *, make, proxy, proxied_url, broker, admin, stream, fault
) -> None:
    """In the middle of replies too. What was on its way then comes again when the lease is over."""
    got = Counter()
    reader = await make(proxied_url)

    async def break_it() -> None:
        for _ in range(4):
            await asyncio.sleep(random.uniform(0.02, 0.1))
            match fault:
                case "cut":
                    proxy.withhold(Flow.TO_CLIENT)
                    await asyncio.sleep(0.02)
                    proxy.cut()
                case "reset":
                    proxy.reset()
                case "silence":
                    proxy.black_hole(Flow.TO_CLIENT)
                    await asyncio.sleep(0.5)
            await proxy.heal()

    async with subscribed(reader, prefetch=10) as deliveries:
        breaking = asyncio.create_task(break_it())
        for first in range(0, 500, 50):
            await send(broker, *range(first, first + 50))
            await asyncio.sleep(0.02)
        async with asyncio.timeout(15):
            while len(got) < 500:
                delivery = await anext(deliveries)
                got[number_of(delivery)] += 1
                await delivery.ack()
        await breaking
        while True:  # what was acknowledged in vain
            try:
                await acked(deliveries, 1, within=LEASE + 2)
            except TimeoutError:
                break
        await nothing_left(admin, stream)

    assert got.keys() == {*range(500)}


async def test_what_was_on_its_way_comes_with_the_next_connection(make, proxy, proxied_url, broker) -> None:
    """It is this member's already: nobody has to wait until its own lease is over."""
    reader = await make(proxied_url, lease=LONG)
    async with subscribed(reader) as deliveries:
        await asyncio.sleep(0.1)
        proxy.withhold(Flow.TO_CLIENT)
        await send(broker, 1, 2)
        await asyncio.sleep(0.1)
        proxy.cut()
        await proxy.heal()

        assert sorted(await acked(deliveries, 2, within=2 + SLACK)) == [1, 2]


async def test_what_was_on_its_way_comes_though_fetching_it_fails_once(
    *, make, proxy, proxied_url, admin, stream, monkeypatch
) -> None:
    """The next connection breaks too, when the first of two was fetched. It must not count as given out for ever."""
    execute, claims = CommandConnection.execute, 0

    async def fail_once(self, *command, **options):
        nonlocal claims
        if command[0] == b"XCLAIM" and b"JUSTID" not in command:
            claims += 1
            if claims == 2:
                raise OutcomeUnknown("the connection to Redis failed")
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", fail_once)
    reader = await make(proxied_url, lease=LONG)
    async with subscribed(reader, prefetch=1) as deliveries:
        await asyncio.sleep(0.1)
        proxy.withhold(Flow.TO_CLIENT)
        async with admin.pipeline(transaction=True) as both:  # so that one reply has them
            for number in (1, 2):
                both.xadd(stream, {"body": encode(message(number), max_bytes=1000)})
            await both.execute()
        await asyncio.sleep(0.1)
        proxy.cut()
        await proxy.heal()

        assert sorted(await acked(deliveries, 2)) == [1, 2]
    assert claims > 2


async def test_entering_is_bounded_where_nobody_answers(make, proxy, proxied_url) -> None:
    broker = await make(proxied_url)
    proxy.black_hole()
    async with asyncio.timeout(TIMEOUT + 0.5):
        with pytest.raises(BrokerUnavailable):
            async with subscribed(broker):
                pass


@pytest.mark.parametrize("outage", ["refuse", "black_hole"])
async def test_the_end_is_bounded_in_an_outage(make, proxy, proxied_url, broker, outage) -> None:
    """One timeout for all that is left to say."""
    reader = await make(proxied_url)
    topics = [COUNTED, *(Topic("notification_event", f"other-{n}") for n in range(5))]
    async with subscribed(reader, *topics) as deliveries:
        await send(broker, *range(10))
        first, *_ = await take(deliveries, 5)
        getattr(proxy, outage)()
        if outage == "refuse":
            proxy.cut()
        await first.ack()
        ending = monotonic()

    assert monotonic() - ending < TIMEOUT + 0.5


async def test_closing_the_broker_ends_the_subscription(broker) -> None:
    async with subscribed(broker) as deliveries:
        await broker.aclose()
        with pytest.raises(BrokerClosed):
            await take(deliveries, 1)


# -- leases ------------------------------------------------------------------------------------------------------


async def test_trap_3_what_a_dead_member_held_is_finished_by_another(
    *, make, proxy, proxied_url, broker, admin, stream
):
    """Within the lease and two looks. A member that was only cut off does not take it back when it returns."""
    cut_off = await make(proxied_url)
    async with subscribed(cut_off) as deliveries, subscribed(broker) as others:
        await asyncio.sleep(0.1)
        while not deliveries._received:
            await send(broker, 1)
            await asyncio.sleep(0.05)
            if others._received:
                await acked(others, 1)
        [held] = await take(deliveries, 1)
        proxy.refuse()
        proxy.cut()
        died = monotonic()

        [delivery] = await take(others, 1)
        assert LEASE * 0.6 < monotonic() - died < LEASE + 2 + SLACK
        assert (delivery.attempt, delivery.body) == (2, held.body)
        await proxy.heal()
        await asyncio.sleep(LEASE * 1.5)
        ((owner),) = await admin.xpending_range(stream, "billing", "-", "+", 10)
        assert owner["message_id"] == delivery.token.id
        assert owner["consumer"] == delivery.settler.name
        await delivery.ack()
        await nothing_left(admin, stream)
        await nothing_comes(deliveries)


async def test_trap_4_a_long_handler_keeps_its_lease(make, redis_url, broker, admin, stream) -> None:
    """And so does what waits behind it: three leases long, and each is handled once."""
    handled = Counter()

    def handle(event):
        handled[event.number] += 1
        return asyncio.sleep(LEASE * 3)

    await send(broker, 1, 2)
    second = await make(redis_url)
    async with consuming(broker, handle), consuming(second, handle):
        await nothing_left(admin, stream)

    assert handled == {1: 1, 2: 1}


async def test_a_lost_lease_is_not_stolen_back(make, redis_url, admin, stream) -> None:
    broker = await make(redis_url, lease=1.5)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        await admin.xclaim(stream, "billing", "another", 0, [delivery.token.id], justid=True)
        await asyncio.sleep(1.3)

        [owner] = await admin.xpending_range(stream, "billing", "-", "+", 10)
        assert (owner["consumer"], owner["times_delivered"]) == (b"another", 1)
        assert owner["time_since_delivered"] > 1200
        await admin.xack(stream, "billing", delivery.token.id)


@pytest.mark.usefixtures("quick")
async def test_what_is_behind_many_that_are_held_is_found_too(*, make, redis_url, broker, admin, stream) -> None:
    """Redis looks at ten pending entries for each that is asked for; behind them is more."""
    reader = await make(redis_url, extra_prefetch=0)
    await admin.xgroup_create(stream, "billing", "0", mkstream=True)
    await send(broker, *range(31))
    await admin.xreadgroup("billing", "alive", {stream: ">"}, count=30)
    await admin.xreadgroup("billing", "dead", {stream: ">"}, count=1)
    alive = [each["message_id"] for each in await admin.xpending_range(stream, "billing", "-", "+", 30)]

    async def keep_alive() -> None:
        while True:
            await admin.xclaim(stream, "billing", "alive", 0, alive, justid=True)
            await asyncio.sleep(LEASE / 4)

    keeping = asyncio.create_task(keep_alive())
    try:
        async with subscribed(reader, prefetch=1) as deliveries:
            assert await acked(deliveries, 1) == [30]
    finally:
        keeping.cancel()


@pytest.mark.usefixtures("quick")
async def test_what_was_taken_over_is_not_forgotten_when_looking_fails(*, make, redis_url, admin, stream, monkeypatch):
    """The connection breaks between taking over and hearing how often each was delivered."""
    broker = await make(redis_url)
    await send(broker, 1, 2, 3)
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "dead", {stream: ">"}, count=3)
    execute, counts = CommandConnection.execute, 0

    async def fail_once(self, *command, **options):
        nonlocal counts
        if command[0] == b"XPENDING":
            counts += 1
            if counts == 2:
                raise OutcomeUnknown("the connection to Redis failed")
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", fail_once)
    async with subscribed(broker) as deliveries:
        assert sorted(await acked(deliveries, 3)) == [1, 2, 3]


@pytest.mark.usefixtures("quick")
async def test_what_is_acknowledged_while_it_is_taken_over_is_let_go(
    *, make, redis_url, admin, stream, monkeypatch, caplog
) -> None:
    """Its old owner was late, and not dead."""
    execute = CommandConnection.execute

    async def acknowledged_first(self, *command, **options):
        if command[0] == b"XPENDING" and b"1" in command[4:]:
            await admin.xack(stream, "billing", command[3])
        return await execute(self, *command, **options)

    monkeypatch.setattr(CommandConnection, "execute", acknowledged_first)
    broker = await make(redis_url)
    await send(broker, 1)
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "late", {stream: ">"}, count=1)
    async with subscribed(broker) as deliveries:
        await nothing_comes(deliveries, within=LEASE + SLACK)
        await nothing_left(admin, stream)
    assert "connecting again" not in caplog.text


@pytest.mark.parametrize("outcome", ["dead_letter", "retry"])
async def test_what_could_not_be_settled_comes_again(
    *, make, proxy, proxied_url, broker, admin, stream, outcome
) -> None:
    """It failed while the service was away. It is nobody's then, and must not stay this member's for ever."""
    reader = await make(proxied_url)
    async with subscribed(reader) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        proxy.refuse()
        proxy.cut()
        await asyncio.sleep(0.05)
        with pytest.raises(BrokerUnavailable):
            await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))
        await proxy.heal()

        [again] = await take(deliveries, 1, within=LEASE + 2 + SLACK)
        assert (number_of(again), again.attempt) == (1, 2)
        await again.ack()
        await nothing_left(admin, stream)


@pytest.mark.parametrize(
    "settle",
    [lambda each: each.ack(), lambda each: each.retry(), lambda each: each.dead_letter("bad")],
    ids=["ack", "retry", "dead letter"],
)
async def test_what_another_has_taken_is_not_settled(patient, admin, stream, settle) -> None:
    """
    It is settled too late, and by the other one as well: aside, or given back, it would be there twice.

    Acknowledged, it would be lost with the other one.
    """
    async with subscribed(patient) as deliveries:
        await send(patient, 1, 2)
        [delivery, own] = await take(deliveries, 2)
        await admin.xclaim(stream, "billing", "another", 0, [delivery.token.id], justid=True)

        await settle(delivery)
        await own.ack()
        await asyncio.sleep(0.1)

        assert await pending(admin, stream) == 1
        assert not await admin.xlen(f"{stream}:billing:again")
        assert not await dead_letters(admin, stream)
        await admin.xack(stream, "billing", delivery.token.id)


@pytest.mark.parametrize("outcome", ["dead_letter", "retry"])
async def test_what_is_settled_again_since_the_reply_was_lost_is_settled_once(
    *, make, redis_url, admin, stream, monkeypatch, outcome
) -> None:
    execute, settled = CommandConnection.execute, 0

    async def lose_one(self, *command, **options):
        nonlocal settled
        reply = await execute(self, *command, **options)
        if command[0] == b"EVAL" and b"XACK" in command[1]:
            settled += 1
            if settled == 1:
                raise OutcomeUnknown("the connection to Redis failed")
        return reply

    monkeypatch.setattr(CommandConnection, "execute", lose_one)
    broker = await make(redis_url, lease=LONG)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        [delivery] = await take(deliveries, 1)
        for _ in range(2):
            with suppress(OutcomeUnknown):
                await (delivery.retry() if outcome == "retry" else delivery.dead_letter("bad"))

        assert settled == 2
        if outcome == "retry":
            assert await acked(deliveries, 1) == [1]
            await nothing_comes(deliveries)
        else:
            assert len(await dead_letters(admin, stream)) == 1


# -- leaving -----------------------------------------------------------------------------------------------------


async def test_trap_10_leaving_with_pending_work_loses_nothing(patient, admin, stream) -> None:
    """Others get it at once, not when the lease is over. Who leaves with nothing is forgotten; who held much, later."""
    await send(patient, *range(20))
    async with subscribed(patient) as others:
        async with subscribed(patient) as deliveries:
            await send(patient, *range(20, 40))
            await asyncio.sleep(0.3)
            mine = await acked(deliveries, 1) if deliveries._received else []
        theirs = await acked(others, 40 - len(mine), within=2 + SLACK)

    assert sorted(mine + theirs) == [*range(40)]
    await nothing_left(admin, stream)


async def test_a_broker_that_is_closed_leaves_first(make, redis_url, patient, admin, stream) -> None:
    """What was acknowledged a moment ago is told, and the rest is others' at once, though the context goes on."""
    other = await make(redis_url, lease=LONG)
    await send(patient, *range(10))
    async with subscribed(other, prefetch=2) as deliveries:
        [first, _] = await take(deliveries, 2)
        await first.ack()
        await other.aclose()
        assert await pending(admin, stream) == 9

        async with subscribed(patient) as others:
            rest = await take(others, 9, within=2 + SLACK)
            assert [(number_of(each), each.attempt) for each in rest] == [(1, 2), *((n, 1) for n in range(2, 10))]
            for each in rest:
                await each.ack()
    await nothing_left(admin, stream)


async def test_members_that_are_gone_are_forgotten(patient, admin, stream, monkeypatch) -> None:
    async with subscribed(patient) as deliveries:
        await send(patient, 1)
        await take(deliveries, 1)
    assert [each["pending"] for each in await admin.xinfo_consumers(stream, "billing")] == [1]  # or it would be lost

    monkeypatch.setattr(_group, "_FORGOTTEN_AFTER", 0.5)
    async with subscribed(patient) as deliveries:
        assert await acked(deliveries, 1) == [1]
        await asyncio.sleep(0.6)

    for each in (stream, f"{stream}:billing:again"):
        assert await admin.xinfo_consumers(each, "billing") == []


async def test_what_was_never_given_out_is_no_attempt(patient, admin, stream) -> None:
    """Ten restarts with a message in the read-ahead must not make it look like one that kills its handlers."""
    await send(patient, 1)
    for _ in range(3):
        async with subscribed(patient) as deliveries:
            async with asyncio.timeout(3):
                while not deliveries._received:  # noqa: ASYNC110  # it is only looked at
                    await asyncio.sleep(0.01)
    async with subscribed(patient) as deliveries:
        [delivery] = await take(deliveries, 1)

        assert delivery.attempt == 1
        await delivery.ack()


async def test_leaving_under_traffic_strands_nothing(make, redis_url, patient, admin, stream) -> None:
    """Nor what Redis gave to the reader that was just going."""
    got, sent, stop = Counter(), 0, asyncio.Event()

    async def publish() -> None:
        nonlocal sent
        while not stop.is_set():
            await patient.send_message(message(sent))
            sent += 1

    publishing = asyncio.create_task(publish())
    for _ in range(30):
        async with subscribed(await make(redis_url, lease=LONG)) as deliveries:
            await asyncio.sleep(random.uniform(0.005, 0.03))
            got.update(await acked(deliveries, 1))
    stop.set()
    await publishing
    async with subscribed(patient) as deliveries:
        try:
            async with asyncio.timeout(3 + SLACK):
                while len(got) < sent:
                    got.update(await acked(deliveries, 1))
        except TimeoutError:
            stranded = await pending(admin, stream)
            pytest.fail(f"{sent - len(got)} of {sent} did not come; {stranded} are somebody's who is gone")

    await nothing_left(admin, stream)


async def test_leaving_one_topic_that_is_gone_leaves_the_others_too(patient, admin, prefix) -> None:
    """A stream that was deleted keeps nobody from what was held of another."""
    gone, kept = Topic("notification_event", "gone"), Topic("notification_event", "kept")
    async with subscribed(patient, gone, kept) as deliveries:
        await patient.send_message(message(1, kept))
        await take(deliveries, 1)
        await asyncio.sleep(0.05)
        subscriptions = [each for each in gc.get_objects() if type(each) is Subscription]
        (member,) = [each for each in subscriptions if prefix.encode() in each.streams[0]]
        monkey = member.execute

        async def deleted_first(*command, **options):
            if command[0] == b"EVAL" and command[1] is FORGET:
                await admin.delete(f"{prefix}:notification_event:gone")
            return await monkey(*command, **options)

        member.execute = deleted_first
    async with subscribed(patient, kept) as deliveries:
        assert await acked(deliveries, 1, within=2 + SLACK) == [1]


# -- settling ----------------------------------------------------------------------------------------------------


async def test_acknowledgements_travel_together(make, redis_url, admin, stream) -> None:
    """A thousand in a few commands; within milliseconds; and when the subscription ends, at once."""

    async def told() -> int:
        return (await admin.info("commandstats")).get("cmdstat_xack", {"calls": 0})["calls"]

    broker = await make(redis_url, lease=LONG)
    before = await told()
    async with subscribed(broker) as deliveries:
        await send(broker, *range(1000))
        await acked(deliveries, 1000)
        await asyncio.sleep(0.1)
        assert await pending(admin, stream) == 0
        assert await told() - before <= 50
        await send(broker, 1)
        await acked(deliveries, 1)
    assert await pending(admin, stream) == 0


@pytest.mark.usefixtures("quick")
async def test_a_retry_comes_when_it_is_due(broker, admin, stream) -> None:
    """Not before, as the next attempt, with all that it was sent with, to whoever is there then."""
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
async def test_what_a_dead_member_held_is_taken_over_as_it_can_begin(broker, admin, stream) -> None:
    """One of it may be what killed that member. What has not been begun is not to be counted with it."""
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
async def test_whoever_settles_too_late_changes_nothing(broker, admin, stream, late) -> None:
    """Another member took it over, and has handled it: it must not come back, nor be put aside."""
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
    """Not even for the next look at what is due."""
    monkeypatch.setattr(_streams, "_SCAN", 3.0)
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        for attempt in range(1, 6):
            [delivery] = await take(deliveries, 1, within=SLACK)
            assert delivery.attempt == attempt
            await (delivery.ack() if attempt == 5 else delivery.retry())
    await nothing_left(admin, stream)


@pytest.mark.usefixtures("quick")
async def test_a_crash_after_a_retry_counts_too(broker, admin, stream) -> None:
    """What was delivered twice, given back, and then lost with its member comes as the fourth."""
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
    """Whatever made so many fail at the same time, they do not come back one hundred a second."""
    async with subscribed(broker, prefetch=500) as deliveries:
        await send(broker, *range(500))
        for delivery in await take(deliveries, 500):
            await delivery.retry(after=0.1)

        assert sorted(await acked(deliveries, 500, within=1 + 2 * SLACK)) == [*range(500)]


@pytest.mark.usefixtures("quick")
async def test_messages_of_one_content_are_retried_one_by_one(broker) -> None:
    """Two that are the same to the last byte are two, also while they wait."""
    twice = message(1)
    async with subscribed(broker) as deliveries:
        await broker.send_messages([twice, twice])
        for delivery in await take(deliveries, 2):
            await delivery.retry(after=0.1)

        assert [each.attempt for each in await take(deliveries, 2)] == [2, 2]


@pytest.mark.usefixtures("quick")
async def test_topics_of_which_one_is_the_beginning_of_the_other(broker, admin, prefix) -> None:
    """What is retried or put aside stays where it belongs."""
    topics = short, long = Topic("notification_event", "user"), Topic("notification_event", "user:joined")
    async with subscribed(broker, *topics) as deliveries:
        await broker.send_message(message(1, long))
        for attempt in (1, 2, 3):
            [delivery] = await take(deliveries, 1)
            assert (delivery.topic, delivery.attempt) == (long, attempt)
            await (delivery.retry() if attempt < 3 else delivery.dead_letter("bad"))

        assert len(await dead_letters(admin, f"{prefix}:{long.message_type}:{long.message_name}")) == 1
        assert await dead_letters(admin, f"{prefix}:{short.message_type}:{short.message_name}") == []


# -- what cannot be handled --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
async def test_trap_5_poison_is_put_aside_once(make, redis_url, broker, admin, stream) -> None:
    """After exactly so many attempts, by two members: with reason and provenance, and the original acknowledged."""
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

        async def put_aside() -> bool:
            return bool(await dead_letters(admin, stream))

        await eventually(put_aside)
        await nothing_left(admin, stream)
        await asyncio.sleep(0.3)

    assert attempts == [1, 2, 3]
    assert handled == {13: 6, **dict.fromkeys(range(5), 1)}
    [letter] = await dead_letters(admin, stream)
    letter = {name.decode(): value for name, value in letter.items()}
    assert decode(letter.pop("body"), headers={"key": "k", "a": "b"}) == sent
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT.*\+00:00", letter.pop("diator-dlq-last-failed-at"))
    assert letter == {
        "key": b"k",
        "a": b"b",
        "diator-dlq-version": b"1",
        "diator-dlq-reason": b"retries-exhausted: ValueError",
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
async def test_a_foreign_entry_is_put_aside(broker, admin, stream, fields, caplog) -> None:
    """With a reason, as it was; what comes with it and after it is handled."""
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


# -- what is removed ---------------------------------------------------------------------------------------------


async def test_trap_6_what_was_trimmed_before_it_was_handled(
    *, make, proxy, proxied_url, broker, admin, stream, caplog
):
    """Somebody else's XTRIM, on a group that lags: said loudly, and life goes on."""
    gone = await make(proxied_url, extra_prefetch=0)
    async with subscribed(gone, prefetch=5) as deliveries:
        await send(broker, *range(20))
        await take(deliveries, 5)
        proxy.refuse()
        proxy.cut()
        await admin.xtrim(stream, maxlen=2, approximate=False)

        async with subscribed(broker) as others:
            assert await acked(others, 2) == [18, 19]
            await asyncio.sleep(LEASE + 1.2)
            await send(broker, 20)
            assert await acked(others, 1) == [20]
            await asyncio.sleep(0.05)
            assert await pending(admin, stream) == 0

    removed = [record for record in caplog.records if record.levelname == "ERROR" and "removed" in record.message]
    assert removed
    assert "5 messages" in removed[0].message


@pytest.mark.usefixtures("quick")
async def test_retention_removes_what_every_group_has_done_with(make, redis_url, admin, stream) -> None:
    """And nothing else: not what a group has yet to read, nor what a member holds."""
    broker = await make(redis_url, lease=LONG, retention=0.2)
    await admin.xgroup_create(stream, "slow", "0", mkstream=True)
    await send(broker, *range(10))

    async def length(expected) -> None:
        async def holds() -> bool:
            return await admin.xlen(stream) == expected

        await eventually(holds)
        await asyncio.sleep(0.3)
        assert await holds()

    async with subscribed(broker) as deliveries:
        fast = await take(deliveries, 10)
        for delivery in fast[:4] + fast[5:]:
            await delivery.ack()
        await asyncio.sleep(0.5)
        await length(10)
        entries = await admin.xreadgroup("slow", "one", {stream: ">"})
        await admin.xack(stream, "slow", *[entry for entry, _ in entries[0][1]])
        await length(6)
        await fast[4].ack()
        await length(1)


@pytest.mark.usefixtures("quick")
async def test_retention_is_about_retries_too(make, redis_url, admin, stream) -> None:
    broker = await make(redis_url, lease=LONG, retention=0.1)
    async with subscribed(broker) as deliveries:
        await send(broker, *range(10))
        for delivery in await take(deliveries, 10):
            await delivery.retry()
        await acked(deliveries, 10)

        async def trimmed() -> bool:
            return await admin.xlen(f"{stream}:billing:again") <= 1

        await eventually(trimmed, within=2)


async def test_without_retention_nothing_is_removed(broker, admin, stream) -> None:
    async with subscribed(broker) as deliveries:
        await send(broker, *range(10))
        await acked(deliveries, 10)
        await asyncio.sleep(1.2)

    assert await admin.xlen(stream) == 10


# -- what is held ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefetch", "ahead"), [(1, 0), (5, 10)])
async def test_read_ahead_is_bounded(*, make, redis_url, admin, stream, prefetch, ahead) -> None:
    """Redis has given out that many, and not one more; so others of the group get their share."""
    broker = await make(redis_url, lease=LONG, extra_prefetch=ahead)
    await send(broker, *range(200))
    async with subscribed(broker, prefetch=prefetch) as deliveries:
        for _ in range(10):
            await asyncio.sleep(0.05)
            assert await pending(admin, stream) <= prefetch + ahead
            await acked(deliveries, 1)
        assert await acked(deliveries, 150) == [*range(10, 160)]


async def test_read_ahead_is_bounded_over_all_topics(make, redis_url, admin, prefix) -> None:
    broker = await make(redis_url, lease=LONG, extra_prefetch=2)
    topics = [Topic("notification_event", f"topic-{n}") for n in range(5)]
    for topic in topics:
        await broker.send_messages([message(n, topic) for n in range(20)])
    async with subscribed(broker, *topics, prefetch=2) as deliveries:
        await asyncio.sleep(0.1)
        held = [await pending(admin, f"{prefix}:{topic.message_type}:{topic.message_name}") for topic in topics]
        assert sum(held) <= 4
        assert len(await acked(deliveries, 100)) == 100


async def test_no_more_than_prefetch_are_given_out_and_not_settled(patient) -> None:
    await send(patient, *range(20))
    async with subscribed(patient, prefetch=3) as deliveries:
        first, *_ = await take(deliveries, 3)
        await nothing_comes(deliveries)
        await first.ack()
        assert [number_of(each) for each in await take(deliveries, 1)] == [3]
        await nothing_comes(deliveries)


@pytest.mark.usefixtures("quick")
async def test_nothing_is_kept_of_what_was_settled(broker, admin, stream) -> None:
    """However it was settled."""
    async with subscribed(broker) as deliveries:
        await send(broker, *range(300))
        async with asyncio.timeout(10):
            for _ in range(400):
                delivery = await anext(deliveries)
                if number_of(delivery) % 3 == 0 and delivery.attempt == 1:
                    await delivery.retry()
                elif number_of(delivery) % 3 == 1:
                    await delivery.dead_letter("bad")
                else:
                    await delivery.ack()
        await nothing_left(admin, stream)
        del delivery

        async def nothing_is_kept() -> bool:
            gc.collect()
            return not any(type(each) is Delivery for each in gc.get_objects())

        await eventually(nothing_is_kept)
