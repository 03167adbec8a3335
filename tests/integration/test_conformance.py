"""diator's own transports keep their contract. `-k ACK` runs one part of it, `-k ACK-03` one scenario."""

import contextlib
from typing import ClassVar

import pytest

from diator.testing import FaultyMessageBroker
from diator.testing.conformance import Deviation, TransportConformance
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


class FaultyHarness(MemoryHarness):
    """The broker of the fault kit, with nothing scripted."""

    def transport(self):
        return FaultyMessageBroker()

    def full(self, room):
        return FaultyMessageBroker(capacity=room)


class TestFaulty(TransportConformance):
    harness = FaultyHarness
    deviations: ClassVar = {
        **dict.fromkeys(["ACK-11", "PSN-09"], Deviation(reason="a retry comes at once: a test does not wait")),
        **dict.fromkeys(["LEK-06", "LEK-08"], Deviation(reason="it keeps what was delivered, for the test to ask")),
    }


class TestRedis(TransportConformance):
    harness = RedisHarness


class TestRedisStreams(TransportConformance):
    harness = RedisStreamHarness
