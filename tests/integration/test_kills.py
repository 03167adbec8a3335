"""
SIGKILL of the consumer and of the service, at one third and at two thirds of 10,000 messages.

The books record how often each message was sent, when each handler began and ended, and when a process was killed.
Tests without one of the protections show that the books find a loss.
"""

import asyncio
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from time import time
from uuid import uuid4

import aio_pika
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis.asyncio import Redis

from diator.brokers import Message
from diator.exceptions import BrokerUnavailable, MessageUnroutable, OutcomeUnknown
from tests.conftest import SERVICES, found
from tests.integration.consuming import Ledger, asked_to_end, consuming, kill, until
from tests.integration.transports import broker_for

pytestmark = pytest.mark.timeout(240)

MANY, KEYS = 10_000, 16
AHEAD = 1_500
"""How many messages the sender may be ahead of the handlers, so that each kill happens while it sends."""
RECONNECTING = 0.5
"""Seconds until a consumer has noticed that the service is back."""
QUIET = 3.0
"""Seconds without a message after which no more is expected."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """The properties of a transport that the evaluation depends on."""

    scheme: str
    backend: str
    told_within: float
    """Seconds until an acknowledgement has reached the service. Messages handled after that may be redelivered."""
    in_order: bool = True
    """Whether pending messages of a dead consumer come before unread ones."""


TRANSPORTS = [
    # Pending messages of a dead consumer are redelivered when their lease expires; meanwhile others read on.
    Transport(scheme="redis-streams", backend="redis", told_within=1.0, in_order=False),
    Transport(scheme="amqp", backend="rabbitmq", told_within=1.0),
    Transport(scheme="kafka", backend="kafka", told_within=2.0),
]


@dataclass(kw_only=True)
class Books:
    """The record of everything that happened."""

    sent: Counter[int] = field(default_factory=Counter)
    ledgers: list[Ledger] = field(default_factory=list)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """When a process was killed, and when it was back."""

    def handled(self) -> Counter[int]:
        return sum((ledger.read().handled for ledger in self.ledgers), Counter())

    def begun(self) -> list[tuple[float, int]]:
        return sorted((at, number) for ledger in self.ledgers for number, at in ledger.read().begun)

    def lost(self) -> set[int]:
        return self.sent.keys() - self.handled().keys()

    def unexplained(self, told_within: float) -> list[int]:
        """Return the numbers that were redelivered although each was sent once and could be acknowledged."""
        begun: dict[int, list[float]] = defaultdict(list)
        for at, number in self.begun():
            begun[number].append(at)
        unexplained = []
        for number, times in begun.items():
            struck = sum(self._cut_off(at, told_within) for at in times)
            if len(times) > self.sent[number] + struck:
                unexplained.append(number)
        return unexplained

    def _cut_off(self, begun: float, told_within: float) -> bool:
        """Whether a message whose handler began at *begun* could not be acknowledged."""
        return any(killed <= begun + told_within and begun <= back for killed, back in self.outages)

    def late(self) -> set[int]:
        """Return the numbers that were first handled after a later one of their key."""
        furthest: dict[int, int] = {}
        late, seen = set(), set()
        for _, number in self.begun():
            key = number % KEYS
            if number not in seen and number < furthest.get(key, -1):
                late.add(number)
            seen.add(number)
            furthest[key] = max(number, furthest.get(key, -1))
        return late


def message(number: int) -> Message:
    return Message.create(message_name="Counted", payload={"number": number}, key=str(number % KEYS))


async def send_all(broker, books: Books, many: int = MANY) -> None:
    """Send all numbers below *many*, those of one key in order, each until it is confirmed."""
    handled = 0

    async def look() -> None:
        nonlocal handled
        while True:
            handled = len(books.handled())
            await asyncio.sleep(0.05)

    async def send_key(key: int) -> None:
        for number in range(key, many, KEYS):
            sent = message(number)
            while len(books.sent) - handled > AHEAD:  # noqa: ASYNC110  # other processes handle them
                await asyncio.sleep(0.01)
            while True:
                try:
                    await broker.send_message(sent)
                    books.sent[number] += 1
                    break
                except OutcomeUnknown:
                    books.sent[number] += 1
                except (BrokerUnavailable, MessageUnroutable):
                    pass  # it was not sent: the service is away, or has no queue yet
                await asyncio.sleep(0.05)

    looking = asyncio.create_task(look())
    async with asyncio.TaskGroup() as senders:
        for key in range(KEYS):
            senders.create_task(send_key(key))
    looking.cancel()
    await asyncio.wait({looking})


@pytest.fixture
def private(pytestconfig):
    """Return a function that starts a private service."""
    services = []

    def private(backend):
        services.append(found(pytestconfig.stash[SERVICES].private, backend))
        return services[-1]

    yield private
    for service in services:
        service.remove()


def address_of(transport: Transport, service) -> str:
    return f"{transport.scheme}://{service.url.rpartition('//')[2]}"


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.scheme)
async def test_nothing_is_lost(private, tmp_path, transport) -> None:
    """No message is lost when consumers or the service die, and each duplicate was in flight at a death."""
    service = private(transport.backend)
    address, prefix, books = address_of(transport, service), f"kills-{uuid4().hex[:8]}", Books()

    async with broker_for(address, prefix) as broker, AsyncExitStack() as stack:

        async def start():
            process, ledger = await stack.enter_async_context(consuming(address, prefix, tmp_path))
            books.ledgers.append(ledger)
            return process

        consumer = await start()
        sending = asyncio.create_task(send_all(broker, books))
        for thirds in (1, 2):
            await until(lambda thirds=thirds: len(books.handled()) >= MANY * thirds / 3)
            killed = time()
            await kill(consumer)
            books.outages.append((killed, time()))
            consumer = await start()
            await until(lambda: books.ledgers[-1].read().ended)
            killed = time()
            await asyncio.to_thread(service.kill)
            await asyncio.to_thread(service.start)
            books.outages.append((killed, time() + RECONNECTING))
        await sending
        await until(lambda: len(books.handled()) == MANY)
        await asyncio.sleep(transport.told_within + 1)
        await asked_to_end(consumer)

    assert not books.lost()
    assert books.handled().keys() == {*range(MANY)}
    assert books.unexplained(transport.told_within) == []
    late = books.late()
    # Messages that each dead consumer may have held unhandled: prefetched, or waiting behind their key.
    assert not late if transport.in_order else len(late) <= 2 * (16 + 16 + 100)
    repeated = sum(books.handled().values()) - MANY
    print(f"{transport.scheme}: {MANY} sent, 0 lost, {repeated} repeated, {len(late)} late")  # noqa: T201


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.scheme)
async def test_acknowledging_before_handling_loses_messages(private, tmp_path, transport) -> None:
    """A consumer that acknowledges on receipt dies in the same way."""
    address, prefix, books = address_of(transport, private(transport.backend)), f"kills-{uuid4().hex[:8]}", Books()

    async with (
        broker_for(address, prefix) as broker,
        consuming(address, prefix, tmp_path, seconds=0.5, careless=True) as (killed, first),
    ):
        sending = asyncio.create_task(send_all(broker, books, 400))
        await until(lambda: len(first.read().ended) >= 48)
        await asyncio.sleep(0.2)  # the running handlers have acknowledged and not finished
        await kill(killed)
        await sending
        async with consuming(address, prefix, tmp_path) as (successor, second):
            books.ledgers = [first, second]
            await until(lambda: time() - max((at for _, at in second.read().ended), default=time()) > QUIET)
            await asked_to_end(successor)

    assert books.lost()


async def test_a_redis_that_stores_nothing_loses(private) -> None:
    """Confirmed messages are gone after the service's death."""
    service, prefix = private("redis"), f"kills-{uuid4().hex[:8]}"
    async with Redis.from_url(service.url) as client:
        await client.config_set("appendonly", "no")
    async with broker_for(service.url.replace("redis", "redis-streams", 1), prefix) as broker:
        await broker.send_messages([message(number) for number in range(500)])
    await asyncio.to_thread(service.kill)
    await asyncio.to_thread(service.start)

    async with Redis.from_url(service.url) as client:
        assert not await client.exists(f"{prefix}:notification_event:Counted")


MORE = 200


async def killed_with(service, send) -> None:
    """Call *send* while *service* is frozen, and then kill the service, which has not read what the client wrote."""
    await asyncio.to_thread(service.pause)
    async with asyncio.timeout(60):
        for _ in range(MORE):
            await send()
    await asyncio.to_thread(service.kill)
    await asyncio.to_thread(service.start)


async def test_a_rabbitmq_that_confirms_nothing_loses(private) -> None:
    """Messages that the client accepted without a confirmation are gone."""
    service = private("rabbitmq")
    async with await aio_pika.connect(service.url) as client:
        channel = await client.channel(publisher_confirms=False)
        await channel.declare_queue("counted", durable=True, arguments={"x-queue-type": "quorum"})
        persistent = aio_pika.Message(b"1", delivery_mode=2)
        await killed_with(service, lambda: channel.default_exchange.publish(persistent, "counted"))

    async with await aio_pika.connect(service.url) as client:
        queue = await (await client.channel()).declare_queue("counted", passive=True)
        assert queue.declaration_result.message_count < MORE


async def test_a_kafka_that_confirms_nothing_loses(private) -> None:
    """Likewise, with `acks=0`."""
    service, place = private("kafka"), TopicPartition("counted", 0)
    async with AIOKafkaProducer(bootstrap_servers=service.url, acks=0) as producer:
        await producer.send_and_wait("counted", b"0", partition=0)
        await killed_with(service, lambda: producer.send_and_wait("counted", b"1", partition=0))

    async with AIOKafkaConsumer(bootstrap_servers=service.url) as consumer:
        assert (await consumer.end_offsets([place]))[place] < MORE
