"""diator's own transports keep their contract. `-k ACK` runs one part of it, `-k ACK-03` one scenario."""

import contextlib

import pytest

from diator.testing.conformance import TransportConformance
from tests.integration.harnesses import (
    MemoryHarness,
    PlainHarness,
    RabbitMQHarness,
    RedisHarness,
    RedisStreamHarness,
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session", autouse=True)
def addresses(request):
    """Tell the harnesses where the services are, as those of a third party are told."""
    with pytest.MonkeyPatch.context() as environment:
        for service in ("redis", "rabbitmq"):
            with contextlib.suppress(pytest.skip.Exception):
                environment.setenv(f"DIATOR_TEST_{service.upper()}_URL", request.getfixturevalue(f"{service}_url"))
        yield


class TestMemory(TransportConformance):
    harness = MemoryHarness


class TestPlainMemory(TransportConformance):
    harness = PlainHarness


class TestRedis(TransportConformance):
    harness = RedisHarness


class TestRedisStreams(TransportConformance):
    harness = RedisStreamHarness


class TestRabbitMQ(TransportConformance):
    harness = RabbitMQHarness
