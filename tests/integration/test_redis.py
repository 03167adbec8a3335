"""Redis Pub/Sub against a real Redis. Who listens is plain redis-py."""

import asyncio
import json
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import fakeredis
import pytest
import redis as synchronous_redis
from docker.errors import APIError
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ConstantBackoff
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import RedisError
from testcontainers.core.container import DockerContainer

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker
from diator.events import NotificationEvent
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EventsNotSent,
    MessageRejected,
    MessagesNotSent,
    MessageTooLarge,
    MessageUnroutable,
    OutcomeUnknown,
)
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from diator.testing.fault_proxy import BOTH, FaultProxy, Flow
from tests.services import BACKENDS, Service

TIMEOUT = 0.5
"""Of the brokers whose Redis is in trouble, in seconds."""

SLACK = 1.0
"""How much later than promised a busy machine may be."""


# -- who listens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ears:
    """A plain subscriber to all notification events below one prefix."""

    client: Redis
    pubsub: PubSub
    prefix: str

    async def heard(self) -> list[tuple[str, bytes]]:
        """All that was published since the last call, in its order: channel and body."""
        mark = f"{self.prefix}:notification_event:{uuid4()}"
        await self.client.publish(mark, b"")
        heard: list[tuple[str, bytes]] = []
        while True:
            found = await self.pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
            assert found is not None, "the subscriber hears nothing any more"
            channel = found["channel"].decode()
            if channel == mark:
                return heard
            heard.append((channel, found["data"]))

    async def numbers(self) -> list[int]:
        """The numbers in what `heard` gives."""
        return [json.loads(body)["payload"]["n"] for _, body in await self.heard()]


@asynccontextmanager
async def listening(url: str, prefix: str) -> AsyncIterator[Ears]:
    async with Redis.from_url(url, protocol=2) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(f"{prefix}:notification_event:*")
        assert await pubsub.get_message(timeout=5)
        yield Ears(client, pubsub, prefix)


def message(n: int = 0, **fields: Any) -> Message:
    return Message.create(message_name="user_joined", payload={"n": n}, **fields)


async def send_all(broker: RedisMessageBroker, *numbers: int) -> Counter[type | None]:
    """Send these at once; count the verdicts, None being a success. Each says which message it is about."""
    sent = [message(n) for n in numbers]
    verdicts = await asyncio.gather(*map(broker.send_message, sent), return_exceptions=True)
    for verdict, about in zip(verdicts, sent, strict=True):
        assert verdict is None or verdict.message_id == about.message_id
    return Counter(verdict and type(verdict) for verdict in verdicts)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await holds():  # noqa: ASYNC110  # no event tells what Redis knows
            await asyncio.sleep(0.01)


async def connections(client: Redis, name: str) -> int:
    """How many connections of this name Redis has."""
    return sum(each["name"] == name for each in await client.client_list())


def promised(timeout: float = TIMEOUT) -> asyncio.Timeout:
    """What stands in here must be over when it was promised to be."""
    return asyncio.timeout(timeout + SLACK)


# -- what the tests are given ------------------------------------------------------------------------------------


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4()}"


@pytest.fixture
async def ears(redis_url: str, prefix: str) -> AsyncIterator[Ears]:
    async with listening(redis_url, prefix) as ears:
        yield ears


@pytest.fixture
async def broker(redis_url: str, prefix: str) -> AsyncIterator[RedisMessageBroker]:
    """A broker with a connection, named like its prefix."""
    async with RedisMessageBroker.from_url(f"{redis_url}?client_name={prefix}", prefix) as broker:
        yield broker


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the Redis that all tests share."""
    address = urlsplit(redis_url)
    async with FaultProxy(address.hostname or "", address.port or 6379) as proxy:
        yield proxy


@pytest.fixture
def proxied_url(redis_url: str, proxy: FaultProxy, prefix: str) -> str:
    """The address of that Redis through the proxy; connections are named like the prefix."""
    user, at, _ = urlsplit(redis_url).netloc.rpartition("@")
    address = urlsplit(redis_url)._replace(netloc=f"{user}{at}{proxy.host}:{proxy.port}")
    return f"{address.geturl()}?client_name={prefix}"


@pytest.fixture
async def proxied(proxied_url: str, prefix: str) -> AsyncIterator[RedisMessageBroker]:
    """A broker with a connection through the proxy, and little patience."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, timeout=TIMEOUT) as broker:
        yield broker


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the process hands to the system with PUBLISH in it, each call by itself."""
    written: list[bytes] = []
    send = socket.socket.send

    def note(self: socket.socket, data: bytes, *flags: int) -> int:
        if b"PUBLISH" in bytes(data):
            written.append(bytes(data))
        return send(self, data, *flags)

    monkeypatch.setattr(socket.socket, "send", note)
    return written


# -- what travels ------------------------------------------------------------------------------------------------


async def test_channel_and_body(broker: RedisMessageBroker, ears: Ears, prefix: str) -> None:
    """The channel says what it is about; the body is one JSON object of four keys."""
    sent = Message.create(message_name="user_joined", payload={"user_id": 7, "name": "Zoë"})

    await broker.send_message(sent)

    body = (
        f'{{"message_type":"notification_event","message_name":"user_joined","message_id":"{sent.message_id}",'
        '"payload":{"user_id":7,"name":"Zoë"}}'
    )
    assert await ears.heard() == [(f"{prefix}:notification_event:user_joined", body.encode())]


async def test_the_default_prefix(redis_url: str) -> None:
    name = f"test-{uuid4()}"
    async with (
        RedisMessageBroker.from_url(redis_url) as broker,
        Redis.from_url(redis_url) as client,
        client.pubsub() as pubsub,
    ):
        await pubsub.subscribe(f"python_diator_channel:ecst_event:{name}")
        await pubsub.get_message(timeout=5)

        await broker.send_message(Message.create(message_type="ecst_event", message_name=name, payload={}))

        assert await pubsub.get_message(timeout=5)


async def test_headers_and_key_travel_in_the_body(broker: RedisMessageBroker, ears: Ears) -> None:
    """Pub/Sub has no headers of its own, so they are a fifth key, and the key of the message is one of them."""
    await broker.send_message(message(1, key="meeting-7", headers={"traceparent": "00-ab-cd-01"}))

    ((_, body),) = await ears.heard()
    assert list(json.loads(body)) == ["message_type", "message_name", "message_id", "payload", "headers"]
    assert json.loads(body)["headers"] == {"traceparent": "00-ab-cd-01", "key": "meeting-7"}


async def test_what_is_too_large_is_not_sent(redis_url: str, prefix: str, ears: Ears) -> None:
    """The limit is the length of the whole body, and itself still allowed."""
    async with RedisMessageBroker.from_url(redis_url, prefix) as unlimited:
        await unlimited.send_message(message(1))
    size = len((await ears.heard())[0][1])
    async with RedisMessageBroker.from_url(redis_url, prefix, max_message_bytes=size) as broker:
        with pytest.raises(MessageTooLarge) as raised:
            await broker.send_message(message(22))
        await broker.send_message(message(3))

    assert (raised.value.size, raised.value.limit) == (size + 1, size)
    assert await ears.numbers() == [3]


# -- receipts and order ------------------------------------------------------------------------------------------


async def test_what_one_task_sends_keeps_its_order(broker: RedisMessageBroker, ears: Ears) -> None:
    for n in range(200):
        await broker.send_message(message(n))

    assert await ears.numbers() == list(range(200))


async def test_every_task_gets_its_own_receipts(broker: RedisMessageBroker, ears: Ears) -> None:
    """Fifty tasks at once: each send its own answer, everything delivered once, the order of each task kept."""

    async def work(worker: int) -> list[int]:
        receipts = []
        for n in range(20):
            heard = message(worker * 100 + n)
            unheard = message(message_type="unheard_event")
            receipts.append(await broker.publish(heard if n % 2 else unheard))
        return receipts

    receipts = await asyncio.gather(*map(work, range(50)))

    assert receipts == [[0, 1] * 10] * 50
    numbers = await ears.numbers()
    assert sorted(numbers) == [worker * 100 + n for worker in range(50) for n in range(1, 20, 2)]
    by_worker = [[n for n in numbers if n // 100 == worker] for worker in range(50)]
    assert all(own == sorted(own) for own in by_worker)


async def test_the_number_of_receivers(broker: RedisMessageBroker, redis_url: str, prefix: str) -> None:
    receivers = [await broker.publish(message())]
    async with listening(redis_url, prefix):
        receivers += [await broker.publish(message())]
        async with listening(redis_url, prefix):
            receivers += [await broker.publish(message())]

    assert receivers == [0, 1, 2]


async def test_a_receiver_can_be_required(redis_url: str, prefix: str) -> None:
    sent = message()
    async with RedisMessageBroker.from_url(redis_url, prefix, require_receiver=True) as broker:
        with pytest.raises(MessageUnroutable) as raised:
            await broker.send_message(sent)
        async with listening(redis_url, prefix):
            await broker.send_message(message())

    assert raised.value.message_id == sent.message_id


async def test_several_messages_go_out_in_their_order(broker: RedisMessageBroker, ears: Ears) -> None:
    await broker.send_messages([message(n) for n in range(100)])

    assert await ears.numbers() == list(range(100))


@pytest.mark.parametrize("others", [0, 4])
@pytest.mark.parametrize("max_in_flight", [1, 3, 32])
async def test_several_messages_keep_their_order_where_there_is_no_room(
    redis_url: str, prefix: str, ears: Ears, max_in_flight: int, others: int
) -> None:
    """More messages than may be in flight: first with a connection that is yet to be made, then with one there is."""

    async def send_others() -> None:
        for _ in range(100):
            await broker.send_message(message(1000))

    async with aclosing(RedisMessageBroker.from_url(redis_url, prefix, max_in_flight=max_in_flight)) as broker:
        for _ in range(2):
            batch = [message(n) for n in range(200)]
            await asyncio.gather(broker.send_messages(batch), *(send_others() for _ in range(others)))
            assert [n for n in await ears.numbers() if n < 1000] == list(range(200))


async def test_of_several_messages_those_not_confirmed_are_named(broker: RedisMessageBroker, ears: Ears) -> None:
    """What can be sent is; the error names the rest, and its cause is the verdict on the first of them."""
    large = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 2_000_000})
    larger = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 3_000_000})

    with pytest.raises(MessagesNotSent) as raised:
        await broker.send_messages([message(1), large, message(2), larger, message(3)])

    assert raised.value.message_ids == (large.message_id, larger.message_id)
    assert isinstance(raised.value.__cause__, MessageTooLarge)
    assert raised.value.__cause__.message_id == large.message_id
    assert await ears.numbers() == [1, 2, 3]


# -- one connection, few writes, bounds --------------------------------------------------------------------------


async def test_concurrent_callers_share_a_connection_and_its_writes(
    broker: RedisMessageBroker, ears: Ears, prefix: str, writes: list[bytes]
) -> None:
    async def work() -> None:
        for n in range(20):
            await broker.send_message(message(n))

    await asyncio.gather(*(work() for _ in range(50)))

    assert len(await ears.heard()) == 1000
    assert await connections(ears.client, prefix) == 1
    assert sum(written.count(b"PUBLISH") for written in writes if prefix.encode() in written) >= 1000
    assert len(writes) < 200


async def test_a_lone_message_is_not_delayed(broker: RedisMessageBroker, writes: list[bytes]) -> None:
    """It is written in the turn of the event loop in which it is sent."""
    for _ in range(3):
        send = asyncio.create_task(broker.send_message(message()))
        await asyncio.sleep(0)
        written = len(writes)
        writes.clear()
        await send
        assert written == 1


async def test_messages_in_flight_are_bounded(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """While no answer comes, no more than `max_in_flight` messages reach Redis; the others wait and then go."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=4) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        sends = asyncio.gather(*(broker.send_message(message(n)) for n in range(20)))
        await asyncio.sleep(0.2)
        reached = await ears.numbers()
        await proxy.heal()
        await sends

    assert reached == [0, 1, 2, 3]
    assert await ears.numbers() == list(range(4, 20))


async def test_bytes_in_flight_are_bounded(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """About 4 MiB, however many messages are allowed."""
    async with RedisMessageBroker.from_url(proxied_url, prefix) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        large = [
            Message.create(message_name="user_joined", payload={"n": n, "text": "x" * 1_000_000}) for n in range(12)
        ]
        sends = asyncio.gather(*map(broker.send_message, large))
        await asyncio.sleep(0.3)
        reached = await ears.numbers()
        await proxy.heal()
        await sends

    assert reached == [0, 1, 2, 3, 4]
    assert await ears.numbers() == list(range(5, 12))


async def test_waiting_for_room_counts_for_the_timeout(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    """A call ends within one timeout, whatever it has spent its time on: room, a connection, the answer."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, timeout=1, max_in_flight=1) as broker:

        async def send_and_withhold() -> None:
            await broker.send_message(message(1))
            proxy.withhold(Flow.TO_CLIENT)

        proxy.withhold(Flow.TO_CLIENT)
        first = asyncio.create_task(send_and_withhold())
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1.5):
            second = asyncio.create_task(send_all(broker, 2))
            await asyncio.sleep(0.8)
            await proxy.heal()
            assert await second == {OutcomeUnknown: 1}

        await first
        assert await ears.numbers() == [1, 2]


async def test_connecting_counts_for_the_timeout(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    async def connect_slowly(connection: AbstractConnection) -> None:
        await connection.on_connect()
        await asyncio.sleep(0.8)
        proxy.withhold(Flow.TO_CLIENT)

    async with Redis.from_url(proxied_url, redis_connect_func=connect_slowly) as client:
        broker = RedisMessageBroker(client, prefix, timeout=1)

        async with asyncio.timeout(1.5):
            assert await send_all(broker, 1) == {OutcomeUnknown: 1}

        await broker.aclose()


# -- trouble -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_redis_restarts_between_two_messages(private_redis: Service, prefix: str, end: str) -> None:
    async with RedisMessageBroker.from_url(private_redis.url, prefix) as broker:
        await broker.send_message(message(1))

        await asyncio.to_thread(getattr(private_redis, end))
        await asyncio.to_thread(private_redis.start)

        async with listening(private_redis.url, prefix) as ears:
            await broker.send_message(message(2))
            assert await ears.numbers() == [2]


async def test_redis_is_down_for_a_while(private_redis: Service, prefix: str) -> None:
    """What is sent while it is down is not sent, and said so in time; a program can start without Redis."""
    async with RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT) as broker:
        await asyncio.to_thread(private_redis.kill)
        sent = message()
        async with promised():
            with pytest.raises(BrokerUnavailable) as raised:
                await broker.send_message(sent)
        assert raised.value.message_id == sent.message_id
        async with promised():
            assert await send_all(broker, *range(100)) == {BrokerUnavailable: 100}
        another = RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT)
        with pytest.raises(BrokerUnavailable):
            await another.__aenter__()

        await asyncio.to_thread(private_redis.start)

        async with listening(private_redis.url, prefix) as ears, another:
            await broker.send_message(message(1))
            await another.send_message(message(2))
            assert await ears.numbers() == [1, 2]


async def test_a_frozen_redis_answers_nobody(private_redis: Service, prefix: str) -> None:
    async with RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT) as broker:
        await asyncio.to_thread(private_redis.pause)
        async with promised():
            assert await send_all(broker, 1, 2, 3) == {OutcomeUnknown: 3}
        async with promised():
            assert await send_all(broker, 4, 5, 6) == {BrokerUnavailable: 3}
        await asyncio.to_thread(private_redis.unpause)

        assert await send_all(broker, 7, 8, 9) == {None: 3}


@pytest.mark.parametrize("flows", [(Flow.TO_SERVER,), (Flow.TO_CLIENT,), BOTH])
async def test_a_half_open_connection(
    proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears, flows: tuple[Flow, ...]
) -> None:
    """The network swallows everything: first on the connection there is, then on each new one, until it heals."""
    proxy.black_hole(*flows)
    async with promised():
        assert await send_all(proxied, *range(10)) == {OutcomeUnknown: 10}
    async with promised():
        assert await send_all(proxied, *range(10, 20)) == {BrokerUnavailable: 10}
    await proxy.heal()

    async with promised(0):
        assert await send_all(proxied, *range(20, 30)) == {None: 10}

    arrived = [] if Flow.TO_SERVER in flows else list(range(10))
    assert await ears.numbers() == arrived + list(range(20, 30))


async def test_refused_connections(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(0.05)
    async with promised(0):
        assert await send_all(proxied, *range(10)) == {BrokerUnavailable: 10}
    await proxy.heal()

    assert await send_all(proxied, *range(10)) == {None: 10}


@pytest.mark.parametrize("end", [FaultProxy.cut, FaultProxy.reset])
async def test_a_connection_ends_with_messages_in_flight(
    proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears, end: Callable[[FaultProxy], None]
) -> None:
    """Everybody hears at once that the outcome is unknown, and nothing is sent twice."""
    proxy.withhold(Flow.TO_CLIENT)
    sends = asyncio.create_task(send_all(proxied, *range(100)))
    await asyncio.sleep(0.1)
    assert await ears.numbers() == list(range(100))

    end(proxy)
    async with asyncio.timeout(TIMEOUT / 2):
        assert await sends == {OutcomeUnknown: 100}
    await proxy.heal()

    assert await send_all(proxied, 100) == {None: 1}
    assert await ears.numbers() == [100]


async def test_what_was_not_written_is_not_sent(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    """The connection is lost in the very turn of the event loop in which messages are sent."""
    proxy.withhold(Flow.TO_CLIENT)
    first = asyncio.create_task(send_all(proxied, 0))
    await asyncio.sleep(0.1)
    link = proxied._service._link
    assert link is not None

    link._connection._writer.transport.abort()
    others = await send_all(proxied, *range(1, 100))
    await proxy.heal()

    assert await first == {OutcomeUnknown: 1}
    assert others == {BrokerUnavailable: 99}
    assert await ears.numbers() == [0]


async def test_every_verdict_is_true(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    """Connections break at any moment: confirmed was heard once, not available never, unknown at most once."""
    moments = random.Random(7)  # the same trouble each time
    verdicts: dict[int, type | None] = {}

    async def work(worker: int) -> None:
        for n in range(worker * 1000, worker * 1000 + 60):
            ((verdicts[n],),) = [await send_all(proxied, n)]
            await asyncio.sleep(moments.random() / 100)

    async def trouble() -> None:
        while True:
            await asyncio.sleep(moments.random() / 20)
            moments.choice([proxy.cut, proxy.reset])()

    troublemaker = asyncio.create_task(trouble())
    await asyncio.gather(*map(work, range(20)))
    troublemaker.cancel()
    proxy.cut()
    await asyncio.sleep(0.1)

    times = Counter(await ears.numbers())
    assert Counter(verdicts.values()).keys() >= {None, OutcomeUnknown}
    assert verdicts.keys() == {worker * 1000 + n for worker in range(20) for n in range(60)}
    assert {times[n] for n, verdict in verdicts.items() if verdict is None} == {1}
    assert {times[n] for n, verdict in verdicts.items() if verdict is BrokerUnavailable} <= {0}
    assert {times[n] for n, verdict in verdicts.items() if verdict is OutcomeUnknown} <= {0, 1}


async def test_redis_closes_an_idle_connection(broker: RedisMessageBroker, ears: Ears, prefix: str) -> None:
    for n in range(3):
        (own,) = [each["id"] for each in await ears.client.client_list() if each["name"] == prefix]
        await ears.client.client_kill_filter(_id=own)
        await asyncio.sleep(0.05)

        await broker.send_message(message(n))

    assert await ears.numbers() == [0, 1, 2]


async def test_an_idle_connection_is_reset(proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears) -> None:
    for n in range(3):
        proxy.reset()
        await asyncio.sleep(0.05)

        await proxied.send_message(message(n))

    assert await ears.numbers() == [0, 1, 2]


async def test_a_script_keeps_redis_busy(private_redis: Service, prefix: str) -> None:
    """Redis refuses for the moment: that says nothing against the message."""
    async with Redis.from_url(private_redis.url, socket_timeout=None) as client:
        await client.config_set("busy-reply-threshold", 50)
        async with RedisMessageBroker.from_url(private_redis.url, prefix) as broker:
            script = asyncio.create_task(client.eval("while true do end", 0))
            await asyncio.sleep(0.3)

            verdicts = await send_all(broker, 1)

            await client.script_kill()
            assert isinstance((await asyncio.gather(script, return_exceptions=True))[0], Exception)
            assert verdicts == {BrokerUnavailable: 1}
            assert await send_all(broker, 2) == {None: 1}


async def test_redis_takes_no_more_clients(private_redis: Service, prefix: str) -> None:
    async with Redis.from_url(private_redis.url, single_connection_client=True) as client:
        await client.config_set("maxclients", 1)
        async with promised():
            with pytest.raises(BrokerUnavailable):
                await RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT).send_message(message())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_dead_connection_is_let_go_with_what_it_has_not_written(
    proxy: FaultProxy, proxied_url: str, prefix: str
) -> None:
    """A service that no longer reads does not keep a closed connection, and the bytes that wait for it, alive."""

    def established() -> int:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
        return sum(row[2].endswith(f":{proxy.port:04X}") and row[3] == "01" for row in rows)

    large = Message.create(message_name="user_joined", payload={"n": 0, "text": "x" * 24_000_000})
    broker = RedisMessageBroker.from_url(proxied_url, prefix, timeout=TIMEOUT, max_message_bytes=32_000_000)
    async with broker:
        proxy.withhold()
        with pytest.raises(OutcomeUnknown):
            await broker.send_message(large)
        await asyncio.sleep(0.1)
        assert established() == 0


# -- cancelling --------------------------------------------------------------------------------------------------


async def test_a_cancelled_send_affects_nobody_else(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    """It ends at once, and the answers that come later still reach those they belong to."""
    async with listening(proxied_url, prefix), RedisMessageBroker.from_url(proxied_url, prefix) as broker:

        def publish(n: int) -> asyncio.Task[int]:
            kind = "notification_event" if n % 2 else "unheard_event"
            return asyncio.create_task(broker.publish(message(n, message_type=kind)))

        proxy.withhold(Flow.TO_CLIENT)
        sends = [publish(n) for n in range(10)]
        await asyncio.sleep(0.1)
        sends[4].cancel()
        await asyncio.wait([sends[4]], timeout=0.1)
        assert sends[4].cancelled()
        await proxy.heal()

        assert await asyncio.gather(*sends[:4], *sends[5:]) == [0, 1, 0, 1, 1, 0, 1, 0, 1]
        assert await asyncio.gather(*map(publish, range(20))) == [0, 1] * 10


async def test_cancelling_whoever_connects(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """Callers that wait for the same connection do not depend on the one that makes it."""
    proxy.withhold(Flow.TO_CLIENT)
    broker = RedisMessageBroker.from_url(proxied_url, prefix, timeout=5)
    sends = [asyncio.create_task(broker.send_message(message(n))) for n in range(3)]
    await asyncio.sleep(0.1)
    sends[0].cancel()
    await proxy.heal()

    async with promised(0):
        await asyncio.gather(*sends[1:])

    assert await ears.numbers() == [1, 2]
    await broker.aclose()


async def test_a_cancelled_caller_leaves_its_room_to_the_next(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    """Cancelled in the moment in which it was given room, it does not take the room with it."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=1) as broker:

        async def send_and_cancel_second() -> None:
            await broker.send_message(message(1))
            second.cancel()

        proxy.withhold(Flow.TO_CLIENT)
        first = asyncio.create_task(send_and_cancel_second())
        await asyncio.sleep(0)
        second = asyncio.create_task(broker.send_message(message(2)))
        third = asyncio.create_task(broker.send_message(message(3)))
        await asyncio.sleep(0.1)
        await proxy.heal()

        async with promised(0):
            await asyncio.wait([first, second, third])
        assert (first.exception(), second.cancelled(), third.exception()) == (None, True, None)
        assert await ears.numbers() == [1, 3]


# -- closing -----------------------------------------------------------------------------------------------------


async def test_a_closed_broker_sends_nothing(redis_url: str, prefix: str, ears: Ears) -> None:
    broker = RedisMessageBroker.from_url(redis_url, prefix)
    async with broker:
        await broker.send_message(message(1))
    await broker.aclose()
    sent = message(2)

    with pytest.raises(BrokerClosed) as raised:
        await broker.send_message(sent)
    with pytest.raises(BrokerClosed):
        await broker.__aenter__()

    assert raised.value.message_id == sent.message_id
    assert await send_all(broker, *range(10)) == {BrokerClosed: 10}
    assert await ears.numbers() == [1]


async def test_a_broker_closed_before_its_use(redis_url: str, prefix: str) -> None:
    broker = RedisMessageBroker.from_url(redis_url, prefix)
    await broker.aclose()

    assert await send_all(broker, 1) == {BrokerClosed: 1}


@pytest.mark.parametrize("calls", [1, 2])
async def test_closing_waits_for_the_answers_that_are_due(
    proxy: FaultProxy, proxied: RedisMessageBroker, calls: int
) -> None:
    """Every call of `aclose` does, also the second of two at once."""
    proxy.withhold(Flow.TO_CLIENT)
    sends = asyncio.create_task(send_all(proxied, *range(10)))
    await asyncio.sleep(0.05)
    closing = [asyncio.create_task(proxied.aclose()) for _ in range(calls)]
    await asyncio.sleep(0.1)
    done = [task for task in (sends, *closing) if task.done()]
    await proxy.heal()
    await asyncio.gather(*closing)

    assert done == []
    assert await sends == {None: 10}


async def test_closing_refuses_those_who_wait_for_room(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    broker = RedisMessageBroker.from_url(proxied_url, prefix, max_in_flight=4)
    async with broker:
        proxy.withhold(Flow.TO_CLIENT)
        sends = asyncio.create_task(send_all(broker, *range(10)))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(broker.aclose())
        await asyncio.sleep(0.1)
        await proxy.heal()
        await closing

        assert await sends == {None: 4, BrokerClosed: 6}
        assert await ears.numbers() == [0, 1, 2, 3]


async def test_closing_while_redis_is_dead(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.black_hole()
    sends = asyncio.create_task(send_all(proxied, *range(10)))
    await asyncio.sleep(0.1)

    async with promised():
        await proxied.aclose()

    assert await sends == {OutcomeUnknown: 10}


async def test_closing_an_idle_broker_while_redis_is_dead(proxy: FaultProxy, proxied: RedisMessageBroker) -> None:
    proxy.black_hole()

    async with promised():
        await proxied.aclose()


async def test_closing_while_connecting(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """A connection that comes about after all is not kept, and whoever waited for it hears the truth."""
    proxy.withhold(Flow.TO_CLIENT)
    async with Redis.from_url(proxied_url, max_connections=2) as client:
        brokers = RedisMessageBroker.from_url(proxied_url, prefix), RedisMessageBroker(client, prefix)
        sends = [asyncio.create_task(send_all(broker, n)) for n, broker in enumerate(brokers)]
        await asyncio.sleep(0.1)
        closing = [asyncio.create_task(broker.aclose()) for broker in brokers]
        await asyncio.sleep(0.1)
        await proxy.heal()
        await asyncio.gather(*closing)

        verdicts = [verdict for send in sends for verdict in await send]
        assert await asyncio.gather(client.ping(), client.ping())

    await eventually(lambda: no_connections(ears.client, prefix))
    assert set(verdicts) <= {None, BrokerClosed, BrokerUnavailable}
    assert await ears.numbers() == [n for n, verdict in enumerate(verdicts) if verdict is None]


async def test_a_cancelled_closing_can_be_done_again(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    """Cancelled while it waited, it has not given back the connection; the second one does."""
    async with Redis.from_url(proxied_url, max_connections=2) as client, RedisMessageBroker(client, prefix) as broker:
        proxy.withhold(Flow.TO_CLIENT)
        send = asyncio.create_task(send_all(broker, 1))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(broker.aclose())
        await asyncio.sleep(0.05)
        closing.cancel()
        await asyncio.wait([closing])
        await proxy.heal()
        assert await send == {None: 1}

        await broker.aclose()

        assert await asyncio.gather(client.ping(), client.ping())


async def test_nothing_is_left_of_a_hundred_brokers(redis_url: str, prefix: str, ears: Ears) -> None:
    tasks = asyncio.all_tasks()
    for n in range(100):
        async with RedisMessageBroker.from_url(f"{redis_url}?client_name={prefix}", prefix) as broker:
            await broker.send_message(message(n))
        assert asyncio.all_tasks() == tasks

    await eventually(lambda: no_connections(ears.client, prefix))
    assert len(await ears.heard()) == 100


async def no_connections(client: Redis, name: str) -> bool:
    return await connections(client, name) == 0


# -- the user's own client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"protocol": 2}, id="RESP2"),
        pytest.param({"protocol": 3, "legacy_responses": False}, id="RESP3"),
        pytest.param({"decode_responses": True}, id="decoding"),
        pytest.param({"decode_responses": True, "protocol": 2}, id="decoding RESP2"),
        pytest.param({"socket_timeout": None, "socket_connect_timeout": None}, id="patient"),
        pytest.param({"health_check_interval": 1}, id="health checks"),
        pytest.param({"retry": Retry(ConstantBackoff(0.01), 3)}, id="retrying"),
        pytest.param({"single_connection_client": True}, id="single connection"),
    ],
)
async def test_any_client_will_do(redis_url: str, prefix: str, ears: Ears, options: dict[str, Any]) -> None:
    """The broker uses it beside the program and leaves it usable: before, meanwhile and after."""
    async with Redis.from_url(redis_url, client_name=prefix, **options) as client:
        assert await client.ping()
        async with RedisMessageBroker(client, prefix) as broker:
            assert await send_all(broker, *range(100)) == {None: 100}
            assert await broker.publish(message(100)) == 1
            assert await client.ping()
            assert await connections(ears.client, prefix) <= 2

        assert await client.ping()
        assert await client.echo("hello") in (b"hello", "hello")

    assert await ears.numbers() == list(range(101))


@pytest.mark.parametrize("pool_type", [ConnectionPool, BlockingConnectionPool])
async def test_a_small_pool(redis_url: str, prefix: str, ears: Ears, pool_type: type[ConnectionPool]) -> None:
    """One connection is held while the broker is in use, and given back by `aclose`."""
    async with Redis.from_pool(pool_type.from_url(redis_url, max_connections=2)) as client:
        async with RedisMessageBroker(client, prefix) as broker:
            assert await send_all(broker, *range(100)) == {None: 100}
            assert await client.ping()

        assert await asyncio.gather(client.ping(), client.ping())

    assert await ears.numbers() == list(range(100))


@pytest.mark.parametrize("pool_type", [ConnectionPool, BlockingConnectionPool])
async def test_a_pool_of_one_connection(
    redis_url: str, prefix: str, ears: Ears, pool_type: type[ConnectionPool]
) -> None:
    """The broker does not keep the only one to itself, and its callers do not take it from each other."""
    async with Redis.from_pool(pool_type.from_url(redis_url, max_connections=1)) as client:
        async with RedisMessageBroker(client, prefix) as broker:
            assert await send_all(broker, *range(100)) == {None: 100}
            assert await client.ping()

        assert await client.ping()

    assert sorted(await ears.numbers()) == list(range(100))


@pytest.mark.parametrize("pool_type", [ConnectionPool, BlockingConnectionPool])
async def test_a_pool_without_a_free_connection(redis_url: str, prefix: str, pool_type: type[ConnectionPool]) -> None:
    """Nothing can be sent until the program gives one back."""
    async with Redis.from_pool(pool_type.from_url(redis_url, max_connections=2)) as client:
        broker = RedisMessageBroker(client, prefix, timeout=TIMEOUT)
        async with client.pubsub() as one, client.pubsub() as other:
            await one.subscribe(prefix)
            await other.subscribe(prefix)
            async with promised():
                assert await send_all(broker, *range(10)) == {BrokerUnavailable: 10}

        assert await send_all(broker, 1) == {None: 1}
        await broker.aclose()


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_pooled_connection_that_redis_has_closed(
    redis_url: str, prefix: str, ears: Ears, protocol: int
) -> None:
    """With RESP3, redis-py hands it out as if it were alive (its issue 4252)."""
    async with Redis.from_url(redis_url, protocol=protocol, client_name=prefix) as client:
        own = await client.client_id()
        await ears.client.client_kill_filter(_id=str(own))
        await asyncio.sleep(0.05)

        async with RedisMessageBroker(client, prefix) as broker:
            assert await send_all(broker, 1) == {None: 1}

    assert await ears.numbers() == [1]


async def test_closing_leaves_the_programs_connections_alone(redis_url: str, prefix: str, ears: Ears) -> None:
    async with Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(prefix)
        await pubsub.get_message(timeout=5)

        async with RedisMessageBroker(client, prefix) as broker:
            await broker.send_message(message())

        assert await ears.client.publish(prefix, b"Are you there?") == 1


async def test_the_program_closes_its_client_too_early(redis_url: str, prefix: str, ears: Ears) -> None:
    """That costs the connection in use, and no more."""
    client = Redis.from_url(redis_url, client_name=prefix)
    async with RedisMessageBroker(client, prefix) as broker:
        await broker.send_message(message(1))
        await client.aclose()
        await asyncio.sleep(0.05)

        assert await send_all(broker, 2) == {None: 1}

    await eventually(lambda: no_connections(ears.client, prefix))
    assert await ears.numbers() == [1, 2]


async def test_a_client_that_retries_does_not_send_twice(
    proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears
) -> None:
    """The answer is withheld for longer than the client's patience, and the broker's."""
    retry = Retry(ConstantBackoff(0.01), 5)
    async with (
        Redis.from_url(proxied_url, socket_timeout=0.1, retry=retry) as client,
        RedisMessageBroker(client, prefix, timeout=TIMEOUT) as broker,
    ):
        proxy.withhold(Flow.TO_CLIENT)
        async with promised():
            assert await send_all(broker, 1) == {OutcomeUnknown: 1}
        await proxy.heal()

    assert await ears.numbers() == [1]


async def test_a_client_that_is_patient_for_ever(proxy: FaultProxy, proxied_url: str, prefix: str) -> None:
    """The broker's timeout holds, whatever the client's are."""
    retry = Retry(ConstantBackoff(0.01), 1_000_000)
    async with (
        Redis.from_url(proxied_url, socket_timeout=None, socket_connect_timeout=None, retry=retry) as client,
        RedisMessageBroker(client, prefix, timeout=TIMEOUT) as broker,
    ):
        proxy.black_hole()
        async with promised():
            assert await send_all(broker, *range(10)) == {OutcomeUnknown: 10}
        async with promised():
            assert await send_all(broker, *range(10)) == {BrokerUnavailable: 10}
        proxy.refuse()
        async with promised():
            assert await send_all(broker, *range(10)) == {BrokerUnavailable: 10}


async def test_a_fake_redis(prefix: str) -> None:
    """A fakeredis has no connection that can be shared: it is used by its own commands."""
    async with fakeredis.FakeAsyncRedis() as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(f"{prefix}:*")
        await pubsub.get_message(timeout=1)

        async with RedisMessageBroker(client, prefix) as broker:
            assert await broker.publish(message(0)) == 1
            await broker.send_messages([message(n) for n in range(1, 10)])
        assert await send_all(broker, 10) == {BrokerClosed: 1}

        heard = [await pubsub.get_message(timeout=1) for _ in range(10)]
        assert [json.loads(each["data"])["payload"]["n"] for each in heard] == list(range(10))


async def test_a_client_with_commands_of_its_own(proxy: FaultProxy, proxied_url: str, prefix: str, ears: Ears) -> None:
    """A subclass that does something to every command, tracing for example, is not gone around."""
    commands: list[object] = []

    class Traced(Redis):
        async def execute_command(self, *args: Any, **options: Any) -> Any:
            commands.append(args[0])
            return await super().execute_command(*args, **options)

    async with Traced.from_url(proxied_url) as client:
        async with RedisMessageBroker(client, prefix, timeout=TIMEOUT) as broker:
            assert await send_all(broker, *range(10)) == {None: 10}
            proxy.withhold(Flow.TO_CLIENT)
            async with promised():
                assert await send_all(broker, 10) == {OutcomeUnknown: 1}
            await proxy.heal()
            assert await send_all(broker, 11) == {None: 1}
        assert await send_all(broker, 12) == {BrokerClosed: 1}

    assert Counter(commands)[b"PUBLISH"] == 12
    assert sorted(await ears.numbers()) == list(range(12))


# -- who may -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def user(redis_url: str, prefix: str) -> AsyncIterator[str]:
    """A user who may publish below the prefix only; the name is the password."""
    async with Redis.from_url(redis_url) as client:
        name = f"user-{uuid4().hex}"
        await client.execute_command(
            "ACL", "SETUSER", name, "reset", "on", f">{name}", "+@all", "resetchannels", f"&{prefix}:*"
        )
        yield name
        await client.acl_deluser(name)


def as_user(url: str, user: str, password: str) -> str:
    address = urlsplit(url)
    host = address.netloc.rpartition("@")[2]
    return address._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


async def test_a_user_and_a_password(redis_url: str, prefix: str, ears: Ears, user: str) -> None:
    async with RedisMessageBroker.from_url(as_user(redis_url, user, user), prefix) as broker:
        await broker.send_message(message(1))
    provider = UsernamePasswordCredentialProvider(user, user)
    async with (
        Redis(host=urlsplit(redis_url).hostname, port=urlsplit(redis_url).port, credential_provider=provider) as client,
        RedisMessageBroker(client, prefix) as broker,
    ):
        await broker.send_message(message(2))

    assert await ears.numbers() == [1, 2]


async def test_a_wrong_password(redis_url: str, prefix: str, user: str) -> None:
    """The error says that it is about authentication, and does not say the password."""
    broker = RedisMessageBroker.from_url(as_user(redis_url, user, "s3cr3t"), prefix)

    with pytest.raises(BrokerUnavailable, match=r"(?i)authentication|wrongpass") as raised:
        await broker.send_message(message())

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value)) + repr(broker)
    await broker.aclose()


async def test_a_channel_that_the_user_may_not_publish_to(redis_url: str, prefix: str, ears: Ears, user: str) -> None:
    """A refusal, with Redis's reason. The connection is as good as before."""
    sent = message()
    url = as_user(redis_url, user, user)
    async with RedisMessageBroker.from_url(url, f"other-{prefix}") as broker:
        with pytest.raises(MessageRejected, match=r"(?i)permission") as raised:
            await broker.send_message(sent)
        assert await send_all(broker, *range(10)) == {MessageRejected: 10}

    assert raised.value.message_id == sent.message_id


# -- how a client is reached -------------------------------------------------------------------------------------


@pytest.fixture
async def certificate(private_redis: Service, tmp_path: Path) -> Path:
    """The certificate, valid for localhost, of a Redis that from now on speaks TLS and nothing else."""
    openssl = shutil.which("openssl") or pytest.skip("makes its certificate with openssl, which is missing")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate]
    await asyncio.to_thread(subprocess.run, [*request, *files], check=True, capture_output=True)
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in (key, certificate):
            file.chmod(0o644)
            tar.add(file, file.name)
    await asyncio.to_thread(private_redis._container.put_archive, "/tmp", packed.getvalue())
    async with Redis.from_url(private_redis.url) as client:
        settings = {"tls-cert-file": "/tmp/certificate.pem", "tls-key-file": "/tmp/key.pem", "tls-auth-clients": "no"}
        await client.execute_command(
            "CONFIG", "SET", "port", "0", "tls-port", "6379", *(word for pair in settings.items() for word in pair)
        )
    return certificate


async def test_tls(private_redis: Service, certificate: Path, prefix: str) -> None:
    """Encrypted with a certificate that is checked; one that nobody vouches for is refused."""
    url = private_redis.url.replace("redis://", "rediss://")
    trusted = RedisMessageBroker.from_url(f"{url}?ssl_ca_certs={certificate}", prefix, timeout=5)
    untrusted = RedisMessageBroker.from_url(url, prefix, timeout=5)

    async with trusted, listening(f"{url}?ssl_ca_certs={certificate}", prefix) as ears:
        assert await send_all(trusted, *range(100)) == {None: 100}
        assert await ears.numbers() == list(range(100))
    with pytest.raises(BrokerUnavailable, match=r"(?i)certificate"):
        await untrusted.send_message(message())
    with pytest.raises(BrokerUnavailable):
        await RedisMessageBroker.from_url(private_redis.url, prefix, timeout=TIMEOUT).send_message(message())


@dataclass(frozen=True)
class Watched:
    """Two Redis, of which a sentinel takes care: their ports."""

    master: int
    replica: int
    sentinel: int


@pytest.fixture
def watched(redis_url: str) -> Iterator[Watched]:
    """On the network of the host, since a sentinel tells clients the addresses that it uses itself."""
    if sys.platform != "linux":
        pytest.skip("needs the network of the host in a container")
    watched = Watched(*free_ports(3))
    options = "--save '' --bind 127.0.0.1 --repl-diskless-sync-delay 0 --daemonize yes"
    settings = (
        f"sentinel monitor main 127.0.0.1 {watched.master} 1\\n"
        "sentinel down-after-milliseconds main 300\\n"
        "sentinel failover-timeout main 2000\\n"
    )
    script = f"""
        redis-server --port {watched.master} {options}
        redis-server --port {watched.replica} {options} --replicaof 127.0.0.1 {watched.master}
        until redis-cli -p {watched.replica} info replication | grep -q master_link_status:up; do sleep 0.05; done
        printf '{settings}' > /tmp/sentinel.conf
        exec redis-server /tmp/sentinel.conf --sentinel --bind 127.0.0.1 --port {watched.sentinel}
    """
    container = DockerContainer(BACKENDS["redis"].image, network_mode="host").with_command(["sh", "-c", script])
    try:
        container.start()
    except APIError as error:
        pytest.skip(f"no container on the network of the host: {error.explanation}")
    yield watched
    container.stop()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def test_sentinel(watched: Watched, prefix: str) -> None:
    """When the master dies, messages go to the one that the sentinels have appointed, once they have."""
    sentinel = Sentinel([("127.0.0.1", watched.sentinel)], socket_timeout=1)

    async def knows_both() -> bool:
        with suppress(RedisError):
            return bool(await sentinel.discover_slaves("main"))
        return False

    await eventually(knows_both)
    async with sentinel.master_for("main") as client, RedisMessageBroker(client, prefix, timeout=1) as broker:
        async with listening(f"redis://127.0.0.1:{watched.master}", prefix) as ears:
            assert await send_all(broker, *range(10)) == {None: 10}
            assert await ears.numbers() == list(range(10))

        async with Redis.from_url(f"redis://127.0.0.1:{watched.master}") as master:
            await master.shutdown(nosave=True)
        await asyncio.sleep(0.05)
        verdicts = [await send_all(broker, 10)]
        while None not in verdicts[-1]:
            await asyncio.sleep(0.05)
            verdicts.append(await send_all(broker, 10))
        async with listening(f"redis://127.0.0.1:{watched.replica}", prefix) as ears:
            assert await broker.publish(message(11)) == 1
            assert await ears.numbers() == [11]

    assert set().union(*verdicts[:-1]) == {BrokerUnavailable}
    for each in sentinel.sentinels:
        await each.aclose()


# -- wiring ------------------------------------------------------------------------------------------------------


def test_a_synchronous_client() -> None:
    with pytest.raises(ConfigurationError, match="synchronous"):
        RedisMessageBroker(synchronous_redis.Redis())  # type: ignore[arg-type]  # the mistake


def test_no_client_at_all() -> None:
    with pytest.raises(ConfigurationError, match="from_url"):
        RedisMessageBroker("redis://localhost")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:s3cr3t@localhost",
        "localhost:6379",
        "redis://user:s3cr3t/part@localhost:6379/0",
        "redis://user:s3cr3t#part@localhost:6379/0",
        "redis://user:s3cr3t@localhost:port/0",
        "redis://user:s3cr3t@localhost/0?socket_timeout=soon",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    """It is refused at once, and what may be a password is not shown."""
    with pytest.raises(ConfigurationError) as raised:
        RedisMessageBroker.from_url(url)

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value))


async def test_a_password_is_never_shown(proxy: FaultProxy, prefix: str) -> None:
    url = f"redis://user:s3cr3t@{proxy.host}:{proxy.port}/0"
    proxy.refuse()
    broker = RedisMessageBroker.from_url(url, prefix, timeout=TIMEOUT)

    with pytest.raises(BrokerUnavailable) as raised:
        await broker.send_message(message())

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value)) + repr(broker)


# -- under a mediator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
async def test_a_request_is_done_even_if_redis_is_away(
    proxy: FaultProxy, proxied: RedisMessageBroker, ears: Ears, count: int
) -> None:
    """The error has the answer and the events; sent again, they are the same messages."""

    class UserJoined(NotificationEvent):
        pass

    class JoinMeeting(Request[str]):
        pass

    class JoinMeetingHandler(RequestHandler[JoinMeeting, str]):
        async def handle(self, request: JoinMeeting) -> str:
            self.events.extend(UserJoined() for _ in range(count))
            return "joined"

    request_map = RequestMap()
    request_map.bind(JoinMeeting, JoinMeetingHandler)
    mediator = Mediator(request_map, message_broker=proxied)
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(0.05)

    async with promised():
        with pytest.raises(EventsNotSent) as raised:
            await mediator.send(JoinMeeting())

    assert raised.value.response == "joined"
    assert [type(event) for event in raised.value.events] == [UserJoined] * count
    assert isinstance(raised.value.__cause__, BrokerUnavailable)
    assert await ears.heard() == []

    await proxy.heal()
    assert await mediator.send(JoinMeeting()) == "joined"
    assert len(await ears.heard()) == count
