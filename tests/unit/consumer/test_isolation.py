"""No message stops another one, however it fails, and a flood of them fills no log."""

import asyncio
import logging

import pytest

from diator._handling import _LONGEST_TOGETHER, _SETTLE_TIMEOUT, DEAD_LETTERS_AT_ONCE
from diator._log import MAX_LINES, PERIOD
from diator.brokers.memory import MemoryMessageBroker
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    EncodingError,
    MessageRejected,
    OutcomeUnknown,
    UnsupportedCapability,
)
from diator.retrying import PermanentError
from tests.unit.consumer.helpers import (
    CANARY,
    JOIN,
    JOINED,
    consume,
    consumer_of,
    on_joined,
    outcomes,
    quick,
    reason_of,
)
from tests.unit.doubles import FULL, WEAK, Scripted, UserJoined, body_of, running, until

BAD = UserJoined(user_id=0)


async def failing_first(event: UserJoined) -> None:
    if not event.user_id:
        raise LookupError(CANARY)


async def refusing_first(event: UserJoined) -> None:
    if not event.user_id:
        raise PermanentError


class Failing(Scripted):
    """A broker whose settler raises the errors of *failing*, one after the other, and counts its calls."""

    def __init__(self, *script, failing, **options):
        super().__init__(*script, **options)
        self.errors = {name: [*errors] for name, errors in failing.items()}
        self.calls = []

    def note(self, what, *details):
        self.calls.append(what)
        if errors := self.errors.get(what):
            raise errors.pop(0)
        super().note(what, *details)


TEXT = f"a header contains {CANARY}"
REFUSALS = [
    MessageRejected(TEXT),
    EncodingError("UserJoined.headers", "cannot be written"),
    UnsupportedCapability("Scripted", ["delayed_retry"], why="retry", remedy="none"),
]
DEFECTS = [ValueError(TEXT), KeyError(CANARY), OverflowError(TEXT), asyncio.CancelledError(TEXT)]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("error", [*REFUSALS, *DEFECTS], ids=lambda error: type(error).__name__)
async def test_a_retry_that_is_refused_for_good_is_dead_lettered_and_the_next_message_is_handled(error, concurrency):
    broker = Failing(body_of(BAD), body_of(JOIN), failing={"retry": [error] * 9})
    reports = await consume(
        broker, failing_first, count=2, retry=quick(delayed_retries=1), concurrency=concurrency, group="g"
    )

    reason = f"retry-refused: {type(error).__name__} (failed: LookupError in failing_first)"
    assert sorted(broker.log) == [("ack",), ("dead_letter", reason)]
    assert broker.calls.count("retry") == (1 if error in REFUSALS else 3)
    assert sorted(outcomes(reports)) == ["acked", "dead_lettered"]
    [bad] = [each for each in reports if each.reason]
    assert (bad.reason, type(bad.error)) == (reason, LookupError)


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_an_acknowledgement_that_a_client_library_cancels_is_tried_again(concurrency):
    broker = Failing(body_of(JOIN), failing={"ack": [asyncio.CancelledError()]})
    reports = await consume(broker, on_joined, concurrency=concurrency)

    assert (outcomes(reports), broker.calls) == (["acked"], ["ack", "ack"])


async def test_a_defect_that_does_not_happen_again_changes_nothing():
    broker = Failing(body_of(BAD), failing={"retry": [KeyError(), KeyError()]})
    [handled] = await consume(broker, failing_first, retry=quick(delayed_retries=1))

    assert (handled.outcome, handled.reason) == ("retried", "failed: LookupError in failing_first")


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("away"), OutcomeUnknown("late"), TimeoutError(), OSError.__new__(ConnectionResetError)]
)
async def test_while_the_service_is_away_a_retry_is_not_dead_lettered(error):
    broker = Failing(body_of(BAD), body_of(JOIN), failing={"retry": [error] * 9})
    reports = await consume(broker, failing_first, count=2, retry=quick(delayed_retries=1))

    assert broker.calls == ["retry"] * 3 + ["ack"]
    assert outcomes(reports) == ["unsettled", "acked"]
    assert reports[0].reason == f"not settled: {type(error).__name__} (failed: LookupError in failing_first)"


async def test_without_a_dead_letter_queue_a_refused_retry_is_given_up():
    promised = {"delayed_retry": True, "delivery_count": "retries", "max_message_bytes": FULL.max_message_bytes}
    capabilities = type(FULL)(**promised)
    broker = Failing(body_of(BAD), capabilities=capabilities, failing={"retry": [MessageRejected("no")]})
    [handled] = await consume(broker, failing_first, retry=quick(delayed_retries=1))

    assert (handled.outcome, broker.log) == ("given_up", [("ack",)])


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("error", [*REFUSALS, *DEFECTS, BrokerClosed("closed")], ids=lambda error: type(error).__name__)
async def test_a_dead_letter_that_is_refused_for_good_is_logged_and_counted_and_stops_nothing(
    error, concurrency, caplog
):
    broker = Failing(body_of(BAD), body_of(JOIN), failing={"retry": [error] * 9, "dead_letter": [error] * 9})
    consumer, reports = consumer_of(
        broker, failing_first, retry=quick(delayed_retries=1), concurrency=concurrency, group="g"
    )
    async with running(consumer):
        await until(lambda: len(reports) == 2)

        assert consumer.health().unsettled == 1

    assert (broker.log, sorted(outcomes(reports))) == ([("ack",)], ["acked", "unsettled"])
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"a delivery of UserJoined could not be settled: {type(error).__name__}")
    if error in DEFECTS:
        assert CANARY not in record.getMessage()


@pytest.mark.usefixtures("loop_clock")
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("hanging", ["retry", "dead_letter"])
async def test_a_call_to_settle_that_hangs_stops_nothing_else(hanging, concurrency):
    """A transport has a time limit of its own. The consumer's is for a defect of it."""

    class Hanging(Scripted):
        async def retry(self, delivery, after, /):
            await asyncio.Event().wait()

        async def dead_letter(self, delivery, reason, /):
            await asyncio.Event().wait()

    handler = failing_first if hanging == "retry" else refusing_first
    broker = Hanging(body_of(BAD), body_of(JOIN))
    consumer, reports = consumer_of(broker, handler, retry=quick(delayed_retries=1), concurrency=concurrency)
    async with running(consumer):
        await asyncio.sleep(_SETTLE_TIMEOUT - 1)
        assert consumer.health().oldest_in_flight > _SETTLE_TIMEOUT - 2
        await asyncio.sleep(2)

    assert sorted(outcomes(reports)) == ["acked", "unsettled"]
    assert "not settled: TimeoutError" in "".join(each.reason or "" for each in reports)


@pytest.mark.usefixtures("loop_clock")
async def test_after_a_call_that_hung_acknowledgements_are_tried_again_as_before():
    class Hanging(Failing):
        async def retry(self, delivery, after, /):
            await asyncio.Event().wait()

    broker = Hanging(body_of(BAD), body_of(JOIN), failing={"ack": [BrokerUnavailable("away")]})
    consumer, reports = consumer_of(broker, failing_first, retry=quick(delayed_retries=1))
    async with running(consumer):
        await asyncio.sleep(_SETTLE_TIMEOUT + 1)

    assert outcomes(reports) == ["unsettled", "acked"]


async def test_an_event_class_that_rejects_a_message_only_the_second_time_stops_nothing():
    """Its checks may depend on the time, or on anything else."""
    checks = []

    class Capricious(UserJoined):
        def __post_init__(self):
            checks.append(self.user_id)
            if checks.count(self.user_id) == 2 and not self.user_id:
                raise ValueError(CANARY)

    async def on_capricious(event: Capricious) -> None:
        await failing_first(event)

    bad, good = (body_of(each, message_name="Capricious") for each in (BAD, JOIN))
    reports = await consume(Scripted(bad, good), on_capricious, count=2, retry=quick(immediate_retries=1))

    reasons = {each.outcome: each.reason and reason_of(each) for each in reports}
    assert reasons == {"acked": None, "dead_lettered": "retries-exhausted: DecodingError"}


# -- a flood of them -------------------------------------------------------------------------------------------------

POISON = {
    "undecodable": b"garbage",
    "mismatch": body_of(JOIN, message_name="Elsewhere"),
    "permanent": body_of(BAD),
}


async def poisoned(broker, bodies):
    async with broker.subscribe({JOINED}, group="g"):
        pass
    for body in bodies:
        broker._put(JOINED, body)
    return broker


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_10_000_poison_messages_are_a_few_lines_and_each_is_reported(concurrency, caplog):
    broker = await poisoned(MemoryMessageBroker(capacity=20_000), [*POISON.values()] * 3_333 + [b"garbage"])
    consumer, reports = consumer_of(broker, refusing_first, group="g", concurrency=concurrency)
    async with running(consumer):
        await until(lambda: len(reports) == 10_000)

    assert outcomes(reports) == ["dead_lettered"] * 10_000
    assert len(broker.dead_letters) == 10_000
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 3 * (MAX_LINES + 1) <= 100
    left_out = f"UserJoined was not handled and is dead-lettered (undecodable): and {3_334 - MAX_LINES:,} more in 0 s"
    assert left_out in texts


async def test_the_lines_of_retries_and_of_unsettled_deliveries_are_counted_too(caplog):
    broker = Failing(
        *[body_of(BAD)] * 50, *[body_of(JOIN)] * 50, failing={"ack": [BrokerUnavailable("it is away")] * 150}
    )
    await consume(broker, failing_first, count=100, retry=quick(delayed_retries=1), concurrency=50)

    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 * (MAX_LINES + 1)
    assert (
        f"UserJoined failed (LookupError in failing_first) and was requeued: and {50 - MAX_LINES} more in"
        in "".join(texts)
    )
    unsettled = f"a delivery of UserJoined could not be settled: BrokerUnavailable: and {50 - MAX_LINES} more in"
    assert unsettled in "".join(texts)


async def test_the_count_is_logged_while_the_consumer_runs(caplog):
    consumer, reports = consumer_of(Scripted(*[b"garbage"] * 50), on_joined)
    async with running(consumer):
        await until(lambda: len(reports) == 50)
        assert len(caplog.records) == MAX_LINES
        await asyncio.sleep(PERIOD)
        assert caplog.records[-1].getMessage().endswith(f"(undecodable): and {50 - MAX_LINES} more in 60 s")


async def test_errors_of_on_handled_are_counted_too(caplog):
    def broken(handled):
        calls.append(handled)
        raise LookupError

    calls = []
    consumer, _ = consumer_of(Scripted(*[body_of(JOIN)] * 50), on_joined, on_handled=broken)
    async with running(consumer):
        await until(lambda: len(calls) == 50)

    assert [record.getMessage() for record in caplog.records] == [
        *["on_handled failed"] * MAX_LINES,
        f"on_handled failed: and {50 - MAX_LINES} more in 0 s",
    ]


async def test_a_lost_message_is_counted_too(caplog):
    await consume(Scripted(*[b"garbage"] * 50, capabilities=WEAK), on_joined, count=50)

    assert len(caplog.records) == MAX_LINES + 1
    assert f"cannot dead-letter it (undecodable): and {50 - MAX_LINES} more" in caplog.records[-1].getMessage()


# -- dead-lettering aside --------------------------------------------------------------------------------------------


class Slow(Scripted):
    """A broker that stores dead letters only when *stored* is set."""

    def __init__(self, *script, **options):
        super().__init__(*script, **options)
        self.stored = asyncio.Event()

    async def dead_letter(self, delivery, reason, /):
        self.note("began")
        await self.stored.wait()
        self.note("dead_letter")


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_no_message_waits_until_another_one_is_dead_lettered(concurrency):
    broker = Slow(*[b"{"] * 10, body_of(JOIN))
    consumer, reports = consumer_of(broker, on_joined, concurrency=concurrency)
    async with running(consumer):
        await until(lambda: outcomes(reports) == ["acked"])
        assert consumer.health().in_flight == 10
        broker.stored.set()
        await until(lambda: len(reports) == 11)

        assert (outcomes(reports)[1:], consumer.health().in_flight) == (["dead_lettered"] * 10, 0)


async def test_a_bounded_number_of_messages_is_dead_lettered_at_once():
    broker = Slow(*[b"{"] * 2 * DEAD_LETTERS_AT_ONCE, body_of(JOIN))
    consumer, reports = consumer_of(broker, on_joined)
    async with running(consumer):
        await asyncio.sleep(1)
        assert (len(broker.log), reports) == (DEAD_LETTERS_AT_ONCE + 1, [])
        broker.stored.set()
        await until(lambda: len(reports) == 2 * DEAD_LETTERS_AT_ONCE + 1)


async def test_a_shutdown_waits_for_dead_letters():
    broker = Slow(b"{")
    consumer, reports = consumer_of(broker, on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: broker.log)

    consumer.stop()
    await asyncio.sleep(1)
    assert not run.done()
    broker.stored.set()
    await run

    assert outcomes(reports) == ["dead_lettered"]


async def test_a_shutdown_leaves_dead_letters_unsettled_after_the_drain_timeout():
    consumer, reports = consumer_of(broker := Slow(b"{"), on_joined, drain_timeout=5)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: broker.log)

    consumer.stop()
    await run

    assert [(each.outcome, each.reason) for each in reports] == [("unsettled", "cancelled")]


async def test_a_retried_message_is_requeued_before_the_next_one_is_handled():
    """On a transport that keeps the order of retries, the next message could overtake it otherwise."""
    broker = Scripted(body_of(BAD), body_of(JOIN))
    reports = await consume(broker, failing_first, count=2, retry=quick(delayed_retries=1))

    assert (outcomes(reports), [call for call, *_ in broker.log]) == (["retried", "acked"], ["retry", "ack"])


# -- dead-lettering together -----------------------------------------------------------------------------------------


class Together(Slow):
    """A broker that dead-letters several messages in one call, once *stored* is set, but those whose body is b"["."""

    async def __anext__(self):
        while not self.script:  # noqa: ASYNC110  # a test may add to it
            await asyncio.sleep(0.01)
        return await super().__anext__()

    async def dead_letter_all(self, reasons, /):
        self.note("together", *reasons.values())
        await self.stored.wait()
        return {delivery for delivery in reasons if delivery.body != b"["}


async def test_what_comes_while_dead_letters_are_stored_is_dead_lettered_together():
    broker = Together(*[b"{"] * 10)
    consumer, reports = consumer_of(broker, on_joined)
    async with running(consumer):
        await until(lambda: broker.given == 10)
        await asyncio.sleep(1)
        assert [len(reasons) for _, *reasons in broker.log] == [10]
        broker.script.extend([b"{"] * 5)
        await until(lambda: broker.given == 15)
        await asyncio.sleep(1)
        assert (len(broker.log), consumer.health().in_flight) == (1, 15)
        broker.stored.set()
        await until(lambda: len(reports) == 15)

    assert [(what, len(reasons)) for what, *reasons in broker.log] == [("together", 10), ("together", 5)]
    assert {each.reason for each in reports} == {reason for _, *reasons in broker.log for reason in reasons}
    assert {*outcomes(reports)} == {"dead_lettered"}


async def test_what_was_dead_lettered_together_is_settled():
    broker = Together()
    broker.stored.set()
    deliveries = [broker.delivery(b"{") for _ in range(3)]
    broker.script.extend(deliveries)

    await consume(broker, on_joined, count=3)

    assert [delivery.outcome for delivery in deliveries] == ["dead_letter"] * 3


@pytest.mark.parametrize("body", [b"{", b"["], ids=["together", "one by one"])
async def test_dead_letters_leave_nothing_behind(body):
    """A consumer dead-letters thousands of messages in its life."""
    broker, rooms = Together(*[body] * 20), []
    broker.stored.set()
    broker.make_room = rooms.append
    consumer, reports = consumer_of(broker, on_joined)
    handling = consumer._handling
    async with running(consumer):
        await until(lambda: len(reports) == 20)
        await until(lambda: not handling.dead_lettering)
        kept = [handling._workers, handling._deadlines._deadlines, handling._settling._deadlines]
        assert [len(each) for each in kept] == [1, 1, 1]

    assert (max(rooms) > 0, rooms[-1]) == (True, 0)


async def test_what_is_not_stored_together_is_dead_lettered_by_itself():
    large = b" " * (_LONGEST_TOGETHER + 1)
    broker = Together(large[1:], b"[", large, b"{")
    broker.stored.set()
    reports = await consume(broker, on_joined, count=4)

    assert [(what, len(reasons)) for what, *reasons in broker.log if what != "began"] == [
        ("together", 3),
        *[("dead_letter", 0)] * 2,
    ]
    assert outcomes(reports) == ["dead_lettered"] * 4


@pytest.mark.parametrize("error", [LookupError(CANARY), asyncio.CancelledError()], ids=["error", "cancelled by itself"])
async def test_an_error_of_dead_lettering_together_fails_no_message(error, caplog):
    caplog.set_level(logging.DEBUG)
    broker = Together(*[b"{"] * 3, failing={"together": error})
    broker.stored.set()
    reports = await consume(broker, on_joined, count=3)

    assert [what for what, *_ in broker.log] == ["began", "dead_letter"] * 3
    assert outcomes(reports) == ["dead_lettered"] * 3
    assert f"dead letters were not stored together: {type(error).__name__}" in caplog.messages


async def test_a_call_that_does_not_end_is_given_up_and_each_message_dead_lettered_by_itself():
    class Endless(Together):
        async def dead_letter_all(self, reasons, /):
            await asyncio.Event().wait()

    broker = Endless(b"{", b"{")
    broker.stored.set()
    consumer, reports = consumer_of(broker, on_joined)
    async with running(consumer):
        await asyncio.sleep(_SETTLE_TIMEOUT - 1)
        assert reports == []
        await asyncio.sleep(2)
        assert outcomes(reports) == ["dead_lettered"] * 2


async def test_a_shutdown_waits_for_what_is_dead_lettered_together_and_for_the_rest():
    broker = Together(b"{", b"[")
    consumer, reports = consumer_of(broker, on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: broker.log)

    consumer.stop()
    await asyncio.sleep(1)
    assert not run.done()
    broker.stored.set()
    await run

    assert outcomes(reports) == ["dead_lettered"] * 2


async def test_a_shutdown_at_once_leaves_what_is_dead_lettered_together_unsettled():
    broker = Together(b"{", b"{")
    consumer, reports = consumer_of(broker, on_joined, drain_timeout=0)
    run = asyncio.create_task(consumer.run(signals=False))
    await until(lambda: broker.log)
    broker.script.append(b"{")
    await until(lambda: broker.given == 3)

    consumer.stop()
    await run

    assert [(each.outcome, each.reason) for each in reports] == [("unsettled", "cancelled")] * 3


async def test_the_error_of_a_poison_message_holds_no_message():
    [undecodable, misfit] = await consume(Scripted(b"{", body_of(BAD, payload={"user_id": "x"})), on_joined, count=2)

    assert (undecodable.error.__traceback__, misfit.error.__traceback__) == (None, None)


async def test_a_dead_letter_whose_task_is_cancelled_before_its_first_step_is_reported():
    """As `asyncio.run` does at its end, in any order."""

    class Cancelling(Scripted):
        async def __anext__(self):
            if not self.script:
                for task in asyncio.all_tasks():
                    if task.get_name() == "diator: dead-lettering" or task is run:
                        task.cancel()
            return await super().__anext__()

    consumer, reports = consumer_of(Cancelling(b"{"), on_joined)
    run = asyncio.create_task(consumer.run(signals=False))
    await asyncio.wait([run])

    assert [(each.outcome, each.reason) for each in reports] == [("unsettled", "cancelled")]
    assert consumer.health().in_flight == 0
