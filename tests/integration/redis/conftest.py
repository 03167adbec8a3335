"""Brokers, proxies and listeners for the tests of Redis Pub/Sub."""

from collections.abc import AsyncIterator
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from diator.brokers.redis import RedisMessageBroker
from diator.testing.fault_proxy import FaultProxy
from tests.integration.redis.helpers import TIMEOUT, Ears, listening


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
    """A broker with a connection through the proxy, and short delays before it reconnects."""
    async with RedisMessageBroker.from_url(proxied_url, prefix, timeout=TIMEOUT) as broker:
        yield broker


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
