"""Every message is accounted for: what was tried, what was confirmed, what came, and why it came twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Literal, TypeAlias
from uuid import UUID

from diator.brokers.base import Delivery, Gap
from diator.brokers.codec import decode
from diator.brokers.message import Message
from diator.exceptions import BrokerError, DecodingError, OutcomeUnknown

Fate: TypeAlias = Literal["attempted", "confirmed", "failed", "indeterminate"]


class Nonconformance(AssertionError):
    """The transport did not do what its contract says."""


class NotApplicable(Exception):
    """There is nothing that a scenario could prove of this transport."""


@dataclass(kw_only=True, eq=False)
class Sent:
    """A message, and what became of sending it. A repeat of one id is another one of these."""

    message: Message
    fate: Fate = "attempted"
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    ended: datetime | None = None

    def end(self, fate: Fate) -> None:
        """Note what became of it, and that this is known now."""
        self.fate, self.ended = fate, datetime.now(UTC)

    def within(self, gaps: Sequence[Gap]) -> bool:
        """Whether some of the time of its sending is in one of *gaps*."""
        ended = self.ended or datetime.now(UTC)
        return any(gap.since <= ended and self.began <= gap.until for gap in gaps)


@dataclass(kw_only=True, eq=False)
class Received:
    """One delivery, as it came to a subscription."""

    delivery: Delivery
    subscription: str
    """Who it was for: the name of the group, or of the subscription that has none."""
    at: float = field(default_factory=monotonic)
    message: Message | None = None
    """None if the body is no message."""
    abandoned: bool = False
    """Whether its subscription ended before it was settled."""

    @classmethod
    def of(cls, delivery: Delivery, subscription: str) -> Received:
        """Read *delivery* as a consumer would."""
        try:
            message = decode(delivery.body, max_bytes=2**31, headers=delivery.headers)
        except DecodingError:
            message = None
        return cls(delivery=delivery, subscription=subscription, message=message)

    @property
    def id(self) -> UUID | None:
        """The id of the message, if it is one."""
        return self.message.message_id if self.message else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the deliveries to one subscription were, held against what was sent to it. In the order of sending."""

    subscription: str
    lost: Sequence[UUID] = ()
    """Confirmed, never delivered, and in no gap that was told."""
    duplicated: Sequence[UUID] = ()
    """Delivered again, and nothing that would explain it."""
    explained: Sequence[UUID] = ()
    """Delivered again because it was given back, not settled, or perhaps sent twice."""
    unexpected: Sequence[UUID | None] = ()
    """Delivered, and never sent to it; None where the body is no message at all."""
    reordered: Sequence[UUID] = ()
    """First delivered after one that was sent later."""

    def verify(self, *, in_order: bool = False, may_lose: bool = False, may_duplicate: bool = False) -> None:
        """Raise `Nonconformance` unless each message came, once or with an explanation, and nothing else did."""
        faults = {
            "lost": () if may_lose else self.lost,
            "duplicated without a reason": () if may_duplicate else self.duplicated,
            "unexpected": self.unexpected,
            "out of order": self.reordered if in_order else (),
        }
        if found := [f"{len(ids)} {what} ({_few(ids)})" for what, ids in faults.items() if ids]:
            raise Nonconformance(f"of what {self.subscription!r} should have received: {'; '.join(found)}")


class Ledger:
    """The books of one scenario."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.received: list[Received] = []

    def attempt(self, message: Message) -> Sent:
        """Note that *message* is about to be sent; the caller says what became of it."""
        sent = Sent(message=message)
        self.sent.append(sent)
        return sent

    def compare(self, subscription: str, expected: Iterable[Message], *, gaps: Sequence[Gap] = ()) -> Comparison:
        """
        Compare what came to *subscription* with the messages that it was entitled to, which are *expected*.

        One that was sent n times may come n times. What was sent in one of *gaps*, which the subscription was told of,
        is not lost but missed. Raises ValueError if there are none: that would prove nothing.
        """
        ids = list(dict.fromkeys(message.message_id for message in expected))
        if not ids:
            raise ValueError("a verdict on no messages at all proves nothing")
        fates: dict[UUID, list[Fate]] = defaultdict(list)
        sure: set[UUID] = set()
        for sent in self.sent:
            fates[sent.message.message_id].append(sent.fate)
            if sent.fate == "confirmed" and not sent.within(gaps):
                sure.add(sent.message.message_id)
        came: dict[UUID | None, list[Received]] = defaultdict(list)
        for received in self.received:
            if received.subscription == subscription:
                came[received.id].append(received)
        wanted = {*ids}
        places = {each: place for place, each in enumerate(ids)}
        return Comparison(
            subscription=subscription,
            lost=[each for each in ids if each in sure and each not in came],
            duplicated=[each for each in ids if _unexplained(came.get(each, ()), fates[each])],
            explained=[each for each in ids if _explained(came.get(each, ()), fates[each])],
            unexpected=[each for each in came if each is None or each not in wanted or {*fates[each]} == {"failed"}],
            reordered=_late([places[each] for each in came if each is not None and each in places], ids),
        )


def fate_of(error: BaseException) -> Fate:
    """What a send that raised *error* says about the message: only a verdict of the contract tells that it failed."""
    if isinstance(error, OutcomeUnknown) or not isinstance(error, BrokerError):
        return "indeterminate"
    return "failed"


def _explained(came: Sequence[Received], fates: Sequence[Fate]) -> bool:
    return len(came) > len(fates) and not _unexplained(came, fates)


def _unexplained(came: Sequence[Received], fates: Sequence[Fate]) -> bool:
    """Whether one came more often than it was sent and given back."""
    given_back = sum(each.delivery.outcome == "retry" or each.abandoned for each in came[:-1])
    return len(came) > len(fates) + given_back


def _late(places: Sequence[int], ids: Sequence[UUID]) -> list[UUID]:
    """Give the ids whose place is before that of one which came earlier."""
    late: list[UUID] = []
    furthest = -1
    for place in places:
        if place < furthest:
            late.append(ids[place])
        furthest = max(furthest, place)
    return late


def _few(ids: Sequence[UUID | None]) -> str:
    shown = ", ".join(str(each) for each in ids[:3])
    return f"{shown}, …" if len(ids) > 3 else shown  # noqa: PLR2004
