"""Tests of the ledger: which messages are lost, and which were missed in a reported gap."""

from datetime import timedelta

from diator.brokers.base import Gap
from diator.brokers.message import Message
from diator.testing.conformance import Ledger

SECOND = timedelta(seconds=1)


def sent(ledger, fate, message=None):
    message = message or Message.create(message_type="notification_event", message_name="happened", payload={})
    attempt = ledger.attempt(message)
    attempt.end(fate)
    return attempt


def lost(ledger, attempt, *gaps):
    return [*ledger.compare("reader", [attempt.message], gaps=gaps).lost]


def test_a_message_confirmed_outside_of_every_gap_is_lost():
    ledger = Ledger()
    attempt = sent(ledger, "confirmed")
    before = Gap(since=attempt.began - 3 * SECOND, until=attempt.began - 2 * SECOND, reason="")
    after = Gap(since=attempt.ended + 2 * SECOND, until=attempt.ended + 3 * SECOND, reason="")

    assert lost(ledger, attempt) == lost(ledger, attempt, before, after) == [attempt.message.message_id]


def test_a_message_sent_within_a_gap_is_not_lost():
    ledger = Ledger()
    attempt = sent(ledger, "confirmed")
    around = Gap(since=attempt.began - SECOND, until=attempt.ended + SECOND, reason="")

    assert lost(ledger, attempt, around) == []


def test_a_message_resent_after_the_gap_is_lost():
    ledger = Ledger()
    first = sent(ledger, "indeterminate")
    gap = Gap(since=first.began - SECOND, until=first.ended, reason="")
    second = sent(ledger, "confirmed", first.message)
    second.began = second.ended = first.ended + SECOND

    assert lost(ledger, second, gap) == [first.message.message_id]
