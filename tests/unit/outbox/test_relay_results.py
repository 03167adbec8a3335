"""What a relay decides, without an event loop."""

import asyncio
from datetime import UTC, datetime
from uuid import UUID

import pytest

from diator.brokers import Message
from diator.exceptions import (
    AccessRefused,
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    MessageRejected,
    MessageTooLarge,
    MessageUnroutable,
    OutcomeUnknown,
    UsageError,
)
from diator.outbox._results import PAUSES, Destination, Hand, Pace, Results, failure_of, groups, result_of
from diator.outbox.store import Failure, Row


def row(position, key=None, attempts=1):
    message = Message.create(message_name="Counted", payload={}, message_id=UUID(int=position), key=key)
    return Row(position=position, message=message, attempts=attempts, stored_at=datetime(2030, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (BrokerUnavailable("no"), "unavailable"),
        (AccessRefused("no"), "unavailable"),
        (ConfigurationError("no"), "unavailable"),
        (UsageError("no"), "unavailable"),
        (BrokerClosed("no"), "closed"),
        (MessageRejected("no"), "rejected"),
        (MessageTooLarge(2, 1), "rejected"),
        (EncodingError("a.b", "no"), "rejected"),
        (OutcomeUnknown("no"), "unknown"),
        (asyncio.CancelledError(), "unknown"),
        (MessageUnroutable("no"), "failed"),
        (ConnectionError("no"), "failed"),
        (TimeoutError(), "failed"),
        (KeyError("no"), "failed"),
    ],
)
def test_each_error_has_a_result(error, result):
    assert result_of(error) == result


def test_a_message_that_fails_is_tried_so_often_with_growing_pauses():
    pauses = []
    for attempts in range(1, 20):
        failure = failure_of(row(7, attempts=attempts), "failed", MessageUnroutable("secret"), max_attempts=20)
        assert (failure.position, failure.reason) == (7, "failed: MessageUnroutable")
        pauses.append(failure.retry_after)
    last = failure_of(row(7, attempts=20), "failed", MessageUnroutable("secret"), max_attempts=20)

    limits = [min(2**n, 300) for n in range(19)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))
    assert last == Failure(position=7, reason="retries-exhausted: MessageUnroutable", retry_after=None)


def test_a_message_that_was_rejected_is_dead_at_once():
    failure = failure_of(row(7), "rejected", MessageTooLarge(2, 1), max_attempts=20)

    assert failure == Failure(position=7, reason="rejected: MessageTooLarge", retry_after=None)


@pytest.mark.parametrize("result", ["unknown", "unavailable"])
def test_an_outage_kills_no_message(result):
    failure = failure_of(row(7, attempts=1_000), result, OutcomeUnknown("no"), max_attempts=20)

    assert failure.reason == f"{result}: OutcomeUnknown"
    assert failure.retry_after is not None
    assert failure.retry_after <= 30


def test_a_destination_that_fails_is_tested_after_growing_pauses(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda _, longest: longest)
    destination, now, pauses = Destination(), 100.0, []
    for attempt in range(12):
        assert destination.failed(now, now + 0.5) is (attempt == 0)
        assert destination.failures == attempt + 1
        pauses.append(destination.probe_at - (now + 0.5))
        now = destination.probe_at

    assert pauses == pytest.approx([*(0.1 * 2**n for n in range(9)), 30, 30, 30])
    assert destination.since == 100.5
    assert destination.answered(now)
    assert not destination.answered(now)
    assert destination.failures == 0


def test_sends_that_had_begun_before_an_outage_make_no_longer_pause():
    destination = Destination()
    assert destination.failed(began=1.0, now=2.0)
    probe_at = destination.probe_at
    assert not destination.failed(began=1.5, now=3.0)
    assert not destination.failed(began=2.0, now=3.0)

    assert (destination.failures, destination.probe_at) == (1, probe_at)


def test_the_pause_is_random():
    assert len({PAUSES.delay(9) for _ in range(10)}) > 1


def test_an_answer_since_the_begin_of_a_send_is_known():
    destination = Destination()
    assert not destination.has_answered_since(1.0)
    destination.answered(2.0)

    assert destination.has_answered_since(1.0)
    assert not destination.has_answered_since(2.5)


def waits(pace, *found, limit=100, next_due=None, was_woken=False):
    return [pace.wait_after(each, limit, next_due=next_due, was_woken=was_woken) for each in found]


def test_the_wait_grows_while_nothing_is_found(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda _, longest: longest)
    pace = Pace(0.05, 5.0)

    assert waits(pace, *[0] * 9) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert waits(pace, 100) == [0]
    assert waits(pace, 0) == [5]
    assert waits(pace, 99, 0) == [0.05, 0.1]


def test_the_wait_is_random():
    assert len({Pace(1.0, 5.0).wait_after(0, 1, next_due=None, was_woken=False) for _ in range(10)}) > 1
    assert all(0.5 <= each <= 1 for _ in range(10) for each in waits(Pace(1.0, 5.0), 0))


def test_the_wait_ends_when_the_next_row_becomes_due():
    assert waits(Pace(1.0, 5.0), 0, next_due=0.2) == [0.2]
    assert waits(Pace(1.0, 5.0), 0, next_due=0.0) == [0.001]
    assert waits(Pace(1.0, 5.0), 0, next_due=9.0)[0] <= 1


def test_news_of_which_nothing_is_found_shorten_the_wait(monkeypatch):
    """What was stored may wait for another transaction, and nobody tells when that ends."""
    monkeypatch.setattr("random.uniform", lambda _, longest: longest)
    pace = Pace(0.05, 5.0)
    waits(pace, *[0] * 9)

    assert waits(pace, 0, was_woken=True) == pytest.approx([0.005])
    assert waits(pace, 0, 0) == pytest.approx([0.01, 0.02])


def test_rows_are_sent_only_if_the_lease_outlasts_the_send():
    hand = Hand(UUID(int=1), until=130.0, rows=1)

    assert hand.may_send(119.0, 11.0)
    assert not hand.may_send(119.1, 11.0)


def test_a_hand_keeps_its_results_until_the_database_knows_them():
    hand = Hand(UUID(int=1), until=130.0, rows=5)
    failure = Failure(position=2, reason="failed: KeyError", retry_after=1.0)
    hand.untried([], 9.0)
    assert not hand.has_results
    hand.sent(row(1), 10.0)
    hand.failed(failure, 11.0)
    hand.untried([row(3), row(4)], 12.0)

    assert (hand.open, hand.noted_at, hand.has_results) == (1, 10, True)
    results = hand.take()
    assert results == Results([1], [3, 4], [failure])
    assert not hand.has_results
    hand.sent(row(5), 20.0)
    hand.put_back(results)
    assert hand.take() == Results([5, 1], [3, 4], [failure])
    assert hand.open == 0


def test_rows_are_grouped_by_their_key():
    rows = [row(1, "a"), row(2), row(3, "b"), row(4, "a"), row(5), row(6, "1")]

    assert [[each.position for each in group] for group in groups(rows, "key")] == [[1, 4], [2], [3], [5], [6]]
    assert [[each.position for each in group] for group in groups(rows, "none")] == [[n] for n in range(1, 7)]
