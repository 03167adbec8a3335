"""Another server becomes the primary, while the connections to the old one stay open."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from docker.errors import APIError
from redis.asyncio import Redis
from redis.exceptions import RedisError
from testcontainers.core.container import DockerContainer

from diator.brokers.audit import audit
from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import BrokerUnavailable, OutcomeUnknown
from diator.testing.fault_proxy import FaultProxy
from tests.integration.redis.helpers import SLACK, TIMEOUT, eventually, listening, message, promised, send_all
from tests.integration.redis.test_access import free_ports
from tests.services import BACKENDS

JOINED = Topic("notification_event", "user_joined")


@dataclass
class Pair:
    """A primary and its replica, behind one address."""

    ports: list[int]
    container: DockerContainer
    proxy: FaultProxy

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}"

    def client(self, which: int) -> Redis:
        return Redis.from_url(f"redis://127.0.0.1:{self.ports[which]}")


async def fail_over(private_pair: Pair) -> None:
    """Swap the roles, and let new connections reach the new primary."""
    new = private_pair.ports[1]
    async with private_pair.client(0) as primary, private_pair.client(1) as replica:
        await replica.replicaof("NO", "ONE")
        await primary.replicaof("127.0.0.1", str(new))
    private_pair.proxy._service = "127.0.0.1", new


@pytest.fixture
def private_pair(redis_url: str) -> Iterator[tuple[list[int], DockerContainer]]:
    """On the network of the host, since a replica connects to the address of its primary."""
    if sys.platform != "linux":
        pytest.skip("needs the network of the host in a container")
    first, second = free_ports(2)
    options = "--save '' --bind 127.0.0.1 --repl-diskless-sync-delay 0"
    script = f"""
        redis-server --port {first} {options} --daemonize yes
        exec redis-server --port {second} {options} --replicaof 127.0.0.1 {first}
    """
    container = DockerContainer(BACKENDS["redis"].image, network_mode="host").with_command(["sh", "-c", script])
    try:
        container.start()
    except APIError as error:
        pytest.skip(f"no container on the network of the host: {error.explanation}")
    yield [first, second], container
    container.stop()


@pytest.fixture
async def pair(private_pair: tuple[list[int], DockerContainer]) -> AsyncIterator[Pair]:
    ports, container = private_pair
    async with FaultProxy("127.0.0.1", ports[0]) as proxy:
        pair = Pair(ports, container, proxy)
        async with pair.client(1) as replica:

            async def replicates() -> bool:
                with suppress(RedisError):  # it is starting
                    return bool((await replica.info("replication"))["master_link_status"] == "up")
                return False

            await eventually(replicates)
        yield pair


@asynccontextmanager
async def received(broker: Any, **options: Any) -> AsyncIterator[list[bytes]]:
    """Collect the bodies of all messages that *broker* receives."""
    bodies: list[bytes] = []

    async def collect(deliveries: AsyncIterator[Any]) -> None:
        async for delivery in deliveries:
            await delivery.ack()
            bodies.append(delivery.body)

    async with broker.subscribe([JOINED], **options) as deliveries:
        task = asyncio.create_task(collect(deliveries))
        yield bodies
        task.cancel()


async def test_streams_follow_the_primary(pair: Pair, prefix: str) -> None:
    """A few sends fail, each of them was not sent; then senders and consumers use the new primary."""
    async with (
        RedisStreamMessageBroker(pair.url, prefix, timeout=TIMEOUT) as broker,
        received(broker, group="billing") as bodies,
    ):
        assert await send_all(broker, 1) == {None: 1}
        await asyncio.sleep(1.1)  # the age from which on a connection is replaced

        await fail_over(pair)

        refused = 0
        async with asyncio.timeout(SLACK):
            while (result := await send_all(broker, 2)) != {None: 1}:
                assert result == {BrokerUnavailable: 1}
                refused += 1
                await asyncio.sleep(0.05)
            while len(bodies) < 2:  # noqa: ASYNC110  # nothing reports it
                await asyncio.sleep(0.01)
        assert 1 <= refused <= 5


async def test_a_publish_on_a_former_primary_is_noticed(pair: Pair, prefix: str) -> None:
    """A replica accepts it, and subscribers of the new primary do not receive it."""
    async with RedisMessageBroker(pair.url, prefix, timeout=TIMEOUT) as broker:
        assert await send_all(broker, 1) == {None: 1}
        await asyncio.sleep(1.1)
        await fail_over(pair)
        async with listening(f"redis://127.0.0.1:{pair.ports[1]}", prefix) as ears:
            confirmed, unknown = [], 0
            for n in range(2, 52):
                result = await send_all(broker, n)
                assert set(result) <= {None, OutcomeUnknown}
                unknown += result[OutcomeUnknown]
                confirmed += [n] if result[None] else []
                await asyncio.sleep(0.02)
            heard = await ears.numbers()

    assert 1 <= unknown <= 20
    assert len([n for n in confirmed if n not in heard]) <= 20  # until the broker has asked for the role
    assert heard[-20:] == [*range(32, 52)]


async def test_a_lasting_refusal_opens_few_connections(pair: Pair, prefix: str) -> None:
    """The broker looks for the new primary once a second, not with each message."""
    async with RedisStreamMessageBroker(pair.url, prefix, timeout=TIMEOUT) as broker, pair.client(0) as server:
        await server.replicaof("127.0.0.1", "1")
        before = (await server.info("stats"))["total_connections_received"]
        for _ in range(25):
            assert await send_all(broker, *range(20)) == {BrokerUnavailable: 20}
            await asyncio.sleep(0.1)

        assert 1 <= (await server.info("stats"))["total_connections_received"] - before <= 4


async def test_a_loading_server_refuses_every_command(pair: Pair, prefix: str) -> None:
    """No send of a burst is unknown: Redis answers each of them."""
    async with pair.client(0) as server:
        await server.mset({f"key-{n}": "x" for n in range(5_000)})

        async def is_saved() -> bool:
            with suppress(RedisError):  # it is still saving what the replica received
                return bool(await server.save())
            return False

        await eventually(is_saved)
    (port,) = free_ports(1)
    slowly = "--key-load-delay 1000 --loading-process-events-interval-bytes 1024"  # 1 ms for each key
    command = f"redis-server --port {port} --bind 127.0.0.1 {slowly} --daemonize yes"
    await asyncio.to_thread(pair.container.exec, command)

    async with Redis(port=port) as server:

        async def is_loading() -> bool:
            with suppress(RedisError):
                return bool((await server.info("persistence"))["loading"])
            return False

        await eventually(is_loading)
        broker = RedisStreamMessageBroker(f"redis://127.0.0.1:{port}", prefix, timeout=TIMEOUT)
        async with broker:
            assert await send_all(broker, *range(50)) == {BrokerUnavailable: 50}
        await server.shutdown(nosave=True)


# -- replicas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["", "?max_connections=1"])
async def test_a_confirmed_message_is_on_the_replica(pair: Pair, prefix: str, pool: str) -> None:
    """Whenever a send returns, and whether commands share a connection or not."""
    stream = f"{prefix}:notification_event:user_joined"
    async with (
        RedisStreamMessageBroker(pair.url + pool, prefix, timeout=5, replicas=1) as broker,
        pair.client(1) as replica,
    ):
        for n in range(20):
            assert await send_all(broker, n) == {None: 1}
            assert await replica.xlen(stream) == n + 1
        assert await send_all(broker, *range(200)) == {None: 200}
        assert await replica.xlen(stream) == 220


async def test_a_burst_waits_once(pair: Pair, prefix: str) -> None:
    """One WAIT covers the messages of a burst; without replicas there is none."""
    async with pair.client(0) as server:
        for replicas, most in [(1, 3), (0, 0)]:
            await server.config_resetstat()
            async with RedisStreamMessageBroker(pair.url, prefix, replicas=replicas) as broker:
                assert await send_all(broker, *range(200)) == {None: 200}
            calls = (await server.info("commandstats")).get("cmdstat_wait", {"calls": 0})["calls"]
            assert bool(replicas) <= calls <= most


async def test_a_message_that_too_few_replicas_have_is_unknown(pair: Pair, prefix: str) -> None:
    """Each send ends in time, with the number of replicas that have the message."""
    stream = f"{prefix}:notification_event:user_joined"
    async with (
        RedisStreamMessageBroker(pair.url, prefix, timeout=TIMEOUT, replicas=2) as broker,
        pair.client(0) as server,
    ):
        async with promised():
            assert await send_all(broker, *range(10)) == {OutcomeUnknown: 10}
        with pytest.raises(OutcomeUnknown, match="only 1 of 2 replicas"):
            await broker.send_message(message())
        assert await server.xlen(stream) == 11

        [few] = [each for each in await audit(broker) if each.capability == "receipt"]
        assert "waits for 2 replicas and 1 is connected" in few.problem


async def test_sends_do_not_wait_for_replicas_one_after_the_other(pair: Pair, prefix: str) -> None:
    """A missing replica holds up each send for less than the timeout, whoever else waits. No connection is lost."""
    async with (
        RedisStreamMessageBroker(pair.url, prefix, timeout=2, replicas=2) as broker,
        pair.client(0) as server,
        asyncio.TaskGroup() as tasks,
    ):
        sends = []
        before = (await server.info("stats"))["total_connections_received"]
        for n in range(30):
            sends.append(tasks.create_task(send_all(broker, n)))
            await asyncio.sleep(0.02)
        with pytest.raises(OutcomeUnknown, match="only 1 of 2 replicas"):
            await broker.send_message(message())
        for send in sends:
            assert await send == {OutcomeUnknown: 1}
        assert (await server.info("stats"))["total_connections_received"] == before


async def test_a_primary_that_is_demoted_while_it_waits(pair: Pair, prefix: str) -> None:
    """Redis has the message, so the send is not refused: it is unknown."""
    async with RedisStreamMessageBroker(pair.url, prefix, timeout=20, replicas=2) as broker, pair.client(0) as server:
        sends = asyncio.create_task(send_all(broker, *range(10)))
        await eventually(lambda: server.exists(f"{prefix}:notification_event:user_joined"))
        await fail_over(pair)
        async with promised(0):
            assert await sends == {OutcomeUnknown: 10}


async def test_the_audit_says_what_a_failover_costs(pair: Pair, prefix: str) -> None:
    """`min-replicas-to-write` does not help: a replica counts although it does not have the message."""
    async with pair.client(0) as server:
        for replicas, minimum, found in [
            (0, "0", "no replica must have a message"),
            (0, "1", r"min-replicas-max-lag \(10 s\)"),
            (1, "0", None),
        ]:
            await server.config_set("min-replicas-to-write", minimum)
            async with RedisStreamMessageBroker(pair.url, prefix, replicas=replicas) as broker:
                problems = [each.problem for each in await audit(broker) if "failover" in each.problem]
            assert len(problems) == (found is not None)
            assert found is None or re.search(found, problems[0])
