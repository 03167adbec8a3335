"""What a relay decides, in plain code: what an error means, when to ask the database, and which rows it may send."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

from diator._hints import name_of
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EncodingError,
    MessageRejected,
    OutcomeUnknown,
    UsageError,
)
from diator.outbox.store import Failure, Order, Row
from diator.retrying import RetryPolicy

#: What an error of a send says: the broker is closed, the destination cannot be reached, the message can never be
#: sent, it may have arrived, or nothing that the relay knows.
Result: TypeAlias = Literal["closed", "unavailable", "rejected", "unknown", "failed"]

#: How long the relay waits before it tests a destination that was unavailable, and before it sends a message again of
#: which it does not know whether it has arrived.
PAUSES = ReconnectPolicy(first_delay=0.1, max_delay=30.0)
#: How long a message waits that failed, which with 20 attempts is about an hour in all.
RETRIES = RetryPolicy(first_delay=1.0, backoff_factor=2.0, max_delay=300.0)


def result_of(error: BaseException) -> Result:
    """Return what *error*, which a send has raised, says about the message and about its destination."""
    if isinstance(error, BrokerClosed):
        return "closed"
    if isinstance(error, MessageRejected | EncodingError):
        return "rejected"
    if isinstance(error, BrokerUnavailable | ConfigurationError | UsageError):
        return "unavailable"
    if isinstance(error, OutcomeUnknown | asyncio.CancelledError):
        return "unknown"
    return "failed"


def failure_of(row: Row, result: Result, error: BaseException, max_attempts: int) -> Failure:
    """
    Return what becomes of *row*, for which a send has raised *error*.

    A message whose outcome is unknown, or whose destination is unavailable, never dies of it: an outage may last.
    """
    kind = name_of(type(error))
    if result == "rejected":
        return Failure(position=row.position, reason=f"rejected: {kind}", retry_after=None)
    if result != "failed":
        return Failure(position=row.position, reason=f"{result}: {kind}", retry_after=PAUSES.delay(row.attempts - 1))
    if row.attempts >= max_attempts:
        return Failure(position=row.position, reason=f"retries-exhausted: {kind}", retry_after=None)
    return Failure(position=row.position, reason=f"failed: {kind}", retry_after=RETRIES.delay(row.attempts))


class Destination:
    """
    Whether the destination can be reached. While it cannot, one message after the other tests it, with growing pauses.

    Times are those of `time.monotonic`.

    Attributes:
        failures: How many tests have failed in a row, the first failure included; 0 if it can be reached.
        since: When the first of them failed.
        probe_at: When the next test may begin.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.since = self.probe_at = 0.0
        self._failed_at = self._answered_at = 0.0

    def answered(self, now: float) -> bool:
        """Note that it has answered. Return whether it could not be reached before."""
        was_away, self.failures = self.failures > 0, 0
        self._answered_at = now
        return was_away

    def has_answered_since(self, began: float) -> bool:
        """Return whether another send was answered since *began*, so that a failure says nothing of the destination."""
        return self._answered_at >= began

    def failed(self, began: float, now: float) -> bool:
        """
        Note that it could not be reached by a send that *began* then. Return whether it could be before.

        Sends that had begun before the last failure say nothing new.
        """
        if self.failures and began <= self._failed_at:
            return False
        is_new = self.failures == 0
        if is_new:
            self.since = now
        self.failures += 1
        self._failed_at = now
        self.probe_at = now + PAUSES.delay(self.failures - 1)
        return is_new


class Pace:
    """
    How long to wait for news before the next claim.

    Args:
        shortest: The first wait, in seconds. It doubles with each claim that finds nothing.
        longest: The limit of the wait.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = self._next = shortest
        self._longest = longest

    def wait_after(self, found: int, limit: int, *, next_due: float | None, was_woken: bool) -> float:
        """
        Return how long to wait after a claim that has *found* so many of at most *limit* rows.

        *was_woken*: there were news before the claim. If it finds nothing then, what was stored may wait for another
        transaction, which ends soon and silently.
        """
        if found == limit:
            return 0.0
        if found:
            self._next = self._shortest
        elif was_woken:
            self._next = self._shortest / 10
        wait = self._next * random.uniform(0.75, 1.0)  # noqa: S311  # so that relays do not ask all at once
        self._next = min(self._next * 2, self._longest)
        return wait if next_due is None else min(wait, max(next_due, 0.001))


class Results(NamedTuple):
    """The arguments of `Store.finish`."""

    sent: Sequence[int]
    untried: Sequence[int]
    failed: Sequence[Failure]


class Hand:
    """
    The rows of one claim that a relay has in its hand: it may send them, and the database waits for their results.

    Args:
        lease: The token of the claim.
        until: When the lease ends at the earliest: so long after the relay began to claim. By `time.monotonic`.
        rows: How many rows there are.
        is_probe: Whether they test a destination that was unavailable.

    Attributes:
        open: How many rows have no result yet.
        noted_at: When the first result was noted that the database does not know.
        was_reported: Whether results were put back that the database may know all the same.
    """

    def __init__(self, lease: UUID, until: float, rows: int, *, is_probe: bool = False) -> None:
        self.lease = lease
        self.until = until
        self.open = rows
        self.is_probe = is_probe
        self.noted_at = 0.0
        self.was_reported = False
        self._sent: list[int] = []
        self._untried: list[int] = []
        self._failed: list[Failure] = []

    @property
    def has_results(self) -> bool:
        """Return whether there are results that the database does not know."""
        return bool(self._sent or self._untried or self._failed)

    def may_send(self, now: float, longest: float) -> bool:
        """Return whether a send that takes *longest* would end before the lease does."""
        return now + longest <= self.until

    def sent(self, row: Row, now: float) -> None:
        """Note that *row* was sent."""
        self._note(1, now)
        self._sent.append(row.position)

    def untried(self, rows: Sequence[Row], now: float) -> None:
        """Note that *rows* were not sent, for a reason that is not theirs."""
        if rows:
            self._note(len(rows), now)
            self._untried += [row.position for row in rows]

    def failed(self, failure: Failure, now: float) -> None:
        """Note that a row was not sent."""
        self._note(1, now)
        self._failed.append(failure)

    def _note(self, rows: int, now: float) -> None:
        if not self.has_results:
            self.noted_at = now
        self.open -= rows

    def take(self) -> Results:
        """Return the results that the database does not know, which must be reported now."""
        results = Results(self._sent, self._untried, self._failed)
        self._sent, self._untried, self._failed = [], [], []
        return results

    def put_back(self, results: Results) -> None:
        """Take *results* back, which could not be reported, or whose report was not answered."""
        self.was_reported = True
        self._sent += results.sent
        self._untried += results.untried
        self._failed += results.failed


def groups(rows: Iterable[Row], order: Order) -> list[list[Row]]:
    """Return *rows* in groups that may be sent beside each other; the rows of a group one after the other."""
    keyed: dict[object, list[Row]] = {}
    for row in rows:
        key = row.message.key if order == "key" else None
        keyed.setdefault(row.position if key is None else key, []).append(row)
    return [*keyed.values()]
