"""Brokers, topics and plain clients for the tests of Kafka."""

from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from diator.brokers.kafka import KafkaMessageBroker
from diator.brokers.supervisor import ReconnectPolicy
from diator.testing.fault_proxy import FaultProxy
from tests.integration.kafka.helpers import TIMEOUT


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4().hex[:12]}"


@pytest.fixture
def name(prefix) -> str:
    """The name of the topic in Kafka."""
    return f"{prefix}.notification_event.Counted"


@pytest.fixture
async def make(prefix):
    """Make brokers that reconnect quickly, and close them."""
    async with AsyncExitStack() as stack:

        async def make(servers, **options) -> KafkaMessageBroker:
            reconnect = ReconnectPolicy(connect_timeout=6.0, idle_timeout=1.0, probe_timeout=1.0, max_delay=0.2)
            options = {
                "timeout": TIMEOUT,
                "session_timeout": 6.0,
                "heartbeat_interval": 0.1,
                "reconnect": reconnect,
                **options,
            }
            return await stack.enter_async_context(KafkaMessageBroker(servers, prefix, **options))

        yield make


@pytest.fixture
async def broker(make, kafka_servers) -> KafkaMessageBroker:
    return await make(kafka_servers)


@pytest.fixture
async def admin(kafka_servers):
    """Plain aiokafka."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_servers)
    await admin.start()
    yield admin
    await admin.close()


@pytest.fixture
async def proxy(private_kafka):
    proxy = FaultProxy("127.0.0.1", private_kafka.behind)
    proxy.port = private_kafka.proxied
    async with proxy:
        yield proxy


@pytest.fixture
def proxied(proxy) -> str:
    return f"{proxy.host}:{proxy.port}"
