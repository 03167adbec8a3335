"""A relay between a database and RabbitMQ: nothing is lost, and keys keep their order, whatever fails."""

import asyncio
import json
import random
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import aio_pika
import pytest
import sqlalchemy as sa

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.rabbitmq import RabbitMQMessageBroker, _retained, _subscription
from diator.brokers.supervisor import ReconnectPolicy
from diator.brokers.wrapping import Wrapped
from diator.exceptions import BrokerUnavailable, OutcomeUnknown
from diator.outbox import Outbox, Relay
from diator.testing.fault_proxy import FaultProxy
from tests.conftest import SERVICES, found
from tests.integration.outbox.helpers import add, until

pytestmark = pytest.mark.timeout(300)

COUNTED = Topic("notification_event", "Counted")
KEYS = 7
RECONNECT = ReconnectPolicy(connect_timeout=5.0, idle_timeout=1.0, probe_timeout=2.0, max_delay=0.5)
ON_POSTGRESQL = pytest.mark.parametrize("driver", ["postgresql+asyncpg"], indirect=True)
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def new_queues_are_used_at_once(monkeypatch):
    """They need not survive a kill of RabbitMQ within their first seconds."""
    for module in (_subscription, _retained):
        monkeypatch.setattr(module, "SAFE_AFTER", 0.0)


@pytest.fixture
async def prefix(rabbitmq_url):
    prefix = f"relay-{uuid4().hex[:12]}"
    yield prefix
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        for queue in ("readers", "readers:dead", "#2Fretained", "#2Fretained:dead"):
            await channel.queue_delete(f"{prefix}:{':'.join(COUNTED)}:{queue}")
        for exchange in (prefix, f"{prefix}:retained"):
            await channel.exchange_delete(exchange)


class Arrived:
    """What a group of readers has received: the numbers in their order, and how often each."""

    def __init__(self):
        self.numbers = []
        self.ids = set()

    @property
    def distinct(self):
        return [*dict.fromkeys(self.numbers)]

    def check(self, count):
        """Check that each message has arrived, each time with its own id, and those of each key in their order."""
        assert {*self.numbers} == {*range(count)}
        assert self.ids == {(number, UUID(int=number + 1)) for number in range(count)}
        for key in range(KEYS):
            own = [number for number in self.distinct if number % KEYS == key]
            assert own == sorted(own)


@asynccontextmanager
async def reading(url, prefix):
    """Receive what is sent, around a block."""
    arrived = Arrived()

    async def read(deliveries):
        async for delivery in deliveries:
            body = json.loads(delivery.body)
            arrived.numbers.append(body["payload"]["number"])
            arrived.ids.add((body["payload"]["number"], UUID(body["message_id"])))
            await delivery.ack()

    async with (
        RabbitMQMessageBroker(url, prefix, reconnect=RECONNECT) as broker,
        broker.subscribe([COUNTED], group="readers", prefetch=1) as deliveries,
    ):
        reader = asyncio.create_task(read(deliveries))
        try:
            yield arrived
        finally:
            reader.cancel()
            await asyncio.wait({reader})


def message(number):
    return Message.create(
        message_name="Counted", payload={"number": number}, message_id=UUID(int=number + 1), key=str(number % KEYS)
    )


async def store_all(store, sessions, count, *, begin=0):
    for number in range(begin, begin + count, 10):
        await add(store, sessions, *map(message, range(number, number + 10)))


async def is_empty(store):
    status = await store.status()
    return status.pending == status.scheduled == status.dead == 0


def sending(url, prefix, **options):
    return RabbitMQMessageBroker(url, prefix, timeout=2.0, reconnect=RECONNECT, **options)


class Flaky(Wrapped):
    """Fails 15 % of the sends, before or after RabbitMQ has the message."""

    def __init__(self, broker):
        super().__init__(broker)
        self.chance = random.Random(7)
        self.failed = 0

    async def send_message(self, message, /):
        fails = self.chance.random()
        if fails < 0.15:
            self.failed += 1
        if fails < 0.05:
            raise BrokerUnavailable("not sent", message_id=message.message_id)
        if fails < 0.1:
            raise OutcomeUnknown("not sent", message_id=message.message_id)
        await super().send_message(message)
        if fails < 0.15:
            raise OutcomeUnknown("sent", message_id=message.message_id)


async def test_two_relays_whose_sends_fail(store, sessions, rabbitmq_url, prefix):
    async with sending(rabbitmq_url, prefix) as broker, reading(rabbitmq_url, prefix) as arrived:
        outbox = Outbox(store, flaky := Flaky(broker))
        async with Relay(outbox, lease=5.0, batch=20), Relay(outbox, lease=5.0, batch=20):
            await store_all(store, sessions, 300)
            await until(lambda: is_empty(store))
        await arrive(arrived, 300)

    assert flaky.failed > 10
    arrived.check(300)


async def arrive(arrived, count):
    async def have_arrived():
        return len(arrived.distinct) >= count

    await until(have_arrived)


@ON_POSTGRESQL
@pytest.mark.parametrize("fault", ["reset", "cut", "black_hole_existing"])
async def test_a_link_that_breaks(store, sessions, rabbitmq_url, prefix, fault):
    parts = urlsplit(rabbitmq_url)
    async with FaultProxy(parts.hostname, parts.port) as proxy, reading(rabbitmq_url, prefix) as arrived:
        url = rabbitmq_url.replace(parts.netloc.rpartition("@")[2], f"{proxy.host}:{proxy.port}")
        async with sending(url, prefix) as broker:
            outbox = Outbox(store, broker)
            async with Relay(outbox, lease=5.0, batch=20) as one, Relay(outbox, lease=5.0, batch=20) as two:
                for thirds in range(3):
                    await store_all(store, sessions, 100, begin=100 * thirds)
                    getattr(proxy, fault)()
                    await arrive(arrived, 100 * thirds + 30)
                await until(lambda: is_empty(store))
            assert one.health().dead + two.health().dead == 0
        await arrive(arrived, 300)

    arrived.check(300)


@ON_POSTGRESQL
async def test_a_database_that_ends_its_connections(store, sessions, rabbitmq_url, prefix, caplog):
    engine = sessions.kw["bind"]

    async def end_connections():
        async with engine.connect() as connection:
            with_others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            await connection.execute(sa.text(f"{with_others} AND pid <> pg_backend_pid()"))

    async with sending(rabbitmq_url, prefix) as broker, reading(rabbitmq_url, prefix) as arrived:
        async with Relay(Outbox(store, broker), lease=5.0, batch=20):
            for part in range(5):
                for number in range(50 * part, 50 * part + 50, 10):
                    await until(lambda number=number: is_stored(store, sessions, number))
                await end_connections()
                await arrive(arrived, 50 * part + 10)
                await until(lambda: is_available(engine))
            await until(lambda: is_empty(store))
        await arrive(arrived, 250)

    assert "the database has failed to" in caplog.text
    arrived.check(250)


async def is_stored(store, sessions, number):
    """Store ten messages; false if the pool gave a connection that was ended: nothing of them is stored then."""
    try:
        await add(store, sessions, *map(message, range(number, number + 10)))
    except sa.exc.DBAPIError:
        return False
    return True


async def is_available(engine):
    """Return whether the pool has a connection that works: a program retries its own transactions."""
    try:
        async with engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
    except sa.exc.DBAPIError:
        return False
    return True


@asynccontextmanager
async def process(url, rabbitmq_url, prefix, when):
    database = url.render_as_string(hide_password=False)
    worker = ROOT / "tests" / "integration" / "outbox" / "relay_worker.py"
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, worker, database, rabbitmq_url, prefix, when), cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


@ON_POSTGRESQL
async def test_a_relay_that_dies_between_a_send_and_its_report(url, store, sessions, rabbitmq_url, prefix):
    await store_all(store, sessions, 50)
    async with reading(rabbitmq_url, prefix) as arrived:
        async with process(url, rabbitmq_url, prefix, "before the report") as dying:
            assert await dying.wait() == -signal.SIGKILL
        assert (await store.status()).pending == 50
        assert arrived.numbers
        async with process(url, rabbitmq_url, prefix, "never") as other:
            await until(lambda: is_empty(store))
            other.terminate()
            assert await other.wait() == 0
        await arrive(arrived, 50)

    assert len(arrived.numbers) > 50
    arrived.check(50)


@ON_POSTGRESQL
async def test_a_relay_that_is_terminated_releases_what_it_has_claimed(url, store, sessions, rabbitmq_url, prefix):
    await store_all(store, sessions, 2_000)
    async with reading(rabbitmq_url, prefix) as arrived:
        async with process(url, rabbitmq_url, prefix, "never") as running:
            await arrive(arrived, 20)
            running.terminate()
            assert await running.wait() == 0
        assert (await store.status()).leased == 0
        sent = 2_000 - (await store.status()).pending
        await arrive(arrived, sent)

    assert len(arrived.numbers) == sent


@ON_POSTGRESQL
async def test_a_service_that_is_killed_and_started_again(pytestconfig, store, sessions, monkeypatch):
    monkeypatch.setattr(_subscription, "SAFE_AFTER", 2.0)
    service = found(pytestconfig.stash[SERVICES].private, "rabbitmq")
    try:
        async with reading(service.url, "relay") as arrived, sending(service.url, "relay") as broker:
            async with Relay(Outbox(store, broker), lease=5.0, batch=20) as relay:
                for half in range(2):
                    await store_all(store, sessions, 100, begin=100 * half)
                    await arrive(arrived, 100 * half + 10)
                    await asyncio.to_thread(service.kill)
                    await asyncio.to_thread(service.start)
                await until(lambda: is_empty(store))
                assert relay.health().dead == 0
            await arrive(arrived, 200)
    finally:
        service.remove()

    arrived.check(200)
