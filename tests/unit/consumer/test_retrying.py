"""What a consumer does when a handler fails: retry at once, requeue, dead-letter."""

import asyncio
import contextlib
import time

import pytest

from diator.brokers.memory import MemoryMessageBroker
from diator.events import EventEmitter
from diator.retrying import PermanentError, RetryPolicy
from tests.unit.consumer.helpers import (
    CANARY,
    JOIN,
    ONCE,
    cancelling,
    consume,
    consumer_of,
    is_drained,
    left_in,
    on_joined,
    outcomes,
    quick,
    reason_of,
)
from tests.unit.doubles import (
    Scripted,
    UserJoined,
    body_of,
    holding,
    running,
    until,
)


@pytest.mark.parametrize("consumers", [1, 3])
@pytest.mark.parametrize(("immediate", "delayed"), [(0, 0), (2, 0), (0, 3), (1, 2), (2, 5)])
async def test_a_failing_message_is_tried_exactly_so_often_and_then_dead_lettered_once(immediate, delayed, consumers):
    runs, reports = 0, []

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise LookupError(CANARY)

    broker, retry = await holding(UserJoined()), quick(immediate, delayed)
    several = [consumer_of(broker, failing, retry=retry, on_handled=reports.append)[0] for _ in range(consumers)]
    tasks = [asyncio.create_task(consumer.run(signals=False)) for consumer in several]
    await until(lambda: broker.dead_letters)
    for consumer in several:
        consumer.stop()
    await asyncio.gather(*tasks)

    assert runs == (immediate + 1) * (delayed + 1)
    assert [each.attempt for each in reports] == [*range(1, delayed + 2)]
    assert outcomes(reports) == ["retried"] * delayed + ["dead_lettered"]
    assert [*map(reason_of, reports)] == ["failed: LookupError"] * delayed + ["retries-exhausted: LookupError"]
    assert [each.retries for each in reports] == [immediate] * (delayed + 1)
    assert [len(each.errors) for each in reports] == [immediate + 1] * (delayed + 1)
    assert {type(each.error) for each in reports} == {LookupError}
    [letter] = broker.dead_letters
    assert (reason_of(letter), letter.attempts) == ("retries-exhausted: LookupError", delayed + 1)
    assert await is_drained(broker)


async def test_a_message_that_succeeds_at_last_is_acknowledged():
    runs = 0

    async def failing_thrice(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        if runs <= 3:
            raise LookupError

    broker = await holding(UserJoined())
    reports = await consume(broker, failing_thrice, retry=quick(immediate_retries=1, delayed_retries=5), count=2)

    assert (runs, outcomes(reports), broker.dead_letters) == (4, ["retried", "acked"], [])


async def test_the_delays_are_those_of_the_policy():
    class Timed(Scripted):
        async def retry(self, delivery, after, /):
            self.log.append(after)

    async def failing(event: UserJoined) -> None:
        raise LookupError

    broker = Timed()
    broker.script += [broker.delivery(body_of(UserJoined()), attempt=attempt) for attempt in (1, 2)]
    await consume(broker, failing, retry=RetryPolicy(immediate_retries=0, first_delay=8, backoff_factor=4), count=2)

    first, second = broker.log
    assert 4 <= first <= 8
    assert 16 <= second <= 32


async def test_pauses_before_an_immediate_retry():
    runs = []

    async def failing(event: UserJoined) -> None:
        runs.append(asyncio.get_running_loop().time())
        raise LookupError

    await consume(
        Scripted(body_of(UserJoined())),
        failing,
        retry=RetryPolicy(immediate_retries=1, immediate_pause=0.04, delayed_retries=0),
    )

    assert 0.02 <= runs[1] - runs[0] <= 0.04


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermanentError(), "permanent: PermanentError"),
        (KeyError(), "permanent: KeyError"),
        (ExceptionGroup("", [KeyError(), PermanentError()]), "permanent: ExceptionGroup (KeyError, PermanentError)"),
    ],
)
async def test_after_a_permanent_error_the_message_is_dead_lettered_at_once(error, reason):
    runs = 0

    async def failing(event: UserJoined) -> None:
        nonlocal runs
        runs += 1
        raise error

    policy = quick(immediate_retries=3, delayed_retries=3, permanent=(PermanentError, LookupError))
    reports = await consume(broker := await holding(UserJoined()), failing, retry=policy)

    assert (runs, outcomes(reports), reports[0].error) == (1, ["dead_lettered"], error)
    assert [reason_of(letter) for letter in broker.dead_letters] == [reason]


async def test_all_handlers_run_although_one_fails_and_each_error_names_its_handler():
    runs = []

    async def first(event: UserJoined) -> None:
        runs.append("first")
        raise LookupError

    async def second(event: UserJoined) -> None:
        runs.append("second")
        raise PermanentError

    [handled] = await consume(Scripted(body_of(UserJoined())), first, second, retry=ONCE)

    assert runs == ["first", "second"]
    assert reason_of(handled) == "retries-exhausted: LookupError, PermanentError"
    one, other = handled.error.exceptions
    assert "first, which handles UserJoined" in one.__notes__[0]
    assert "second, which handles UserJoined" in other.__notes__[0]


@pytest.mark.parametrize("where", ["handler", "one of two", "middleware"])
async def test_a_handler_that_cancels_itself_fails(where):
    runs = []

    async def on_user(event: UserJoined) -> None:
        runs.append("one")
        await cancelling()

    async def other(event: UserJoined) -> None:
        runs.append("other")

    reports = await consume(
        Scripted(body_of(JOIN), body_of(JOIN)),
        *[on_user, other][: 2 if where == "one of two" else 1],
        middlewares=[cancelling] if where == "middleware" else [],
        retry=quick(immediate_retries=1),
        count=2,
    )

    assert outcomes(reports) == ["dead_lettered"] * 2
    if where == "one of two":
        assert reports[0].error.message == "handlers of UserJoined failed"
        [error] = reports[0].error.exceptions
        assert str(error).endswith("on_user was cancelled by its own code")
        assert isinstance(error.__cause__, asyncio.CancelledError)
    assert sorted(runs) == {"handler": ["one"] * 4, "one of two": ["one"] * 4 + ["other"] * 2, "middleware": []}[where]


@pytest.mark.usefixtures("loop_clock")
async def test_a_handler_that_hangs_fails_after_its_timeout():
    cancelled = []

    async def hanging(event: UserJoined) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(event)
            raise

    reports = await consume(
        broker := await holding(UserJoined()), hanging, retry=quick(1, 1), handler_timeout=0.01, count=2
    )

    assert len(cancelled) == 4
    assert outcomes(reports) == ["retried", "dead_lettered"]
    assert reason_of(broker.dead_letters[0]) == "retries-exhausted: TimeoutError"


@pytest.mark.usefixtures("loop_clock")
@pytest.mark.parametrize("uncancels", [False, True])
@pytest.mark.parametrize("several", [False, True])
async def test_a_handler_that_swallows_the_cancellation_of_its_timeout_fails_too(several, uncancels):
    """It was told to stop, so its work is probably not done. An acknowledgement would lose the message."""

    async def swallowing(event: UserJoined) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if uncancels:
            asyncio.current_task().uncancel()

    handlers = [swallowing, on_joined] if several else [swallowing]
    [handled] = await consume(Scripted(body_of(JOIN)), *handlers, retry=ONCE, handler_timeout=0.01)

    assert (handled.outcome, reason_of(handled)) == ("dead_lettered", "retries-exhausted: TimeoutError")


@pytest.mark.real_time
@pytest.mark.parametrize("awaits", [False, True])
async def test_a_handler_that_blocks_the_loop_for_too_long_is_acknowledged_if_it_then_succeeds(awaits):
    """Nothing could cancel it, and its work is done. If it waits afterwards, it is cancelled there."""

    async def blocking(event: UserJoined) -> None:
        time.sleep(0.05)  # noqa: ASYNC251  # it blocks on purpose
        if awaits:
            await asyncio.sleep(5)

    [handled] = await consume(Scripted(body_of(JOIN)), blocking, retry=ONCE, handler_timeout=0.01)

    assert handled.outcome == ("dead_lettered" if awaits else "acked")


@pytest.mark.usefixtures("loop_clock")
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_the_time_limit_of_a_handler_ends_with_it(concurrency, caplog):
    """It does not cancel the wait for the next message, nor the next handler."""
    broker = MemoryMessageBroker()
    consumer, reports = consumer_of(broker, on_joined, concurrency=concurrency, handler_timeout=1)
    async with running(consumer) as run:
        for number in range(1, 4):
            await EventEmitter(message_broker=broker).emit(UserJoined())
            await until(lambda number=number: len(reports) == number)
            await asyncio.sleep(1.5)
        assert not run.done()

    assert outcomes(reports) == ["acked"] * 3
    assert not [each for each in caplog.messages if each.startswith("Exception in callback")]


@pytest.mark.parametrize(("attempt", "reason"), [(3, "undecodable"), (4, "poison-message")])
async def test_an_undecodable_message_is_a_poison_message_only_after_the_last_attempt(attempt, reason):
    broker = Scripted()
    broker.script.append(broker.delivery(b"{", attempt=attempt))
    [handled] = await consume(broker, on_joined, retry=quick(delayed_retries=0, max_crashes=2))

    assert handled.reason.partition(":")[0] == reason


@pytest.mark.parametrize(("attempt", "outcome"), [(4, "acked"), (5, "dead_lettered")])
async def test_a_poison_message_is_dead_lettered(attempt, outcome):
    runs = []

    async def counting(event: UserJoined) -> None:
        runs.append(event)

    broker = await holding(UserJoined())
    for _ in range(attempt - 1):  # a process that died
        await left_in(broker, 1)

    reports = await consume(broker, counting, retry=quick(delayed_retries=1, max_crashes=2))

    assert (outcomes(reports), reports[0].attempt) == ([outcome], attempt)
    assert len(runs) == (outcome == "acked")
    ended = "4 deliveries ended without success, more than the retry policy allows"
    expected = [f"poison-message: {ended}"] if outcome == "dead_lettered" else []
    assert [letter.reason for letter in broker.dead_letters] == expected
