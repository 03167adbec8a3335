"""The promises of a transport, as ordered levels. A program compares them with its needs at start-up."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from diator._options import word
from diator.exceptions import ConfigurationError, UnsupportedCapability

# The levels of each capability, from weak to strong.
Guarantee: TypeAlias = Literal["at_most_once", "at_least_once"]
Receipt: TypeAlias = Literal["none", "accepted", "durable"]
Settlement: TypeAlias = Literal["none", "cumulative", "individual"]
Count: TypeAlias = Literal["none", "retries", "deliveries", "exact"]
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
    The promises of a transport, or the needs of a program.

    Each field defaults to its weakest level, so that a transport promises, and a program needs, only declared levels.
    The levels are ordered from weak to strong; a level includes the promises of all weaker levels. If a program needs a
    level that its transport does not promise, `require` raises an error. A transport never does something weaker
    instead.

    Some promises need others, such as `at_least_once` a settlement; `contradictions` lists those that are not made. A
    program may need a single level.

    Attributes:
        guarantee: How often a message reaches a subscription, end to end, under the faults that the transport survives.
            `at_least_once` needs a settlement and a receipt. With `at_most_once`, the transport itself never delivers a
            message twice.
        receipt: What a send that has returned proves. `none`: nothing. `accepted`: the service has the message.
            `durable`: the service has stored it.
        settlement: What can be acknowledged. `none`: `ack` does nothing. `cumulative`: deliveries that were settled out
            of order may be redelivered after a restart. `individual`: each delivery on its own.
        redelivery: What makes an unacknowledged delivery available to its group again. `retry`: a call of
            `Delivery.retry`, any number of times. `close`: the end of its subscription, at once. `crash`: the death of
            the process that held it. `deadline`: its holder is alive but has not renewed the lease. A holder that
            renews the lease keeps the delivery, however long the handler runs.
        redelivery_bound: The longest time until a redelivery after a crash or a deadline, in seconds. For information;
            not compared.
        delayed_retry: Whether `Delivery.retry` can delay the redelivery. The messages behind it do not wait, unless
            `ordered_retry` is true. A transport without it refuses an *after* above 0.
        dead_letter: Whether a message can be dead-lettered: kept unchanged, with the reason, where its group does not
            read.
        delivery_count: What `Delivery.attempt` counts. `none`: nothing. `retries`: how often the message was requeued.
            `deliveries`: also the deliveries that nobody settled, as the service counts them: a message that was
            prefetched and never handed out may count too. `exact`: only deliveries that were handed out, also if the
            connection is lost, with one exception: after a process has died, every message that it had prefetched may
            count as delivered. The count belongs to the message and its group, not to one consumer.
        ordering: Where first deliveries keep the order of the sends, for one consumer. `key`: among the messages with
            the same `Message.key`. `destination`: among all messages of one topic. A redelivery may come later.
        ordered_retry: Whether a requeued message is redelivered before the later messages with the same key. These
            messages wait for it, so the messages of a key are handled in the order of their first deliveries. No
            message waits for a message without a key.
        distribution: Who receives a message. `broadcast`: every subscription without a group. `competing`: one consumer
            of each group.
        subscription: What happens to messages while a group has no consumer. `ephemeral`: the group misses them.
            `durable`: they wait for its next consumer.
        replay: Where a new group starts, or can start. `none`: now. `earliest`: at the oldest stored message.
            `position`: anywhere. With `none` there is one exception: messages that are `retained` because nobody was
            subscribed go to the first group that subscribes, before all later ones, or, on a transport without groups,
            to the first subscription.
        durability: What confirmed messages survive. `none`: nothing. `restart`: an orderly restart of the service.
            `crash`: the death of the service's process.
        unroutable: What happens to a message when no group or subscription exists for it. `dropped`: it is lost.
            `retained`: it is kept for the first group that subscribes, or refused if there is no room for it.
            `reported`: the send raises `MessageUnroutable`.
        headers: Where headers are sent. `envelope`: inside the body. `native`: as the service's own headers.
        backpressure: How a slow consumer limits the flow. `none`: messages that it cannot take are lost, and *prefetch*
            limits nothing. `prefetch`: the service sends at most *prefetch* unsettled messages. `pull`: the service
            sends only messages that the consumer asks for.
        max_message_bytes: The size limit of an encoded message, in bytes. A message of exactly this size is delivered;
            one byte more raises `MessageTooLarge`.
        multi_process: Whether senders and consumers may run in different processes. This needs a `network`, even if
            that is only a file.
        network: Whether there is a link that can fail. The conformance suite uses it; not compared.

    Raises:
        ConfigurationError: A level does not exist.
    """

    guarantee: Guarantee = "at_most_once"
    receipt: Receipt = "none"
    settlement: Settlement = "none"
    redelivery: Redelivery = frozenset()
    redelivery_bound: float | None = None
    delayed_retry: bool = False
    dead_letter: bool = False
    delivery_count: Count = "none"
    ordering: Ordering = "none"
    ordered_retry: bool = False
    distribution: Distribution = frozenset()
    subscription: Subscription = "ephemeral"
    replay: Replay = "none"
    durability: Durability = "none"
    unroutable: Unroutable = "dropped"
    headers: Headers = "envelope"
    backpressure: Backpressure = "none"
    max_message_bytes: int = 0
    multi_process: bool = False
    network: bool = False

    def __post_init__(self) -> None:
        """Check that each level exists."""
        for name, levels in _LEVELS.items():
            if (level := getattr(self, name)) not in levels:
                raise ConfigurationError(f"{name} must be one of {', '.join(levels)}; got {word(level)}")
        for name, words in _SETS.items():
            found: object = getattr(self, name)
            if not isinstance(found, AbstractSet) or not found <= words:
                raise ConfigurationError(f"{name} must be a set of {', '.join(sorted(words))}; got {found!r:.80}")

    def contradictions(self) -> list[str]:
        """Return the rules that a transport with these promises breaks; empty if each promise can be kept."""
        return [rule for rule, is_kept in _RULES.items() if not is_kept(self)]

    def missing(self, needed: Capabilities) -> list[str]:
        """
        Return the capabilities that are *needed* and not promised here, each as `name (has, needed is needs)`.

        The list is empty if these capabilities cover *needed*. It has the order of the fields.
        """
        return [
            f"{field.name} ({_text(getattr(self, field.name))}, needed is {_text(getattr(needed, field.name))})"
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


_SETS: dict[str, frozenset[str]] = {
    "redelivery": frozenset({"retry", "close", "crash", "deadline"}),
    "distribution": frozenset({"broadcast", "competing"}),
}

#: Which promise needs which other one.
_RULES: dict[str, Callable[[Capabilities], bool]] = {
    "guarantee at_least_once needs a settlement": lambda promised: (
        promised.guarantee == "at_most_once" or promised.settlement != "none"
    ),
    "guarantee at_least_once needs a receipt": lambda promised: (
        promised.guarantee == "at_most_once" or promised.receipt != "none"
    ),
    "redelivery needs a settlement": lambda promised: not promised.redelivery or promised.settlement != "none",
    "redelivery after a crash or a deadline needs a redelivery_bound": lambda promised: (
        not {"crash", "deadline"} & promised.redelivery or promised.redelivery_bound is not None
    ),
    "delayed_retry needs the redelivery retry": lambda promised: (
        not promised.delayed_retry or "retry" in promised.redelivery
    ),
    "ordered_retry needs the redelivery retry and an ordering": lambda promised: (
        not promised.ordered_retry or ("retry" in promised.redelivery and promised.ordering != "none")
    ),
    "delivery_count needs a redelivery": lambda promised: (
        promised.delivery_count == "none" or bool(promised.redelivery)
    ),
    "a durable subscription needs the distribution competing": lambda promised: (
        promised.subscription == "ephemeral" or "competing" in promised.distribution
    ),
    "a durable receipt needs a durability": lambda promised: (
        promised.receipt != "durable" or promised.durability != "none"
    ),
    "multi_process needs a network": lambda promised: not promised.multi_process or promised.network,
    "a transport needs a distribution": lambda promised: bool(promised.distribution),
    "a transport needs max_message_bytes above 0": lambda promised: promised.max_message_bytes > 0,
}


def require(broker: object, promised: Capabilities, needed: Capabilities, *, for_: str, remedy: str) -> None:
    """
    Check that the capabilities that *broker* has *promised* cover the *needed* ones.

    Raises:
        UnsupportedCapability: A capability is missing. The error lists the missing capabilities, and names the call
            that needs them (*for_*) and the alternative for the program (*remedy*).
    """
    if lacks := promised.missing(needed):
        raise UnsupportedCapability(type(broker).__name__, lacks, why=for_, remedy=remedy)


def _rank(name: str, level: object) -> Any:
    return _LEVELS[name].index(str(level)) if name in _LEVELS else level


def _text(level: object) -> str:
    return "{" + ", ".join(sorted(map(str, level))) + "}" if isinstance(level, AbstractSet) else str(level)
