"""What a transport can promise, as ordered levels. A program compares them with what it needs when it is wired."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from diator.exceptions import ConfigurationError, UnsupportedCapability

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

    The same record says what a program needs: what is not said is not asked for. Levels are ordered, from weak to
    strong, as they are declared above; a stronger one promises the weaker ones too. What a transport does not promise,
    it refuses where somebody asks for it (`require`), and never does something weaker instead.
    """

    guarantee: Guarantee = "at_most_once"
    """
    How often a message reaches a subscription, end to end, under the faults that the transport survives.

    At least once takes settlement and a receipt; at most once, nothing comes a second time by the transport's doing.
    """
    receipt: Receipt = "none"
    """What a send that returned proves: nothing; the service has the message; it has stored it."""
    settlement: Settlement = "none"
    """
    What can be acknowledged. None: `ack` does nothing. Cumulative: what was settled out of order may come again after a
    restart.
    """
    redelivery: Redelivery = frozenset()
    """
    What makes a delivery that was not acknowledged available to its group again.

    `retry`: `Delivery.retry`, as often as it is called. `close`: the end of its subscription, at once. `crash`: the
    death of the process that held it. `deadline`: its holder lives, and has not renewed its lease; one that renews it
    keeps the delivery, however long a handler takes.
    """
    redelivery_bound: float | None = None
    """Within how many seconds that happens after a crash or a deadline. Told to programs, not compared."""
    delayed_retry: bool = False
    """
    Whether `retry` can wait; what comes behind does not wait for it, unless by `ordered_retry`. Without, an *after*
    above 0 is refused.
    """
    dead_letter: bool = False
    """Whether a message can be put aside: kept as it was, with the reason, where its group does not read."""
    delivery_count: Count = "none"
    """
    What `Delivery.attempt` counts: nothing; each time it was given back; also deliveries that nobody settled.

    It belongs to the message in its group, not to the member, and what was never given out does not count. Of what a
    member had received when its process died, nobody can tell what it had given out: all of it may count.
    """
    ordering: Ordering = "none"
    """
    Within what the order of sends is the order of first deliveries, for one consumer. What comes again may come later.

    Destination: all that goes to one topic. Key: what has the same `Message.key`.
    """
    ordered_retry: bool = False
    """
    Whether a message that was given back comes again before what is behind it: of its key, or without one of nothing.

    What is behind it waits meanwhile, so that the order of first deliveries is that of the work.
    """
    distribution: Distribution = frozenset()
    """Broadcast: every subscription gets every message. Competing: one member of a group gets it."""
    subscription: Subscription = "ephemeral"
    """What becomes of messages while no member of a group is there: they are missed, or wait."""
    replay: Replay = "none"
    """
    Where a new group begins, or may: now; at the oldest message; anywhere.

    Now, but for what was `retained` because nobody was there: that goes to the first group that comes; where there are
    no groups, to the first subscription.
    """
    durability: Durability = "none"
    """What confirmed messages survive: nothing; an orderly restart of the service; the death of its process."""
    unroutable: Unroutable = "dropped"
    """What becomes of a message that has nobody to go to: gone; kept, see `replay`; `MessageUnroutable`."""
    headers: Headers = "envelope"
    """Where headers travel: in the body, or as the service's own."""
    backpressure: Backpressure = "none"
    """
    How a slow consumer holds the flow. None: what it cannot take is lost, and *prefetch* bounds nothing.

    Prefetch: the service gives no more than so many at a time. Pull: it gives what is asked for.
    """
    max_message_bytes: int = 0
    """How large an encoded message may be, in bytes: exactly that many arrive, one more is `MessageTooLarge`."""
    multi_process: bool = False
    """Whether senders and readers may be in different processes. That takes a `network`, if only a file."""
    network: bool = False
    """Whether there is a link that can fail. Told to the conformance suite, not compared."""

    def __post_init__(self) -> None:
        """Raise `ConfigurationError` for a level that there is not."""
        for name, levels in _LEVELS.items():
            if (level := getattr(self, name)) not in levels:
                raise ConfigurationError(f"{name} is one of {', '.join(levels)}, and not {level!r:.80}")

    def missing(self, needed: Capabilities) -> list[str]:
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
    """
    Raise `UnsupportedCapability` unless what is *promised* by *broker* covers what is *needed*.

    The error says what is lacking, which call needs it (*for_*), and what can be done instead (*remedy*).
    """
    if lacks := promised.missing(needed):
        raise UnsupportedCapability(type(broker).__name__, lacks, why=for_, remedy=remedy)


def _rank(name: str, level: object) -> Any:
    return _LEVELS[name].index(str(level)) if name in _LEVELS else level


def _said(level: object) -> str:
    return "{" + ", ".join(sorted(map(str, level))) + "}" if isinstance(level, AbstractSet) else str(level)
