"""What a consumer reports: `on_handled`, `on_gap`, `health()` and the log."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from diator._log import MAX_LINES
from diator.brokers import Message
from diator.brokers.base import Gap
from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Health
from diator.exceptions import (
    BrokerUnavailable,
)
from diator.retrying import RetryPolicy
from tests.unit.consumer.helpers import CANARY, JOIN, Slow, consume, consumer_of, on_joined, quick
from tests.unit.consumer.test_health import Service
from tests.unit.doubles import (
    WEAK,
    Moved,
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
    assert consumer.health() == Health(
        receiving=False,
        connected=False,
        reconnects=0,
        since_last_progress=0,
        in_flight=0,
        oldest_in_flight=0,
        unsettled=0,
        oldest_message=None,
        gaps=0,
    )

    async with running(consumer):
        await until(lambda: slow.begun)
        await asyncio.sleep(20)
        busy = consumer.health()
        slow.gate.set()
        await until(lambda: reports)
        after = consumer.health()

    assert (busy.receiving, busy.connected, busy.in_flight) == (True, True, 1)
    assert 20 <= busy.oldest_in_flight <= busy.since_last_progress < 21
    assert (after.in_flight, after.oldest_in_flight) == (0, 0)
    assert after.since_last_progress < busy.since_last_progress
    ended = consumer.health()
    assert (ended.receiving, ended.connected) == (False, False)


@pytest.mark.usefixtures("loop_clock")
async def test_an_idle_consumer_has_no_deliveries_that_wait_whatever_its_transport_can_tell():
    consumer, _ = consumer_of(Scripted(), on_joined)
    async with running(consumer):
        await asyncio.sleep(100)
        health = consumer.health()

    assert (health.connected, health.reconnects, health.since_last_progress) == (True, 0, 0)


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


@pytest.mark.parametrize("connected", [False, True])
async def test_health_shows_the_connection_of_the_subscription(connected):
    broker = Scripted()
    broker.connected = connected
    consumer, _ = consumer_of(broker, on_joined)
    async with running(consumer):
        await asyncio.sleep(0.01)
        health = consumer.health()

    assert (health.receiving, health.connected) == (True, connected)


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
        broker.on_gap(gap)

    assert (gaps, consumer.health().gaps) == ([gap, gap], 2)
    missed = f"messages may have been missed between {gap.since} and {gap.until}: connection lost"
    assert caplog.messages == [missed, *["on_gap failed"] * breaks] * 2
    for record in caplog.records:
        assert (record.broker, record.group) == ("Scripted", "diator")
        assert getattr(record, "reason", None) == (None if record.exc_info else "connection lost")


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


@pytest.mark.parametrize(("count", "retries"), [(1, "1 immediate retry"), (2, "2 immediate retries")])
@pytest.mark.parametrize("log_errors", [False, True])
async def test_a_failure_that_an_immediate_retry_healed_is_reported_and_logged(log_errors, count, retries, caplog):
    caplog.set_level("INFO")
    errors = [LookupError(CANARY), OSError(CANARY)][-count:]
    left = [*errors]

    async def failing_twice(event: UserJoined) -> None:
        if left:
            raise left.pop(0)

    [handled] = await consume(Scripted(body_of(JOIN)), failing_twice, retry=quick(2), log_errors=log_errors)

    assert (handled.outcome, handled.reason, handled.error) == ("acked", None, None)
    assert (handled.retries, handled.errors) == (count, tuple(errors))
    [line] = [record for record in caplog.records if "succeeded" in record.getMessage()]
    assert (line.levelname, line.name) == ("INFO", "diator.consumer")
    assert line.getMessage().startswith(f"UserJoined {JOIN.event_id} succeeded after {retries} (OSError in ")
    assert line.getMessage().endswith("failing_twice)")
    assert (CANARY in caplog.text) == log_errors


async def test_a_success_at_once_has_no_retries_and_no_line(caplog):
    caplog.set_level("INFO")
    [handled] = await consume(Scripted(body_of(JOIN)), on_joined)

    assert (handled.retries, handled.errors) == (0, ())
    assert [text for text in caplog.messages if "consuming" not in text] == []


@pytest.mark.parametrize("log_errors", [False, True])
async def test_tracebacks_are_logged_if_the_program_wants_them(log_errors, caplog):
    async def failing(event: UserJoined) -> None:
        raise LookupError(CANARY)

    await consume(await holding(JOIN), failing, retry=quick(delayed_retries=1), count=2, log_errors=log_errors)

    assert len(caplog.records) == 2
    assert [record.exc_info is not None for record in caplog.records] == [log_errors] * 2
    assert caplog.text.count(f"LookupError: {CANARY}") == 2 * log_errors


async def test_another_thread_may_ask_for_the_health():
    service = Service()
    consumer, _ = consumer_of(service, on_joined)
    async with running(consumer):
        service.subscription.unsettled = 10  # so that a delivery waits
        service.arriving.put_nowait(body_of(JOIN))
        await asyncio.sleep(1)

        assert (await asyncio.to_thread(consumer.health)).since_last_progress > 0


async def test_a_consumer_logs_at_its_start_and_end_what_it_consumes_and_from_where(caplog):
    caplog.set_level("INFO", "diator.consumer")

    async def on_moved(event: Moved) -> None: ...

    class Distant(MemoryMessageBroker):
        where = "amqp://host:5672/"

    for broker in (MemoryMessageBroker(), Distant(), Scripted(capabilities=WEAK)):
        consumer, _ = consumer_of(broker, on_joined, on_moved, concurrency=3)
        async with running(consumer):
            await until(lambda: caplog.messages)
            assert len(caplog.messages) == 1
        started, stopped = caplog.records
        at = " at amqp://host:5672/" if isinstance(broker, Distant) else ""
        group = "without a group" if isinstance(broker, Scripted) else "group diator"
        about = f"consuming Moved, UserJoined from {type(broker).__name__}{at}, {group}, concurrency 3"
        assert (started.getMessage(), stopped.getMessage()) == (about, f"stopped {about}")
        for record in (started, stopped):
            assert record.levelname == "INFO"
            assert (record.broker, record.concurrency) == (type(broker).__name__, 3)
            assert record.message_names == ["Moved", "UserJoined"]
            assert record.group == (None if isinstance(broker, Scripted) else "diator")
        assert stopped.error_type is None
        caplog.clear()


async def test_the_last_line_of_a_consumer_that_fails_names_the_error(caplog):
    class Broken(Scripted):
        async def __anext__(self):
            raise BrokerUnavailable("away")

    caplog.set_level("INFO", "diator.consumer")
    consumer, _ = consumer_of(Broken(), on_joined)
    with pytest.raises(BrokerUnavailable):
        await consumer.run(signals=False)

    assert caplog.messages[-1].endswith(", concurrency 1 (BrokerUnavailable)")
    assert caplog.records[-1].error_type == "BrokerUnavailable"


async def always_failing(event: UserJoined) -> None:
    raise LookupError(CANARY)


class Flaky:
    """A handler that fails each first time."""

    def __init__(self):
        self.calls = 0

    async def __call__(self, event: UserJoined) -> None:
        self.calls += 1
        if self.calls % 2:
            raise LookupError(CANARY)


class Line(NamedTuple):
    """What is logged of a delivery, and, after too many lines, of its kind."""

    text: str
    kind: str
    level: str
    handler: Any
    body: bytes = body_of(JOIN)
    retry: RetryPolicy = quick()
    broker: Mapping[str, Any] = MappingProxyType({})


ID = JOIN.event_id
LOST = "was not handled and is lost: this transport cannot dead-letter it"
MISFIT = "the payload does not fit UserJoined: Expected `int`, got `str` - at `$.user_id`"
CUT_OFF = "the body is not a message: Input data was truncated"
LINES = {
    "requeued": Line(
        f"UserJoined {ID} failed (LookupError in always_failing); requeued for attempt 2 of 3",
        "UserJoined failed (LookupError in always_failing) and was requeued",
        *("WARNING", always_failing, body_of(JOIN), quick(delayed_retries=2)),
    ),
    "a misfit": Line(
        f"UserJoined {ID} failed (undecodable: {MISFIT}); requeued for attempt 2 of 3",
        "UserJoined failed (undecodable) and was requeued",
        *("WARNING", on_joined, body_of(JOIN, payload={"user_id": "seven"}), quick(delayed_retries=2)),
    ),
    "dead-lettered": Line(
        f"UserJoined {ID} was not handled and is dead-lettered (retries-exhausted: LookupError in always_failing)",
        "UserJoined was not handled and is dead-lettered (retries-exhausted)",
        *("ERROR", always_failing),
    ),
    "unreadable": Line(
        f"UserJoined with an unreadable id was not handled and is dead-lettered (undecodable: {CUT_OFF})",
        "UserJoined was not handled and is dead-lettered (undecodable)",
        *("ERROR", on_joined, b"{"),
    ),
    "lost": Line(
        f"UserJoined {ID} {LOST} (retries-exhausted: LookupError in always_failing)",
        f"UserJoined {LOST} (retries-exhausted)",
        *("ERROR", always_failing),
        broker={"capabilities": WEAK},
    ),
    "unsettled": Line(
        "a delivery of UserJoined could not be settled: BrokerUnavailable('it is away'); it is redelivered",
        "a delivery of UserJoined could not be settled: BrokerUnavailable",
        *("ERROR", on_joined),
        broker={"failing": {"ack": BrokerUnavailable("it is away")}},
    ),
    "healed": Line(
        f"UserJoined {ID} succeeded after 1 immediate retry (LookupError in Flaky)",
        "UserJoined succeeded after immediate retries (LookupError in Flaky)",
        *("INFO", Flaky(), body_of(JOIN), quick(immediate_retries=1)),
    ),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
async def test_a_line_says_what_happened_to_which_message_and_later_to_how_many(line, caplog):
    caplog.set_level("INFO")
    broker = Scripted(*[line.body] * (MAX_LINES + 2), **line.broker)
    await consume(broker, line.handler, retry=line.retry, count=MAX_LINES + 2)

    *records, summary = caplog.records[1:-1]  # between the lines of its start and end
    assert [record.getMessage() for record in records] == [line.text] * MAX_LINES
    assert summary.getMessage().startswith(f"{line.kind}: and 2 more in ")
    assert {record.levelname for record in (*records, summary)} == {line.level}
    for record in records:
        assert (record.message_type, record.message_name, record.attempt) == ("notification_event", "UserJoined", 1)
        assert record.message_id == (None if line.body == b"{" else str(ID))
        assert record.correlation_id == record.message_id
        assert CANARY not in repr(vars(record))
    assert summary.more == 2
    assert summary.seconds == pytest.approx(float(summary.getMessage().split()[-2]), abs=0.5)
    assert summary.group == records[0].group
