"""The conformance suite against the transports of diator. `-k ACK` runs one part, `-k ACK-03` one scenario."""

import asyncio
import contextlib
import importlib
import json
from dataclasses import asdict
from typing import ClassVar

import pytest

from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.wrapping import Wrapped
from diator.testing import FaultyMessageBroker
from diator.testing.conformance import Deviation, EnvironmentMissing, TransportConformance
from tests.integration.harnesses import (
    KafkaHarness,
    KafkaInPlaceHarness,
    MemoryHarness,
    PlainHarness,
    RabbitMQHarness,
    RedisHarness,
    RedisStreamHarness,
)
from tests.integration.publish import REPORTS, TRANSPORTS
from tests.services import required

pytestmark = pytest.mark.timeout(600)


ADDRESSES = {
    "redis_url": "DIATOR_TEST_REDIS_URL",
    "rabbitmq_url": "DIATOR_TEST_RABBITMQ_URL",
    "kafka_servers": "DIATOR_TEST_KAFKA_SERVERS",
}


@pytest.fixture(scope="session", autouse=True)
def addresses(request):
    """Pass the addresses of the services to the harnesses in the environment."""
    with pytest.MonkeyPatch.context() as environment:
        for fixture, variable in ADDRESSES.items():
            with contextlib.suppress(pytest.skip.Exception):
                environment.setenv(variable, request.getfixturevalue(fixture))
        yield


class TestMemory(TransportConformance):
    harness = MemoryHarness


class TestPlainMemory(TransportConformance):
    harness = PlainHarness


class FaultyHarness(MemoryHarness):
    """`FaultyMessageBroker` without a script."""

    def transport(self):
        return FaultyMessageBroker()

    def full(self, room):
        return FaultyMessageBroker(capacity=room)

    def retaining(self, room):
        return FaultyMessageBroker(capacity=room)


class TestFaulty(TransportConformance):
    harness = FaultyHarness
    deviations: ClassVar = {
        **dict.fromkeys(
            ["ACK-11", "PSN-09", "PSN-16"], Deviation(reason="a retry is redelivered at once: a test does not wait")
        ),
        **dict.fromkeys(["LEK-06", "LEK-08"], Deviation(reason="it keeps every delivery for the test to inspect")),
    }


class WrappedHarness(MemoryHarness):
    """A broker that wraps another one, and changes nothing."""

    def transport(self):
        return Wrapped(MemoryMessageBroker())

    def full(self, room):
        return Wrapped(MemoryMessageBroker(capacity=room))

    def retaining(self, room):
        return Wrapped(MemoryMessageBroker(capacity=room))

    async def send_raw(self, transport, topic, body):
        await super().send_raw(transport._wrapped, topic, body)


class TestWrapped(TransportConformance):
    harness = WrappedHarness


class TestRedis(TransportConformance):
    harness = RedisHarness
    required = "redis" in required()


class TestRedisStreams(TransportConformance):
    harness = RedisStreamHarness
    required = "redis" in required()


class TestRabbitMQ(TransportConformance):
    harness = RabbitMQHarness
    required = "rabbitmq" in required()


class RabbitMQReportingHarness(RabbitMQHarness):
    facilities = RabbitMQHarness.facilities - {"retention"}

    def connecting_to(self, url, **options):
        return super().connecting_to(url, unroutable="raise", **options)


class TestRabbitMQReporting(TransportConformance):
    harness = RabbitMQReportingHarness
    required = "rabbitmq" in required()
    only = "UNR-"


class TestKafka(TransportConformance):
    harness = KafkaHarness
    required = "kafka" in required()


class TestKafkaInPlace(TransportConformance):
    harness = KafkaInPlaceHarness
    required = "kafka" in required()
    only = "ACK- ORD- PSN- GRP-"


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_published_capabilities_are_the_promised_ones(name):
    """If this fails, run `nox -s conformance` again."""
    module, _, attribute = TRANSPORTS[name][0].partition(":")
    harness = getattr(importlib.import_module(module), attribute)()
    try:
        harness.start()
    except EnvironmentMissing as missing:
        pytest.skip(str(missing))

    async def promised():
        async with contextlib.aclosing(harness.transport()) as broker:
            return asdict(broker.capabilities)

    try:
        found = asyncio.run(promised())
    finally:
        harness.stop()

    published = json.loads((REPORTS / f"{name}.json").read_text())["capabilities"]
    assert published == {key: sorted(each) if isinstance(each, frozenset) else each for key, each in found.items()}
