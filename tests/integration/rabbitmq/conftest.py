"""Brokers, proxies and plain clients for the tests of RabbitMQ."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from urllib.parse import urlsplit
from uuid import uuid4

import aio_pika
import pytest

from diator.brokers.rabbitmq import RabbitMQMessageBroker, _retained, _subscription
from diator.brokers.rabbitmq._client import Address, commands
from diator.testing.fault_proxy import FaultProxy
from tests.integration.rabbitmq.helpers import COUNTED, OTHER, RECONNECT, Raw


@pytest.fixture(autouse=True)
def nobody_kills_it(monkeypatch):
    """Use new queues at once: they need not survive a kill of RabbitMQ."""
    for module in (_subscription, _retained):
        monkeypatch.setattr(module, "SAFE_AFTER", 0.0)


@pytest.fixture
async def plain(rabbitmq_url) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """Plain aio-pika."""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        yield await connection.channel()


@pytest.fixture
async def prefix(rabbitmq_url) -> AsyncIterator[str]:
    prefix = f"test-{uuid4().hex[:12]}"
    yield prefix
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        for topic in (COUNTED, OTHER):
            for queue in ("readers", "readers:dead", "others", "others:dead", "#2Fretained", "#2Fretained:dead"):
                await channel.queue_delete(f"{prefix}:{':'.join(topic)}:{queue}")
            for queue in ("/:dead", "/retained"):
                await channel.queue_delete(f"{prefix}:{':'.join(topic)}:{queue}")
        for exchange in (prefix, f"{prefix}:retained"):
            await channel.exchange_delete(exchange)


@pytest.fixture
async def raw(rabbitmq_url) -> AsyncIterator[Raw]:
    """A channel with confirms that writes and reads raw properties."""
    channel = Raw()
    await channel.open(*await Address(rabbitmq_url, None).dial("testing"))
    await channel.ask(commands.Confirm.Select())
    yield channel
    await channel.close()


@pytest.fixture
def queue(prefix) -> str:
    return f"{prefix}:notification_event:Counted:readers"


@pytest.fixture
async def brokers(prefix) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def broker(rabbitmq_url, prefix, brokers) -> RabbitMQMessageBroker:
    return await brokers.enter_async_context(RabbitMQMessageBroker(rabbitmq_url, prefix, reconnect=RECONNECT))


@pytest.fixture
async def reporting(rabbitmq_url, prefix, brokers) -> RabbitMQMessageBroker:
    broker = RabbitMQMessageBroker(rabbitmq_url, prefix, unroutable="raise", reconnect=RECONNECT)
    return await brokers.enter_async_context(broker)


@pytest.fixture
async def proxy(rabbitmq_url) -> AsyncIterator[FaultProxy]:
    parts = urlsplit(rabbitmq_url)
    async with FaultProxy(parts.hostname, parts.port) as proxy:
        yield proxy


@pytest.fixture
async def behind_proxy(rabbitmq_url, proxy, prefix, brokers) -> RabbitMQMessageBroker:
    url = rabbitmq_url.replace(urlsplit(rabbitmq_url).netloc.rpartition("@")[2], f"{proxy.host}:{proxy.port}")
    return await brokers.enter_async_context(RabbitMQMessageBroker(url, prefix, timeout=3.0, reconnect=RECONNECT))
