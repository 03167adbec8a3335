"""A process sends, others consume and are killed: a ledger, written by the handlers, shows what became of all."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import time
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from diator.brokers import Message
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis_streams import RedisStreamMessageBroker

WORKER = Path(__file__).with_name("consuming_worker.py")
MANY = 10_000


@pytest.fixture
async def admin(redis_url) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
async def prefix(admin) -> AsyncIterator[str]:
    prefix = f"test-{uuid4()}"
    yield prefix
    if keys := await admin.keys(f"{prefix}*"):
        await admin.delete(*keys)


class Ledger:
    """What the handlers of one process wrote."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()

    def lines(self, kind: str) -> list[list[float]]:
        words = [line.split() for line in self.file.read_text().splitlines()]
        return [[*map(float, rest)] for first, *rest in words if first == kind]

    def counted(self, kind: str) -> Counter[int]:
        return Counter(int(number) for (number,) in self.lines(kind))

    async def until(self, holds, *, within=25.0) -> None:
        async with asyncio.timeout(within):
            while not holds(self):  # noqa: ASYNC110  # another process writes it
                await asyncio.sleep(0.01)


@pytest.fixture
def worker(redis_url, prefix, tmp_path):
    """Starts a process that consumes; what is left of it at the end is killed."""

    @asynccontextmanager
    async def worker(scheme, *, seconds=0.001) -> AsyncIterator[tuple[Process, Ledger]]:
        ledger = Ledger(tmp_path / uuid4().hex)
        address = redis_url.replace("redis", scheme, 1)
        process = await asyncio.create_subprocess_exec(
            sys.executable, WORKER, address, prefix, ledger.file, str(seconds), stderr=PIPE
        )
        try:
            yield process, ledger
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    return worker


def message(number) -> Message:
    return Message.create(message_name="Counted", payload={"number": number})


async def ended(process: Process) -> str:
    """Ask it to end, and see that it does so in good order; what it logged."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    return log.decode()


async def test_a_consumer_of_streams_is_killed(admin, redis_url, prefix, worker) -> None:
    """At a third of the messages, with SIGKILL. Nothing is lost, and what comes twice was in flight at that moment."""
    stream = f"{prefix}:notification_event:Counted"
    async with RedisStreamMessageBroker.from_url(redis_url, prefix) as broker, AsyncExitStack() as stack:
        for first in range(0, MANY, 500):
            await broker.send_messages([message(number) for number in range(first, first + 500)])

        killed, before = await stack.enter_async_context(worker("redis-streams"))
        await before.until(lambda ledger: ledger.counted("end").total() >= MANY / 3)
        killed.kill()
        await killed.wait()
        numbers = {id_: json.loads(fields[b"body"])["payload"]["number"] for id_, fields in await admin.xrange(stream)}
        held = await admin.xpending_range(stream, "diator", "-", "+", MANY)
        in_flight = {numbers[each["message_id"]] for each in held}

        successor, after = await stack.enter_async_context(worker("redis-streams"))
        await after.until(lambda ledger: before.counted("end").keys() | ledger.counted("end").keys() == {*range(MANY)})
        await asyncio.sleep(0.5)
        await ended(successor)

    begun, done = before.counted("begin"), before.counted("end")
    handled = done + after.counted("end")
    assert MANY / 3 <= done.total() < MANY * 0.9
    assert begun.keys() - done.keys() <= in_flight  # what was being handled was not acknowledged
    assert handled.keys() == {*range(MANY)}
    assert {number for number, times in handled.items() if times > 1} <= in_flight
    assert max(handled.values()) <= 2
    assert len(in_flight) <= 16 + 100 + 100  # what is handled, what is read ahead, and one batch of acknowledgements
    assert (await admin.xpending(stream, "diator"))["pending"] == 0


@pytest.mark.parametrize("scheme", ["redis", "redis-streams"])
async def test_a_consumer_is_asked_to_end(admin, redis_url, prefix, worker, scheme) -> None:
    """It finishes what it has begun, and nothing else; of a stream, the next one gets the rest at once."""
    make = RedisStreamMessageBroker if scheme == "redis-streams" else RedisMessageBroker
    async with make.from_url(redis_url, prefix) as broker, AsyncExitStack() as stack:
        first, before = await stack.enter_async_context(worker(scheme, seconds=0.5))
        await listening(admin, prefix)
        await broker.send_messages([message(number) for number in range(100)])
        await before.until(lambda ledger: ledger.counted("begin").total() >= 16)
        await ended(first)
        done = before.counted("end")
        assert before.counted("begin") == done
        assert 16 <= done.total() < 100
        if scheme == "redis-streams":
            second, after = await stack.enter_async_context(worker(scheme))
            await after.until(lambda ledger: ledger.counted("end").total() >= 100 - done.total(), within=5)
            await ended(second)
            assert after.counted("end") + done == Counter(range(100))


async def test_a_subscriber_is_cut_off_under_load(admin, redis_url, prefix, worker) -> None:
    """What was missed is lost: the log and the program are told of it, and of when."""
    times: dict[int, tuple[float, float]] = {}
    async with (
        RedisMessageBroker.from_url(redis_url, prefix) as broker,
        worker("redis", seconds=0) as (process, ledger),
    ):
        await listening(admin, prefix)
        number = cut = 0
        while cut < 3 or not ledger.lines("gap")[2:] or number < MANY:
            for _ in range(100):
                sent = time()
                await broker.send_message(message(number))
                times[number] = sent, time()
                number += 1
            if cut < 3 and number >= (cut + 1) * MANY / 4 and len(ledger.lines("gap")) == cut:
                for client in await admin.client_list(_type="pubsub"):
                    if client["name"] == prefix:
                        await admin.client_kill_filter(_id=client["id"])
                        cut += 1
        await ledger.until(lambda ledger: number - 1 in ledger.counted("end"))
        log = await ended(process)

    gaps, heard = ledger.lines("gap"), ledger.counted("end")
    missed = times.keys() - heard.keys()
    assert len(gaps) == 3 == log.count("may have been missed")
    assert missed
    assert max(heard.values()) == 1
    for number in missed:
        sent, confirmed = times[number]
        assert any(since <= confirmed and sent <= until for since, until in gaps)
    assert len(missed) < MANY / 2


async def listening(admin, prefix) -> None:
    """Wait until somebody does."""
    async with asyncio.timeout(10):
        while sum(each["name"] == prefix for each in await admin.client_list()) < 2:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
