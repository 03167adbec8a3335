"""Brokers, proxies and plain clients for the tests of Redis Streams."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from diator.brokers.redis import _subscription
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.fault_proxy import FaultProxy
from tests.integration.redis_streams.helpers import LEASE, LONG, TIMEOUT


@pytest.fixture
def quick(monkeypatch) -> None:
    """Look often for expired leases and for due messages."""
    monkeypatch.setattr(_subscription, "SCAN_EVERY", 0.1)


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
    """Make brokers that reconnect quickly, and close them."""
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
