"""Users, passwords, TLS and Sentinel."""

import asyncio
import shutil
import socket
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from docker.errors import APIError
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import RedisError
from testcontainers.core.container import DockerContainer

from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    MessageRejected,
)
from tests.integration.redis.helpers import TIMEOUT, Ears, eventually, listening, message, send_all
from tests.services import BACKENDS, Service


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
    """The error names authentication, and does not contain the password."""
    broker = RedisMessageBroker.from_url(as_user(redis_url, user, "s3cr3t"), prefix)

    with pytest.raises(AccessRefused, match=r"does not let this user in \(AuthenticationError") as raised:
        await broker.send_message(message())

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value)) + repr(broker)
    await broker.aclose()


async def test_a_channel_that_the_user_may_not_publish_to(redis_url: str, prefix: str, ears: Ears, user: str) -> None:
    """The message is refused with Redis's reason. The connection stays usable."""
    sent = message()
    url = as_user(redis_url, user, user)
    async with RedisMessageBroker.from_url(url, f"other-{prefix}") as broker:
        with pytest.raises(MessageRejected, match=r"(?i)permission") as raised:
            await broker.send_message(sent)
        assert await send_all(broker, *range(10)) == {MessageRejected: 10}

    assert raised.value.message_id == sent.message_id


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
    """The certificate is verified; one without a trusted authority is refused."""
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
    """The ports of two Redis servers and of the sentinel that watches them."""

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
    """After the master's death messages go to the master that the sentinels appoint."""
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
        results = [await send_all(broker, 10)]
        while None not in results[-1]:
            await asyncio.sleep(0.05)
            results.append(await send_all(broker, 10))
        async with listening(f"redis://127.0.0.1:{watched.replica}", prefix) as ears:
            assert await broker.publish(message(11)) == 1
            assert await ears.numbers() == [11]

    assert set().union(*results[:-1]) == {BrokerUnavailable}
    for each in sentinel.sentinels:
        await each.aclose()


@pytest.fixture
def cluster(redis_url: str) -> Iterator[int]:
    """A cluster of one node: its port. On the network of the host, since a cluster tells clients its own addresses."""
    if sys.platform != "linux":
        pytest.skip("needs the network of the host in a container")
    (port,) = free_ports(1)
    script = f"""
        redis-server --port {port} --cluster-enabled yes --save '' --bind 127.0.0.1 --daemonize yes
        until redis-cli -p {port} cluster addslotsrange 0 16383; do sleep 0.05; done
        exec tail -f /dev/null
    """
    container = DockerContainer(BACKENDS["redis"].image, network_mode="host").with_command(["sh", "-c", script])
    try:
        container.start()
    except APIError as error:
        pytest.skip(f"no container on the network of the host: {error.explanation}")
    yield port
    container.stop()


@pytest.mark.parametrize("broker_type", [RedisMessageBroker, RedisStreamMessageBroker])
async def test_a_cluster_sends_and_does_not_subscribe(cluster: int, prefix: str, broker_type: Any) -> None:
    """A cluster client has no connection for a subscription, and the error says so."""
    topic = Topic("notification_event", "user_joined")

    async def is_ready() -> bool:
        with suppress(RedisError):
            async with Redis(port=cluster) as node:
                return (await node.cluster("info"))["cluster_state"] == "ok"
        return False

    await eventually(is_ready)
    async with RedisCluster(host="127.0.0.1", port=cluster) as client, broker_type(client, prefix) as broker:
        await broker.send_messages([message(n) for n in range(10)])
        with pytest.raises(ConfigurationError, match="a RedisCluster has no connection pool"):
            await broker.subscribe([topic], group=None if broker_type is RedisMessageBroker else "g").__aenter__()
        if broker_type is RedisStreamMessageBroker:
            assert await client.xlen(f"{prefix}:notification_event:user_joined") == 10
            with pytest.raises(ConfigurationError, match="durability='none' with a cluster"):
                await RedisStreamMessageBroker(client, prefix, durability="crash").send_message(message(10))
            with pytest.raises(ConfigurationError, match="maxmemory-policy of each server"):
                await broker.audit()
