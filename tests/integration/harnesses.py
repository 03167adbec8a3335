"""How the conformance suite gets diator's own transports."""

import os
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from diator.brokers.base import Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker, _Entry
from diator.brokers.supervisor import Patience
from diator.exceptions import UnsupportedCapability
from diator.testing.conformance import DeadLettered, EnvironmentMissing, Harness, Limits
from diator.testing.fault_proxy import FaultProxy
from tests.services import MissingService, Services


class MemoryHarness(Harness):
    """The broker inside the process. Each broker is a service of its own."""

    name = "memory"
    facilities = frozenset({"raw", "dead_letters", "full"})
    limits = Limits(settle=0.05, redelivery=1.0)

    def transport(self):
        return MemoryMessageBroker()

    def full(self, room):
        return MemoryMessageBroker(capacity=room)

    async def send_raw(self, transport: MemoryMessageBroker, topic: Topic, body: bytes) -> None:
        for queue in transport._queues:
            if topic in queue.topics:
                queue.put(_Entry(topic, body))

    async def dead_letters(self, transport: MemoryMessageBroker, topic: Topic, group: str | None):
        return [
            DeadLettered(body=letter.body, reason=letter.reason)
            for letter in transport.dead_letters
            if letter.topic == topic
        ]


class PlainHarness(Harness):
    """The broker inside the process, with everything taken from it that can be missing: at most once, to everybody."""

    name = "memory, at most once"
    limits = MemoryHarness.limits

    def transport(self):
        return PlainMessageBroker()


class PlainMessageBroker(MemoryMessageBroker):
    """Promises little, and refuses the rest. Each capability has a transport that has it and one that has not."""

    @property
    def capabilities(self):
        return Capabilities(
            receipt="accepted",
            ordering="destination",
            distribution=frozenset({"broadcast"}),
            backpressure="pull",
            max_message_bytes=super().capabilities.max_message_bytes,
        )

    async def send_message(self, message, /):
        await super().send_message(message)
        self._kept.take_all([Topic(message.message_type, message.message_name)])

    @asynccontextmanager
    async def subscribe(self, topics, /, *, group=None, prefetch=64, on_gap=None):
        if group is not None:
            raise UnsupportedCapability("PlainMessageBroker", ["groups"], why="a group", remedy="leave it out")
        async with super().subscribe(topics, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield _PlainDeliveries(deliveries)


class _PlainDeliveries:
    # No generator: a cancelled wait would end it.

    def __init__(self, deliveries):
        self._deliveries = deliveries

    def __aiter__(self):
        return self

    async def __anext__(self):
        delivery = await anext(self._deliveries)
        delivery.settler = _Plain(delivery.settler)
        return delivery


class _Plain:
    def __init__(self, settler):
        self._settler = settler

    async def ack(self, delivery, /):
        await self._settler.ack(delivery)

    async def retry(self, delivery, after, /):
        raise UnsupportedCapability("PlainMessageBroker", ["retry"], why="retry", remedy="do not")

    async def dead_letter(self, delivery, reason, /):
        raise UnsupportedCapability("PlainMessageBroker", ["dead_letter"], why="dead_letter", remedy="do not")


# -- Redis -------------------------------------------------------------------------------------------------------


class RedisHarness(Harness):
    """Redis Pub/Sub, at `DIATOR_TEST_REDIS_URL`."""

    name = "redis"
    facilities = frozenset({"proxy", "raw"})
    limits = Limits(scale=2.0, redelivery=3.0, timeout=2.0, liveness=6.0, recovery=5.0)

    def start(self):
        url = os.environ.get("DIATOR_TEST_REDIS_URL")
        if not url:
            raise EnvironmentMissing("DIATOR_TEST_REDIS_URL does not say where Redis is")
        self.url = self.direct = url
        import redis

        with redis.Redis.from_url(url) as client:
            try:
                self.version = client.info("server")["redis_version"]
            except redis.RedisError as error:
                raise EnvironmentMissing(str(error)) from error

    def service(self):
        return f"Redis {self.version}"

    def options(self):
        return {"timeout": 2.0, "patience": Patience(connect=2.0, idle=1.0, silence=1.0, longest_pause=1.0)}

    def transport(self):
        from diator.brokers.redis import RedisMessageBroker

        return RedisMessageBroker.from_url(self.url, **self.options())

    async def send_raw(self, transport, topic, body):
        await transport._client.publish(transport._channel(topic), body)

    @asynccontextmanager
    async def proxied(self):
        parts = urlsplit(self.direct)
        async with FaultProxy(parts.hostname, parts.port or 6379) as proxy:
            self.url = f"redis://{proxy.host}:{proxy.port}"
            try:
                yield proxy
            finally:
                self.url = self.direct


class RedisStreamHarness(RedisHarness):
    """Redis Streams, at `DIATOR_TEST_REDIS_URL`."""

    name = "redis streams"
    facilities = RedisHarness.facilities | {"dead_letters"}

    def transport(self):
        from diator.brokers.redis_streams import RedisStreamMessageBroker

        return RedisStreamMessageBroker.from_url(self.url, lease=1.0, **self.options())

    async def send_raw(self, transport, topic, body):
        await transport._client.xadd(transport._stream(topic), {"body": body})

    async def dead_letters(self, transport, topic, group):
        entries = await transport._client.xrange(f"{transport._stream(topic).decode()}:{group}:dead")
        found = [{_bytes(name): _bytes(value) for name, value in fields.items()} for _, fields in entries]
        return [DeadLettered(body=fields[b"body"], reason=fields[b"diator-dlq-reason"].decode()) for fields in found]


def _bytes(value):
    return value.encode() if isinstance(value, str) else value


# -- Kafka -------------------------------------------------------------------------------------------------------


class KafkaHarness(Harness):
    """Kafka, at `DIATOR_TEST_KAFKA_SERVERS`; behind a proxy, one in a container of its own."""

    name = "kafka"
    facilities = frozenset({"proxy", "raw", "dead_letters"})
    # Joining a group, and creating a topic, take a tenth of a second each; the lowest session that Kafka allows is 6 s.
    limits = Limits(scale=4.0, settle=0.3, redelivery=5.0, timeout=3.0, liveness=10.0, recovery=15.0, lag=2.0)

    def start(self):
        servers = os.environ.get("DIATOR_TEST_KAFKA_SERVERS")
        if not servers:
            raise EnvironmentMissing("DIATOR_TEST_KAFKA_SERVERS does not say where Kafka is")
        self.servers = servers
        self._services = Services()
        try:
            self._behind_proxy = self._services.private("kafka")
        except MissingService as error:
            self._behind_proxy, self._why_not = None, str(error)

    def stop(self):
        self._services.close()

    def service(self):
        return "Kafka"

    def options(self):
        patience = Patience(connect=6.0, idle=1.5, silence=1.5, longest_pause=1.0)
        return {"timeout": 3.0, "session": 6.0, "heartbeat": 0.1, "drain": 10.0, "patience": patience}

    def transport(self):
        from diator.brokers.kafka import KafkaMessageBroker

        return KafkaMessageBroker(self.servers, "conformance", **self.options())

    async def send_raw(self, transport, topic, body):
        await transport._producer.send(transport._names.topic(topic), body)

    async def dead_letters(self, transport, topic, group):
        from aiokafka import AIOKafkaConsumer

        name = transport._names.beside(transport._names.topic(topic), group, "-dlq")
        consumer = AIOKafkaConsumer(name, bootstrap_servers=self.servers, auto_offset_reset="earliest")
        found = []
        async with consumer:
            ends = await consumer.end_offsets(consumer.assignment())
            for place, end in ends.items():
                while end and await consumer.position(place) < end:
                    found.append(await consumer.getone(place))
        found.sort(key=lambda record: record.timestamp)
        return [
            DeadLettered(body=record.value, reason=dict(record.headers)["diator-dlq-reason"].decode())
            for record in found
        ]

    @asynccontextmanager
    async def proxied(self):
        if self._behind_proxy is None:
            raise EnvironmentMissing(self._why_not)
        proxy = FaultProxy("127.0.0.1", self._behind_proxy.behind)
        proxy.port = self._behind_proxy.proxied
        direct = self.servers
        async with proxy:
            self.servers = f"{proxy.host}:{proxy.port}"
            try:
                yield proxy
            finally:
                self.servers = direct


class KafkaInPlaceHarness(KafkaHarness):
    """Kafka, where what is given back holds up what is behind it."""

    name = "kafka, retry in place"
    facilities = frozenset({"raw", "dead_letters"})

    def start(self):
        servers = os.environ.get("DIATOR_TEST_KAFKA_SERVERS")
        if not servers:
            raise EnvironmentMissing("DIATOR_TEST_KAFKA_SERVERS does not say where Kafka is")
        self.servers = servers

    def stop(self):
        pass

    def options(self):
        return {**super().options(), "retry_in_place": True}
