"""What a transport can promise, as ordered levels. A program compares them with what it needs when it is wired."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from diator.exceptions import UnsupportedCapability

Guarantee: TypeAlias = Literal["at_most_once", "at_least_once"]
Receipt: TypeAlias = Literal["none", "accepted", "durable"]
Settlement: TypeAlias = Literal["none", "cumulative", "individual"]
Count: TypeAlias = Literal["none", "retries", "exact"]
Ordering: TypeAlias = Literal["none", "key", "destination"]
Subscription: TypeAlias = Literal["ephemeral", "durable"]
Replay: TypeAlias = Literal["none", "earliest", "position"]
Durability: TypeAlias = Literal["none", "restart", "crash"]
Unroutable: TypeAlias = Literal["dropped", "retained", "reported"]
Headers: TypeAlias = Literal["envelope", "native"]
Backpressure: TypeAlias = Literal["none", "prefetch", "pull"]
Redelivery: TypeAlias = AbstractSet[Literal["retry", "close", "crash", "deadline"]]
Distribution: TypeAlias = AbstractSet[Literal["broadcast", "competing"]]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """
    What a transport promises. Every level is the weakest unless it is said, so that what is not said is not promised.

    The same record says what a program needs: what is not said is not asked for.
    """

    guarantee: Guarantee = "at_most_once"
    """How often a message reaches a subscription, end to end, under the faults that the transport survives."""
    receipt: Receipt = "none"
    """What a send that returned proves: nothing; the service has the message; it has stored it."""
    settlement: Settlement = "none"
    """What can be acknowledged. Cumulative: what was settled out of order may come again after a restart."""
    redelivery: Redelivery = frozenset()
    """What makes a delivery that was not acknowledged available again."""
    redelivery_bound: float | None = None
    """Within how many seconds that happens after a crash. Told to programs, not compared."""
    delayed_retry: bool = False
    dead_letter: bool = False
    delivery_count: Count = "none"
    """What `Delivery.attempt` counts: nothing; each time it was given back; also deliveries that nobody settled."""
    ordering: Ordering = "none"
    """Within what the order of sends is the order of first deliveries, for one consumer."""
    ordered_retry: bool = False
    """Given back, a message holds up those behind it (of its key, where that is the order), so that order is kept."""
    distribution: Distribution = frozenset()
    """Broadcast: every subscription gets every message. Competing: one member of a group gets it."""
    subscription: Subscription = "ephemeral"
    """What becomes of messages while no member of a group is there: they are missed, or wait."""
    replay: Replay = "none"
    """Where a new group may begin: now; at the oldest message; anywhere."""
    durability: Durability = "none"
    """What confirmed messages survive: nothing; an orderly restart of the service; the death of its process."""
    unroutable: Unroutable = "dropped"
    """What becomes of a message that has nobody to go to; reported is `MessageUnroutable`."""
    headers: Headers = "envelope"
    """Where headers travel: in the body, or as the service's own."""
    backpressure: Backpressure = "none"
    """How a slow consumer holds the flow. None: what it cannot take is lost."""
    max_message_bytes: int = 0
    """How large an encoded message may be, in bytes."""
    multi_process: bool = False
    network: bool = False
    """Whether there is a link that can fail. Told to the conformance suite, not compared."""

    def lacking(self, needed: Capabilities) -> list[str]:
        """Name what *needed* asks for and these capabilities do not promise, as `name (has, needed is needs)`."""
        return [
            f"{field.name} ({_said(getattr(self, field.name))}, needed is {_said(getattr(needed, field.name))})"
            for field in fields(self)
            if field.name not in _NOT_COMPARED
            and not _rank(field.name, getattr(self, field.name)) >= _rank(field.name, getattr(needed, field.name))
        ]


_NOT_COMPARED = frozenset({"redelivery_bound", "network"})
_LEVELS: dict[str, tuple[str, ...]] = {
    "guarantee": get_args(Guarantee),
    "receipt": get_args(Receipt),
    "settlement": get_args(Settlement),
    "delivery_count": get_args(Count),
    "ordering": get_args(Ordering),
    "subscription": get_args(Subscription),
    "replay": get_args(Replay),
    "durability": get_args(Durability),
    "unroutable": get_args(Unroutable),
    "headers": get_args(Headers),
    "backpressure": get_args(Backpressure),
}


def require(broker: object, promised: Capabilities, needed: Capabilities, *, for_: str, remedy: str) -> None:
    """Raise `UnsupportedCapability` unless what is *promised* by *broker* covers what is *needed*."""
    if lacks := promised.lacking(needed):
        raise UnsupportedCapability(type(broker).__name__, lacks, why=for_, remedy=remedy)


def _rank(name: str, level: object) -> Any:
    return _LEVELS[name].index(str(level)) if name in _LEVELS else level


def _said(level: object) -> str:
    return "{" + ", ".join(sorted(map(str, level))) + "}" if isinstance(level, AbstractSet) else str(level)
