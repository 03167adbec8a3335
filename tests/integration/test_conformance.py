"""diator's own transports keep their contract. `-k ACK` runs one part of it, `-k ACK-03` one scenario."""

import contextlib

import pytest

from diator.testing.conformance import TransportConformance
from tests.integration.harnesses import (
    KafkaHarness,
    KafkaInPlaceHarness,
    MemoryHarness,
    PlainHarness,
    RedisHarness,
    RedisStreamHarness,
)

pytestmark = pytest.mark.timeout(300)


ADDRESSES = {"redis_url": "DIATOR_TEST_REDIS_URL", "kafka_servers": "DIATOR_TEST_KAFKA_SERVERS"}


@pytest.fixture(scope="session", autouse=True)
def addresses(request):
    """Tell the harnesses where the services are, as those of a third party are told."""
    with pytest.MonkeyPatch.context() as environment:
        for fixture, variable in ADDRESSES.items():
            with contextlib.suppress(pytest.skip.Exception):
                environment.setenv(variable, request.getfixturevalue(fixture))
        yield


class TestMemory(TransportConformance):
    harness = MemoryHarness


class TestPlainMemory(TransportConformance):
    harness = PlainHarness


class TestRedis(TransportConformance):
    harness = RedisHarness


class TestRedisStreams(TransportConformance):
    harness = RedisStreamHarness


class TestKafka(TransportConformance):
    harness = KafkaHarness


class TestKafkaInPlace(TransportConformance):
    harness = KafkaInPlaceHarness
    only = "ACK ORD PSN GRP"
