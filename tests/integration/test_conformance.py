"""diator's own transports keep their contract. `-k ACK` runs one part of it, `-k ACK-03` one scenario."""

import contextlib

import pytest

from diator.testing.conformance import TransportConformance
from tests.integration.harnesses import MemoryHarness, PlainHarness, RedisHarness, RedisStreamHarness

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session", autouse=True)
def redis_address(request):
    """Tell the harnesses where Redis is, as those of a third party are told."""
    with pytest.MonkeyPatch.context() as environment:
        with contextlib.suppress(pytest.skip.Exception):
            environment.setenv("DIATOR_TEST_REDIS_URL", request.getfixturevalue("redis_url"))
        yield


class TestMemory(TransportConformance):
    harness = MemoryHarness


class TestPlainMemory(TransportConformance):
    harness = PlainHarness


class TestRedis(TransportConformance):
    harness = RedisHarness


class TestRedisStreams(TransportConformance):
    harness = RedisStreamHarness
