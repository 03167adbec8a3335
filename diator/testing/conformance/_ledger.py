"""The ledger: a record of every message that a scenario sends and receives."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Literal, TypeAlias, cast
from uuid import UUID

from diator.brokers.base import Delivery, Gap
from diator.brokers.codec import decode
from diator.brokers.message import Message
from diator.exceptions import BrokerError, DecodingError, OutcomeUnknown
from diator.testing._suite.errors import Nonconformance

Fate: TypeAlias = Literal["attempted", "confirmed", "failed", "indeterminate"]


@dataclass(kw_only=True, eq=False)
class Sent:
    """
    One attempt to send a message. Sending the same message again is another attempt.

    Attributes:
        message: The message.
        fate: What is known of the attempt.
        began: When the attempt began.
        ended: When the fate became known; None before that.
    """

    message: Message
    fate: Fate = "attempted"
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    ended: datetime | None = None

    def end(self, fate: Fate) -> None:
        """Record *fate*, with the current time."""
        self.fate, self.ended = fate, datetime.now(UTC)

    def within(self, gaps: Sequence[Gap]) -> bool:
        """Whether the attempt overlaps one of *gaps* in time."""
        ended = self.ended or datetime.now(UTC)
        return any(gap.since <= ended and self.began <= gap.until for gap in gaps)


@dataclass(kw_only=True, eq=False)
class Received:
    """
    One delivery to a subscription.

    Attributes:
        delivery: The delivery.
        subscription: The name of the group, or the name of the subscription if it has no group.
        at: When it was received, on the monotonic clock.
        message: The decoded message; None if the body cannot be decoded.
        abandoned: Whether its subscription ended before the delivery was settled.
    """

    delivery: Delivery
    subscription: str
    at: float = field(default_factory=monotonic)
    message: Message | None = None
    abandoned: bool = False

    @classmethod
    def of(cls, delivery: Delivery, subscription: str) -> Received:
        """Decode *delivery* as a consumer would. Raise `Nonconformance` if a field has the wrong type."""
        check_delivery(delivery)
        try:
            message = decode(delivery.body, max_bytes=2**31, headers=delivery.headers)
        except DecodingError:
            message = None
        return cls(delivery=delivery, subscription=subscription, message=message)

    @property
    def id(self) -> UUID | None:
        """The id of the message; None if the body cannot be decoded."""
        return self.message.message_id if self.message else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    The deliveries to one subscription, compared with the messages sent to it. Ids are in the order of sending.

    Attributes:
        subscription: The name of the group or subscription.
        lost: Messages that were confirmed and never delivered, and that no reported gap explains.
        duplicated: Messages that were delivered again without a reason.
        explained: Messages that were delivered again with a reason: requeued, not settled, or sent twice.
        unexpected: Deliveries that were never sent to the subscription; None for a body that cannot be decoded.
        reordered: Messages whose first delivery came after the first delivery of a later message.
        expected: The messages that were sent to it.
        strangers: For each unexpected delivery, what it is.
        overtaken: For each reordered message, who overtook whom, by their places in the order of sending.
        overtook: Whether a fence, which was sent last, has arrived on a transport that promises the order of a topic.
    """

    subscription: str
    lost: Sequence[UUID] = ()
    duplicated: Sequence[UUID] = ()
    explained: Sequence[UUID] = ()
    unexpected: Sequence[UUID | None] = ()
    reordered: Sequence[UUID] = ()
    expected: Sequence[UUID] = ()
    strangers: Sequence[str] = ()
    overtaken: Sequence[str] = ()
    overtook: bool = False

    def verify(self, *, in_order: bool = False, may_lose: bool = False, may_duplicate: bool = False) -> None:
        """Raise `Nonconformance` if a message was lost, unexpected, out of order or duplicated without a reason."""
        late = ": a message that was sent after them has arrived, and ordering=destination is promised" * self.overtook
        faults = {
            f"lost{late}": () if may_lose else self._places(self.lost),
            "duplicated without a reason": () if may_duplicate else self._places(self.duplicated),
            "unexpected": self.strangers,
            "out of order": self.overtaken if in_order else (),
        }
        found = [f"{len(which)} {what} ({few(which)})" for what, which in faults.items() if which]
        if found:
            raise Nonconformance(
                f"of {_many(len(self.expected), 'message')} for {self.subscription!r}: {'; '.join(found)}"
            )

    def _places(self, ids: Sequence[UUID]) -> list[str]:
        return [f"no. {self.expected.index(each) + 1}" for each in ids]


class Ledger:
    """
    The record of one scenario.

    Attributes:
        sent: Every attempt to send, in order.
        received: Every delivery, in order.
        fenced: The subscriptions that have received a fence after everything that was sent before it.
    """

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.received: list[Received] = []
        self.fenced: set[str] = set()

    def attempt(self, message: Message) -> Sent:
        """Record that *message* is about to be sent. The caller records the fate with `Sent.end`."""
        sent = Sent(message=message)
        self.sent.append(sent)
        return sent

    def compare(self, subscription: str, expected: Iterable[Message], *, gaps: Sequence[Gap] = ()) -> Comparison:
        """
        Compare the deliveries to *subscription* with the messages that it should receive, which are *expected*.

        A message that was sent n times may be delivered n times. A message that was sent within one of the reported
        *gaps* does not count as lost.

        Raises:
            ValueError: *expected* is empty, so the comparison would prove nothing.
        """
        ids = list(dict.fromkeys(message.message_id for message in expected))
        if not ids:
            raise ValueError("a comparison without expected messages proves nothing")
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
        late = _late([places[each] for each in came if each is not None and each in places])
        unexpected = [each for each in came if each is None or each not in wanted or {*fates[each]} == {"failed"}]
        return Comparison(
            subscription=subscription,
            lost=[each for each in ids if each in sure and each not in came],
            duplicated=[each for each in ids if _unexplained(came.get(each, ()), fates[each])],
            explained=[each for each in ids if _explained(came.get(each, ()), fates[each])],
            unexpected=unexpected,
            reordered=[ids[place] for place, _ in late],
            expected=ids,
            strangers=[self._stranger(each, wanted) for each in unexpected],
            overtaken=[_overtaking(*each) for each in late],
            overtook=subscription in self.fenced,
        )

    def _stranger(self, id_: UUID | None, wanted: Collection[UUID]) -> str:
        if id_ is None:
            return "a body that is not a message"
        if id_ in wanted:
            return "one whose send failed"
        topics = [sent.message.message_name for sent in self.sent if sent.message.message_id == id_]
        return f"one that was sent to {topics[0]!r}" if topics else "one that nobody sent"

    def name_of(self, id_: UUID | None) -> str:
        """Return the place of a message in the order of sending, as `no. 3`; its id if nobody has sent it."""
        places = (place for place, sent in enumerate(self.sent, 1) if sent.message.message_id == id_)
        return next((f"no. {place}" for place in places), str(id_))

    def summary(self) -> list[str]:
        """Say how many messages were sent, with which fates, and what each subscription received."""
        texts = [f"{_many(len(self.sent), 'message')} sent ({_counts(sent.fate for sent in self.sent)})"]
        known = {sent.message.message_id for sent in self.sent}
        subscriptions: dict[str, list[Received]] = defaultdict(list)
        for received in self.received:
            subscriptions[received.subscription].append(received)
        alike: dict[str, list[str]] = defaultdict(list)
        for name, own in subscriptions.items():
            outcomes = _counts(each.delivery.outcome or "unsettled" for each in own)
            made_up = sum(each.id not in known for each in own)
            strange = f", {made_up:,} of a message that nobody sent" if made_up else ""
            alike[f"received {_many(len(own), 'delivery', 'deliveries')} ({outcomes}){strange}"].append(repr(name))
        for received_so, names in alike.items():
            texts.append(f"{few(names)} {f'({len(names)} subscriptions) ' * (len(names) > 1)}{received_so}")
        return texts


def check_delivery(delivery: Delivery) -> None:
    """Raise `Nonconformance` unless the fields of *delivery* have the types of the contract."""
    if not isinstance(cast("object", delivery), Delivery):
        raise Nonconformance(f"the iterator returned a {type(delivery).__name__}, not a Delivery", rule="Delivery")
    if type(delivery.body) is not bytes:
        raise Nonconformance(f"Delivery.body is a {type(delivery.body).__name__}, not bytes", rule="Delivery: body:")
    headers = cast("object", delivery.headers)
    if not isinstance(headers, Mapping) or not all(type(name) is type(text) is str for name, text in headers.items()):
        raise Nonconformance("Delivery.headers is not a mapping of texts to texts", rule="Delivery: headers:")
    check_attempt(delivery.attempt)


def check_attempt(attempt: int) -> None:
    """Raise `Nonconformance` unless *attempt* can be the number of a delivery, 1 or more."""
    if type(cast("object", attempt)) is not int or attempt < 1:
        raise Nonconformance(
            f"Delivery.attempt is {attempt!r}; it is 1 for the first delivery", rule="Delivery: attempt:"
        )


def fate_of(error: BaseException) -> Fate:
    """Return the fate of a message whose send raised *error*. Only a broker error of diator can mean that it failed."""
    if isinstance(error, OutcomeUnknown) or not isinstance(error, BrokerError):
        return "indeterminate"
    return "failed"


def _explained(came: Sequence[Received], fates: Sequence[Fate]) -> bool:
    return len(came) > len(fates) and not _unexplained(came, fates)


def _unexplained(came: Sequence[Received], fates: Sequence[Fate]) -> bool:
    """Whether a message was delivered more often than it was sent, requeued and abandoned."""
    requeued = sum(each.delivery.outcome == "retry" or each.abandoned for each in came[:-1])
    return len(came) > len(fates) + requeued


def difference(came: Sequence[object], sent: Sequence[object]) -> str:
    """Say what is missing, what came twice and who overtook whom, by the places of the messages in *sent*."""
    first = list(dict.fromkeys(came))
    faults = {
        "missing": [f"no. {place}" for place, each in enumerate(sent, 1) if each not in came],
        "came again": [f"no. {sent.index(each) + 1}" for each in first if came.count(each) > 1],
        "overtaken": [_overtaking(*each) for each in _late([sent.index(each) for each in first])],
    }
    return "; ".join(f"{len(found)} {what} ({few(found)})" for what, found in faults.items() if found)


def _late(places: Sequence[int]) -> list[tuple[int, int]]:
    """Return each place that came after a later one, with the latest of those."""
    late: list[tuple[int, int]] = []
    furthest = -1
    for place in places:
        if place < furthest:
            late.append((place, furthest))
        furthest = max(furthest, place)
    return late


def _overtaking(late: int, earlier: int) -> str:
    return f"no. {late + 1} came after no. {earlier + 1}"


def few(texts: Sequence[str]) -> str:
    """Return the first of *texts* as a list in a sentence, equal ones as one."""
    texts = [text if number == 1 else f"{number:,} times {text}" for text, number in Counter(texts).items()]
    return ", ".join(texts if len(texts) <= _FEW else [*texts[:_FEW], "…"])


def _many(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{number:,} {word}" for word, number in Counter(words).items()) or "none"


# -- texts for a person ------------------------------------------------------------------------------------------

_FEW = 3
_MOST_CHARACTERS, _MOST_ITEMS = 120, 12


def contrast(found: object, wanted: object, name: Callable[[UUID], str] = str) -> str:
    """Say in which point *found* differs from *wanted*. *name* returns the name of a message, from its id."""
    if is_dataclass(found) and type(found) is type(wanted):
        values = [(each.name, getattr(found, each.name), getattr(wanted, each.name)) for each in fields(found)]
        return "; ".join(f"{each}: {contrast(own, right, name)}" for each, own, right in values if own != right)
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        faults = {
            "missing": [f"{_shown(key, name)}" for key in wanted if key not in found],
            "added": [f"{_shown(key, name)}" for key in found if key not in wanted],
            "different": [
                f"{_shown(key, name)}: {contrast(found[key], wanted[key], name)}"
                for key in wanted
                if key in found and found[key] != wanted[key]
            ],
        }
        return "; ".join(f"{len(keys)} {what} ({few(keys)})" for what, keys in faults.items() if keys)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted) and _is_long(wanted):
        unlike = [(place, *pair) for place, pair in enumerate(zip(found, wanted, strict=True), 1) if pair[0] != pair[1]]
        place, own, right = unlike[0]
        return f"{len(unlike)} of {len(wanted)} differ, the first is no. {place}: {contrast(own, right, name)}"
    if isinstance(found, str) and isinstance(wanted, str) and _is_long(wanted):
        return _unlike(found, wanted)
    if isinstance(found, bytes) and isinstance(wanted, bytes) and _is_long(wanted):
        return _unlike(found, wanted)
    return f"got {_shown(found, name)}, expected {_shown(wanted, name)}"


def _unlike(found: str | bytes, wanted: str | bytes) -> str:
    pairs = enumerate(zip(found, wanted, strict=False))
    same = next((place for place, (own, right) in pairs if own != right), min(len(found), len(wanted)))
    around = slice(max(0, same - 20), same + 20)
    where = f"{len(found):,} instead of {len(wanted):,} long, " * (len(found) != len(wanted))
    return f"{where}different from position {same} on: got …{found[around]!r}…, expected …{wanted[around]!r}…"


def _is_long(value: object) -> bool:
    return len(repr(value)) > _MOST_CHARACTERS


def _shown(value: object, name: Callable[[UUID], str]) -> str:
    """Return *value* as a short text, with the names of messages instead of their ids."""
    if isinstance(value, UUID):
        return name(value)
    if isinstance(value, Message):
        return f"the message {name(value.message_id)}"
    if isinstance(value, list | tuple | AbstractSet):
        texts = [_shown(each, name) for each in value]
        if isinstance(value, AbstractSet):
            texts.sort()
        begin, end = "()" if isinstance(value, tuple) else "{}" if isinstance(value, AbstractSet) else "[]"
        shown = ", ".join(texts if len(texts) <= _MOST_ITEMS else [*texts[:_MOST_ITEMS], f"… ({len(texts):,})"])
        return f"{begin}{shown}{end}"
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}… ({len(text):,} characters)"
