"""What a consumer reports: `on_handled`, `on_gap`, `health()` and the log."""

import asyncio
from datetime import UTC, datetime

import pytest

from diator.brokers import Message
from diator.brokers.base import Gap
from diator.brokers.memory import MemoryMessageBroker
from diator.exceptions import (
    BrokerUnavailable,
)
from tests.unit.consumer.helpers import JOIN, Slow, consumer_of, on_joined
from tests.unit.consumer.test_health import Service
from tests.unit.doubles import (
    Scripted,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


@pytest.mark.usefixtures("loop_clock")
async def test_health_reports_the_state():
    broker = await holding(UserJoined())
    slow = Slow()
    consumer, reports = consumer_of(broker, slow)
    idle = consumer.health()
    assert (idle.receiving, idle.in_flight, idle.oldest_in_flight, idle.gaps) == (False, 0, 0, 0)

    async with running(consumer):
        await until(lambda: slow.begun)
        await asyncio.sleep(20)
        busy = consumer.health()
        slow.gate.set()
        await until(lambda: reports)
        after = consumer.health()

    assert (busy.receiving, busy.in_flight) == (True, 1)
    assert 20 <= busy.oldest_in_flight <= busy.since_last_progress < 21
    assert (after.in_flight, after.oldest_in_flight) == (0, 0)
    assert after.since_last_progress < busy.since_last_progress
    assert not consumer.health().receiving


@pytest.mark.parametrize("end", ["cancelled", "failed"])
async def test_after_its_run_a_consumer_is_not_receiving(end):
    """Whatever ended the run: a health check that still succeeds would keep a dead process alive."""

    class Broken(Scripted):
        async def __anext__(self):
            if end == "failed":
                raise BrokerUnavailable("away")
            return await super().__anext__()

    consumer, _ = consumer_of(Broken(), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(0.005)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)

    assert not consumer.health().receiving


async def test_an_error_in_on_handled_is_logged_and_harmless(caplog):
    def broken(handled):
        calls.append(handled)
        raise LookupError("a metric is missing")

    calls = []
    consumer, _ = consumer_of(broker := Scripted(body_of(JOIN), body_of(JOIN)), on_joined, on_handled=broken)
    async with running(consumer):
        await until(lambda: len(calls) == 2)

    assert broker.log == [("ack",), ("ack",)]
    assert [record.getMessage() for record in caplog.records] == ["on_handled failed"] * 2
    assert "a metric is missing" in caplog.text


@pytest.mark.parametrize("breaks", [False, True])
async def test_gaps_are_counted_logged_and_reported(breaks, caplog):
    def on_gap(gap):
        gaps.append(gap)
        if breaks:
            raise LookupError("a metric is missing")

    gaps, gap = [], Gap(since=datetime(2026, 1, 1, tzinfo=UTC), until=datetime.now(UTC), reason="connection lost")
    consumer, _ = consumer_of(broker := Scripted(), on_joined, on_gap=on_gap)
    async with running(consumer):
        await asyncio.sleep(0)
        broker.on_gap(gap)

    assert (gaps, consumer.health().gaps) == ([gap], 1)
    assert "messages may have been missed between 2026-01-01" in caplog.text
    assert ("on_gap failed" in caplog.text) == breaks


async def test_a_message_that_another_program_wrote_is_handled():
    """It has the same wire format."""
    got = []

    async def on_user(event: UserJoined) -> None:
        got.append(event.user_id)

    broker = MemoryMessageBroker()
    consumer, reports = consumer_of(broker, on_user)
    async with running(consumer):
        await asyncio.sleep(0)
        await broker.send_message(Message.create(message_name="UserJoined", payload={"user_id": 9}))
        await until(lambda: reports)

    assert got == [9]


async def test_another_thread_may_ask_for_the_health():
    service = Service()
    consumer, _ = consumer_of(service, on_joined)
    async with running(consumer):
        service.subscription.unsettled = 10  # so that a delivery waits
        service.arriving.put_nowait(body_of(JOIN))
        await asyncio.sleep(1)

        assert (await asyncio.to_thread(consumer.health)).since_last_progress > 0


async def test_a_consumer_logs_at_its_start_what_it_consumes_and_from_where(caplog):
    caplog.set_level("INFO", "diator.consumer")

    class Distant(MemoryMessageBroker):
        where = "amqp://host:5672/"

    for broker in (MemoryMessageBroker(), Distant()):
        consumer, _ = consumer_of(broker, on_joined, concurrency=3)
        async with running(consumer):
            await until(lambda: caplog.messages)
        [message] = caplog.messages
        at = " at amqp://host:5672/" if isinstance(broker, Distant) else ""
        assert message.endswith(f"UserJoined from {type(broker).__name__}{at}, group diator, concurrency 3")
        caplog.clear()
