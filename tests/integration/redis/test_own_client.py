"""A broker on the program's own client, whatever its options."""

import asyncio
import json
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis as synchronous_redis
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    OutcomeUnknown,
)
from diator.testing.fault_proxy import FaultProxy, Flow
from tests.integration.redis.helpers import (
    TIMEOUT,
    Ears,
    connections,
    eventually,
    message,
    no_connections,
    promised,
    send_all,
)
from tests.records import fields


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
    """The program can use its client before, while and after the broker uses it."""
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
    """The broker holds one connection while it is in use, and `aclose` releases it."""
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
    """The broker returns the pool's only connection, and its callers share it."""
    async with Redis.from_pool(pool_type.from_url(redis_url, max_connections=1)) as client:
        async with RedisMessageBroker(client, prefix) as broker:
            assert await send_all(broker, *range(100)) == {None: 100}
            assert await client.ping()

        assert await client.ping()

    assert sorted(await ears.numbers()) == list(range(100))


@pytest.mark.parametrize("pool_type", [ConnectionPool, BlockingConnectionPool])
async def test_a_pool_without_a_free_connection(redis_url: str, prefix: str, pool_type: type[ConnectionPool]) -> None:
    """Nothing can be sent until the program releases a connection."""
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
    """With RESP3, redis-py hands out the closed connection (its issue 4252)."""
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
    """Only the connection in use is lost."""
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
    """The answer is withheld for longer than the timeouts of the client and the broker."""
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
    """The broker does not bypass a subclass that changes every command, for example for tracing."""
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


# -- the slow path is logged -------------------------------------------------------------------------------------


def slower(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What the log says about commands that do not share a connection: levels and reasons."""
    texts = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("diator")]
    return [(level, text.partition("slower: ")[2]) for level, text in texts if "slower: " in text]


async def test_a_pool_of_one_connection_is_announced_once(
    redis_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diator")
    async with Redis.from_url(redis_url, max_connections=1) as client, RedisMessageBroker(client, prefix) as broker:
        assert await send_all(broker, *range(10)) == {None: 10}

    assert slower(caplog) == [("INFO", "the client's pool has only one connection")]
    [record] = [each for each in caplog.records if "slower" in each.getMessage()]
    reason = "the client's pool has only one connection"
    assert fields(record) == {"broker": None, "where": broker.where, "reason": reason}  # its broker is not made yet


async def test_a_client_that_sends_in_its_own_way_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    class Traced(Redis):
        async def execute_command(self, *args: Any, **options: Any) -> Any:
            return await super().execute_command(*args, **options)

    caplog.set_level("INFO", logger="diator")
    async with Traced() as client:
        RedisMessageBroker(client)

    assert slower(caplog) == [("INFO", "Traced has an execute_command of its own")]


async def test_a_fake_client_needs_only_the_methods_that_are_called() -> None:
    class Fake:
        """A client and its pool, which has no limit, and its only connection, which has no writer."""

        def __init__(self) -> None:
            self.connection_pool = self
            self.sent: list[Any] = []
            self.released: list[object] = []

        async def execute_command(self, *command: Any) -> int:
            self.sent.append(command[0])
            return 1

        async def get_connection(self) -> Any:
            return self

        async def send_command(self, *command: Any, **_: Any) -> None:
            self.replies = asyncio.Queue[Any]()
            self.replies.put_nowait([b"subscribe", command[1], 1])

        async def read_response(self, **_: Any) -> Any:
            return await self.replies.get()

        async def disconnect(self, **_: Any) -> None: ...

        async def release(self, connection: object) -> None:
            self.released.append(connection)

    fake: Any = Fake()
    broker = RedisMessageBroker(fake)
    async with broker.subscribe([Topic("notification_event", "Counted")]):
        await broker.send_message(message(1))
    await broker.aclose()

    assert (fake.sent, fake.released) == (["PUBLISH"], [fake])


async def test_a_fake_client_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="diator")
    async with fakeredis.FakeAsyncRedis() as client, RedisMessageBroker(client) as broker:
        await broker.send_messages([message(n) for n in range(10)])

    ((level, reason),) = slower(caplog)
    assert (level, "FakeAsyncRedisConnection" in reason) == ("INFO", True)


async def test_a_connection_that_sends_in_its_own_way_is_announced_once(
    redis_url: str, prefix: str, ears: Ears, caplog: pytest.LogCaptureFixture
) -> None:
    class Noticing(Connection):
        async def send_packed_command(self, *args: Any, **options: Any) -> None:
            return await super().send_packed_command(*args, **options)

    caplog.set_level("INFO", logger="diator")
    pool = ConnectionPool.from_url(redis_url, connection_class=Noticing)
    async with Redis.from_pool(pool) as client, RedisMessageBroker(client, prefix) as broker:
        assert await send_all(broker, *range(10)) == {None: 10}

    assert sorted(await ears.numbers()) == list(range(10))
    ((level, reason),) = slower(caplog)
    assert (level, "Noticing, send commands in a way of their own" in reason) == ("INFO", True)


async def test_an_ordinary_client_announces_nothing(
    redis_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diator")
    async with RedisMessageBroker(redis_url, prefix) as broker:
        assert await send_all(broker, *range(10)) == {None: 10}

    assert slower(caplog) == []


# -- constructor arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker_type", [RedisMessageBroker, RedisStreamMessageBroker])
@pytest.mark.parametrize("make", [lambda kind: kind, lambda kind: kind.from_url], ids=["constructor", "from_url"])
async def test_a_client_made_from_an_address_is_closed_with_the_broker(
    redis_url: str, prefix: str, ears: Ears, broker_type: Any, make: Callable[[Any], Any]
) -> None:
    # Commands borrow the only connection of a pool, and return it open: just the end of the client closes it.
    broker = make(broker_type)(f"{redis_url}?client_name={prefix}&max_connections=1", prefix)
    assert type(broker) is broker_type
    async with broker:
        await broker.send_message(message(1))
        assert await connections(ears.client, prefix) == 1

    await eventually(lambda: no_connections(ears.client, prefix))


async def test_a_subclass_keeps_its_type_and_its_options(redis_url: str) -> None:
    class Named(RedisMessageBroker):
        def __init__(self, client: Redis | str, *, name: str) -> None:
            super().__init__(client)
            self.name = name

    broker: Any = Named.from_url(redis_url, name="mine")  # type: ignore[call-arg]  # read from the base's __init__

    assert (type(broker), broker.name) == (Named, "mine")
    await broker.aclose()


def test_a_synchronous_client() -> None:
    with pytest.raises(ConfigurationError, match="synchronous"):
        RedisMessageBroker(synchronous_redis.Redis())  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("broker_type", [RedisMessageBroker, RedisStreamMessageBroker])
@pytest.mark.parametrize("wrong", [None, 6379, b"redis://u:s3cr3t@localhost", Redis, {"password": "s3cr3t"}], ids=repr)
def test_neither_a_client_nor_an_address(broker_type: Any, wrong: object) -> None:
    """The error has both forms, and does not show what may be a password."""
    with pytest.raises(ConfigurationError, match=r"redis\.asyncio\.Redis.* redis://") as raised:
        broker_type(wrong)

    assert "s3cr3t" not in str(raised.value)
    assert raised.value.__cause__ is None


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
        RedisMessageBroker(url)

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value))


async def test_a_password_is_never_shown(proxy: FaultProxy, prefix: str) -> None:
    url = f"redis://user:s3cr3t@{proxy.host}:{proxy.port}/0"
    proxy.refuse()
    broker = RedisMessageBroker.from_url(url, prefix, timeout=TIMEOUT)

    with pytest.raises(BrokerUnavailable) as raised:
        await broker.send_message(message())

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value)) + repr(broker)
